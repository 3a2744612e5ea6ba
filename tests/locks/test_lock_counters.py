"""The counters of locks: waits and their time, timeouts, grants, losses; and that health shows them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import PATIENCE

from govredis import GovRedis, LockLost, LockTimeout, LockUnavailable
from govredis.keys import sibling
from govredis.testing.servers import RedisServer

KEY = "lock:x"
QUEUE = sibling(KEY, "queue")


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url, socket_timeout=5)


def counts(gov: GovRedis) -> dict[str, int]:
    """Those of locks."""
    return {name[6:]: n for name, n in gov.counters.read().items() if name.startswith("locks.")}


def test_a_free_lock_counts_a_grant_and_no_wait(gov: GovRedis) -> None:
    gov.locks.acquire("x").release()
    with gov.locks.acquire("y", timeout=None), gov.locks.acquire_many(["a", "b"]):
        pass
    gov.locks.locked("x")(lambda: None)()
    tried = gov.locks.try_acquire("z", renew=False)
    assert tried
    assert tried.release()
    with gov.locks.rwlock("x").read(), gov.locks.semaphore("x", slots=1).acquire():
        pass
    assert counts(gov) == {"grants": 8}


def test_a_try_of_what_is_held_times_out_and_does_not_wait(gov: GovRedis) -> None:
    with gov.locks.acquire("x"):
        assert gov.locks.try_acquire("x") is None
        with pytest.raises(LockTimeout):
            gov.locks.acquire("x", timeout=0)
    assert counts(gov) == {"grants": 1, "timeouts": 2}


def test_a_wait_in_vain_counts_a_timeout(gov: GovRedis) -> None:
    with gov.locks.acquire("x"), pytest.raises(LockTimeout):
        gov.locks.acquire("x", timeout=0.3)
    seen = counts(gov)
    assert 300 <= seen.pop("waited_ms") < PATIENCE * 1000
    assert seen == {"grants": 1, "timeouts": 1, "waits": 1}


@pytest.mark.parametrize("kind", ["lock", "semaphore"])
def test_a_wait_that_ends_with_the_lock_counts_its_time(
    gov: GovRedis, plain_redis: Any, eventually: Callable[..., Any], kind: str
) -> None:
    take: Any = gov.locks.acquire if kind == "lock" else lambda _, **o: gov.locks.semaphore("x", slots=1).acquire(**o)
    queue = QUEUE if kind == "lock" else f"{sibling(KEY, 'semaphore')}:queue"
    held = take("x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, "x", timeout=60)
        eventually(lambda: plain_redis.zcard(queue) == 1)
        assert counts(gov) == {"grants": 1}, "it is counted when it is over"
        held.extend()
        held.release()
        waiting.result(PATIENCE).release()
    seen = counts(gov)
    assert 0 <= seen.pop("waited_ms") < PATIENCE * 1000
    assert seen == {"grants": 2, "waits": 1}


def test_a_lost_lock_is_counted(gov: GovRedis, plain_redis: Any) -> None:
    for _ in range(2):
        held = gov.locks.acquire("x")
        plain_redis.set(KEY, "another")
        with pytest.raises(LockLost):
            held.extend()
        held.release()
        plain_redis.delete(KEY)
    assert counts(gov) == {"grants": 2, "lost": 2}


def test_degraded(make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_enabled=False)
    with gov.locks.acquire("x", timeout=0):
        assert gov.locks.try_acquire("x") is None
        with pytest.raises(LockTimeout):
            gov.locks.acquire("x", timeout=0.1)
    seen = counts(gov)
    assert 100 <= seen.pop("waited_ms") < PATIENCE * 1000
    assert seen == {"degraded_grants": 1, "timeouts": 2, "waits": 1}


def test_an_outage_counts_no_timeout(make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_enabled=False, lock_fallback="fail")
    with pytest.raises(LockUnavailable):
        gov.locks.acquire("x")
    assert counts(gov) == {}


def test_health_shows_them(gov: GovRedis) -> None:
    with gov.locks.acquire("x"), pytest.raises(LockTimeout):
        gov.locks.acquire("x", timeout=0.05)
    (check,) = (check for check in gov.health.check().checks if check.name == "counters")
    shown = check.data["counts"]
    assert {name: n for name, n in shown.items() if name.startswith("locks.") and name != "locks.waited_ms"} == {
        "locks.grants": 1,
        "locks.timeouts": 1,
        "locks.waits": 1,
    }
    assert shown["locks.waited_ms"] >= 50
