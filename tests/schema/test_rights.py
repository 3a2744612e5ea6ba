"""No function of ours does anything for its caller that the caller may not do, but noting what was changed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import psycopg2
import pytest
from psycopg2 import errors
from schema_world import OLD, PASSWORD, Connect, Migrate, Sql

from govredis import BackendError, Config, ConfigurationError, GovRedis, Limit
from govredis.keys import Keys
from govredis.limits.backends.postgres_backend import PostgresLimitBackend
from govredis.metadata.commit import AfterCommit
from govredis.outbox import Outbox
from govredis.postgres import Postgres
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: These have the rights of their owner: they write to our tables, in the transactions of roles that may not.
DEFINERS = {
    *("govredis_outbox_add", "govredis_outbox_changed", "govredis_agents_changed"),
    *("govredis_event_add", "govredis_agents_event"),
}

_OURS = """
SELECT p.oid::regprocedure::text, p.proname, p.prosecdef, p.proconfig,
       p.proacl IS NULL OR EXISTS (SELECT FROM aclexplode(p.proacl) a WHERE a.grantee = 0)
FROM pg_proc p WHERE p.proname LIKE 'govredis%'
"""

# Functions, operators and types named as those that our functions use, each with arguments that fit better than the
# built-in's: found, they would be preferred. All say who ran them.
_SHADOWS = """
CREATE FUNCTION {schema}.say(what text) RETURNS void LANGUAGE sql AS
    $$ INSERT INTO {seen} VALUES (current_user, what) $$;
CREATE FUNCTION {schema}.format(text, text) RETURNS text LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('format'); RETURN pg_catalog.format($1, VARIADIC ARRAY[$2]); END $$;
CREATE FUNCTION {schema}.nextval(text) RETURNS bigint LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('nextval'); RETURN 1; END $$;
CREATE FUNCTION {schema}.random() RETURNS double precision LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('random'); RETURN 0; END $$;
CREATE FUNCTION {schema}.octet_length(text) RETURNS integer LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('octet_length'); RETURN 0; END $$;
CREATE FUNCTION {schema}.less(double precision, numeric) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('<'); RETURN true; END $$;
CREATE OPERATOR {schema}.< (FUNCTION = {schema}.less, LEFTARG = double precision, RIGHTARG = numeric);
CREATE FUNCTION {schema}.more(bigint, integer) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('>'); RETURN true; END $$;
CREATE OPERATOR {schema}.> (FUNCTION = {schema}.more, LEFTARG = bigint, RIGHTARG = integer);
CREATE FUNCTION {schema}.same(text, text) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('='); RETURN false; END $$;
CREATE OPERATOR {schema}.= (FUNCTION = {schema}.same, LEFTARG = text, RIGHTARG = text);
CREATE DOMAIN {schema}.bigint AS integer;
CREATE DOMAIN {schema}.regprocedure AS integer;
CREATE TYPE {schema}.text AS ENUM ('a')
"""


@pytest.fixture
def attacker(connect: Connect, make_role: Callable[[str], str], sql: Sql) -> tuple[str, Sql]:
    """A role with CONNECT and TEMP, no more, and its own table, where its code notes the role that runs it."""
    role = make_role("attacker")
    sql(f"CREATE SCHEMA AUTHORIZATION {role}; CREATE TABLE {role}.seen (ran_as text, what text)")
    sql(
        f"ALTER TABLE {role}.seen OWNER TO {role}; GRANT INSERT ON {role}.seen TO PUBLIC;"
        f"GRANT USAGE ON SCHEMA {role} TO PUBLIC"
    )
    return role, connect(role)


def bait(role: str, where: str = "pg_temp") -> str:
    """A table whose column is of a type that, when it is made text, notes the role that does so."""
    return f"""
    CREATE TYPE {where}.bait AS ENUM ('a');
    CREATE FUNCTION {where}.spring({where}.bait) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {role}.seen VALUES (current_user, 'cast'); RETURN 'a'; END $$;
    CREATE CAST ({where}.bait AS text) WITH FUNCTION {where}.spring({where}.bait);
    CREATE TABLE {where}.trap (id {where}.bait)
    """


def keep_outbox(sql: Sql, schema: str = "public") -> None:
    """Where there is an epoch, the outbox does not clean itself before that was told."""
    sql(f"INSERT INTO {schema}.govredis_epochs VALUES (1, 1, pg_current_snapshot(), now())")


def others(sql: Sql, role: str) -> list[str]:
    """The roles that ran the attacker's code, but for the attacker."""
    return [who for (who,) in sql(f"SELECT DISTINCT ran_as FROM {role}.seen WHERE ran_as <> '{role}'")]


