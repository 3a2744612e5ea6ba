"""The outbox: what is watched, what health and the command line say of it; and the audit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from metadata_clock import X, name_of

from govredis import BackendError, Config, GovRedis
from govredis.health import Check
from govredis.metadata import Outbox
from govredis.metadata.audit import Audit, audit
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

Pair = tuple[GovRedis, GovRedis]


@pytest.fixture
def users(sql: Callable[..., Any]) -> Iterator[None]:
    """A table of somebody else's, with a column whose name wants quotes; and a role that may write to it."""
    sql(
        'CREATE SCHEMA theirs; CREATE TABLE theirs.users ("user id" int PRIMARY KEY, name text);'
        "CREATE TABLE theirs.tags (tag int PRIMARY KEY, owner text);"
        "INSERT INTO theirs.users VALUES (1, 'old'), (2, 'old');"
        "CREATE ROLE writer; GRANT USAGE ON SCHEMA theirs TO writer; GRANT ALL ON theirs.users TO writer"
    )
    yield
    sql("DROP SCHEMA theirs CASCADE; DROP ROLE writer")


@pytest.fixture
def outbox(pair: Pair, users: None) -> Outbox:
    made = Outbox(pair[0].postgres)
    made.watch("theirs.users", "user id", "user_meta")
    return made


def drained(gov: GovRedis) -> int | None:
    assert gov._guard is not None
    return gov._guard.drain()


class TestWatch:
    @pytest.mark.parametrize(
        ("write", "gone"),
        [
            ("INSERT INTO theirs.users VALUES (3, 'x')", "3"),
            ("UPDATE theirs.users SET name = 'new' WHERE name = 'old' AND \"user id\" = 1", "1"),
            ('UPDATE theirs.users SET "user id" = 3 WHERE "user id" = 1', "13"),
            ("DELETE FROM theirs.users", "12"),
            ("TRUNCATE theirs.users", "12345"),
            ("SELECT 1", ""),
        ],
    )
    def test_every_change_invalidates(
        self, outbox: Outbox, pair: Pair, sql: Callable[..., Any], write: str, gone: str
    ) -> None:
        drained(pair[0])
        cache = pair[0].cache("user_meta")
        cache.get_many("12345", lambda ids: dict.fromkeys(ids, "cached"))
        pair[0].metadata.get_or_load("1", lambda _: "another namespace")
        sql(write)
        drained(pair[1])
        pair[0]._guard._seen = None  # type: ignore[union-attr]
        assert set("12345") - set(cache.get_many("12345")) == set(gone)
        assert (pair[0].metadata.get("1") is None) == ("TRUNCATE" in write)

    def test_what_was_cached_before_is_invalidated_once(self, pair: Pair, users: None) -> None:
        cache = pair[0].cache("user_meta")
        cache.get_or_load("1", lambda _: "perhaps from before a write that nobody was told of")
        Outbox(pair[1].postgres).watch("theirs.users", "user id", "user_meta")
        drained(pair[1])
        pair[0]._guard._seen = None  # type: ignore[union-attr]
        assert cache.get("1") is None

    def test_a_writer_needs_no_rights_of_ours_nor_our_search_path(
        self, outbox: Outbox, pair: Pair, sql: Callable[..., Any]
    ) -> None:
        drained(pair[0])
        pair[0].cache("user_meta").get_or_load("1", lambda _: "cached")
        sql("SET ROLE writer; SET search_path = theirs; UPDATE users SET name = 'new'; RESET ROLE; RESET search_path")
        assert drained(pair[1]) == 2
        assert pair[0].cache("user_meta").get("1") is None

    def test_no_temporary_table_takes_the_place_of_ours(self, outbox: Outbox, sql: Callable[..., Any]) -> None:
        sql("CREATE TEMPORARY TABLE govredis_outbox (LIKE public.govredis_outbox)")
        sql("UPDATE theirs.users SET name = 'new'")
        assert sql("SELECT count(*) FROM pg_temp.govredis_outbox") == [(0,)]
        sql("DROP TABLE pg_temp.govredis_outbox")

    def test_several_rows_of_one_id_that_are_committed_in_another_order(
        self, pair: Pair, users: None, connect: Callable[[], Any], sql: Callable[..., Any]
    ) -> None:
        outbox = Outbox(pair[0].postgres)
        outbox.watch("theirs.tags", "owner", "user_meta")
        drained(pair[0])
        first = connect()
        first.cursor().execute("INSERT INTO theirs.tags VALUES (1, 'u')")
        sql("INSERT INTO theirs.tags VALUES (2, 'u'), (3, NULL)")
        assert drained(pair[0]) == 1
        pair[0].cache("user_meta").get_or_load("u", lambda _: {"tags": [2], "version": 10**12})
        first.commit()
        drained(pair[0])
        assert pair[0].cache("user_meta").get("u") is None, "whatever the value says of a version of its own"

    def test_twice_is_harmless_and_unwatch_ends_it(self, outbox: Outbox, pair: Pair, sql: Callable[..., Any]) -> None:
        outbox.watch("theirs.users", "user id", "user_meta")
        outbox.watch("theirs.users", "name", "name_meta")
        assert [tuple(w) for w in outbox.watched()] == [
            ("govredis_agents", "agent_meta", "agent_id"),
            ("theirs.users", "name_meta", "name"),
            ("theirs.users", "user_meta", "user id"),
        ]
        drained(pair[0])
        sql("UPDATE theirs.users SET name = 'x' WHERE \"user id\" = 1")
        assert drained(pair[0]) == 3
        outbox.unwatch("theirs.users")
        drained(pair[0])
        sql("UPDATE theirs.users SET name = 'y'")
        assert drained(pair[0]) == 0
        assert [w.table for w in outbox.watched()] == ["govredis_agents"]
        with pytest.raises(ValueError, match="one that is watched"):
            outbox.unwatch("theirs.users")

    def test_what_cannot_be_watched(self, outbox: Outbox) -> None:
        with pytest.raises(ValueError, match="table is 'theirs"):
            outbox.watch("theirs.nothing", "id", "user_meta")
        with pytest.raises(BackendError, match="has no column id"):
            outbox.watch("theirs.users", "id", "user_meta")
        with pytest.raises(ValueError, match="namespace is"):
            outbox.watch("theirs.users", "user id", "a:b")


