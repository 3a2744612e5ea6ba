"""The account's figures: counts and latencies of all processes, and outages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Literal

from .._histogram import BOUNDS as BOUNDS

__all__ = ["Latency", "Minute", "Outage", "Totals"]

_NONE = (0,) * (len(BOUNDS) + 1)


@dataclass(frozen=True, slots=True)
class Latency:
    """How long calls to a server took.

    Attributes:
        count: of calls.
        seconds: all of them together.
        buckets: how many took no longer than each of BOUNDS, and longer than the bound before; the last has the rest.
    """

    count: int = 0
    seconds: float = 0.0
    buckets: tuple[int, ...] = _NONE

    def __add__(self, other: Latency) -> Latency:
        buckets = tuple(mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True))
        return Latency(self.count + other.count, self.seconds + other.seconds, buckets)

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of the calls took at most, within a bucket's width; None without calls.

        A quantile beyond the largest bound is that bound.
        """
        if not self.count:
            return None
        upto = list(accumulate(self.buckets))
        wanted = share * upto[-1]
        at = bisect_left(upto, wanted)
        while at < len(self.buckets) and not self.buckets[at]:
            at += 1
        if at >= len(BOUNDS):
            return BOUNDS[-1]
        low = BOUNDS[at - 1] if at else 0.0
        before = upto[at] - self.buckets[at]
        return low + (BOUNDS[at] - low) * max(0.0, wanted - before) / self.buckets[at]


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums over all processes.

    Attributes:
        counts: by the names of `gov.counters`.
        latencies: of "redis" and "postgres".
        backend: where they come from: "redis"; "postgres", while Redis is away; "memory": no more than this process
            knows.
        since: when they began (aware UTC): when the account did, or Redis had lost its data.
    """

    counts: dict[str, int] = field(default_factory=dict)
    latencies: dict[str, Latency] = field(default_factory=dict)
    backend: Literal["redis", "postgres", "memory"] = "redis"
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Minute:
    """The counts and latencies of all processes in the minute that begins at `at` (aware UTC)."""

    at: datetime
    counts: dict[str, int]
    latencies: dict[str, Latency]


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which a server, or a node of a Cluster, could not be used. Several processes that noticed it give one.

    Attributes:
        server: "redis" or "postgres".
        began, ended: aware UTC; None while it goes on.
        kind: "refused"; "hung": no answer within the timeout; "cannot write", "cannot serve": in the server's words.
        noticed_by: who noticed it first: host, process id and program.
        served: the calls that fallbacks served; for all nodes together, where several were away.
        slowest: seconds of the slowest call that got no answer.
        node: the address of a Cluster's primary; "" for a server that is alone.
    """

    server: Literal["redis", "postgres"]
    began: datetime
    ended: datetime | None
    kind: str
    noticed_by: str
    served: int
    slowest: float
    node: str = ""


#: Behind a server's name, in the account's names: the sum of its latencies, in microseconds. A bucket has its number.
SUM = "us"
#: No name of a counter has it.
COLON = ":"


def split(values: Mapping[str, int]) -> tuple[dict[str, int], dict[str, Latency]]:
    """The counts and the latencies among the account's values."""
    counts = {name: n for name, n in values.items() if COLON not in name and "." in name}
    latencies = {}
    for server in sorted({name.partition(COLON)[0] for name in values if COLON in name}):
        buckets = tuple(values.get(f"{server}{COLON}{n}", 0) for n in range(len(BOUNDS) + 1))
        latencies[server] = Latency(sum(buckets), values.get(f"{server}{COLON}{SUM}", 0) / 1e6, buckets)
    return counts, latencies
