"""Renewals: all that are due in one pipeline, the most urgent first, beside whatever else the process does."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stalls import undisturbed
from support import PATIENCE

from govredis import BackendError, GovRedis, HeldLock, LockLost
from govredis.client import RedisNode
from govredis.keys import sibling
from govredis.locks import DistributedLock, renewal
from govredis.testing.servers import RedisServer

KEY = "lock:x"
RenewNow = Callable[[list[HeldLock]], None]
KINDS: dict[str, Callable[[DistributedLock, str, float], HeldLock]] = {
    "lock": lambda locks, name, ttl: locks.acquire(name, ttl=ttl),
    "read": lambda locks, name, ttl: locks.rwlock(name).read(ttl=ttl),
    "write": lambda locks, name, ttl: locks.rwlock(name).write(ttl=ttl),
    "semaphore": lambda locks, name, ttl: locks.semaphore(name, slots=3).acquire(ttl=ttl),
}


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url).locks


class Pipelines:
    """The commands of each pipeline that the renewal thread sends. It may be held up there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[list[tuple[Any, ...]]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.stands = threading.Event()
        send = RedisNode.pipeline

        def pipeline(client: RedisNode, commands: Any, *args: Any, **options: Any) -> list[Any]:
            if threading.current_thread().name == "govredis-renewal":
                self.sent.append(list(commands))
                if not self.go_on.is_set():
                    self.stands.set()
                    assert self.go_on.wait(PATIENCE)
            return send(client, commands, *args, **options)

        monkeypatch.setattr(RedisNode, "pipeline", pipeline)


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipelines]:
    made = Pipelines(monkeypatch)
    yield made
    made.go_on.set()


def listed(*held: HeldLock) -> bool:
    """Has their first look been, by which they come on the list?"""
    return all(lock._lease.due > renewal.clock() + 1 for lock in held)


BUSY = """
import json, sys, threading, time
from govredis import Config, GovRedis
settings, n, ttl, busy = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
with GovRedis(Config(**settings)) as gov:
    take = [
        lambda name: gov.locks.acquire(name, ttl=ttl),
        lambda name: gov.locks.acquire(name, ttl=ttl),
        lambda name: gov.locks.rwlock(name).read(ttl=ttl),
        lambda name: gov.locks.semaphore(name, slots=3).acquire(ttl=ttl),
    ]
    held = [take[i % 4](f"x{i}") for i in range(n)]
    told = []
    for lock in held:
        lock.on_lost(lambda: told.append(1))
    enough = threading.Event()

    def compute():
        while not enough.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=compute) for _ in range(busy)]
    for thread in threads:
        thread.start()
    first = [lock._lease.deadline for lock in held]
    while not told and not all(lock._lease.deadline > d + 2 * ttl for lock, d in zip(held, first)):
        time.sleep(0.1)
    enough.set()
    for thread in threads:
        thread.join()
    lost = [lock.name for lock in held if lock._lease.lost is not None]
    listed = len(gov.locks.held())
    print(json.dumps([len(told), lost, listed, all([lock.release() for lock in held])]))
"""


@pytest.mark.once
@pytest.mark.one_redis  # it is Python's threads that may starve the renewals
@pytest.mark.parametrize(("n", "ttl"), [(50, 3), (1000, 10)])
def test_no_lock_of_many_is_lost_beside_four_threads_that_compute(
    redis_server: RedisServer, tmp_path: Path, patience: dict[str, float], n: int, ttl: float
) -> None:
    def allow_files() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    attempts = itertools.count()

    def attempt() -> None:
        prefix = f"{next(attempts)}:"  # an earlier attempt may have left locks
        settings = {"redis_url": redis_server.url, "lock_folder": str(tmp_path / "locks"), "key_prefix": prefix}
        command = [sys.executable, "-c", BUSY, json.dumps({**settings, **patience}), str(n), str(ttl), "4"]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=allow_files, timeout=2 * PATIENCE)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [0, [], n, True]

    undisturbed(attempt, ttl / 3)


