"""The operations, their contestants, and the table."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import redis as redis_py
from rich.console import Console
from rich.table import Table

from govredis import Config, GovRedis, Limit
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.testing.servers import RedisServer

from . import hand_over

Call = Callable[[], object]
Contest = tuple[str, int, dict[str, Call]]

RAW = "raw socket, same bytes"
OURS = "govredis"


class Raw:
    """A socket that sends what it is given and reads one reply, without parsing it: the floor."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(65536)

    def exchange(self, packed: bytes) -> None:
        self._socket.sendall(packed)
        if self._buffer[: self._socket.recv_into(self._buffer)].startswith(b"-"):
            raise RuntimeError(bytes(self._buffer[:100]))

    def replay(self, commands: Iterator[bytes]) -> Call:
        return lambda: self.exchange(next(commands))


def sent_by(gov: GovRedis, call: Call, replies: list[Any]) -> list[bytes]:
    """The very bytes that `call` sends, one for each reply that it is given in place of the server's."""
    client: Any = gov.internal.context.redis
    sent: list[bytes] = []
    pending = iter(replies)

    def record(packed: bytes, *_: object, **__: object) -> Any:
        sent.append(packed)
        return next(pending)

    client._round_trip = record
    try:
        call()
    finally:
        del client._round_trip
    return sent