def test_the_trigger_cannot_be_put_on_a_table_of_an_attackers(
    migrate: Migrate, attacker: tuple[str, Sql], sql: Sql
) -> None:
    migrate()
    role, theirs = attacker
    theirs(bait(role))
    with pytest.raises(errors.InsufficientPrivilege, match=r"permission denied for function .*govredis_outbox_changed"):
        theirs(
            "CREATE TRIGGER t AFTER INSERT ON pg_temp.trap FOR EACH ROW"
            " EXECUTE FUNCTION public.govredis_outbox_changed('agent_meta', 'id')"
        )
    theirs("INSERT INTO pg_temp.trap VALUES ('a')")
    assert others(sql, role) == []


@pytest.mark.parametrize("where", ["pg_temp", "a schema"])
def test_nor_does_it_run_their_code_where_it_is(
    migrate: Migrate, attacker: tuple[str, Sql], sql: Sql, where: str
) -> None:
    """Where it was put before `migrate` took the right away, or by a superuser who was talked into it."""
    migrate(only=OLD)
    role, theirs = attacker
    place = role if where == "a schema" else where
    theirs(bait(role, place))
    theirs(
        f"CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON {place}.trap FOR EACH ROW"
        " EXECUTE FUNCTION public.govredis_outbox_changed('agent_meta', 'id')"
    )
    migrate()
    keep_outbox(sql)
    theirs(f"INSERT INTO {place}.trap VALUES ('a'); UPDATE {place}.trap SET id = 'a'; DELETE FROM {place}.trap")
    assert others(sql, role) == []
    assert set(sql("SELECT namespace, id FROM govredis_outbox")) == {("agent_meta", "a")}


def test_a_domain_over_a_built_in_type_is_its_text(migrate: Migrate, sql: Sql) -> None:
    migrate()
    keep_outbox(sql)
    sql(
        "CREATE DOMAIN code AS char(5); CREATE DOMAIN short AS code;"
        "CREATE TABLE things (id short, flag boolean); SELECT govredis_outbox_watch('things', 'id', 'thing');"
        "SELECT govredis_outbox_watch('things', 'flag', 'flag'); TRUNCATE govredis_outbox;"
        "INSERT INTO things VALUES ('ab', true)"
    )
    assert set(sql("SELECT namespace, id FROM govredis_outbox")) == {("thing", "ab"), ("flag", "true")}