def test_a_hundred_commands_at_once_and_the_most_urgent_first(
    locks: DistributedLock, renew_now: RenewNow, pipelines: Pipelines, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    pipelines.go_on.clear()
    first = locks.acquire("first", ttl=900)
    assert pipelines.stands.wait(PATIENCE), "it comes on the list"
    held = [locks.acquire(f"x{n}", ttl=1000 - n) for n in range(250)]
    before = {lock.name: lock._lease.deadline for lock in held}
    renew_now(held)
    pipelines.sent.clear()
    pipelines.go_on.set()
    eventually(lambda: all(lock._lease.deadline > before[lock.name] for lock in held))
    sizes = [len(commands) for commands in pipelines.sent]
    assert max(sizes) == 100
    assert len(sizes) <= 4
    # By the ends of their leases: a machine that stalls meanwhile gives a lock a later end.
    urgent = sorted(before, key=before.__getitem__)
    assert urgent != list(before)
    extended = [command[3] for commands in pipelines.sent for command in commands[:-1]]
    assert extended[:250] == [f"lock:{name}" for name in urgent]
    eventually(lambda: plain_redis.zcard("govredis:locks") == 251)
    assert all(lock.release() for lock in [first, *held])
    assert not plain_redis.exists("govredis:locks")


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_during_a_renewal_does_not_wait_and_is_no_loss(
    locks: DistributedLock,
    renew_now: RenewNow,
    pipelines: Pipelines,
    plain_redis: Any,
    eventually: Callable[..., Any],
    kind: str,
) -> None:
    lost: list[str] = []
    held, other = (KINDS[kind](locks, name, 1000) for name in ("x", "y"))
    for lock in held, other:
        lock.on_lost(lambda name=lock.name: lost.append(name))
    eventually(lambda: listed(held, other))
    pipelines.go_on.clear()
    renew_now([held, other])
    assert pipelines.stands.wait(PATIENCE)
    before = other._lease.deadline
    assert held.release() is True
    assert not plain_redis.exists(*held._lease._resource.keys[:1])
    assert KINDS[kind](locks, "x", 1000).release(), "at once, here too"
    pipelines.go_on.set()
    eventually(lambda: other._lease.deadline > before)
    assert not plain_redis.exists(*held._lease._resource.keys[:1]), "no ghost"
    assert held.release() is False
    assert other.release() is True
    assert not lost
    assert locks.counters.get("locks.lost") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_cannot_be_renewed_costs_the_others_nothing(
    locks: DistributedLock, renew_now: RenewNow, plain_redis: Any, eventually: Callable[..., Any], kind: str
) -> None:
    held = [KINDS[kind](locks, f"x{n}", 1000) for n in range(40)]
    eventually(lambda: listed(*held))
    before = [lock._lease.deadline for lock in held]
    spoilt = {3, 17, 18}
    for n in spoilt:
        for key in held[n]._lease._resource.keys[:2]:
            plain_redis.delete(key)
            plain_redis.hset(key, "of", "another")
    renew_now(held)
    eventually(lambda: all(lock._lease.deadline > before[n] for n, lock in enumerate(held) if n not in spoilt))
    for n, lock in enumerate(held):
        lock.raise_if_lost()
        if n in spoilt:
            assert lock._lease.deadline <= before[n]
            with pytest.raises(BackendError, match="WRONGTYPE"):
                lock.extend()
            with pytest.raises(BackendError, match="WRONGTYPE"):
                lock.release()
        else:
            assert lock.release() is True


def test_an_extension_does_not_overtake_a_renewal(
    locks: DistributedLock, renew_now: RenewNow, pipelines: Pipelines, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    """With two on their way at once, nobody knows which Redis carries out last, and so when the lease ends."""
    held = locks.acquire("x", ttl=1000)
    eventually(lambda: listed(held))
    pipelines.go_on.clear()
    renew_now([held])
    assert pipelines.stands.wait(PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        extended = pool.submit(held.extend, 50)
        pipelines.go_on.set()
        extended.result(PATIENCE)
        assert held.remaining() <= 50
        assert plain_redis.pttl(KEY) <= 50_001
    assert held.release() is True


def test_an_extension_that_was_struck_counts_where_it_shortens_the_lease(
    locks: DistributedLock, plain_redis: Any, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    class Struck(BaseException):
        pass

    def strike(*_: Any) -> Any:
        raise Struck

    held = locks.acquire("x", ttl=1000, max_hold=0.001)
    lost = threading.Event()
    held.on_lost(lost.set)
    with monkeypatch.context() as patched:
        patched.setattr(RedisNode, "run", strike)
        with pytest.raises(Struck):
            held.extend(1)
    assert held.remaining() <= 1
    assert lost.wait(PATIENCE), "and the renewal thread knows when"
    with pytest.raises(LockLost):
        held.raise_if_lost()
    held.release()


def test_an_unexpected_error_of_one_renewal_costs_the_others_nothing(
    locks: DistributedLock, renew_now: RenewNow, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    held = [locks.acquire(f"x{n}", ttl=1000) for n in range(5)]
    eventually(lambda: listed(*held))
    before = [lock._lease.deadline for lock in held]
    refresh = type(held[0]._lease.host_lock).refresh

    def refreshed(host_lock: Any, token: int, deadline: float) -> bool:
        if host_lock is held[2]._lease.host_lock:
            raise ZeroDivisionError
        return refresh(host_lock, token, deadline)

    monkeypatch.setattr(type(held[0]._lease.host_lock), "refresh", refreshed)
    renew_now(held)
    eventually(lambda: all(lock._lease.deadline > before[n] for n, lock in enumerate(held) if n != 2))
    assert all(lock.release() for lock in held)


def test_the_list_is_kept_by_one_command_for_all(
    locks: DistributedLock, renew_now: RenewNow, pipelines: Pipelines, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    held = [take(locks, "x", 1000) for take in (KINDS["read"], KINDS["semaphore"], KINDS["lock"])]
    eventually(lambda: listed(*held))
    pipelines.sent.clear()
    renew_now(held)
    eventually(lambda: len(pipelines.sent) == 2)
    listings = [commands[-1] for commands in pipelines.sent]
    assert sorted(len(listing) - 4 for listing in listings) == [2, 4]
    assert all(listing[3] == "govredis:locks" for listing in listings)
    assert sorted(holder.kind for holder in locks.held()) == ["lock", "read", "semaphore"]
    assert all(lock.release() for lock in held)
    assert plain_redis.keys("govredis:*") == []
    assert not plain_redis.exists(KEY, *(sibling(KEY, kind) for kind in ("rwlock", "semaphore")))
