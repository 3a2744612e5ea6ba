"""SessionCache: which agent a session belongs to."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from .._context import Context
from .._fork import notice_fork
from .._uncopied import Uncopied
from ..errors import (
    BackendUnavailable,
    ConfigurationError,
    SessionAlreadyBound,
    SessionChanged,
    SessionStoreUnavailable,
    check_ttl,
    refuse,
)
from ..keys import Id, check_id, id_text, is_id
from ..outbox import FreshnessLease
from .backends.backend import NOTHING_TO_COMPARE, SessionBackend, Unconfirmed
from .backends.chain import SessionBackends
from .binding import BindRequest, SessionBinding, encode_data
from .parity import SessionParity
from .replay import Replay
from .updates import Updates

__all__ = ["SessionBinding", "SessionCache", "SessionParity"]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


class SessionCache(Uncopied):
    """Sessions bound to agents, with a TTL that slides when touched: JSON at `session:{id}`, as the async service has.

    `get` takes one round trip, and a second one to slide the TTL, once a tenth of that has passed.
    A revoked session does not come back: a bind that a revocation overtakes is ended by it, however late it is carried
    out. A bind that begins after the revocation binds as ever.

    **With PostgreSQL** a session is a row there, and Redis caches it. A Redis that is flushed, or restarted empty or
    with old data, logs nobody out. A revoked session is found nowhere later than metadata_staleness (5 s) after it was
    revoked, and where Redis is well it ends at once. A hit takes no statement. A miss takes one, also for an unknown
    id; so does a TTL that slides, and a revocation; a bind takes two.

    **Without PostgreSQL** Redis has the record. A session that it loses is lost; restored older data counts.

    With confirm (GOVREDIS_CONFIRM) a revocation returns once a replica of Redis has it, too: a failover to that replica
    keeps it. Where none says so within the socket timeout, the session has ended, and SessionStoreUnavailable is
    raised: a failover may bring the session back. Call again until it returns. Revocations made while Redis was away,
    and told on the return, are not confirmed. With PostgreSQL the row is the record, and Redis is not asked for it.

    **In a Redis Cluster** a node that is away costs its own sessions alone. Without PostgreSQL a session has its record
    on one node, and its agent's index on another: with that one away it is found and revoked, not bound nor lengthened,
    and `unbind_agent` ends what this process knows, and the rest on the return. With PostgreSQL the rows answer.

    **While a server is away**, each SessionBinding says which backend answered:

    - Redis away: the rows answer (backend "postgres").
    - PostgreSQL away: Redis is believed, though it may be older than 5 s (`sessions.degraded.unguarded`). Changes are
      carried out in Redis and here, and told to PostgreSQL when it is back.
    - PostgreSQL read-only (a standby, a setting): the rows answer, and Redis as ever. Changes are carried out as while
      it is away, and told before this process writes anything else to it. `touch` lengthens nothing there.
    - No server left: this process's memory answers (backend "local"). It finds what was bound or seen here, until its
      TTL, also if another process has revoked it since. An unknown session raises SessionStoreUnavailable, for unknown
      is not logged out. `touch` counts here only, and is told to nobody. Changes are told on the return, before this
      process uses the server again: first revocations, then bindings where nobody is bound and no revocation is later
      by the clocks. They are lost if the process ends before.

    If this process's connections to the record are all in use, its memory is not asked: every method raises
    SessionStoreUnavailable. docs/guarantees.md says what holds in an outage, and what does not.

    **Beside the async service** the newest binding wins, from either side; see docs/async-service.md. A session that it
    deletes in Redis comes back from its row: `unbind` it here.

    Every method raises ValueError for a bad id before anything is sent, BackendError where a server answers with an
    error, and ConfigurationError where there is a PostgreSQL without our tables.

    A value of another client's at one of our keys that is no record is counted (`sessions.malformed`), and replaced by
    the next `bind`. Until then the session's row counts; without a row `get` raises BackendError. The sessions beside
    it are found, listed and ended as ever. The `get` of an id that nobody has bound leaves nothing behind.

    With session_hash_ids, keys, index and rows keep a SHA-256 of each session id, so that a reader of them can use no
    session. The hash has no key: an id that can be guessed can be looked for. The async service does not see such
    sessions, and `for_agent` names hashes.

    Args:
        freshness: says whether a row's copy in Redis may be believed; None: none is.
        now: aware UTC.
    """

    def __init__(
        self, context: Context, *, freshness: FreshnessLease | None = None, now: Callable[[], datetime] = utc_now
    ) -> None:
        config = context.config
        self._ttl_ms = int(config.session_ttl * 1000)
        self._hash_ids = config.session_hash_ids
        self._counters = context.counters
        self._now = now
        self._backends = SessionBackends(context, freshness=freshness, now=now)
        self._memory = self._backends.memory
        self._updates = Updates(self._backends)
        backends, server = self._backends, self._backends.server
        if server is not None:
            replay = Replay(backends.replay_target, self._memory, backends.tell_soon, now=now, counters=self._counters)
            server.on_recovery(replay)

    def bind(
        self, session_id: Id, agent_id: Id, *, ttl: float | None = None, if_absent: bool = False, data: Any = None
    ) -> SessionBinding:
        """Bind a session to an agent; a session bound before is rebound, and its bind_count goes up.

        Args:
            session_id, agent_id: the two.
            ttl: seconds until it ends unless touched, 0.001 or more; None: session_ttl, but it ends no sooner than it
                would without this bind.
            if_absent: bind only an unbound session. One that is this agent's already is returned as it is.
            data: anything JSON can hold, up to 64 KiB.

        Returns the SessionBinding. Raises SessionAlreadyBound(existing) for if_absent, ValueError for a bad argument,
        SessionStoreUnavailable where no server can be asked and there is no room for another pending write. With
        if_absent it is also raised where this process does not know whether the session is bound.
        """
        notice_fork()
        agent_id = check_id(agent_id, "agent_id")
        request = BindRequest(
            self._name(session_id),
            agent_id,
            self._now(),
            self._ttl_ms if ttl is None else int(check_ttl(ttl) * 1000),
            encode_data(data),
            if_absent,
            keeps_ttl=ttl is None,
        )
        binding = self._shown(self._bind(request), session_id)
        if binding.agent_id != agent_id:
            raise SessionAlreadyBound(binding)
        return binding

    def _bind(self, request: BindRequest) -> SessionBinding:
        name = request.session_id
        unless_unknown = name if request.if_absent else None
        (binding, stands), by_primary = self._backends.ask(
            "bind", lambda backend: backend.bind(request), unless_unknown=unless_unknown
        )
        if by_primary:
            if stands:
                self._memory.remember(binding)
            else:
                self._counters.add("sessions.overtaken")
                self._memory.forget(name)
            if binding.agent_id == request.agent_id:
                self._counters.add("sessions.bound")
        elif binding.bound_at == request.bound_at:  # else another binding was found here
            self._backends.show(lambda redis: redis.bind(request._replace(if_absent=False)))
            self._backends.tell_soon((name,))
        return binding

    def get(self, session_id: Id, *, touch: bool = False) -> SessionBinding | None:
        """The session's binding, or None if it is bound to nobody (ended, revoked, never bound).

        Args:
            touch: also give it its whole TTL again (session_ttl), if a tenth of that has passed.

        Raises SessionStoreUnavailable where no server can be asked and this process does not know the session.
        """
        return self._get(session_id, self._ttl_ms if touch else 0)

    def _get(self, session_id: Id, touch: int) -> SessionBinding | None:
        notice_fork()
        name, ends = self._name(session_id), self._memory.ends
        binding, by_primary = self._backends.ask("get", lambda backend: backend.get(name, touch), unless_unknown=name)
        if by_primary:
            hit = binding is not None and binding.backend == "redis"
            self._counters.add("sessions.hits" if hit else "sessions.misses")
            binding = self._corrected(name, binding, ends)
        return None if binding is None else self._shown(binding, session_id)

    def _corrected(self, name: str, binding: SessionBinding | None, ends: int) -> SessionBinding | None:
        """The primary's answer, corrected by what it was not told of yet.

        Args:
            ends: the memory's, as it was before the primary was asked.
        """
        memory = self._memory
        bound = memory.bound_here(name)
        if bound is not None and (binding is None or binding.bound_at < bound.bound_at):
            return bound
        if binding is None:
            memory.forget(name)
            return None
        if memory.is_revoked(binding):
            return None
        memory.remember(binding, since=ends)
        return memory.with_pending_data(binding)

    def get_agent_id(self, session_id: Id, *, touch: bool = False) -> str | None:
        """The agent_id of `get`."""
        binding = self.get(session_id, touch=touch)
        return binding.agent_id if binding is not None else None

    def touch(self, session_id: Id, *, ttl: float | None = None) -> bool:
        """Give the session its whole TTL again, if a tenth of that has passed. False if there is none.

        Args:
            session_id: the session.
            ttl: seconds, 0.001 or more; None: session_ttl. A session that ends later, or never, goes on doing so.

        Raises ValueError for a bad argument, and SessionStoreUnavailable as `get` does.
        """
        return self._get(session_id, self._ttl_ms if ttl is None else int(check_ttl(ttl) * 1000)) is not None

    def exists(self, session_id: Id) -> bool:
        """Is the session bound? Takes one round trip, as `get` does, and lengthens nothing.

        Raises SessionStoreUnavailable as `get` does.
        """
        return self.get(session_id) is not None

    def update(self, session_id: Id, data: Any) -> SessionBinding:
        """Give a living session other data. The rest of its record stays, as do its agent and its TTL.

        >>> gov.sessions.update(sid, {"theme": "dark"})                          # replaces the data
        >>> gov.sessions.update(sid, lambda data: {**data, "n": data["n"] + 1})  # concurrent ones all count

        It is compare-and-set: if another caller changed the data between read and write, it tries again, up to 100
        times. It never brings a session back, nor changes one that was bound anew meanwhile.

        Args:
            data: anything JSON can hold, up to 64 KiB; None for no data. Or a function: it gets a copy of the data as
                it is, None where there is none, and returns the new data, or None. It may be called several times, and
                its exceptions are raised.

        Returns the SessionBinding as it is now. Raises SessionChanged(existing) where nothing was changed: the session
        has ended or was never bound (`existing` is None), was bound anew, or was changed by others at each try.

        While PostgreSQL is away, and where no server can be asked, it is changed here only (backend "local"), and told
        on the return. If the session's data differs by then from the data that this process knew, the change is
        dropped, and counted as `sessions.replays_refused`. Raises SessionStoreUnavailable where this process does not
        know the session.
        """
        notice_fork()
        found, updated = self._updates.update(self._name(session_id), data)
        if updated is None:
            raise SessionChanged(None if found is None else self._shown(found, session_id))
        self._counters.add("sessions.updated")
        return self._shown(updated, session_id)

    def unbind(self, session_id: Id) -> bool:
        """End a session. True if it was bound. False also if a first answer was lost with its connection: by the second
        try the session had ended.

        A note of the revocation, also for an unknown id, is kept for session_ttl: where strangers may send any id,
        `get` it first.

        Where no server can be asked, it ends in this process and, on the return, everywhere; True if this process knew
        it. Raises SessionStoreUnavailable if there is no room for another pending write; with confirm, where it has
        ended and no replica has confirmed that: see SessionCache.
        """
        notice_fork()
        name = self._name(session_id)
        return bool(
            self._end(
                "unbind",
                lambda backend: backend.unbind(name),
                lambda: self._memory.forget(name),
                lambda: self._backends.tell_soon((name,)),
            )
        )

    def _end(
        self,
        operation: str,
        end: Callable[[SessionBackend], int],
        forget: Callable[[], None],
        tell_soon: Callable[[], None],
    ) -> int:
        try:
            ended, by_primary = self._backends.ask(operation, end, shown=True)
        except Unconfirmed as error:
            forget()
            raise SessionStoreUnavailable(str(error)) from error
        if by_primary:
            forget()
        else:
            tell_soon()
        return ended

    def start(
        self, agent_id: Id, *, replacing: Id | None = None, ttl: float | None = None, data: Any = None
    ) -> SessionBinding:
        """For a login: begin an agent's session under a new id from `secrets`, then end the one it replaces.

        No id that somebody planted in a browser becomes the agent's session.

        Args:
            agent_id: the agent that has logged in.
            replacing: the id that the request came with, known or not; None: it came without an id. A cookie may
                hold anything: a str that cannot be an id counts as an unknown id.
            ttl, data: the same as for `bind`.

        Returns the SessionBinding, whose session_id the visitor gets. Raises ValueError for a bad argument, and
        otherwise the errors of `bind` and `unbind`. If the bind fails, the visitor's old session stands. If the unbind
        does, both stand, and the new session, whose id nobody got, ends with its ttl.
        """
        old = None if replacing is None else id_text(replacing)
        if old is not None and not isinstance(old, str):
            raise refuse("replacing", old, "the id that the request came with: a str, an int or a UUID; or None")
        started = self.bind(secrets.token_urlsafe(32), agent_id, ttl=ttl, data=data)
        if old is not None and is_id(old):
            self.unbind(old)
        return started

    def rotate(self, session_id: Id) -> str | None:
        """Give a session another id; its agent stays. At a login call `start`: `rotate` is for a session whose agent is
        known already, such as before it gets more rights.

        Binds a new id, from `secrets`, to the same agent, then ends the old session. Data, end and the async service's
        members stay the same.

        Returns the new id; None if there is no such session, or if it ended meanwhile: then the new one ends, too.
        Raises the errors of `get`, `bind` and `unbind`.
        """
        old = self.get(session_id)
        if old is None:
            return None
        now = self._now()
        left = None if old.expires_at is None else max(1, (old.expires_at - now) // timedelta(milliseconds=1))
        new = secrets.token_urlsafe(32)
        data = encode_data(old.data)
        self._bind(BindRequest(self._name(new), old.agent_id, now, left, data, False, origin=self._name(session_id)))
        if self.unbind(session_id):
            return new
        self.unbind(new)
        return None

    def for_agent(self, agent_id: Id) -> list[str]:
        """The ids of the agent's sessions, sorted (their hashes, with session_hash_ids).

        Raises SessionStoreUnavailable while neither Redis nor PostgreSQL can be asked.
        """
        notice_fork()
        agent_id = check_id(agent_id, "agent_id")
        primary = self._backends.primary
        if primary is None:
            return self._memory.for_agent(agent_id)
        try:
            return self._memory.with_pending(agent_id, primary.for_agent(agent_id))
        except BackendUnavailable as error:
            raise SessionStoreUnavailable(f"the sessions of agent {agent_id!r} cannot be listed: {error}") from error

    def unbind_agent(self, agent_id: Id) -> int:
        """End all sessions of an agent, also a session whose bind has begun and is carried out later. Returns how many.

        Where no server can be asked: those that this process knows end here, and on the return all of them end,
        everywhere. Raises SessionStoreUnavailable if there is no room for another pending write, and as `unbind`.
        """
        notice_fork()
        agent_id = check_id(agent_id, "agent_id")
        return self._end(
            "unbind_agent",
            lambda backend: backend.unbind_agent(agent_id),
            lambda: self._memory.forget_agent(agent_id),
            lambda: self._backends.tell_soon(self._memory.revoked_with(agent_id), agent_id),
        )

    def purge(self) -> int:
        """Delete the rows of sessions that have been over for session_ttl. Returns how many.

        Raises BackendUnavailable, BackendError, ConfigurationError.
        """
        notice_fork()
        primary = self._backends.primary
        return 0 if primary is None else primary.purge()

    def verify(self) -> SessionParity:
        """Compare all rows with their copies in Redis, 500 at a time; returns the differences.

        Raises BackendUnavailable if either is away, and ConfigurationError where there are not both."""
        notice_fork()
        primary = self._backends.primary
        if primary is None:
            raise ConfigurationError(NOTHING_TO_COMPARE)
        return primary.verify()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _name(self, session_id: Id) -> str:
        """The session's id as backends keep it."""
        session_id = check_id(session_id, "session_id")
        return hashlib.sha256(session_id.encode()).hexdigest() if self._hash_ids else session_id

    def _shown(self, binding: SessionBinding, session_id: Id) -> SessionBinding:
        return replace(binding, session_id=id_text(session_id)) if self._hash_ids else binding
