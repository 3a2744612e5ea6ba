"""The renewal thread: one per process, for all locks held in it."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from .._fork import renew_in_child
from .guard import clock

log = logging.getLogger("govredis")

#: Seconds after which a lease is first due, or earlier. The thread sleeps no longer after it was woken: locks that come
#: and go in rapid succession would else wake it each time.
FIRST_TICK = 0.1

#: The thread outlives the last lock by this many seconds, so that short locks do not start one each.
_IDLE = 5.0


class Renewable(Protocol):
    #: When to tick next, on guard.clock.
    due: float

    def tick(self) -> None: ...


class Renewer:
    """Calls each lease's `tick` when it is due. The thread starts with the first lease and ends when idle."""

    def __init__(self) -> None:
        self._leases: set[Renewable] = set()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Reentrant: a destructor or a signal handler, which run within any call, may release a lock. Taken as itself,
        # not through the Condition, whose __enter__ is Python: an exception in there would leave it taken for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._leases = set()  # the parent's: they renew themselves
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def add(self, lease: Renewable) -> None:
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = thread = threading.Thread(target=self._run, name="govredis-renewal", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    if error.__context__ is not None:
                        raise error.__context__ from None  # a signal handler's exception, struck in there
                    log.warning("locks are not renewed: %s", error)
            elif lease.due < self._wakes_at:
                self._wakes_at = lease.due  # once is enough, however long the thread takes to wake up
                self._changed.notify()

    def leases(self) -> list[Renewable]:
        with self._lock:
            return list(self._leases)

    def discard(self, lease: Renewable) -> None:
        with self._lock:
            self._leases.discard(lease)

    def _run(self) -> None:
        # Between two rounds no frame here refers to a lease: one that was lost and forgotten goes, and closes its file.
        while (due := self._wait()) is not None:
            while due:
                self._tick(due.pop())

    def _wait(self) -> list[Renewable] | None:
        """Those that are due, once some are; None when this thread is to end."""
        with self._lock:
            longest = FIRST_TICK
            while True:
                if self._thread is not threading.current_thread():
                    return None  # an exception struck `add` just when it had started this one: there is another
                now = clock()
                first = min([lease.due for lease in list(self._leases)], default=now + longest)
                if first <= now:
                    return [lease for lease in list(self._leases) if lease.due <= now]
                # It may be released before, which wakes nobody.
                self._wakes_at = min(first, now + longest)
                if self._changed.wait(self._wakes_at - now):
                    longest = FIRST_TICK
                elif self._leases or longest < _IDLE:
                    longest = _IDLE
                else:
                    self._thread = None
                    return None

    def _tick(self, lease: Renewable) -> None:
        try:
            lease.tick()
        except Exception:
            log.exception("a lock could not be renewed")
            self.discard(lease)


renewer = Renewer()
