"""HealthMonitor: the state of the servers and features now, and a record of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from .._context import Context
from .._fork import notice_fork, renew_in_child
from .._secrets import Secrets
from .._uncopied import Uncopied
from ..errors import BackendError, check_ttl
from . import deadlines, verdict
from .census import KeyCensus
from .counters_check import check_counters
from .heartbeat import Heartbeat
from .history import HealthHistory, HistoryPoint
from .probes.locks import LocksProbe
from .probes.outbox import OutboxProbe
from .probes.parked import ParkedProbe
from .probes.postgres_server import PostgresProbe
from .probes.probe import Probe
from .probes.redis_server import RedisProbe
from .probes.side import Patience, Side
from .report import Check, HealthReport

if TYPE_CHECKING:
    from ..limits.parked import Parked
    from ..locks.backends.file_backend import FolderFault
    from ..locks.holders import HeldCounts
    from ..outbox import FreshnessLease
    from .account import Account
    from .fleet import Fleet

__all__ = ["HealthMonitor"]

_CACHED_FOR = 1.0
#: Seconds of the census in one snapshot.
_CENSUS = 0.05


class HealthMonitor(Uncopied):
    """Looks at Redis, PostgreSQL and this process's counters, within a deadline for each.

    Redis away is "warn" while a fallback covers every feature, PostgreSQL away likewise. Redis away with PostgreSQL
    away too, or not configured, is "fail": limits are per process then, and metadata has no source. A Redis that is
    disabled (REDIS_ENABLED=0) passes, and says so. The whole table is in `verdict.py`.

    Args:
        heartbeat: of Celery's beat.
        fleet: of Celery.
        freshness: of cached values, if there is one.
        parked: tasks that wait for their limits, where Redis is not disabled.
        lock_folder: says why no lock file can be made; None where one can.
        locks_held: says how many locks are held, and which the longest; raises BackendError.
        namespaces: says which namespaces of cached values this process has made.
        account: of all processes.
        noted: is called with each report of `snapshot`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        context: Context,
        heartbeat: Heartbeat,
        *,
        fleet: Fleet | None = None,
        freshness: FreshnessLease | None = None,
        parked: Parked | None = None,
        lock_folder: Callable[[], FolderFault | None] = lambda: None,
        locks_held: Callable[[], HeldCounts] | None = None,
        namespaces: Callable[[], Iterable[str]] = lambda: (),
        account: Account | None = None,
        noted: Callable[[HealthReport], object] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = context.counters
        self._secrets = Secrets.of(context.config)
        self._account = account
        self._noted = noted
        self._clock = clock
        self._heartbeat = heartbeat
        self._fleet = fleet
        self._history = HealthHistory(context)
        self._lock_folder = lock_folder
        self._census = KeyCensus(context, namespaces)
        probes: list[Probe] = [] if locks_held is None else [LocksProbe(locks_held)]
        probes.append(self._census)
        if fleet is not None:
            probes.append(fleet)
        if freshness is not None:
            probes.append(OutboxProbe(freshness))
        if parked is not None:
            probes.append(ParkedProbe(parked))
        redis, postgres = RedisProbe(context, heartbeat, probes, clock), PostgresProbe(context)
        config = context.config
        for_redis = config.connect_timeout + config.socket_timeout + deadlines.SPARE
        #: Redis's first, then PostgreSQL's, then both's counters.
        self._sides = (
            Side(redis.look, for_redis, redis.hung),
            Side(postgres.look, deadlines.POSTGRES + deadlines.SPARE, postgres.hung),
            Side(self._check_counters, for_redis, self._counters_hung),
            Side(self._check_folder, deadlines.SPARE, _folder_hung),
        )
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._last: tuple[float, HealthReport] | None = None
        for side in self._sides:
            side.renew_after_fork()

    def check(self) -> HealthReport:
        """Look now, or return the report of the last second. Never raises because a server is away.

        Redis and PostgreSQL are asked side by side. Redis has its connect and socket timeouts and 0.5 s for all that is
        asked of it, PostgreSQL has a second. The report warns of a server that takes longer, by its name. The scan for
        locks from outside covers at most 10,000 keys, and goes on there at the next check.
        """
        notice_fork()
        with self._lock:
            if self._last is not None and self._clock() - self._last[0] < _CACHED_FOR:
                return self._last[1]
            patience = Patience()
            for side in self._sides:
                side.begin()
            of_redis, of_postgres, counters, of_folder = (side.finish(patience) for side in self._sides)
            redis, postgres = of_redis[0], of_postgres[0]
            checks = _merged([redis, postgres, *counters, *of_redis[1:], *of_postgres[1:], *of_folder])
            status = verdict.of_all(checks, redis, postgres)
            checks[0] = replace(redis, output=redis.output + verdict.uncovered_by_postgres(redis, postgres))
            hide = self._secrets.hide_in
            shown = tuple(replace(c, output=hide(c.output), data=hide(c.data)) for c in checks)
            report = HealthReport(status, shown, datetime.now(timezone.utc))
            self._last = (self._clock(), report)
            return report

    def snapshot(self) -> HealthReport:
        """`check`, and keep the report: in a capped stream in Redis, or in PostgreSQL while Redis is away.

        `report.stored` names the place; None: it was kept nowhere. The stream at `govredis:health` holds about 10,000
        reports, the table those of 30 days. PostgreSQL also adds each report to a row of its hour. A status that
        differs from the last is the event `health.changed`.
        """
        with contextlib.suppress(BackendError):  # the check says so
            self._count(_CENSUS)
        report = self.check()
        stored = self._history.add(report)
        self._noted(report)
        return replace(report, stored=stored)

    def count_keys(self, budget: float = 0.5) -> bool:
        """Go on with the census, which counts Redis's keys by kind, for about `budget` seconds.

        The report shows the counts of the last whole round, as the checks "keys" and "census". The census walks all
        keys by SCAN, with no command above a few milliseconds. Processes take turns, and each goes on where the last
        has stopped. A new round begins half a minute after the last. `snapshot` also counts, for 50 ms.

        Returns whether a round has ended. Raises BackendUnavailable, BackendError, ValueError.
        """
        notice_fork()
        return self._count(check_ttl(budget, "budget"))

    def history(
        self, since: datetime | float | None = None, until: datetime | float | None = None, points: int = 300
    ) -> list[HistoryPoint]:
        """The health over time, from the reports of `snapshot`: at most so many points, the oldest first.

        The time from `since` to `until` is divided into so many equal parts. A part without a report gives no point.
        Reports that Redis and PostgreSQL hold are merged. PostgreSQL also keeps each hour's mean values and worst
        status, for 90 days: an hour without a report gives one point. So a Redis that loses its data takes along the
        details, and of the present hour what was before.

        Args:
            since: an aware datetime, or seconds since 1970; None: a day before `until`.
            until: None: now.
            points: 1 to 1000.

        While one of the servers is away, the result is what the other one has; the counter health.degraded.history says
        so. Where that is nothing, raises BackendUnavailable, BackendError, ConfigurationError. Raises ValueError.
        """
        notice_fork()
        return self._history.read(since, until, points)

    def beat(self, every: float) -> bool:
        """Note that the caller is alive, and will call again `every` seconds from now.

        For the next day, or ten times `every`, `check` has an entry "beat". It warns when two calls in a row did not
        come. Ages are counted by Redis's clock. If Redis loses its data, PostgreSQL still has the last call, or a
        process that has seen it. Returns False where the call could be noted in neither server.

        Raises ValueError for a bad `every`, and BackendError where Redis answers with an error.
        """
        if self._fleet is not None:
            with contextlib.suppress(BackendError):  # it is tidied up by the next
                self._fleet.prune()
        return self._heartbeat.note(every)

    def purge(self) -> int:
        """Delete our prefix's reports of more than 30 days ago, and hours of more than 90, from PostgreSQL.

        Returns how many rows were deleted.

        Raises BackendUnavailable, BackendError, ConfigurationError.
        """
        return self._history.purge()

    # -- inside --------------------------------------------------------------------------------------------------

    def _count(self, budget: float) -> bool:
        ended = self._census.step(budget)
        if ended:
            self._last = None  # the report of the last second does not know
        return ended

    def _check_counters(self) -> Iterator[Check]:
        yield check_counters(self._counters.read(), self._account)

    def _counters_hung(self, seconds: float) -> list[Check]:
        output = f"the sums of all processes have not come for {seconds:.1f} s"
        return [Check("counters", "warn", output, {"counts": self._counters.read()})]

    def _check_folder(self) -> Iterator[Check]:
        """A fault that stops locks is no more than a warning: perhaps nobody locks."""
        fault = self._lock_folder()
        if fault is not None:
            yield Check("locks", "warn" if fault.stops_locks else "pass", fault.why, {})


def _folder_hung(seconds: float) -> list[Check]:
    return [Check("locks", "warn", f"the lock folder's file system has not answered for {seconds:.1f} s", {})]


def _merged(checks: Sequence[Check]) -> list[Check]:
    """The checks, each name once: two sides may have found something of the same thing."""
    found: dict[str, Check] = {}
    for check in checks:
        other = found.get(check.name)
        if other is not None:
            output = "; ".join(filter(None, (other.output, check.output)))
            check = Check(check.name, verdict.worst(other.status, check.status), output, {**other.data, **check.data})
        found[check.name] = check
    return list(found.values())
