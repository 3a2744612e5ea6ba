"""LimitBackendChain: the backends in their order, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..._context import Context
from ..._pool import PoolExhausted
from ...errors import BackendError, BackendUnavailable
from ..rates import Limit
from .backend import LimitBackend, Mode, Outcome, WindowStats
from .memory_backend import MemoryLimitBackend
from .postgres_backend import PostgresLimitBackend
from .redis_backend import RedisLimitBackend

R = TypeVar("R")


class NoLimitBackend(LimitBackend):
    """GOVREDIS_LIMIT_FALLBACK "deny" and "allow": it keeps no windows, and always decides alike.

    Args:
        allow: whether it admits.
    """

    name = "none"

    def __init__(self, *, allow: bool) -> None:
        self._allow = allow

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        if self._allow:
            return Outcome(True, 0, limits[0].count, 0, 0)
        return Outcome(False, 0, 0, 1_000_000, 1_000_000)  # a server may be back in a second

    def refund(self, key: str, entries: None, cost: int) -> bool:
        return False

    def count(self, key: str, window_us: int) -> int:
        return 0

    def stats(self, key: str) -> WindowStats:
        raise BackendUnavailable("Redis and PostgreSQL are away, and GOVREDIS_LIMIT_FALLBACK keeps no windows")

    def reset(self, key: str) -> None:
        pass


class LimitBackendChain:
    """The backends of Redis and of PostgreSQL, as far as configured, and the one of GOVREDIS_LIMIT_FALLBACK.

    Attributes:
        redis, postgres: those of the two servers, if any.
        servers: the same, in their order.
        fallback: decides where no server is in reach. It always is.
    """

    def __init__(self, context: Context, clock: Callable[[], float]) -> None:
        self._counters = context.counters
        self.redis: RedisLimitBackend | None = None if context.redis is None else RedisLimitBackend(context.redis)
        self.postgres: PostgresLimitBackend | None = (
            None if context.postgres is None else PostgresLimitBackend(context.postgres, context.keys)
        )
        self.servers: list[LimitBackend] = [server for server in (self.redis, self.postgres) if server is not None]
        fallback = context.config.limit_fallback
        self.fallback: LimitBackend = (
            MemoryLimitBackend(context.config.local_entries, clock)
            if fallback == "local"
            else NoLimitBackend(allow=fallback == "allow")
        )

    def first_reachable(self, ask: Callable[[LimitBackend], R]) -> R:
        """The answer of the first backend in reach.

        An error that a server answers with is an answer, counted as limits.errors. A server is also in reach where all
        of this process's connections to it are in use: other processes count there, and counts elsewhere would come on
        top.
        """
        for server in self.servers:
            try:
                return ask(server)
            except PoolExhausted:
                raise
            except BackendUnavailable:
                pass
            except BackendError:
                self._counters.add("limits.errors")
                raise
        return ask(self.fallback)

    def reset(self, key: str) -> None:
        """Forget a key in each. Raises BackendUnavailable for one that cannot be reached, after the others."""
        failed: BackendUnavailable | None = None
        for backend in (*self.servers, self.fallback):
            try:
                backend.reset(key)
            except BackendUnavailable as error:
                failed = error
        if failed is not None:
            raise failed

    def purge(self) -> int:
        """Delete the windows that have ended. Returns how many."""
        return sum(server.purge() for server in self.servers)
