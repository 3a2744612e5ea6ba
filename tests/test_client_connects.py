"""RedisNode: the number by which a caller sees that a connection is a new one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from support import redis_of

from govredis import GovRedis
from govredis.client import RedisNode
from govredis.testing.servers import RedisServer


@pytest.fixture
def client(redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> RedisNode:
    found = redis_of(make_gov(redis_url=redis_server.url))
    assert found is not None
    return found


class TestConnects:
    def test_is_another_number_when_something_came_over_a_new_connection(
        self, client: RedisNode, redis_server: RedisServer
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

    def test_is_so_before_the_reply_is_read(self, client: RedisNode, monkeypatch: pytest.MonkeyPatch) -> None:
        at_the_reply = []
        opened = client._open

        def open_and_note(connection: Any) -> None:
            opened(connection)
            read = connection.read_response
            monkeypatch.setattr(connection, "read_response", lambda: (at_the_reply.append(client.connects), read())[1])

        monkeypatch.setattr(client, "_open", open_and_note)
        before = client.connects
        client.call("PING")
        assert at_the_reply[-1] != before

    def test_a_connection_made_before_counts_when_it_connects(self, client: RedisNode) -> None:
        """It reaches the server that is there then."""
        idle = client._pool.take(1)
        before = client.connects
        client._pool.give(idle)
        client.call("PING")
        assert client.connects != before
