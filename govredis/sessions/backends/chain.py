"""SessionBackends: the first that can be reached answers, the primary or else this process's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from ..._context import Context
from ..._pool import PoolExhausted
from ...client import RedisClient
from ...errors import BackendUnavailable, SessionStoreUnavailable
from ...outbox import FreshnessLease
from .backend import PrimarySessionBackend, SessionBackend
from .memory_backend import MemorySessionBackend
from .postgres_backend import PostgresSessionBackend
from .redis_backend import RedisSessionBackend
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

    def __init__(self, context: Context, *, freshness: FreshnessLease | None, now: Callable[[], datetime]) -> None:
        config = context.config
        self._counters = context.counters
        self.server: Postgres | RedisClient | None = context.redis if context.postgres is None else context.postgres
        self.primary: PrimarySessionBackend | None = None
        cache: RowCache | None = None
        if context.redis is not None:
            self.primary = in_redis = RedisSessionBackend(context, context.redis, now=now)
            if context.postgres is not None:
                cache = RowCache(context, context.redis, records=in_redis, freshness=freshness)
        if context.postgres is not None:
            self.primary = PostgresSessionBackend(context, SessionRows(context, context.postgres), cache=cache)
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
        all in use: it is not away then, and changes that others make meanwhile do not stand in this memory.

        Args:
            operation: counted as `sessions.degraded.{operation}` where memory answers for the primary.
            unless_unknown: a session; if this process does not know it, raise SessionStoreUnavailable.
            shown: show the change to other processes until the primary is told; see `show`.
        """
        if self.primary is not None:
            try:
                return ask(self.primary), True
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
        if unless_unknown is not None and not self.memory.knows(unless_unknown, self.outage()):
            raise SessionStoreUnavailable(f"this process does not know the session, and {error}") from error

    def count_degraded(self, operation: str) -> None:
        self._counters.add(f"sessions.degraded.{operation}")

    def show(self, change: Callable[[SessionBackend], Any]) -> None:
        """Make a change in Redis, if that can be reached, for other processes to see until PostgreSQL is told."""
        stand_in = None if self.primary is None else self.primary.stand_in()
        if stand_in is not None:
            with contextlib.suppress(BackendUnavailable):
                change(stand_in)

    def tell_soon(self) -> None:
        """There is a pending write: the primary is used no more until it was told."""
        if self.server is not None:
            self.server.replay_soon("sessions were changed without it")

    def outage(self) -> int:
        """The number of the primary's outage, or of the last one."""
        return 0 if self.server is None else self.server.breaker.period