class TestHealth:
    def test_says_nothing_where_no_cached_values_are_used(self, gov: GovRedis) -> None:
        assert "outbox" not in [check.name for check in gov.health.check().checks]

    def test_says_how_far_redis_is_behind(self, pair: Pair, sql: Callable[..., Any], redis_server: RedisServer) -> None:
        gov = pair[0]
        gov.agents.create("a")
        name_of(gov)
        drained(gov)

        def check() -> Check:
            gov.health._last = None
            report = gov.health.check()
            return next(check for check in report.checks if check.name == "outbox")

        assert (check().status, check().output) == ("pass", "")
        assert check().data == {"entries": 0, "oldest": 0.0, "guard": True}
        sql("UPDATE govredis_agents SET metadata = '{}'; UPDATE govredis_agents SET metadata = '{}'")
        seen = check()
        assert (seen.status, seen.data["entries"]) == ("pass", 2)
        sql(f"UPDATE govredis_outbox SET at = at - interval '{X + 1} seconds'")
        seen = check()
        assert (seen.status, gov.health.check().status) == ("warn", "warn")
        assert "2 changes, the oldest 6 s ago" in seen.output
        redis_server.command("DEL", "govredis:guard")
        assert "outbox" not in [check.name for check in gov.health._check_outbox()]
        drained(gov)
        assert check().status == "pass"
        assert gov.postgres.fetch("SELECT count(*) FROM govredis_epochs") == [(1,)], "the one before is forgotten"


