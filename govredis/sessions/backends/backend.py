"""SessionBackend, which every place that keeps sessions implements."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...errors import BackendUnavailable, ConfigurationError
from ..binding import BindRequest, SessionBinding, UpdateBase
from ..parity import SessionParity


class Unconfirmed(BackendUnavailable):
    """Carried out, and no replica has said in time that it has it. Private: callers see a SessionStoreUnavailable."""


class SessionBackend(ABC):
    """Keeps sessions bound to agents. Every method raises BackendUnavailable where it cannot answer."""

    @abstractmethod
    def bind(self, request: BindRequest) -> tuple[SessionBinding, bool]:
        """Bind a session. Returns the binding, and False if a revocation overtook it.

        With `if_absent`, a session that is bound already keeps its binding, and that is returned.
        """

    @abstractmethod
    def get(self, session_id: str, touch: int) -> SessionBinding | None:
        """The session's binding; None if it has none.

        Args:
            touch: the TTL, in milliseconds, to give it as well, if a tenth of that has passed; 0: none.
        """

    @abstractmethod
    def read_for_update(self, session_id: str) -> UpdateBase | None:
        """The session as `compare_and_set` takes it; None if it has no binding."""

    @abstractmethod
    def compare_and_set(self, base: UpdateBase, data: str | None) -> SessionBinding | None:
        """Give the session other data (JSON) if it still is as it was read; its TTL stays. None if it is not."""

    @abstractmethod
    def unbind(self, session_id: str) -> bool:
        """End a session. Returns whether it was bound."""

    @abstractmethod
    def for_agent(self, agent_id: str) -> list[str]:
        """The agent's sessions, sorted."""

    @abstractmethod
    def unbind_agent(self, agent_id: str) -> int:
        """End all sessions of an agent. Returns how many."""


class PrimarySessionBackend(SessionBackend):
    """The backend that all processes share, and that decides which sessions there are.

    A process goes on without it while it is away, and tells it of its pending writes on its return: see ReplayTarget.
    """

    def stand_in(self) -> SessionBackend | None:
        """The backend that shows others what changes while this one is away; None where there is none."""
        return None

    def purge(self) -> int:
        """Delete the rows of sessions that have been over for a TTL. Returns how many; 0 where there are no rows."""
        return 0

    def verify(self) -> SessionParity:
        """Compare rows and row cache. Raises ConfigurationError where there are not both."""
        raise ConfigurationError(NOTHING_TO_COMPARE)


NOTHING_TO_COMPARE = "there is nothing to compare without both Redis and GOVREDIS_DATABASE_URL"
