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


class _Place:
    """A connection that is being made; it counts for as long as the frame that makes it."""

    __slots__ = ("__weakref__",)


class Pool(Generic[C]):
    """Bounded, and self-healing where an exception strikes at any bytecode (a signal, Celery's soft time limit).

    A connection is either idle in the deque or owned by one frame. There are no slots to give back: the bound counts
    live connections by weak reference, so one whose frame was blown away between two lines is closed by its own
    destructor and frees its place. Waiters leave a bell each, a lock that whoever frees a place releases: unlike a
    Condition's lock, one lost to an exception stops nobody.

    Args:
        connect: makes a connection by a deadline (time.monotonic); its errors reach the caller of `take`.
        disconnect: closes one, never raising.
        bound: how many may live at once.
        name: the server's, for the error.
    """

    def __init__(self, connect: Callable[[float], C], disconnect: Callable[[C], None], bound: int, name: str) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._bound = bound
        self._name = name
        self.renew()

    def renew(self) -> None:
        """Forget everything without closing it: for a forked child, which closes what it inherited its own way."""
        self.idle: deque[C] = deque()
        self.live: WeakSet[C] = WeakSet()
        self._opening: WeakSet[_Place] = WeakSet()
        self._counting = threading.RLock()  # a signal handler may make calls of its own
        self._bells: deque[threading.Lock] = deque()

    def take(self, wait: float) -> C:
        """An idle connection, or a new one: `wait` seconds for a place and for connecting.

        Raises BackendUnavailable when the pool stays full.
        """
        try:
            return self.idle.pop()
        except IndexError:
            pass
        deadline = time.monotonic() + wait
        place = self._claim()
        return self._wait_for_one(deadline) if place is None else self._new(place, deadline)

    def _claim(self) -> _Place | None:
        with self._counting:
            # Not len(), which counts those whose removal an exception cut short.
            if sum(1 for _ in self.live) + sum(1 for _ in self._opening) >= self._bound:
                return None
            place = _Place()
            self._opening.add(place)
            return place

    def _new(self, place: _Place, deadline: float) -> C:
        try:
            connection = self._connect(deadline)
            with self._counting:
                self.live.add(connection)
        finally:
            with self._counting:
                self._opening.discard(place)  # by hand: the traceback of an error would keep it alive
        return connection

    def _wait_for_one(self, deadline: float) -> C:
        place = None
        while place is None:
            bell = threading.Lock()
            bell.acquire()
            self._bells.append(bell)  # before looking, so that nothing freed after the look goes unheard
            try:
                try:
                    return self.idle.pop()
                except IndexError:
                    pass
                place = self._claim()
                if place is None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise BackendUnavailable(
                            f"all {self._bound} connections to {self._name} are in use by this process"
                        )
                    bell.acquire(timeout=min(left, _SLICE))
            finally:
                try:
                    self._bells.remove(bell)
                except ValueError:  # it was rung
                    pass
        return self._new(place, deadline)

    def give(self, connection: C) -> None:
        """Put back a connection whose whole reply was read."""
        self.idle.append(connection)
        if self._bells:
            self._wake()

    def drop(self, connection: C) -> None:
        """Close one in an unknown state."""
        self._disconnect(connection)
        with self._counting:
            self.live.discard(connection)
        if self._bells:
            self._wake()

    def _wake(self) -> None:
        try:
            self._bells.popleft().release()
        except IndexError:
            pass

    def drop_idle(self) -> None:
        """Close all that are idle: their server went away."""
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return
            self.drop(connection)
