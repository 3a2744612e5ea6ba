"""The cost of calls while Redis refuses connections, and while it hangs: the first, the slowest, and the later ones."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import redis as redis_py

from govredis import Config, GovRedis
from govredis.errors import BackendError
from govredis.testing._base_server import free_port
from govredis.testing.servers import RedisServer

from .samples import figure
from .sites import Call


def _ours(url: str, folder: str, calls: int, begin: Call) -> dict[str, Any]:
    """By operation. `begin` makes the outage, once all are connected."""
    logging.getLogger("govredis").setLevel(logging.CRITICAL)
    with GovRedis(Config(redis_url=url, lock_folder=folder, lock_fallback="fail")) as gov:
        gov.sessions.bind("outage", "agent-1")
        operations: dict[str, Call] = {
            "limits.hit": lambda: gov.limits.hit("outage", "1000000/hour"),
            "sessions.get": lambda: gov.sessions.get("outage"),
            "locks.is_locked": lambda: gov.locks.is_locked("outage"),
        }
        for call in operations.values():
            with contextlib.suppress(BackendError):  # the machine stalls
                call()
        begin()
        found: dict[str, Any] = {}
        for name, call in operations.items():
            took = []
            for _ in range(calls):
                began = time.perf_counter()
                with contextlib.suppress(BackendError):  # the time counts
                    call()
                took.append(time.perf_counter() - began)
            found[name] = {"first_ms": took[0] * 1e3, "slowest_ms": max(took) * 1e3}
            found[name]["later_us"] = figure([seconds * 1e6 for seconds in took[calls // 10 :]])
    return found


def _redis_py_first_ms(port: int) -> float:
    """Milliseconds of a GET of a client with redis-py's defaults, which retries. `from_url` makes others."""
    client = redis_py.Redis("127.0.0.1", port)
    began = time.monotonic()
    try:
        client.get("outage")
    except redis_py.RedisError:
        pass
    return (time.monotonic() - began) * 1000


def measure(folder: str, calls: int, wait_for_redis_py: bool) -> dict[str, Any]:
    """`wait_for_redis_py`: measure its call on a hung server too, which takes a minute."""
    found: dict[str, Any] = {"govredis": {}, "redis-py, defaults": {}}
    with RedisServer() as server:
        found["govredis"]["refused"] = _ours(server.url, folder, calls, server.kill)
    if wait_for_redis_py:
        found["redis-py, defaults"]["refused"] = {"first_ms": _redis_py_first_ms(free_port())}
    with RedisServer() as server:
        found["govredis"]["hung"] = _ours(server.url, folder, calls, server.pause)
        if wait_for_redis_py:
            found["redis-py, defaults"]["hung"] = {"first_ms": _redis_py_first_ms(server.port)}
        server.resume()
    return found
