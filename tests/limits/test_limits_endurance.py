"""16 processes on one key for a while, several windows: 15 s, or the seconds that GOVREDIS_TEST_SECONDS says."""

from __future__ import annotations

import os
import time

import pytest
from limit_load import UNPRUNED, Load, all_calls, in_redis, verify

from govredis import Limit
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

SECONDS = float(os.environ.get("GOVREDIS_TEST_SECONDS", 15))
RATE = [Limit(20, 0.1), Limit(90, 1), Limit(350, 5), UNPRUNED]


def test_16_processes(one_redis_binary: str) -> None:
    # A pause, or most of the records would be of the same refusals.
    with RedisServer(binary=one_redis_binary) as redis:
        with Load([{"redis_url": redis.url}] * 16, RATE, pause=0.002, shift=30) as load:
            time.sleep(SECONDS)
            calls = all_calls(load.stop())
        assert {call.backend for call in calls} == {"redis"}
        assert {call.window for call in calls} == {0, *(limit.window_us for limit in RATE[:3])}
        verify(in_redis(redis), calls, RATE)
