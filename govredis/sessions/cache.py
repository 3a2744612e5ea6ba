"""SessionCache: which agent a session belongs to, on Redis, with this process's memory as the fallback."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from .._counters import Counters
from ..client import RedisClient, Rejected, Script
from ..errors import BackendError, BackendUnavailable, SessionAlreadyBound, SessionStoreUnavailable, check_ttl
from ..keys import Keys
from .binding import SessionBinding, decode, encode
from .local import Debt, LocalSessions

__all__ = ["SessionBinding", "SessionCache"]

log = logging.getLogger("govredis")

T = TypeVar("T")

_REPLAY_AT_ONCE = 500


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


class SessionCache:
    """Sessions bound to agents, with a TTL that slides when touched: JSON at `session:{id}`, as the async service has.

    One round trip per operation (`for_agent` and `unbind_agent`: two; `touch` two when it extends).

    While Redis is away this process answers from its own memory, and each SessionBinding says so (backend "local"):

    - a session bound or seen here before is found, until its TTL. One that another process revoked meanwhile is found
      too: this process cannot know. Where that matters, look at `backend`;
    - an unknown one raises SessionStoreUnavailable: unknown is not the same as logged out;
    - `touch` lengthens it here only, and is not told to Redis;
    - `bind` and `unbind` work, here only, and are told to Redis when it is back, before this process uses it again:
      revocations first, then bindings where the session is still unbound. They are lost if the process ends before.

    Sessions bound by the async service are found by `get`, but stand in no index: `for_agent` and `unbind_agent` do
    not see them. Every method raises ValueError for a bad id before anything is sent, and BackendError where Redis
    answers with an error.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        *,
        ttl: float,
        local_entries: int,
        counters: Counters,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._keys = keys
        self._redis = redis
        self._ttl = check_ttl(ttl)
        self._counters = counters
        self._now = now
        self._local = LocalSessions(local_entries, now, owing=redis is not None)
        self._bind = Script(__package__, "bind.lua")
        self._touch = Script(__package__, "touch.lua")
        self._unbind = Script(__package__, "unbind.lua")
        self._index = Script(__package__, "index.lua")
        if redis is not None:
            redis.on_recovery(self._replay)

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
        SessionStoreUnavailable while Redis is away if this process's memory of what it owes Redis is full; with
        if_absent also when this process does not know whether the session is bound.
        """
        key = self._keys.session(session_id)
        index = self._keys.agent_sessions(agent_id)
        ttl_ms = self._ttl_ms(ttl)
        now = self._now()
        bound_at = now.isoformat(timespec="microseconds")
        head = encode(agent_id, bound_at, data)
        if self._redis is not None:
            try:
                _, (_, raw, left_ms) = self._redis.pipeline(
                    (
                        self._index.call((index,), (session_id, str(ttl_ms))),
                        self._bind.call((key,), (head, agent_id, bound_at, str(ttl_ms), str(int(if_absent)))),
                    ),
                    (self._index, self._bind),
                )
            except BackendUnavailable as error:
                self._degraded("bind", error if if_absent and not self._knows(session_id) else None)
            else:
                binding = decode(session_id, raw, left_ms, self._now())
                self._local.remember(binding)
                if binding.agent_id != agent_id:
                    raise SessionAlreadyBound(binding)
                self._counters.add("sessions.bound")
                return binding
        known = self._local.get(session_id)
        if if_absent and known is not None:
            if known.agent_id != agent_id:
                raise SessionAlreadyBound(known)
            return known
        expires_at = now + timedelta(milliseconds=ttl_ms)
        binding = self._local.bind(SessionBinding(session_id, agent_id, now, expires_at, 1, data, "local"))
        self._replay_soon()
        return binding

    def get(self, session_id: str, *, touch: bool = False) -> SessionBinding | None:
        """The session's binding, or None if it is bound to nobody (ended, revoked, never bound).

        Args:
            touch: also give it its whole TTL again (session_ttl), if a tenth of that has passed.

        Raises SessionStoreUnavailable while Redis is away and this process does not know the session.
        """
        key = self._keys.session(session_id)
        if self._redis is not None:
            try:
                changes = self._local.changes
                raw, left_ms = self._redis.pipeline((("GET", key), ("PTTL", key)))
            except BackendUnavailable as error:
                return self._get_local(session_id, touch, error)
            if raw is None:
                self._counters.add("sessions.misses")
                self._local.forget(session_id)
                return None
            self._counters.add("sessions.hits")
            binding = decode(session_id, raw, left_ms, self._now())
            if touch and self._extend(binding, left_ms):
                binding = replace(binding, expires_at=self._now() + timedelta(seconds=self._ttl))
            self._local.remember(binding, since=changes)
            return binding
        return self._get_local(session_id, touch, None)

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

        While Redis is away: it is ended in this process and, once Redis is back, everywhere; True if this process knew
        it. Raises SessionStoreUnavailable if this process's memory of what it owes Redis is full.
        """
        key = self._keys.session(session_id)
        if self._redis is not None:
            try:
                gone = self._redis.run(self._unbind, (key,), "")
            except BackendUnavailable:
                self._degraded("unbind", None)
            else:
                self._local.forget(session_id)
                return bool(gone)
        known = self._local.unbind(session_id)
        self._replay_soon()
        return known

    def for_agent(self, agent_id: str) -> list[str]:
        """The ids of the agent's sessions, sorted. Raises SessionStoreUnavailable while Redis is away."""
        index = self._keys.agent_sessions(agent_id)
        if self._redis is None:
            return self._local.for_agent(agent_id)
        try:
            return sorted(self._sessions_of(self._redis, agent_id, index))
        except BackendUnavailable as error:
            raise SessionStoreUnavailable(f"the sessions of agent {agent_id!r} cannot be listed: {error}") from error

    def unbind_agent(self, agent_id: str) -> int:
        """End all sessions of an agent. Returns how many there were.

        While Redis is away: those that this process knows, here, and once Redis is back all of them, everywhere.
        Raises SessionStoreUnavailable if this process's memory of what it owes Redis is full.
        """
        index = self._keys.agent_sessions(agent_id)
        if self._redis is not None:
            try:
                ended = self._unbind_all(self._redis, agent_id, index)
            except BackendUnavailable:
                self._degraded("unbind_agent", None)
            else:
                self._local.forget_agent(agent_id)
                return ended
        ended = self._local.unbind_agent(agent_id)
        self._replay_soon()
        return ended

    # -- inside --------------------------------------------------------------------------------------------------

    def _replay_soon(self) -> None:
        if self._redis is not None:
            self._redis.replay_soon("sessions were changed without it")

    def _outage(self) -> int:
        return 0 if self._redis is None else self._redis.breaker.generation

    def _knows(self, session_id: str) -> bool:
        return self._local.knows(session_id, self._outage())

    def _ttl_ms(self, ttl: float | None) -> int:
        return int((self._ttl if ttl is None else check_ttl(ttl)) * 1000)

    def _degraded(self, what: str, error: BackendUnavailable | None) -> None:
        self._counters.add(f"sessions.degraded.{what}")
        if error is not None:
            raise SessionStoreUnavailable(f"this process does not know the session, and {error}") from error

    def _get_local(self, session_id: str, touch: bool, error: BackendUnavailable | None) -> SessionBinding | None:
        if touch:
            self._local.touch(session_id, self._ttl)
        binding = self._local.get(session_id)
        if error is not None:
            self._degraded("get", None if self._knows(session_id) else error)
        return binding

    def _extend(self, binding: SessionBinding, left_ms: int) -> bool:
        """Slide the expiry if it is time to. The index first: it may name a session too many, never one too few."""
        ttl_ms = self._ttl_ms(None)
        if self._redis is None or left_ms < 0 or left_ms > 0.9 * ttl_ms:
            return False
        try:
            _, existed = self._redis.pipeline(
                (
                    self._index.call((self._keys.agent_sessions(binding.agent_id),), (binding.session_id, str(ttl_ms))),
                    self._touch.call((self._keys.session(binding.session_id),), (str(ttl_ms),)),
                ),
                (self._index, self._touch),
            )
        except BackendUnavailable:
            self._degraded("touch", None)
            return self._local.touch(binding.session_id, self._ttl)
        return bool(existed)

    def _sessions_of(self, redis: RedisClient, agent_id: str, index: str) -> list[str]:
        named = [sid.decode() for sid in redis.call("ZRANGE", index, "0", "-1")]
        if not named:
            return []
        records = redis.pipeline([("GET", self._keys.session(sid)) for sid in named])
        return [
            sid
            for sid, raw in zip(named, records, strict=True)
            if raw is not None and decode(sid, raw, -1, self._now()).agent_id == agent_id
        ]

    def _unbind_all(self, redis: RedisClient, agent_id: str, index: str) -> int:
        named = [sid.decode() for sid in redis.call("ZRANGE", index, "0", "-1")]
        if not named:
            return 0
        return sum(
            redis.pipeline(
                [self._unbind.call((self._keys.session(sid),), (agent_id,)) for sid in named], (self._unbind,)
            )
        )

    def _replay(self, redis: RedisClient) -> None:
        """Tell Redis what it missed: revocations first, then bindings where the session is still unbound."""
        sessions, agents, bindings = self._local.debts()
        for some in _chunks(sessions):
            with self._telling(some):
                redis.pipeline(
                    [self._unbind.call((self._keys.session(sid),), ("",)) for sid, _ in some], (self._unbind,)
                )
        for debt in agents:
            with self._telling([debt]):
                self._unbind_all(redis, debt[0], self._keys.agent_sessions(debt[0]))
        for few in _chunks(bindings):
            commands = []
            for _, b in few:
                left = (b.expires_at - self._now()) if b.expires_at is not None else timedelta(seconds=self._ttl)
                ttl_ms = str(max(1, int(left.total_seconds() * 1000)))
                bound_at = b.bound_at.isoformat(timespec="microseconds")
                head = encode(b.agent_id, bound_at, b.data)
                commands += [
                    self._index.call((self._keys.agent_sessions(b.agent_id),), (b.session_id, ttl_ms)),
                    self._bind.call((self._keys.session(b.session_id),), (head, b.agent_id, bound_at, ttl_ms, "1")),
                ]
            replies: list[Any] = []
            with self._telling([debt for debt, _ in few]):
                replies = redis.pipeline(commands, (self._index, self._bind))
            for (_, b), (bound, raw, left_ms) in zip(few, replies[1::2], strict=False):
                if not bound:  # somebody bound it otherwise while we were cut off: theirs stands
                    self._counters.add("sessions.replays_refused")
                    with self._telling([]):
                        self._local.remember(decode(b.session_id, raw, left_ms, self._now()))

    @contextlib.contextmanager
    def _telling(self, debts: list[Debt]) -> Iterator[None]:
        """These debts are paid now, also where Redis answered with an error (a key of another type, say): the others
        were carried out, and one that never can be must not keep the rest from being told."""
        try:
            yield
        except (BackendUnavailable, Rejected):
            raise
        except BackendError as error:
            self._counters.add("sessions.replays_failed")
            log.error("a change made while Redis was away could not be told to it: %s", error)
        self._local.paid(debts, self._outage())


def _chunks(items: list[T]) -> list[list[T]]:
    return [items[i : i + _REPLAY_AT_ONCE] for i in range(0, len(items), _REPLAY_AT_ONCE)]
