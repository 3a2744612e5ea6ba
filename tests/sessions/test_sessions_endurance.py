"""A bind that races `unbind_agent` or `unbind` does not survive it, in 10,000 tries."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from govredis import GovRedis
from govredis.sessions.backends.redis_backend import RedisSessionBackend
from govredis.sessions.backends.rows import SessionRows
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.once

TRIES = 10_000
BINDERS = 4

MakeGov = Callable[..., GovRedis]


#: Binds of one agent: its index names for a while what has ended.
TRIES_EACH = 100


class Race:
    """Binds from several threads while another ends all sessions of their agents, over and over.

    A bind has begun when its first answer is there, which is noted. A session whose bind began before a
    revocation that has returned must not be found.
    """

    def __init__(self, binder: GovRedis, revoker: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        self.binder, self.revoker = binder, revoker
        self.begun: dict[str, float] = {}
        self.revoked_at: dict[str, float] = {}
        self.agents = [""] * BINDERS
        self.overlapped = 0
        self._session = threading.local()
        race = self
        binding, started = RedisSessionBackend.binding, SessionRows.started

        def binding_noted(self: Any, order: Any, *args: Any) -> Any:
            race.has_begun(order.session_id)
            return binding(self, order, *args)

        def started_noted(self: Any) -> int:
            version = started(self)
            race.has_begun(race._session.id)
            return version

        monkeypatch.setattr(RedisSessionBackend, "binding", binding_noted)
        monkeypatch.setattr(SessionRows, "started", started_noted)

    def has_begun(self, session_id: str) -> None:
        self.begun[session_id] = time.monotonic()
        time.sleep(random.uniform(0, 0.001))  # so that something comes between

    def run(self) -> None:
        threads = [threading.Thread(target=self.bind, args=(n,)) for n in range(BINDERS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for agent in self.agents:
                if agent:
                    at, before = time.monotonic(), len(self.begun)
                    self.revoker.sessions.unbind_agent(agent)
                    self.revoked_at[agent] = at
                    self.overlapped += len(self.begun) > before
        assert len(self.begun) == TRIES

    def bind(self, n: int) -> None:
        for k in range(TRIES // BINDERS):
            agent = f"{n}-{k // TRIES_EACH}"
            self.agents[n] = agent
            self._session.id = f"{agent}-{k}"
            self.binder.sessions.bind(self._session.id, agent)

    def survivors(self) -> set[str]:
        return {
            sid
            for agent, at in self.revoked_at.items()
            for sid in self.revoker.sessions.for_agent(agent)
            if self.begun[sid] < at
        }


@pytest.fixture
def one_redis() -> Iterator[RedisServer]:
    """Not each: a race does not depend on its version."""
    with RedisServer() as server:
        yield server


@pytest.mark.parametrize("durable", [False, True], ids=["redis alone", "durable"])
def test_unbind_agent(
    make_gov: MakeGov,
    one_redis: RedisServer,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    durable: bool,
) -> None:
    settings = {"database_url": postgres_server.url} if durable else {}
    govs = [make_gov(redis_url=one_redis.url, metadata_staleness=5, **settings) for _ in range(2)]
    race = Race(*govs, monkeypatch)
    race.run()
    assert race.overlapped > 100, "it was a race"
    assert race.survivors() == set()
    if durable:
        assert govs[0].sessions.verify().differing == ()
