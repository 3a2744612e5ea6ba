"""Replay: tells the primary backend, on its return, the changes that this process made while it was away."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from .._counters import Counters
from ..breaker import Rejected
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .backends.backend import PrimarySessionBackend
from .backends.memory_backend import MemorySessionBackend
from .binding import BindRequest, SessionBinding, encode_data, same_binding
from .pending import Pending, PendingUpdate

log: logging.Logger = logging.getLogger("govredis")

T = TypeVar("T")

_AT_ONCE = 500


class Replay:
    """Tells revocations first, then bindings where the session is still unbound, then data where the primary still has
    the data that this process knew.

    Args:
        memory: keeps the pending writes.
        outage: gives the number of the outage that ends.
    """

    def __init__(
        self,
        primary: PrimarySessionBackend,
        memory: MemorySessionBackend,
        outage: Callable[[], int],
        *,
        now: Callable[[], datetime],
        counters: Counters,
    ) -> None:
        self._primary = primary
        self._memory = memory
        self._outage = outage
        self._now = now
        self._counters = counters

    def __call__(self) -> None:
        primary = self._primary
        sessions, agents, bindings = self._memory.pending()
        for some in _chunks(sessions):
            with self._telling(some):
                primary.tell_unbound(some)
        for agent in agents:
            with self._telling([agent]):
                primary.tell_agent_unbound(agent)
        for few in _chunks(bindings):
            others: list[SessionBinding | None] = []
            with self._telling([write for write, _ in few]):
                others = primary.tell_bound([(write, self._request(binding)) for write, binding in few])
            for other in others:
                if other is not None:  # another process bound it while this one was cut off: that stands
                    self._counters.add("sessions.replays_refused")
                    self._memory.remember(other)
        for name, update, binding in self._memory.pending_updates():
            now: SessionBinding | None = None
            with self._telling([]):
                now = self._tell_updated(update, binding)
            self._memory.update_told(name, update, now)

    def _tell_updated(self, update: PendingUpdate, binding: SessionBinding) -> SessionBinding | None:
        """Returns the session as it is then: another binding where it was changed by others meanwhile."""
        base = self._primary.read_for_update(binding.session_id)
        if base is not None and same_binding(base.binding, binding):
            if base.binding.data == binding.data:  # told before, or bound with it
                return base.binding
            if base.binding.data == update.was.data:
                updated = self._primary.compare_and_set(base, encode_data(binding.data))
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
    def _telling(self, writes: Sequence[Pending]) -> Iterator[None]:
        """These writes are told then, also where the answer was an error, such as a key of another type.

        The others were carried out, and a write that never can be must not keep the rest from being told.
        """
        try:
            yield
        except (BackendUnavailable, Rejected, ConfigurationError):
            raise
        except BackendError as error:
            self._counters.add("sessions.replays_failed")
            log.error("a change made while %s was away could not be told to it: %s", self._memory.primary, error)
        self._memory.told(writes, self._outage())


def _chunks(items: list[T]) -> list[list[T]]:
    return [items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE)]
