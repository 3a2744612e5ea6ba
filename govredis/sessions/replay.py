"""Replay: tells the primary backend, on its return, the changes that this process made while it was away."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from .._counters import Counters
from .._daemon import start_daemon
from .._recovery import Recoverable
from ..breaker import Rejected
from ..client import TryAgain
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .backends.backend import SessionBackend
from .backends.memory_backend import MemorySessionBackend
from .backends.replay_target import ReplayTarget
from .binding import BindRequest, SessionBinding, encode_data, same_binding
from .pending import NO_OUTAGE, AgentRevocation, Outage, Pending, PendingBind, PendingUpdate, outage_of

log: logging.Logger = logging.getLogger("govredis")

T = TypeVar("T")

_AT_ONCE = 500
#: Seconds until a session is told of whose slot was on its way.
_LATER = 1.0


class Replay:
    """Tells revocations first, then bindings where the session is still unbound, then data where the primary still has
    the data that this process knew.

    It tells the server that is back, and asks no other: of a Redis Cluster, one node. An agent's index and its sessions
    may be on several. So two kinds of writes are told in two steps, and the first has the second follow. The sessions
    that an index names are ended by the replays of their nodes. A binding is told by its node's replay, once the replay
    of the index's node has noted it there: an index may name a session too many, never one too few.

    A session whose slot is on its way keeps nobody from its node. It is told a second later, and again.

    Args:
        target: the server as a ReplayTarget.
        memory: keeps the pending writes.
        tell_soon: has sessions, and an agent, told by the replays of the servers that keep them.
    """

    def __init__(
        self,
        target: Callable[[Any], ReplayTarget],
        memory: MemorySessionBackend,
        tell_soon: Callable[[Iterable[str], str | None], None],
        *,
        now: Callable[[], datetime],
        counters: Counters,
    ) -> None:
        self._target = target
        self._memory = memory
        self._tell_soon = tell_soon
        self._now = now
        self._counters = counters
        self._late: set[str] = set()
        self._thread: threading.Thread | None = None

    def __call__(self, server: Recoverable) -> None:
        target, outage = self._target(server), outage_of(server)
        sessions, agents, bindings = self._memory.pending()
        for some in _chunks([write for write in sessions if target.has_session(write[0])]):
            with self._telling(target, some, outage):
                target.tell_unbound(some)
        for agent_id, revocation in agents:
            self._tell_agent(target, agent_id, revocation)
        for few in _chunks(bindings):
            self._tell_bound(target, few, outage)
        for name, update, binding in self._memory.pending_updates():
            if target.has_session(name):
                try:
                    now: SessionBinding | None = None
                    with self._telling(target, []):
                        now = self._tell_updated(target.backend, update, binding)
                    self._memory.update_told(name, update, now)
                except TryAgain:
                    target.late.add(name)
        if target.late:
            self._tell_later(target.late)

    def _tell_agent(self, target: ReplayTarget, agent_id: str, revocation: AgentRevocation) -> None:
        is_new = revocation.left is None
        if is_new and not target.has_index(agent_id):
            return
        with self._failing([(agent_id, revocation)], NO_OUTAGE):
            target.tell_agent_unbound(agent_id, revocation)
            if not revocation.left:
                self._memory.told([(agent_id, revocation)])
            elif is_new:
                self._tell_soon([sid for sid in revocation.left if not target.has_session(sid)], None)

    def _tell_bound(
        self, target: ReplayTarget, bindings: Sequence[tuple[tuple[str, PendingBind], SessionBinding]], outage: Outage
    ) -> None:
        named = [(write, binding) for write, binding in bindings if target.has_index(binding.agent_id)]
        with self._failing([write for write, _ in named], outage):
            target.tell_indexed([self._request(binding) for _, binding in named])
            for (_, pending), _ in named:
                pending.is_indexed = True
        if elsewhere := [sid for (sid, _), _ in named if not target.has_session(sid)]:
            self._tell_soon(elsewhere, None)
        kept = [(write, binding) for write, binding in bindings if target.has_session(write[0])]
        for agent_id in {binding.agent_id for (_, pending), binding in kept if not pending.is_indexed}:
            self._tell_soon((), agent_id)
        ready = [(write, binding) for write, binding in kept if write[1].is_indexed]
        others: list[SessionBinding | None] = []
        with self._telling(target, [write for write, _ in ready], outage):
            others = target.tell_bound([self._request(binding) for _, binding in ready])
        for other in others:
            if other is not None:  # another process bound it while this one was cut off: that stands
                self._counters.add("sessions.replays_refused")
                self._memory.remember(other)

    def _tell_updated(
        self, backend: SessionBackend, update: PendingUpdate, binding: SessionBinding
    ) -> SessionBinding | None:
        """Returns the session as it is then: another binding where it was changed by others meanwhile."""
        base = backend.read_for_update(binding.session_id)
        if base is not None and same_binding(base.binding, binding):
            if base.binding.data == binding.data:  # told before, or bound with it
                return base.binding
            if base.binding.data == update.was.data:
                updated = backend.compare_and_set(base, encode_data(binding.data))
                if updated is not None:
                    return updated
        self._counters.add("sessions.replays_refused")
        return None if base is None else base.binding

    def _request(self, binding: SessionBinding) -> BindRequest:
        """A binding made here, as the primary is told of it."""
        left = None if binding.expires_at is None else binding.expires_at - self._now()
        ttl_ms = None if left is None else max(1, left // timedelta(milliseconds=1))
        data = encode_data(binding.data)
        return BindRequest(binding.session_id, binding.agent_id, binding.bound_at, ttl_ms, data, True)

    @contextlib.contextmanager
    def _telling(self, target: ReplayTarget, writes: Sequence[Pending], outage: Outage = NO_OUTAGE) -> Iterator[None]:
        """These writes are told then, or late, or have failed."""
        with self._failing(writes, outage):
            yield
            self._memory.told([write for write in writes if write[0] not in target.late], outage)

    @contextlib.contextmanager
    def _failing(self, writes: Sequence[Pending], outage: Outage) -> Iterator[None]:
        """These writes are pending no more where the answer was an error, such as a key of another type.

        The others were carried out, and a write that never can be must not keep the rest from being told.
        """
        try:
            yield
        except (BackendUnavailable, Rejected, ConfigurationError):
            raise
        except BackendError as error:
            self._counters.add("sessions.replays_failed")
            log.error("a change made while %s was away could not be told to it: %s", self._memory.primary, error)
            self._memory.told(writes, outage)

    def _tell_later(self, late: set[str]) -> None:
        self._late.update(late)
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._thread = start_daemon("govredis-sessions", self._run_later)

    def _run_later(self) -> None:
        time.sleep(_LATER)
        self._thread = None  # first: sessions that are late from now on have a thread of their own
        late = []
        while self._late:
            late.append(self._late.pop())
        self._tell_soon(late, None)


def _chunks(items: list[T]) -> list[list[T]]:
    return [items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE)]
