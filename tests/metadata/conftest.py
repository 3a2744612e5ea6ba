"""psql, and two processes, as it were, by one clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from metadata_clock import Clock, X

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer


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
def keeping_redis(redis_binary: str) -> Iterator[RedisServer]:
    """A Redis of the test's own that keeps its data."""
    with RedisServer(binary=redis_binary, persistent=True) as server:
        yield server


@pytest.fixture
def make_pair(
    make_gov: Callable[..., GovRedis], postgres_server: PostgresServer, clock: Clock
) -> Callable[..., tuple[GovRedis, GovRedis]]:
    """Two processes, as it were, on one Redis and PostgreSQL, by one clock. X is 5 s."""

    def make(server: RedisServer, **settings: Any) -> tuple[GovRedis, GovRedis]:
        where = {"redis_url": server.url, "database_url": postgres_server.url, "metadata_staleness": X, **settings}
        one, two = (clock.adopt(make_gov(**where)) for _ in range(2))
        return one, two

    return make


@pytest.fixture
def pair(make_pair: Callable[..., tuple[GovRedis, GovRedis]], redis_server: RedisServer) -> tuple[GovRedis, GovRedis]:
    return make_pair(redis_server)
