"""Sessions as rows in PostgreSQL; see schema/0005_sessions.sql and 0014_newest_binding.sql."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from ..._context import Context
from ...keys import is_text
from ..binding import NO_END, BindRequest, SessionBinding, SessionRecord, members_of
from ..pending import AgentRevocation, Revocation

if TYPE_CHECKING:
    from ...postgres import Postgres

_COLUMNS = (
    "agent, bound_at, changed_at, nullif(expires_at, 'infinity'), bind_count, data, revoked, version,"
    " CASE WHEN expires_at < 'infinity' THEN round(extract(epoch FROM expires_at - clock_timestamp()) * 1000) END,"
    " members, coalesce(since_version, version), ended, untold_in"
)
#: The most rows that one statement changes: every statement has its deadline.
_AT_ONCE = 1000
#: A session that has more than 300 years left has no end. In milliseconds.
_LONGEST_MS = 300 * 366 * 24 * 3600 * 1000


class SessionRow(NamedTuple):
    """A session's row.

    Attributes:
        changed_at: when it was bound or revoked.
        expires_at: None: it has no end.
        data: JSON.
        left_ms: the milliseconds until its end; None: it has none.
        members: the async service's own members, a JSON object.
        since, ended, untold_in: see schema/0014_newest_binding.sql.
    """

    agent_id: str
    bound_at: datetime
    changed_at: datetime
    expires_at: datetime | None
    bind_count: int
    data: str | None
    revoked: bool
    version: int
    left_ms: int | None
    members: str | None
    since: int
    ended: str | None
    untold_in: int | None

    def until(self, expires_at: datetime | None) -> SessionRow:
        """The row with another end."""
        if expires_at is None or self.expires_at is None or self.left_ms is None:
            return self._replace(expires_at=None, left_ms=None)
        more = (expires_at - self.expires_at) // timedelta(milliseconds=1)
        return self._replace(expires_at=expires_at, left_ms=self.left_ms + more)

    @property
    def alive(self) -> bool:
        return not self.revoked and (self.left_ms is None or self.left_ms > 0)

    def binds(self, binding: SessionBinding) -> bool:
        """Does the row come from that binding, revoked or not?"""
        return (self.agent_id, self.bound_at) == (binding.agent_id, binding.bound_at)

    def is_older(self, binding: SessionBinding, stood: int, epoch: int) -> bool:
        """Is the row older than a binding of the async service's in Redis?

        It is, if the row had stood at the key, or had ended there, before that binding came. If Redis was not told of
        the row's revocation, the revoked binding had stood there, unless Redis has lost data since. Else the clocks
        decide.

        Args:
            stood: the newest version known to have stood there before it.
            epoch: the freshness lease's, now.
        """
        if self.binds(binding):
            # The same binding, perhaps with other data; but a revoked one does not come back.
            return not self.revoked and stood >= self.version
        if self.ended == "agent" and self.agent_id != binding.agent_id:
            return stood >= self.since or binding.bound_at > self.bound_at
        is_told = self.revoked and self.ended != "late" and self.untold_in != epoch
        # An adopted row's changed_at is its adoption: a binding that came before that, and was not seen yet, is newer.
        at = self.changed_at if self.revoked else self.bound_at
        return stood >= (self.version if is_told else self.since) or binding.bound_at > at

    def binding(self, session_id: str, backend: str) -> SessionBinding:
        data = None if self.data is None else json.loads(self.data)
        return SessionBinding(session_id, self.agent_id, self.bound_at, self.expires_at, self.bind_count, data, backend)


class Predecessor(NamedTuple):
    """The value that stands in Redis before a bind.

    Attributes:
        counted: how often a client without rows has bound it; 0 for a copy of a row.
        copied: the row's version, for a copy.
        left_ms: the milliseconds that it has left; NO_END; or None, where that does not matter.
        members: its foreign members.
    """

    counted: int = 0
    copied: int | None = None
    left_ms: int | None = None
    members: str | None = None


#: There is none.
NOTHING = Predecessor()


class SessionRows:
    """The table govredis_sessions. Every method raises BackendUnavailable when PostgreSQL is away, and
    ConfigurationError when `govredis migrate` has not been run.
    """

    def __init__(self, context: Context, postgres: Postgres) -> None:
        self._keys = context.keys
        self._postgres = postgres
        self._ttl = timedelta(seconds=context.config.session_ttl)
        self.ttl_ms: int = int(context.config.session_ttl * 1000)

    def started(self) -> int:
        """A number by which `bind` knows the revocations that were made since now."""
        return int(self._postgres.fetch("SELECT nextval('@schema@.govredis_versions')")[0][0])

    def bind(self, request: BindRequest, started: int | None, before: Predecessor = NOTHING) -> tuple[str, SessionRow]:
        """Bind a session. Returns "bound", "held" or "overtaken", and the row; see the SQL function's comment."""
        sql = (
            f"SELECT outcome, {_COLUMNS} FROM @schema@.govredis_session_bind(%s::text, %s::text, %s::timestamptz,"
            " %s::interval, %s::text, %s::boolean, %s::bigint, %s::boolean, %s::integer, %s::bigint, %s::bigint,"
            " %s::text, %s::text) answer, LATERAL (SELECT (answer.held).*) row"
        )
        params = (
            self._keys.row(request.session_id, "session_id"),
            self._keys.row(request.agent_id, "agent_id"),
            request.bound_at,
            None if request.ttl_ms is None else timedelta(milliseconds=request.ttl_ms),
            request.data,
            request.if_absent,
            started,
            request.keeps_ttl,
            *before,
            None if request.origin is None else self._keys.row(request.origin, "session_id"),
        )
        ((outcome, *row),) = self._postgres.fetch(sql, params)
        return outcome, self._row(row)

    def adopt(self, record: SessionRecord, was: SessionRow | None) -> SessionRow | None:
        """Make a row of a record of the async service's, or have the row say the same.

        Args:
            was: the row as it was. If it has changed since, it stays, and the answer is None. So too where there was
                none, and its agent's sessions were ended since without Redis: then there is a revoked row.
        """
        binding = record.binding
        params = (
            self._keys.row(binding.session_id, "session_id"),
            self._keys.row_of_other(binding.agent_id),
            binding.bound_at,
            bounded(record.ttl_ms),
            None if binding.data is None else json.dumps(binding.data),
            members_of(record.raw),
            binding.bind_count,
            None if was is None else was.version,
        )
        ((*row,),) = self._postgres.fetch(
            f"SELECT {_COLUMNS} FROM @schema@.govredis_session_adopt(%s::text, %s::text, %s::timestamptz, %s::bigint,"
            " %s::text, %s::text, %s::integer, %s::bigint)",
            params,
        )
        return None if row[0] is None else self._row(row)

    def get(self, session_id: str) -> SessionRow | None:
        """The session's row, also one that was revoked or has ended."""
        return self.get_many([session_id]).get(session_id)

    def get_many(self, session_ids: Sequence[str]) -> dict[str, SessionRow]:
        rows = self._postgres.fetch(
            f"SELECT session, {_COLUMNS} FROM @schema@.govredis_sessions WHERE session = ANY(%s)",
            ([self._keys.row(sid, "session_id") for sid in session_ids],),
        )
        return {self._keys.id_of(session): self._row(row) for session, *row in rows}

    def touch(self, session_id: str, version: int, ttl_ms: int) -> SessionRow | None:
        """Give a session this TTL again. Returns the row; None if it has ended.

        Args:
            version: the version of a living copy. If that is the row's, the row has only missed touches.
            ttl_ms: milliseconds; NO_END.
        """
        left_ms = bounded(ttl_ms)
        rows = self._postgres.fetch(
            "UPDATE @schema@.govredis_sessions SET expires_at ="
            " greatest(expires_at, CASE WHEN %s THEN 'infinity' ELSE clock_timestamp() + %s END)"
            " WHERE session = %s AND NOT revoked AND (expires_at > clock_timestamp() OR version = %s)"
            f" RETURNING {_COLUMNS}",
            (left_ms == NO_END, timedelta(milliseconds=left_ms), self._keys.row(session_id, "session_id"), version),
        )
        return self._row(rows[0]) if rows else None

    def change(self, session_id: str, version: int, data: str | None) -> SessionRow | None:
        """Give the row other data (JSON), and tell those that hold copies. None if it has another version by now."""
        rows = self._postgres.fetch(
            "WITH changed AS (UPDATE @schema@.govredis_sessions"
            " SET data = %s, version = nextval('@schema@.govredis_versions')"
            " WHERE session = %s AND version = %s AND NOT revoked RETURNING *)"
            f" SELECT {_COLUMNS}, @schema@.govredis_outbox_add('session'::text, session, version) FROM changed",
            (data, self._keys.row(session_id, "session_id"), version),
        )
        return self._row(rows[0][:-1]) if rows else None

    def unbind(self, session_id: str, late: Revocation | None = None) -> tuple[bool, int | None]:
        """End a session. Returns whether it was alive, and the version of its revocation; None if it was bound since.

        Args:
            late: a revocation made by this process while it was cut off.
        """
        known = [] if late is None else [b for b in late.known if is_text(b.agent_id)]
        ((alive, version),) = self._postgres.fetch(
            "SELECT * FROM @schema@.govredis_session_unbind(%s::text, %s::interval, %s::timestamptz, %s::text[],"
            " %s::timestamptz[], %s::boolean)",
            (
                self._keys.row(session_id, "session_id"),
                self._ttl,
                None if late is None else late.at,
                [self._keys.row_of_other(binding.agent_id) for binding in known],
                [binding.bound_at for binding in known],
                late is not None and late.seen,
            ),
        )
        return alive, version

    def unbind_agent(self, agent_id: str, late: AgentRevocation | None = None) -> tuple[dict[str, int], set[str]]:
        """End an agent's sessions. Returns the versions of the revocations, and the sessions that were alive.

        Args:
            late: a revocation made by this process while it was cut off.
        """
        ended: dict[str, int] = {}
        lived: set[str] = set()
        told = [] if late is None else [self._keys.row(sid, "session_id") for sid in late.told]
        while True:
            rows = self._postgres.fetch(
                "SELECT * FROM @schema@.govredis_session_unbind_agent(%s::text, %s::timestamptz, %s::text[],"
                " %s::integer)",
                (self._keys.row(agent_id, "agent_id"), None if late is None else late.at, told, _AT_ONCE),
            )
            ended.update((self._keys.id_of(session), version) for session, version, _ in rows)
            lived.update(self._keys.id_of(session) for session, _, alive in rows if alive)
            if len(rows) < _AT_ONCE:
                return ended, lived

    def untold(self, versions: Mapping[str, int], epoch: int) -> None:
        """Note that Redis was away, in that epoch, when these sessions were revoked."""
        self._postgres.fetch(
            "WITH noted AS (UPDATE @schema@.govredis_sessions s SET untold_in = %s"
            " FROM unnest(%s::text[], %s::bigint[]) u (session, version)"
            " WHERE s.session = u.session AND s.version = u.version AND s.revoked RETURNING 1)"
            " SELECT count(*) FROM noted",
            (epoch, [self._keys.row(sid, "session_id") for sid in versions], list(versions.values())),
        )

    def untold_agent(self, agent_id: str) -> None:
        """Note that Redis was away when the agent's sessions were ended."""
        self._postgres.fetch(
            "WITH noted AS (UPDATE @schema@.govredis_session_agents SET untold = clock_timestamp() WHERE agent = %s"
            " RETURNING 1) SELECT count(*) FROM noted",
            (self._keys.row(agent_id, "agent_id"),),
        )

    def for_agent(self, agent_id: str) -> tuple[list[str], dict[str, int]]:
        """The agent's sessions; and the versions of those that have ended, unless they live on in Redis."""
        rows = self._postgres.fetch(
            "SELECT session, expires_at > clock_timestamp(), version FROM @schema@.govredis_sessions"
            " WHERE agent = %s AND NOT revoked",
            (self._keys.row(agent_id, "agent_id"),),
        )
        alive = [self._keys.id_of(session) for session, is_alive, _ in rows if is_alive]
        return alive, {self._keys.id_of(session): version for session, is_alive, version in rows if not is_alive}

    def after(self, session_id: str | None, limit: int) -> dict[str, SessionRow]:
        """The next rows of our prefix, after that session; None: the first rows."""
        rows = self._postgres.fetch(
            f"SELECT session, {_COLUMNS} FROM @schema@.govredis_sessions"
            " WHERE session > %s AND @schema@.govredis_is_of(session, %s::text) ORDER BY session LIMIT %s",
            ("" if session_id is None else self._keys.row(session_id), self._keys.prefix, limit),
        )
        return {self._keys.id_of(session): self._row(row) for session, *row in rows}

    def purge(self, extended: Callable[[Mapping[str, int]], Collection[str] | None]) -> int:
        """Delete our prefix's rows of sessions that have been over for a TTL, a few at a time, and the generations that
        no bind can be older than. Returns how many sessions.

        Args:
            extended: extends the rows of those of these sessions, by their versions, that are alive all the same, and
                returns them. None: that cannot be told now, and all of them stay.
        """
        deleted = 0
        while True:
            over = self._postgres.fetch(
                "SELECT session, version, revoked FROM @schema@.govredis_sessions"
                " WHERE expires_at < clock_timestamp() - %s AND @schema@.govredis_is_of(session, %s::text) LIMIT %s",
                (self._ttl, self._keys.prefix, _AT_ONCE),
            )
            versions = {self._keys.id_of(session): version for session, version, revoked in over if not revoked}
            alive = extended(versions) if versions else ()
            ((some,),) = self._postgres.fetch(
                "WITH ended AS (DELETE FROM @schema@.govredis_sessions WHERE session IN ("
                " SELECT session FROM @schema@.govredis_sessions WHERE session = ANY(%s)"
                " AND expires_at < clock_timestamp() - %s AND (revoked OR %s) FOR UPDATE SKIP LOCKED) RETURNING 1)"
                " SELECT count(*) FROM ended",
                ([session for session, *_ in over], self._ttl, alive is not None),
            )
            deleted += int(some)
            if some + len(alive or ()) < _AT_ONCE:
                break
        self._postgres.fetch(
            "DELETE FROM @schema@.govredis_session_agents WHERE revoked_at < clock_timestamp() - interval '1 day'"
            " AND (untold IS NULL OR untold < clock_timestamp() - greatest(%s, interval '30 days'))"
            " AND @schema@.govredis_is_of(agent, %s::text)",
            (self._ttl, self._keys.prefix),
        )
        return deleted

    # -- inside --------------------------------------------------------------------------------------------------

    def _row(self, row: Sequence[Any]) -> SessionRow:
        agent, bound_at, changed_at, expires_at, bind_count, data, revoked, version, left_ms, *rest = row
        return SessionRow(
            self._keys.id_of(agent),
            _utc(bound_at),
            _utc(changed_at),
            None if expires_at is None else _utc(expires_at),
            bind_count,
            data,
            revoked,
            version,
            None if left_ms is None else int(left_ms),
            *rest,
        )


def bounded(left_ms: int) -> int:
    """A session's remaining milliseconds, as PTTL says them, for PostgreSQL, whose time ends before Redis's."""
    return NO_END if left_ms > _LONGEST_MS else left_ms


def _utc(at: datetime) -> datetime:
    return at.astimezone(timezone.utc)
