"""SingleFlight: of the threads of one process that want the same value one goes for it. And ten loads at once, at most,
where no lease of Redis keeps loads apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from .._fork import renew_in_child
from .._latch import Latch
from .._pool import Pool
from .renewals import Load

T = TypeVar("T")
#: See `SingleFlight.run`.
Start: TypeAlias = Callable[[bool], None]

#: Loads at once of one process and cache.
_AT_ONCE = 10
#: Seconds that a load waits for its turn.
_PATIENCE = 30.0
#: Seconds between two looks whether the thread that is waited for still loads.
_SLICE = 0.05

#: The loads that are under way in a thread, the innermost last, of any cache.
_of_thread = threading.local()


def loads_of_thread() -> list[Load]:
    """The loads of this thread: in a loader, its own load and those that it was called in."""
    # Not those that an exception struck, nor the parent's.
    return [load for load in getattr(_of_thread, "loads", ()) if load.is_running()]


def running(load: Load, loader: Callable[[], T]) -> T:
    """Returns the result of `loader`; meanwhile this thread is loading `load`, which is running."""
    _of_thread.loads = [*loads_of_thread(), load]
    try:
        return loader()
    finally:
        _of_thread.loads = [other for other in _of_thread.loads if other is not load]


def refuse_own(loads: list[Load], key: str) -> RecursionError:
    """The error of a loader that needs the value which it loads."""
    names = [next(iter(load.keys)) for load in loads]
    first = next((n for n, load in enumerate(loads) if key in load.keys), 0)
    asked = " -> ".join([key, *names[first + 1 :], key])
    return RecursionError(f"the loader of {key} asks for what it loads: {asked}; nobody else will load it meanwhile")


class _Slot:
    """A load that is under way; it counts for as long as the frame that does it."""

    __slots__ = ("__weakref__",)


class _Flight:
    """A thread that goes for a value, and those that wait for it. It takes passengers until it begins to load. A later
    thread may follow a write that the load has not seen, so its value must be loaded after it came."""

    __slots__ = ("ended", "failed", "flying", "found")

    def __init__(self) -> None:
        #: Held while it is under way: what strikes its pilot, `with` gives it back.
        self.flying = threading.Lock()
        self.ended = Latch()
        self.found: object = None
        self.failed = True


class SingleFlight:
    """The loads of one cache in this process.

    Args:
        name: the namespace, for the error of a load that waited for a turn in vain.
        waits: called by each that waits for another.
    """

    def __init__(self, name: str, waits: Callable[[], object] = lambda: None) -> None:
        self._waits = waits
        self._slots: Pool[_Slot] = Pool(lambda _: _Slot(), lambda _: None, _AT_ONCE, f"the loader of {name}")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._slots.renew()
        self._lock = threading.RLock()  # a signal handler may load too
        #: By key, the flight that has started, and the next one.
        self._started: dict[str, _Flight] = {}
        self._next: dict[str, _Flight] = {}

    def run(self, key: str, go: Callable[[Start], T]) -> tuple[T, bool]:
        """Returns the result of `go` and True; or False, and that of another thread's `go` whose load began later.

        Args:
            go: is told how to say that it begins to load, with True where it is to wait for a load that has begun.

        A load within a load is done at once: two that need each other's value would wait for ever. Raises what `go`
        raises, to its own caller only: the others take turns.
        """
        if loads_of_thread():
            return go(lambda _: None), True
        waited = False
        while True:
            mine = _Flight()
            with mine.flying:
                with self._lock:
                    flight = self._next.get(key)
                    if flight is None or not flight.flying.locked():
                        flight = self._next[key] = mine
                if flight is mine:
                    return self._fly(key, mine, go, waited), True
            if not waited:
                self._waits()
            waited = True
            self._await(flight)
            if not flight.failed:
                return flight.found, False  # type: ignore[return-value]

    def _fly(self, key: str, flight: _Flight, go: Callable[[Start], T], waited: bool) -> T:
        def start(after: bool) -> None:
            with self._lock:
                before = self._started.get(key) if after else None
            if before is not None:
                if not waited:
                    self._waits()
                self._await(before)
            with self._lock:
                if self._next.get(key) is flight:
                    del self._next[key]
                self._started[key] = flight

        try:
            found = flight.found = go(start)
            flight.failed = False
            return found
        finally:
            with self._lock:
                for flights in (self._next, self._started):
                    if flights.get(key) is flight:
                        del flights[key]
            flight.ended.set()

    def alone(self, load: Callable[[], T]) -> T:
        """The result of `load`. A bounded number runs at the same time; a load within a load runs immediately.

        Raises what it raises, and BackendUnavailable where there was no turn within 30 s.
        """
        if loads_of_thread():
            return load()
        slot = self._slots.take(_PATIENCE)
        try:
            return load()
        finally:
            self._slots.give(slot)

    @staticmethod
    def _await(flight: _Flight) -> None:
        while not flight.ended.wait(_SLICE) and flight.flying.locked():
            pass
