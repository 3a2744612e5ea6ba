"""Passing a holder that stands still: each of those who take part is stopped (SIGSTOP) just before each of its system
calls in turn, while the others go on.
"""

from __future__ import annotations

import itertools
import os
import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis.locks.backends.file_backend import FileLockBackend
from govredis.locks.host_lock import exclusive as host_lock_module
from govredis.locks.host_lock import liveness as liveness_module
from govredis.locks.host_lock.exclusive import ExclusiveHostLock

pytestmark = pytest.mark.once

#: In the other process: it stops itself just before its `at`th system call. The clock is the test's.
STOPPING = """
import fcntl, os, signal, struct
from govredis.locks.host_lock import exclusive as host_lock_module
from govredis.locks.host_lock import liveness as liveness_module
from govredis.locks.backends.file_backend import FileLockBackend

calls = at = 0

def stopping(function):
    def stopped(*args, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*args, **options)
    return stopped

def does(what, stopped_at):
    global calls, at
    calls, at = 0, stopped_at
    try:
        return what()
    finally:
        at = 0

def clock():
    # Looking at the clock is a point to stop at, too.
    return struct.unpack("d", os.pread(time_file, 8, 0))[0]

time_file = os.open({time!r}, os.O_RDONLY)
host_lock_module.clock = clock
for module, names in ((os, ("pread", "pwrite", "stat", "fstat", "close")), (fcntl, ("flock", "fcntl"))):
    for name in names:
        setattr(module, name, stopping(getattr(module, name)))
folder = FileLockBackend({folder!r})

def enter(token, ttl):
    return host_lock.enter(token, f"owner-{{token}}", clock() + ttl, may_pass=True)
"""


