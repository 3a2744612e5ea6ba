"""HealthHistory: the reports of `snapshot`, kept and read again as points over time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple

from .._context import Context
from ..errors import BackendError, ConfigurationError, refuse
from . import verdict
from .report import HealthReport, Status

__all__ = ["HealthHistory", "HistoryPoint"]

#: Reports that the stream in Redis holds, about: a week, with one each minute.
ENTRIES = 10_000
#: Days that PostgreSQL keeps a report, and an hour's row.
REPORT_DAYS, HOUR_DAYS = 30, 90
MOST_POINTS = 1000
_DAY, _HOUR = 86_400.0, 3600
#: Reports in one reply.
_PAGE = 100
#: Seconds for one statement.
_DEADLINE = 5.0
#: The values of reports, by name: in how many each was, and the sum.
_Sums = dict[str, tuple[float, float]]
#: The year 2200.
_LATEST = 7_258_118_400.0

_ADD = """
WITH old AS (
    DELETE FROM @schema@.govredis_health_snapshots WHERE key = %s AND at < now() - %s * interval '1 day'
), past AS (
    DELETE FROM @schema@.govredis_health_hours WHERE key = %s AND hour < now() - %s * interval '1 day'
), kept AS (
    INSERT INTO @schema@.govredis_health_snapshots (key, at, report)
    SELECT %s, now(), r.report FROM (SELECT %s::jsonb AS report) r WHERE r.report IS NOT NULL ON CONFLICT DO NOTHING
)
INSERT INTO @schema@.govredis_health_hours AS h (key, hour, last, worst, sums)
VALUES (%s, to_timestamp(floor(extract(epoch FROM now()) / 3600) * 3600), now(), %s, %s::jsonb)
ON CONFLICT (key, hour) DO UPDATE SET last = excluded.last, worst = greatest(h.worst, excluded.worst), sums = (
    SELECT jsonb_object_agg(s.name, jsonb_build_array(s.times, s.total)) FROM (
        SELECT e.key AS name, sum((e.value->>0)::bigint) AS times, sum((e.value->>1)::float8) AS total
        FROM (SELECT * FROM jsonb_each(h.sums) UNION ALL SELECT * FROM jsonb_each(excluded.sums)) e
        GROUP BY e.key) s)
