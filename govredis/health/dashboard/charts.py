"""Line charts: where their lines, bands and ticks are. The template draws them as SVG, and sets all text in HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from .texts import Unit

#: The size of a drawing, in its own units: it is stretched to the page, and lines keep their width.
WIDE, HIGH = 1000, 200
#: The least width of a band: of a short outage in a long chart.
_NARROWEST = 4.0


@dataclass(frozen=True, slots=True)
class Series:
    """A line: a value for each step of its chart, None where nothing is known."""

    label: str
    values: Sequence[float | None]

    @property
    def now(self) -> float | None:
        """The value of the last step or of the one before: the last has only begun."""
        return next((value for value in reversed(self.values[-2:]) if value is not None), None)


@dataclass(frozen=True, slots=True)
class Chart:
    """
    Attributes:
        name: of letters and dashes, for ids.
        unit: turns its values into texts.
        unknown: why there is nothing to show; "" where there is.
        most: the end of the axis; None: what the values need.
        log: the least value of a logarithmic axis, on which what is less stands too; None: the axis is even.
        binary: are round values powers of two?
        stepped: does a value hold for the whole of its step, so that no slope leads to the next?
    """

    name: str
    title: str
    unit: Unit
    series: tuple[Series, ...]
    unknown: str = ""
    most: float | None = None
    log: float | None = None
    binary: bool = False
    stepped: bool = False

    @property
    def is_empty(self) -> bool:
        return all(value is None for line in self.series for value in line.values)


@dataclass(frozen=True, slots=True)
class Band:
    """A time to mark in all charts. `ended`: None while it goes on."""

    label: str
    began: datetime
    ended: datetime | None


@dataclass(frozen=True, slots=True)
class Drawing:
    """
    Attributes:
        ticks: the texts of the axis at equal distances, the top first.
        paths: of each series, the data of an SVG path.
        dots: likewise, of the values that stand alone.
        bands: the label, the left side and the width of each.
    """

    ticks: tuple[str, ...]
    paths: tuple[str, ...]
    dots: tuple[str, ...]
    bands: tuple[tuple[str, float, float], ...]


def draw(chart: Chart, began: datetime, ended: datetime, bands: Iterable[Band] = ()) -> Drawing:
    """The drawing of a chart whose values divide the time from `began` to `ended` into equal steps."""
    known = [value for line in chart.series for value in line.values if value is not None]
    axis = (
        _Axis.decades(known, chart.log) if chart.log is not None else _Axis.even(known, chart.most, binary=chart.binary)
    )
    wide = (ended - began).total_seconds()
    drawn = []
    for band in bands:
        left = WIDE * max(0.0, (band.began - began).total_seconds()) / wide
        right = WIDE * min(wide, ((band.ended or ended) - began).total_seconds()) / wide
        if right > 0 and left < WIDE:
            width = max(_NARROWEST, right - left)
            drawn.append((band.label, round(min(left, WIDE - width), 1), round(width, 1)))
    ticks = tuple(chart.unit(tick) for tick in reversed(axis.ticks))
    path = _steps if chart.stepped else _path
    paths, dots = zip(*(path(line.values, axis) for line in chart.series), strict=True) if chart.series else ((), ())
    return Drawing(ticks, paths, dots, tuple(drawn))


@dataclass(frozen=True, slots=True)
class _Axis:
    """Ticks at equal distances, from the bottom to the top."""

    ticks: tuple[float, ...]
    log: bool

    @classmethod
    def even(cls, values: Sequence[float], most: float | None, *, binary: bool) -> _Axis:
        """From 0, in two steps that are round; or up to `most`."""
        top = max(values, default=0.0) if most is None else most
        half = top / 2 if top > 0 else 0.5
        if most is None and binary:
            half = 2.0 ** math.ceil(math.log2(half))
        elif most is None:
            ten: float = 10 ** math.floor(math.log10(half))
            half = next(ten * n for n in (1, 2, 2.5, 5, 10) if ten * n >= half * 0.999)
        return cls((0.0, half, 2 * half), False)

    @classmethod
    def decades(cls, values: Sequence[float], least: float) -> _Axis:
        some = [max(least, value) for value in values] or [least]
        lowest, highest = math.floor(math.log10(min(some))), math.ceil(math.log10(max(some)))
        return cls(tuple(10.0**n for n in range(lowest, max(highest, lowest + 1) + 1)), True)

    def height(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        bottom, top = self.ticks[0], self.ticks[-1]
        if self.log:
            return math.log10(max(bottom, value) / bottom) / math.log10(top / bottom)
        return (value - bottom) / (top - bottom)


def _path(values: Sequence[float | None], axis: _Axis) -> tuple[str, str]:
    """A line through the values, with a gap where nothing is known; and the values without a neighbour."""
    line, dots = [], []
    for n, value in enumerate(values):
        if value is None:
            continue
        x, y = WIDE * (n + 0.5) / len(values), HIGH * (1 - min(1.0, max(0.0, axis.height(value))))
        follows = n > 0 and values[n - 1] is not None
        if follows or (n + 1 < len(values) and values[n + 1] is not None):
            line.append(f"{'L' if follows else 'M'}{x:.1f} {y:.1f}")
        else:
            dots.append(f"M{x:.1f} {y:.1f}h.1")
    return "".join(line), "".join(dots)


def _steps(values: Sequence[float | None], axis: _Axis) -> tuple[str, str]:
    """A level line for each value, joined to that of the step before."""
    line = []
    for n, value in enumerate(values):
        if value is not None:
            y = HIGH * (1 - axis.height(value))
            begin = f"V{y:.1f}" if n > 0 and values[n - 1] is not None else f"M{WIDE * n / len(values):.1f} {y:.1f}"
            line.append(f"{begin}H{WIDE * (n + 1) / len(values):.1f}")
    return "".join(line), ""
