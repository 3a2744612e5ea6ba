"""A sliding window log as plainly as it can be written: every entry, counted one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from govredis import Limit
from govredis.limits.backends.backend import Mode, Outcome


class Oracle:
    """The contents of a key, and the answers that a backend must give. Times are microseconds.

    Args:
        in_order: its entries stand at the newest time known where its clock was set back.
        by_time: it knows entries by their time alone, and so cannot tell those of one microsecond apart.
    """

    def __init__(self, *, in_order: bool, by_time: bool) -> None:
        self.in_order, self.by_time = in_order, by_time
        self.reset()

    def reset(self) -> None:
        #: When each entry was taken, and its owner.
        self.log: deque[tuple[int, object]] = deque()
        self.longest = 0
        #: Another client has begun it, and set no TTL: nothing of it is pruned.
        self.endless = False

    def used(self, window_us: int, at: int) -> int:
        return sum(entry > at - window_us for entry, _ in self.log)

    def decide(self, now: int, limits: Sequence[Limit], cost: int, mode: Mode, owner: object) -> Outcome:
        waits, left = [], []
        for limit in limits:
            ages_out = [entry + limit.window_us - now for entry, _ in self.log]
            moments = [0, *sorted(wait for wait in ages_out if wait > 0)]
            waits.append(next(w for w in moments if self.used(limit.window_us, now + w) + cost <= limit.count))
            left.append(limit.count - self.used(limit.window_us, now))
        admitted = mode == "record" or max(waits) == 0
        # An admission's limit is the one with the least left, a denial's the one that lasts longest; the first of them.
        deciding = left.index(min(left)) if admitted else waits.index(max(waits))
        if admitted and mode != "peek":
            self.take(now, max(limit.window_us for limit in limits), cost, owner)
        remaining = max(0, left[deciding] - cost if admitted else left[deciding])
        full = max([0, *(entry + limits[deciding].window_us - now for entry, _ in self.log)])
        return Outcome(admitted, deciding, remaining, 0 if admitted else max(waits), full)

    def take(self, now: int, window_us: int, cost: int, owner: object) -> None:
        self.longest = max(self.longest, window_us)
        self.endless = self.endless and bool(self.log)
        if not self.endless:
            self.prune(now - self.longest)
        at = max([now, *(entry for entry, _ in self.log)]) if self.in_order else now
        self.log.extend([(at, owner)] * cost)

    def take_from(self, stranger: str, at: int) -> None:
        self.endless = self.endless or not self.log
        self.log.append((at, stranger))

    def prune(self, until: int) -> None:
        self.log = deque(item for item in self.log if item[0] > until)

    def refund(self, at: int, cost: int, owner: object) -> bool:
        given = [(entry, who) for entry, who in self.log if (entry == at if self.by_time else who is owner)][:cost]
        for item in given:
            self.log.remove(item)
        return bool(given)
