"""SentinelClient: the RedisNode of a primary that Sentinels name, and of its successor after a failover."""

from __future__ import annotations

from typing import Any

import redis

from .._pool import Pool
from .._redis_urls import Sentinels
from ..config import Config
from ..errors import BackendError
from .node import RedisNode
from .options import connection_options, sentinel_options
from .pending import Pending
from .primary import Primary
from .push import PushStream


class SentinelClient(RedisNode):
    """As RedisNode. Its server is the one that the Sentinels name.

    The Sentinels are asked beside the calls, once a second. A call waits for their answer, for the connect timeout at
    most, where they were not asked for two seconds, and before it connects. Each new connection asks its server for
    its ROLE: a replica is refused.

    A failover changes the address: connections to the old server are used no more. The breaker closes once the new
    server has had the replays. Redis acknowledges a write before a replica has it, so a failover may lose the last
    moments. The old primary takes writes from clients that cannot reach a Sentinel, until it is cut off
    (`min-replicas-to-write 1` and `min-replicas-max-lag` in its configuration).

    Args:
        config: as of RedisNode; redis_url or sentinel_hosts names the Sentinels.
        sentinels: their addresses, and the service.
    """

    def __init__(self, config: Config, sentinels: Sentinels) -> None:
        self._sentinels = sentinels
        super().__init__(config)

    def ask_sentinels(self) -> None:
        """Ask each Sentinel now, and wait for the answers, or for all timeouts together. Raises nothing."""
        self._primary.ask_all(lost=False)

    @property
    def failing_sentinels(self) -> list[str]:
        """The addresses of those that did not answer last time, or refused us."""
        return self._primary.failing

    @property
    def sentinels(self) -> int:
        """How many there are, by the settings."""
        return len(self._sentinels.hosts)

    def _new_options(self, config: Config) -> dict[str, Any]:
        options = connection_options(config, lambda: self._primary.locate())
        kind, of_sentinels = sentinel_options(options, self._sentinels)
        self._primary = Primary(self._sentinels, kind, of_sentinels, self._moved, self._secrets)
        return options

    def _new_name(self) -> str:
        return f"Redis {self._sentinels.service!r} of Sentinels"

    def _round_trip(
        self,
        packed: bytes,
        replies: int = 0,
        wait: tuple[float, float] | None = None,
        each: bool = False,
        pool: Pool[Any] | None = None,
    ) -> Any:  # spelled out: packing and unpacking would take twice as long as looking
        self._primary.look()
        return super()._round_trip(packed, replies, wait, each, pool)

    def send(self, packed: bytes) -> Pending:
        self._primary.look()
        return super().send(packed)

    def push_stream(self) -> PushStream:
        self._primary.look()
        return super().push_stream()

    def _demoted(self, pool: Any, connection: Any) -> None:
        super()._demoted(pool, connection)
        self.breaker.trip("it is a replica now")

    def _failed(self, error: redis.RedisError, period: int) -> BackendError:
        self._primary.doubt()
        return super()._failed(error, period)

    def _probe(self) -> None:
        self._primary.ask_all(lost=True)
        while True:
            asked = self._primary.address
            super()._probe()
            if self._primary.address == asked:
                return
            self._retire()  # the probe's connection too; another primary has had no replays

    def _retire(self) -> None:
        for pool in self._pools:
            pool.retire()

    def _moved(self) -> None:
        self._retire()
        self.distance.forget()
        if self.breaker.closed:
            self.replay_soon("there is another primary")  # which is told first of the changes that it has missed