def contests(gov: GovRedis, url: str, calls: int) -> Iterator[Contest]:
    """Each operation: its name, its round trips, and who does it how."""
    raw = Raw(url)
    plain = redis_py.Redis.from_url(url)

    # -- limits ------------------------------------------------------------------------------------------------------
    import limits
    import pyrate_limiter
    import throttled

    rate = "1000000/hour"
    hit = lambda: gov.limits.hit("bench", rate, operation="op")  # noqa: E731
    hit()
    hits = [sent_by(gov, hit, [[1, 1, 1, 0, 0]])[0] for _ in range(calls)]
    assert gov.internal.context.redis is not None
    ours = RedisLimitBackend(gov.internal.context.redis)
    script, source = ours._script.sha, ours._script.source
    plain.script_load(source)
    members = itertools.count()
    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.storage_from_string(url))
    moving_rate = limits.parse("1000000/hour")
    log = throttled.Throttled(
        using="sliding_window",
        quota=throttled.per_hour(1_000_000),
        store=throttled.RedisStore(server=url),
    )

    def pyrate(key: str, count: int) -> Call:
        bucket = pyrate_limiter.RedisBucket.init([pyrate_limiter.Rate(count, pyrate_limiter.Duration.HOUR)], plain, key)
        limiter = pyrate_limiter.Limiter(bucket)
        return lambda: limiter.try_acquire("bench", blocking=False)

    yield (
        "limits.hit",
        1,
        {
            RAW: raw.replay(iter(hits)),
            OURS: hit,
            "redis-py, the same script": lambda: plain.evalsha(
                script, 2, "rate_limit:r:b", "{rate_limit:r:b}:window",
                "hit", 1, f"m{next(members)}", "", 1_000_000, 3_600_000_000,
            ),
            "limits (moving window)": lambda: moving.hit(moving_rate, "bench"),
            "throttled-py (sliding window)": lambda: log.limit("bench"),
            "pyrate-limiter (RedisBucket)": pyrate("pyrate", 1_000_000),
        },
    )  # fmt: skip

    many = Limit(10**12, 3600, algorithm="sliding_window_counter")
    count = lambda: gov.limits.hit("bench", many, operation="op")  # noqa: E731
    count()
    counts = [sent_by(gov, count, [[1, 1, 1, 0, 0, 0]])[0] for _ in range(calls)]
    weighted = limits.strategies.SlidingWindowCounterRateLimiter(limits.storage.storage_from_string(url))
    yield (
        "limits.hit, a counter",
        1,
        {
            RAW: raw.replay(iter(counts)),
            OURS: count,
            "limits (sliding window counter)": lambda: weighted.hit(moving_rate, "bench"),
        },
    )

    asking = GovRedis(Config(redis_url=url, limit_deny_cache=False))
    again = lambda of: lambda: of.limits.hit("denied", "1/hour", operation="op")  # noqa: E731
    again(gov)()
    (denied_bytes,) = sent_by(asking, again(asking), [[0, 1, 0, 1, 1]])
    once = limits.parse("1/hour")
    once_log = throttled.Throttled(
        using="sliding_window", quota=throttled.per_hour(1), store=throttled.RedisStore(server=url)
    )
    yield (
        "limits.hit, denied again",
        1,
        {
            RAW: raw.replay(itertools.repeat(denied_bytes)),
            OURS: again(gov),
            "govredis, asking each time": again(asking),
            "limits (moving window)": lambda: moving.hit(once, "denied"),
            "throttled-py (sliding window)": lambda: once_log.limit("denied"),
            "pyrate-limiter (RedisBucket)": pyrate("pyrate-denied", 1),
        },
    )
    asking.close()

    # -- sessions ----------------------------------------------------------------------------------------------------
    gov.sessions.bind("bench", "agent-1")
    stored = plain.get("session:bench")
    get_session = lambda: gov.sessions.get("bench")  # noqa: E731
    (session_bytes,) = sent_by(gov, get_session, [[[stored], 3_000_000]])
    pipe = plain.pipeline(transaction=False)

    def redis_py_session() -> object:
        value, ttl = pipe.get("session:bench").pttl("session:bench").execute()
        return json.loads(value), ttl

    yield (
        "sessions.get",
        1,
        {RAW: raw.replay(itertools.repeat(session_bytes)), OURS: get_session, "redis-py, GET + PTTL": redis_py_session},
    )

    # -- metadata ----------------------------------------------------------------------------------------------------
    gov.metadata.set("bench", {"team": "search", "tags": ["a", "b"], "n": 1})
    get_metadata = lambda: gov.metadata.get("bench")  # noqa: E731
    cells = [plain.get(key) for key in ("agent_meta:bench", "{agent_meta:bench}:stamp")]
    (get_bytes,) = sent_by(gov, get_metadata, [[*cells, None]])
    yield (
        "metadata.get",
        1,
        {
            RAW: raw.replay(itertools.repeat(get_bytes)),
            OURS: get_metadata,
            "redis-py, GET": lambda: json.loads(plain.get("agent_meta:bench")),  # type: ignore[arg-type]
        },
    )

    # -- locks -------------------------------------------------------------------------------------------------------
    import redis_lock

    def cycle() -> None:
        gov.locks.acquire("bench").release()

    cycle()
    # A grant's token must be above the last, which the lock file remembers.
    token = lambda: time.time_ns() // 1000  # noqa: E731
    pairs = iter([packed for _ in range(calls) for packed in sent_by(gov, cycle, [[1, token()], 1])])

    def raw_cycle() -> None:
        raw.exchange(next(pairs))
        raw.exchange(next(pairs))

    def redis_py_cycle() -> None:
        lock = plain.lock("redis-py-lock", timeout=30)
        lock.acquire()
        lock.release()

    def python_redis_lock_cycle() -> None:
        lock = redis_lock.Lock(plain, "python-redis-lock", expire=30)
        lock.acquire()
        lock.release()

    yield (
        "locks.acquire + release",
        2,
        {RAW: raw_cycle, OURS: cycle, "redis-py Lock": redis_py_cycle, "python-redis-lock": python_redis_lock_cycle},
    )


def in_process_hits(url: str, calls: int) -> Table:
    """A value that the process has: ours, redis-py's client-side cache, dogpile.cache."""
    from dogpile.cache import make_region
    from redis.cache import CacheConfig
    from redis.connection import CacheProxyConnection

    CacheProxyConnection.MIN_ALLOWED_VERSION = "6.0.0"  # it wants 7.4, and works with what there is
    value = {"team": "search", "tags": ["a", "b"], "n": 1}
    gov = GovRedis(Config(redis_url=url, local_cache=True))
    gov.metadata.set("bench", value)
    caching = redis_py.Redis.from_url(url, protocol=3, cache_config=CacheConfig())
    memory = make_region().configure("dogpile.cache.memory", expiration_time=300)
    memory.set("bench", value)
    contestants: dict[str, Call] = {
        OURS: lambda: gov.metadata.get("bench"),
        "redis-py, client-side cache, JSON parsed": lambda: json.loads(caching.get("agent_meta:bench")),  # type: ignore[arg-type]
        "redis-py, client-side cache, bytes": lambda: caching.get("agent_meta:bench"),
        "dogpile.cache (memory, of one process, told by nobody)": lambda: memory.get("bench"),
    }
    deadline = time.monotonic() + 5
    while not gov.metadata.stats()["local_hits"] and time.monotonic() < deadline:
        gov.metadata.get("bench")
    table = Table(title="Microseconds of a hit in the process, median")
    for column in ("by", "1 thread", "8 threads"):
        table.add_column(column, justify="left" if column == "by" else "right", no_wrap=True)
    one = measure(contestants, calls)
    eight = {name: _by_threads(call, calls, 8) for name, call in contestants.items()}
    for name in contestants:
        table.add_row(name, f"{one[name]:.2f}", f"{eight[name]:.2f}")
    gov.close()
    caching.close()
    return table


