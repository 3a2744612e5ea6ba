"""Nothing piles up: not over a hundred thousand acquires and releases, nor from a thousand waiters that were killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis import GovRedis
from govredis.keys import sibling
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

KEY = "lock:x"
#: Not how long it takes: that it did not hang.
HUNG = 60.0

# In the process that does it, and nothing else.
CYCLES = """
import gc, sys, threading
from govredis import _teller

_teller.INTERVAL = 3600  # its thread and connection would come and go

def go_round(cycles, names=50):
    for number in range(cycles):
        held = locks.acquire(f"cycle-{number % names}")
        assert held.release() and not held.degraded

def what_is_here():
    gc.collect()
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": sys.getallocatedblocks(),
    }
"""

# Forked, since a thousand interpreters would take minutes to start.
WAITERS = """
import signal, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12+: of forking where there are threads
waiting = []

def what_is_here():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

def wait_in_children(count):
    for _ in range(count):
        pid = os.fork()
        if not pid:
            try:
                locks.acquire("x", timeout=90)
            finally:
                os._exit(1)
        waiting.append(pid)

def kill_them():
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in waiting]
    waiting.clear()
    return ends
"""


@pytest.fixture
def one_redis(one_redis_binary: str) -> Iterator[RedisServer]:
    with RedisServer(binary=one_redis_binary) as server:
        yield server


def test_a_hundred_thousand_acquires_and_releases_leave_nothing_but_a_fence_and_a_file_for_each_name(
    one_redis: RedisServer, make_worker: Callable[..., Any], tmp_path: Path
) -> None:
    worker = make_worker(redis_url=one_redis.url)
    worker.run(CYCLES)
    worker.run("go_round(5_000)")
    before = worker.eval("what_is_here()")
    worker.run("go_round(100_000)")
    after = worker.eval("what_is_here()")
    assert after["threads"] <= before["threads"]
    assert after["descriptors"] <= before["descriptors"]
    # One left by each tenth cycle would be seen.
    assert after["objects"] < before["objects"] + 10_000
    fences = {sibling(f"lock:cycle-{number}", "fence") for number in range(50)}
    assert set(one_redis.command("KEYS", "*")) == fences
    assert len(set(os.listdir(tmp_path / "locks")) - {"living"}) == 50


def test_a_thousand_waiters_that_were_killed_cost_a_moment_and_leave_nothing(
    one_redis: RedisServer,
    make_gov: Callable[..., GovRedis],
    make_worker: Callable[..., Any],
    tmp_path: Path,
    eventually: Callable[..., Any],
) -> None:
    def what_is_here() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def queue() -> set[str]:
        return set(one_redis.command("ZRANGE", sibling(KEY, "queue"), "0", "-1"))

    locks = make_gov(redis_url=one_redis.url).locks
    worker, next_one = (make_worker(redis_url=one_redis.url) for _ in range(2))
    worker.run(WAITERS)
    held = locks.acquire("x", ttl=HUNG)
    here = what_is_here()
    there = worker.eval("what_is_here()")
    seen: set[str] = set()  # the dead stay in the queue until somebody looks who is next
    for _ in range(20):
        worker.run("wait_in_children(50)")
        eventually(lambda seen=seen: len(queue() - seen) == 50, HUNG)
        seen = seen | queue()
        assert worker.eval("kill_them()") == [-9] * 50
    assert len(seen) == 1000
    # Behind all of them; some were seen alive just now.
    next_one.begin("locks.acquire('x', timeout=60).release()")
    eventually(lambda: queue() - seen, HUNG)
    assert held.release()
    # Were each of the dead to cost its second, it would take a quarter of an hour.
    assert next_one.answer() is True
    # Nobody has anything to do with it any more, so what is left goes with its time.
    keys = set(one_redis.command("KEYS", "*")) - {sibling(KEY, "fence")}
    left = {key: one_redis.command("PTTL", key) for key in keys}
    assert all(ttl != -1 and ttl <= 10_000 for ttl in left.values()), left
    assert len(set(os.listdir(tmp_path / "locks")) - {"living"}) == 1
    assert worker.eval("what_is_here()") == there
    # The renewal thread ends when it has been idle.
    eventually(lambda: all(now <= then for now, then in zip(what_is_here(), here, strict=True)), HUNG)
