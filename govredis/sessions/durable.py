"""Sessions whose record is a row in PostgreSQL, with Redis as the cache of the rows.

While Redis is away the rows answer. While PostgreSQL is away, what Redis has is believed, guard or not, and a change
raises BackendUnavailable; what others then change in Redis alone counts where it is newer than the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._counters import Counters
from ..errors import BackendUnavailable
from .binding import Order, Record, SessionBinding, microseconds
from .copies import Copies, Lease
from .local import Debt
from .postgres_store import SessionRow, SessionRows


class DurableSessions:
    """See stores.Sessions.

    Args:
        copies: None: without Redis (REDIS_ENABLED=0).
    """

    def __init__(self, rows: SessionRows, copies: Copies | None, *, counters: Counters) -> None:
        self._rows = rows
        self._copies = copies
        self._counters = counters

    def bind(self, order: Order) -> tuple[SessionBinding, bool]:
        if order.if_absent:  # also what somebody without a row has bound
            held = self.get(order.session_id, False)
            if held is not None:
                return held, True
        started = self._rows.started()
        lease, counted = self._lease_to_bind(order)
        outcome, row = self._rows.bind(order, started, counted)
        if outcome == "overtaken":
            return order.binding("postgres"), False
        if lease is None or self._copies is None:
            return row.binding(order.session_id, "postgres"), True
        copied = self._copies.fill(order.session_id, row, lease, None)
        return row.binding(order.session_id, "redis" if copied else "postgres"), True

    def get(self, session_id: str, touch: bool) -> SessionBinding | None:
        record, lease = None, None
        if self._copies is not None:
            try:
                record, believed = self._copies.read(session_id)
                if record is not None and believed:
                    binding = self._touched(self._copies, record) if touch else record.binding
                    if binding is not None:
                        return binding
                lease = self._copies.lease(session_id)
            except BackendUnavailable:
                self._counters.add("sessions.degraded.postgres")
        if self._copies is None or lease is None:
            row = self._rows.get(session_id)
            if row is not None and touch and row.alive:
                row = self._slid(row, session_id)
            return row.binding(session_id, "postgres") if row is not None and row.alive else None
        return self._look_up(self._copies, lease, session_id, record, touch)

    def unbind(self, session_id: str) -> bool:
        alive, version = self._rows.unbind(session_id)
        return bool(self._drop(session_id, version)) or alive

    def for_agent(self, agent_id: str) -> list[str]:
        try:
            return self._rows.for_agent(agent_id)
        except BackendUnavailable:
            if self._copies is None:
                raise
            found = self._copies.sessions.for_agent(agent_id)
            self._counters.add("sessions.degraded.unguarded")
            return found

    def unbind_agent(self, agent_id: str) -> int:
        ended, count = self._rows.unbind_agent(agent_id)
        return count + self._drop_of_agent(agent_id, ended)

    def tell_unbound(self, debts: Sequence[Debt]) -> None:
        for session_id, token in debts:
            _, version = self._rows.unbind(session_id, token.at)
            self._drop(session_id, version)

    def tell_agent_unbound(self, debt: Debt) -> None:
        agent_id, token = debt
        ended, _ = self._rows.unbind_agent(agent_id, token.at)
        self._drop_of_agent(agent_id, ended)

    def tell_bound(self, debts: Sequence[tuple[Debt, Order]]) -> list[SessionBinding | None]:
        return [self._tell_bound(order) for _, order in debts]

    # -- inside --------------------------------------------------------------------------------------------------

    def _lease_to_bind(self, order: Order) -> tuple[Lease | None, int]:
        if self._copies is not None:
            try:
                return self._copies.lease_to_bind(order)
            except BackendUnavailable:
                self._counters.add("sessions.degraded.postgres")
        return None, 0

    def _touched(self, copies: Copies, record: Record) -> SessionBinding | None:
        """The binding of a record that is believed; None if its row has ended."""
        if record.stamp is not None and self._rows.due(record.ttl_ms):
            try:
                if self._rows.touch(record.binding.session_id, record.stamp.version) is None:
                    return None
            except BackendUnavailable:  # the row's turn comes with a later touch
                self._counters.add("sessions.degraded.unguarded")
        return copies.sessions.touched(record)

    def _look_up(
        self, copies: Copies, lease: Lease, session_id: str, record: Record | None, touch: bool
    ) -> SessionBinding | None:
        """Ask the row, whatever Redis has; and put that right."""
        try:
            row = self._rows.get(session_id)
        except BackendUnavailable:
            if record is not None:
                self._counters.add("sessions.degraded.unguarded")
                return copies.sessions.touched(record) if touch else record.binding
            if lease.mark:
                return None  # revoked while PostgreSQL was away
            raise
        if record is not None and record.stamp is None and (row is None or record.binding.bound_at > row.changed_at):
            copies.vouch(record, lease)
            return copies.sessions.touched(record) if touch else record.binding
        if row is not None and row.alive and lease.mark >= microseconds(row.changed_at):
            self.unbind(session_id)  # whoever revoked it while PostgreSQL was away has not told yet
            return None
        if row is not None and record is not None:
            row = _as_late(row, record)
        version = 0 if row is None else row.version
        if row is not None and touch and row.alive:
            row = self._slid(row, session_id)
        if row is not None and row.alive:
            copies.fill(session_id, row, lease, b"" if record is None else record.raw)
            return row.binding(session_id, "postgres")
        if record is not None:
            copies.drop({session_id: max(version, record.stamp.version if record.stamp else 0)}, record.raw)
        return None

    def _slid(self, row: SessionRow, session_id: str) -> SessionRow | None:
        """The row with its whole TTL again, if a tenth of that has passed; None if it has ended."""
        if not self._rows.due(row.left_ms):
            return row
        expires_at = self._rows.touch(session_id, row.version)
        return None if expires_at is None else row.until(expires_at)

    def _tell_bound(self, order: Order) -> SessionBinding | None:
        outcome, row = self._rows.bind(order._replace(if_absent=True), None)
        mine = (row.agent_id, row.bound_at) == (order.agent_id, order.bound_at)
        return row.binding(order.session_id, "postgres") if outcome == "held" and not mine else None

    def _drop_of_agent(self, agent_id: str, ended: Mapping[str, int]) -> int:
        """End the copies of these, and whatever else Redis has of the agent's. Returns how many the latter were."""
        if self._copies is None:
            return 0
        self._copies.drop(ended)
        redis = self._copies.sessions
        try:
            return redis.unbind_of(agent_id, [sid for sid in redis.named(agent_id) if sid not in ended])
        except BackendUnavailable:
            self._counters.add("sessions.degraded.postgres")
            return 0

    def _drop(self, session_id: str, version: int) -> int:
        return 0 if self._copies is None else self._copies.drop({session_id: version})


def _as_late(row: SessionRow, record: Record) -> SessionRow:
    """The row, ending when a copy of it does if that is later: touches that came while PostgreSQL was away count."""
    expires_at = record.binding.expires_at
    same = record.stamp is not None and record.stamp.version == row.version
    if same and expires_at is not None and record.ttl_ms > row.left_ms:
        return row._replace(expires_at=expires_at, left_ms=record.ttl_ms)
    return row
