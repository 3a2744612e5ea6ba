"""Pending writes: changes that a process made while its record of the sessions was away, and tells it on its return."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

from .._recovery import Recoverable
from ..breaker import CircuitBreaker
from .binding import SessionBinding, same_binding


class PendingWrite:
    """A write that the record has not been told of. A second write of the same kind is another object.

    Attributes:
        at: when it was made.
    """

    __slots__ = ("at",)

    def __init__(self, at: datetime) -> None:
        self.at: datetime = at


class Revocation(PendingWrite):
    """The end of a session.

    Attributes:
        known: the bindings that the record may have had then, as far as this process knows. All of them are over.
        seen: the record's own binding was among them. Any other has come since, whatever the clocks say.
    """

    __slots__ = ("known", "seen")

    def __init__(self, at: datetime, known: tuple[SessionBinding, ...] = (), seen: bool = False) -> None:
        super().__init__(at)
        self.known: tuple[SessionBinding, ...] = known
        self.seen: bool = seen

    def ends(self, binding: SessionBinding) -> bool:
        """Is this binding, which the record has now, over?"""
        if any(same_binding(binding, known) for known in self.known):
            return True
        return not self.seen and binding.bound_at <= self.at


class AgentRevocation(PendingWrite):
    """The end of all sessions of an agent.

    Attributes:
        told: sessions that have a pending Revocation of their own.
        left: those of the others that are not ended yet; None: nobody has looked yet which sessions the agent has.
    """

    __slots__ = ("left", "told")

    def __init__(self, at: datetime, told: frozenset[str]) -> None:
        super().__init__(at)
        self.told: frozenset[str] = told
        self.left: set[str] | None = None


class PendingBind(PendingWrite):
    """A binding.

    Attributes:
        was: the binding that the record had before, as far as this process knows.
        is_indexed: the agent's index names the session.
    """

    __slots__ = ("is_indexed", "was")

    def __init__(self, at: datetime, was: SessionBinding | None) -> None:
        super().__init__(at)
        self.was: SessionBinding | None = was
        self.is_indexed: bool = False


class PendingUpdate(PendingWrite):
    """Other data for a session.

    Attributes:
        was: the binding that was changed. The record is changed only where it still has that one's data.
    """

    __slots__ = ("was",)

    def __init__(self, at: datetime, was: SessionBinding) -> None:
        super().__init__(at)
        self.was: SessionBinding = was


#: An outage of a server: its breaker, and the breaker's period.
Outage: TypeAlias = tuple[CircuitBreaker | None, int]
NO_OUTAGE: Outage = None, 0


def outage_of(server: Recoverable) -> Outage:
    """The server's outage, or its last one."""
    return server.breaker, server.breaker.period


#: A session or an agent, and what the record must be told of it.
Pending: TypeAlias = tuple[str, PendingWrite]
