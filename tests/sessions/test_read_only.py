"""A PostgreSQL that can be read and not written: pending writes wait, and reads go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from support import copied_postgres, eventually, lease_of

from govredis import BackendUnavailable, GovRedis
from govredis.postgres import Postgres
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]
Switch = Callable[[bool], None]

ON = {
    "system": (
        "ALTER SYSTEM SET default_transaction_read_only = on",
        "ALTER SYSTEM RESET default_transaction_read_only",
    ),
    "database": (
        "ALTER DATABASE postgres SET default_transaction_read_only = on",
        "ALTER DATABASE postgres RESET default_transaction_read_only",
    ),
}


@pytest.fixture(scope="module")
def server(postgres_template: PostgresServer) -> Iterator[PostgresServer]:
    with copied_postgres(postgres_template) as server:
        yield server


@pytest.fixture
def sql(server: PostgresServer) -> Callable[..., Any]:
    """Statements of an administrator's, who may write all the same, each on a connection of its own."""

    def run(text: str) -> Any:
        connection = psycopg2.connect(server.url, options="-c default_transaction_read_only=off")
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(text)
            rows = cursor.fetchall() if cursor.description else None
        connection.close()
        return rows

    run("TRUNCATE govredis_sessions, govredis_session_agents, govredis_agents, govredis_outbox, govredis_epochs")
    return run


@pytest.fixture
def read_only(request: pytest.FixtureRequest, server: PostgresServer, sql: Callable[..., Any]) -> Iterator[Switch]:
    """Switches the server to reading only, and back: for all sessions, or for those that begin then."""
    how = getattr(request, "param", "system")

    def is_on() -> bool:
        connection = psycopg2.connect(server.url)
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_read_only")
            (state,) = cursor.fetchone()  # type: ignore[misc]
        connection.close()
        return bool(state == "on")

    def switch(on: bool) -> None:
        sql(ON[how][0 if on else 1])
        sql("SELECT pg_reload_conf()")
        eventually(lambda: is_on() == on)
        if how == "database" and on:  # who is connected already goes on writing
            sql("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'govredis'")

    yield switch
    switch(False)


@pytest.fixture(params=["with Redis", "without Redis"])
def gov(
    request: pytest.FixtureRequest, make_gov: MakeGov, redis_server: RedisServer, server: PostgresServer
) -> GovRedis:
    redis = {"redis_url": redis_server.url} if request.param == "with Redis" else {"redis_enabled": False}
    return make_gov(**redis, database_url=server.url)


@pytest.fixture
def other(make_gov: MakeGov, server: PostgresServer) -> GovRedis:
    """Another process, that asks the rows alone."""
    return make_gov(redis_enabled=False, database_url=server.url)


def writes(gov: GovRedis) -> bool:
    try:
        gov.agents.create("now")
        return True
    except BackendUnavailable:
        return False


def seen_by_health(gov: GovRedis) -> tuple[str, str]:
    gov.health._last = None
    check = next(check for check in gov.health.check().checks if check.name == "postgres")
    return check.status, check.output


@pytest.mark.parametrize("read_only", ["system", "database"], indirect=True)
def test_pending_writes_wait_and_reads_go_on(
    gov: GovRedis, other: GovRedis, read_only: Switch, sql: Callable[..., Any]
) -> None:
    for session in ("ended", "kept", "rebound"):
        gov.sessions.bind(session, "a")
    other.sessions.bind("unknown here", "a")
    other.sessions.bind("never asked for", "c")
    gov.agents.create("a", {"n": 1})
    read_only(True)

    assert gov.sessions.unbind("ended")
    assert gov.sessions.bind("rebound", "b").agent_id == "b"
    assert gov.sessions.bind("new", "a").agent_id == "a"
    for _ in range(100):
        assert gov.sessions.get("ended") is None
        assert gov.sessions.get_agent_id("kept") == "a"
        assert gov.sessions.get_agent_id("unknown here") == "a"
        assert gov.sessions.get_agent_id("rebound") == "b"
        assert gov.sessions.get_agent_id("new") == "a"
        assert gov.sessions.get("nobody's") is None
        assert gov.agents.get("a") is not None
        assert gov.postgres.fetch("SELECT 1") == [(1,)]
    sql("UPDATE govredis_sessions SET expires_at = now() + interval '60 s'")
    assert gov.sessions.get_agent_id("never asked for", touch=True) == "c"
    assert gov.sessions.get_agent_id("unknown here", touch=True) == "a"
    assert gov.sessions.for_agent("a") == ["kept", "new", "unknown here"]
    assert gov.sessions.for_agent("b") == ["rebound"]
    assert not writes(gov)
    assert seen_by_health(gov) == ("warn", "it is read-only: changes of this process wait, and reads go on")
    assert gov.sessions.unbind_agent("a") >= 1
    assert [gov.sessions.get(session) for session in ("kept", "new", "unknown here")] == [None] * 3
    assert gov.sessions.for_agent("a") == []
    assert gov.postgres.breaker.times_opened == 0, "reading was never an outage"
    assert sql("SELECT count(*) FROM govredis_sessions WHERE revoked") == [(0,)]

    read_only(False)
    revoked = {("ended",), ("kept",), ("new",), ("unknown here",)}
    eventually(lambda: revoked <= set(sql("SELECT session FROM govredis_sessions WHERE revoked")))
    eventually(lambda: writes(gov))
    assert seen_by_health(gov) == ("pass", "")
    assert [other.sessions.get(session) for session in ("ended", "kept", "unknown here")] == [None] * 3
    assert gov.sessions.bind("ended", "c").agent_id == "c"
    assert other.sessions.get_agent_id("ended") == "c"


