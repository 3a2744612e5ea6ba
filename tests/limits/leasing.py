"""Limiters with leases of their own, as several processes have."""

from __future__ import annotations

from typing import Any

from govredis import GovRedis, Limit
from govredis.limits import RateLimiter
from govredis.limits.leases import Leases

#: A lease that only the test's clock ends; its window is an hour, so that nothing ages out.
LEASE = 100.0


def limit(count: int, algorithm: Any = "sliding_window_log", window: float = 3600) -> Limit:
    return Limit(count, window, algorithm, lease=LEASE)


def count(gov: GovRedis, rate: Limit) -> int:
    return gov.limits.get_count("k", rate.window)


class Process:
    """A limiter with leases of its own, as another process has, by a clock that stands still until it is moved."""

    def __init__(self, gov: GovRedis) -> None:
        self.now = 1000.0
        self.limiter = RateLimiter(gov.internal.context, clock=lambda: self.now)

    @property
    def leases(self) -> Leases:
        return self.limiter._decider._leases

    def hits(self, n: int, rate: Any, **options: Any) -> int:
        return sum(self.limiter.hit("k", rate, **options).allowed for _ in range(n))

    def warm(self, rate: Any) -> None:
        """Three calls: each of the first two takes what it needs, and the third a batch with five units more."""
        while not self.leases.has_pending():
            assert self.limiter.hit("k", rate)
