"""after_commit: a transaction of the user's own, and the invalidations that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from clocked_pair import Clock, X
from support import redis_of

from govredis import BackendError, ConfigurationError, GovRedis
from govredis.metadata import MetadataCache
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def users(sql: Callable[..., Any]) -> Iterator[None]:
    sql("CREATE TABLE users (id text PRIMARY KEY, name text UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    sql("INSERT INTO users VALUES ('u', 'old'), ('other', 'taken')")
    yield
    sql("DROP TABLE users")


@pytest.fixture
def gov(pair: tuple[GovRedis, GovRedis], users: None) -> GovRedis:
    return pair[0]


def read(gov: GovRedis, loader: Callable[[str], Any] = lambda _: "loaded") -> Any:
    return gov.cache("user_meta").get_or_load("u", loader)


def test_invalidates_after_the_commit(gov: GovRedis, connect: Callable[[], Any], sql: Callable[..., Any]) -> None:
    read(gov)
    connection = connect()
    with gov.cache("user_meta").after_commit(connection) as tx, connection.cursor() as cursor:
        cursor.execute("UPDATE users SET name = 'new' WHERE id = 'u'")
        tx.invalidate("u")
        assert gov.cache("user_meta").get("u") == "loaded", "not before"
    assert sql("SELECT name FROM users WHERE id = 'u'") == [("new",)]
    assert gov.cache("user_meta").get("u") is None
    assert sql("SELECT namespace, id FROM govredis_outbox") == [("user_meta", "u")]


def test_a_savepoint_that_is_rolled_back_takes_no_invalidation_along(
    gov: GovRedis, connect: Callable[[], Any], sql: Callable[..., Any]
) -> None:
    connection = connect()
    with gov.cache("user_meta").after_commit(connection) as tx, connection.cursor() as cursor:
        cursor.execute("SAVEPOINT tried")
        tx.invalidate("u")
        cursor.execute("ROLLBACK TO tried")
        cursor.execute("UPDATE users SET name = 'new' WHERE id = 'u'")
        tx.invalidate("u")
    assert sql("SELECT namespace, id FROM govredis_outbox") == [("user_meta", "u")]


def test_a_refused_invalidation_stops_no_other_and_is_said(
    gov: GovRedis, connect: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = gov.cache("user_meta")
    for name in "abc":
        cache.get_or_load(name, lambda _: "loaded")
    invalidate = cache.invalidate

    def refused(identity: str, **options: Any) -> None:
        if identity == "a":
            raise BackendError("no rights")
        invalidate(identity, **options)

    monkeypatch.setattr(cache, "invalidate", refused)
    with pytest.raises(BackendError, match="no rights"), cache.after_commit(connect()) as tx:
        for name in "abc":
            tx.invalidate(name)
    assert [cache.get(name) for name in "abc"] == ["loaded", None, None]


@pytest.mark.parametrize("how", ["an error in the body", "an error of the commit", "a rollback"])
def test_a_rollback_notes_nothing(gov: GovRedis, connect: Callable[[], Any], sql: Callable[..., Any], how: str) -> None:
    read(gov)
    connection = connect()
    with (
        pytest.raises((KeyError, psycopg2.IntegrityError)),
        gov.cache("user_meta").after_commit(connection) as tx,
        connection.cursor() as cursor,
    ):
        cursor.execute("UPDATE users SET name = 'taken' WHERE id = 'u'")
        tx.invalidate("u")
        if how == "an error in the body":
            raise KeyError
        if how == "a rollback":
            connection.rollback()
            cursor.execute("SELECT 1")
            raise KeyError
    assert gov.cache("user_meta").get("u") == "loaded"
    assert connection.info.transaction_status == 0
    assert sql("SELECT count(*) FROM govredis_outbox") == [(0,)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_that_is_lost_at_the_commit_invalidates(
    gov: GovRedis, connect: Callable[[], Any], sql: Callable[..., Any], when: str
) -> None:
    """Nobody knows whether it was committed."""
    read(gov)
    connection = connect()
    pid = connection.info.backend_pid

    class Cut:
        autocommit = False

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def commit(self) -> None:
            if when == "after":
                connection.commit()
            sql(f"SELECT pg_terminate_backend({pid}, 10000)")
            connection.commit()
            connection.cursor().execute("SELECT 1")

    with pytest.raises(psycopg2.Error), gov.cache("user_meta").after_commit(Cut()) as tx:
        tx.invalidate("u")
    assert gov.cache("user_meta").get("u") is None


def test_a_body_that_commits_and_then_fails_invalidates(gov: GovRedis, connect: Callable[[], Any]) -> None:
    read(gov)
    connection = connect()
    with pytest.raises(KeyError), gov.cache("user_meta").after_commit(connection) as tx:
        tx.invalidate("u")
        connection.commit()
        raise KeyError
    assert gov.cache("user_meta").get("u") is None


def test_a_crash_after_the_commit_is_made_good_for(
    pair: tuple[GovRedis, GovRedis], users: None, connect: Callable[[], Any], clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one, two = pair
    read(two)
    monkeypatch.setattr(one.metadata, "invalidate_committed", lambda _: None)
    connection = connect()
    cache = one.cache("user_meta")
    monkeypatch.setattr(cache, "invalidate", lambda *_, **__: None)
    with cache.after_commit(connection) as tx:
        tx.invalidate("u")
    assert read(two, lambda _: "new") == "loaded"
    clock.sleep(X)
    assert read(two, lambda _: "new") == "new"


def test_a_commit_to_another_database_invalidates_too(
    gov: GovRedis, postgres_server: PostgresServer, mortal_postgres: PostgresServer
) -> None:
    read(gov)
    connection = psycopg2.connect(mortal_postgres.url.rsplit("/", 1)[0] + "/template1")
    with gov.cache("user_meta").after_commit(connection) as tx, connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        tx.invalidate("u")
    connection.close()
    assert gov.cache("user_meta").get("u") is None


def test_redis_away_raises_nothing_and_leaves_the_invalidation_pending(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, connect: Callable[[], Any]
) -> None:
    gov = make_gov(redis_url=mortal_redis.url)
    gov.metadata.set("u", 1)
    mortal_redis.pause()
    with gov.metadata.after_commit(connect()) as tx:
        tx.invalidate("u")
    assert gov.metadata.stats()["invalidations_owed"] == 1
    mortal_redis.resume()
    while not redis_of(gov).breaker.closed:
        pass
    assert gov.metadata.get("u") is None


def test_bad_arguments_are_refused(gov: GovRedis, connect: Callable[[], Any]) -> None:
    connection = connect()
    with pytest.raises(ValueError, match="id is"), gov.metadata.after_commit(connection) as tx:
        tx.invalidate("{")
    connection.autocommit = True
    with pytest.raises(ValueError, match="autocommit"):
        gov.metadata.after_commit(connection)
    for other in None, connection.cursor():  # of sqlite3, or SQLAlchemy's, as little
        with pytest.raises(ValueError, match="must be a psycopg2 connection"):
            gov.metadata.after_commit(other)


def test_entries_are_noted_whatever_the_search_path_of_the_application(
    gov: GovRedis, connect: Callable[[], Any], sql: Callable[..., Any]
) -> None:
    read(gov)
    sql("CREATE SCHEMA theirs")
    try:
        connection = connect()
        with gov.cache("user_meta").after_commit(connection) as tx, connection.cursor() as cursor:
            cursor.execute(
                "SET search_path = theirs; CREATE TABLE pg_proc (n integer);"
                "UPDATE public.users SET name = 'x' WHERE id = 'u'"
            )
            tx.invalidate("u")
        assert sql("SELECT namespace, id FROM govredis_outbox") == [("user_meta", "u")]
    finally:
        sql("DROP SCHEMA theirs CASCADE")


def test_a_role_that_may_not_write_to_the_outbox_is_told_what_it_needs(
    gov: GovRedis, connect: Callable[[], Any], sql: Callable[..., Any]
) -> None:
    sql("CREATE ROLE app; GRANT ALL ON users TO app")
    try:
        connection = connect()
        with connection.cursor() as cursor:
            cursor.execute("SET ROLE app")
        connection.commit()
        cache = gov.cache("user_meta")
        with pytest.raises(ConfigurationError, match=r"EXECUTE ON FUNCTION .*govredis_outbox_add, to it") as caught:
            change(cache, connection)
        assert sql("SELECT name FROM users WHERE id = 'u'") == [("old",)]
        assert "USAGE ON SCHEMA" in str(caught.value)
        sql('GRANT USAGE ON SCHEMA public TO app; GRANT EXECUTE ON FUNCTION "public".govredis_outbox_add TO app')
        change(cache, connection)
        assert sql("SELECT namespace, id FROM govredis_outbox") == [("user_meta", "u")]
    finally:
        connection.rollback()
        sql("DROP OWNED BY app; DROP ROLE app")


def change(cache: MetadataCache, connection: Any) -> None:
    with cache.after_commit(connection) as tx, connection.cursor() as cursor:
        cursor.execute("UPDATE users SET name = 'new' WHERE id = 'u'")
        tx.invalidate("u")