@pytest.mark.parametrize("place", ["public", "search_path"])
def test_no_name_that_an_attacker_has_made_is_taken_for_a_built_in(
    migrate: Migrate, attacker: tuple[str, Sql], sql: Sql, place: str
) -> None:
    migrate()
    role, theirs = attacker
    schema = "public" if place == "public" else role
    sql(f"GRANT CREATE ON SCHEMA {schema} TO {role}; CREATE TABLE users (id text, name text)")
    sql(f"SELECT govredis_outbox_watch('users', 'id', 'user_meta'); GRANT ALL ON users TO {role}")
    sql("TRUNCATE govredis_outbox")
    theirs(_SHADOWS.format(schema=schema, seen=f"{role}.seen"))
    theirs(f"CREATE TEMPORARY TABLE govredis_outbox (LIKE {role}.seen); CREATE TEMPORARY TABLE govredis_epochs (n int)")
    theirs("CREATE TEMPORARY SEQUENCE govredis_versions; CREATE TEMPORARY TABLE pg_type (LIKE pg_catalog.pg_type)")
    theirs(f"SET search_path = {role}, public, pg_temp, pg_catalog")
    # More often than the one time in a hundred that the table cleans itself.
    theirs("INSERT INTO public.users SELECT n::pg_catalog.text, '' FROM pg_catalog.generate_series(1, 1000) n")
    theirs("UPDATE public.users SET id = id OPERATOR(pg_catalog.||) 'x'; DELETE FROM public.users")
    assert others(sql, role) == []
    assert sql("SELECT last_value FROM govredis_versions") >= [(4000,)], "all was noted, if not kept"
    assert theirs("SELECT pg_catalog.count(*) FROM pg_temp.govredis_outbox") == [(0,)]


def test_a_stranger_may_call_none_of_our_functions(migrate: Migrate, attacker: tuple[str, Sql], sql: Sql) -> None:
    migrate()
    called = 0
    _, theirs = attacker
    for signature, name, *_ in sql(_OURS):
        arguments = sql("SELECT proargtypes::regtype[]::text[] FROM pg_proc WHERE oid = %s::regprocedure", signature)
        values = ", ".join(f"NULL::{argument}" for argument in arguments[0][0])
        with pytest.raises(errors.InsufficientPrivilege, match=rf"permission denied for function .*{name}"):
            theirs(f"SELECT public.{name}({values})")
        called += 1
    assert called >= 19


def test_the_rights_of_each_of_our_functions(migrate: Migrate, sql: Sql) -> None:
    migrate()
    ours = sql(_OURS)
    assert len(ours) >= 19
    for signature, name, definer, settings, by_public in ours:
        assert definer == (name in DEFINERS), signature
        assert settings is not None, signature
        assert "search_path=pg_catalog, pg_temp" in settings, signature
        assert not by_public, signature
    assert {name for _, name, *_ in ours} >= DEFINERS


def test_an_upgraded_database_has_the_rights_of_a_new_one(migrate: Migrate, sql: Sql) -> None:
    migrate(only=OLD)
    assert any(by_public for *_, by_public in sql(_OURS))
    migrate()
    for signature, name, definer, settings, by_public in sql(_OURS):
        assert (definer, by_public) == (name in DEFINERS, False), signature
        assert settings == ["search_path=pg_catalog, pg_temp"], signature


def test_a_role_that_has_rights_on_our_tables_keeps_those_on_our_functions(
    migrate: Migrate, connect: Connect, make_role: Callable[[str], str], sql: Sql
) -> None:
    """An application that does not run as the role that migrates; its older processes go on, too."""
    migrate(only=OLD)
    app, reader = make_role("app"), make_role("reader")
    sql(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {app};"
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {app};"
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {reader}"
    )
    migrate()
    keep_outbox(sql)
    theirs = connect(app)
    assert theirs("SELECT alive FROM govredis_session_unbind('s', '1 hour', NULL)") == [(False,)]
    assert theirs("SELECT admitted FROM govredis_limit_admit('k', 1, 'hit', '{1}', '{60000000}')") == [(True,)]
    theirs("INSERT INTO govredis_agents (agent_id, metadata) VALUES ('a', '{}')")
    assert theirs("SELECT id FROM govredis_outbox ORDER BY entry") == [("s",), ("a",)]
    with pytest.raises(errors.InsufficientPrivilege, match="permission denied for function"):
        connect(reader)("SELECT govredis_outbox_add('agent_meta', 'a', NULL)")


