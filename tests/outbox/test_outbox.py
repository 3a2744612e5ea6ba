"""The outbox: what is watched, and what health and the command line say of it; cached agents against PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from clocked_pair import X, name_of
from support import lease_of, redis_of

from govredis import BackendError, Config, GovRedis
from govredis.health import Check
from govredis.metadata.verify import AgentParity, verify
from govredis.outbox import Outbox
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
    assert gov.internal.freshness is not None
    return gov.internal.freshness.drain()


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
        cache.get_many([*"12345"], lambda ids: dict.fromkeys(ids, "cached"))
        pair[0].metadata.get_or_load("1", lambda _: "another namespace")
        sql(write)
        drained(pair[1])
        lease_of(pair[0])._snapshot = None
        assert set("12345") - set(cache.get_many([*"12345"])) == set(gone)
        assert (pair[0].metadata.get("1") is None) == ("TRUNCATE" in write)

    def test_a_value_cached_before_the_watch_is_invalidated_once(self, pair: Pair, users: None) -> None:
        cache = pair[0].cache("user_meta")
        cache.get_or_load("1", lambda _: "perhaps from before a write that nobody was told of")
        Outbox(pair[1].postgres).watch("theirs.users", "user id", "user_meta")
        drained(pair[1])
        lease_of(pair[0])._snapshot = None
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
            ("public.govredis_agents", "agent_meta", "agent_id"),
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
        assert [w.table for w in outbox.watched()] == ["public.govredis_agents"]
        with pytest.raises(ValueError, match="one that is watched"):
            outbox.unwatch("theirs.users")

    def test_namespaces_that_begin_alike_have_triggers_of_their_own(
        self, outbox: Outbox, pair: Pair, sql: Callable[..., Any]
    ) -> None:
        """PostgreSQL cuts a name off after 63 bytes."""
        namespaces = [start + end for start in ("n" * 49, "é" * 30, "x" * 45) for end in ("", "_one", "_two")]
        for namespace in namespaces:
            outbox.watch("theirs.users", "user id", namespace)
            outbox.watch("theirs.users", "user id", namespace)
        assert {w.namespace for w in outbox.watched()} == {"agent_meta", "user_meta", *namespaces}
        drained(pair[0])
        sql("UPDATE theirs.users SET name = 'new' WHERE \"user id\" = 1")
        told = {namespace for (namespace,) in sql("SELECT namespace FROM govredis_outbox WHERE id = '1'")}
        assert told == {"user_meta", *namespaces}
        outbox.unwatch("theirs.users")
        assert [w.table for w in outbox.watched()] == ["public.govredis_agents"]

    def test_a_table_that_cannot_be_watched_is_named(self, outbox: Outbox) -> None:
        with pytest.raises(ValueError, match="table is 'theirs"):
            outbox.watch("theirs.nothing", "id", "user_meta")
        with pytest.raises(BackendError, match="has no column id"):
            outbox.watch("theirs.users", "id", "user_meta")
        with pytest.raises(ValueError, match="namespace is"):
            outbox.watch("theirs.users", "user id", "a:b")


class TestPartitions:
    """A change that no trigger sees is noted by the next run of the relay."""

    @pytest.fixture
    def parts(self, pair: Pair, sql: Callable[..., Any]) -> Iterator[Callable[[], list[str]]]:
        """A partitioned table with the ids 1 in `low`, 2 in `nested` (of `deep`), 3 in `high`. The function returns
        what is cached of them after a run of the relay, and caches all."""
        sql(
            "CREATE SCHEMA parts; SET search_path = parts;"
            "CREATE TABLE things (id int, kind text, name text) PARTITION BY LIST (id);"
            "CREATE TABLE low PARTITION OF things FOR VALUES IN (1);"
            "CREATE TABLE deep PARTITION OF things FOR VALUES IN (2) PARTITION BY LIST (kind);"
            "CREATE TABLE nested PARTITION OF deep DEFAULT;"
            "CREATE TABLE high PARTITION OF things FOR VALUES IN (3);"
            "INSERT INTO things SELECT n, 'k', 'old' FROM generate_series(1, 3) n; RESET search_path"
        )
        Outbox(pair[0].postgres).watch("parts.things", "id", "thing")
        cache = pair[0].cache("thing")

        def look() -> list[str]:
            drained(pair[1])
            lease_of(pair[0])._snapshot = None
            found = list(cache.get_many([*"123"]))
            cache.get_many([*"123"], lambda ids: dict.fromkeys(ids, "cached"))
            return found

        assert look() == []
        assert look() == ["1", "2", "3"]
        assert look() == ["1", "2", "3"], "told once"
        yield look
        sql("DROP SCHEMA parts CASCADE")

    @pytest.mark.parametrize(
        ("change", "kept"),
        [
            ("UPDATE parts.nested SET name = 'new'", "13"),
            ("UPDATE parts.things SET id = 1 WHERE id = 3", "2"),
            ("TRUNCATE parts.high", ""),
            ("TRUNCATE parts.nested", ""),
            ("TRUNCATE parts.things", ""),
            ("ALTER TABLE parts.things DETACH PARTITION parts.high", ""),
            ("ALTER TABLE parts.deep DETACH PARTITION parts.nested", ""),
            ("DROP TABLE parts.low", ""),
            (
                "CREATE TABLE parts.more (id int, kind text, name text); INSERT INTO parts.more VALUES (4, 'k', 'x');"
                "ALTER TABLE parts.things ATTACH PARTITION parts.more FOR VALUES IN (4)",
                "",
            ),
            (
                "ALTER TABLE parts.things DETACH PARTITION parts.high; UPDATE parts.high SET name = 'new';"
                "ALTER TABLE parts.things ATTACH PARTITION parts.high FOR VALUES IN (3)",
                "",
            ),
            (
                "ALTER TABLE parts.high DISABLE TRIGGER USER; UPDATE parts.high SET name = 'new';"
                "ALTER TABLE parts.high ENABLE TRIGGER USER",
                "",
            ),
            ("ANALYZE parts.high; VACUUM parts.high", "123"),
        ],
    )
    def test_each_change(self, parts: Callable[[], list[str]], sql: Callable[..., Any], change: str, kept: str) -> None:
        for statement in change.split(";"):
            sql(statement)
        assert parts() == list(kept)
        assert parts() == ["1", "2", "3"], "told once"

    def test_changes_of_a_partition_attached_later_are_noted_too(
        self, parts: Callable[[], list[str]], pair: Pair, sql: Callable[..., Any]
    ) -> None:
        sql("ALTER TABLE parts.things DETACH PARTITION parts.high")
        sql("ALTER TABLE parts.things ATTACH PARTITION parts.high FOR VALUES IN (3)")
        assert parts() == []
        sql("UPDATE parts.high SET name = 'new'")
        assert parts() == ["1", "2"]
        sql("TRUNCATE parts.high")
        assert parts() == []
        assert [tuple(w) for w in Outbox(pair[0].postgres).watched()][:1] == [("parts.things", "thing", "id")]
        Outbox(pair[0].postgres).unwatch("parts.things")
        assert parts() == []
        assert sql("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'govredis%thing'") == [(0,)]
        assert sql("SELECT * FROM govredis_outbox_shapes WHERE namespace = 'thing'") == []

    def test_each_redis_is_told(
        self, parts: Callable[[], list[str]], pair: Pair, sql: Callable[..., Any], make_pair: Callable[..., Pair],
        mortal_redis: RedisServer,
    ) -> None:  # fmt: skip
        other = make_pair(mortal_redis)[0]
        other.cache("thing").get_or_load("3", lambda _: "cached")
        sql("TRUNCATE parts.high")
        assert parts() == []
        drained(other)
        lease_of(other)._snapshot = None
        assert other.cache("thing").get("3") is None


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
        assert check().data == {"entries": 0, "oldest": 0.0, "fresh": True}
        sql("UPDATE govredis_agents SET metadata = '{}'; UPDATE govredis_agents SET metadata = '{}'")
        seen = check()
        assert (seen.status, seen.data["entries"]) == ("pass", 2)
        sql(f"UPDATE govredis_outbox SET at = at - interval '{X + 1} seconds'")
        seen = check()
        assert (seen.status, gov.health.check().status) == ("warn", "warn")
        ago = re.search(r"2 changes, the oldest (\d+) s ago", seen.output)
        assert ago is not None
        assert X + 1 <= int(ago[1]) < X + 100, "of a minute ago: by the age of the entries, not of the last run"
        redis_server.command("DEL", "govredis:guard")
        gov.health._last = None
        assert "outbox" not in [check.name for check in gov.health.check().checks]
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
    assert command("outbox", "status").stdout.endswith(
        "no cached values are in use on this Redis, so it is not told of changes\n"
    )
    done = command("outbox", "watch", "theirs.users", "user id", "--namespace", "user_meta")
    assert done.stdout == "theirs.users is watched for user_meta\n", done.stderr
    gov.metadata.get_or_load("a", lambda _: 1)
    shown = command("outbox", "status").stdout.splitlines()
    assert [line.split() for line in shown[:3]] == [
        ["TABLE", "COLUMN", "NAMESPACE"],
        ["public.govredis_agents", "agent_id", "agent_meta"],
        ["theirs.users", "user", "id", "user_meta"],
    ]
    assert shown[3] == "this Redis has been told of everything"
    gov.agents.create("a")
    assert "has not been told of 1 change, the oldest" in command("outbox", "status").stdout
    assert command("outbox", "unwatch", "theirs.users").stdout == "theirs.users is not watched any more\n"
    again = command("outbox", "unwatch", "theirs.users")
    assert again.returncode == 2
    assert again.stderr.endswith("\nError: table is 'theirs.users'; it must be one that is watched\n")


def test_the_commands_of_cached_values(command: Callable[..., Any], gov: GovRedis) -> None:
    nothing = command("metadata", "get", "a")
    assert (nothing.returncode, nothing.stdout) == (1, "a is not cached\n")
    gov.agents.create("a", {"name": "x"})
    name_of(gov)
    assert json.loads(command("metadata", "get", "a").stdout)["metadata"] == {"name": "x"}
    verified = command("metadata", "verify")
    assert (verified.returncode, verified.stdout) == (0, "1 compared, 0 behind, 0 of them for too long: 0.00%\n")
    assert command("metadata", "invalidate", "a").stdout == "a is invalidated\n"
    assert gov.metadata.get("a") is None
    gov.cache("report").set("r", 1)
    assert command("metadata", "--namespace", "report", "get", "r").stdout == "1\n"
    other = command("metadata", "--namespace", "report", "verify")
    assert (other.returncode, "\nError: only agent_meta can be verified" in other.stderr) == (2, True)


def test_verify_finds_what_is_stale_for_too_long(
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
            cursor.execute("UPDATE govredis_agents SET metadata = '{}' WHERE agent_id = %s", (f"p*[:\x1f{agent}",))
        cursor.execute("DELETE FROM govredis_agents WHERE agent_id = %s", ("p*[:\x1fdeleted",))
    connection.close()
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        gov.metadata.invalidate("behind")

    def run(samples: int) -> AgentParity:
        return verify(
            gov.internal.context.keys,
            redis_of(gov),
            gov.metadata,
            gov.agents,
            samples=samples,
            staleness=5,
            sleep=sleep,
        )

    assert run(100) == AgentParity(4, 3, ["deleted", "stale"])
    assert waited == [5]
    assert run(2).compared <= 2
