"""Two prefixes never share a row; nor a key, where neither begins the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from schema_world import OLD, Migrate, Sql
from support import lease_of

from govredis import GovRedis, Limit
from govredis.keys import Keys, is_prefix
from govredis.testing.servers import PostgresServer, RedisServer

MakeGov = Callable[..., GovRedis]

WORDS = ["a", "b", ":", "session:", "lock", "rate_limit:", "agent_", "sessions", "meta", "govredis", "2x", "é"]
BY_LENGTH = [["".join(words) for words in itertools.product(WORDS, repeat=n)] for n in range(5)]


def texts(made: Callable[[str], str], kept: Callable[[str], Any]) -> st.SearchStrategy[str]:
    """Up to four words, as `made` of them, where they are `kept`. Drawn word by word, they take twice as long."""
    found = [list(dict.fromkeys(filter(kept, map(made, of_length)))) for of_length in BY_LENGTH]
    return st.one_of([st.sampled_from(of_length) for of_length in found if of_length])


PREFIXES = texts(str, is_prefix)
IDS = texts(str, bool)
NAMES = texts(lambda text: text.replace(":", ""), bool)


@given(PREFIXES, IDS, PREFIXES, IDS)
@example("app", "2x", "app2", "x")
@example("", "appx", "app", "x")
def test_a_row_is_of_one_prefix_and_one_id(one: str, id1: str, two: str, id2: str) -> None:
    first, second = Keys(one), Keys(two)
    assert (first.row(id1) == second.row(id2)) == ((one, id1) == (two, id2))
    assert first.id_of(first.row(id1)) == id1
    assert first.id_if_ours(second.row(id2)) == (id2 if two in ("", one) else None)


@given(PREFIXES, NAMES, IDS, PREFIXES, NAMES, IDS)
@example("a", "o", "irate_limit:o:i", "arate_limit:o:i", "o", "i")
def test_so_it_is_of_one_limit(one: str, op1: str, id1: str, two: str, op2: str, id2: str) -> None:
    rows = [keys.row_of_key(keys.rate_limit(op, i)) for keys, op, i in ((Keys(one), op1, id1), (Keys(two), op2, id2))]
    assert (rows[0] == rows[1]) == ((one, op1, id1) == (two, op2, id2))


def kinds(keys: Keys, name: str, identity: str) -> dict[str, str]:
    return {
        "session": keys.session(identity),
        "agent_sessions": keys.agent_sessions(identity),
        "lock": keys.lock(identity),
        "rate_limit": keys.rate_limit(name, identity),
        "agent_meta": keys.cached("agent_meta", identity),
        "guard": keys.guard(),
        "parked": keys.parked(),
        "health": keys.health_history(),
        "generation": keys.generation(name),
    }


WITH_COLONS = texts(lambda text: text and f"{text}:", is_prefix)


@given(WITH_COLONS, NAMES, IDS, WITH_COLONS, NAMES, IDS)
@example("", "n", "session:x", "a:", "n", "x")
@settings(max_examples=500)
def test_keys_of_prefixes_that_end_with_a_colon_never_meet(
    one: str, name1: str, id1: str, two: str, name2: str, id2: str
) -> None:
    assume(one != two)
    assert not set(kinds(Keys(one), name1, id1).values()) & set(kinds(Keys(two), name2, id2).values())


@given(PREFIXES, NAMES, IDS, PREFIXES, NAMES, IDS)
@settings(max_examples=500, suppress_health_check=[HealthCheck.filter_too_much])
def test_nor_do_any_keys_where_no_prefix_begins_the_other(
    one: str, name1: str, id1: str, two: str, name2: str, id2: str
) -> None:
    assume(not one.startswith(two) and not two.startswith(one))
    keys = [
        {*kinds(Keys(prefix), name, identity).values(), Keys(prefix).cached(name, identity)}
        for prefix, name, identity in ((one, name1, id1), (two, name2, id2))
    ]
    assert not keys[0] & keys[1]


TENANTS = ["", "app", "app2", "a"]
#: Each is, without a separator, somebody else's of the same tenants'.
AGENTS = ["x", "2x", "pp2x", "app2x", "appx", "p2x"]


@pytest.fixture
def tenants(make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> dict[str, GovRedis]:
    """By prefix: of one Redis and one PostgreSQL."""
    return {
        prefix: make_gov(redis_url=redis_server.url, database_url=postgres_server.url, key_prefix=prefix)
        for prefix in TENANTS
    }


@pytest.mark.one_redis
class TestTenants:
    @pytest.mark.parametrize("mine", TENANTS)
    def test_no_call_of_a_tenant_reaches_another(
        self, tenants: dict[str, GovRedis], mine: str, postgres_server: PostgresServer
    ) -> None:
        for prefix, gov in tenants.items():
            for agent in AGENTS:
                gov.agents.create(agent, {"of": prefix})
                gov.sessions.bind(f"s{agent}", agent)
                gov.sessions.bind(agent, agent)
        gov = tenants[mine]
        assert {i: r["metadata"]["of"] for i, r in gov.agents.get_many(AGENTS).items()} == dict.fromkeys(AGENTS, mine)
        assert gov.sessions.verify().rows == 2 * len(AGENTS)
        for agent in AGENTS:
            gov.agents.archive(agent)
            gov.agents.delete(agent)
            assert gov.sessions.for_agent(agent) == sorted([agent, f"s{agent}"])
            assert gov.sessions.unbind_agent(agent) == 2
        others = {prefix: other for prefix, other in tenants.items() if prefix != mine}
        for prefix, other in others.items():
            assert {i: r["metadata"]["of"] for i, r in other.agents.get_many(AGENTS).items()} == dict.fromkeys(
                AGENTS, prefix
            )
            assert [other.sessions.get_agent_id(agent) for agent in AGENTS] == AGENTS
            assert other.sessions.verify().bound == 2 * len(AGENTS)

    @pytest.mark.parametrize("mine", TENANTS)
    def test_purge_deletes_its_own_rows(
        self, tenants: dict[str, GovRedis], make_gov: MakeGov, mine: str, postgres_server: PostgresServer
    ) -> None:
        for gov in tenants.values():
            gov.sessions.bind("s", "a")
            gov.sessions.unbind_agent("a")
            for key in ("log", "counter"):
                gov.postgres.fetch(
                    f"INSERT INTO govredis_limit_{'windows' if key == 'log' else 'counters'} VALUES "
                    + ("(%s, '{}', 1, 1)" if key == "log" else "(%s, 1, 1, 1, 1)"),
                    (gov.internal.context.keys.row_of_key(gov.internal.context.keys.rate_limit("o", "i")),),
                )
            gov.postgres.fetch(
                "INSERT INTO govredis_health_snapshots VALUES (%s, now() - interval '31 days', '{}')",
                (gov.internal.context.keys.health_history(),),
            )
            gov.postgres.fetch(
                "INSERT INTO govredis_health_hours VALUES (%s, now() - interval '91 days', now(), 0, '{}')",
                (gov.internal.context.keys.health_history(),),
            )
        sql = tenants[mine].postgres.fetch
        sql("UPDATE govredis_sessions SET expires_at = now() - interval '1 hour'")
        sql("UPDATE govredis_session_agents SET revoked_at = now() - interval '2 days'")
        impatient = make_gov(redis_enabled=False, database_url=postgres_server.url, key_prefix=mine, session_ttl=1)
        assert (impatient.sessions.purge(), impatient.limits.purge(), impatient.health.purge()) == (1, 2, 2)
        for table, column in (
            ("sessions", "session"), ("session_agents", "agent"), ("limit_windows", "key"), ("limit_counters", "key"),
        ):  # fmt: skip
            left = {row for (row,) in sql(f"SELECT {column} FROM govredis_{table}")}
            assert {row.rpartition("\x1f")[0] for row in left} == {*TENANTS} - {mine}, table
        for table in "health_snapshots", "health_hours":
            assert sql(f"SELECT count(*) FROM govredis_{table}") == [(len(TENANTS) - 1,)]

    def test_limits_in_postgresql_are_each_tenants_own(
        self, make_gov: MakeGov, postgres_server: PostgresServer
    ) -> None:
        where = {"redis_enabled": False, "database_url": postgres_server.url}
        one = make_gov(**where, key_prefix="a")
        two = make_gov(**where, key_prefix="arate_limit:o:i")
        assert one.limits.hit("irate_limit:o:i", "1/hour", operation="o").allowed
        assert two.limits.hit("i", "1/hour", operation="o").allowed
        one.limits.reset("irate_limit:o:i", operation="o")
        assert not two.limits.hit("i", "1/hour", operation="o").allowed

    def test_an_invalidation_that_after_commit_notes_is_its_own_tenants(
        self, tenants: dict[str, GovRedis], postgres_server: PostgresServer
    ) -> None:
        for gov in tenants.values():
            gov.metadata.get_or_load("x", lambda _: "cached")
            gov.metadata.get_or_load("2x", lambda _: "cached")
        connection = psycopg2.connect(postgres_server.url)
        with tenants["app2"].metadata.after_commit(connection) as tx:
            tx.invalidate("x")
        connection.close()
        for gov in tenants.values():
            assert gov.internal.freshness is not None
            gov.internal.freshness.drain()
        found = {prefix: [i for i in ("x", "2x") if gov.metadata.get(i)] for prefix, gov in tenants.items()}
        assert found == {"": ["x", "2x"], "app": ["x", "2x"], "app2": ["2x"], "a": ["x", "2x"]}


@pytest.mark.once
@pytest.mark.one_redis
class TestUpgrade:
    """Rows of the version before, which had nothing between prefix and id."""

    @pytest.fixture
    def old(self, migrate: Migrate, sql: Sql) -> Sql:
        migrate(only=OLD)
        for prefix in ("", "app:", "app:2:"):
            sql(
                "INSERT INTO govredis_agents (agent_id, metadata) VALUES (%s, %s)",
                f"{prefix}x",
                f'{{"of": "{prefix}"}}',
            )
            sql(
                "SELECT govredis_session_bind(%s, %s, now(), '1 hour', NULL, false, NULL, 0)",
                f"{prefix}s",
                f"{prefix}x",
            )
            sql("SELECT govredis_session_unbind(%s, '1 hour', NULL)", f"{prefix}gone")
            sql("SELECT * FROM govredis_session_unbind_agent(%s, NULL, 10)", f"{prefix}gone")
            sql("SELECT govredis_limit_admit(%s, 1, 'hit', '{1}', '{3600000000}')", f"{prefix}rate_limit:o:i")
            sql("SELECT govredis_counter_admit(%s, 1, 'hit', '{1}', '{3600000000}')", f"{prefix}rate_limit:c:i")
        return sql

    def test_each_prefix_adopts_its_rows(self, database: str, migrate: Migrate, old: Sql, make_gov: MakeGov) -> None:
        versions = old("SELECT version, updated_at FROM govredis_agents ORDER BY version")
        migrate()
        for prefix in ("app:2:", "app:"):  # the longer one first
            assert migrate(key_prefix=prefix) == [f"prefix {prefix}"]
            assert migrate(key_prefix=prefix) == []
        assert old("SELECT version, updated_at FROM govredis_agents ORDER BY version") == versions
        for prefix in ("", "app:", "app:2:"):
            gov = make_gov(redis_enabled=False, database_url=database, key_prefix=prefix)
            assert gov.agents.get("x")["metadata"] == {"of": prefix}  # type: ignore[index]
            assert gov.sessions.get_agent_id("s") == "x"
            assert gov.sessions.for_agent("x") == ["s"]
            assert gov.sessions.get("gone") is None
            assert not gov.limits.hit("i", "1/hour", operation="o").allowed
            counted = Limit(1, 3600, algorithm="sliding_window_counter")
            assert not gov.limits.hit("i", counted, operation="c").allowed
            rows = gov.postgres.fetch(
                "SELECT agent FROM govredis_session_agents WHERE agent = %s", (gov.internal.context.keys.row("gone"),)
            )
            assert len(rows) == 1
        assert old("SELECT count(*) FROM govredis_agents") == [(3,)]
        old("UPDATE govredis_agents SET status = 'archived'")
        assert old("SELECT count(*) FROM govredis_outbox WHERE id LIKE '%x'") != [(0,)], "the triggers are on again"

    def test_until_then_it_is_said(self, database: str, migrate: Migrate, old: Sql, make_gov: MakeGov) -> None:
        migrate()
        gov = make_gov(redis_enabled=False, database_url=database, key_prefix="app:")
        check = next(check for check in gov.health.check().checks if check.name == "postgres")
        assert (check.status, check.data["missing_migrations"]) == ("fail", ["prefix app:"])
        assert check.output.endswith("run `govredis migrate` with GOVREDIS_KEY_PREFIX=app:")
        assert gov.postgres.migrate() == ["prefix app:"]
        gov.health._last = None
        assert gov.health.check().checks[1].status == "pass"

    def test_rows_of_the_new_version_are_nobody_elses(
        self, database: str, migrate: Migrate, sql: Sql, make_gov: MakeGov
    ) -> None:
        """An id of the prefix "" that begins with a prefix which is migrated later."""
        migrate()
        plain, app = (make_gov(redis_enabled=False, database_url=database, key_prefix=p) for p in ("", "app:"))
        plain.agents.create("app:x")
        plain.sessions.bind("app:s", "app:x")
        app.agents.create("y")
        assert app.postgres.migrate() == ["prefix app:"]
        assert plain.sessions.get_agent_id("app:s") == "app:x"
        assert plain.agents.get("app:x") is not None
        assert app.agents.get("x") is None
        assert app.agents.get("y") is not None

    def test_rows_that_the_new_version_has_written_stand(
        self, database: str, migrate: Migrate, old: Sql, make_gov: MakeGov
    ) -> None:
        migrate()
        gov = make_gov(redis_enabled=False, database_url=database, key_prefix="app:2:")
        gov.agents.create("x", {"of": "the new version"})
        gov.sessions.bind("s", "b")
        gov.postgres.migrate()
        assert gov.agents.get("x")["metadata"] == {"of": "the new version"}  # type: ignore[index]
        assert gov.sessions.get_agent_id("s") == "b"

    def test_cached_values_are_looked_up_anew(
        self, database: str, migrate: Migrate, old: Sql, make_gov: MakeGov, redis_server: RedisServer
    ) -> None:
        migrate()
        gov = make_gov(redis_url=redis_server.url, database_url=database, key_prefix="app:2:")
        assert gov.sessions.get("s") is None
        assert gov.metadata.get_or_load("x", lambda i: gov.agents.get(i) or "none") == "none"
        gov.postgres.migrate()
        assert gov.internal.freshness is not None
        gov.internal.freshness.drain()
        lease_of(gov)._snapshot = None  # X is over
        assert gov.sessions.get_agent_id("s") == "x"
        assert gov.metadata.get_or_load("x", lambda i: gov.agents.get(i) or "none") != "none"