class Host:
    """Lock files, a clock for all, and a process that can be stopped anywhere."""

    def __init__(self, path: Path, make_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = FileLockBackend(str(path / "locks"))
        self._time = path / "time"
        self._key = ""
        self._opened: list[ExclusiveHostLock] = []
        self.now = 100.0
        self.tick(0)
        monkeypatch.setattr(host_lock_module, "clock", lambda: self.now)
        self._make_worker = make_worker
        self._start()

    def _start(self) -> None:
        self.worker = self._make_worker(redis_enabled=False, lock_folder=self._folder.path)
        self.worker.run(STOPPING.format(time=str(self._time), folder=self._folder.path))

    def begin(self, key: str) -> None:
        """Go on with another lock file, a new one."""
        self._key = key
        self.worker.run(f"host_lock = folder.open_exclusive({key!r})")

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self._time.write_bytes(struct.pack("d", self.now))

    def open(self) -> ExclusiveHostLock:
        self._opened.append(self._folder.open_exclusive(self._key))
        return self._opened[-1]

    def enter(self, host_lock: ExclusiveHostLock, token: int, ttl: float = 1000.0) -> bool:
        return host_lock.enter(token, f"owner-{token}", self.now + ttl, may_pass=True)

    def pass_by(self, token: int, ttl: float = 1000.0) -> ExclusiveHostLock | None:
        """Somebody who does, with no more patience than it takes; None where it cannot."""
        host_lock = self.open()
        if not self.enter(host_lock, token, ttl):
            self.tick(0.2)
            self.enter(host_lock, token, ttl)
        return host_lock if host_lock.inside else None

    def stopped_holder(self) -> ExclusiveHostLock:
        """Somebody inside with token 1 whose record has run out."""
        holder = self.open()
        assert self.enter(holder, 1, ttl=1)
        self.tick(2)
        return holder

    def stopped_everywhere(self, prepare: Callable[[], str], least: int) -> Iterator[Callable[[], Any]]:
        """Has the process do what `prepare` returns, and stopped before another of its system calls each time, `least`
        at least. Yields what has it go on, and returns what came of it.
        """
        for at in itertools.count(1):
            self.begin(f"lock:{at}")
            doing = prepare()
            self.worker.begin(f"does(lambda: {doing}, {at})")
            stood = self._stands_still()
            if stood:
                yield self._goes_on
            else:
                self.worker.answer()
            for host_lock in self._opened:
                host_lock.leave()
            self.worker.run("host_lock.leave()")
            if not stood:
                assert at > least, "it makes fewer system calls than it must"
                return

    def dies(self) -> None:
        self.worker.kill()
        self._start()
        self.begin(self._key)

    def _stands_still(self) -> bool:
        """Waits until it does, or has ended."""
        while not select.select([self.worker.process.stdout], [], [], 0.002)[0]:
            if os.waitid(os.P_PID, self.worker.pid, os.WSTOPPED | os.WNOHANG) is not None:
                return True
        return False

    def _goes_on(self) -> Any:
        self.worker.resume()
        return self.worker.answer()


@pytest.fixture
def host(tmp_path: Path, make_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, make_worker, monkeypatch)


def test_a_single_passer_of_two_gets_in(host: Host) -> None:
    def passes() -> str:
        host.stopped_holder()
        assert host.worker.eval("enter(2, 1000)") is False, "not at first sight"
        host.tick(0.2)
        return "enter(2, 1000)"

    alone = 0
    for goes_on in host.stopped_everywhere(passes, 8):
        other = host.pass_by(3)
        entered = goes_on()
        assert not (entered and other)
        alone += bool(entered)
    assert alone >= 1, "one that has begun to pass is not overtaken"


def test_a_holder_that_vouches_for_itself_too_late_knows_that_it_was_passed(host: Host) -> None:
    def refreshes() -> str:
        assert host.worker.eval("enter(1, 1)")
        host.tick(0.5)
        return "host_lock.refresh(1, clock() + 1000)"

    for goes_on in host.stopped_everywhere(refreshes, 5):
        host.tick(2)
        passer = host.pass_by(2)
        vouched_until = goes_on()
        assert not (vouched_until and passer)
        if passer:
            # Whatever it has written, and when it leaves, the passer is alone.
            host.worker.run("host_lock.leave()")
            assert not host.enter(host.open(), 3)
            assert passer.refresh(2, host.now + 2000)
            passer.leave()
            assert host.enter(host.open(), 3)


def test_a_holder_that_has_not_written_yet_does_not_go_in_beside_its_passer(host: Host) -> None:
    def enters() -> str:
        host.stopped_holder().leave()  # the record of it stands
        return "enter(2, 1000)"

    alone = 0
    for goes_on in host.stopped_everywhere(enters, 5):
        passer = host.pass_by(3)
        entered = goes_on()
        assert not (entered and passer)
        alone += bool(passer)
    assert alone >= 3


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("doing", ["host_lock.refresh(2, clock() + 1000)", "host_lock.leave()"])
def test_a_passer_that_stands_still_itself_may_be_followed(host: Host, leaves: bool, doing: str) -> None:
    """By who passes it, or by the flock's next owner; whatever it was about to do to its record."""

    def goes_in() -> str:
        holder = host.stopped_holder()
        assert host.worker.eval("enter(2, 1)") is False
        host.tick(0.2)
        assert host.worker.eval("enter(2, 1)") is True
        assert not host.enter(host.open(), 3)
        if leaves:
            holder.leave()
        return doing

    followed = 0
    for goes_on in host.stopped_everywhere(goes_in, 4):
        host.tick(2)
        follower = host.pass_by(3)
        vouched_until = goes_on()
        assert not (vouched_until and follower)
        if follower:
            followed += 1
            assert not host.pass_by(4)
            assert follower.refresh(3, host.now + 2000)
            assert not host.pass_by(4)
    assert followed >= 3


def test_a_passer_that_dies_keeps_nobody_out_for_longer_than_its_record(host: Host) -> None:
    def passes() -> str:
        host.stopped_holder()
        assert host.worker.eval("enter(2, 10)") is False
        host.tick(0.2)
        return "enter(2, 10)"

    for _ in host.stopped_everywhere(passes, 8):
        host.dies()
        host.tick(11)
        assert host.pass_by(3)


def test_a_passer_notices_what_another_program_does_to_the_file(host: Host) -> None:
    """A file that was removed is not passed on: others go in by another of its name."""
    for removed in True, False:
        host.begin("removed" if removed else "not")
        host.stopped_holder()
        passer = host.open()
        assert not host.enter(passer, 2)
        host.tick(0.2)
        if removed:
            os.unlink(passer._path)
        assert host.enter(passer, 2) is not removed


def test_without_locks_of_open_file_descriptions_nobody_is_passed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness_module, "SETLK", None)
    host.begin("x")
    holder = host.stopped_holder()
    assert not host.pass_by(2)
    assert holder.refresh(1, host.now + 10) == 0.0
    holder.leave()
    assert host.pass_by(2)
