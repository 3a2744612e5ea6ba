"""Pool: the connections of one process to one server, last in first out. The client and PostgreSQL share it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakSet

from .errors import NotAsked

C = TypeVar("C")

#: Seconds for which a server that took no more connections is not asked for more.
_NARROW = 1.0
#: Seconds that a waiter sleeps before it looks again: a connection dropped by an exception tells nobody.
SLICE = 0.05


class PoolExhausted(NotAsked):
    """All connections of this process to a server are in use: contention here, not an outage."""


class _PoolSlot:
    """A connection that is being made; it counts for as long as the frame that makes it."""

    __slots__ = ("__weakref__",)


class Pool(Generic[C]):
    """Bounded, and self-healing where an exception strikes at any bytecode (a signal, Celery's soft time limit).

    A connection is either idle in the deque or owned by one frame. There are no slots to give back: the bound counts
    live connections by weak reference, so one whose frame was blown away between two lines is closed by its own
    destructor and frees its place. Each waiter leaves a bell: a lock that is released when a place gets free. If an
    exception takes a bell away, nobody else is stopped, as they would be by a Condition's lock.

    A server may take fewer connections than the bound: `narrow` then keeps to the number that it took.

    Args:
        connect: makes a connection by a deadline (time.monotonic); its errors reach the caller of `take`.
        disconnect: closes one, never raising.
        bound: how many may live at once.
        name: the server's, for the error.
        check: raises where the server is known to be away: the connections in use wait for it then, and nobody needs to
            wait for them.
    """

    def __init__(
        self,
        connect: Callable[[float], C],
        disconnect: Callable[[C], None],
        bound: int,
        name: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._bound = bound
        self._name = name
        self._check = check
        self.renew()

    def renew(self) -> None:
        """Forget everything without closing it: for a forked child, which closes what it inherited its own way."""
        self.idle: deque[C] = deque()
        self.live: WeakSet[C] = WeakSet()
        self._opening: WeakSet[_PoolSlot] = WeakSet()
        #: Connections that were in use when the pool was retired from their server; None: it never was, which is
        #: quicker to see at each return than an empty set.
        self._retired: WeakSet[C] | None = None
        self._counting = threading.RLock()  # a signal handler may make calls of its own
        self._narrow: tuple[int, float] | None = None
        self._bells: deque[threading.Lock] = deque()

    def take(self, wait: float, connecting: float = 0.0) -> C:
        """An idle connection, or a new one: `wait` seconds for a place, and `connecting` more for connecting.

        Raises PoolExhausted when the pool stays full, or the error of `check`.
        """
        try:
            return self.idle.pop()
        except IndexError:
            pass
        deadline = time.monotonic() + wait
        place = self._claim()
        return self._wait_for_one(deadline, connecting) if place is None else self._new(place, deadline + connecting)

    def _claim(self) -> _PoolSlot | None:
        with self._counting:
            if self._count() + sum(1 for _ in self._opening) >= self._bound_now():
                return None
            place = _PoolSlot()
            self._opening.add(place)
            return place

    def _count(self) -> int:
        return sum(1 for _ in self.live)  # not len(), which counts those whose removal an exception cut short

    def _bound_now(self) -> int:
        if self._narrow is not None:
            bound, until = self._narrow
            if time.monotonic() < until:
                return bound
            self._narrow = None
        return self._bound

    def narrow(self) -> bool:
        """The server takes no more connections: make do with the open ones for a second. Returns whether any are."""
        with self._counting:
            living = self._count()
            if living:
                self._narrow = living, time.monotonic() + _NARROW
        return living > 0

    def adopt(self, connection: C) -> None:
        """Put in a connection that was made elsewhere, its whole reply read. Close it if there is no place."""
        with self._counting:
            place = self._count() < self._bound
            if place:
                self.live.add(connection)
        if place:
            self.give(connection)
        else:
            self._disconnect(connection)

    def _new(self, place: _PoolSlot, deadline: float) -> C:
        try:
            connection = self._connect(deadline)
            with self._counting:
                self.live.add(connection)
        finally:
            with self._counting:
                self._opening.discard(place)  # explicitly, as the traceback of an error would keep it alive
        return connection

    def _wait_for_one(self, deadline: float, connecting: float) -> C:
        place = None
        while place is None:
            bell = threading.Lock()
            bell.acquire()
            self._bells.append(bell)  # before looking, to hear of a place that gets free after that
            try:
                try:
                    return self.idle.pop()
                except IndexError:
                    pass
                place = self._claim()
                if place is None:
                    self._check()
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise PoolExhausted(
                            f"all {self._bound_now()} connections to {self._name} are in use by this process"
                        )
                    bell.acquire(timeout=min(left, SLICE))
            finally:
                try:
                    self._bells.remove(bell)
                except ValueError:  # it was rung
                    pass
        return self._new(place, deadline + connecting)

    def give(self, connection: C) -> None:
        """Put back a connection whose whole reply was read."""
        retired = self._retired
        if retired is not None and connection in retired:
            self.drop(connection)
            return
        self.idle.append(connection)
        if self._retired is not retired:  # between the two lines above
            self.drop_idle()
        if self._bells:
            self._wake()

    def let_go(self) -> C | None:
        """Take an idle connection out of this pool for good; None if there is no idle one."""
        try:
            connection = self.idle.pop()
        except IndexError:
            return None
        with self._counting:
            self.live.discard(connection)
        return connection

    def drop(self, connection: C) -> None:
        """Close a connection that is in an unknown state."""
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

    def retire(self) -> None:
        """Another server takes the place of the pool's: connections that are in use are closed once they come back."""
        with self._counting:  # a set that grows while it is read raises an error
            self._retired = WeakSet(self.live)
        self.drop_idle()

    def drop_idle(self) -> None:
        """Close all idle connections: their server went away."""
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return
            self.drop(connection)
