"""ReplayTarget: the server that a replay tells of pending writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..binding import BindRequest, SessionBinding
from ..pending import AgentRevocation, Revocation
from .backend import SessionBackend


class ReplayTarget(ABC):
    """A server that is back, as the one that keeps sessions; of a Redis Cluster one node. Nothing else is asked.

    The methods `tell_*` change nothing that others have bound since. They raise BackendUnavailable, BackendError.

    Attributes:
        backend: what the server keeps.
        late: sessions that could not be told of yet, as their slots are on their way to another node.
    """

    backend: SessionBackend

    def __init__(self) -> None:
        self.late: set[str] = set()

    def has_session(self, session_id: str) -> bool:
        """Does this server keep the session?"""
        return True

    def has_index(self, agent_id: str) -> bool:
        """Does this server know which sessions the agent has?"""
        return True

    @abstractmethod
    def tell_unbound(self, pending: Sequence[tuple[str, Revocation]]) -> None:
        """Sessions that were ended."""

    @abstractmethod
    def tell_agent_unbound(self, agent_id: str, revocation: AgentRevocation) -> None:
        """An agent whose sessions were ended: those that this server keeps. It has the index, or `left` is known.

        The sessions that other servers keep stay in `left`.
        """

    @abstractmethod
    def tell_indexed(self, requests: Sequence[BindRequest]) -> None:
        """Sessions that are told as bound after this: it has their agents' indexes."""

    @abstractmethod
    def tell_bound(self, requests: Sequence[BindRequest]) -> list[SessionBinding | None]:
        """Sessions that were bound. Returns for each the binding of another that stands in its place, or None."""
