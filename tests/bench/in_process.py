"""Values that the process has: ours, redis-py's client-side cache, dogpile.cache; by one thread and by eight."""

from __future__ import annotations

import importlib.util
import json
import statistics
import threading
import time
from typing import Any

import redis as redis_py

from govredis import Config, GovRedis

from .operations import OURS, VALUE
from .samples import figure
from .sites import PATIENT, Call


def _dogpile() -> Call:
    from dogpile.cache import make_region

    memory = make_region().configure("dogpile.cache.memory", expiration_time=300)
    memory.set("bench", VALUE)
    return lambda: memory.get("bench")


def measure(url: str, folder: str, rounds: int, calls: int) -> dict[str, Any]:
    """Microseconds of a hit: the median of a round of so many calls."""
    from redis.cache import CacheConfig
    from redis.connection import CacheProxyConnection

    CacheProxyConnection.MIN_ALLOWED_VERSION = "6.0.0"  # it wants 7.4, and works with what there is
    gov = GovRedis(Config(redis_url=url, lock_folder=folder, local_cache=True, **PATIENT))
    gov.metadata.set("bench", VALUE)
    caching = redis_py.Redis.from_url(url, protocol=3, cache_config=CacheConfig())
    contestants: dict[str, Call] = {
        OURS: lambda: gov.metadata.get("bench"),
        "redis-py, client-side cache, JSON parsed": lambda: json.loads(caching.get("agent_meta:bench")),  # type: ignore[arg-type]
    }
    if importlib.util.find_spec("dogpile"):
        contestants["dogpile.cache, memory"] = _dogpile()
    deadline = time.monotonic() + 60
    while not gov.metadata.stats()["local_hits"] and time.monotonic() < deadline:
        gov.metadata.get("bench")
        time.sleep(0.001)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, call in contestants.items():
            for threads in 1, 8:
                found.setdefault(name, {}).setdefault(str(threads), []).append(_median(call, calls, threads))
    gov.close()
    caching.close()
    return {name: {threads: figure(of) for threads, of in by.items()} for name, by in found.items()}


def _median(call: Call, calls: int, threads: int) -> float:
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
