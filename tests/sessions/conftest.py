"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer


@pytest.fixture
def make_gov(make_gov: Callable[..., GovRedis]) -> Callable[..., GovRedis]:
    """With timeouts that a busy machine keeps: what is tested here is what happens, not how soon."""
    return lambda **settings: make_gov(**{"socket_timeout": 0.5, "connect_timeout": 1, **settings})


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    """Everything up, and nothing taken for away because the machine is busy."""
    return make_gov(redis_url=redis_server.url, database_url=postgres_server.url, socket_timeout=5, postgres_timeout=10)
