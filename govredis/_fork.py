"""Renewal after fork, in one place.

A child must not share its parent's sockets, threads, mutexes, tokens and nonces: each belongs to an object that
registers here and renews itself in the child.

Python's fork hooks alone are not enough: uWSGI and others fork in C, and run no hooks. So each public operation begins
with `notice_fork()`, before it touches anything shared; so do the client and PostgreSQL before each use of a socket.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
from functools import partial
from typing import Any, Protocol
from weakref import ref

_MADV_WIPEONFORK = 18  # Linux 4.14; Python has no name for it


class ForkAware(Protocol):
    def renew_after_fork(self) -> None:
        """Forget the parent's sockets, threads and mutexes.

        Called once in a child, before anything there uses the object; again from the start if an exception struck. Must
        not call anything that notices forks itself.
        """


class _Pid:
    """A mark that a child finds unset, by the process id: a system call for each look."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, _: int) -> bool:
        return os.getpid() == self._pid

    def __setitem__(self, _: int, __: int) -> None:
        self._pid = os.getpid()


def _make_mark() -> mmap.mmap | _Pid:
    """Memory that the kernel wipes in a child: no system call, and 20 ns in place of 50 to 200."""
    if sys.platform == "linux":
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            page.madvise(_MADV_WIPEONFORK)
        except OSError:  # an older kernel
            return _Pid()
        try:
            page.madvise(-1)
        except OSError:
            return page
    return _Pid()  # an emulator that says yes to anything, as QEMU's before 7.1, wipes nothing


#: Item 0 is true in the process in which all objects were last renewed.
_renewed_here = _make_mark()
_renewed_here[0] = 1

_objects: set[ref[ForkAware]] = set()
#: By process id: a child must not wait for an inherited mutex, held by a thread that the child does not have.
_mutexes: dict[int, threading.RLock] = {}


def notice_fork() -> None:
    """Renew all registered objects, once, if this process is a child that has not; other threads wait meanwhile."""
    if not _renewed_here[0]:
        _renew()


def renew_in_child(obj: ForkAware) -> None:
    """Have `obj.renew_after_fork()` called in every child of this process, for as long as `obj` lives."""
    notice_fork()  # an object made in a child must not be renewed there
    _objects.add(ref(obj, _objects.discard))


#: The parent's threads, kept for ever. From Python 3.13 on, the end of such an object detaches the thread of its
#: number. After a fork in C that may be a new thread of the child's: nobody could join that any more.
_inherited: list[Any] = []


def _renew(*, by_python: bool = False) -> None:
    """Args: by_python: Python's own hooks have seen to its threads."""
    pid = os.getpid()
    with _mutexes.setdefault(pid, threading.RLock()):  # reentrant: a destructor or a signal handler may come here too
        if not by_python and not _renewed_here[0] and sys.version_info >= (3, 13):
            _inherited.extend(each for each in gc.get_objects() if issubclass(type(each), threading.Thread))
        for found in list(_objects):
            if _renewed_here[0]:
                break
            obj = found()
            if obj is not None:
                obj.renew_after_fork()
        _renewed_here[0] = 1
    _mutexes.pop(pid, None)  # a thread that still waits for it finds everything renewed


# After a fork by Python the child's descriptors are closed at once, even if it never uses govredis.
os.register_at_fork(after_in_child=partial(_renew, by_python=True))
