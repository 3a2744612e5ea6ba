"""Postgres behind a proxy that sends replies twice: nobody takes one for that to something else."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cutting_proxy import CuttingProxy

from govredis import GovRedis
from govredis.postgres import Postgres
from govredis.testing.servers import PostgresServer


class Repeating(CuttingProxy):
    """Sends replies twice where `twice` is set: in one piece. `again()` sends the last one again."""

    twice = False
    last: tuple[socket.socket, bytes] | None = None

    def _deliver(self, receiver: socket.socket, found: bytes, *, is_reply: bool) -> bool:
        if is_reply:
            self.last = receiver, found
            found *= 1 + self.twice
        return super()._deliver(receiver, found, is_reply=is_reply)

    def again(self, connection: Any) -> None:
        assert self.last is not None
        receiver, reply = self.last
        receiver.sendall(reply)
        assert select.select([connection], [], [], 20)[0]


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[Repeating]:
    with Repeating(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
def postgres(proxy: Repeating, postgres_server: PostgresServer, make_gov: Callable[..., GovRedis]) -> Postgres:
    port = proxy.url.rsplit(":", 1)[1].removesuffix("/0")
    url = postgres_server.url.replace(f":{postgres_server.port}/", f":{port}/")
    assert url != postgres_server.url
    return make_gov(redis_enabled=False, database_url=url).postgres


def test_replies_that_come_twice(proxy: Repeating, postgres: Postgres) -> None:
    postgres.fetch("SELECT 0")
    proxy.twice = True
    assert [postgres.fetch("SELECT %s", (n,)) for n in range(20)] == [[(n,)] for n in range(20)]
    with postgres.transaction() as tx:
        assert [tx.fetch("SELECT %s", (n,)) for n in range(20)] == [[(n,)] for n in range(20)]


def test_a_reply_that_comes_again_later_is_passed_over(proxy: Repeating, postgres: Postgres) -> None:
    for n in range(5):
        assert postgres.fetch("SELECT %s", (n,)) == [(n,)]
        proxy.again(postgres._pool.idle[-1])


def test_a_reply_that_comes_again_later_in_a_transaction_is_passed_over(proxy: Repeating, postgres: Postgres) -> None:
    with postgres.transaction() as tx:
        for n in range(5):
            assert tx.fetch("SELECT %s", (n,)) == [(n,)]
            proxy.again(tx._connection)
        tx.fetch("CREATE TEMP TABLE mine ON COMMIT DROP AS SELECT 1 AS n")
        proxy.again(tx._connection)
        assert tx.fetch("SELECT n FROM mine") == [(1,)]
    assert postgres.fetch("SELECT 7") == [(7,)]
