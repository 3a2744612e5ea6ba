"""This process's memory of sessions: it answers while no server can be asked, and keeps the pending writes."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from ..._fork import renew_in_child
from ...errors import SessionStoreUnavailable
from ..binding import BindRequest, SessionBinding, UpdateBase, later, same_binding
from ..pending import AgentRevocation, Pending, PendingBind, PendingUpdate, PendingWrite, Revocation
from .backend import SessionBackend

PendingT = TypeVar("PendingT", bound=PendingWrite)
#: So many ended bindings of one session are remembered: the newest.
_KNOWN = 8


class MemorySessionBackend(SessionBackend):
    """Bindings that this process has seen, and the changes it made while the primary backend was away.

    Bounded: beyond `entries` the session used longest ago is forgotten. A session with a pending write never is: a
    bind or an unbind that would need more room raises SessionStoreUnavailable, rather than be lost later.

    Args:
        entries: sessions kept, and pending writes of each kind.
        now: aware UTC.
        primary: the primary's name; None where there is no server, ever (REDIS_ENABLED=0 and no PostgreSQL).
    """

    def __init__(self, entries: int, *, now: Callable[[], datetime], primary: str | None) -> None:
        self.primary = primary
        self._entries = entries
        self._now = now
        self._known: OrderedDict[str, SessionBinding] = OrderedDict()
        #: Counts the ends of sessions that were noted here.
        self.ends: int = 0
        #: Sessions whose revocation the primary was told of, and in which outage, which may not be over yet.
        self._ended: OrderedDict[str, object] = OrderedDict()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        # The pending writes are the parent's: a child that told them again, later, could undo what came between.
        self._to_unbind: dict[str, Revocation] = {}
        self._to_unbind_agents: dict[str, AgentRevocation] = {}
        self._to_bind: dict[str, PendingBind] = {}
        self._to_update: dict[str, PendingUpdate] = {}

    # -- as a backend ----------------------------------------------------------------------------------------------

    def bind(self, request: BindRequest) -> tuple[SessionBinding, bool]:
        with self._lock:
            sid = request.session_id
            old = self._live(sid)
            if old is not None and request.if_absent:
                return replace(old, backend="local"), True
            binding = request.binding("local", request.ends_at(), old.bind_count + 1 if old else 1)
            if old is not None and request.keeps_ttl:
                binding = replace(binding, expires_at=later(old.expires_at, binding.expires_at))
            pending = self._to_bind.get(sid)
            self._note(self._to_bind, sid, lambda at: PendingBind(at, old if pending is None else pending.was))
            self._to_update.pop(sid, None)
            self._put(binding)
            self._ended.pop(sid, None)
            return binding, True

    def get(self, session_id: str, touch: int = 0) -> SessionBinding | None:
        with self._lock:
            binding = self._live(session_id)
            if binding is not None and touch and binding.expires_at is not None:
                ends = self._now() + timedelta(milliseconds=touch)
                binding = replace(binding, expires_at=max(binding.expires_at, ends))
                self._put(binding)
        # Here, not where it is remembered: that is part of every hit.
        return None if binding is None else replace(binding, backend="local")

    def read_for_update(self, session_id: str) -> UpdateBase | None:
        binding = self.get(session_id)
        return None if binding is None else UpdateBase(binding, None)

    def compare_and_set(self, base: UpdateBase, data: str | None) -> SessionBinding | None:
        with self._lock:
            sid = base.binding.session_id
            known = self._live(sid)
            if known is None or replace(known, backend="local") != base.binding:
                return None
            pending = self._to_update.get(sid)
            changed = replace(known, data=None if data is None else json.loads(data), backend="local")
            self._note(self._to_update, sid, lambda at: PendingUpdate(at, known if pending is None else pending.was))
            self._put(changed)
            return changed

    def unbind(self, session_id: str) -> bool:
        with self._lock:
            known = self._live(session_id) is not None
            self._revoke(session_id)
            return known

    def for_agent(self, agent_id: str) -> list[str]:
        with self._lock:
            return sorted(sid for sid in self._of(agent_id) if self._live(sid) is not None)

    def unbind_agent(self, agent_id: str) -> int:
        with self._lock:
            mine = [sid for sid in self._of(agent_id) if self._live(sid) is not None]
            before = self._to_unbind_agents.get(agent_id)
            told = frozenset(mine).union(
                [] if before is None else before.told,
                [sid for sid, end in list(self._to_unbind.items()) if any(b.agent_id == agent_id for b in end.known)],
            )
            self._note(self._to_unbind_agents, agent_id, lambda at: AgentRevocation(at, told))
            for sid in mine:
                self._revoke(sid)
            return len(mine)

    # -- what the primary says --------------------------------------------------------------------------------------

    def remember(self, binding: SessionBinding, since: int | None = None) -> None:
        """Note a binding that the primary has, unless a pending write is newer.

        Args:
            since: `ends` as it was before the primary was asked: an end noted meanwhile is newer than what was read.
        """
        with self._lock:
            if since is not None and since != self.ends:
                known = self._known.get(binding.session_id)
                if known is not None and not same_binding(known, binding) and not self._is_pending(binding.session_id):
                    del self._known[binding.session_id]  # neither is certain: better none than an older one
                return
            if not self._is_pending(binding.session_id) and binding.agent_id not in self._to_unbind_agents:
                self._put(binding)
                self._ended.pop(binding.session_id, None)

    def forget(self, session_id: str) -> None:
        """Note that the primary has no such session. A pending write stands."""
        with self._lock:
            self.ends += 1
            if not self._is_pending(session_id):
                self._known.pop(session_id, None)

    def forget_agent(self, agent_id: str) -> None:
        """As `forget`, for all sessions of an agent."""
        with self._lock:
            self.ends += 1
            for sid in self._of(agent_id):
                if not self._is_pending(sid):
                    del self._known[sid]

    # -- what pending writes make of its answers ---------------------------------------------------------------------

    def knows(self, session_id: str, outage: object = 0) -> bool:
        """Does this process know that the session is bound, or that it was revoked here in this outage?"""
        with self._lock:
            return (
                self._live(session_id) is not None
                or session_id in self._to_unbind
                or self._ended.get(session_id) == outage
            )

    def is_revoked(self, binding: SessionBinding) -> bool:
        """Was this session revoked here, and was the primary not told yet?

        Its agent's revocation has ended those that were bound before it, by the clocks, as the primary will be told.
        """
        if not self._to_unbind and not self._to_unbind_agents:
            return False
        session_id = binding.session_id
        with self._lock:
            if session_id in self._to_bind:
                return False
            of_agent = self._to_unbind_agents.get(binding.agent_id)
            return session_id in self._to_unbind or (of_agent is not None and binding.bound_at <= of_agent.at)

    def revoked_with(self, agent_id: str) -> frozenset[str]:
        """The sessions that were revoked here together with their agent."""
        with self._lock:
            revocation = self._to_unbind_agents.get(agent_id)
            return frozenset() if revocation is None else revocation.told

    def bound_here(self, session_id: str) -> SessionBinding | None:
        """The binding made here that the primary was not told of; None if there is none."""
        if not self._to_bind:
            return None
        with self._lock:
            binding = self._live(session_id) if session_id in self._to_bind else None
        return None if binding is None else replace(binding, backend="local")

    def with_pending_data(self, binding: SessionBinding) -> SessionBinding:
        """The primary's binding, or the same with data that the primary was not told of."""
        if not self._to_update:
            return binding
        with self._lock:
            known = self._live(binding.session_id)
            if known is None or binding.session_id not in self._to_update or not same_binding(known, binding):
                return binding
            return replace(known, backend="local")

    def with_pending(self, agent_id: str, found: list[str]) -> list[str]:
        """An agent's sessions, as they are once the primary, which has `found`, was told."""
        if not self._to_bind and not self._to_unbind and not self._to_unbind_agents:
            return found
        with self._lock:
            bound = {sid: binding.agent_id for sid in list(self._to_bind) if (binding := self._live(sid)) is not None}
            gone = set(found) if agent_id in self._to_unbind_agents else self._to_unbind.keys() | bound.keys()
        return sorted({sid for sid in found if sid not in gone} | {sid for sid in bound if bound[sid] == agent_id})

    # -- pending writes ----------------------------------------------------------------------------------------------

    def pending(
        self,
    ) -> tuple[
        list[tuple[str, Revocation]],
        list[tuple[str, AgentRevocation]],
        list[tuple[tuple[str, PendingBind], SessionBinding]],
    ]:
        """Sessions revoked, agents revoked, and bindings, to be told in this order."""
        with self._lock:
            bindings = [(write, b) for write in list(self._to_bind.items()) if (b := self._live(write[0])) is not None]
            return list(self._to_unbind.items()), list(self._to_unbind_agents.items()), bindings

    def told(self, writes: Sequence[Pending], outage: object = 0) -> None:
        """The primary was told of these, at the end of this outage. A write made anew meanwhile is still pending."""
        with self._lock:
            every: tuple[dict[str, Any], ...] = self._to_unbind, self._to_unbind_agents, self._to_bind
            for pending in every:
                for name, write in writes:
                    if pending.get(name) is write:
                        del pending[name]
                        if pending is self._to_unbind:
                            self._ended[name] = outage
            while len(self._ended) > self._entries:
                self._ended.popitem(last=False)

    def pending_updates(self) -> list[tuple[str, PendingUpdate, SessionBinding]]:
        """Sessions whose data the primary was not told of, each with its present binding; to be told last."""
        with self._lock:
            updates = list(self._to_update.items())
            return [(sid, update, b) for sid, update in updates if (b := self._live(sid)) is not None]

    def update_told(self, session_id: str, update: PendingUpdate, now: SessionBinding | None) -> None:
        """The primary was told of that update, and has `now`, None for nothing. An update made meanwhile starts from
        that."""
        with self._lock:
            pending = self._to_update.get(session_id)
            if pending is update:
                del self._to_update[session_id]
                if now is None:
                    self._known.pop(session_id, None)
                else:
                    self._put(now)
            elif pending is not None and now is not None:
                pending.was = now

    # -- inside ------------------------------------------------------------------------------------------------------

    def _is_pending(self, session_id: str) -> bool:
        return session_id in self._to_unbind or session_id in self._to_bind or session_id in self._to_update

    def _of(self, agent_id: str) -> list[str]:
        return [sid for sid, b in list(self._known.items()) if b.agent_id == agent_id]

    def _live(self, session_id: str) -> SessionBinding | None:
        binding = self._known.get(session_id)
        if binding is not None and binding.expires_at is not None and binding.expires_at <= self._now():
            del self._known[session_id]
            self._to_bind.pop(session_id, None)
            self._to_update.pop(session_id, None)
            return None
        return binding

    def _put(self, binding: SessionBinding) -> None:
        self._known[binding.session_id] = binding
        self._known.move_to_end(binding.session_id)
        if len(self._known) > self._entries:
            needed = self._to_bind, self._to_update
            oldest = next((sid for sid in self._known if not any(sid in pending for pending in needed)), None)
            if oldest is not None:
                del self._known[oldest]

    def _revoke(self, session_id: str) -> None:
        known, bound = self._known.get(session_id), self._to_bind.get(session_id)
        before = self._to_unbind.get(session_id, Revocation(self._now()))
        was = known if bound is None else bound.was
        over = [*before.known, *(b for b in (known, was) if b is not None)]
        seen = before.seen or was is not None
        self._note(self._to_unbind, session_id, lambda at: Revocation(at, tuple(over[-_KNOWN:]), seen))
        for kept in (self._known, self._to_bind, self._to_update):
            kept.pop(session_id, None)

    def _note(self, pending: dict[str, PendingT], name: str, write: Callable[[datetime], PendingT]) -> None:
        """Note a pending write. Raises SessionStoreUnavailable if there is no room for it."""
        if self.primary is None:
            return
        if len(pending) >= self._entries and name not in pending:
            raise SessionStoreUnavailable(
                f"{self.primary} is away, and {self._entries} changes of this process wait for its return already"
            )
        pending[name] = write(self._now())
