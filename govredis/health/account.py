"""Account: the sums of all processes' counters and latencies, and the outages that they noticed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple

from .._clock import Clock
from .._context import Context
from .._fork import notice_fork, renew_in_child
from .._teller import Party
from ..client import Command, Script
from ..errors import BackendError, ConfigurationError
from .account_postgres import AccountRow, PostgresAccountBackend
from .account_redis import KEPT, SINCE, OutageRecord, RedisAccountBackend, refused
from .figures import COLON, SUM, Minute, Outage, Totals, split
from .nodes import NodeLatencies
from .outage_log import SILENT, Noticed, OutageLog, instant, is_news, joined

__all__ = ["Account", "Recent"]

log: logging.Logger = logging.getLogger("govredis")

_MINUTE = 60
#: Seconds between two writes to PostgreSQL while Redis is away.
_WRITES = 5.0
#: Seconds after which a Redis that refuses the account is told again.
_REFUSED = 60.0
#: Minutes of an outage that are kept apart; the counts of older ones are told as those of the next.
_MINUTES = 1440
_OUTAGES = 1000

_Server = Literal["redis", "postgres"]


class Recent(NamedTuple):
    """The counts of all processes lately: of the last one to two minutes, of about an hour, and of about a day."""

    minute: Totals
    hour: Totals
    day: Totals


class Account(Party):
    """The sums over all processes, in Redis; while it is away, in PostgreSQL.

    Each process adds its counters and latencies once a second, in the background; see `Teller`. It tells its counts
    since it began, and Redis keeps what each process has told, so a call that arrives twice adds nothing. A process
    that is killed is short by its last second. Latencies are told together with counts, and so may come later.

    While Redis is away a process keeps its minutes apart, and writes them to PostgreSQL every five seconds. On Redis's
    return they are added to the minutes that they are of. Those of processes that were killed meanwhile are added by
    the next process that begins, sees Redis return or reads the totals. Without PostgreSQL they are lost with the
    process.

    If Redis loses its data, the totals begin anew, as Prometheus understands. Redis keeps minutes and hours for 26
    hours, outages for 30 days and 1,000 of them, and 1,000 names.

    Args:
        clock: seconds since 1970. Minutes go by Redis's clock wherever it was seen.
    """

    def __init__(self, context: Context, clock: Clock = time) -> None:
        self._context = context
        self._clock = clock
        self._redis = None if context.redis is None else RedisAccountBackend(context.keys, context.redis)
        self._latencies = None if context.redis is None else NodeLatencies(context.redis)
        self._postgres = None
        if context.postgres is not None and context.redis is not None:
            self._postgres = PostgresAccountBackend(context.keys, context.postgres)
        if self._redis is not None:
            self.scripts: Sequence[Script] = self._redis.scripts
        self._log = OutageLog(context, context.teller.wake, clock.time)
        self.renew_after_fork()
        renew_in_child(self)
        context.teller.join(self)

    def renew_after_fork(self) -> None:
        #: This process's name, or child's.
        self.process: str = os.urandom(12).hex()
        #: Why Redis does not take the account.
        self.problem: BackendError | None = None
        self._lock = threading.RLock()
        #: The values, and the counters among them, that Redis has acknowledged.
        self._told: dict[str, int] = {}
        self._told_counts: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        #: While Redis is away: by minute, the values that had changed by its end.
        self._minutes: dict[int, dict[str, int]] = {}
        self._written_minute = self._next_write = 0.0
        self._has_rows = False
        self._telling: list[tuple[Noticed, OutageRecord]] = []
        #: Rows of others may lie in PostgreSQL.
        self._merges = self._postgres is not None
        self._refused_until = 0.0
        #: Redis's clock, before ours.
        self._ahead = 0.0
        #: The totals and minutes last read in Redis.
        self._known: dict[str, int] | None = None
        self._seen: dict[int, dict[str, int]] = {}
        self._log.renew()
        if self._latencies is not None:
            self._latencies.renew()

    # -- telling -------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Tell Redis now what this process has counted; PostgreSQL, while Redis is away. Raises nothing."""
        notice_fork()
        self._next_write = 0.0
        self._context.teller.flush()

    def has_pending(self) -> bool:
        if time.monotonic() < self._refused_until:
            return False
        return self._log.has_any() or self._context.counters.read() != self._told_counts

    def take(self, *, last: bool) -> list[Command]:
        if self._redis is None or time.monotonic() < self._refused_until:
            return []
        if last:
            self._next_write = 0.0
        now, this = self._values(), self._minute()
        self._taken = now
        commands: list[Command] = []
        for minute, values in sorted(self._minutes.items()):
            if minute < this:
                commands += self._redis.add(self.process, minute, self._counted(values))
        ended = last and not self._has_rows
        commands += self._redis.add(self.process, None, self._counted(now), ended=ended)
        self._telling = [
            (noticed, record)
            for noticed, record in self._log.records(self.process)
            if is_news(record, noticed.in_redis)
        ]
        for noticed, record in self._telling:
            commands += self._redis.note_outage(record, noticed.in_redis)
        return commands

    def told(self, replies: list[Any]) -> None:
        error = refused(replies)
        if error is not None:
            self._refused_until = time.monotonic() + _REFUSED
            if self.problem is None:
                log.warning("the account of all processes is not told: %s", error)
            self.problem = error
            return
        self.problem = None
        now = next((reply[0] for reply in replies if isinstance(reply, list)), None)
        if now is not None:
            self._ahead = now / 1e6 - self._clock.time()
        self._told = self._taken
        self._told_counts = {name: n for name, n in self._taken.items() if COLON not in name}
        self._minutes = {}
        self._written_minute = 0
        for noticed, record in self._telling:
            noticed.in_redis = record
        self._write_outages()
        ended = [record for _, record in self._telling if record.ended is not None]
        self._log.forget([noticed for noticed, record in self._telling if record.ended is not None])
        if any(record.server != "postgres" for record in ended):
            self._merges = self._postgres is not None
        if self._merges:
            self._merge()

    def give_back(self, *, last: bool) -> None:
        values = self._counted(self._taken)
        with self._lock:
            if values:
                self._minutes[self._minute()] = {name: now for name, (_, now) in values.items()}
            while len(self._minutes) > _MINUTES:
                del self._minutes[min(self._minutes)]  # cumulative: the next minute has its counts
        if self._postgres is None or time.monotonic() < self._next_write:
            return
        self._next_write = time.monotonic() + _WRITES
        rows = {m: self._counted(v) for m, v in sorted(self._minutes.items()) if m >= self._written_minute and v}
        try:
            if rows:
                self._has_rows = self._merges = True  # first: it may arrive without an answer
                self._postgres.write(self.process, rows)
                self._written_minute = max(rows)
        except (BackendError, ConfigurationError):
            self._context.counters.add("account.unwritten")
            return
        self._write_outages()

    def _write_outages(self) -> None:
        """PostgreSQL has the outages too: Redis may lose its data."""
        if self._postgres is None:
            return
        for noticed, record in self._log.records(self.process):
            if is_news(record, noticed.in_postgres):
                try:
                    self._postgres.note_outages([record])
                    noticed.in_postgres = record
                except (BackendError, ConfigurationError):
                    return

    def _merge(self) -> None:
        """Add the rows of PostgreSQL to Redis: those of dead processes, and our own, which add nothing more."""
        assert self._postgres is not None and self._redis is not None
        try:
            self._postgres.merge(self._tell_rows)
            if ended := self._postgres.end_outages(SILENT):
                self._tell([command for each in ended for command in self._redis.note_outage(each, None)])
        except ConfigurationError:
            pass  # the tables are missing, as health says
        except BackendError:
            return  # one of the two is away: at the next chance
        self._has_rows = self._merges = False

    def _tell_rows(self, rows: list[AccountRow]) -> dict[str, int]:
        assert self._redis is not None
        self._tell([command for row in rows for command in self._redis.add(row.process, row.minute, row.counted)])
        return self._redis.totals()

    def _tell(self, commands: list[Command]) -> None:
        assert self._context.redis is not None
        self._context.redis.pipeline(commands, self.scripts)

    def _values(self) -> dict[str, int]:
        """The counters and latencies of this process, since it began."""
        context = self._context
        values = {name: n for name, n in context.counters.read().items() if COLON not in name}
        of_redis = None if self._latencies is None else self._latencies.read()
        of_postgres = None if context.postgres is None else context.postgres.latency
        for server, latency in (("redis", of_redis), ("postgres", of_postgres)):
            if latency is not None:
                values.update({f"{server}:{n}": count for n, count in enumerate(latency.buckets) if count})
                values[f"{server}:{SUM}"] = int(latency.seconds * 1e6)
        return values

    def _counted(self, values: dict[str, int]) -> dict[str, tuple[int, int]]:
        """Those that Redis has not been told, with what it was told."""
        told = self._told
        return {name: (told.get(name, 0), n) for name, n in values.items() if n > told.get(name, 0)}

    def _minute(self) -> int:
        return int(self._now() // _MINUTE)

    def _now(self) -> float:
        return self._clock.time() + self._ahead

    # -- reading -------------------------------------------------------------------------------------------------

    def totals(self) -> Totals:
        """The sums over all processes. They never decrease, unless Redis loses its data.

        While Redis is away: the totals that any process last read there, and the counts of all processes since, from
        PostgreSQL. Where that has none: those of this process; `backend` says which. Raises nothing.
        """
        notice_fork()
        if self._redis is not None:
            if self._postgres is not None:
                self._merge()
            try:
                totals = self._redis.totals()
            except BackendError:
                pass
            else:
                self._keep(totals)
                return _totals(totals, "redis")
        kept, rows = self._in_postgres() or (None, [])
        if kept is not None:
            return _totals(_summed([kept, *(counts for _, counts in rows)]), "postgres")
        mine = {name: now - told for name, (told, now) in self._counted(self._values()).items()}
        return _totals(_summed([self._known or self._told, mine]), "memory")

    def _keep(self, totals: dict[str, int]) -> None:
        """A process that reads the totals while Redis is away must find no smaller ones."""
        self._known = totals
        if self._postgres is not None and totals:
            try:
                self._postgres.keep_totals(totals)
            except (BackendError, ConfigurationError):
                pass

    def minutes(self, since: datetime, until: datetime) -> list[Minute]:
        """The minutes in which anything was counted, oldest first: of the last 26 hours at most.

        While Redis is away: what this process read there before, and what processes have counted since. Raises nothing.
        """
        notice_fork()
        now = self._now()
        first = int(max(since.timestamp(), now - KEPT) // _MINUTE)
        numbers = range(first, int(min(until.timestamp(), now) // _MINUTE) + 1)
        found = self._read_minutes(numbers)
        return [
            Minute(datetime.fromtimestamp(n * _MINUTE, timezone.utc), *split(found[n])) for n in numbers if found.get(n)
        ]

    def recent(self) -> Recent:
        """The counts of the last minute, hour and day. Raises nothing; while Redis is away see `minutes`."""
        notice_fork()
        this = self._minute()
        minutes, hours = range(this - 60, this + 1), range(this // 60 - 24, this // 60 + 1)
        if self._redis is not None:
            try:
                of_minutes, of_hours = self._redis.minutes_and_hours(minutes, hours)
                spans = of_minutes[-2:], of_minutes, of_hours
                return Recent(*(Totals(*split(_summed(span))) for span in spans))
            except BackendError:
                pass
        found = self._read_minutes(range(this - KEPT // _MINUTE, this + 1))
        last = [_summed(found.get(n, {}) for n in range(this - span, this + 1)) for span in (1, 60, 1440)]
        backend: Literal["postgres", "memory"] = "memory" if self._postgres is None else "postgres"
        return Recent(*(Totals(*split(values), backend) for values in last))

    def outages(self, since: datetime, until: datetime) -> list[Outage]:
        """The outages of this time, oldest first: one where several processes noticed it. Raises nothing."""
        notice_fork()
        earliest = round((since.timestamp() - 86_400) * 1e6)
        records: dict[tuple[str, str, int], OutageRecord] = {}
        if self._redis is not None:
            try:
                records.update({each.identity: each for each in self._redis.outages(earliest)})
            except BackendError:
                pass
        if self._postgres is not None:
            try:
                for each in self._postgres.outages(earliest, _OUTAGES):
                    held = records.get(each.identity)
                    if held is None or held.changed < each.changed:
                        records[each.identity] = each
            except (BackendError, ConfigurationError):
                pass
        records.update({each.identity: each for _, each in self._log.records(self.process)})
        found = joined(records.values(), self._clock.time())
        return [each for each in found if each.began <= until and (each.ended is None or each.ended >= since)]

    def _read_minutes(self, numbers: range) -> dict[int, dict[str, int]]:
        if self._redis is not None:
            try:
                read = dict(zip(numbers, self._redis.minutes(numbers), strict=True))
            except BackendError:
                pass
            else:
                seen = {**self._seen, **{n: values for n, values in read.items() if values}}
                oldest = self._minute() - KEPT // _MINUTE
                self._seen = {n: values for n, values in seen.items() if n >= oldest}
                return read
        held = self._in_postgres()
        if held is None:
            rows = _by_minutes(
                AccountRow(self.process, m, self._counted(v)) for m, v in sorted(dict(self._minutes).items())
            )
        else:
            rows = held[1]
        found = {n: dict(values) for n, values in self._seen.items()}
        for minute, counts in rows:
            found[minute] = _summed([found.get(minute, {}), counts])
        return found

    def _in_postgres(self) -> tuple[dict[str, int] | None, list[tuple[int, dict[str, int]]]] | None:
        """The totals kept there, and by minute what all processes have counted since; None: it is away."""
        if self._postgres is None:
            return None
        self.flush()
        try:
            kept, rows = self._postgres.read()
        except (BackendError, ConfigurationError):
            return None
        return kept, _by_minutes(rows)


def _by_minutes(rows: Iterable[AccountRow]) -> list[tuple[int, dict[str, int]]]:
    """The counts of each minute. Rows, by process and minute, have counts since the process began."""
    found, process, before = [], "", dict[str, int]()
    for row in rows:
        if row.process != process:
            process, before = row.process, {}
        counts = {name: now - max(before.get(name, 0), told) for name, (told, now) in row.counted.items()}
        before.update({name: now for name, (_, now) in row.counted.items()})
        found.append((row.minute, {name: n for name, n in counts.items() if n > 0}))
    return found


def _summed(several: Iterable[dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for values in several:
        for name, n in values.items():
            sums[name] = sums.get(name, 0) + n
    return sums


def _totals(values: dict[str, int], backend: Literal["redis", "postgres", "memory"]) -> Totals:
    since = values.get(SINCE)
    return Totals(*split(values), backend, None if since is None else instant(since))
