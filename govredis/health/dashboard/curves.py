"""The charts: their lines, of what all processes have counted, and of what snapshots have found.

The account has 26 hours. Before them a chart of the week shows what the snapshots say of the same: the account's sums
for the hour before each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from .. import verdict
from ..account_redis import KEPT
from ..history import HistoryPoint
from ..outage_log import fallback_of
from . import texts
from .charts import Chart, Series
from .told import Told
from .view import Span

if TYPE_CHECKING:
    from ..figures import Latency, Minute

SERVERS = {"redis": "Redis", "postgres": "PostgreSQL"}
#: Lines in a chart, at most: more cannot be told apart.
_LINES = 6
#: Seconds of the step that goes on, from which a rate can be told.
_SHORTEST = 10.0
_QUICKEST, _FEWEST = 1e-6, 1.0

_Counts = Sequence[dict[str, int] | None]
_Values = Sequence[dict[str, float] | None]
_Line = list[float | None]


def charts_of(steps: Steps, told: Told, points: Sequence[HistoryPoint]) -> Iterator[Chart]:
    """All charts of a page, in order.

    Args:
        points: those of the history, and of the report.
    """
    minutes = told.minutes
    counts, latencies = steps.counts(minutes or ()), steps.latencies(minutes or ())
    statuses, values = steps.statuses(points), steps.values(points)
    no_calls = "No calls in this time." if minutes is not None else "Unknown now: the account cannot be read."
    no_snapshots = "Unknown now: the history cannot be read."
    if told.points is not None:
        no_snapshots = "The snapshots of this time have none." if told.points else "No snapshots in this time."

    def rate(label: str, counted: _Counts, name: str, in_snapshots: str) -> Series:
        older = steps.older(values, f"counters.{in_snapshots}", 1 / 60)
        return Series(label, _either(steps.rates(counted, name), older))

    yield Chart("status", "State", _status, (Series("worst", statuses),), no_snapshots, most=2.0, stepped=True)
    for server, name in SERVERS.items():
        lines = []
        for label, share in ("p50", 0.5), ("p99", 0.99):
            older = steps.older(values, f"counters.latencies.hour.{server}.{label}")
            lines.append(Series(label, _either([_quantile(each, server, share) for each in latencies], older)))
        yield Chart(f"latency-{server}", f"{name} latency", texts.seconds, tuple(lines), no_calls, log=_QUICKEST)
    by_features = _by_features(counts)
    features = {name for each in by_features if each for name in each} | steps.older_names(values, "fallbacks")
    served = tuple(rate(each, by_features, each, f"fallbacks.hour.{each}") for each in sorted(features)[:_LINES])
    no_fallbacks = no_calls if minutes is None else "None in this time."
    yield Chart("fallbacks", "Served by fallbacks", texts.per_minute, served, no_fallbacks)
    yield Chart("hits", "Hit ratio", texts.percent, tuple(_ratios(steps, counts, values)), no_calls, most=1.0)
    denied = (rate("denied", counts, "limits.denied", "denials.hour"),)
    yield Chart("denied", "Denials", texts.per_minute, denied, no_calls)
    waits = rate("waits", counts, "locks.waits", "lock_waits.hour")
    lost = rate("lost", counts, "locks.lost", "locks_lost.hour")
    yield Chart("locks", "Lock waits", texts.per_minute, (waits, lost), no_calls)
    depths = {name: _queue(name) for each in values if each for name in each if _queue(name)}
    yield Chart("queues", "Queues of Celery", texts.number, tuple(_largest(depths, values)), no_snapshots)
    kinds = {name: name.removeprefix("keys.") for each in values if each for name in each if name.startswith("keys.")}
    yield Chart("keys", "Keys by kind", texts.number, tuple(_largest(kinds, values)), no_snapshots, log=_FEWEST)
    memory = {"redis.used_memory": "used"}
    if any(each and each.get("redis.maxmemory") for each in values):
        memory["redis.maxmemory"] = "most"
    used = tuple(_largest(memory, values))
    yield Chart("memory", "Memory of Redis", texts.size, used, no_snapshots, binary=True)


class Steps:
    """Puts what is known of some instants into the steps of the charts. None: nothing is known of a step.

    The account does not have the first `_older` of them.
    """

    def __init__(self, span: Span, began: datetime, now: datetime) -> None:
        self._began = began
        self._step = span.step
        self._count = span.seconds // span.step
        self._now = (now - began).total_seconds()
        self._older = max(0, int((self._now - KEPT) // span.step))

    def _at(self, at: datetime) -> int | None:
        n = int((at - self._began).total_seconds() // self._step)
        return n if 0 <= n < self._count else None

    def counts(self, minutes: Iterable[Minute]) -> list[dict[str, int] | None]:
        found: list[dict[str, int] | None] = [None] * self._count
        for minute in minutes:
            if (n := self._at(minute.at)) is not None:
                sums = found[n] = found[n] or {}
                for name, count in minute.counts.items():
                    sums[name] = sums.get(name, 0) + count
        return found

    def latencies(self, minutes: Iterable[Minute]) -> list[dict[str, Latency] | None]:
        found: list[dict[str, Latency] | None] = [None] * self._count
        for minute in minutes:
            if (n := self._at(minute.at)) is not None:
                sums = found[n] = found[n] or {}
                for server, latency in minute.latencies.items():
                    sums[server] = sums[server] + latency if server in sums else latency
        return found

    def values(self, points: Iterable[HistoryPoint]) -> list[dict[str, float] | None]:
        """The last of each name in each step."""
        found: list[dict[str, float] | None] = [None] * self._count
        for point in points:
            if (n := self._at(point.at)) is not None:
                found[n] = {**(found[n] or {}), **point.values}
        return found

    def statuses(self, points: Iterable[HistoryPoint]) -> _Line:
        """The severity of the worst of each step."""
        found: _Line = [None] * self._count
        for point in points:
            if (n := self._at(point.at)) is not None:
                found[n] = max(found[n] or 0, verdict.SEVERITY[point.status])
        return found

    def rates(self, counts: _Counts, name: str) -> _Line:
        """Per minute. From the first step with counts to the last, a step without any counts nothing."""
        known = [n for n, each in enumerate(counts) if each is not None]
        found: _Line = [None] * self._count
        for n in range(known[0], known[-1] + 1) if known else ():
            passed = min(self._step, self._now - n * self._step)
            if passed >= _SHORTEST or n == known[0]:
                found[n] = (counts[n] or {}).get(name, 0) * 60 / max(passed, _SHORTEST)
        return found

    def older(self, values: _Values, name: str, factor: float = 1.0) -> _Line:
        """A figure of the snapshots, in the steps that the account does not have."""
        found: _Line = [None] * self._count
        for n, each in enumerate(values[: self._older]):
            if each is not None and name in each:
                found[n] = each[name] * factor
        return found

    def older_names(self, values: _Values, figure: str) -> set[str]:
        """The features for which the snapshots have this figure, in those steps."""
        begin = f"counters.{figure}.hour."
        known = (name for each in values[: self._older] if each for name in each)
        return {name.removeprefix(begin) for name in known if name.startswith(begin)}


def _status(severity: float) -> str:
    return next(name for name, held in verdict.SEVERITY.items() if held == severity)


def _of(values: _Values, name: str) -> _Line:
    return [None if each is None else each.get(name) for each in values]


def _either(line: _Line, other: _Line) -> _Line:
    return [b if a is None else a for a, b in zip(line, other, strict=True)]


def _quantile(latencies: dict[str, Latency] | None, server: str, share: float) -> float | None:
    return latencies[server].quantile(share) if latencies is not None and server in latencies else None


def _ratios(steps: Steps, counts: _Counts, values: _Values) -> Iterator[Series]:
    """The hit ratio of each cache, the busiest first."""
    asked = dict.fromkeys(sorted(steps.older_names(values, "hit_ratios")), 0)
    for each in counts:
        for name, count in (each or {}).items():
            feature, _, event = name.rpartition(".")
            if event in {"hits", "misses"}:
                asked[feature] = asked.get(feature, 0) + count
    for feature in sorted(asked, key=lambda name: -asked[name])[:_LINES]:
        line: _Line = []
        for each in counts:
            hits = (each or {}).get(f"{feature}.hits", 0)
            both = hits + (each or {}).get(f"{feature}.misses", 0)
            line.append(hits / both if both else None)
        yield Series(feature, _either(line, steps.older(values, f"counters.hit_ratios.hour.{feature}")))


def _by_features(counts: _Counts) -> list[dict[str, int] | None]:
    """The calls that fallbacks have served, by feature."""
    found: list[dict[str, int] | None] = []
    for each in counts:
        sums: dict[str, int] = {}
        for name, count in (each or {}).items():
            if (feature := fallback_of(name)) is not None:
                sums[feature] = sums.get(feature, 0) + count
        found.append(None if each is None else sums)
    return found


def _queue(name: str) -> str:
    """The queue whose depth has this name in the history; "" for other names."""
    return name[len("celery.") : -len(".depth")] if name.startswith("celery.") and name.endswith(".depth") else ""


def _largest(names: dict[str, str], values: _Values) -> list[Series]:
    """The lines of these names, under their labels, the highest first."""
    lines = [Series(label, _of(values, name)) for name, label in names.items()]
    return sorted(lines, key=lambda line: -max((v for v in line.values if v is not None), default=0.0))[:_LINES]
