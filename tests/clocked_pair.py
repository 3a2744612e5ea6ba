"""Two GovRedis that live by one clock of the tests' own, psql beside them, and what is read through their caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from support import PATIENT, lease_of

from govredis import GovRedis
from govredis.outbox.relay import Found
from govredis.testing.servers import PostgresServer, RedisServer

#: So long that a machine that stalls ends no lease: the tests move the clock.
X = 60.0


class Clock:
    """The clocks of Redis, as the relay reads it, and of the process: they go on by themselves, or by `sleep`.

    Once stopped, by `sleep` alone: a busy machine takes no time then. A wait for a time to come never ends.
    """

    def __init__(self) -> None:
        self.slept = 0.0
        #: Redis's alone, against the others.
        self.stepped = 0.0
        self._stopped_at: float | None = None
        self._redis_stopped_at: int | None = None

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def stop(self) -> None:
        """Redis's stops when it is read next."""
        self._stopped_at = time.monotonic()

    def _now(self) -> float:
        return (time.monotonic() if self._stopped_at is None else self._stopped_at) + self.slept

    def _redis_now(self, real: int) -> int:
        if self._stopped_at is not None:
            real = self._redis_stopped_at = self._redis_stopped_at or real
        return real + int((self.slept + self.stepped) * 1_000_000)

    def adopt(self, gov: GovRedis) -> GovRedis:
        """Have a GovRedis live by this clock; it renews its freshness lease in the caller."""
        lease = lease_of(gov)
        read = lease.relay.read

        def read_later() -> Found:
            found = read()
            return found._replace(now=self._redis_now(found.now))

        lease.relay.read = read_later  # type: ignore[method-assign]
        lease._clock = self._now
        lease._threads = False
        return gov


def name_of(gov: GovRedis, agent: str = "a") -> Any:
    """The agent's name as `gov` reads it, through its cache; None for no such agent."""
    record = gov.metadata.get_or_load(agent, gov.agents.get)
    return None if record is None else record["metadata"].get("name")


def cached(gov: GovRedis, agent: str = "a") -> Any:
    """The same, from Redis only."""
    record = gov.metadata.get(agent)
    return None if record is None else record["metadata"].get("name")


@pytest.fixture
def connect(postgres_server: PostgresServer) -> Iterator[Callable[[], Any]]:
    """Connections of somebody who does not know of govredis."""
    made: list[Any] = []

    def make() -> Any:
        made.append(psycopg2.connect(postgres_server.url))
        return made[-1]

    yield make
    for connection in made:
        connection.close()


@pytest.fixture
def sql(connect: Callable[[], Any]) -> Callable[..., Any]:
    """Statements of theirs, each committed: psql."""
    connection = connect()
    connection.autocommit = True

    def run(text: str) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(text)
            return cursor.fetchall() if cursor.description else None

    return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_pair(
    make_gov: Callable[..., GovRedis], postgres_server: PostgresServer, clock: Clock
) -> Callable[..., tuple[GovRedis, GovRedis]]:
    """Two processes, as it were, on one Redis and PostgreSQL, by one clock."""

    def make(server: RedisServer, **settings: Any) -> tuple[GovRedis, GovRedis]:
        where = {"redis_url": server.url, "database_url": postgres_server.url, "metadata_staleness": X, **PATIENT}
        one, two = (clock.adopt(make_gov(**{**where, **settings})) for _ in range(2))
        return one, two

    return make


@pytest.fixture
def pair(make_pair: Callable[..., tuple[GovRedis, GovRedis]], redis_server: RedisServer) -> tuple[GovRedis, GovRedis]:
    return make_pair(redis_server)
