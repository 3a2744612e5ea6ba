"""Many at once on one key, clocks 30 s apart: never more than N in any window, and none refused while within N."""

from __future__ import annotations

from typing import Any

import pytest
from limit_load import UNPRUNED, Call, Load, all_calls, in_postgres, in_redis, unjustified, until_there, verify

from govredis import GovRedis, Limit
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

RATE = [Limit(30, 0.25), Limit(80, 1), UNPRUNED]
#: So many are admitted in 1.25 s at the earliest: each limit has refused by then.
ADMITTED = 120


def test_redis(redis_server: RedisServer) -> None:
    with Load([{"redis_url": redis_server.url}] * 8, RATE, shift=30) as load:
        until_there(lambda: in_redis(redis_server), ADMITTED)
        calls = all_calls(load.stop())
    assert {call.backend for call in calls} == {"redis"}
    verify(in_redis(redis_server), calls, RATE)


def test_postgres_over_16_connections(postgres_server: PostgresServer) -> None:
    settings = {"redis_enabled": False, "database_url": postgres_server.url}
    with Load([settings] * 4, RATE, threads=4, shift=30) as load:
        until_there(lambda: in_postgres(postgres_server), ADMITTED)
        calls = all_calls(load.stop())
    assert {call.backend for call in calls} == {"postgres"}
    verify(in_postgres(postgres_server), calls, RATE)


@pytest.mark.parametrize("algorithm", ["sliding_window_log", "sliding_window_counter"])
def test_leases(gov: GovRedis, redis_server: RedisServer, algorithm: Any) -> None:
    """Which calls were admitted is known to the processes alone: they spend their batches from memory."""
    rate = [Limit(100, 0.5, algorithm, lease=0.05), Limit(300, 2, algorithm), Limit(1_000_000, 3600, algorithm)]
    with Load([{"redis_url": redis_server.url}] * 4, rate, threads=2, shift=30) as load:
        until_there(lambda: range(gov.limits.get_count("k", 3600)), 700)
        reports = load.stop()
    admitted = sorted(call for call in all_calls(reports) if call.allowed)
    assert sum(report.counters["limits.leased"] for report in reports) > 100
    assert all(report.counters["limits.denied"] for report in reports)
    assert gov.limits.get_count("k", 3600) == len(admitted), "all that was not spent came back"
    for limit in rate:
        for n, first in enumerate(admitted):
            surely = [call for call in admitted[n : n + 5 * limit.count] if call.ended < first.began + limit.window_us]
            assert len(surely) <= limit.count


W = 500_000
N = 50


@pytest.mark.parametrize("spoil", ["one too many", "refused too early"])
def test_the_check_itself(spoil: str) -> None:
    entries = [i * (W // N) for i in range(3 * N)]
    calls: list[Any] = [Call(e, e, True, 0, 0, "redis") for e in entries]
    now = entries[-1]
    calls.append(Call(now, now + 1, False, W, entries[-N] + W - now, "redis"))
    verify(entries, calls, [Limit(N, 0.5)])
    if spoil == "one too many":
        entries.append(now)
        calls.append(Call(now, now, True, 0, 0, "redis"))
    else:
        at = entries[N // 2]
        calls.append(Call(at, at + 1, False, W, W // 2, "redis"))
        assert list(unjustified(entries, calls, [Limit(N, 0.5)])) == calls[-1:]
    with pytest.raises(AssertionError):
        verify(entries, calls, [Limit(N, 0.5)])