def test_the_rights_that_the_readme_names_are_enough(
    migrate: Migrate, connect: Connect, make_role: Callable[[str], str], sql: Sql
) -> None:
    migrate(schema="govredis")
    keep_outbox(sql, "govredis")
    app = make_role("app")
    sql(
        f"GRANT USAGE ON SCHEMA govredis TO {app};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA govredis TO {app};"
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA govredis TO {app};"
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA govredis TO {app}"
    )
    theirs = connect(app)
    assert theirs("SELECT alive FROM govredis.govredis_session_unbind('s', '1 hour', NULL)") == [(False,)]
    theirs("INSERT INTO govredis.govredis_agents (agent_id, metadata) VALUES ('a', '{}')")
    theirs(f"SET search_path = {app}; RESET search_path")
    assert theirs("SELECT id FROM govredis.govredis_outbox ORDER BY entry") == [("s",), ("a",)]


def test_a_role_made_later_writes_to_a_watched_table_and_is_noted(
    migrate: Migrate, connect: Connect, make_role: Callable[[str], str], sql: Sql
) -> None:
    migrate()
    keep_outbox(sql)
    sql("CREATE TABLE users (id text, name text); SELECT govredis_outbox_watch('users', 'id', 'user_meta')")
    writer = make_role("writer")
    sql(f"GRANT INSERT, TRUNCATE ON users TO {writer}; TRUNCATE govredis_outbox")
    theirs = connect(writer)
    theirs("INSERT INTO users VALUES ('u', '')")
    theirs("TRUNCATE users")
    assert sql("SELECT namespace, id FROM govredis_outbox ORDER BY entry") == [("user_meta", "u"), ("user_meta", None)]
    for what in ("INSERT INTO govredis_outbox VALUES (DEFAULT)", "SELECT nextval('govredis_versions')"):
        with pytest.raises(psycopg2.Error, match="permission denied"):
            theirs(what)


def test_a_writer_leaves_no_more_of_an_id_than_can_be_cached(migrate: Migrate, sql: Sql) -> None:
    migrate()
    keep_outbox(sql)
    sql(
        "CREATE TABLE users (id text); SELECT govredis_outbox_watch('users', 'id', 'user_meta');"
        "TRUNCATE govredis_outbox"
    )
    sql("INSERT INTO users VALUES (repeat('x', 100000)), (repeat('y', 512))")
    assert sql("SELECT left(id, 1), length(id) FROM govredis_outbox") == [("y", 512)]


def test_the_rights_that_the_readme_names_for_watching_are_enough(
    migrate: Migrate, connect: Connect, make_role: Callable[[str], str], sql: Sql
) -> None:
    migrate(schema="govredis")
    keep_outbox(sql, "govredis")
    owner = make_role("owner")
    sql(f"CREATE SCHEMA AUTHORIZATION {owner}; GRANT USAGE ON SCHEMA govredis TO {owner}")
    theirs = connect(owner)
    theirs("CREATE TABLE users (id text)")
    watch, unwatch = (
        "SELECT govredis.govredis_outbox_watch('users', 'id', 'user_meta')",
        "SELECT govredis.govredis_outbox_unwatch('users')",
    )
    sql(f"GRANT SELECT ON govredis.govredis_outbox_watched TO {owner}")
    for name in ("watch", "changed", "add", "unwatch"):
        with pytest.raises(errors.InsufficientPrivilege):
            theirs(watch if name != "unwatch" else unwatch)
        sql(f"GRANT EXECUTE ON FUNCTION govredis.govredis_outbox_{name} TO {owner}")
    theirs(watch + ";" + watch)
    theirs("INSERT INTO users VALUES ('u')")
    assert sql("SELECT DISTINCT namespace, id FROM govredis.govredis_outbox ORDER BY 2") == [
        ("user_meta", "u"),
        ("user_meta", None),
    ]
    assert theirs(unwatch) == [(2,)]


