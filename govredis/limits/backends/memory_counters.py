"""MemoryCounters: the sliding window counters of MemoryLimitBackend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ..rates import BUCKETS, Limit
from .backend import CounterEntries, Mode, Outcome


class Counter:
    """The counts of one window's buckets. Times are microseconds.

    Args:
        window_us: the window.
    """

    __slots__ = ("_counts", "_width", "_window")

    def __init__(self, window_us: int) -> None:
        self._window = window_us
        self._width = -(-window_us // BUCKETS)
        #: bucket, by its number on the clock -> its count. Ascending.
        self._counts: dict[int, int] = {}

    def used(self, now: int) -> int:
        first = self._first(now)
        return sum(count for bucket, count in self._counts.items() if bucket >= first)

    def until_free(self, excess: int, now: int) -> int:
        """How long until `excess` of the present count has left the window."""
        first, wait = self._first(now), 0
        for bucket, count in self._counts.items():
            if excess <= 0:
                break
            if bucket >= first:
                excess -= count
                wait = self._end(bucket) - now
        return wait

    def until_empty(self, now: int) -> int:
        return self.until_free(self.used(now), now)

    def add(self, cost: int, now: int) -> None:
        """Count `cost` more; after a clock was set back, in the newest bucket, which is stricter."""
        first = self._first(now)
        self._counts = {bucket: count for bucket, count in self._counts.items() if bucket >= first}
        bucket = max(now // self._width, *self._counts, 0)
        self._counts[bucket] = self._counts.get(bucket, 0) + cost

    def take(self, cost: int, at: int) -> bool:
        """Take `cost` from the bucket of that time, if it is still there and holds as much."""
        bucket = at // self._width
        held = self._counts.get(bucket, 0)
        if held >= cost:
            self._counts[bucket] = held - cost
        return held >= cost

    def _first(self, now: int) -> int:
        """The oldest bucket that counts."""
        return (now - self._window + 1) // self._width

    def _end(self, bucket: int) -> int:
        """From when on it does not count."""
        return (bucket + 1) * self._width - 1 + self._window


class MemoryCounters:
    """Counters by key. Only for calls that hold the lock of MemoryLimitBackend.

    Args:
        entries: keys kept; beyond, the key used longest ago is forgotten.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._counters: OrderedDict[str, dict[int, Counter]] = OrderedDict()

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode, now: int) -> Outcome:
        held = self._counters.get(key, {})
        named = {limit.window_us: held.get(limit.window_us) or Counter(limit.window_us) for limit in limits}
        admitted, deciding, retry_after = True, 0, 0
        least: int | None = None
        entries: CounterEntries | None = None
        for i, limit in enumerate(limits):
            counter = named[limit.window_us]
            used = counter.used(now)
            remaining = limit.count - used - cost
            if remaining < 0 and mode != "record":
                wait = counter.until_free(-remaining, now)
                if admitted or wait > retry_after:
                    admitted, deciding, least, retry_after = False, i, limit.count - used, wait
            elif admitted and (least is None or remaining < least):
                deciding, least = i, remaining
        if held and mode != "peek":
            self._counters.move_to_end(key)
        if admitted and mode != "peek":
            for counter in named.values():
                counter.add(cost, now)
            kept = {window: counter for window, counter in held.items() if counter.used(now)} | named
            self._counters[key] = kept
            entries = CounterEntries.of(limits, now)
            if len(self._counters) > self._entries:
                self._counters.popitem(last=False)
        reset_after = named[limits[deciding].window_us].until_empty(now)
        return Outcome(admitted, deciding, max(0, least or 0), retry_after, reset_after, entries)

    def refund(self, key: str, entries: CounterEntries, cost: int) -> bool:
        held = self._counters.get(key, {})
        return sum(held[window].take(cost, entries.at) for window in entries.windows_us if window in held) > 0

    def count(self, key: str, window_us: int, now: int) -> int:
        counter = self._counters.get(key, {}).get(window_us)
        return counter.used(now) if counter is not None else 0

    def stats(self, key: str, now: int) -> dict[float, int]:
        held = self._counters.get(key, {}).items()
        return {window / 1_000_000: used for window, counter in held if (used := counter.used(now))}

    def reset(self, key: str) -> None:
        self._counters.pop(key, None)
