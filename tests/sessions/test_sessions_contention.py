"""All connections of this process in use is no outage: nothing is believed from memory, nothing done only here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import all_in_use, redis_of

from govredis import GovRedis, SessionStoreUnavailable
from govredis.testing.servers import PostgresServer, RedisServer

CALLS: dict[str, Callable[[GovRedis], Any]] = {
    "get": lambda gov: gov.sessions.get("known"),
    "touch": lambda gov: gov.sessions.touch("known"),
    "bind": lambda gov: gov.sessions.bind("known", "other"),
    "bind if absent": lambda gov: gov.sessions.bind("known", "other", if_absent=True),
    "update": lambda gov: gov.sessions.update("known", {"a": 1}),
    "unbind": lambda gov: gov.sessions.unbind("known"),
    "unbind_agent": lambda gov: gov.sessions.unbind_agent("agent"),
    "for_agent": lambda gov: gov.sessions.for_agent("agent"),
}


@pytest.mark.parametrize("record", ["redis", "postgres"])
@pytest.mark.parametrize("call", CALLS)
def test_a_full_pool_is_said_and_the_record_decides(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    record: str,
    call: str,
) -> None:
    if record == "redis":
        settings: dict[str, Any] = {"redis_url": redis_server.url}
    else:
        settings = {"redis_enabled": False, "database_url": postgres_server.url}
    gov = make_gov(**settings, redis_connections=1, postgres_connections=1)
    other = make_gov(**settings)
    gov.sessions.bind("known", "agent")
    server: Any = redis_of(gov) if record == "redis" else gov.postgres
    with all_in_use(server._pool):
        assert other.sessions.unbind("known"), "a logout in another process"
        with pytest.raises(SessionStoreUnavailable, match=r"all 1 connections to .* are in use by this process"):
            CALLS[call](gov)
    assert server.breaker.closed, "nothing is pending"
    assert {name for name in gov.counters.read() if "degraded" in name} == set()
    assert gov.sessions.get("known") is None


@pytest.mark.one_redis
def test_a_record_that_only_a_row_can_confirm_is_not_believed(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    """While PostgreSQL is away, Redis is believed, for want of anything better: here the rows are there."""
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, postgres_connections=1)
    gov.sessions.bind("known", "agent")
    gov.sessions.get("known")
    redis_server.command("SET", "session:known", '{"agent_id": "theirs"}')
    redis_server.command("ZADD", "agent_sessions:theirs", "inf", "known")
    with all_in_use(gov.postgres._pool):
        for call in (lambda: gov.sessions.get("known"), lambda: gov.sessions.for_agent("theirs")):
            with pytest.raises(SessionStoreUnavailable, match=r"all 1 connections to .* are in use by this process"):
                call()
    assert gov.counters.get("sessions.degraded.unguarded") == 0
    assert gov.sessions.get_agent_id("known") == "theirs", "now that the row could be asked, and adopt it"
    assert gov.sessions.for_agent("theirs") == ["known"]
