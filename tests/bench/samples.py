"""Figures of several rounds as one: the median, and the quartiles around it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Figure = dict[str, float]


def figure(samples: Sequence[float]) -> Figure:
    """The median, the quartiles, and how many samples they are of."""
    ordered = sorted(samples)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return {"median": _short(statistics.median(ordered)), "low": _short(low), "high": _short(high), "of": len(ordered)}


def ratio(samples: Sequence[float], base: Sequence[float]) -> Figure:
    """That of two contestants who took turns: of each round's two samples, so that a slow round is slow for both."""
    return figure([mine / theirs for mine, theirs in zip(samples, base, strict=True) if theirs > 0])


def _short(value: float) -> float:
    return float(f"{value:.4g}")
