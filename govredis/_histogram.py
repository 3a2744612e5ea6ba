"""Histogram: how long the calls of this process to a server took."""

from __future__ import annotations

from bisect import bisect_left

#: Seconds: the upper bounds of the buckets, each included. One more bucket has what took longer.
BOUNDS: tuple[float, ...] = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Histogram:
    """Counts and a sum, since this process began or was forked.

    There is no lock, which would cost more than all the rest. Where threads meet between two bytecodes, a call may be
    missing; CPython switches threads at other places.
    """

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets: list[int] = [0] * (len(BOUNDS) + 1)
        self.seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds
