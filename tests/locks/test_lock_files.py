"""Interference with lock files: cleaners of old files, an `rm`, a process that closes all descriptors."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import PATIENCE

from govredis import GovRedis, HeldLock, LockLost
from govredis.locks import DistributedLock
from govredis.testing.servers import RedisServer

KINDS: dict[str, Callable[[DistributedLock], HeldLock]] = {
    "lock": lambda locks: locks.acquire("x", ttl=60),
    "read": lambda locks: locks.rwlock("x").read(ttl=60),
    "write": lambda locks: locks.rwlock("x").write(ttl=60),
    "semaphore": lambda locks: locks.semaphore("x", slots=3).acquire(ttl=60),
}


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url).locks


def file_of(held: HeldLock) -> Path:
    return Path(held._lease.host_lock._path)  # type: ignore[attr-defined]


def descriptor_of(held: HeldLock) -> int:
    (fd,) = held._lease.host_lock._files  # type: ignore[attr-defined]
    return int(fd)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_holder_whose_file_was_removed_has_lost_the_lock(locks: DistributedLock, kind: str, replaced: bool) -> None:
    held = KINDS[kind](locks)
    held.extend()
    path = file_of(held)
    path.unlink()
    if replaced:
        path.touch()
    with pytest.raises(LockLost, match="lock file was removed"):
        held.extend()
    with pytest.raises(LockLost):
        held.raise_if_lost()
    assert held.release() is False
    with KINDS[kind](locks) as again:
        again.extend()


@pytest.mark.parametrize("kind", KINDS)
def test_the_renewal_notices_by_itself_and_says_so(locks: DistributedLock, kind: str) -> None:
    held = KINDS[kind](locks)
    lost = threading.Event()
    held.on_lost(lost.set)
    file_of(held).unlink()
    held._lease._next = held._lease.due = 0.0
    held._lease.start()
    assert lost.wait(PATIENCE)
    with pytest.raises(LockLost):
        held.__exit__(None, None, None)


def test_a_folder_that_was_moved_away_is_noticed_too(locks: DistributedLock, tmp_path: Path) -> None:
    with pytest.raises(LockLost), locks.acquire("x", ttl=60) as held:
        file_of(held).parent.rename(tmp_path / "elsewhere")
        held.extend()
    shutil.rmtree(tmp_path / "elsewhere")
    locks.acquire("x", timeout=0).release()


def test_without_redis_too(make_gov: Callable[..., GovRedis]) -> None:
    held = make_gov(redis_enabled=False).locks.acquire("x", ttl=60)
    file_of(held).unlink()
    with pytest.raises(LockLost):
        held.extend()
    assert held.release() is False


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_what_is_held_is_kept_fresh(locks: DistributedLock, kind: str) -> None:
    """By its time of change, that what removes old files from /tmp leaves it alone."""
    with KINDS[kind](locks) as held:
        os.utime(file_of(held), (1_000_000, 1_000_000))
        held.extend()
        assert file_of(held).stat().st_mtime > 1_000_000_000


@pytest.mark.parametrize(("age", "touched"), [(30, False), (90, True)])
def test_a_reader_touches_the_file_when_a_minute_has_passed(locks: DistributedLock, age: int, touched: bool) -> None:
    """Not at each renewal: that is a system call for each of many locks."""
    with KINDS["read"](locks) as held:
        before = time.time() - age
        os.utime(file_of(held), (before, before))
        held.extend()
        assert (file_of(held).stat().st_mtime > before + 1) is touched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reused", [False, True])
def test_a_holder_whose_descriptor_was_closed_has_lost_the_lock_and_leaves_the_number_alone(
    locks: DistributedLock, tmp_path: Path, kind: str, reused: bool
) -> None:
    """As os.closerange does to all. The number may be another file's by then."""
    held = KINDS[kind](locks)
    fd = descriptor_of(held)
    os.close(fd)
    if reused:
        other = os.open(tmp_path / "another", os.O_WRONLY | os.O_CREAT)
        if other != fd:  # a lower number has become free
            os.dup2(other, fd)
            os.close(other)
    with pytest.raises(LockLost):
        held.extend()
    assert held.release() is False
    if reused:
        os.write(fd, b"unharmed")
        os.close(fd)


def test_a_file_closed_before_any_renewal_is_released_without_an_error(locks: DistributedLock) -> None:
    held = locks.acquire("x", ttl=60)
    os.close(descriptor_of(held))
    assert held.release() is True
    locks.acquire("x", timeout=0).release()