def _by_threads(call: Call, calls: int, threads: int) -> float:
    """Median microseconds of a call of one of several threads at it."""
    times: list[float] = []

    def run() -> None:
        mine = []
        for _ in range(calls):
            began = time.perf_counter_ns()
            call()
            mine.append(time.perf_counter_ns() - began)
        times.extend(mine)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return statistics.median(times) / 1000


def hand_overs(url: str, folder: str) -> Table:
    table = Table(title=f"Microseconds from a release to the next of {hand_over.WAITING} waiting processes, median")
    for column in ("Redis", "by", "median", "of a bare wake"):
        table.add_column(column, justify="left" if column in {"Redis", "by"} else "right", no_wrap=True)
    with hand_over.half_a_millisecond_away(url) as distant:
        for where, at in ("on this host", url), ("0.5 ms away, either way", distant):
            medians = hand_over.measure(at, folder)
            bare = next(iter(medians.values()))
            for name, median in medians.items():
                table.add_row(where, name, f"{median:.0f}", "" if median == bare else f"x {median / bare:.1f}")
            table.add_section()
    return table


@contextlib.contextmanager
def awake_cores() -> Iterator[None]:
    """Keep the cores from falling asleep between a request and its reply.

    Waking a virtual core costs tens of microseconds, and the longer a contestant computes, the deeper the server's core
    sleeps: that would be measured, not the contestants. The loops run only where nothing else wants to (SCHED_IDLE).
    """
    spin = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\np = os.getppid()\n"
    spin += "while os.getppid() == p:\n    for _ in range(100000): pass"
    loops = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(contestants: dict[str, Call], calls: int, turn: int = 50) -> dict[str, float]:
    """Median microseconds of a call, by contestant; they take turns of `turn` calls."""
    times: dict[str, list[int]] = {name: [] for name in contestants}
    now = time.perf_counter_ns
    for _ in range(calls // turn):
        for name, call in contestants.items():
            mine = times[name]
            for _ in range(turn):
                began = now()
                call()
                mine.append(now() - began)
    return {name: statistics.median(t) / 1000 for name, t in times.items()}


def main() -> None:
    options = argparse.ArgumentParser(prog="make bench", description=__doc__)
    options.add_argument("--calls", type=int, default=5000, help="of each contestant (default 5000)")
    calls = options.parse_args().calls
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server, awake_cores():
        gov = GovRedis(Config(redis_url=server.url, lock_folder=folder))
        table = Table(title="Microseconds a call, median; one thread, loopback TCP, all in turns")
        for column in ("operation", "by", "median", "over raw", "a trip"):
            table.add_column(column, justify="left" if column in {"operation", "by"} else "right", no_wrap=True)
        for operation, trips, contestants in contests(gov, server.url, calls):
            medians = measure(contestants, calls)
            floor = medians[RAW]
            for name, median in medians.items():
                over = median - floor
                table.add_row(
                    operation if name == RAW else "",
                    name,
                    f"{median:.1f}",
                    "" if name == RAW else f"{over:+.1f}",
                    "" if name == RAW else f"{over / trips:+.1f}",
                )
            table.add_section()
        gov.close()
        Console(width=100).print(table)
        Console(width=100).print(in_process_hits(server.url, calls))
        Console(width=100).print(hand_overs(server.url, folder))
