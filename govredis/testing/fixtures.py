"""The classes of the fixtures of the pytest plugin, for annotations: see docs/testing.md.

The fixtures themselves stand in `_govredis_pytest`, which imports this module when a test uses them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import api
from ..api import GovRedis, configure
from ..client.in_memory import InMemoryRedisClient
from ..config import Config
from ._hand_clock import HandClock

if TYPE_CHECKING:
    from .servers import PostgresServer, RedisServer

__all__ = ["GovServers", "HandClock"]

#: Seconds that pass when an outage begins and when it ends: more than anything of govredis remembers or waits for.
_AT_EACH_END = 1.1


class GovServers:
    """Real servers of one test, each started when it is first used.

    They keep real time. To see an outage, use `redis.kill()`, `redis.pause()` and `redis.restart()`.
    """

    def __init__(self) -> None:
        self._redis: RedisServer | None = None
        self._postgres: PostgresServer | None = None
        self._ending = contextlib.ExitStack()

    @property
    def redis(self) -> RedisServer:
        """An empty Redis. Raises ServerError where there is no redis-server, with the remedy."""
        if self._redis is None:
            from .servers import RedisServer

            self._redis = self._ending.enter_context(RedisServer())
        return self._redis

    @property
    def postgres(self) -> PostgresServer:
        """An empty PostgreSQL with our tables. Raises ServerError where there is none, with the remedy."""
        if self._postgres is None:
            from .servers import PostgresServer

            server = self._ending.enter_context(PostgresServer())
            with GovRedis(Config(redis_enabled=False, database_url=server.url)) as deploying:
                deploying.postgres.migrate()
            self._postgres = server
        return self._postgres

    def connect(self, *, postgres: bool = False, **settings: Any) -> GovRedis:
        """A GovRedis over `redis`, made process-wide, with a lock folder of its own; closed after the test.

        Args:
            postgres: over `postgres` too.
            settings: more of Config's.
        """
        made = {"redis_url": self.redis.url, "lock_folder": self._ending.enter_context(tempfile.TemporaryDirectory())}
        if postgres:
            made["database_url"] = self.postgres.url
        gov = self._ending.enter_context(GovRedis(Config(**{**made, **settings})))
        self._ending.enter_context(process_wide(gov))
        return gov

    def __enter__(self) -> GovServers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending.close()


@contextlib.contextmanager
def process_wide(gov: GovRedis) -> Iterator[None]:
    """Make `gov` the process-wide GovRedis, and afterwards the one that was there before."""
    before = api._process_wide.get("gov")
    configure(gov)
    try:
        yield
    finally:
        configure(before)


@contextlib.contextmanager
def outage(gov: GovRedis, clock: HandClock) -> Iterator[None]:
    """Have the Redis of a GovRedis in memory refuse connections.

    A little more than a second passes at each end, so no report and no grace of a second belongs to the time before.
    """
    client = gov.internal.context.redis
    if not isinstance(client, InMemoryRedisClient):
        raise TypeError(
            "redis_away is for a GovRedis.in_memory(); kill the server of any other: gov_servers.redis.kill()"
        )
    client.go_away()
    clock.tick(_AT_EACH_END)
    try:
        yield
    finally:
        client.come_back()
        clock.tick(_AT_EACH_END)
