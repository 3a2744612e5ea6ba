"""Sessions as rows in PostgreSQL; see schema/0005_sessions.sql."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from ..keys import Keys
from .binding import Order, SessionBinding

if TYPE_CHECKING:
    from ..postgres import Postgres

_COLUMNS = (
    "agent, bound_at, changed_at, expires_at, bind_count, data, revoked, version,"
    " round(extract(epoch FROM expires_at - clock_timestamp()) * 1000)"
)
#: Rows changed by one statement, at most: each has its deadline.
_AT_ONCE = 1000


class SessionRow(NamedTuple):
    """A row. `data` is JSON, `changed_at` is when it was bound or revoked, `left_ms` the milliseconds until it ends."""

    agent_id: str
    bound_at: datetime
    changed_at: datetime
    expires_at: datetime
    bind_count: int
    data: str | None
    revoked: bool
    version: int
    left_ms: int

    def until(self, expires_at: datetime) -> SessionRow:
        """The row, ending then instead."""
        more = (expires_at - self.expires_at) // timedelta(milliseconds=1)
        return self._replace(expires_at=expires_at, left_ms=self.left_ms + more)

    @property
    def alive(self) -> bool:
        return not self.revoked and self.left_ms > 0

    def binding(self, session_id: str, backend: str) -> SessionBinding:
        data = None if self.data is None else json.loads(self.data)
        return SessionBinding(session_id, self.agent_id, self.bound_at, self.expires_at, self.bind_count, data, backend)


class SessionRows:
    """The table govredis_sessions. Every method raises BackendUnavailable when PostgreSQL is away, and
    ConfigurationError when `govredis migrate` has not been run.
    """

    def __init__(self, keys: Keys, postgres: Postgres, *, ttl: float) -> None:
        self._keys = keys
        self._postgres = postgres
        self._ttl = timedelta(seconds=ttl)

    def started(self) -> int:
        """What tells `bind` of revocations made since now."""
        return int(self._postgres.fetch("SELECT nextval('govredis_versions')")[0][0])

    def bind(self, order: Order, started: int | None, counted: int = 0) -> tuple[str, SessionRow]:
        """'bound', 'held' or 'overtaken', and the row; see the function's comment."""
        sql = (
            f"SELECT outcome, {_COLUMNS} FROM govredis_session_bind(%s, %s, %s, %s, %s, %s, %s, %s) answer,"
            " LATERAL (SELECT (answer.held).*) row"
        )
        params = (
            self._keys.session_row(order.session_id),
            self._keys.agent_row(order.agent_id),
            order.bound_at,
            timedelta(milliseconds=order.ttl_ms),
            order.data,
            order.if_absent,
            started,
            counted,
        )
        ((outcome, *row),) = self._postgres.fetch(sql, params)
        return outcome, self._row(row)

    def get(self, session_id: str) -> SessionRow | None:
        """The session's row, also one that was revoked or has ended."""
        return self.get_many([session_id]).get(session_id)

    def get_many(self, session_ids: Sequence[str]) -> dict[str, SessionRow]:
        rows = self._postgres.fetch(
            f"SELECT session, {_COLUMNS} FROM govredis_sessions WHERE session = ANY(%s)",
            ([self._keys.session_row(sid) for sid in session_ids],),
        )
        return {self._name(session): self._row(row) for session, *row in rows}

    def due(self, ttl_ms: int) -> bool:
        """Is a touch worth it for what has so much left: has a tenth of the TTL passed?"""
        return 0 <= ttl_ms <= 0.9 * self._ttl / timedelta(milliseconds=1)

    def touch(self, session_id: str, version: int) -> datetime | None:
        """Give a session its whole TTL again. Returns when it ends now; None if it has ended.

        Args:
            version: of a living copy; where the row is still that, it has only missed touches.
        """
        rows = self._postgres.fetch(
            "UPDATE govredis_sessions SET expires_at = greatest(expires_at, clock_timestamp() + %s)"
            " WHERE session = %s AND NOT revoked AND (expires_at > clock_timestamp() OR version = %s)"
            " RETURNING expires_at",
            (self._ttl, self._keys.session_row(session_id), version),
        )
        return _utc(rows[0][0]) if rows else None

    def unbind(self, session_id: str, at: datetime | None = None) -> tuple[bool, int]:
        """Whether it was alive, and the version of its revocation."""
        ((alive, version),) = self._postgres.fetch(
            "SELECT * FROM govredis_session_unbind(%s, %s, %s)", (self._keys.session_row(session_id), self._ttl, at)
        )
        return alive, version

    def unbind_agent(self, agent_id: str, at: datetime | None = None) -> tuple[dict[str, int], int]:
        """The sessions that are revoked, with the versions of their revocations; and how many of them were alive."""
        ended: dict[str, int] = {}
        count = 0
        while True:
            rows = self._postgres.fetch(
                "SELECT * FROM govredis_session_unbind_agent(%s, %s, %s)",
                (self._keys.agent_row(agent_id), at, _AT_ONCE),
            )
            ended.update((self._name(session), version) for session, version, _ in rows)
            count += sum(alive for *_, alive in rows)
            if len(rows) < _AT_ONCE:
                return ended, count

    def for_agent(self, agent_id: str) -> list[str]:
        rows = self._postgres.fetch(
            "SELECT session FROM govredis_sessions WHERE agent = %s AND NOT revoked AND expires_at > clock_timestamp()",
            (self._keys.agent_row(agent_id),),
        )
        return sorted(self._name(session) for (session,) in rows)

    def after(self, session_id: str | None, limit: int) -> dict[str, SessionRow]:
        """The next of our prefix's rows, in their order, after that one; None: the first."""
        prefix = self._keys.prefix
        rows = self._postgres.fetch(
            f"SELECT session, {_COLUMNS} FROM govredis_sessions"
            " WHERE session > %s AND starts_with(session, %s) ORDER BY session LIMIT %s",
            ("" if session_id is None else prefix + session_id, prefix, limit),
        )
        return {self._name(session): self._row(row) for session, *row in rows}

    def purge(self) -> int:
        """Delete the rows of sessions that have been over for a TTL, a few at a time, and the generations that no bind
        can be older than. Returns how many rows of sessions."""
        deleted = 0
        while True:
            ((some,),) = self._postgres.fetch(
                "WITH ended AS (DELETE FROM govredis_sessions WHERE session IN ("
                " SELECT session FROM govredis_sessions WHERE expires_at < clock_timestamp() - %s"
                " LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING 1) SELECT count(*) FROM ended",
                (self._ttl, _AT_ONCE),
            )
            deleted += int(some)
            if some < _AT_ONCE:
                break
        self._postgres.fetch(
            "DELETE FROM govredis_session_agents WHERE revoked_at < clock_timestamp() - interval '1 day'"
        )
        return deleted

    # -- inside --------------------------------------------------------------------------------------------------

    def _name(self, session: str) -> str:
        return session[len(self._keys.prefix) :]

    def _row(self, row: Sequence[Any]) -> SessionRow:
        agent, bound_at, changed_at, expires_at, bind_count, data, revoked, version, left_ms = row
        agent_id = agent[len(self._keys.prefix) :]
        ours = _utc(bound_at), _utc(changed_at), _utc(expires_at)
        return SessionRow(agent_id, *ours, bind_count, data, revoked, version, int(left_ms))


def _utc(at: datetime) -> datetime:
    return at.astimezone(timezone.utc)