@pytest.fixture
def command(redis_server: RedisServer, postgres_server: PostgresServer) -> Callable[..., Any]:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        ours = {f.metadata["variable"] for f in Config.__dataclass_fields__.values()}
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment |= {"REDIS_URL": redis_server.url, "GOVREDIS_DATABASE_URL": postgres_server.url}
        environment |= {"GOVREDIS_METADATA_STALENESS": "60"}
        for what in ("SOCKET", "CONNECT", "POSTGRES"):
            environment[f"GOVREDIS_{what}_TIMEOUT"] = "10"
        program = os.path.join(os.path.dirname(sys.executable), "govredis")
        return subprocess.run([program, *args], env=environment, capture_output=True, text=True, timeout=180)

    return run


def test_the_commands_of_the_outbox(command: Callable[..., Any], users: None, gov: GovRedis) -> None:
    assert command("outbox", "status").stdout.endswith("this Redis is told of nothing: no cached values are in use\n")
    done = command("outbox", "watch", "theirs.users", "user id", "--namespace", "user_meta")
    assert done.stdout == "theirs.users is watched for user_meta\n", done.stderr
    gov.metadata.get_or_load("a", lambda _: 1)
    shown = command("outbox", "status").stdout.splitlines()
    assert [line.split() for line in shown[:3]] == [
        ["TABLE", "COLUMN", "NAMESPACE"],
        ["govredis_agents", "agent_id", "agent_meta"],
        ["theirs.users", "user", "id", "user_meta"],
    ]
    assert shown[3] == "this Redis has been told of everything"
    gov.agents.create("a")
    assert "has not been told of 1 changes, the oldest" in command("outbox", "status").stdout
    assert command("outbox", "unwatch", "theirs.users").stdout == "theirs.users is not watched any more\n"
    again = command("outbox", "unwatch", "theirs.users")
    assert (again.returncode, again.stderr) == (
        1, "Error: table is 'theirs.users'; it must be one that is watched\n",
    )  # fmt: skip


def test_the_commands_of_cached_values(command: Callable[..., Any], gov: GovRedis) -> None:
    nothing = command("metadata", "get", "a")
    assert (nothing.returncode, nothing.stdout) == (1, "a is not cached\n")
    gov.agents.create("a", {"name": "x"})
    name_of(gov)
    assert json.loads(command("metadata", "get", "a").stdout)["metadata"] == {"name": "x"}
    audited = command("metadata", "audit")
    assert (audited.returncode, audited.stdout) == (0, "1 compared, 0 behind, 0 of them for too long: 0.00%\n")
    assert command("metadata", "invalidate", "a").stdout == "a is invalidated\n"
    assert gov.metadata.get("a") is None
    gov.cache("report").set("r", 1)
    assert command("metadata", "--namespace", "report", "get", "r").stdout == "1\n"
    other = command("metadata", "--namespace", "report", "audit")
    assert (other.returncode, other.stderr.startswith("Error: only agent_meta can be audited")) == (1, True)


def test_the_audit_finds_what_is_stale_for_too_long(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer,
    sql: Callable[..., Any],
) -> None:  # fmt: skip
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, key_prefix="p*[:")
    for agent in ("fresh", "behind", "stale", "deleted"):
        gov.agents.create(agent, {"name": agent})
        name_of(gov, agent)
    gov.metadata.get_or_load("foreign", lambda _: {"version": 1})
    sql("SELECT count(*) FROM govredis_agents")
    connection = psycopg2.connect(postgres_server.url)
    with connection, connection.cursor() as cursor:
        for agent in ("behind", "stale"):
            cursor.execute("UPDATE govredis_agents SET metadata = '{}' WHERE agent_id = %s", (f"p*[:{agent}",))
        cursor.execute("DELETE FROM govredis_agents WHERE agent_id = %s", ("p*[:deleted",))
    connection.close()
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        gov.metadata.invalidate("behind")

    def run(samples: int) -> Audit:
        return audit(gov._keys, gov._redis, gov.metadata, gov.agents, samples=samples, staleness=5, sleep=sleep)

    assert run(100) == Audit(4, 3, ["deleted", "stale"])
    assert waited == [5]
    assert run(2).compared <= 2
