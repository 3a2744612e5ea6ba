"""SessionCache: which agent a session belongs to, by PostgreSQL and Redis, or by what this process remembers."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from .._counters import Counters
from ..breaker import Rejected
from ..client import RedisClient
from ..errors import (
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    SessionAlreadyBound,
    SessionStoreUnavailable,
    check_ttl,
)
from ..keys import Keys, check_id
from .binding import Order, SessionBinding, encode_data
from .copies import Copies, Guard
from .durable import DurableSessions
from .local import Debt, LocalSessions
from .postgres_store import SessionRows
from .redis_store import RedisSessions
from .stores import Sessions
from .verify import SessionParity, compare

if TYPE_CHECKING:
    from ..postgres import Postgres

__all__ = ["SessionBinding", "SessionCache", "SessionParity"]

log = logging.getLogger("govredis")

T = TypeVar("T")

_REPLAY_AT_ONCE = 500


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


class SessionCache:
    """Sessions bound to agents, with a TTL that slides when touched: JSON at `session:{id}`, as the async service has.

    `get` takes one round trip; it takes a second one to slide the TTL, which it does when a tenth of that has passed.
    A revoked session does not come back: a bind that a revocation overtakes is ended by it, however late it is carried
    out; one that begins after it binds as ever.

    **With PostgreSQL** a session is a row there, and Redis caches it. A Redis that is flushed, or restarted empty or
    with old data, logs nobody out; and a revoked session is found nowhere later than metadata_staleness (5 s) after it
    was revoked, at once where Redis is well. A hit takes no statement; one each: a miss, unknown ids among them, a TTL
    that slides, a revocation; a bind two.

    - Redis away: the rows answer (backend "postgres").
    - PostgreSQL away: what Redis has is believed, though it may be older than 5 s (`sessions.degraded.unguarded`).
      `bind` and `unbind` are carried out in Redis and here, and told to PostgreSQL when it is back; what this process
      has not told is lost to PostgreSQL if it ends before.
    - Both away: this process's memory, as below. What Redis has not is unknown then, too.

    **Without PostgreSQL** Redis has the record. What it loses is lost, and older data, restored, counts.

    **With nobody to ask** this process answers from its own memory, and each SessionBinding says so (backend "local"):

    - a session bound or seen here before is found, until its TTL. One that another process revoked meanwhile is found
      too: this process cannot know. Where that matters, look at `backend`;
    - an unknown one raises SessionStoreUnavailable: unknown is not the same as logged out;
    - `touch` lengthens it here only, and is told to nobody;
    - `bind` and `unbind` work, here only, and are told when PostgreSQL (where there is none: Redis) is back, before
      this process uses it again: revocations first, then bindings where the session is still unbound and has not been
      revoked since, by the clocks. They are lost if the process ends before.

    Sessions bound by the async service are found by `get`, but stand in no index and have no row: `for_agent` and
    `unbind_agent` do not see them. With PostgreSQL a session that it ends (DEL) comes back from its row: `unbind` it
    here. Every method raises ValueError for a bad id before anything is sent, BackendError where a server answers with
    an error, and ConfigurationError where there is a PostgreSQL without our tables.

    Args:
        hash_ids: keep a SHA-256 of each session id in keys, index and rows, so that nobody can use what he reads there.
            The hash has no key: an id that can be guessed can be looked for. The async service does not see such
            sessions, and `for_agent` names hashes.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        postgres: Postgres | None = None,
        guard: Guard[Any] | None = None,
        *,
        ttl: float,
        local_entries: int,
        counters: Counters,
        hash_ids: bool = False,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._keys = keys
        self._ttl = check_ttl(ttl)
        self._counters = counters
        self._hash_ids = hash_ids
        self._now = now
        self._rows = None if postgres is None else SessionRows(keys, postgres, ttl=ttl)
        self._copies: Copies | None = None
        self._store: Sessions | None = None
        if redis is not None:
            in_redis = RedisSessions(keys, redis, ttl=ttl, counters=counters, now=now)
            self._store = in_redis
            if postgres is not None:
                self._copies = Copies(keys, redis, guard, in_redis, entries=local_entries, counters=counters)
        if self._rows is not None:
            self._store = DurableSessions(self._rows, self._copies, counters=counters)
        #: Who is told what was done without it.
        self._record: Postgres | RedisClient | None = postgres if postgres is not None else redis
        self._local = LocalSessions(local_entries, now, None if self._record is None else self._record.name)
        if self._record is not None:
            self._record.on_recovery(lambda _: self._replay())

    def bind(
        self, session_id: str, agent_id: str, *, ttl: float | None = None, if_absent: bool = False, data: Any = None
    ) -> SessionBinding:
        """Bind a session to an agent; a session bound before is rebound, and its bind_count goes up.

        Args:
            session_id, agent_id: the two.
            ttl: seconds until it ends unless touched; None: session_ttl.
            if_absent: bind only an unbound session. One that is this agent's already is returned as it is.
            data: anything JSON can hold, up to 64 KiB.

        Returns the SessionBinding. Raises SessionAlreadyBound(existing) for if_absent, ValueError for a bad argument,
        SessionStoreUnavailable with nobody to ask if this process's memory of what it owes is full; with
        if_absent also when this process does not know whether the session is bound.
        """
        order = Order(
            self._name(session_id),
            check_id(agent_id, "agent_id"),
            self._now(),
            int((self._ttl if ttl is None else check_ttl(ttl)) * 1000),
            encode_data(data),
            if_absent,
        )
        binding = self._shown(self._bind(order), session_id)
        if binding.agent_id != agent_id:
            raise SessionAlreadyBound(binding)
        return binding

    def _bind(self, order: Order) -> SessionBinding:
        name = order.session_id
        if self._store is not None:
            try:
                binding, stands = self._store.bind(order)
            except BackendUnavailable as error:
                self._degraded("bind", error if order.if_absent and not self._knows(name) else None)
            else:
                if stands:
                    self._local.remember(binding)
                else:
                    self._counters.add("sessions.overtaken")
                    self._local.forget(name)
                if binding.agent_id == order.agent_id:
                    self._counters.add("sessions.bound")
                return binding
        known = self._local.get(name)
        if order.if_absent and known is not None:
            return known
        binding = self._local.bind(order.binding("local"))
        self._meanwhile(lambda redis: redis.bind(order._replace(if_absent=False)))
        self._replay_soon()
        return binding

    def get(self, session_id: str, *, touch: bool = False) -> SessionBinding | None:
        """The session's binding, or None if it is bound to nobody (ended, revoked, never bound).

        Args:
            touch: also give it its whole TTL again (session_ttl), if a tenth of that has passed.

        Raises SessionStoreUnavailable where nobody can be asked and this process does not know the session.
        """
        name = self._name(session_id)
        if self._store is None:
            binding = self._get_local(name, touch, None)
        else:
            changes = self._local.changes
            try:
                binding = self._store.get(name, touch)
            except BackendUnavailable as error:
                binding = self._get_local(name, touch, error)
            else:
                hit = binding is not None and binding.backend == "redis"
                self._counters.add("sessions.hits" if hit else "sessions.misses")
                if binding is None:
                    self._local.forget(name)
                elif self._local.revoked(name, binding.agent_id):
                    binding = None
                else:
                    self._local.remember(binding, since=changes)
        return None if binding is None else self._shown(binding, session_id)

    def get_agent_id(self, session_id: str, *, touch: bool = False) -> str | None:
        """The agent_id of `get`."""
        binding = self.get(session_id, touch=touch)
        return binding.agent_id if binding is not None else None

    def touch(self, session_id: str) -> bool:
        """Give the session its whole TTL (session_ttl) again, if a tenth of that has passed. False if there is none.

        Raises SessionStoreUnavailable as `get` does.
        """
        return self.get(session_id, touch=True) is not None

    def unbind(self, session_id: str) -> bool:
        """End a session. True if it was bound (False also where a first answer was lost with its connection, and the
        session had ended by the time of the second).

        With nobody to ask: it is ended in this process and, once that is over, everywhere; True if this process knew
        it. Raises SessionStoreUnavailable if this process's memory of what it owes is full.
        """
        name = self._name(session_id)
        if self._store is not None:
            try:
                ended = self._store.unbind(name)
            except BackendUnavailable:
                self._degraded("unbind", None)
                self._meanwhile(lambda redis: redis.unbind(name))
            else:
                self._local.forget(name)
                return ended
        ended = self._local.unbind(name)
        self._replay_soon()
        return ended

    def rotate(self, session_id: str) -> str | None:
        """Give a session another id, as at a login: bind a new one, from `secrets`, to the same agent, with the same
        data and the same end, then end the old one.

        Returns the new id; None if there is no such session, or if it was ended meanwhile, by whomever: then the new
        one is, too. Raises as `get`, `bind` and `unbind`.
        """
        old = self.get(session_id)
        if old is None:
            return None
        left = None if old.expires_at is None else max(0.001, (old.expires_at - self._now()).total_seconds())
        new = secrets.token_urlsafe(32)
        self.bind(new, old.agent_id, ttl=left, data=old.data)
        if self.unbind(session_id):
            return new
        self.unbind(new)
        return None

    def for_agent(self, agent_id: str) -> list[str]:
        """The ids of the agent's sessions, sorted (their hashes, with hash_ids).

        Raises SessionStoreUnavailable while neither Redis nor PostgreSQL can be asked.
        """
        check_id(agent_id, "agent_id")
        if self._store is None:
            return self._local.for_agent(agent_id)
        try:
            return self._store.for_agent(agent_id)
        except BackendUnavailable as error:
            raise SessionStoreUnavailable(f"the sessions of agent {agent_id!r} cannot be listed: {error}") from error

    def unbind_agent(self, agent_id: str) -> int:
        """End all sessions of an agent; also one whose bind has begun, and is carried out later. Returns how many.

        With nobody to ask: those that this process knows, here, and once that is over all of them, everywhere. Raises
        SessionStoreUnavailable if this process's memory of what it owes is full.
        """
        check_id(agent_id, "agent_id")
        if self._store is not None:
            try:
                ended = self._store.unbind_agent(agent_id)
            except BackendUnavailable:
                self._degraded("unbind_agent", None)
                self._meanwhile(lambda redis: redis.unbind_agent(agent_id))
            else:
                self._local.forget_agent(agent_id)
                return ended
        ended = self._local.unbind_agent(agent_id)
        self._replay_soon()
        return ended

    def purge(self) -> int:
        """Delete the rows of sessions that have been over for session_ttl. Returns how many.

        Raises BackendUnavailable, ConfigurationError.
        """
        return 0 if self._rows is None else self._rows.purge()

    def verify(self) -> SessionParity:
        """Compare all rows with their copies in Redis, 500 at a time. Raises BackendUnavailable if either is away,
        ConfigurationError where there are not both.
        """
        if self._rows is None or self._copies is None:
            raise ConfigurationError("there is nothing to compare without both Redis and GOVREDIS_DATABASE_URL")
        return compare(self._rows, self._copies)

    # -- inside --------------------------------------------------------------------------------------------------

    def _name(self, session_id: str) -> str:
        """What the session is called wherever it is kept."""
        check_id(session_id, "session_id")
        return hashlib.sha256(session_id.encode()).hexdigest() if self._hash_ids else session_id

    def _shown(self, binding: SessionBinding, session_id: str) -> SessionBinding:
        return replace(binding, session_id=session_id) if self._hash_ids else binding

    def _meanwhile(self, change: Callable[[RedisSessions], Any]) -> None:
        """PostgreSQL is owed a change: Redis, if that can be asked, shows it to others until it is told."""
        if self._copies is not None:
            with contextlib.suppress(BackendUnavailable):
                change(self._copies.sessions)

    def _replay_soon(self) -> None:
        if self._record is not None:
            self._record.replay_soon("sessions were changed without it")

    def _outage(self) -> int:
        return 0 if self._record is None else self._record.breaker.generation

    def _knows(self, name: str) -> bool:
        return self._local.knows(name, self._outage())

    def _degraded(self, what: str, error: BackendUnavailable | None) -> None:
        self._counters.add(f"sessions.degraded.{what}")
        if error is not None:
            raise SessionStoreUnavailable(f"this process does not know the session, and {error}") from error

    def _get_local(self, name: str, touch: bool, error: BackendUnavailable | None) -> SessionBinding | None:
        if touch:
            self._local.touch(name, self._ttl)
        binding = self._local.get(name)
        if error is not None:
            self._degraded("get", None if self._knows(name) else error)
        return binding

    def _replay(self) -> None:
        """Tell the record what it missed: revocations first, then bindings where the session is still unbound."""
        store = self._store
        assert store is not None
        sessions, agents, bindings = self._local.debts()
        for some in _chunks(sessions):
            with self._telling(some):
                store.tell_unbound(some)
        for debt in agents:
            with self._telling([debt]):
                store.tell_agent_unbound(debt)
        for few in _chunks(bindings):
            others: list[SessionBinding | None] = []
            with self._telling([debt for debt, _ in few]):
                others = store.tell_bound([(debt, self._order(binding)) for debt, binding in few])
            for other in others:
                if other is not None:  # somebody bound it otherwise while we were cut off: theirs stands
                    self._counters.add("sessions.replays_refused")
                    self._local.remember(other)

    def _order(self, binding: SessionBinding) -> Order:
        """How a binding made here is told of."""
        left = timedelta(seconds=self._ttl) if binding.expires_at is None else binding.expires_at - self._now()
        ttl_ms = max(1, left // timedelta(milliseconds=1))
        data = encode_data(binding.data)
        return Order(binding.session_id, binding.agent_id, binding.bound_at, ttl_ms, data, True)

    @contextlib.contextmanager
    def _telling(self, debts: list[Debt]) -> Iterator[None]:
        """These debts are paid now, also where the answer was an error (a key of another type, say): the others were
        carried out, and one that never can be must not keep the rest from being told."""
        try:
            yield
        except (BackendUnavailable, Rejected, ConfigurationError):
            raise
        except BackendError as error:
            self._counters.add("sessions.replays_failed")
            log.error("a change made while %s was away could not be told to it: %s", self._local.owed_to, error)
        self._local.paid(debts, self._outage())


def _chunks(items: list[T]) -> list[list[T]]:
    return [items[i : i + _REPLAY_AT_ONCE] for i in range(0, len(items), _REPLAY_AT_ONCE)]
