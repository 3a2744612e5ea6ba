"""Figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta

#: Turns a figure into a text.
Unit = Callable[[float], str]

_SIZES = "B", "KiB", "MiB", "GiB", "TiB"


def seconds(value: float) -> str:
    """A short time: "0.34 ms", "12 ms", "1.5 s"."""
    if value == 0:
        return "0 s"
    if value < 1:
        return f"{_digits(value * 1000)} ms" if value >= 0.0001 else f"{_digits(value * 1_000_000)} µs"
    return f"{_digits(value)} s"


def number(value: float) -> str:
    return _digits(value)


def percent(value: float) -> str:
    """A ratio. Only a whole is 100 %."""
    shown = value * 100
    return f"{math.floor(shown * 10) / 10:g} %" if 99 < shown < 100 else f"{_digits(shown)} %"


def per_minute(value: float) -> str:
    return f"{_digits(value)} /min"


def size(value: float) -> str:
    step = 0
    while abs(value) >= 1024 and step < len(_SIZES) - 1:
        value, step = value / 1024, step + 1
    return f"{_digits(value)} {_SIZES[step]}"


def duration(value: timedelta | float) -> str:
    """A long time, by its two largest units: "3 d 4 h", "12 min 5 s", "20 s"."""
    left = value.total_seconds() if isinstance(value, timedelta) else value
    if left < 9.95:
        return f"{left:.1f} s" if left >= 1 else seconds(max(0.0, left))
    whole = round(left)
    parts: list[str] = []
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, length)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part)


def utc(at: datetime) -> str:
    """The text of a <time> without its date, for readers without a script."""
    return f"{at:%H:%M:%S}"


def fact(name: str, value: object) -> str:
    """A figure of a health report, by the unit that its name says."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(fact("", each) for each in value) or "none"
    if not isinstance(value, int | float):
        return str(value)
    last = name.rpartition(".")[2]
    if last.endswith("memory") and isinstance(value, int):
        return size(value)
    if "seconds" in last or last in {"away_for", "every", "oldest", "overdue"}:
        return duration(value)
    return number(value)


def _digits(value: float) -> str:
    """Three significant digits, or all before the point; thousands are set apart."""
    if not math.isfinite(value):
        return "unknown"
    if value == 0 or abs(value) >= 100 or not value % 1:
        return f"{value:,.0f}"
    after = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{after}f}".rstrip("0").rstrip(".") if after else f"{value:.0f}"
