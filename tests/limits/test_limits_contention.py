"""All connections of this process being in use is no server's being away: nothing is counted elsewhere for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import REDIS_AWAY, WatchedSocket, all_in_use, redis_of

from govredis import BackendUnavailable, GovRedis
from govredis._pool import Pool, PoolExhausted
from govredis.testing.servers import PostgresServer, RedisServer

#: Every call that asks a server, and falls back where that is away.
CALLS: dict[str, Callable[[GovRedis], Any]] = {
    "hit": lambda gov: gov.limits.hit("a", "20/hour"),
    "peek": lambda gov: gov.limits.peek("a", "20/hour"),
    "hit_many": lambda gov: gov.limits.hit_many([("a", "20/hour"), ("b", "20/hour")]),
    "wait": lambda gov: gov.limits.wait("a", "20/hour", timeout=60),
    "record": lambda gov: gov.limits.record("a", 3600),
    "get_count": lambda gov: gov.limits.get_count("a", 3600),
    "stats": lambda gov: gov.limits.stats("a"),
    "reserve": lambda gov: gov.limits.hit_or_reserve("a", "20/hour", reservation="b", operation="default"),
    "reset": lambda gov: gov.limits.reset("a"),
}


def postgres_pool(gov: GovRedis) -> Pool[Any]:
    return gov.postgres._pool


def redis_pool(gov: GovRedis) -> Pool[Any]:
    return redis_of(gov)._pool


@pytest.fixture
def narrow(make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    return make_gov(
        redis_url=redis_server.url,
        database_url=postgres_server.url,
        redis_connections=2,
        postgres_connections=2,
        limit_deny_cache=False,
    )


def degraded(gov: GovRedis) -> dict[str, int]:
    return {name: n for name, n in gov.counters.read().items() if "degraded" in name}


def elsewhere(gov: GovRedis) -> Any:
    return gov.postgres.fetch("SELECT count(*) FROM govredis_limit_windows")[0][0]


@pytest.mark.parametrize("call", CALLS)
def test_a_full_pool_to_redis_is_said_and_nobody_else_is_asked(narrow: GovRedis, call: str) -> None:
    narrow.limits.hit("other", "20/hour")
    with all_in_use(redis_pool(narrow)), pytest.raises(PoolExhausted, match=r"all 2 connections to Redis at .* in use"):
        CALLS[call](narrow)
    assert degraded(narrow) == {}
    assert elsewhere(narrow) == 0
    assert narrow.limits.get_count("a", 3600) == 0
    CALLS[call](narrow)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "reset"])
def test_a_full_pool_to_postgres_is_said_and_this_process_does_not_count(
    make_gov: Callable[..., GovRedis], postgres_server: PostgresServer, call: str
) -> None:
    gov = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url, postgres_connections=2)
    with (
        all_in_use(postgres_pool(gov)),
        pytest.raises(PoolExhausted, match=r"all 2 connections to PostgreSQL at .* in"),
    ):
        CALLS[call](gov)
    assert "limits.degraded.local" not in gov.counters.read()


def test_pending_writes_for_want_of_a_connection_send_nobody_elsewhere(
    narrow: GovRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release is carried out on recovery, and until then Redis is not used: others wait for that moment."""
    # On a machine that is busy the moment is longer.
    monkeypatch.setattr("govredis.breaker._DRAIN", 30)
    held = narrow.locks.acquire("x", timeout=20)
    with all_in_use(redis_pool(narrow)):
        assert held.release()
    assert sum(narrow.limits.hit("a", "20/hour").allowed for _ in range(30)) == 20
    assert degraded(narrow) == {}
    assert elsewhere(narrow) == 0
    assert not narrow.locks.is_locked("x")


