"""The dashboard while Redis hangs, from a file of its own: here calls have short timeouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis
from govredis.health.dashboard.view import SPANS, OutageRow
from govredis.testing.servers import PostgresServer, RedisServer


@pytest.mark.one_redis
def test_a_hang_is_a_band_with_its_calls_and_its_slowest_call(
    mortal_redis: RedisServer,
    postgres_server: PostgresServer,
    make_gov: Callable[..., GovRedis],
    eventually: Callable[..., Any],
) -> None:
    gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url)
    gov.limits.hit("agent-1", "9/minute")

    def shown() -> OutageRow | None:
        """The outage, with the band that marks it."""
        view = gov.internal.dashboard.view(SPANS["hour"])
        if not view.outages:
            return None
        (row,), (band,) = view.outages, view.bands
        assert band.began == row.began
        assert band.label.startswith("Redis hung, ")
        return row if (view.status == "warn") == (row.ended is None) else None

    mortal_redis.pause()
    try:
        for _ in range(5):
            assert gov.limits.hit("agent-1", "9/minute").degraded
        gov.internal.account.flush()
        during = eventually(lambda: (row := shown()) and row.served >= 5 and row)
        assert (during.server, during.kind, during.ended) == ("Redis", "hung", None)
        assert during.slowest >= 0.9, "the call that waited for its timeout of a second"
    finally:
        mortal_redis.resume()
    eventually(lambda: gov.limits.hit("agent-2", "999/minute").backend == "redis")
    after = eventually(lambda: (row := shown()) and row.ended and row)
    assert after.served >= during.served
    assert after.slowest == during.slowest