@pytest.mark.parametrize("name", ["to_json", "to_jsonb", "row_to_json", "json_agg", "nothing_such"])
def test_a_trigger_for_a_column_that_there_is_not_calls_nothing(
    migrate: Migrate, attacker: tuple[str, Sql], sql: Sql, name: str
) -> None:
    """SQL takes (row).name for name(row) where the row has no such column; some built-ins run casts of its types."""
    migrate(only=OLD)
    role, theirs = attacker
    theirs(
        f"CREATE TYPE bait AS ENUM ('a'); CREATE TABLE trap (id bait);"
        "CREATE FUNCTION spring(bait) RETURNS json LANGUAGE plpgsql AS"
        f"  $$ BEGIN INSERT INTO {role}.seen VALUES (current_user, 'cast'); RETURN '1'; END $$;"
        "CREATE CAST (bait AS json) WITH FUNCTION spring(bait);"
        "CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON trap FOR EACH ROW"
        f"  EXECUTE FUNCTION public.govredis_outbox_changed('agent_meta', '{name}')"
    )
    migrate()
    keep_outbox(sql)
    theirs("INSERT INTO trap VALUES ('a'); UPDATE trap SET id = 'a'; DELETE FROM trap")
    assert others(sql, role) == []
    assert sql("SELECT namespace, id FROM govredis_outbox") == [("agent_meta", None)] * 3


def test_arguments_of_a_trigger_that_a_stranger_has_made_stop_no_run_of_the_relay(
    migrate: Migrate, attacker: tuple[str, Sql], sql: Sql
) -> None:
    migrate(only=OLD)
    _, theirs = attacker
    theirs("CREATE TABLE trap (id text)")
    for number, arguments in enumerate([r"'\000', 'id'", r"'a\\000b', '\'", "'a'", "", "'ä', 'id'"]):
        theirs(
            f"CREATE TRIGGER t{number} AFTER INSERT ON trap FOR EACH ROW"
            f" EXECUTE FUNCTION public.govredis_outbox_changed({arguments})"
        )
    migrate()
    sql("SELECT govredis_outbox_reshaped()")
    watched = {(namespace, column) for _, namespace, column, _ in sql("SELECT * FROM govredis_outbox_watched")}
    assert watched == {(r"\000", "id"), (r"a\\000b", "\\"), ("ä", "id"), ("agent_meta", "agent_id")}


#: Types that an argument of ours could be overloaded by: those that a bare literal or NULL fits better, or as well.
_BETTER = {
    "text": ["text", "character varying", "anyelement"],
    "bigint": ["text", "integer", "numeric", "anyelement"],
    "integer": ["text", "bigint", "anyelement"],
    "boolean": ["text", "anyelement"],
    "regclass": ["text", "regclass"],
}


