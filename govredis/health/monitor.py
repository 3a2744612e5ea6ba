"""HealthMonitor: the state of the servers and features now, and a record of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .._context import Context
from .._fork import notice_fork, renew_in_child
from .._pool import PoolExhausted
from .._secrets import Secrets
from .._uncopied import Uncopied
from ..errors import BackendError, BackendUnavailable, ConfigurationError, NoRight
from . import verdict
from .heartbeat import Heartbeat
from .redis_check import check_redis
from .report import Check, HealthReport

if TYPE_CHECKING:
    from ..limits.parked import Parked
    from ..locks.backends.file_backend import FolderFault
    from ..outbox import FreshnessLease

__all__ = ["HealthMonitor"]

_CACHED_FOR = 1.0
_POSTGRES_DEADLINE = 0.5
_HISTORY_ENTRIES = "10000"
_HISTORY_DAYS = 30
#: Seconds after which a parked task that nobody has published is worth a warning.
_OVERDUE = 30.0


class HealthMonitor(Uncopied):
    """Looks at Redis, PostgreSQL and this process's counters, within a deadline for each.

    Redis away is "warn" while a fallback covers every feature, PostgreSQL away likewise. Redis away with PostgreSQL
    away too, or not configured, is "fail": limits are per process then, and metadata has no source. A Redis that is
    disabled (REDIS_ENABLED=0) passes, and says so. The whole table is in `verdict.py`.

    Args:
        heartbeat: of Celery's beat.
        freshness: of cached values, if there is one.
        parked: tasks that wait for their limits, where Redis is not disabled.
        lock_folder: says why no lock file can be made; None where one can.
        locks_held: says how many locks are held through govredis, and how many by others; raises BackendError.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        context: Context,
        heartbeat: Heartbeat,
        *,
        freshness: FreshnessLease | None = None,
        parked: Parked | None = None,
        lock_folder: Callable[[], FolderFault | None] = lambda: None,
        locks_held: Callable[[], tuple[int, int]] = lambda: (0, 0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = context.keys
        self._redis = context.redis
        self._postgres = context.postgres
        self._counters = context.counters
        self._uncovered = verdict.uncovered_features(context.config)
        self._secrets = Secrets.of(context.config)
        self._freshness = freshness
        self._parked = parked
        self._lock_folder = lock_folder
        self._locks_held = locks_held
        self._clock = clock
        self._heartbeat = heartbeat
        #: Asked once: each time would cost two round trips.
        self._has_transactions = False
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._last: tuple[float, HealthReport] | None = None
        self._ratios_from: dict[str, int] = {}

    def check(self) -> HealthReport:
        """Look now, or return the report of the last second. Never raises because a server is away.

        Takes at most the connect and the socket timeout for Redis, and 0.5 s for PostgreSQL. Keys are counted by
        DBSIZE. The scan for locks from outside covers at most 10,000 keys, and goes on there at the next check.
        """
        notice_fork()
        hide = self._secrets.hide_in
        with self._lock:
            if self._last is not None and self._clock() - self._last[0] < _CACHED_FOR:
                return self._last[1]
            (redis, *others), beats = check_redis(self._redis, self._heartbeat.commands, self._uncovered)
            postgres = self._check_postgres()
            others += self._heartbeat.check(beats, timeout=_POSTGRES_DEADLINE if postgres.status == "pass" else None)
            checks = [redis, postgres, self._check_counters(), *others, *self._check_locks(redis)]
            if redis.status == "pass":  # or else the same fault would be said twice
                checks += self._check_outbox() if postgres.status == "pass" else []
                checks += self._check_parked()
            status = verdict.of_all(checks, redis, postgres)
            checks[0] = replace(redis, output=redis.output + verdict.uncovered_by_postgres(redis, postgres))
            shown = tuple(replace(c, output=hide(c.output), data=hide(c.data)) for c in checks)
            report = HealthReport(status, shown, datetime.now(timezone.utc))
            self._last = (self._clock(), report)
            return report

    def snapshot(self) -> HealthReport:
        """`check`, and keep the report: in a capped stream in Redis, or in PostgreSQL while Redis is away.

        `report.stored` names the place; None: it was kept nowhere. The stream at `govredis:health` holds about 10,000
        reports, the table those of 30 days.
        """
        report = self.check()
        text = json.dumps(report.as_dict())
        if self._redis is not None:
            try:
                self._redis.call(
                    "XADD", self._keys.health_history(), "MAXLEN", "~", _HISTORY_ENTRIES, "*", "report", text
                )
                return replace(report, stored="redis")
            except BackendError:
                self._counters.add("health.degraded.snapshots")
        if self._postgres is not None:
            try:
                self._postgres.fetch(
                    "WITH old AS (DELETE FROM @schema@.govredis_health_snapshots"
                    " WHERE key = %s AND at < now() - %s * interval '1 day')"
                    " INSERT INTO @schema@.govredis_health_snapshots (key, at, report) VALUES (%s, now(), %s::jsonb)"
                    " ON CONFLICT DO NOTHING",
                    (self._keys.health_history(), _HISTORY_DAYS, self._keys.health_history(), text),
                )
                return replace(report, stored="postgres")
            except (BackendError, ConfigurationError):
                self._counters.add("health.degraded.snapshots")
        return report

    def beat(self, every: float) -> bool:
        """Note that the caller is alive, and will call again `every` seconds from now.

        For the next day, or ten times `every`, `check` has an entry "beat". It warns when three calls in a row did not
        come. Ages are counted by Redis's clock. If Redis loses its data, PostgreSQL still has the last call, or a
        process that has seen it. Returns False where the call could be noted in neither server.
        """
        return self._heartbeat.note(every)

    def purge(self) -> int:
        """Delete our prefix's reports of more than 30 days ago from PostgreSQL. Returns how many.

        Raises BackendUnavailable, ConfigurationError.
        """
        if self._postgres is None:
            return 0
        rows = self._postgres.fetch(
            "WITH old AS (DELETE FROM @schema@.govredis_health_snapshots"
            " WHERE key = %s AND at < now() - %s * interval '1 day' RETURNING 1)"
            " SELECT count(*) FROM old",
            (self._keys.health_history(), _HISTORY_DAYS),
        )
        return int(rows[0][0])

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_locks(self, redis: Check) -> list[Check]:
        """How many are held, and why no lock file can be made. Nothing where none are held, and a file can be made."""
        data: dict[str, Any] = {}
        fault = self._lock_folder()
        if self._redis is not None and redis.status == "pass":
            try:
                held, outside = self._locks_held()
            except BackendUnavailable:
                pass  # the check of Redis says so from now on
            except BackendError as error:
                return [_folder_check(fault, {}) if fault else Check("locks", "pass", f"unknown: {error}", {})]
            else:
                data = {"held": held, "outside": outside} if held or outside else {}
        if fault is not None:
            return [_folder_check(fault, data)]
        return [Check("locks", "pass", "", data)] if data else []

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
            if not self._has_transactions:
                with self._postgres.transaction(timeout=_POSTGRES_DEADLINE):
                    pass  # a pooler in statement mode refuses it
                self._has_transactions = True
        except (BackendError, ConfigurationError) as error:
            if isinstance(error, BackendUnavailable) and not isinstance(error, PoolExhausted):
                data["away_for"] = round(breaker.away_for(), 3)
            return Check("postgres", verdict.of_error(error), str(error), data)
        if missing:
            data["missing_migrations"] = missing
            under = f" with GOVREDIS_KEY_PREFIX={self._keys.prefix}" if self._keys.prefix else ""
            output = f"our tables are not up to date: run `govredis migrate`{under}"
            return Check("postgres", verdict.OLD_TABLES, output, data)
        if self._postgres.is_owed:
            return Check("postgres", "warn", "it is read-only: changes of this process wait, and reads go on", data)
        return Check("postgres", "pass", "", data)

    def _check_outbox(self) -> list[Check]:
        """How far Redis is behind the outbox; [] where no cached values are used."""
        if self._freshness is None:
            return []
        try:
            valid, lag, foreign = self._freshness.state(timeout=_POSTGRES_DEADLINE)
        except BackendUnavailable:  # the checks of both servers say so
            return []
        except NoRight as error:  # perhaps this deployment does not use it
            return [Check("outbox", "pass", f"unknown: {error}", {})]
        except BackendError as error:
            return [Check("outbox", "warn", str(error), {})]
        if foreign:
            output = (
                "the key of the freshness lease holds a value that govredis has not written: cached values are not used"
                " until the relay runs next"
            )
            return [Check("outbox", "warn", output, {"fresh": False})]
        if lag is None:
            return []
        data: dict[str, Any] = {"entries": lag.entries, "oldest": round(lag.oldest, 3), "fresh": valid}
        if lag.oldest <= self._freshness.staleness:
            return [Check("outbox", "pass", "", data)]
        output = (
            f"Redis has not been told of {lag.changes}, the oldest {lag.oldest:.0f} s ago, so cached values are not"
            " used until their next reader tells it, or govredis.drain_outbox, which beat runs"
        )
        return [Check("outbox", "warn", output, data)]

    def _check_parked(self) -> list[Check]:
        """How many tasks wait for their limits, and whether they are published when they are due; [] if none wait."""
        if self._parked is None:
            return []
        try:
            waiting = self._parked.waiting()
        except NoRight as error:  # perhaps this deployment does not use it
            return [Check("parked", "pass", f"unknown: {error}", {})]
        except BackendError as error:
            return [Check("parked", "warn", str(error), {})]
        if not waiting:
            return []
        longest = min(waiting, key=lambda each: each.due)
        overdue = max(0.0, -longest.due)
        set_aside = sum(each.set_aside for each in waiting)
        data = {"count": sum(each.count for each in waiting), "overdue": round(overdue, 3), "set_aside": set_aside}
        if set_aside:
            output = f"{set_aside} parked tasks cannot be published: `govredis limits parked` says why"
            return [Check("parked", "warn", output, data)]
        if overdue <= _OVERDUE:
            return [Check("parked", "pass", "", data)]
        output = f"parked tasks for {longest.broker} are overdue by {overdue:.0f} s: does a worker run that reaches it?"
        return [Check("parked", "warn", output, data)]

    def _check_counters(self) -> Check:
        """This process's counts, and hit ratios since the last check: a ratio since the start would hide a bad hour."""
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


def _folder_check(fault: FolderFault, data: dict[str, Any]) -> Check:
    """A fault that stops locks is no more than a warning: perhaps nobody locks."""
    return Check("locks", "warn" if fault.stops_locks else "pass", fault.why, data)
