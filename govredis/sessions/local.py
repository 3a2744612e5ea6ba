"""This process's memory of sessions: what is left while Redis is away."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

from .._fork import renew_in_child
from ..errors import SessionStoreUnavailable
from .binding import SessionBinding


class LocalSessions:
    """Bindings that this process has seen, and what it owes Redis: revocations and bindings made while it was away.

    Bounded: beyond `entries` the session used longest ago is forgotten, but never one that Redis has not been told of:
    rather than acknowledge what would be lost, a bind or an unbind beyond that raises SessionStoreUnavailable.

    Args:
        entries: sessions kept, and debts of each kind.
        now: aware UTC.
        owing: False where there is no Redis to tell, ever (REDIS_ENABLED=0).
    """

    def __init__(self, entries: int, now: Callable[[], datetime], owing: bool) -> None:
        self._entries = entries
        self._owing = owing
        self._now = now
        self._known: OrderedDict[str, SessionBinding] = OrderedDict()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.Lock()
        # The debts are the parent's: a child that paid one again, later, could undo what came between.
        self._to_unbind: OrderedDict[str, None] = OrderedDict()
        self._to_unbind_agents: OrderedDict[str, None] = OrderedDict()
        self._to_bind: OrderedDict[str, None] = OrderedDict()

    def remember(self, binding: SessionBinding) -> None:
        """Note what Redis said."""
        with self._lock:
            self._put(replace(binding, backend="local"))

    def forget(self, session_id: str) -> None:
        with self._lock:
            self._known.pop(session_id, None)

    def forget_agent(self, agent_id: str) -> None:
        with self._lock:
            for sid in self._of(agent_id):
                del self._known[sid]

    def get(self, session_id: str) -> SessionBinding | None:
        with self._lock:
            return self._live(session_id)

    def for_agent(self, agent_id: str) -> list[str]:
        with self._lock:
            return sorted(sid for sid in self._of(agent_id) if self._live(sid) is not None)

    def knows(self, session_id: str) -> bool:
        """Does this process know whose the session is, or that it was revoked here while Redis was away?"""
        with self._lock:
            return self._live(session_id) is not None or session_id in self._to_unbind

    def bind(self, binding: SessionBinding) -> SessionBinding:
        """Bind while Redis is away, and owe it."""
        with self._lock:
            old = self._live(binding.session_id)
            binding = replace(binding, backend="local", bind_count=old.bind_count + 1 if old else 1)
            self._owe(self._to_bind, binding.session_id)
            self._put(binding)
            return binding

    def touch(self, session_id: str, ttl: float) -> bool:
        with self._lock:
            binding = self._live(session_id)
            if binding is None:
                return False
            self._put(replace(binding, expires_at=self._now() + timedelta(seconds=ttl)))
            return True

    def unbind(self, session_id: str) -> bool:
        """Revoke while Redis is away, and owe it. Returns whether it was known here."""
        with self._lock:
            known = self._live(session_id) is not None
            self._owe(self._to_unbind, session_id)
            self._known.pop(session_id, None)
            self._to_bind.pop(session_id, None)
            return known

    def unbind_agent(self, agent_id: str) -> int:
        """Revoke all of an agent's while Redis is away, and owe it. Returns how many were known here."""
        with self._lock:
            self._owe(self._to_unbind_agents, agent_id)
            mine = [sid for sid in self._of(agent_id) if self._live(sid) is not None]
            for sid in mine:
                self._owe(self._to_unbind, sid)
                del self._known[sid]
                self._to_bind.pop(sid, None)
            return len(mine)

    def debts(self) -> tuple[list[str], list[str], list[SessionBinding]]:
        """What Redis has not been told: sessions revoked, agents revoked, bindings; to be told in this order."""
        with self._lock:
            bindings = [b for sid in self._to_bind if (b := self._live(sid)) is not None]
            return list(self._to_unbind), list(self._to_unbind_agents), bindings

    def paid(self, sessions: list[str], agents: list[str], bindings: list[SessionBinding]) -> None:
        with self._lock:
            for sid in sessions:
                self._to_unbind.pop(sid, None)
            for agent in agents:
                self._to_unbind_agents.pop(agent, None)
            for binding in bindings:
                if self._known.get(binding.session_id) is binding:
                    self._to_bind.pop(binding.session_id, None)

    def _of(self, agent_id: str) -> list[str]:
        return [sid for sid, b in self._known.items() if b.agent_id == agent_id]

    def _live(self, session_id: str) -> SessionBinding | None:
        binding = self._known.get(session_id)
        if binding is not None and binding.expires_at is not None and binding.expires_at <= self._now():
            del self._known[session_id]
            self._to_bind.pop(session_id, None)
            return None
        return binding

    def _put(self, binding: SessionBinding) -> None:
        self._known[binding.session_id] = binding
        self._known.move_to_end(binding.session_id)
        if len(self._known) > self._entries:
            oldest = next((sid for sid in self._known if sid not in self._to_bind), None)
            if oldest is not None:
                del self._known[oldest]

    def _owe(self, debts: OrderedDict[str, None], what: str) -> None:
        if not self._owing:
            return
        if len(debts) >= self._entries and what not in debts:
            raise SessionStoreUnavailable(f"Redis is away, and this process owes it {self._entries} changes already")
        debts[what] = None
