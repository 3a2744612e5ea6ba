"""PostgresSessionBackend: a session is a row, and Redis is a cache of rows.

While Redis is away the rows answer. While PostgreSQL is away, what Redis has is believed, fresh or not, and a change
raises BackendUnavailable. A binding that another client made in Redis alone is adopted by the row, if it is newer: see
SessionRow.is_older.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import timedelta

from ..._context import Context
from ..._pool import PoolExhausted
from ...errors import BackendUnavailable
from ...keys import is_text
from ..binding import (
    NO_END,
    BindRequest,
    SessionBinding,
    SessionRecord,
    Unreadable,
    UpdateBase,
    later,
    microseconds,
    same_binding,
    touch_is_due,
    unreadable,
)
from ..parity import SessionParity
from .backend import PrimarySessionBackend, SessionBackend
from .row_cache import ANY, COPIES, CacheEntry, FillLease, Replaced, RowCache, of_agent, same
from .rows import Predecessor, SessionRow, SessionRows
from .verify import compare

#: How often a row or a record may change while it is looked up, or bound.
_TRIES = 5
#: A record of more bytes than that is not adopted.
_LARGEST = 256 * 1024


class PostgresSessionBackend(PrimarySessionBackend):
    """The primary where there is a PostgreSQL.

    Args:
        cache: None: without Redis (REDIS_ENABLED=0).
    """

    def __init__(self, context: Context, rows: SessionRows, *, cache: RowCache | None) -> None:
        self._rows = rows
        self._cache = cache
        self._counters = context.counters

    def bind(self, request: BindRequest) -> tuple[SessionBinding, bool]:
        if request.if_absent:  # a client without rows may have bound it
            held = self.get(request.session_id, 0)
            if held is not None:
                return held, True
        started = self._rows.started()
        for _ in range(_TRIES):
            lease, before, seen = self._lease_to_bind(request)
            outcome, row = self._rows.bind(request, started, before)
            if outcome == "overtaken":
                return request.binding("postgres", request.ends_at()), False
            if lease is None or self._cache is None:
                break
            copied = self._cache.fill_bound(request, row, lease, seen)
            if copied is not None:
                return row.binding(request.session_id, "redis" if copied else "postgres"), True
            if request.if_absent:
                return self.get(request.session_id, 0) or row.binding(request.session_id, "postgres"), True
            # Bind over the binding that came meanwhile: else it is the newer one. The row has this time already.
            request = request._replace(bound_at=request.bound_at + timedelta(microseconds=1))
        return row.binding(request.session_id, "postgres"), True

    def get(self, session_id: str, touch: int) -> SessionBinding | None:
        if self._cache is not None:
            try:
                found = self._cache.read(session_id)
            except BackendUnavailable:
                self._counters.add("sessions.degraded.postgres")
            else:
                if found.record is not None and found.believed:
                    binding = self._touched(self._cache, found.record, touch) if touch else found.record.binding
                    if binding is not None:
                        return binding
                return self._look_up(self._cache, found, session_id, touch)
        return self._answer(self._rows.get(session_id), session_id, touch)

    def read_for_update(self, session_id: str) -> UpdateBase | None:
        binding = self.get(session_id, 0)
        if binding is None:
            return None
        row = self._rows.get(session_id)
        if row is not None and not row.revoked:
            held = row.binding(session_id, "postgres")
            if same_binding(held, binding):
                # If touches did not reach the row, its copy ends later.
                return UpdateBase(replace(held, expires_at=later(binding.expires_at, held.expires_at)), row)
        without_row = self._read_without_row(session_id)
        # Neither: it has changed since it was looked up, and `compare_and_set` says so.
        return UpdateBase(binding, None) if without_row is None else without_row

    def compare_and_set(self, base: UpdateBase, data: str | None) -> SessionBinding | None:
        session_id = base.binding.session_id
        if base.state is None:
            return None
        if isinstance(base.state, SessionRecord):
            return None if self._cache is None else self._cache.records.compare_and_set(base, data)
        lease = self._lease_to_change(session_id)
        row = self._rows.change(session_id, base.state.version, data)
        if row is None:
            return None
        row = row.until(later(base.binding.expires_at, row.expires_at))
        if self._cache is None:
            return row.binding(session_id, "postgres")
        if lease is None:
            self._cache.drop({session_id: row.version}, COPIES)  # or the outbox relay does, before Redis is used
            return row.binding(session_id, "postgres")
        copied = self._cache.fill(session_id, row, lease, COPIES)
        return row.binding(session_id, "redis" if copied else "postgres")

    def unbind(self, session_id: str) -> bool:
        alive, version = self._rows.unbind(session_id)
        assert version is not None  # which only a late revocation has not
        return bool(self._drop({session_id: version}, ANY)) or alive

    def for_agent(self, agent_id: str) -> list[str]:
        try:
            alive, over = self._rows.for_agent(agent_id)
            return sorted({*alive, *(self._extended(over) or ())})
        except PoolExhausted:
            raise
        except BackendUnavailable:
            if self._cache is None:
                raise
            found = self._cache.records.for_agent(agent_id)
            self._counters.add("sessions.degraded.unguarded")
            return found

    def unbind_agent(self, agent_id: str) -> int:
        ended, lived = self._rows.unbind_agent(agent_id)
        lived |= self._drop(ended, of_agent(agent_id))
        others, is_told = self._unbind_others(agent_id, ended)
        if not is_told:  # then no row adopts what is left there; rows that have done so meanwhile end now
            self._rows.untold_agent(agent_id)
            ended, more = self._rows.unbind_agent(agent_id)
            lived |= more | self._drop(ended, of_agent(agent_id))
        return len(lived) + others

    def stand_in(self) -> SessionBackend | None:
        return None if self._cache is None else self._cache.records

    def purge(self) -> int:
        return self._rows.purge(self._extended)

    def verify(self) -> SessionParity:
        return super().verify() if self._cache is None else compare(self._rows, self._cache)

    # -- inside --------------------------------------------------------------------------------------------------

    def _lease_to_bind(self, request: BindRequest) -> tuple[FillLease | None, Predecessor, bytes | None]:
        if self._cache is not None:
            try:
                return self._cache.lease_to_bind(request)
            except BackendUnavailable:
                self._counters.add("sessions.degraded.postgres")
        return None, Predecessor(), None

    def _read_without_row(self, session_id: str) -> UpdateBase | None:
        """The session as a client without rows has bound it."""
        if self._cache is not None:
            try:
                found = self._cache.records.read_for_update(session_id)
            except BackendUnavailable:
                self._counters.add("sessions.degraded.postgres")
            else:
                return found if found is not None and found.state.stamp is None else None
        return None

    def _lease_to_change(self, session_id: str) -> FillLease | None:
        if self._cache is not None:
            try:
                return self._cache.lease(session_id, self._cache.epoch(session_id), time.monotonic())
            except BackendUnavailable:
                self._counters.add("sessions.degraded.postgres")
        return None

    def _touched(self, cache: RowCache, record: SessionRecord, touch: int) -> SessionBinding | None:
        """The binding of a record that is believed; None if its row has ended."""
        if record.stamp is not None and touch_is_due(record.ttl_ms, touch):
            try:
                if self._rows.touch(record.binding.session_id, record.stamp.version, touch) is None:
                    return None
            except BackendUnavailable:  # a later touch comes to the row
                self._counters.add("sessions.degraded.unguarded")
        return cache.records.touched(record, touch)

    def _look_up(self, cache: RowCache, found: CacheEntry, session_id: str, touch: int) -> SessionBinding | None:
        """Ask the row, whatever Redis has, and correct Redis. A session that neither has leaves nothing behind."""
        row: SessionRow | None = None
        for _ in range(_TRIES):
            asked_at = time.monotonic()
            try:
                row = self._rows.get(session_id)
            except PoolExhausted:
                raise  # PostgreSQL is not away, and alone says whether the record counts
            except BackendUnavailable:
                if found.record is not None:
                    return self._unguarded(cache, found.record, touch)
                if cache.mark(session_id):
                    return None  # revoked while PostgreSQL was away
                raise
            record, stood = found.record, 0
            if record is not None and record.stamp is None and row is not None:
                try:
                    raw, stood = cache.stood(session_id)
                except BackendUnavailable:
                    self._counters.add("sessions.degraded.postgres")
                    break
                if raw != record.raw:
                    found = cache.read(session_id)
                    continue
            if (
                record is None
                or record.stamp is not None
                or (row is not None and not row.is_older(record.binding, stood, found.epoch))
            ):
                return self._by_row(cache, found, row, session_id, touch, asked_at)
            if not _adoptable(record):
                cache.believe(record, found.epoch)
                return cache.records.touched(record, touch) if touch else record.binding
            try:
                row = self._rows.adopt(record, row)
            except PoolExhausted:
                raise
            except BackendUnavailable:  # it could be read: perhaps it is read-only
                return self._unguarded(cache, record, touch)
            if row is not None:
                return self._by_adopted(cache, found, record, row, touch, asked_at)
            found = cache.read(session_id)  # the row is another by now
        return self._answer(row, session_id, touch)

    def _unguarded(self, cache: RowCache, record: SessionRecord, touch: int) -> SessionBinding:
        """Redis's answer, without PostgreSQL."""
        self._counters.add("sessions.degraded.unguarded")
        return cache.records.touched(record, touch) if touch else record.binding

    def _by_adopted(
        self, cache: RowCache, found: CacheEntry, record: SessionRecord, row: SessionRow, touch: int, asked_at: float
    ) -> SessionBinding | None:
        """The answer of a row that has just adopted the record; its copy takes the record's place."""
        session_id = record.binding.session_id
        slid = self._slid(row, session_id, touch) if touch else row
        if slid is None:
            return None
        try:
            lease = cache.lease(session_id, found.epoch, asked_at, record)
        except BackendUnavailable:
            self._counters.add("sessions.degraded.postgres")
        else:
            cache.fill(session_id, slid, lease, same(record.raw), keeps_ttl=slid is row)
        return slid.binding(session_id, "redis")

    def _by_row(
        self, cache: RowCache, found: CacheEntry, row: SessionRow | None, session_id: str, touch: int, asked_at: float
    ) -> SessionBinding | None:
        """The row's answer, where Redis has nothing newer."""
        record = found.record
        if row is not None and record is not None:
            row = self._as_late(row, record)
        if row is None or not row.alive:
            if row is None and found.raw is not None and record is None:
                raise unreadable(session_id)
            if record is not None:
                versions = row.version if row else 0, record.stamp.version if record.stamp else 0
                cache.drop({session_id: max(versions)}, same(record.raw))
            return None
        try:
            lease = cache.lease(session_id, found.epoch, asked_at)
        except BackendUnavailable:
            self._counters.add("sessions.degraded.postgres")
            return self._answer(row, session_id, touch)
        if lease.mark >= microseconds(row.changed_at):
            # It was revoked while PostgreSQL was away, by a process that has not told yet.
            with contextlib.suppress(BackendUnavailable):  # if it can be read and not written, the mark stands
                self.unbind(session_id)
            return None
        slid = self._slid(row, session_id, touch) if touch else row
        if slid is None:
            return None
        cache.fill(session_id, slid, lease, same(found.raw))
        return slid.binding(session_id, "postgres")

    def _answer(self, row: SessionRow | None, session_id: str, touch: int) -> SessionBinding | None:
        """The row's answer, without Redis."""
        if row is not None and touch and row.alive:
            row = self._slid(row, session_id, touch)
        return row.binding(session_id, "postgres") if row is not None and row.alive else None

    def _slid(self, row: SessionRow, session_id: str, touch: int) -> SessionRow | None:
        """The row with its whole TTL again, if a tenth of that has passed; None if it has ended."""
        if not touch_is_due(row.left_ms, touch):
            return row
        try:
            return self._rows.touch(session_id, row.version, touch)
        except BackendUnavailable:  # it could be read: perhaps it is read-only; a later touch comes to it
            self._counters.add("sessions.degraded.unguarded")
            return row

    def _as_late(self, row: SessionRow, record: SessionRecord) -> SessionRow:
        """The row, with the end of its record if that is later: touches made while PostgreSQL was away count, and so
        does an EXPIRE of the async service's.
        """
        is_its = row.binds(record.binding) if record.stamp is None else record.stamp.version == row.version
        endless = record.ttl_ms == NO_END
        if row.revoked or row.left_ms is None or not is_its or not (endless or record.ttl_ms > row.left_ms):
            return row
        if endless or not row.alive or record.ttl_ms - row.left_ms > self._rows.ttl_ms / 10:
            try:
                return self._rows.touch(record.binding.session_id, row.version, record.ttl_ms) or row
            except BackendUnavailable:  # a later look comes to it
                self._counters.add("sessions.degraded.unguarded")
        return row.until(record.binding.expires_at)

    def _drop(self, versions: Mapping[str, int], over: Replaced) -> set[str]:
        """Sessions were revoked: delete what Redis has of them. Returns those that it had something of."""
        if self._cache is None:
            return set()
        dropped, untold = self._cache.drop(versions, over)
        by_epoch: dict[int, dict[str, int]] = {}
        for sid in untold:
            by_epoch.setdefault(self._cache.last_epoch(sid), {})[sid] = versions[sid]
        for epoch, some in by_epoch.items():
            if epoch:
                with contextlib.suppress(BackendUnavailable):  # without that note the clocks decide
                    self._rows.untold(some, epoch)
        return dropped

    def _unbind_others(self, agent_id: str, ended: Mapping[str, int]) -> tuple[int, bool]:
        """End the agent's other sessions that Redis has. Returns how many, and whether it was told of all."""
        if self._cache is None:
            return 0, False  # other processes may have a Redis
        records = self._cache.records
        try:
            others, failed = records.unbind_of(agent_id, [sid for sid in records.named(agent_id) if sid not in ended])
        except Unreadable:
            return 0, False  # the index names no session, and is counted; our rows have ended
        except BackendUnavailable:
            self._counters.add("sessions.degraded.postgres")
            return 0, False
        if isinstance(failed, BackendUnavailable):
            self._counters.add("sessions.degraded.postgres")
        elif failed is not None:
            raise failed
        # If a row had not adopted it yet, the row's binding was over before.
        rows = self._rows.get_many(others) if others else {}
        for session_id in rows:
            _, version = self._rows.unbind(session_id)
            assert version is not None  # which only a late revocation has not
            self._drop({session_id: version}, COPIES)
        return len(others), failed is None

    def _extended(self, versions: Mapping[str, int]) -> Collection[str] | None:
        """Extend the rows of sessions that live on, since the async service has extended their copies alone.

        Returns these sessions; None: Redis is away.
        """
        if self._cache is None or not versions:
            return ()
        try:
            living = self._cache.living(versions)
        except BackendUnavailable:
            self._counters.add("sessions.degraded.postgres")
            return None
        for session_id, left_ms in living.items():
            self._rows.touch(session_id, versions[session_id], left_ms)
        return living


def _adoptable(record: SessionRecord) -> bool:
    """Can a row hold it?"""
    binding = record.binding
    return is_text(binding.agent_id) and len(record.raw) <= _LARGEST and 1970 <= binding.bound_at.year < 9000
