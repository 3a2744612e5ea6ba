"""Processes that hit one key for as long as they are told to, and what must hold of the servers' own records of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any, NamedTuple

import psycopg2
from support import eventually

from govredis import Limit
from govredis.testing.servers import PostgresServer, RedisServer

KEY = "rate_limit:default:k"
#: It admits all; it only keeps the logs from being pruned, so that the whole of them can be read.
UNPRUNED = Limit(1_000_000, 3600)

# Its clock is shifted before anything else can look at it; calls are reported by the true clock. No denial is
# remembered, so that a server decides each call.
_WORKER = """
import json, sys, threading, time
settings, rate, shift, threads, pause = json.loads(sys.argv[1])
true_ns, true = time.time_ns, time.time
time.time_ns, time.time = (lambda: true_ns() + int(shift * 1e9)), (lambda: true() + shift)
from govredis import Config, GovRedis, Limit
own = {"limit_deny_cache": False, "socket_timeout": 20, "connect_timeout": 20, "postgres_timeout": 20}
gov = GovRedis(Config(**own, **settings))
limits, rate = gov.limits, [Limit(*limit) for limit in rate]
stop, calls = threading.Event(), []

def load():
    while not stop.is_set():
        began = true_ns() // 1000
        r = limits.hit("k", rate)
        window = round(r.violated.window * 1e6) if r.violated else 0
        calls.append((began, true_ns() // 1000 + 1, r.allowed, window, round(r.retry_after * 1e6), r.backend))
        if pause:
            time.sleep(pause)

limits.peek("k", rate)
print("ready", flush=True)
sys.stdin.readline()
loads = [threading.Thread(target=load) for _ in range(threads)]
for thread in loads:
    thread.start()
sys.stdin.readline()
stop.set()
for thread in loads:
    thread.join()
if gov.internal.context.redis is not None:
    opened = gov.internal.context.redis.breaker.times_opened
gov.close()
print(json.dumps([calls, opened if gov.internal.context.redis is not None else 0, gov.counters.read()]))
"""


class Call(NamedTuple):
    """One hit. Microseconds, by the true clock; `window` is that of the limit that refused it, or 0."""

    began: int
    ended: int
    allowed: bool
    window: int
    retry_after: int
    backend: str


class Report(NamedTuple):
    """The report of a process at its end: its calls, how often it found Redis to be away, its counters."""

    calls: list[Call]
    opened: int
    counters: dict[str, int]


class Load:
    """Processes that hit the key "k", once told to go.

    Args:
        settings: of each process's GovRedis.
        rate: the limits.
        threads: of each process.
        pause: seconds between two hits of a thread.
        shift: seconds by which the clocks of two processes differ, at most.
    """

    def __init__(
        self,
        settings: Sequence[dict[str, Any]],
        rate: Sequence[Limit],
        *,
        threads: int = 1,
        pause: float = 0.0,
        shift: float = 0.0,
    ) -> None:
        limits = [(limit.count, limit.window, limit.algorithm, limit.lease) for limit in rate]
        self._workers = []
        for number, each in enumerate(settings):
            own = shift * (number / max(1, len(settings) - 1) - 0.5)
            command = [sys.executable, "-c", _WORKER, json.dumps([each, limits, own, threads, pause])]
            self._workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def __enter__(self) -> Load:
        with contextlib.ExitStack() as stack:
            stack.callback(self.__exit__)
            for worker in self._workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            stack.pop_all()
        self._say("go")
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def _say(self, word: str) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(word + "\n")
            worker.stdin.flush()

    def stop(self) -> list[Report]:
        """End it. Returns the report of each process."""
        self._say("stop")
        reports = []
        for worker in self._workers:
            calls, opened, counters = json.loads(worker.communicate(timeout=180)[0])
            reports.append(Report([Call(*call) for call in calls], opened, counters))
        return reports


def all_calls(reports: Sequence[Report]) -> list[Call]:
    return [call for report in reports for call in report.calls]


# -- the servers' records ------------------------------------------------------------------------------------------


def in_redis(server: RedisServer) -> list[int]:
    """The microseconds of the entries, sorted."""
    scores = server.command("ZRANGE", KEY, 0, -1, "WITHSCORES")[1::2]
    return sorted(round(float(score) * 1_000_000) for score in scores)


def in_dead_redis(server: RedisServer, binary: str, folder: Path) -> list[int]:
    """Those that a killed server had, by another one over a copy of its data."""
    copytree(server.folder / "data", folder / "data")
    with RedisServer(folder, binary=binary, persistent=True) as copy:
        return in_redis(copy)


def in_postgres(server: PostgresServer) -> list[int]:
    connection = psycopg2.connect(server.url)
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT unnest(entries) FROM govredis_limit_windows WHERE key = %s", (KEY,))
        entries = [us for (us,) in cursor.fetchall()]
    connection.close()
    assert entries == sorted(entries)
    return entries


def until_grown(entries: Callable[[], list[int]], by: int) -> None:
    """Wait until there are so many more."""
    until_there(entries, len(entries()) + by)


def until_there(entries: Callable[[], list[Any]], count: int) -> None:
    """Wait until there are so many."""
    eventually(lambda: len(entries()) >= count)


# -- what must hold ------------------------------------------------------------------------------------------------


def never_more(entries: Sequence[int], rate: Sequence[Limit]) -> None:
    """In no window of any limit are there more entries than it says."""
    for limit in rate:
        pairs = zip(entries, entries[limit.count :], strict=False)
        assert all(later - first >= limit.window_us for first, later in pairs), limit


def unjustified(entries: Sequence[int], calls: Sequence[Call], rate: Sequence[Limit]) -> Iterator[Call]:
    """The refused calls at whose moment there was room."""
    counts = {limit.window_us: limit.count for limit in rate}
    for call in calls:
        if call.allowed:
            continue
        # It was decided at t = oldest + W - retry_after, `oldest` being the oldest entry then within the window.
        low = bisect_left(entries, call.began - call.window + call.retry_after)
        high = bisect_right(entries, call.ended - call.window + call.retry_after)
        moments = [oldest + call.window - call.retry_after for oldest in entries[low:high]]
        found = (bisect_right(entries, t) - bisect_right(entries, t - call.window) for t in moments)
        if not any(count >= counts[call.window] for count in found):
            yield call


def verify(entries: Sequence[int], calls: Sequence[Call], rate: Sequence[Limit]) -> None:
    """Each admission is one entry, there are never too many, and none was refused while there was room."""
    assert sum(call.allowed for call in calls) == len(entries)
    never_more(entries, rate)
    assert any(not call.allowed for call in calls)
    assert not list(unjustified(entries, calls, rate))
