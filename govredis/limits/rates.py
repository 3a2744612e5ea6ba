"""Limit, and the rates a user may write: "20/hour;3/second", Limit(20, 3600), a list of Limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

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

MAX_COUNT = 1_000_000
MAX_WINDOW = 366 * 86400.0
MAX_COST = 10_000


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `count` within any `window` seconds.

    Args:
        count: 1 to 1,000,000.
        window: seconds, 0.001 to 366 days.

    Raises ValueError for anything else.
    """

    count: int
    window: float

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or not 1 <= self.count <= MAX_COUNT:
            raise refuse("limit", self.count, f"a whole number from 1 to {MAX_COUNT}")
        if (
            not isinstance(self.window, int | float)
            or isinstance(self.window, bool)
            or not 0.001 <= self.window <= MAX_WINDOW
        ):
            raise refuse("window", self.window, "seconds, from 0.001 to 366 days")

    @property
    def window_us(self) -> int:
        return round(self.window * 1_000_000)

    def __str__(self) -> str:
        return f"{self.count} per {self.window:g} s"


Rate: TypeAlias = str | Limit | Sequence[Limit]


@lru_cache(maxsize=1024)
def _parse_text(text: str) -> tuple[Limit, ...]:
    limits = []
    for part in text.split(";"):
        match = _RATE.fullmatch(part)
        unit = _UNITS.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise refuse("rate", text, _WANTED)
        limits.append(Limit(int(match[1]), float(match[2] or 1) * unit))
    return tuple(limits)


def parse_rate(rate: Rate) -> tuple[Limit, ...]:
    """The limits of a rate. Raises ValueError, saying what a rate may be."""
    if isinstance(rate, str):
        return _parse_text(rate)
    if isinstance(rate, Limit):
        return (rate,)
    if isinstance(rate, list | tuple) and rate and all(isinstance(limit, Limit) for limit in rate):
        return tuple(rate)
    raise refuse("rate", rate, f"{_WANTED}, a Limit, or a non-empty list of Limit")


def check_cost(cost: Any, limits: Sequence[Limit]) -> None:
    """Raises ValueError for what is no cost, and for one that a limit could never admit."""
    if type(cost) is not int or not 1 <= cost <= MAX_COST:
        raise refuse("cost", cost, f"a whole number from 1 to {MAX_COST}")
    for limit in limits:
        if cost > limit.count:
            raise refuse("cost", cost, f"at most {limit.count}: more could never be admitted under {limit}")
