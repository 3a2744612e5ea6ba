"""No event is lost where consumers are killed, and none is done twice without need."""

from __future__ import annotations

import pytest
from event_load import load

from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


def test_killed_consumers_lose_nothing(redis_server: RedisServer) -> None:
    outcome = load(redis_server.url, 3000)
    assert (outcome.missing, outcome.unasked) == (0, 0)
    assert outcome.again <= 2
