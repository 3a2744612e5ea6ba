"""Pool: the connections of one process to one server, last in first out. client.py and postgres.py share it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakSet

from .errors import BackendUnavailable

C = TypeVar("C")

#: How long a waiter sleeps before it looks again: a connection dropped by an exception tells nobody.
_SLICE = 0.05


class Pool(Generic[C]):
    """Bounded, and self-healing where an exception strikes at any bytecode (a signal, Celery's soft time limit).

    A connection is either idle in the deque or owned by one frame. There are no slots to give back: the bound counts
    live connections by weak reference, so one whose frame was blown away between two lines is closed by its own
    destructor and frees its place.

    Args:
        connect: makes a connection; its errors reach the caller of `take`.
        disconnect: closes one, never raising.
        bound: how many may live at once.
        name: the server's, for the error.
    """

    def __init__(self, connect: Callable[[], C], disconnect: Callable[[C], None], bound: int, name: str) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._bound = bound
        self._name = name
        self.renew()

    def renew(self) -> None:
        """Forget everything without closing it: for a forked child, which closes what it inherited its own way."""
        self.idle: deque[C] = deque()
        self.live: WeakSet[C] = WeakSet()
        self._freed = threading.Condition(threading.Lock())
        self._waiters = 0

    def take(self, wait: float) -> C:
        """An idle connection, or a new one, waiting up to `wait` seconds for a place.

        Raises BackendUnavailable when the pool stays full.
        """
        try:
            return self.idle.pop()
        except IndexError:
            pass
        if len(self.live) >= self._bound:
            return self._wait_for_one(wait)
        return self._new()

    def _new(self) -> C:
        connection = self._connect()
        self.live.add(connection)
        return connection

    def _wait_for_one(self, wait: float) -> C:
        deadline = time.monotonic() + wait
        with self._freed:
            self._waiters += 1
            try:
                while True:
                    try:
                        return self.idle.pop()
                    except IndexError:
                        pass
                    if len(self.live) < self._bound:
                        break
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise BackendUnavailable(
                            f"all {self._bound} connections to {self._name} are in use by this process"
                        )
                    self._freed.wait(min(left, _SLICE))
            finally:
                self._waiters -= 1
        return self._new()

    def give(self, connection: C) -> None:
        """Put back a connection whose whole reply was read."""
        self.idle.append(connection)
        if self._waiters:
            self._wake()

    def drop(self, connection: C) -> None:
        """Close one in an unknown state."""
        self._disconnect(connection)
        self.live.discard(connection)
        if self._waiters:
            self._wake()

    def _wake(self) -> None:
        with self._freed:
            self._freed.notify()

    def drop_idle(self) -> None:
        """Close all that are idle: their server went away."""
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return
            self.drop(connection)
