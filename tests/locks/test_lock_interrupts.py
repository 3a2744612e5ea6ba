"""Exceptions raised by signal handlers at any line of acquire and release: Ctrl-C, Celery's soft time limit."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import eventually

from govredis import GovRedis, LockTimeout
from govredis.locks.renewal import renewer
from govredis.testing.servers import RedisServer


class Struck(BaseException):
    pass


@pytest.fixture
def strike() -> Iterator[Callable[[float], None]]:
    """Has Struck raised in this thread, once, after so many seconds; 0: not any more."""

    def raise_it(*_: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, raise_it)
    yield lambda after: signal.setitimer(signal.ITIMER_REAL, after) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def descriptors(folder: str) -> list[str]:
    """The open lock files, without the file of this process's liveness, which stays open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass
    return [path for path in found if path.startswith(folder) and not path.endswith("/living")]


def end_what_was_never_given() -> None:
    """Python 3.10 may strike between the return of `acquire` and the assignment of what it returned.

    Nobody has the handle then: it is collected while held, and ends with its lease, as promised; here, at once.
    """
    for lease in list(renewer._leases):
        if lease._abandoned:  # type: ignore[attr-defined]
            assert sys.version_info < (3, 11)
            assert lease.end()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:lock .* was collected while held:ResourceWarning")
# By redis-py, struck while it connects: see RoundTrips._open. No descriptor is left, as is asserted below.
@pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")
@pytest.mark.parametrize("contended", [False, True])
def test_nothing_is_left_by_exceptions_that_strike_anywhere(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    plain_redis: Any,
    strike: Callable[[float], None],
    eventually: Callable[..., Any],
    contended: bool,
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    locks.acquire("warm").release()
    other = locks.acquire("x", ttl=1000) if contended else None
    struck = 0
    before = len(os.listdir("/proc/self/fd"))
    for n in range(300 if contended else 1500):
        held = None
        try:
            try:
                strike(random.uniform(0.00001, 0.005 if contended else 0.0006))
                try:
                    # Python swallows what strikes in a `__del__`: a wait that was not struck then ends by itself.
                    held = locks.acquire("x", ttl=1000, timeout=1 if contended else 60)
                    held.release()
                finally:
                    strike(0)
            except Struck:
                struck += 1
                if held is not None:
                    held.release()
        except Struck:  # between two lines of this test's own
            struck += 1
            if held is not None:
                held.release()
        except LockTimeout:
            if not contended:
                pytest.fail(f"round {n}: the one before has left it locked")
        finally:
            end_what_was_never_given()
    assert struck > 150
    if other is not None:
        assert plain_redis.get("lock:x") == other._lease.owner
        assert other.release()
    # No key is left; not even for its ttl, and nothing renews it.
    eventually(lambda: not plain_redis.keys("lock:*"))
    eventually(lambda: not descriptors(locks._file_backend.path))  # but those of a sweep, for a moment
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)  # a connection anew
    assert not renewer._leases
    assert locks.acquire("x", timeout=0).release()
    # Not alive: where Thread.start was struck at a lock of its own, the thread stands at it for ever, before `run`.
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "govredis-renewal" and t.is_alive()])


def test_an_exception_in_the_middle_of_a_release_does_not_stop_it(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    held = locks.acquire("x", ttl=1000)
    real, strikes = renewer.discard, [Struck]

    def discard(lease: Any) -> None:
        if strikes:
            raise strikes.pop()
        real(lease)

    monkeypatch.setattr(renewer, "discard", discard)
    with pytest.raises(Struck):
        held.release()
    assert not plain_redis.exists("lock:x")
    eventually(lambda: not descriptors(locks._file_backend.path))  # but those of a sweep, for a moment
    assert locks.acquire("x", timeout=0).release()


def test_an_exception_just_after_the_renewal_began_gives_it_back_without_a_warning(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    real = renewer.add

    def add(lease: Any) -> None:
        real(lease)
        raise Struck

    monkeypatch.setattr(renewer, "add", add)
    with pytest.raises(Struck):
        locks.acquire("x", ttl=1000)
    monkeypatch.undo()
    assert not plain_redis.exists("lock:x")
    assert not renewer._leases
    assert locks.acquire("x", timeout=0).release()


@pytest.mark.usefixtures("renewed_soon")
def test_a_renewal_thread_that_was_struck_while_starting_is_started_again(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    eventually(lambda: renewer._thread is None)

    def start(self: threading.Thread) -> None:
        raise Struck

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(Struck):
            locks.acquire("x")
    with locks.acquire("x", ttl=60, timeout=0) as held:
        first = held._lease.deadline
        eventually(lambda: held._lease.deadline > first)


def test_a_release_in_a_signal_handler_does_not_wait_for_what_it_interrupted(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, strike: Callable[[float], None]
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    released = []
    with renewer._lock:  # as in `add`, say
        held = locks.acquire("x")

        def release(*_: object) -> None:
            released.append(held.release())

        signal.signal(signal.SIGALRM, release)
        os.kill(os.getpid(), signal.SIGALRM)
        assert released == [True]


def test_a_strike_that_the_start_of_the_renewal_thread_hides_is_raised(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    plain_redis: Any,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    eventually(lambda: renewer._thread is None)

    def start(thread: threading.Thread) -> None:
        try:
            raise Struck
        finally:
            raise RuntimeError("release unlocked lock")  # as threading.Condition does, struck in its `wait`

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(Struck):
        locks.acquire("x")
    monkeypatch.undo()
    assert not plain_redis.exists("lock:x")
    assert locks.acquire("x", timeout=0).release()
