"""This process's memory of sessions: what is left while nobody else can be asked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeAlias

from .._fork import renew_in_child
from ..errors import SessionStoreUnavailable
from .binding import SessionBinding


class Token:
    """One debt: owed anew, it is another. `at` is when it came about."""

    __slots__ = ("at",)

    def __init__(self, at: datetime) -> None:
        self.at = at


#: A session or an agent that the store is to be told of.
Debt: TypeAlias = tuple[str, Token]


class LocalSessions:
    """Bindings that this process has seen, and what it owes the store that keeps them (PostgreSQL, or Redis where there
    is none): revocations and bindings made while it was away.

    Bounded: beyond `entries` the session used longest ago is forgotten, but never one that the store has not been told
    of: rather than acknowledge what would be lost, a bind or an unbind beyond that raises SessionStoreUnavailable.

    Args:
        entries: sessions kept, and debts of each kind.
        now: aware UTC.
        owed_to: the store's name; None where there is none to tell, ever (REDIS_ENABLED=0 and no PostgreSQL).
    """

    def __init__(self, entries: int, now: Callable[[], datetime], owed_to: str | None) -> None:
        self._entries = entries
        self.owed_to = owed_to
        self._now = now
        self._known: OrderedDict[str, SessionBinding] = OrderedDict()
        #: Counts the ends of sessions noted here.
        self.changes = 0
        #: Sessions whose revocation the store has been told of, and in which outage: it may not be over yet.
        self._ended: OrderedDict[str, int] = OrderedDict()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        # The debts are the parent's: a child that paid one again, later, could undo what came between.
        self._to_unbind: dict[str, Token] = {}
        self._to_unbind_agents: dict[str, Token] = {}
        self._to_bind: dict[str, Token] = {}

    def remember(self, binding: SessionBinding, since: int | None = None) -> None:
        """Note what the store said, unless it has still to be told what happened since.

        Args:
            since: `changes` as it was before it was asked: an end noted meanwhile is newer than what was read.
        """
        with self._lock:
            if since is not None and since != self.changes:
                return
            if not self._owes(binding.session_id) and binding.agent_id not in self._to_unbind_agents:
                self._put(binding)
                self._ended.pop(binding.session_id, None)

    def forget(self, session_id: str) -> None:
        """The store said that it is gone; but what it has still to be told stands."""
        with self._lock:
            self.changes += 1
            if not self._owes(session_id):
                self._known.pop(session_id, None)

    def forget_agent(self, agent_id: str) -> None:
        """As forget, for all sessions of an agent."""
        with self._lock:
            self.changes += 1
            for sid in self._of(agent_id):
                if not self._owes(sid):
                    del self._known[sid]

    def get(self, session_id: str) -> SessionBinding | None:
        with self._lock:
            binding = self._live(session_id)
        # Here, not where it is noted: that is part of every hit.
        return None if binding is None else replace(binding, backend="local")

    def for_agent(self, agent_id: str) -> list[str]:
        with self._lock:
            return sorted(sid for sid in self._of(agent_id) if self._live(sid) is not None)

    def knows(self, session_id: str, outage: int = 0) -> bool:
        """Does this process know whose the session is, or that it was revoked here in this outage?"""
        with self._lock:
            return (
                self._live(session_id) is not None
                or session_id in self._to_unbind
                or self._ended.get(session_id) == outage
            )

    def revoked(self, session_id: str, agent_id: str | None) -> bool:
        """Was the session, bound to that agent, revoked here, and does the store not know yet?"""
        if not self._to_unbind and not self._to_unbind_agents:
            return False
        with self._lock:
            if session_id in self._to_bind:
                return False
            return session_id in self._to_unbind or agent_id in self._to_unbind_agents

    def bind(self, binding: SessionBinding) -> SessionBinding:
        """Bind while the store is away, and owe it."""
        with self._lock:
            old = self._live(binding.session_id)
            binding = replace(binding, backend="local", bind_count=old.bind_count + 1 if old else 1)
            self._owe(self._to_bind, binding.session_id)
            self._put(binding)
            self._ended.pop(binding.session_id, None)
            return binding

    def touch(self, session_id: str, ttl: float) -> bool:
        with self._lock:
            binding = self._live(session_id)
            if binding is None:
                return False
            if binding.expires_at is not None:
                self._put(replace(binding, expires_at=max(binding.expires_at, self._now() + timedelta(seconds=ttl))))
            return True

    def unbind(self, session_id: str) -> bool:
        """Revoke while the store is away, and owe it. Returns whether it was known here."""
        with self._lock:
            known = self._live(session_id) is not None
            self._owe(self._to_unbind, session_id)
            self._known.pop(session_id, None)
            self._to_bind.pop(session_id, None)
            return known

    def unbind_agent(self, agent_id: str) -> int:
        """Revoke all of an agent's while the store is away, and owe it. Returns how many were known here."""
        with self._lock:
            self._owe(self._to_unbind_agents, agent_id)
            mine = [sid for sid in self._of(agent_id) if self._live(sid) is not None]
            for sid in mine:
                self._owe(self._to_unbind, sid)
                del self._known[sid]
                self._to_bind.pop(sid, None)
            return len(mine)

    def debts(self) -> tuple[list[Debt], list[Debt], list[tuple[Debt, SessionBinding]]]:
        """What the store has not been told: sessions revoked, agents revoked, bindings; to be told in this order."""
        with self._lock:
            bindings = [(debt, b) for debt in list(self._to_bind.items()) if (b := self._live(debt[0])) is not None]
            return list(self._to_unbind.items()), list(self._to_unbind_agents.items()), bindings

    def paid(self, debts: list[Debt], outage: int = 0) -> None:
        """The store was told of these, at the end of this outage. One that was owed anew meanwhile still is."""
        with self._lock:
            for owed in (self._to_unbind, self._to_unbind_agents, self._to_bind):
                for what, token in debts:
                    if owed.get(what) is token:
                        del owed[what]
                        if owed is self._to_unbind:
                            self._ended[what] = outage
            while len(self._ended) > self._entries:
                self._ended.popitem(last=False)

    def _owes(self, session_id: str) -> bool:
        return session_id in self._to_unbind or session_id in self._to_bind

    def _of(self, agent_id: str) -> list[str]:
        return [sid for sid, b in list(self._known.items()) if b.agent_id == agent_id]

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

    def _owe(self, debts: dict[str, Token], what: str) -> None:
        if self.owed_to is None:
            return
        if len(debts) >= self._entries and what not in debts:
            raise SessionStoreUnavailable(
                f"{self.owed_to} is away, and this process owes it {self._entries} changes already"
            )
        debts[what] = Token(self._now())
