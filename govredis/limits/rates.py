"""Limit, and the rates a user may write: "20/hour;3/second", Limit(20, 3600), a list of Limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias

from ..errors import refuse

_UNITS = {
    "second": 1, "seconds": 1, "sec": 1, "s": 1,
    "minute": 60, "minutes": 60, "min": 60, "m": 60,
    "hour": 3600, "hours": 3600, "h": 3600,
    "day": 86400, "days": 86400, "d": 86400,
    "week": 604800, "weeks": 604800, "w": 604800,
}  # fmt: skip
_RATE = re.compile(r"\s*(\d{1,9})\s*(?:/|per)\s*(\d{1,9}(?:\.\d{1,9})?)?\s*([a-z]+)\s*", re.IGNORECASE)
_WANTED = '"N/unit" or "N/K units", several joined by ";", N >= 1, units second, minute, hour, day, week'

Algorithm: TypeAlias = Literal["sliding_window_log", "sliding_window_counter"]

#: The largest count of a limit, by its algorithm.
MAX_COUNT: dict[str, int] = {"sliding_window_log": 1_000_000, "sliding_window_counter": 10**12}
MAX_WINDOW = 366 * 86400.0
#: Each unit is an entry of its own in a log. Redis, which does one thing at a time, writes this many in 20 to 50 ms.
#: Ten times as many would take longer than the 0.2 s after which a process takes Redis for away. Counters take any.
MAX_COST = 10_000

#: How many buckets a counter cuts its window into; as in counter.lua and schema/0007_limit_counters.sql.
BUCKETS = 60


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `count` within any `window` seconds.

    "sliding_window_log" keeps every entry: exact, about 130 bytes an entry. "sliding_window_counter" is for limits too
    large for that: it keeps 60 numbers, whatever the count. Each number is the count of a sixtieth of the window, and
    counts as a whole while any moment of that sixtieth lies within the window.

    So a counter is never looser than the log: every admission within the last `window` seconds counts. And it is at
    most a sixtieth stricter: no admission counts for longer than 61/60 of `window`. A call is refused only where a log
    of that longer window would refuse it too. (Commonly two fixed windows are kept and the older one is weighted, as
    Cloudflare described in "How we built rate limiting capable of scaling to millions of domains", 2017. There a burst
    at the end of a window lets through up to twice the limit.)

    With `lease`, a process takes a batch of admissions in one round trip, and spends it from memory for that many
    seconds: a busy identity costs hardly any round trips. There are never more than `count` within any window, whatever
    happens to the process. There may be fewer: leases.Leases says how many.

    Args:
        count: 1 to 1,000,000; for a sliding_window_counter to 10^12.
        window: seconds, 0.001 to 366 days.
        algorithm: the same for all limits of a rate. An identity's log and its counters do not count each other.
        lease: seconds, 0.001 to a tenth of the shortest window of the rate. None: each admission is a round trip. Where
            several limits of a rate have one, the shortest holds for all.

    Raises ValueError for anything else.
    """

    count: int
    window: float
    algorithm: Algorithm = "sliding_window_log"
    lease: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, str) or self.algorithm not in MAX_COUNT:
            raise refuse("algorithm", self.algorithm, " or ".join(f'"{name}"' for name in MAX_COUNT))
        most = MAX_COUNT[self.algorithm]
        if not isinstance(self.count, int) or isinstance(self.count, bool) or not 1 <= self.count <= most:
            raise refuse("limit", self.count, f"a whole number from 1 to {most} for a {self.algorithm}")
        if (
            not isinstance(self.window, int | float)
            or isinstance(self.window, bool)
            or not 0.001 <= self.window <= MAX_WINDOW
        ):
            raise refuse("window", self.window, "seconds, from 0.001 to 366 days")
        if self.lease is not None:
            _check_lease(self.lease, self.window)

    @property
    def window_us(self) -> int:
        return round(self.window * 1_000_000)

    @property
    def counted(self) -> bool:
        """Is it a sliding_window_counter?"""
        return self.algorithm == "sliding_window_counter"

    def __str__(self) -> str:
        return f"{self.count} per {self.window:g} s"


def _set_state(limit: Limit, state: Sequence[Any]) -> None:
    """Versions before 0.4 pickle no lease."""
    for name, value in zip(Limit.__slots__, (*state, None), strict=False):
        object.__setattr__(limit, name, value)


# Python 3.10 makes one of its own, whatever the class has.
Limit.__setstate__ = _set_state  # type: ignore[attr-defined]


def _check_lease(lease: Any, window: float) -> None:
    # A tenth in floats: 60 * 0.1 is no more than 6.
    if not isinstance(lease, int | float) or isinstance(lease, bool) or not 0.001 <= lease <= window / 10 + 1e-9:
        raise refuse("lease", lease, f"seconds, from 0.001 to a tenth of the shortest window, here {window / 10:g}")


class RateLimits(tuple[Limit, ...]):
    """The limits of a rate, which are decided together."""

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """Each limit's count, and its window in microseconds, as texts: what scripts are given."""
        return tuple(text for limit in self for text in (str(limit.count), str(limit.window_us)))

    @cached_property
    def lease_us(self) -> int:
        """How long the process may spend a batch, in microseconds; 0: it takes none."""
        return round(min((limit.lease for limit in self if limit.lease is not None), default=0) * 1_000_000)


def pairs_of(limits: Sequence[Limit]) -> tuple[str, ...]:
    """`RateLimits.pairs` of any limits."""
    return (limits if isinstance(limits, RateLimits) else RateLimits(limits)).pairs


Rate: TypeAlias = str | Limit | Sequence[Limit]


@lru_cache(maxsize=1024)
def _parse_text(text: str) -> RateLimits:
    limits = []
    for part in text.split(";"):
        match = _RATE.fullmatch(part)
        unit = _UNITS.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise refuse("rate", text, _WANTED)
        limits.append(Limit(int(match[1]), float(match[2] or 1) * unit))
    return RateLimits(limits)


def parse_rate(rate: Rate) -> RateLimits:
    """The limits of a rate. Raises ValueError, saying what a rate may be."""
    if isinstance(rate, str):
        return _parse_text(rate)
    if isinstance(rate, Limit):
        return RateLimits((rate,))
    if isinstance(rate, list | tuple) and rate and all(isinstance(limit, Limit) for limit in rate):
        if len({limit.algorithm for limit in rate}) > 1:
            raise refuse("rate", rate, "limits of one algorithm: a counter may be small too")
        limits = RateLimits(rate)
        if limits.lease_us:
            _check_lease(limits.lease_us / 1_000_000, min(limit.window for limit in limits))
        return limits
    raise refuse("rate", rate, f"{_WANTED}, a Limit, or a non-empty list of Limit")


def check_cost(cost: Any, limits: Sequence[Limit]) -> None:
    """Raises ValueError for a bad cost, or one that a limit never admits. `limits`: () where they are unknown."""
    if type(cost) is not int or not 1 <= cost <= MAX_COST:
        logged, most = bool(limits) and not limits[0].counted, MAX_COUNT["sliding_window_counter"]
        if type(cost) is not int or not 1 <= cost <= most:
            raise refuse("cost", cost, f"a whole number from 1 to {MAX_COST if logged else most}")
        if logged:
            wanted = f"at most {MAX_COST} for a log, which keeps an entry for each"
            raise refuse("cost", cost, f'{wanted}; algorithm="sliding_window_counter" takes more')
    for limit in limits:
        if cost > limit.count:
            raise refuse("cost", cost, f"at most {limit.count}: more could never be admitted under {limit}")
