"""PostgresReplayTarget: PostgreSQL, told of pending writes."""

from __future__ import annotations

from collections.abc import Sequence

from ..binding import BindRequest, SessionBinding
from ..pending import AgentRevocation, Revocation
from .postgres_backend import PostgresSessionBackend
from .replay_target import ReplayTarget
from .row_cache import COPIES, RowCache
from .rows import SessionRows


class PostgresReplayTarget(ReplayTarget):
    """Has the rows of all sessions.

    Args:
        cache: None: without Redis.
    """

    def __init__(self, backend: PostgresSessionBackend, rows: SessionRows, cache: RowCache | None) -> None:
        super().__init__()
        self.backend: PostgresSessionBackend = backend
        self._rows = rows
        self._cache = cache

    def tell_unbound(self, pending: Sequence[tuple[str, Revocation]]) -> None:
        for session_id, revocation in pending:
            _, version = self._rows.unbind(session_id, revocation)
            if version is not None and self._cache is not None:
                self._cache.drop({session_id: version}, COPIES)

    def tell_agent_unbound(self, agent_id: str, revocation: AgentRevocation) -> None:
        ended, _ = self._rows.unbind_agent(agent_id, revocation)
        revocation.left = set()
        if self._cache is not None:
            self._cache.drop(ended, COPIES)

    def tell_indexed(self, requests: Sequence[BindRequest]) -> None:
        pass  # a row names its agent

    def tell_bound(self, requests: Sequence[BindRequest]) -> list[SessionBinding | None]:
        return [self._tell_bound(request) for request in requests]

    def _tell_bound(self, request: BindRequest) -> SessionBinding | None:
        outcome, row = self._rows.bind(request._replace(if_absent=True), None)
        mine = (row.agent_id, row.bound_at) == (request.agent_id, request.bound_at)
        return row.binding(request.session_id, "postgres") if outcome == "held" and not mine else None
