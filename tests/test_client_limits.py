"""RedisNode on a Redis that answers some of what it is asked: it takes no more clients, pauses writes, is a replica.

An outage that is none opens nothing, and one that lasts is one: the breaker does not open again and again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import redis_of, wait_at_most

from govredis import BackendUnavailable, GovRedis
from govredis._pool import PoolExhausted
from govredis.client import RedisNode
from govredis.testing.servers import RedisServer

MakeGov = Callable[..., GovRedis]
Eventually = Callable[..., Any]


@pytest.fixture
def client(make_gov: MakeGov, mortal_redis: RedisServer) -> RedisNode:
    """A patient one, by which a stall of the machine is no outage: this Redis answers at once, if it does."""
    return redis_of(make_gov(redis_url=mortal_redis.url, socket_timeout=20, connect_timeout=20))


@pytest.fixture
def probes(client: RedisNode) -> list[bool]:
    """For each probe that has ended: whether it succeeded."""
    ended: list[bool] = []
    really = client.breaker._probe

    def probe() -> None:
        succeeded = False
        try:
            really()
            succeeded = True
        finally:
            ended.append(succeeded)

    client.breaker._probe = probe
    return ended


def works(client: RedisNode) -> bool:
    try:
        return bool(client.call("SET", "k", "v") == b"OK")
    except BackendUnavailable:
        return False


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.levelname for r in caplog.records if r.name == "govredis" and r.levelno >= logging.INFO]


class Places:
    """How many clients the server takes: those that it has, and `free` more."""

    def __init__(self, server: RedisServer) -> None:
        import redis

        self._own = redis.Redis.from_url(server.url)
        self.set(100)

    def set(self, count: int) -> None:
        self._own.config_set("maxclients", count)

    def close(self) -> None:
        self._own.close()


@pytest.fixture
def places(mortal_redis: RedisServer) -> Any:
    made = Places(mortal_redis)
    yield made
    made.close()


def test_while_writes_are_paused_it_is_away_once(
    client: RedisNode, mortal_redis: RedisServer, probes: list[bool], eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "govredis")
    assert works(client)
    mortal_redis.command("CLIENT", "PAUSE", "100000", "WRITE")
    assert client.call("GET", "k") == b"v", "reads go on"
    wait_at_most(client, 1)
    eventually(lambda: not works(client) and len(probes) > 3)
    assert client.breaker.times_opened == 1
    assert levels(caplog) == ["WARNING"]
    wait_at_most(client, 20)
    mortal_redis.command("CLIENT", "UNPAUSE")
    eventually(lambda: works(client))
    assert client.breaker.times_opened == 1
    eventually(lambda: len(levels(caplog)) > 1)  # it is said a moment after it is used
    assert levels(caplog) == ["WARNING", "INFO"]


def test_callers_wait_where_redis_takes_fewer_clients_than_we_would_like(client: RedisNode, places: Places) -> None:
    places.set(3)  # two of them ours
    refused = 0

    def use(_: int) -> int:
        refusals = 0
        for _ in range(50):
            try:
                client.call("INCR", "n")
            except PoolExhausted:  # this process is too busy: no outage
                refusals += 1
        return refusals

    with ThreadPoolExecutor(12) as threads:
        refused = sum(threads.map(use, range(12)))
    assert client.breaker.times_opened == 0
    assert client.call("GET", "n") == str(600 - refused).encode()
    assert refused < 60


def test_a_redis_that_takes_none_of_us_is_away_once_and_back_with_the_first_place(
    client: RedisNode, places: Places, probes: list[bool], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "govredis")
    places.set(1)
    assert not works(client)
    assert not client.breaker.closed, "at once: the probe hears the same"
    eventually(lambda: not works(client) and len(probes) > 2)
    assert client.breaker.times_opened == 1
    places.set(2)
    eventually(lambda: client.breaker.closed)
    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(lambda _: works(client), range(300))) > 200
    assert client.breaker.times_opened == 1
    eventually(lambda: len(levels(caplog)) > 1)  # it is said a moment after it is used
    assert levels(caplog) == ["WARNING", "INFO"]


def test_the_place_that_the_probe_had_stays_ours(
    client: RedisNode, places: Places, probes: list[bool], mortal_redis: RedisServer, eventually: Eventually
) -> None:
    """Others wait for one as we do, and are as quick."""
    told: list[int] = []
    for replays in (0, 1):
        places.set(1)
        client._drop_idle()
        eventually(lambda: not works(client))
        if replays:
            client.on_recovery(lambda redis: told.append(redis.call("INCR", "told")))
        places.set(2)
        eventually(lambda: client.breaker.closed)
        assert len(client._pool.idle) == 1
    with pytest.raises(Exception, match="max number of clients"):
        mortal_redis.command("PING")
    before = client.connects
    assert works(client)
    assert client.connects == before
    assert told == [1], "a replay, too, has that place"


def test_a_connection_of_those_that_wait_makes_room_for_a_call(
    client: RedisNode, places: Places, mortal_redis: RedisServer
) -> None:
    mortal_redis.command("RPUSH", "l", "x")
    assert client.pop("l", 0.25) == b"x"
    assert len(client._waiting.idle) == 1
    places.set(2)  # that one is ours
    assert works(client)
    assert client.breaker.times_opened == 0
    with pytest.raises(PoolExhausted, match="max number of clients"):
        client.pop("nothing", 0.01)  # nor is this an outage
    assert client.breaker.closed


def test_a_place_more_is_used_within_a_second(client: RedisNode, places: Places, eventually: Eventually) -> None:
    places.set(2)
    held = client._pool.take(1)
    client._open(held)
    with pytest.raises(PoolExhausted, match=r"all 1 connections|takes no more connections"):
        client.call("PING")
    places.set(3)
    eventually(lambda: works(client))
    client._pool.give(held)


def test_a_demoted_master_costs_one_call_however_many_connections_lead_there(
    client: RedisNode, mortal_redis: RedisServer
) -> None:
    """A proxy keeps such connections up when it leads new connections to the replica that was promoted."""
    held = [client._pool.take(1) for _ in range(5)]
    for connection in held:
        client._open(connection)
    for connection in held:
        client._pool.give(connection)
    mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BackendUnavailable, match=r"READONLY|read only"):
        client.call("SET", "k", "v")
    mortal_redis.command("REPLICAOF", "NO", "ONE")
    assert [connection._sock for connection in held] == [None] * 5
    assert works(client)
    assert client.breaker.times_opened == 0


def test_a_probe_closes_what_the_pool_has_no_place_for(make_gov: MakeGov, mortal_redis: RedisServer) -> None:
    client = redis_of(make_gov(redis_url=mortal_redis.url, redis_connections=1, socket_timeout=20))
    held = client._pool.take(1)
    client._open(held)
    client._probe()
    assert len(client._pool.live) == 1
    assert not client._pool.idle
    client._pool.give(held)
    assert works(client)
