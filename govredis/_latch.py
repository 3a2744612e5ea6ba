"""Latch: a threading.Event that no exception leaves taken."""

from __future__ import annotations

import threading
import time

#: Seconds that a waiter sleeps before it looks again: an exception may have struck the thread that had to wake it.
_SLICE = 0.25


class Latch:
    """Set once, while other threads wait for it.

    threading.Event takes a lock in Python code. An exception there, of a signal handler or a soft time limit, leaves
    the lock taken, and `set` and `wait` stand for ever. A latch's lock is free once the latch is set, by any thread.
    """

    __slots__ = ("_free", "_set")

    def __init__(self) -> None:
        self._set = False
        self._free = threading.Lock()
        self._free.acquire()

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Wake all waiters, present and future."""
        self._set = True
        self._wake_one()

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, or so many seconds. Returns whether it is set."""
        deadline = time.monotonic() + seconds
        while not self._set and (left := deadline - time.monotonic()) > 0:
            if self._free.acquire(timeout=min(left, _SLICE)):
                self._wake_one()
        return self._set

    def _wake_one(self) -> None:
        """Wake a waiter, which then wakes the next."""
        try:
            self._free.release()
        except RuntimeError:
            pass  # it is free
