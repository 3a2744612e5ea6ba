"""HealthMonitor: what works, what a fallback covers, and what does not; and a record of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from .._counters import Counters
from .._fork import renew_in_child
from ..client import RedisClient
from ..errors import BackendError, BackendUnavailable, ConfigurationError, check_ttl
from ..keys import Keys

if TYPE_CHECKING:
    from ..limits.parked import Parked
    from ..metadata import Guard
    from ..postgres import Postgres

__all__ = ["Check", "HealthMonitor", "HealthReport"]

Status = Literal["pass", "warn", "fail"]

_CACHED_FOR = 1.0
_POSTGRES_DEADLINE = 0.5
_HISTORY_ENTRIES = "10000"
_HISTORY_DAYS = 30
_HEARTBEATS_MISSED = 3
#: Seconds after which a parked task that nobody has published is worth a warning.
_OVERDUE = 30.0
_SEVERITY: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}
#: What redis-cli INFO shows and a person asks for first.
_INFO = ("redis_version", "uptime_in_seconds", "used_memory", "maxmemory", "connected_clients", "evicted_keys")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        name: "redis", "postgres", "counters"; "beat" where a heartbeat was ever seen; "outbox" where cached values are
            used with PostgreSQL; "parked" where tasks wait for their limits.
        status: "pass", "warn" (a fallback covers it) or "fail".
        output: why, in words; "" if it passes.
        data: what was observed. Durations are seconds.
    """

    name: str
    status: Status
    output: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The worst status of all checks, the checks, and when (aware UTC).

    `stored` says where `snapshot` kept it: "redis", "postgres", or None where it did not or could not.
    """

    status: Status
    checks: tuple[Check, ...]
    at: datetime
    stored: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report in the form of draft-inadarei-api-health-check-06 (application/health+json)."""
        return {
            "status": self.status,
            "time": self.at.isoformat(),
            "checks": {c.name: [{"status": c.status, "output": c.output, **c.data}] for c in self.checks},
        }