def test_pending_writes_are_told_before_any_other(gov: GovRedis, read_only: Switch) -> None:
    entered, go = threading.Event(), threading.Event()

    def replay(_: Postgres) -> None:
        entered.set()
        assert go.wait(30)

    gov.sessions.bind("s", "a")
    gov.postgres.on_recovery(replay)
    read_only(True)
    gov.sessions.unbind("s")
    read_only(False)
    assert entered.wait(30)
    for _ in range(10):
        assert not writes(gov)
        with pytest.raises(BackendUnavailable, match="read-only"), gov.postgres.transaction() as tx:
            tx.fetch("DELETE FROM govredis_agents")
        assert gov.postgres.fetch("SELECT 1") == [(1,)]
        assert gov.sessions.get("s") is None
    go.set()
    eventually(lambda: writes(gov))
    assert gov.postgres.breaker.times_opened == 0


def test_a_caller_looks_where_no_thread_can_run(gov: GovRedis, other: GovRedis, read_only: Switch) -> None:
    gov.postgres._writing._threads = False
    gov.sessions.bind("s", "a")
    read_only(True)
    gov.sessions.unbind("s")
    assert other.sessions.get_agent_id("s") == "a"
    read_only(False)
    eventually(lambda: writes(gov))
    assert other.sessions.get("s") is None


def test_a_server_that_comes_back_read_only_answers_reads(
    gov: GovRedis, server: PostgresServer, read_only: Switch, sql: Callable[..., Any]
) -> None:
    gov.sessions.bind("s", "a")
    gov.sessions.bind("t", "a")
    read_only(True)
    server.kill()
    assert gov.sessions.unbind("s")
    server.restart()
    eventually(lambda: gov.postgres.breaker.closed)
    assert gov.sessions.get("s") is None
    assert gov.sessions.get_agent_id("t") == "a"
    assert gov.sessions.for_agent("a") == ["t"]
    assert gov.sessions.get("nobody's") is None
    assert gov.postgres.breaker.closed
    read_only(False)
    eventually(lambda: writes(gov))
    assert sql("SELECT revoked FROM govredis_sessions WHERE session = 's'") == [(True,)]


def test_other_processes_see_pending_writes_in_redis(
    make_gov: MakeGov, redis_server: RedisServer, server: PostgresServer, read_only: Switch
) -> None:
    one, two = (make_gov(redis_url=redis_server.url, database_url=server.url) for _ in range(2))
    one.sessions.bind("s", "a")
    assert two.sessions.get_agent_id("s") == "a"
    read_only(True)
    assert one.sessions.unbind("s")
    for _ in range(3):
        assert two.sessions.get("s") is None, "and does not take it for an outage"


def test_cached_values_are_loaded_while_no_relay_can_run(
    make_gov: MakeGov, redis_server: RedisServer, server: PostgresServer, read_only: Switch, sql: Callable[..., Any]
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=server.url)
    gov.agents.create("a", {"n": 1})
    strict = gov.cache("agent_meta", strict=True)
    assert strict.get_or_load("a", gov.agents.get)["metadata"] == {"n": 1}
    read_only(True)
    sql("UPDATE govredis_agents SET metadata = '{\"n\": 2}'")
    redis_server.command("DEL", "govredis:guard")
    lease_of(gov)._snapshot = None
    assert strict.get_or_load("a", gov.agents.get)["metadata"] == {"n": 2}
    assert gov.metadata.get_or_load("a", gov.agents.get)["metadata"] == {"n": 2}
    assert not lease_of(gov).blind
    assert gov.counters.read()["guard.degraded.postgres"] >= 1
    assert "guard.degraded.redis" not in gov.counters.read()


@pytest.mark.parametrize("read_only", ["database"], indirect=True)
def test_a_connection_that_does_not_write_is_not_used_again(gov: GovRedis, read_only: Switch) -> None:
    """It keeps what the database's setting was when it began, and what server a failover has left it to."""
    read_only(True)
    assert gov.postgres.fetch("SHOW transaction_read_only") == [("on",)]
    read_only(False)
    assert not writes(gov)
    assert writes(gov)


def test_data_is_changed_here_and_told_later(gov: GovRedis, other: GovRedis, read_only: Switch) -> None:
    gov.sessions.bind("s", "a", data={"n": 0})
    read_only(True)
    gov.sessions.bind("new", "a", data={"n": 10})
    for session, start in (("s", 0), ("new", 10)):
        for n in range(3):
            assert gov.sessions.update(session, lambda data: {"n": data["n"] + 1}).data == {"n": start + n + 1}
        assert gov.sessions.get(session).data == {"n": start + 3}  # type: ignore[union-attr]
    assert other.sessions.get("s").data == {"n": 0}  # type: ignore[union-attr]
    read_only(False)
    eventually(lambda: writes(gov))
    assert other.sessions.get("s").data == {"n": 3}  # type: ignore[union-attr]
    assert other.sessions.get("new").data == {"n": 13}  # type: ignore[union-attr]
