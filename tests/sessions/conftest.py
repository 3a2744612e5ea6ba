"""A stand-in for the guard, until that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from govredis import GovRedis
from govredis.errors import BackendUnavailable
from govredis.sessions import SessionCache


class Seen(NamedTuple):
    epoch: int


class Guard:
    def __init__(self, gov: GovRedis) -> None:
        self.gov = gov
        self.invalidations: Any = None
        self.key = gov.config.key_prefix + "govredis:guard"

    def look(self) -> Seen | None:
        held = self.gov._redis.call("GET", self.key)  # type: ignore[union-attr]
        if held is None:
            self.drain()
            held = self.gov._redis.call("GET", self.key)  # type: ignore[union-attr]
        return None if held is None else Seen(int(held))

    def stands(self, seen: Seen) -> bool:
        return True

    def watch(self, namespace: str, invalidations: Callable[[Sequence[tuple[str, int]]], Any]) -> None:
        self.invalidations = invalidations

    def drain(self) -> None:
        gov = self.gov
        try:
            rows = gov.postgres.fetch("SELECT entry, id, version FROM govredis_outbox WHERE namespace = 'session'")
            held = gov._redis.call("GET", self.key)  # type: ignore[union-attr]
            if held is None:
                ((epoch,),) = gov.postgres.fetch("SELECT nextval('govredis_versions')")
                gov._redis.call("SET", self.key, str(epoch), "PX", "5000")  # type: ignore[union-attr]
            elif rows:
                prefix = len(gov.config.key_prefix)
                commands = self.invalidations([(i[prefix:], v) for _, i, v in rows])
                gov._redis.pipeline(commands, (gov.sessions._copies._drop,))  # type: ignore[union-attr]
            gov.postgres.fetch("DELETE FROM govredis_outbox WHERE entry = ANY(%s)", ([e for e, _, _ in rows],))
        except BackendUnavailable:
            pass


@pytest.fixture
def make_gov(make_gov: Callable[..., GovRedis]) -> Callable[..., GovRedis]:
    def make(**settings: Any) -> GovRedis:
        gov = make_gov(**settings)
        config = gov.config
        if gov._postgres is not None and gov._redis is not None:
            gov._postgres._recoveries.clear()
            gov._redis._recoveries.clear()
            gov.sessions = SessionCache(
                gov._keys,
                gov._redis,
                gov._postgres,
                Guard(gov),
                ttl=config.session_ttl,
                local_entries=config.local_entries,
                counters=gov.counters,
                hash_ids=config.session_hash_ids,
            )
        return gov

    return make