"""
_REPORTS = """
SELECT extract(epoch FROM at)::float8, report FROM @schema@.govredis_health_snapshots
WHERE key = %s AND at > to_timestamp(%s) AND at <= to_timestamp(%s) ORDER BY at LIMIT %s
"""
_HOURS = """
SELECT extract(epoch FROM hour)::float8, extract(epoch FROM last)::float8, worst, sums
FROM @schema@.govredis_health_hours
WHERE key = %s AND last >= to_timestamp(%s) AND last <= to_timestamp(%s) ORDER BY hour
"""
_PURGE = """
WITH reports AS (
    DELETE FROM @schema@.govredis_health_snapshots WHERE key = %s AND at < now() - %s * interval '1 day' RETURNING 1
), hours AS (
    DELETE FROM @schema@.govredis_health_hours WHERE key = %s AND hour < now() - %s * interval '1 day' RETURNING 1
) SELECT (SELECT count(*) FROM reports) + (SELECT count(*) FROM hours)
"""


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """The health in a short time.

    Attributes:
        at: the time of its last report (aware UTC).
        status: the worst of its reports.
        values: every number of the reports' checks, by the check's name and the number's, as in "redis.used_memory".
            Each is the mean over its reports, even where it only rises. True counts as 1.
    """

    at: datetime
    status: Status
    values: dict[str, float]


class _Kept(NamedTuple):
    """A report as it was kept: its time, its status, and its numbers."""

    time: str
    status: Status
    sums: _Sums


@dataclass(slots=True)
class _Bucket:
    """The reports of one point, added up."""

    at: float = 0.0
    worst: Status = "pass"
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, at: float, status: Status, sums: _Sums) -> None:
        self.at = max(self.at, at)
        self.worst = verdict.worst(self.worst, status)
        for name, (times, total) in sums.items():
            mine = self.sums.setdefault(name, [0, 0.0])
            mine[0] += times
            mine[1] += total

    def point(self) -> HistoryPoint:
        values = {name: total / times for name, (times, total) in sorted(self.sums.items())}
        return HistoryPoint(datetime.fromtimestamp(self.at, timezone.utc), self.worst, values)


class HealthHistory:
    """Keeps reports in a capped stream in Redis, or in PostgreSQL while Redis is away; and hours in PostgreSQL."""

    def __init__(self, context: Context) -> None:
        self._key = context.keys.health_history()
        self._redis = context.redis
        self._postgres = context.postgres
        self._counters = context.counters

    def add(self, report: HealthReport) -> str | None:
        """Returns where it is kept: "redis", "postgres" or None."""
        form = report.as_dict()
        text = json.dumps(form, separators=(",", ":"))
        stored = "redis" if self._add_to_redis(text) else None
        if self._postgres is not None:
            key, severity, sums = self._key, verdict.SEVERITY[report.status], json.dumps(_sums(form))
            kept = text if stored is None else None
            try:
                self._postgres.fetch(_ADD, (key, REPORT_DAYS, key, HOUR_DAYS, key, kept, key, severity, sums))
                stored = stored or "postgres"
            except (BackendError, ConfigurationError):
                self._counters.add("health.degraded.hours" if stored else "health.degraded.snapshots")
        return stored

    def _add_to_redis(self, text: str) -> bool:
        if self._redis is None:
            return False
        try:
            self._redis.call("XADD", self._key, "MAXLEN", "~", str(ENTRIES), "*", "report", text)
        except BackendError:
            self._counters.add("health.degraded.snapshots")
            return False
        return True

    def purge(self) -> int:
        """Raises BackendUnavailable, ConfigurationError."""
        if self._postgres is None:
            return 0
        rows = self._postgres.fetch(_PURGE, (self._key, REPORT_DAYS, self._key, HOUR_DAYS))
        return int(rows[0][0])

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, since: datetime | float | None, until: datetime | float | None, points: int) -> list[HistoryPoint]:
        """See HealthMonitor.history."""
        if not isinstance(points, int) or isinstance(points, bool) or not 1 <= points <= MOST_POINTS:
            raise refuse("points", points, f"an int from 1 to {MOST_POINTS}")
        end = time.time() if until is None else _seconds(until, "until")
        begin = max(0.0, end - _DAY) if since is None else _seconds(since, "since")
        if begin >= end:
            raise refuse("since", since, "before until, which is now where it is not given")
        width = (end - begin) / points
        buckets: dict[int, _Bucket] = {}
        seen: set[int] = set()

        def bucket(at: float) -> _Bucket:
            return buckets.setdefault(min(int((at - begin) / width), points - 1), _Bucket())

        errors: list[BackendError | ConfigurationError] = []
        told: set[str] = set()
        for source in (self._in_redis, self._in_postgres):
            try:
                for at, held in source(begin, end):
                    report = self._understood(held)
                    # Where the reply of Redis was lost, both may have it.
                    if report is not None and report.time not in told:
                        told.add(report.time)
                        seen.add(int(at // _HOUR))
                        bucket(at).add(at, report.status, report.sums)
            except (BackendError, ConfigurationError) as error:
                errors.append(error)
        try:
            for hour, last, status, sums in self._hours(begin, end):
                if int(hour // _HOUR) not in seen:
                    bucket(last).add(last, status, sums)
        except (BackendError, ConfigurationError) as error:
            errors.append(error)
        if errors:
            self._counters.add("health.degraded.history")
            if not buckets:
                raise errors[0]
        return [buckets[n].point() for n in sorted(buckets)]

    def _in_redis(self, begin: float, end: float) -> Iterator[tuple[float, Any]]:
        if self._redis is None:
            return
        first, last = f"{begin * 1000:.0f}", f"{end * 1000:.0f}"
        while True:
            page = self._redis.call("XRANGE", self._key, first, last, "COUNT", str(_PAGE))
            for entry, fields in page:
                yield (
                    int(entry.partition(b"-")[0]) / 1000,
                    dict(zip(fields[::2], fields[1::2], strict=True)).get(b"report"),
                )
            if len(page) < _PAGE:
                return
            first = f"({page[-1][0].decode()}"

    def _in_postgres(self, begin: float, end: float) -> Iterator[tuple[float, Any]]:
        if self._postgres is None:
            return
        begin -= 1e-6  # times in PostgreSQL have microseconds
        while True:
            page = self._postgres.fetch(_REPORTS, (self._key, begin, end, _PAGE), timeout=_DEADLINE)
            yield from page
            if len(page) < _PAGE:
                return
            begin = page[-1][0]

    def _hours(self, begin: float, end: float) -> Iterator[tuple[float, float, Status, _Sums]]:
        if self._postgres is None:
            return
        for hour, last, worst, sums in self._postgres.fetch(_HOURS, (self._key, begin, end), timeout=_DEADLINE):
            status = next((name for name, severity in verdict.SEVERITY.items() if severity == worst), None)
            if status is not None:
                yield hour, last, status, {name: (times, total) for name, (times, total) in sums.items()}

    def _understood(self, held: Any) -> _Kept | None:
        """None for something that govredis has not written."""
        try:
            form = json.loads(held) if isinstance(held, bytes) else held
            status: Status = form["status"]
            verdict.SEVERITY[status]
            return _Kept(str(form["time"]), status, _sums(form))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._counters.add("health.unreadable")
            return None


def _seconds(value: datetime | float, what: str) -> float:
    """The Unix time. Raises ValueError."""
    seconds: Any = value
    if isinstance(value, datetime) and value.utcoffset() is not None:
        seconds = value.timestamp()
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < _LATEST:
        raise refuse(what, value, "a datetime with a time zone, or seconds since 1970")
    return float(seconds)


def _sums(form: dict[str, Any]) -> _Sums:
    """Every finite number in a report, with its name; each once."""
    found: _Sums = {}

    def look(name: str, held: Any) -> None:
        if isinstance(held, dict):
            for key, value in held.items():
                look(f"{name}.{key}", value)
        elif isinstance(held, int | float) and abs(held) < 1e300:
            found[name] = (1, float(held))

    for name, (check,) in form["checks"].items():
        look(name, check)
    return found
