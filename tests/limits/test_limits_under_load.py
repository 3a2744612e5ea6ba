"""8 processes on one key: never more than N in any window, and none refused while within N, by the servers' records."""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_left, bisect_right
from typing import Any

import pytest

from govredis.testing.servers import PostgresServer, RedisServer

N, WINDOW_US = 50, 500_000
PROCESSES, SECONDS = 8, 1.5

# Each answer is to be a decision of the server's: no denial is remembered.
# The second limit admits all; it only keeps the log from being pruned, so that the test can read the whole of it.
WORKER = f"""
import json, sys, time
from govredis import Config, GovRedis, Limit
rate = [Limit({N}, {WINDOW_US / 1e6}), Limit(1000000, 3600)]
patient = dict(socket_timeout=5, connect_timeout=5, postgres_timeout=10)
limits = GovRedis(Config(limit_deny_cache=False, **patient, **json.loads(sys.argv[1]))).limits
limits.peek("k", rate)
print("ready", flush=True)
sys.stdin.readline()
seen, end = [], time.monotonic() + {SECONDS}
while time.monotonic() < end:
    began = time.time_ns() // 1000
    r = limits.hit("k", rate)
    seen.append((began, time.time_ns() // 1000 + 1, r.allowed, round(r.retry_after * 1e6), r.backend))
print(json.dumps(seen))
"""


def hammer(**settings: str) -> list[tuple[int, int, bool, int, str]]:
    """What each call of 8 processes saw: began, ended, allowed, retry_after in microseconds, backend."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return [tuple(call) for worker in workers for call in json.loads(worker.communicate(timeout=180)[0])]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def verify(entries: list[int], calls: list[tuple[int, int, bool, int, str]]) -> None:
    entries = sorted(entries)
    assert sum(allowed for _, _, allowed, _, _ in calls) == len(entries) > N, "each admission is one entry"
    assert all(later - first >= WINDOW_US for first, later in zip(entries, entries[N:], strict=False))
    refused = [call for call in calls if not call[2]]
    assert refused
    for began, ended, _, retry_after, _ in refused:
        # It was decided at t = oldest + W - retry_after, `oldest` being the oldest entry then within the window.
        low = bisect_left(entries, began - WINDOW_US + retry_after)
        high = bisect_right(entries, ended - WINDOW_US + retry_after)
        moments = [oldest + WINDOW_US - retry_after for oldest in entries[low:high]]
        assert any(bisect_right(entries, t) - bisect_right(entries, t - WINDOW_US) >= N for t in moments)


def test_redis(redis_server: RedisServer) -> None:
    calls = hammer(redis_url=redis_server.url)
    assert {backend for *_, backend in calls} == {"redis"}
    scores = redis_server.command("ZRANGE", "rate_limit:default:k", 0, -1, "WITHSCORES")[1::2]
    verify([round(float(score) * 1_000_000) for score in scores], calls)


def test_postgres(postgres_server: PostgresServer) -> None:
    calls = hammer(redis_enabled="0", database_url=postgres_server.url)
    assert {backend for *_, backend in calls} == {"postgres"}
    verify(entries_of(postgres_server), calls)


def entries_of(server: PostgresServer) -> list[int]:
    import psycopg2

    connection = psycopg2.connect(server.url)
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT entries FROM govredis_limit_windows WHERE key = 'rate_limit:default:k'")
        ((entries,),) = cursor.fetchall()
    connection.close()
    return list(entries)


@pytest.mark.parametrize("spoil", ["one too many", "refused too early"])
def test_the_check_itself(spoil: str) -> None:
    entries = [i * (WINDOW_US // N) for i in range(3 * N)]
    calls: list[Any] = [(e, e, True, 0, "redis") for e in entries]
    now = entries[-1]
    calls.append((now, now + 1, False, entries[-N] + WINDOW_US - now, "redis"))
    verify(entries, calls)
    if spoil == "one too many":
        entries.append(now)
        calls.append((now, now, True, 0, "redis"))
    else:
        at = entries[N // 2]
        calls.append((at, at + 1, False, WINDOW_US // 2, "redis"))
    with pytest.raises(AssertionError):
        verify(entries, calls)
