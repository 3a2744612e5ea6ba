"""`govredis migrate`: into which schema, and which databases it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from schema_world import OLD, Connect, Migrate, Sql

from govredis import Config, ConfigurationError, GovRedis, Limit, _migrations
from govredis.outbox import Outbox
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]


def test_two_schemas_of_one_database_are_apart(
    database: str, make_gov: MakeGov, redis_server: RedisServer, sql: Sql
) -> None:
    one, two = (make_gov(redis_enabled=False, database_url=database, schema=name) for name in ("one", "Two-user"))
    for gov in (one, two):
        assert len(gov.postgres.migrate()) > OLD
        assert gov.postgres.migrate() == []
        assert gov.postgres.missing_migrations() == []
    assert sql("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]
    sql("CREATE TABLE users (id text)")

    one.agents.create("a", {"of": "one"})
    two.agents.create("a", {"of": "two"})
    two.agents.update_metadata("a", more=1)
    one.agents.archive("a")
    two.agents.delete("a")
    assert one.agents.get("a") is not None
    one.sessions.bind("s", "a")
    assert (one.sessions.for_agent("a"), two.sessions.for_agent("a")) == (["s"], [])
    assert one.sessions.unbind_agent("a") == 1
    two.sessions.bind("s", "b")
    assert (one.sessions.get_agent_id("s"), two.sessions.get_agent_id("s")) == (None, "b")
    for operation, rate in ("log", Limit(1, 3600)), ("counter", Limit(1, 3600, algorithm="sliding_window_counter")):
        hits = [gov.limits.hit("i", rate, operation=operation) for gov in (one, one, two)]
        assert [(hit.allowed, hit.backend) for hit in hits] == [
            (True, "postgres"),
            (False, "postgres"),
            (True, "postgres"),
        ]
        assert hits[0].refund()
        assert one.limits.get_count("i", window=3600, operation=operation) == 0
        assert two.limits.get_count("i", window=3600, operation=operation) == 1
        two.limits.reset("i", operation=operation)
        assert not two.limits.stats("i", operation=operation)
    assert one.health.snapshot().stored == "postgres"
    assert (one.health.purge(), two.health.purge(), one.sessions.purge(), one.limits.purge()) == (0, 0, 0, 0)
    Outbox(one.postgres).watch("users", "id", "user_meta")
    Outbox(two.postgres).watch("users", "id", "user_meta")
    Outbox(two.postgres).unwatch("users")
    sql("INSERT INTO users VALUES ('u')")
    assert [(w.table, w.namespace) for w in Outbox(two.postgres).watched()] == [
        ('"Two-user".govredis_agents', "agent_meta")
    ]
    assert sql("SELECT count(*) FROM one.govredis_outbox WHERE id = 'u'") == [(1,)]
    assert sql("SELECT count(*) FROM \"Two-user\".govredis_outbox WHERE id = 'u'") == [(0,)]
    for gov in (one, two):
        check = next(check for check in gov.health.check().checks if check.name == "postgres")
        assert (check.status, check.output) == ("pass", "")


def test_cached_values_of_two_schemas_are_told_of_by_their_own_outbox(
    database: str, make_gov: MakeGov, redis_server: RedisServer, sql: Sql
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=database, schema="mine")
    gov.postgres.migrate()
    gov.agents.create("a", {"n": 1})
    assert gov.metadata.get_or_load("a", gov.agents.get)["metadata"] == {"n": 1}
    sql("UPDATE mine.govredis_agents SET metadata = '{\"n\": 2}'")
    assert gov.internal.freshness is not None
    assert gov.internal.freshness.drain() == 1
    assert gov.metadata.get_or_load("a", gov.agents.get)["metadata"] == {"n": 2}
    assert gov.sessions.bind("s", "a").backend == "redis"
    assert gov.sessions.verify().copied == 1


def test_an_earlier_version_of_another_schema_is_upgraded_there(
    database: str, migrate: Migrate, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had its tables in the first schema of the search_path."""
    migrate(only=OLD, schema="theirs")
    sql("INSERT INTO theirs.govredis_agents (agent_id, metadata) VALUES ('a', '{}')")
    by_path = database + "?options=-csearch_path%3Dtheirs"
    with pytest.raises(
        ConfigurationError, match=r"GOVREDIS_SCHEMA is left unset, and our tables in .* are in schema theirs"
    ):
        migrate(database_url=by_path)
    assert migrate(database_url=by_path, schema="theirs") == [name for name, _ in _migrations.read_files()[OLD:]]
    assert sql("SELECT agent_id FROM theirs.govredis_agents") == [("a",)]
    assert sql("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]


@pytest.mark.parametrize(
    "planted",
    [
        "CREATE FUNCTION public.format(text, text, name) RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$",
        "CREATE FUNCTION public.same(text, integer) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$;"
        "CREATE OPERATOR public.= (FUNCTION = public.same, LEFTARG = text, RIGHTARG = integer)",
    ],
    ids=["function", "operator"],
)
def test_a_function_that_others_have_planted_in_the_schema_is_refused(
    migrate: Migrate, connect: Connect, make_role: Callable[[str], str], sql: Sql, planted: str
) -> None:
    attacker = make_role("attacker")
    sql(f"GRANT CREATE ON SCHEMA public TO {attacker}")
    connect(attacker)(planted)
    with pytest.raises(ConfigurationError, match=rf"has \S*(format|=)\(.*, of {attacker}, which would stand in"):
        migrate()
    assert sql("SELECT to_regclass('public.govredis_migrations')") == [(None,)]
    assert len(migrate(schema="ours")) > OLD


def test_a_table_that_others_have_planted_is_not_written_to(
    migrate: Migrate, connect: Connect, make_role: Callable[[str], str], sql: Sql
) -> None:
    attacker = make_role("attacker")
    sql(f"GRANT CREATE ON SCHEMA public TO {attacker}")
    theirs = connect(attacker)
    theirs("CREATE TABLE seen (who text); GRANT ALL ON seen TO PUBLIC")
    theirs(
        "CREATE TABLE public.govredis_migrations (name text, applied_at timestamptz);"
        "CREATE FUNCTION public.spring() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NEW; END $$;"
        "CREATE TRIGGER t BEFORE INSERT ON public.govredis_migrations FOR EACH ROW EXECUTE FUNCTION public.spring()"
    )
    with pytest.raises(ConfigurationError, match=f"govredis_migrations in .* belongs to {attacker}"):
        migrate()
    assert sql("SELECT * FROM seen") == []


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_id_is_refused(make_database: Callable[..., str], encoding: str) -> None:
    url = make_database(f"ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    with GovRedis(Config(redis_enabled=False, database_url=url, postgres_timeout=20)) as gov:
        with pytest.raises(
            ConfigurationError, match=f"the encoding of PostgreSQL at .* is {encoding}, .* must be UTF8"
        ):
            gov.postgres.migrate()
        assert gov.postgres.fetch("SELECT to_regclass('govredis_migrations')") == [(None,)]
        assert len(gov.postgres.missing_migrations()) > OLD


def test_ids_pass_whatever_encoding_the_role_asks_for(
    database: str, migrate: Migrate, make_gov: MakeGov, sql: Sql,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    migrate()
    sql("ALTER ROLE postgres IN DATABASE " + database.rsplit("/", 1)[1] + " SET client_encoding = 'LATIN1'")
    for variable in (None, "LATIN1"):
        if variable is not None:
            monkeypatch.setenv("PGCLIENTENCODING", variable)
        gov = make_gov(redis_enabled=False, database_url=database)
        identity = f"é😀{variable}"
        gov.agents.create(identity, {"name": "☃"})
        found = gov.agents.get(identity)
        assert found is not None
        assert (found["agent_id"], found["metadata"]) == (identity, {"name": "☃"})
