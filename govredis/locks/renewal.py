"""The renewal thread: one per process, for all locks held in it."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from .._fork import renew_in_child
from .guard import clock

log = logging.getLogger("govredis")

#: The thread outlives the last lock by this many seconds, so that short locks do not start one each.
_IDLE = 5.0


class Renewable(Protocol):
    #: When to tick next, on guard.clock.
    due: float

    def tick(self) -> None: ...

    def belongs_to_parent(self) -> None: ...


class Renewer:
    """Calls each lease's `tick` when it is due. The thread starts with the first lease and ends when idle."""

    def __init__(self) -> None:
        self._leases: set[Renewable] = set()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        inherited, self._leases = self._leases, set()
        for lease in inherited:
            lease.belongs_to_parent()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def add(self, lease: Renewable) -> None:
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="govredis-renewal", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    log.warning("locks are not renewed: %s", error)
                    return
                self._thread = thread
            elif lease.due < self._wakes_at:
                self._changed.notify()

    def discard(self, lease: Renewable) -> None:
        with self._changed:
            self._leases.discard(lease)

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                if not self._leases:
                    self._wakes_at = clock() + _IDLE
                    changed.wait(_IDLE)
                    if not self._leases:
                        self._thread = None
                        return
                now = clock()
                first = min(lease.due for lease in self._leases)
                if first > now:
                    self._wakes_at = first
                    changed.wait(first - now)
                    continue
                due = [lease for lease in self._leases if lease.due <= now]
            for lease in due:
                try:
                    lease.tick()
                except Exception:
                    log.exception("a lock could not be renewed")
                    self.discard(lease)


renewer = Renewer()
