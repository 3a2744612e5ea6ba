"""HandClock: a clock that a test sets by hand, and that stands still in between."""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from types import ModuleType
from typing import Any

from .. import _boottime
from ..locks.renewal import RenewedLease, Renewer, renewer
from ..metadata import loading

#: Whole microseconds, as Redis has them.
_US = 1_000_000
#: Seconds, more than a float of monotonic time may be off.
_MOMENT = 1e-8


class HandClock:
    """Time passes by `tick`, and by each wait of govredis, which returns at once.

    While it is installed (`with`), the locks and cached values of this process go by it. A GovRedis that is made with
    `GovRedis.in_memory(clock=)` goes by it with all else: limits, sessions, health, the TTLs in its Redis. The rest of
    the process keeps real time: `time.time()` and `datetime.now()` do not move with it.

    It begins at the real time, in whole seconds. Locks that are held are renewed when they are due on it, in the call
    of `tick`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # Whole seconds: sums with them are exact.
        self._began_us = int(time.time()) * _US
        self._offset = int(_boottime.clock())
        self._passed_us = 0
        #: Seconds more: a lease that ends in 60 s has ended after `tick(60)`, however floats are rounded.
        self._ahead = 0.0
        self._renewer = _HandRenewer()
        self._replaced: list[tuple[ModuleType, str, Any]] = []

    # -- what a test calls -----------------------------------------------------------------------------------------

    def tick(self, seconds: float) -> None:
        """Move on by this much. Raises ValueError for less than nothing."""
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds is {seconds!r}; it must be a number from 0 on")
        with self._lock:
            self._ahead += _MOMENT
            until = self._passed_us + round(seconds * _US)
            while (due := self._renewer.first_due()) is not None and due <= self._monotonic_at(until):
                due_us = math.ceil((due - self._offset - self._ahead) * _US)
                self._passed_us = min(until, max(self._passed_us, due_us))
                if self.monotonic() < due:
                    self._passed_us += 1  # a rounded float
                self._renewer.renew_due(self.monotonic())
            self._passed_us = max(self._passed_us, until)

    def time(self) -> float:
        """Seconds since 1970, as `time.time()`."""
        return (self._began_us + self._passed_us) / _US

    # -- what govredis calls ---------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self._monotonic_at(self._passed_us)

    def sleep(self, seconds: float, /) -> None:
        self.tick(max(0.0, seconds))

    def time_ns(self) -> int:
        return (self._began_us + self._passed_us) * 1000

    def _monotonic_at(self, passed_us: int) -> float:
        return self._offset + self._ahead + passed_us / _US

    # -- while it is installed -------------------------------------------------------------------------------------

    def __enter__(self) -> HandClock:
        waits, tells = _ModuleTime(time=self.time, time_ns=self.time_ns, sleep=self.sleep), _ModuleTime(time=self.time)
        for name, module in list(sys.modules.items()):
            if name.startswith("govredis.locks."):
                self._replace(module, "clock", _boottime.clock, self.monotonic)
                self._replace(module, "renewer", renewer, self._renewer)
            if name == "govredis.locks.acquisition":
                self._replace(module, "time", time, waits)
            if name.startswith("govredis.metadata."):
                self._replace(module, "time", time, tells)
            if name == "govredis.metadata.loading":
                self._replace(module, "_random", loading._random, _NoChance())
        return self

    def __exit__(self, *exc: object) -> None:
        while self._replaced:
            module, name, before = self._replaced.pop()
            setattr(module, name, before)

    def _replace(self, module: ModuleType, name: str, before: Any, after: Any) -> None:
        if getattr(module, name, None) is before:
            self._replaced.append((module, name, before))
            setattr(module, name, after)


class _ModuleTime:
    """Stands for the module `time` in modules of govredis: some of its functions are others."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _NoChance(random.Random):
    """A value is kept for its whole TTL, and loaded anew at its end, not by chance a little before."""

    def random(self) -> float:
        return 0.0


class _HandRenewer(Renewer):
    """Renews in the thread that moves the clock."""

    def add(self, lease: RenewedLease) -> None:
        with self._lock:
            self._leases.add(lease)

    def first_due(self) -> float | None:
        return min((lease.due for lease in self.leases()), default=None)

    def renew_due(self, now: float) -> None:
        due = [lease for lease in self.leases() if lease.due <= now]
        self._renew(due)
        for lease in self.leases():
            if lease in due and lease.due <= now:
                self.discard(lease)  # it would be due for ever