def test_no_function_of_an_attackers_is_called_for_one_of_ours(
    database: str, migrate: Migrate, attacker: tuple[str, Sql], sql: Sql
) -> None:
    """A role that may create functions in our schema, as PUBLIC may in "public" before PostgreSQL 15."""
    migrate()
    role, theirs = attacker
    sql(f"GRANT CREATE ON SCHEMA public TO {role}; CREATE TABLE users (id text)")
    overloads = 0
    for signature, name, *_ in sql(_OURS):
        (types,) = sql("SELECT proargtypes::regtype[]::text[] FROM pg_proc WHERE oid = %s::regprocedure", signature)[0]
        choices = [_BETTER.get(one, ["text", one]) for one in types]
        for choice in itertools.islice(itertools.product(*choices), 1000):
            if list(choice) == types or ("anyelement" in choice and not {"text"} & {*choice}):
                continue
            theirs(
                f"CREATE OR REPLACE FUNCTION public.{name}({', '.join(choice)}) RETURNS text LANGUAGE plpgsql AS"
                f" $$ BEGIN INSERT INTO {role}.seen VALUES (current_user, '{name}'); RETURN NULL; END $$"
            )
            overloads += 1
    assert overloads > 500

    postgres = Postgres(Config(database_url=database, postgres_timeout=20))
    keys = Keys("app")
    outbox = Outbox(postgres)
    outbox.watch("users", "id", "user_meta")
    sql("INSERT INTO users VALUES ('1'); UPDATE users SET id = '2'; DELETE FROM users; TRUNCATE users")
    sql("INSERT INTO govredis_agents (agent_id, metadata) VALUES ('a', '{}')")
    sql("UPDATE govredis_agents SET agent_id = 'b'")
    sql("DELETE FROM govredis_agents; TRUNCATE govredis_agents")
    outbox.unwatch("users")
    for limit in (Limit(5, 60), Limit(5, 60, algorithm="sliding_window_counter")):
        backend = PostgresLimitBackend(postgres, keys)
        admitted = backend.decide("apprate_limit:op:a", [limit], 1, "hit")
        assert backend.refund("apprate_limit:op:a", admitted.entries, 1)
        backend.count("apprate_limit:op:a", limit.window_us)
        backend.stats("apprate_limit:op:a")
        backend.purge()
    with psycopg2.connect(database) as connection:
        AfterCommit(connection, "user_meta", keys, "public", lambda identity: None).invalidate("1")
    connection.close()
    migrate(key_prefix="other")
    postgres.close()

    with RedisServer() as redis:
        gov = GovRedis(Config(redis_url=redis.url, database_url=database, key_prefix="app"))
        gov.sessions.bind("s", "a")
        gov.sessions.update("s", {"n": 1})
        gov.sessions.unbind("s")
        gov.sessions.bind("t", "a")
        gov.sessions.unbind_agent("a")
        redis.command("SET", "appsession:t", '{"agent_id": "theirs"}')
        assert gov.sessions.get_agent_id("t") == "theirs"
        gov.agents.create("a", {"n": 1})
        assert gov.agents.get("a") is not None
        gov.close()
    assert sql(f"SELECT * FROM {role}.seen") == []


@pytest.mark.parametrize("migrator_is", ["the superuser", "a plain role"])
def test_a_schema_that_another_role_owns_is_refused(
    database: str,
    migrate: Migrate,
    connect: Connect,
    make_role: Callable[[str], str],
    sql: Sql,
    migrator_is: str,
) -> None:
    """Its owner could drop our outbox, and put a table with a trigger there, which our functions would run."""
    mallory = make_role("mallory")
    sql(f"GRANT CREATE ON DATABASE {database.rpartition('/')[2]} TO {mallory}")
    connect(mallory)("CREATE SCHEMA govredis; GRANT ALL ON SCHEMA govredis TO PUBLIC")
    settings: dict[str, str] = {"schema": "govredis"}
    if migrator_is == "a plain role":
        settings["database_url"] = as_role(database, make_role("migrator"))
    with pytest.raises(
        ConfigurationError, match=rf"schema \"govredis\" of .* belongs to {mallory}, .* GOVREDIS_SCHEMA"
    ):
        migrate(**settings)
    assert sql("SELECT to_regclass('govredis.govredis_migrations')") == [(None,)]
    migrate(schema="govredis", database_url=as_role(database, mallory))
    assert sql("SELECT to_regclass('govredis.govredis_migrations') IS NULL") == [(False,)]


def test_a_role_without_rights_is_told_who_gives_them(
    database: str, migrate: Migrate, make_role: Callable[[str], str]
) -> None:
    migrate(schema="govredis")
    theirs = as_role(database, make_role("app"))
    gov = GovRedis(Config(redis_enabled=False, schema="govredis", database_url=theirs))
    with pytest.raises(BackendError, match=r"permission denied for schema govredis\. The role that runs .* must GRANT"):
        gov.agents.create("a", {})
    gov.close()