class HealthMonitor:
    """Looks at Redis, PostgreSQL and this process's counters, within a deadline for each.

    Redis away is "warn" while a fallback covers every feature, PostgreSQL away likewise. Redis away with PostgreSQL
    away too, or not configured, is "fail": limits are per process then, and metadata has no source. A Redis that is
    disabled (REDIS_ENABLED=0) passes, and says so.

    Args:
        guard: of cached values, if there is one.
        parked: tasks that wait for their limits, where Redis is not disabled.
        uncovered: the features that the settings leave without a fallback: with any, Redis away is "fail".
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        postgres: Postgres | None,
        counters: Counters,
        *,
        guard: Guard | None = None,
        parked: Parked | None = None,
        uncovered: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._uncovered = uncovered
        self._guard = guard
        self._parked = parked
        self._redis = redis
        self._postgres = postgres
        self._counters = counters
        self._clock = clock
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._last: tuple[float, HealthReport] | None = None
        self._ratios_from: dict[str, int] = {}

    def check(self) -> HealthReport:
        """Look now, or return what was seen within the last second. Never raises for a server being away.

        Takes at most the connect and the socket timeout for Redis, and 0.5 s for PostgreSQL. Keys are counted by
        DBSIZE: no scan.
        """
        with self._lock:
            if self._last is not None and self._clock() - self._last[0] < _CACHED_FOR:
                return self._last[1]
            (redis, *beat), postgres = self._check_redis(), self._check_postgres()
            checks = [redis, postgres, self._check_counters(), *beat]
            if postgres.status == "pass":
                checks += self._check_outbox()
            if redis.status == "pass":
                checks += self._check_parked()
            status: Status = max((c.status for c in checks), key=_SEVERITY.__getitem__)
            if redis.status == "warn" and (self._postgres is None or postgres.status == "warn"):
                status = "fail"
            report = HealthReport(status, tuple(checks), datetime.now(timezone.utc))
            self._last = (self._clock(), report)
            return report

    def snapshot(self) -> HealthReport:
        """`check`, and keep the report: in a capped stream in Redis, or in PostgreSQL while Redis is away.

        `report.stored` says where; None: nowhere. The stream holds about 10,000 reports at `govredis:health`,
        the table those of 30 days.
        """
        report = self.check()
        text = json.dumps(report.as_dict())
        if self._redis is not None:
            try:
                self._redis.call(
                    "XADD", self._keys.health_history(), "MAXLEN", "~", _HISTORY_ENTRIES, "*", "report", text
                )
                return _stored(report, "redis")
            except BackendError:
                self._counters.add("health.degraded.snapshots")
        if self._postgres is not None:
            try:
                self._postgres.fetch(
                    "WITH old AS (DELETE FROM govredis_health_snapshots WHERE at < now() - %s * interval '1 day')"
                    " INSERT INTO govredis_health_snapshots (key, at, report) VALUES (%s, now(), %s::jsonb)"
                    " ON CONFLICT DO NOTHING",
                    (_HISTORY_DAYS, self._keys.health_history(), text),
                )
                return _stored(report, "postgres")
            except (BackendError, ConfigurationError):
                self._counters.add("health.degraded.snapshots")
        return report

    def beat(self, every: float) -> bool:
        """Note that whoever calls this is alive, and will call again `every` seconds from now.

        For the next day, or ten times `every`, `check` has an entry "beat", which warns where three in a row did not
        come. Ages are counted by Redis's clock. Returns False where Redis is away: nothing is noted then.
        """
        check_ttl(every, "every")
        if self._redis is not None:
            try:
                self._redis.call("SET", self._keys.heartbeat(), f"{every:g}", "PX", f"{_kept(every) * 1000:.0f}")
                return True
            except BackendUnavailable:
                self._counters.add("health.degraded.heartbeats")
        return False

    def purge(self) -> int:
        """Delete the stored reports of more than 30 days ago from PostgreSQL. Returns how many.

        Raises BackendUnavailable, ConfigurationError.
        """
        if self._postgres is None:
            return 0
        rows = self._postgres.fetch(
            "WITH old AS (DELETE FROM govredis_health_snapshots WHERE at < now() - %s * interval '1 day' RETURNING 1)"
            " SELECT count(*) FROM old",
            (_HISTORY_DAYS,),
        )
        return int(rows[0][0])

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_redis(self) -> list[Check]:
        """Redis, and the heartbeat if there is one in it."""
        if self._redis is None:
            return [Check("redis", "pass", "disabled", {"enabled": False})]
        breaker = self._redis.breaker
        data: dict[str, Any] = {"enabled": True, "times_away": breaker.times_opened}
        try:
            began = time.perf_counter()
            heartbeat = self._keys.heartbeat()
            info, keys, every, left_ms = self._redis.pipeline(
                (("INFO",), ("DBSIZE",), ("GET", heartbeat), ("PTTL", heartbeat))
            )
            data["seconds"] = round(time.perf_counter() - began, 6)
        except BackendUnavailable as error:
            data["away_for"] = round(breaker.away_for(), 3)
            if self._uncovered:
                return [Check("redis", "fail", f"{error}; no fallback for {' and '.join(self._uncovered)}", data)]
            return [Check("redis", "warn", f"{error}; fallbacks are in use", data)]
        except BackendError as error:
            return [Check("redis", "fail", str(error), data)]
        seen = dict(line.split(":", 1) for line in info.decode(errors="replace").split("\r\n") if ":" in line)
        data.update({name: _number(seen[name]) for name in _INFO if name in seen})
        data["keys"] = keys
        checks = [Check("redis", "pass", "", data)]
        if every is not None:
            checks.append(_beat(every, left_ms / 1000))
        return checks

    def _check_postgres(self) -> Check:
        if self._postgres is None:
            return Check("postgres", "pass", "not configured", {"configured": False})
        breaker = self._postgres.breaker
        data: dict[str, Any] = {
            "configured": True,
            "times_away": breaker.times_opened,
            "statements": self._postgres.statements,
        }
        try:
            began = time.perf_counter()
            missing = self._postgres.missing_migrations(timeout=_POSTGRES_DEADLINE)
            data["seconds"] = round(time.perf_counter() - began, 6)
        except BackendUnavailable as error:
            data["away_for"] = round(breaker.away_for(), 3)
            return Check("postgres", "warn", str(error), data)
        except (BackendError, ConfigurationError) as error:
            return Check("postgres", "fail", str(error), data)
        if missing:
            data["missing_migrations"] = missing
            return Check("postgres", "fail", "our tables are not up to date: run `govredis migrate`", data)
        return Check("postgres", "pass", "", data)

    def _check_outbox(self) -> list[Check]:
        """How far Redis is behind the outbox; nothing where nobody uses cached values."""
        if self._guard is None:
            return []
        try:
            valid, lag = self._guard.state(timeout=_POSTGRES_DEADLINE)
        except BackendUnavailable:  # as the checks of the two say
            return []
        except BackendError as error:
            return [Check("outbox", "warn", str(error), {})]
        if lag is None:
            return []
        data: dict[str, Any] = {"entries": lag.entries, "oldest": round(lag.oldest, 3), "guard": valid}
        if lag.oldest <= self._guard.staleness:
            return [Check("outbox", "pass", "", data)]
        output = (
            f"Redis has not been told of {lag.entries} changes, the oldest {lag.oldest:.0f} s ago, so cached values are"
            " not used: does beat run govredis.drain_outbox?"
        )
        return [Check("outbox", "warn", output, data)]

    def _check_parked(self) -> list[Check]:
        """How many tasks wait for their limits, and whether they are published when they are due; nothing if none."""
        if self._parked is None:
            return []
        try:
            waiting = self._parked.waiting()
        except BackendError as error:
            return [Check("parked", "warn", str(error), {})]
        if not waiting:
            return []
        longest = min(waiting, key=lambda each: each.due)
        overdue = max(0.0, -longest.due)
        data = {"count": sum(each.count for each in waiting), "overdue": round(overdue, 3)}
        if overdue <= _OVERDUE:
            return [Check("parked", "pass", "", data)]
        output = f"parked tasks for {longest.broker} are overdue by {overdue:.0f} s: does a worker run that reaches it?"
        return [Check("parked", "warn", output, data)]

    def _check_counters(self) -> Check:
        """This process's counts, and hit ratios since the check before: one since the start hides a bad hour."""
        now = self._counters.read()
        ratios = {}
        for name in now:
            feature, _, event = name.rpartition(".")
            if event in {"hits", "misses"} and feature not in ratios:
                hits = now.get(f"{feature}.hits", 0) - self._ratios_from.get(f"{feature}.hits", 0)
                misses = now.get(f"{feature}.misses", 0) - self._ratios_from.get(f"{feature}.misses", 0)
                if hits + misses:
                    ratios[feature] = round(hits / (hits + misses), 4)
        self._ratios_from = now
        return Check("counters", "pass", "", {"counts": now, "hit_ratios": ratios})


def _kept(every: float) -> float:
    """Seconds that a heartbeat is remembered, and so its end is warned of. Its age is this less what is left."""
    return max(86_400.0, 10 * every)


def _beat(held: bytes, left: float) -> Check:
    try:
        every = float(held)
    except ValueError:
        return Check("beat", "warn", f"the heartbeat is {held!r}, which nobody here has written", {})
    age = _kept(every) - left
    data = {"seconds_since": round(age, 3), "every": every}
    if age > every * _HEARTBEATS_MISSED:
        return Check("beat", "warn", f"no heartbeat for {age:.0f} s: beat is gone, or every worker", data)
    return Check("beat", "pass", "", data)


def _stored(report: HealthReport, where: str) -> HealthReport:
    return HealthReport(report.status, report.checks, report.at, where)


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text
