"""SessionBackends: the first that can be reached answers, the primary or else this process's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from ..._context import Context
from ..._pool import PoolExhausted
from ...client import RedisClient
from ...errors import BackendUnavailable, SessionStoreUnavailable
from ...outbox import FreshnessLease
from ..pending import NO_OUTAGE, Outage, outage_of
from .backend import PrimarySessionBackend, SessionBackend, Unconfirmed
from .memory_backend import MemorySessionBackend
from .postgres_backend import PostgresSessionBackend
from .postgres_replay_target import PostgresReplayTarget
from .redis_backend import RedisSessionBackend
from .redis_replay_target import RedisReplayTarget
from .replay_target import ReplayTarget
from .row_cache import RowCache
from .rows import SessionRows

if TYPE_CHECKING:
    from ...postgres import Postgres

T = TypeVar("T")


class SessionBackends:
    """The backends of one SessionCache.

    Attributes:
        primary: PostgreSQL's, or where there is none Redis's; None where there is no server.
        memory: asked while the primary is away. It keeps the pending writes.
        server: the primary's; it is told of the pending writes before it is used again.
    """

    #: For the primary's server, or a node of it.
    replay_target: Callable[[Any], ReplayTarget]

    def __init__(self, context: Context, *, freshness: FreshnessLease | None, now: Callable[[], datetime]) -> None:
        config = context.config
        self._counters = context.counters
        self._keys = context.keys
        self._postgres = context.postgres
        self.server: Postgres | RedisClient | None = context.redis if context.postgres is None else context.postgres
        self.primary: PrimarySessionBackend | None = None
        cache: RowCache | None = None
        if context.redis is not None:
            self.primary = in_redis = RedisSessionBackend(context, context.redis, now=now)
            self.replay_target = lambda node: RedisReplayTarget(in_redis, node, context.keys, context.counters)
            if context.postgres is not None:
                cache = RowCache(context, context.redis, records=in_redis, freshness=freshness)
        if context.postgres is not None:
            rows = SessionRows(context, context.postgres)
            self.primary = in_postgres = PostgresSessionBackend(context, rows, cache=cache)
            self.replay_target = lambda _: PostgresReplayTarget(in_postgres, rows, cache)
        self.memory: MemorySessionBackend = MemorySessionBackend(
            config.local_entries,
            now=now,
            primary=None if self.server is None else self.server.name,
        )

    def ask(
        self,
        operation: str,
        ask: Callable[[SessionBackend], T],
        *,
        unless_unknown: str | None = None,
        shown: bool = False,
    ) -> tuple[T, bool]:
        """Returns the answer of the first backend that can be reached, and whether that is the primary.

        Raises SessionStoreUnavailable where the primary cannot be asked because this process's connections to it are
        all in use: it is not away then, and changes that others make meanwhile do not stand in this memory. Raises
        Unconfirmed as the primary does.

        Args:
            operation: counted as `sessions.degraded.{operation}` where memory answers for the primary.
            unless_unknown: a session; if this process does not know it, raise SessionStoreUnavailable.
            shown: show the change to other processes until the primary is told; see `show`.
        """
        if self.primary is not None:
            try:
                return ask(self.primary), True
            except Unconfirmed:
                raise
            except BackendUnavailable as error:
                self.without_primary(operation, error, unless_unknown)
            if shown:
                self.show(ask)
        return ask(self.memory), False

    def without_primary(self, operation: str, error: BackendUnavailable, unless_unknown: str | None = None) -> None:
        """Count an answer of this process's memory, which is the last resort after that error. Raises as `ask`."""
        if isinstance(error, PoolExhausted):
            raise SessionStoreUnavailable(str(error)) from error
        self.count_degraded(operation)
        if unless_unknown is not None and not self.memory.knows(unless_unknown, self.outage(unless_unknown)):
            raise SessionStoreUnavailable(f"this process does not know the session, and {error}") from error

    def count_degraded(self, operation: str) -> None:
        self._counters.add(f"sessions.degraded.{operation}")

    def show(self, change: Callable[[SessionBackend], Any]) -> None:
        """Make a change in Redis, if that can be reached, for other processes to see until PostgreSQL is told."""
        stand_in = None if self.primary is None else self.primary.stand_in()
        if stand_in is not None:
            with contextlib.suppress(BackendUnavailable):
                change(stand_in)

    def tell_soon(self, session_ids: Iterable[str] = (), agent_id: str | None = None) -> None:
        """There are pending writes for these: where they are kept is used no more until it was told."""
        if isinstance(self.primary, RedisSessionBackend):
            self.primary.replay_soon(session_ids, agent_id)
        elif self._postgres is not None:
            self._postgres.replay_soon("sessions were changed without it")

    def outage(self, session_id: str) -> Outage:
        """The outage of the server that keeps the session in the primary, or its last one."""
        if self.server is None:
            return NO_OUTAGE
        try:
            server = (
                self.server.at(self._keys.session(session_id)) if isinstance(self.server, RedisClient) else self.server
            )
        except BackendUnavailable:  # no node has it
            return NO_OUTAGE
        return outage_of(server)
