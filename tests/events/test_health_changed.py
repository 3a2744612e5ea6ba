"""A change of the health's status is an event, whichever process notices it, also in an outage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import REDIS_AWAY, eventually, redis_of
from test_events import kept

from govredis import GovRedis
from govredis.events import StatusChanges
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]


def changes(gov: GovRedis) -> StatusChanges:
    return StatusChanges(gov.internal.context, gov.events, "health.changed", "pass")


def told(gov: GovRedis) -> list[tuple[str | None, str]]:
    return [(event.payload["from"], event.payload["to"]) for event in kept(gov, "health")]


@pytest.mark.parametrize("with_postgres", [True, False])
def test_each_change_is_told_once_whoever_sees_it(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, with_postgres: bool
) -> None:
    url = postgres_server.url if with_postgres else None
    processes = [changes(make_gov(redis_url=redis_server.url, database_url=url, key_prefix="p:")) for _ in range(2)]
    gov = make_gov(redis_url=redis_server.url, key_prefix="p:")
    for status in "pass", "pass", "warn", "warn", "fail", "pass", "pass":
        for process in processes:
            process.note(status, {"checks": {"redis": status}})
    assert told(gov) == [("pass", "warn"), ("warn", "fail"), ("fail", "pass")]
    assert kept(gov, "health")[0].payload["checks"] == {"redis": "warn"}


@pytest.mark.parametrize("prefix", ["", "p:"])
def test_an_outage_of_redis_is_told_on_its_return(
    make_gov: MakeGov, persistent_redis: RedisServer, postgres_server: PostgresServer, prefix: str
) -> None:
    settings = {"redis_url": persistent_redis.url, "database_url": postgres_server.url, "key_prefix": prefix}
    govs = [make_gov(**settings) for _ in range(2)]

    def look(gov: GovRedis, status: str) -> None:
        if prefix:  # for which `migrate` was not run, so its health is another
            changes(gov).note(status, {"checks": {"redis": status}})
        else:
            gov.health._last = None  # it is cached for a second
            assert gov.health.snapshot().status == status

    for gov in govs:
        look(gov, "pass")
    persistent_redis.kill()
    for gov in govs * 2:
        look(gov, "warn")
    persistent_redis.restart()
    eventually(lambda: all(redis_of(gov).breaker.closed for gov in govs))
    for gov in govs * 2:
        changes(gov).note("pass", {})
    assert told(govs[0]) == [(None, "warn"), ("warn", "pass")]
    assert kept(govs[0], "health")[0].payload["checks"]["redis"] == "warn"


def test_another_clients_entry_is_no_error(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> None:
    gov = make_gov(redis_url=redis_server.url)
    gov.events.publish("health.changed", "not ours")
    changes(gov).note("warn", {})
    assert gov.counters.get("events.unpublished") == 1
    plain_redis.set("events:health", "x")
    changes(gov).note("warn", {})
    assert gov.counters.get("events.unpublished") == 2
    plain_redis.delete("events:health")
    plain_redis.xadd("events:health", {"a": "b"})
    changes(gov).note("warn", {})
    assert told(gov) == [("pass", "warn")]


def test_without_redis_there_is_none(make_gov: MakeGov) -> None:
    gov = make_gov(redis_enabled=False)
    gov.health.snapshot()
    changes(gov).note("warn", {})
    assert gov.counters.get("events.unpublished") == 0


def test_a_change_that_nobody_can_keep_is_counted(make_gov: MakeGov) -> None:
    gov = make_gov(redis_url=REDIS_AWAY)
    changes(gov).note("warn", {})
    assert gov.counters.get("events.unpublished") == 1
