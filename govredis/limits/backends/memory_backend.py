"""MemoryLimitBackend: windows in this process, for the time when no server is in reach."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ..._fork import renew_in_child
from ..rates import Limit
from .backend import CounterEntries, LimitBackend, Mode, Outcome, WindowStats
from .memory_counters import MemoryCounters


class MemoryLimitBackend(LimitBackend):
    """Counts this process only: N processes admit up to N times as much.

    Bounded: beyond `entries` identities with a log, or with counters, the identity used longest ago is forgotten.

    Args:
        entries: identities kept.
        clock: seconds, monotonic.
    """

    name = "local"

    def __init__(self, entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries = entries
        self._clock = clock
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        #: key -> its entries' times in ascending order, and the longest window used; both in microseconds.
        self._logs: OrderedDict[str, tuple[list[int], int]] = OrderedDict()
        self._counters = MemoryCounters(self._entries)

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        with self._lock:
            now = int(self._clock() * 1_000_000)
            if limits[0].counted:
                return self._counters.decide(key, limits, cost, mode, now)
            log, longest = self._logs.get(key, ([], 0))
            outcome = decide(log, now, limits, cost, mode)
            if log and mode != "peek":
                self._logs.move_to_end(key)  # a refused identity is in use too
            if mode != "peek" and outcome.admitted:
                longest = max(longest, *(limit.window_us for limit in limits))
                log = log[bisect_right(log, now - longest) :] + [now] * cost
                self._logs[key] = (log, longest)
                if len(self._logs) > self._entries:
                    self._logs.popitem(last=False)
                outcome.reset_after_us = limits[outcome.deciding].window_us
                outcome.entries = now
            return outcome

    def refund(self, key: str, entries: int | CounterEntries, cost: int) -> bool:
        with self._lock:
            if isinstance(entries, CounterEntries):
                return self._counters.refund(key, entries, cost)
            log, longest = self._logs.get(key, ([], 0))
            first = bisect_left(log, entries)
            given = min(cost, bisect_right(log, entries) - first)
            if given:
                self._logs[key] = (log[:first] + log[first + given :], longest)
            return given > 0

    def count(self, key: str, window_us: int) -> int:
        with self._lock:
            now = int(self._clock() * 1_000_000)
            log, _ = self._logs.get(key, ([], 0))
            logged = len(log) - bisect_right(log, now - window_us)
            return max(logged, self._counters.count(key, window_us, now))

    def stats(self, key: str) -> WindowStats:
        with self._lock:
            now = int(self._clock() * 1_000_000)
            log, longest = self._logs.get(key, ([], 0))
            log = log[bisect_right(log, now - longest) :]
            return WindowStats(
                self.name,
                len(log),
                longest / 1_000_000 or None,
                (now - log[0]) / 1_000_000 if log else None,
                (now - log[-1]) / 1_000_000 if log else None,
                self._counters.stats(key, now),
            )

    def reset(self, key: str) -> None:
        with self._lock:
            self._logs.pop(key, None)
            self._counters.reset(key)


def decide(log: list[int], now: int, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
    """The decision of window.lua over a sorted list of entries, before anything is recorded."""
    admitted, deciding, least, retry_after = True, 0, -1, 0
    for i, limit in enumerate(limits):
        first = bisect_right(log, now - limit.window_us)
        used = len(log) - first
        remaining = limit.count - used - cost
        if remaining < 0 and mode != "record":
            wait = log[first - remaining - 1] + limit.window_us - now
            if admitted or wait > retry_after:
                admitted, deciding, least, retry_after = False, i, limit.count - used, wait
        elif admitted and (least < 0 or remaining < least):
            deciding, least = i, max(0, remaining)
    window = limits[deciding].window_us
    reset_after = log[-1] + window - now if log and log[-1] > now - window else 0
    return Outcome(admitted, deciding, max(0, least), retry_after, reset_after)
