"""The removal of lock files that nobody needs any more, so that their number is bounded by that of the names in use.

A file is needed for as long as its fence stands: it keeps tokens rising on this host, as the sibling "fence" does in
Redis. Both end an hour after the last lease. exclusive.py argues why nobody can be inside a file that is removed.

Each process that holds locks looks at all files of its folder every ten minutes, unless another process has done so. It
does so in a thread that pauses after every hundred files: neither calls nor renewals wait for it. A process that ends
sooner does a part. So a folder has the files of the names that were locked in the last 70 minutes, if some process
lives for a few seconds now and then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import re
import time

from ..._boottime import clock
from ..._counters import Counters
from ..._daemon import start_daemon
from . import liveness as liveness_module
from .liveness import lock_range
from .open_file import OpenFile
from .record import FENCE_KEPT, PASSERS, RECORD_BYTES, LockRecord, read_records

log: logging.Logger = logging.getLogger("govredis")

#: Seconds between two sweeps of a folder.
_EVERY = 600.0
#: Files between two pauses, and the pause in seconds.
_AT_ONCE, _PAUSE = 100, 0.02

#: A lock's file, or the file of a semaphore's slot; and files that are there for an instant, unless their maker dies.
_LOCK_FILE = re.compile(r"[0-9a-f]{40}(\.\d+)?")
_PASSING_FILE = re.compile(r"(new|check)-[\w-]+")

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


class Sweep:
    """This process's sweep of one folder.

    Args:
        folder: its path.
        boot: the host's boot, as it stands in records.
        shared: as in OpenFile.
        counters: `locks.files_removed`.
    """

    def __init__(self, folder: str, boot: str, shared: bool, counters: Counters) -> None:
        self._folder = folder
        self._boot = boot
        self._shared = shared
        self._counters = counters
        self._next = 0.0

    def start_if_due(self) -> None:
        """Called by the renewal thread now and then. Returns at once."""
        now = clock()
        if now < self._next:
            return
        self._next = now + _EVERY
        if start_daemon("govredis-sweep", self.run) is None:
            log.debug("lock files of %s are not swept: no thread can be started", self._folder)

    def run(self) -> None:
        """Look at all files, unless another process does, or has in the last ten minutes. Raises nothing."""
        mark = _Mark(f"{self._folder}/living", self._shared)
        try:
            if mark.take():
                self._remove_all()
                mark.write()
        except OSError as error:
            log.debug("lock files of %s are not swept: %s", self._folder, error)
        finally:
            mark.end()

    def _remove_all(self) -> None:
        names = os.listdir(self._folder)
        # Shuffled, so that short scripts, which never come to the end, do different parts.
        _random.shuffle(names)
        for n, name in enumerate(names, 1):
            if n % _AT_ONCE == 0:
                time.sleep(_PAUSE)
            with contextlib.suppress(OSError):  # gone by now, or of another user in a folder with the sticky bit
                if self._remove(name):
                    self._counters.add("locks.files_removed")

    def _remove(self, name: str) -> bool:
        is_lock = _LOCK_FILE.fullmatch(name) is not None
        if not is_lock and not _PASSING_FILE.fullmatch(name):
            return False
        path = f"{self._folder}/{name}"
        if os.lstat(path).st_mtime + FENCE_KEPT > time.time():
            return False
        if is_lock:
            return remove_if_over(path, self._boot)
        os.unlink(path)
        return True


class _Mark(OpenFile):
    """The file of liveness.py. Its text says when a sweep last came to its end; a sweep that goes on has its flock."""

    def take(self) -> bool:
        """Returns whether a sweep is due. If so, it is this process's."""
        self._open()
        if not _flock(self._files[0]):
            return False
        try:
            ended = float(os.pread(self._files[0], 100, 0))
        except ValueError:  # no sweep has come to its end
            return True
        return not 0 <= time.time() - ended < _EVERY

    def write(self) -> None:
        os.pwrite(self._files[0], b"%d" % time.time(), 0)

    def end(self) -> None:
        self._close()


class _OldFile(OpenFile):
    """A lock file that may be removed."""

    def remove(self, boot: str) -> bool:
        self._open_as(os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        fd = self._files[0]
        if not _flock(fd):
            return False
        has_turn = liveness_module.SETLK is None  # there nobody passes
        try:
            has_turn = has_turn or _lock_passers(fd)
            if not has_turn:
                return False
            # Another sweep may have removed this file; its name is a new file's then.
            if not os.path.samestat(os.fstat(fd), os.lstat(self._path)):
                return False
            pair = read_records(fd)
            if not all(_is_over(record, boot) for record in (pair.holder, pair.passer)):
                return False
            os.unlink(self._path)
            return True
        finally:
            # Not by closing alone: a child that was forked in C may have the descriptor too.
            if has_turn and liveness_module.SETLK is not None:
                lock_range(fd, fcntl.F_UNLCK, PASSERS, RECORD_BYTES)
            fcntl.flock(fd, fcntl.LOCK_UN)

    def end(self) -> None:
        self._close()


def remove_if_over(path: str, boot: str) -> bool:
    """Remove a lock file if its fence has ended, and nobody is inside or about to get in. Never waits. Raises OSError.

    While it looks, for an instant, nobody can go in: a try without Redis may find the lock held just then.
    """
    file = _OldFile(path)
    try:
        return file.remove(boot)
    finally:
        file.end()


def _is_over(record: LockRecord | None, boot: str) -> bool:
    """Whether an hour has passed since its lease, and since its token, which may be from a clock that was ahead."""
    if record is None:
        return True
    if record.boot == boot and record.deadline + FENCE_KEPT > clock():
        return False
    return record.token / 1_000_000 + FENCE_KEPT <= time.time()


def _flock(fd: int) -> bool:
    """Take the flock if it is free. Returns whether it was. Raises OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_passers(fd: int) -> bool:
    """Take the passers' turn if it is free. Returns whether it was. Raises OSError."""
    try:
        lock_range(fd, fcntl.F_WRLCK, PASSERS, RECORD_BYTES)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
