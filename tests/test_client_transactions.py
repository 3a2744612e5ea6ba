"""RedisClient: several commands as one step, and the number by which a caller sees that a connection is a new one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from govredis import BackendError, BackendUnavailable, GovRedis
from govredis.client import RedisClient, Script
from govredis.metadata.cells import INVALIDATE, invalidation
from govredis.testing.servers import RedisServer


@pytest.fixture
def client(redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> RedisClient:
    found = make_gov(redis_url=redis_server.url)._redis
    assert found is not None
    return found


class TestTransaction:
    def test_is_one_round_trip_and_one_step(self, client: RedisClient, plain_redis: Any) -> None:
        client.call("PING")
        plain_redis.config_resetstat()
        trips = []
        round_trip = client._round_trip
        client._round_trip = lambda *a: trips.append(a) or round_trip(*a)  # type: ignore[method-assign]
        assert client.transaction([("SET", "a", "1"), ("INCR", "a"), ("GET", "none")]) == [b"OK", 2, None]
        assert len(trips) == 1
        assert plain_redis.info("commandstats")["cmdstat_exec"]["calls"] == 1

    def test_an_error_is_raised_and_the_others_are_carried_out(self, client: RedisClient, plain_redis: Any) -> None:
        plain_redis.set("text", "x")
        with pytest.raises(BackendError, match="not an integer"):
            client.transaction([("SET", "a", "1"), ("INCR", "text"), ("SET", "b", "2")])
        assert plain_redis.mget("a", "b") == ["1", "2"]
        with pytest.raises(BackendError, match="wrong number of arguments"):
            client.transaction([("SET", "a", "3"), ("GET",)])
        assert plain_redis.get("a") == "1", "one that is none from the start: nothing is"
        assert client.transaction([("GET", "a")]) == [b"1"]

    def test_scripts_come_back_after_a_flush(self, client: RedisClient, plain_redis: Any) -> None:
        plain_redis.set("report:a", "x")
        for _ in range(2):
            plain_redis.script_flush()
            plain_redis.set("report:a", "x")
            assert client.transaction([invalidation("report:a", None)], [INVALIDATE]) == [1]

    def test_an_unnamed_script_is_an_error(self, client: RedisClient) -> None:
        with pytest.raises(BackendError):
            client.transaction([Script("govredis.metadata", "lease.lua").call(("k",), ("x", "1"))])

    def test_a_replica_is_unavailable(self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> None:
        client = make_gov(redis_url=mortal_redis.url)._redis
        assert client is not None
        mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(BackendUnavailable):
            client.transaction([("SET", "a", "1")])


class TestConnects:
    def test_is_another_number_when_something_came_over_a_new_connection(
        self, client: RedisClient, redis_server: RedisServer
    ) -> None:
        seen = [client.connects]
        for command in (("PING",), ("PING",), None, ("PING",), ("GET", "a"), None, ("GET", "a")):
            if command is None:
                redis_server.command("CLIENT", "KILL", "TYPE", "normal")
            else:
                client.call(*command)
                seen.append(client.connects)
        changes = [one != other for one, other in itertools.pairwise(seen)]
        assert changes == [True, False, True, False, True]

    def test_is_so_before_the_reply_is_read(self, client: RedisClient, monkeypatch: pytest.MonkeyPatch) -> None:
        at_the_reply = []
        connection = client._connect()
        read = connection.read_response

        def note(*args: Any, **options: Any) -> Any:
            if client._pool.live:
                at_the_reply.append(client.connects)
            return read(*args, **options)

        monkeypatch.setattr(connection, "read_response", note)
        monkeypatch.setattr(client._pool, "_connect", lambda _: connection)
        before = client.connects
        client.call("PING")
        assert at_the_reply[-1] != before

    def test_one_that_was_made_before_and_connects_later_counts_when_it_connects(self, client: RedisClient) -> None:
        """It reaches the server that is there then."""
        idle = client._pool.take(1)
        before = client.connects
        client._pool.give(idle)
        client.call("PING")
        assert client.connects != before