def test_40_threads_on_2_connections_admit_exactly_20(narrow: GovRedis) -> None:
    answers: list[Any] = []
    go = threading.Barrier(41)

    def hit() -> None:
        go.wait()
        for _ in range(10):
            try:
                answers.append(narrow.limits.hit("a", "20/hour"))
            except PoolExhausted as error:
                answers.append(error)

    threads = [threading.Thread(target=hit) for _ in range(40)]
    for thread in threads:
        thread.start()
    with all_in_use(redis_pool(narrow)):
        go.wait()
        # The first of each thread finds no connection; then there are two for all.
        while len(answers) < 40:
            threads[0].join(0.01)
    for thread in threads:
        thread.join()
    assert len(answers) == 400
    results = [answer for answer in answers if not isinstance(answer, PoolExhausted)]
    assert sum(result.allowed for result in results) <= 20
    while narrow.limits.hit("a", "20/hour"):
        results.append(True)
    assert sum(map(bool, results)) == 20
    assert {result.backend for result in results if result is not True} == {"redis"}
    assert elsewhere(narrow) == 0


def test_all_in_use_because_redis_hangs_is_redis_being_away(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that wait for a connection learn what its users find: the fallback decides, and nothing is raised."""
    monkeypatch.setattr(socket, "socket", WatchedSocket)
    gov = make_gov(redis_url=mortal_redis.url, redis_connections=2, socket_timeout=0.2, connect_timeout=0.2)
    # Those that wait and those that use the connections would both be late after a stall of the machine.
    redis_of(gov)._for_place = 60
    gov.limits.hit("a", "1000/hour")
    answers: list[Any] = []
    timeouts: list[float | None] = []

    def hit() -> None:
        try:
            answers.append(gov.limits.hit("a", "1000/hour").backend)
        except BackendUnavailable as error:
            answers.append(error)
        timeouts.extend(WatchedSocket.waits.timeouts)

    mortal_redis.pause()
    threads = [threading.Thread(target=hit) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mortal_redis.resume()
    assert answers == ["local"] * 20
    assert len(timeouts) <= 4, "each user has found out, and a waiter that took its place before it could say so"


def test_a_refund_for_which_there_is_no_connection_can_be_tried_again(
    make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
) -> None:
    gov = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url, postgres_connections=1)
    result = gov.limits.hit("a", "20/hour")
    assert result.backend == "postgres"
    with all_in_use(postgres_pool(gov)), pytest.raises(PoolExhausted):
        result.refund()
    assert gov.limits.get_count("a", 3600) == 1
    assert result.refund()
    assert gov.limits.get_count("a", 3600) == 0


def test_admissions_that_no_connection_was_free_for_are_replicated_later(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    gov = make_gov(
        redis_url=redis_server.url,
        database_url=postgres_server.url,
        postgres_connections=1,
        limit_mirror=3600,
    )
    replication = gov.limits._decider.replication
    assert replication is not None
    for _ in range(3):
        gov.limits.hit("a", "20/hour")
    with all_in_use(postgres_pool(gov)):
        replication.tell()
    assert gov.counters.get("limits.mirror_lost.postgres") == 0
    replication.tell()
    assert gov.counters.get("limits.mirrored.postgres") == 3
    assert gov.postgres.fetch("SELECT cardinality(entries) FROM govredis_limit_windows") == [(3,)]


@pytest.mark.parametrize("with_postgres", [True, False])
def test_the_health_warns_and_says_nobody_is_away(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer, with_postgres: bool
) -> None:
    """Not "fail": a process that is busy would be taken out of service, and its load given to the others."""
    gov = make_gov(
        redis_url=redis_server.url,
        database_url=postgres_server.url if with_postgres else None,
        redis_connections=1,
        postgres_connections=1,
        lock_fallback="fail",
    )
    pools = [redis_pool(gov), postgres_pool(gov)] if with_postgres else [redis_pool(gov)]
    with all_in_use(*pools):
        report = gov.health.check()
    assert report.status == "warn"
    shown = {check.name: check.output for check in report.checks if check.status == "warn"}
    assert shown.keys() == ({"redis", "postgres"} if with_postgres else {"redis"})
    assert all(
        "in use by this process" in said and "away" not in said and "fallback" not in said for said in shown.values()
    )
