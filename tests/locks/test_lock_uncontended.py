"""A lock that nobody else wants: the beginnings of two scripts, which must decide as the rest of these scripts does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from govredis.client import Script
from govredis.keys import sibling
from govredis.locks import DistributedLock
from govredis.locks.backends.redis_backend import EXCLUSIVE

KEY = "lock:x"
CELLS = KEY, *(sibling(KEY, name) for name in ("fence", "queue", "waiters"))
FENCE, QUEUE, WAITERS = CELLS[1:]
DAY = "86400000"
#: Later than the server's clock, so that a fence does not depend on the time of the call.
LATE = 4_000_000_000_000_000

PACKAGE = "govredis.locks.backends"
WHOLE = {"acquire": Script(PACKAGE, *EXCLUSIVE.acquire), "release": Script(PACKAGE, *EXCLUSIVE.release)}
REST = {"acquire": Script(PACKAGE, *EXCLUSIVE.acquire[1:]), "release": Script(PACKAGE, *EXCLUSIVE.release[1:])}

#: The holder, the fence, and the queue; of the waiters "dead" was last seen long ago.
STATES = [
    *itertools.product(
        [None, "me", "other"],
        [None, LATE - 1, LATE, LATE + 1, LATE + 2],
        [[], ["me"], ["living"], ["dead"], ["dead", "living"], ["living", "me"]],
    )
]
CALLS = [
    *itertools.product(["acquire"], ["me", "other"], ["30000"], ["0", f"{LATE + 5}"], [DAY], ["0", "1", "2"]),
    *itertools.product(["release"], ["me", "other"], ["0", f"{LATE}", f"{LATE + 1}"], [DAY]),
]


@pytest.fixture
def locks(make_gov: Callable[..., Any], redis_server: Any) -> DistributedLock:
    locks: DistributedLock = make_gov(redis_url=redis_server.url).locks
    return locks


def timeless(reply: Any) -> Any:
    """But the fence of a lock that had none: it is the server's time. And how long another's lease lasts."""
    if not isinstance(reply, list):
        return reply
    granted, number = reply
    return granted, number if number >= LATE - 1 else "a time"


def left(redis: Any) -> Any:
    found = {}
    for key in redis.keys("*"):
        kind = redis.type(key)
        value = {"string": redis.get, "hash": redis.hgetall, "list": lambda k: redis.lrange(k, 0, -1)}.get(
            kind, lambda k: redis.zrange(k, 0, -1)
        )(key)
        if key == FENCE:
            value = value if int(value) >= LATE - 1 else "a time"
        elif kind == "list":
            value = [element if int(element) >= LATE - 1 else "a time" for element in value]
        elif kind == "hash":
            value = {name: held if name == "" or held in ("0", str(LATE)) else "a time" for name, held in value.items()}
        found[key] = (value, round(redis.pttl(key) / 17_000))
    return found


def test_both_find_and_leave_the_same(locks: DistributedLock, plain_redis: Any) -> None:
    assert locks._redis
    compared = 0
    for (holder, fence, queue), (what, *args) in itertools.product(STATES, CALLS):
        seen = []
        for scripts in WHOLE, REST:
            with plain_redis.pipeline(transaction=False) as setting:
                setting.flushdb()
                for key, value in (KEY, holder), (FENCE, fence):
                    if value is not None:
                        setting.set(key, value, px=50_000)
                for place, owner in enumerate(queue):
                    setting.zadd(QUEUE, {owner: LATE + place})
                    setting.hset(WAITERS, owner, "0" if owner == "dead" else str(LATE))
                setting.execute()
            reply = locks._redis.run(scripts[what], (*CELLS, f"{QUEUE}:{args[0]}"), *args)
            seen.append((timeless(reply), left(plain_redis)))
        assert seen[0] == seen[1], (holder, fence, queue, what, args)
        compared += 1
    assert compared == 3 * 5 * 6 * 18


def calls_of(plain_redis: Any) -> dict[str, int]:
    names = "get", "set", "del", "zcard", "time", "zrange"
    seen = plain_redis.info("commandstats")
    return {name: seen[f"cmdstat_{name}"]["calls"] for name in names if f"cmdstat_{name}" in seen}


def test_a_cycle_asks_redis_for_no_more_than_it_needs(locks: DistributedLock, plain_redis: Any) -> None:
    locks.acquire("x").release()
    plain_redis.config_resetstat()
    for _ in range(10):
        locks.acquire("x").release()
    assert calls_of(plain_redis) == {"zcard": 20, "time": 10, "get": 30, "set": 30, "del": 10}
