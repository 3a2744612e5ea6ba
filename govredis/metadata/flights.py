"""Flights: the loads that no lease of Redis keeps apart. One at a time of each key, and ten at once in a process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from .._fork import renew_in_child
from .._pool import Pool

T = TypeVar("T")

#: Loads at once of one process and cache.
_AT_ONCE = 10
#: Seconds that a load waits for its turn: the lease's.
_PATIENCE = 30.0
#: How often one looks after whom it waits for.
_SLICE = 0.05


class _Slot:
    """A load that is under way; it counts for as long as the frame that does it."""

    __slots__ = ("__weakref__",)


class _Flight:
    """One load, and those who wait for it. It takes passengers until it starts: what a later one gets must be loaded
    after it came, for it may follow a write that the load has not seen."""

    __slots__ = ("ended", "failed", "pilot", "text")

    def __init__(self, pilot: _Slot) -> None:
        self.ended = threading.Event()
        self.text: str | None = None
        self.failed = True
        self.pilot = weakref.ref(pilot)


class Flights:
    """The loads of one cache in this process.

    Args:
        name: of what is loaded, for the error of one that waited for a turn in vain.
    """

    def __init__(self, name: str) -> None:
        self._slots: Pool[_Slot] = Pool(lambda _: _Slot(), lambda _: None, _AT_ONCE, f"the loader of {name}")
        self._within = threading.local()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._slots.renew()
        self._within = threading.local()
        self._lock = threading.RLock()  # a signal handler may load too
        #: By key, the flight that has started, and the next one.
        self._started: dict[str, _Flight] = {}
        self._next: dict[str, _Flight] = {}

    def run(self, key: str, load: Callable[[], str | None]) -> str | None:
        """What `load` returns, or what another's call of it returned that began after this one's.

        A load within a load is done at once. Raises what `load` raises, to its own caller only: others load for
        themselves; BackendUnavailable where there was no turn within 30 s.
        """
        if getattr(self._within, "depth", 0):
            return load()
        while True:
            slot = _Slot()
            with self._lock:
                flight = self._next.get(key)
                if flight is None or flight.pilot() is None:
                    flight = self._next[key] = _Flight(slot)
                    before = self._started.get(key)
                    break
            self._await(flight)
            if not flight.failed:
                return flight.text
        try:
            if before is not None:
                self._await(before)
            return self.alone(lambda: self._fly(key, flight, load))
        finally:
            with self._lock:
                for flights in (self._next, self._started):
                    if flights.get(key) is flight:
                        del flights[key]
            flight.ended.set()
            del slot  # by hand: the traceback of an error would keep it alive

    def alone(self, load: Callable[[], T]) -> T:
        """`load`, as one of a bounded number. Raises as `run`."""
        if getattr(self._within, "depth", 0):
            return load()
        slot = self._slots.take(_PATIENCE)
        try:
            self._within.depth = 1
            return load()
        finally:
            self._within.depth = 0
            self._slots.give(slot)

    def _fly(self, key: str, flight: _Flight, load: Callable[[], str | None]) -> str | None:
        with self._lock:
            self._next.pop(key, None)
            self._started[key] = flight
        flight.text = load()
        flight.failed = False
        return flight.text

    @staticmethod
    def _await(flight: _Flight) -> None:
        while not flight.ended.wait(_SLICE) and flight.pilot() is not None:
            pass