def test_a_role_that_may_make_nothing_finds_its_tables_up_to_date(
    database: str, migrate: Migrate, make_role: Callable[[str], str], sql: Sql
) -> None:
    role = make_role("app")
    sql(f"CREATE SCHEMA govredis; GRANT USAGE ON SCHEMA govredis TO {role}")
    settings = {"schema": "govredis", "database_url": as_role(database, role)}
    with pytest.raises(ConfigurationError, match=r"0001_limits.sql is missing .* may not CREATE; .* must run as"):
        migrate(**settings)
    assert migrate(schema="govredis")
    sql(f"GRANT SELECT ON govredis.govredis_migrations TO {role}")
    assert migrate(**settings) == []


def as_role(database: str, role: str) -> str:
    return re.sub("//.*@", f"//{role}:{PASSWORD}@", database)


_SHADOWS_OF_PYTHONS = (
    _SHADOWS
    + """;
CREATE FUNCTION {schema}.times(numeric, integer) RETURNS numeric LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('*'); RETURN $1 OPERATOR(pg_catalog.*) $2::numeric; END $$;
CREATE OPERATOR {schema}.* (FUNCTION = {schema}.times, LEFTARG = numeric, RIGHTARG = integer);
CREATE FUNCTION {schema}.width_bucket(bigint, bigint[]) RETURNS integer LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('width_bucket'); RETURN pg_catalog.width_bucket($1, $2); END $$;
CREATE FUNCTION {schema}.json_build_array(text, text, bigint) RETURNS json LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('json_build_array'); RETURN '[]'; END $$;
CREATE FUNCTION {schema}.hashtextextended(text, integer) RETURNS bigint LANGUAGE plpgsql AS
    $$ BEGIN PERFORM {schema}.say('hashtextextended'); RETURN 1; END $$
"""
)


def test_nor_is_it_in_a_statement_of_pythons(
    database: str, migrate: Migrate, attacker: tuple[str, Sql], sql: Sql
) -> None:
    """The search_path of an application has "public" in it, where PUBLIC may create before PostgreSQL 15."""
    migrate()
    role, theirs = attacker
    sql(f"GRANT CREATE ON SCHEMA public TO {role}")
    theirs(_SHADOWS_OF_PYTHONS.format(schema="public", seen=f"{role}.seen"))
    assert sql("SELECT width_bucket(1::bigint, ARRAY[1::bigint])") == [(1,)]
    assert sql(f"TRUNCATE {role}.seen; SELECT hashtextextended('a', 0)") == [(1,)]
    assert sql(f"SELECT what FROM {role}.seen") == [("hashtextextended",)]
    sql(f"TRUNCATE {role}.seen")

    with RedisServer() as redis:
        gov = GovRedis(Config(redis_url=redis.url, database_url=database, key_prefix="app"))
        gov.sessions.bind("s", "a")
        gov.sessions.update("s", {"n": 1})
        gov.sessions.unbind("s")
        gov.sessions.purge()
        gov.agents.create("a", {"n": 1})
        gov.metadata.get_or_load("a", gov.agents.get)
        gov.agents.update_metadata("a", n=2)
        assert gov.metadata.get_or_load("a", gov.agents.get)["metadata"] == {"n": 2}
        gov.health.snapshot()
        redis.kill()
        for limit in (Limit(5, 60), Limit(5, 60, algorithm="sliding_window_counter")):
            hit = gov.limits.hit("u", limit)
            assert hit.backend == "postgres"
            hit.refund()
            gov.limits.get_count("u", window=60)
        gov.limits.purge()
        gov.health.snapshot()
        gov.close()
    assert sql(f"SELECT DISTINCT ran_as, what FROM {role}.seen") == []


def test_a_callers_own_statement_has_the_search_path_as_it_is(database: str) -> None:
    postgres = Postgres(Config(database_url=database, postgres_timeout=20))
    before = postgres.fetch("SHOW search_path")
    assert postgres.fetch("SELECT current_setting('search_path'), '@schema@'") == [("pg_catalog, pg_temp", '"public"')]
    assert postgres.fetch("SHOW search_path") == before != [("pg_catalog, pg_temp",)]
    postgres.close()
