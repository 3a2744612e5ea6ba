"""Loads: one caller loads, none too early but some on purpose, and what it stores ends apart from the others'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis
from govredis.keys import sibling
from govredis.metadata import MetadataCache, loading, values
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

KEY = "agent_meta:a"


def never(_: Any) -> Any:
    raise AssertionError("not a miss")


def member(plain_redis: Any, key: str = KEY) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plain_redis.get(key))["__govredis__"]
    return found


def age(plain_redis: Any, seconds: float, key: str = KEY, **members: Any) -> None:
    """Have a stored value be older by so much."""
    record = json.loads(plain_redis.get(key))
    record["__govredis__"].update(members)
    record["__govredis__"]["at"] -= seconds
    plain_redis.set(key, json.dumps(record), keepttl=True)


@pytest.fixture
def other(make_gov: Callable[..., GovRedis], gov: GovRedis) -> GovRedis:
    """Another process, as it were."""
    return make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)


class TestOneLoads:
    def test_of_two_hundred_threads_in_eight_processes_one_does(self, gov: GovRedis, plain_redis: Any) -> None:
        """The loader counts in Redis, and takes so long that all others come meanwhile."""
        code = f"""
import sys, threading, time, redis
from govredis import Config, GovRedis
gov = GovRedis(Config(redis_url={gov.config.redis_url!r}, database_url={gov.config.database_url!r},
                      socket_timeout=10, connect_timeout=10, postgres_timeout=20))
gov.metadata._loads.patience = 60
gov.metadata.get("warm")
plain = redis.Redis.from_url({gov.config.redis_url!r})
def load(_):
    plain.incr("loads")
    while int(plain.get("came")) < 200: time.sleep(0.005)
    return {{"n": 1}}
def read():
    plain.incr("came")
    assert gov.metadata.get_or_load("a", load) == {{"n": 1}}
threads = [threading.Thread(target=read) for _ in range(25)]
plain.incr("ready")
while int(plain.get("ready")) < 8: time.sleep(0.005)
for t in threads: t.start()
for t in threads: t.join()
plain.incrby("read", len(threads))
"""
        gov.metadata.get("warm")  # there is a guard
        processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(8)]
        assert [process.wait(timeout=100) for process in processes] == [0] * 8
        assert plain_redis.get("loads") == "1"
        assert plain_redis.get("read") == "200"

    def test_who_waits_gets_what_was_loaded(self, gov: GovRedis, other: GovRedis) -> None:
        other.metadata._loads.patience = 60.0
        found: list[Any] = []

        def load(_: str) -> int:
            thread.start()
            while not other.metadata.stats().get("waits"):
                time.sleep(0.002)
            return 5

        thread = threading.Thread(target=lambda: found.append(other.metadata.get_or_load("a", never)))
        assert gov.metadata.get_or_load("a", load) == 5
        thread.join()
        assert found == [5]

    @pytest.mark.parametrize("outcome", ["raises", "finds none", "finds too much", "is not JSON", "is killed"])
    def test_who_waits_for_one_that_stores_nothing_loads(
        self, gov: GovRedis, other: GovRedis, outcome: str, plain_redis: Any
    ) -> None:
        other.metadata._loads.patience = 0.2 if outcome == "is killed" else 60.0
        found: list[Any] = []

        def load(_: str) -> Any:
            thread.start()
            while not other.metadata.stats().get("waits"):
                time.sleep(0.002)
            if outcome == "raises":
                raise KeyError("loader")
            if outcome == "is killed":
                thread.join()
            return {"finds none": None, "finds too much": "x" * 2_000_000, "is not JSON": object()}.get(outcome)

        thread = threading.Thread(target=lambda: found.append(other.metadata.get_or_load("a", lambda _: 7)))
        try:
            gov.metadata.get_or_load("a", load)
        except (KeyError, ValueError):
            assert outcome in ("raises", "is not JSON")
        thread.join()
        assert found == [7]
        assert not plain_redis.exists(sibling(KEY, "lease"))
        assert other.metadata.get("a") == 7

    def test_a_write_meanwhile_is_seen_by_who_waits(self, gov: GovRedis, other: GovRedis) -> None:
        other.metadata._loads.patience = 60.0
        found: list[Any] = []

        def load(_: str) -> str:
            thread.start()
            while not other.metadata.stats().get("waits"):
                time.sleep(0.002)
            gov.metadata.invalidate("a")
            thread.join()
            return "old"

        thread = threading.Thread(target=lambda: found.append(other.metadata.get_or_load("a", lambda _: "new")))
        assert gov.metadata.get_or_load("a", load) == "old", "it began before"
        assert found == ["new"]
        assert other.metadata.get("a") == "new"

    def test_get_many_waits_for_nobody(self, gov: GovRedis, other: GovRedis) -> None:
        def load(_: str) -> int:
            assert other.metadata.get_many(["a", "b"], lambda ids: dict.fromkeys(ids, 1)) == {"a": 1, "b": 1}
            return 2

        assert gov.metadata.get_or_load("a", load) == 2
        assert other.metadata.stats().get("waits", 0) == 0

    def test_get_many_gives_the_leases_back_of_what_it_does_not_store(self, gov: GovRedis, plain_redis: Any) -> None:
        assert gov.metadata.get_many(["a", "b"], lambda _: {"b": 1}) == {"b": 1}
        with pytest.raises(KeyError):
            gov.metadata.get_many(["c"], lambda _: {}[0])
        assert not plain_redis.keys("*:lease")


class TestEarly:
    def test_the_chance_grows_with_the_cost_and_the_nearness_of_the_end(self) -> None:
        def share(left: float, cost: float) -> float:
            record = values.Record(1, None, "", time.time() + left, cost)
            return sum(loading.is_due(record) for _ in range(400)) / 400

        assert share(100, 0.0) == 0
        assert share(100, 2.0) == 0
        assert share(10, 1.0) < 0.05
        assert 0.2 < share(1, 1.0) < 0.55, "exp(-1)"
        assert 0.75 < share(0.1, 1.0) <= 1.0, "exp(-0.1)"
        assert share(-1, 0.0) == 1

    def test_one_caller_loads_anew_and_the_others_go_on_with_the_old_value(
        self, gov: GovRedis, other: GovRedis, plain_redis: Any
    ) -> None:
        gov.metadata.get_or_load("a", lambda _: "old")
        assert member(plain_redis)["cost"] > 0
        age(plain_redis, 299, cost=1e9)
        loads = []

        def load(_: str) -> str:
            assert other.metadata.get_or_load("a", never) == "old"
            loads.append(1)
            return "new"

        assert gov.metadata.get_or_load("a", load) == "new"
        assert other.metadata.get_or_load("a", never) == "new"
        assert loads == [1]

    def test_one_that_fails_harms_nobody(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: "old")
        age(plain_redis, 0, cost=1e9)
        assert gov.metadata.get_or_load("a", lambda _: {}["x"]) == "old"
        assert gov.metadata.stats()["degraded.loads"] == 1
        assert gov.metadata.get("a") == "old"

    def test_one_that_finds_none_ends_the_value(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: "old")
        age(plain_redis, 0, cost=1e9)
        assert gov.metadata.get_or_load("a", lambda _: None) is None
        assert gov.metadata.get("a") is None

    def test_what_was_loaded_together_does_not_end_together(self, gov: GovRedis, plain_redis: Any) -> None:
        ids = [str(n) for n in range(50)]
        gov.metadata.get_many(ids, lambda ids: dict.fromkeys(ids, 1))
        ttls = [plain_redis.pttl(f"agent_meta:{i}") for i in ids]
        assert 265_000 < min(ttls) < 285_000 < max(ttls) <= 300_000


class TestStale:
    @pytest.fixture
    def cache(self, gov: GovRedis, plain_redis: Any) -> MetadataCache:
        """Of a value that is over, but still there."""
        cache = gov.cache("report", ttl=60, stale=30)
        cache.get_or_load("a", lambda _: "old")
        assert 80_000 < plain_redis.pttl("report:a") <= 90_000
        assert cache.get("a") == "old"
        age(plain_redis, 61, "report:a")
        return cache

    def test_one_caller_loads_and_the_others_use_what_is_over(self, cache: MetadataCache, other: GovRedis) -> None:
        def load(_: str) -> str:
            assert other.cache("report", ttl=60, stale=30).get_or_load("a", never) == "old"
            return "new"

        assert cache.get_or_load("a", load) == "new"
        assert cache.get("a") == "new"

    def test_it_is_used_where_the_load_fails(self, cache: MetadataCache) -> None:
        assert cache.get_or_load("a", lambda _: {}["x"]) == "old"
        assert cache.stats()["degraded.loads"] == 1
        with pytest.raises(KeyError):
            cache.get_or_load("b", lambda _: {}["x"])

    def test_it_is_a_miss_otherwise(self, cache: MetadataCache) -> None:
        assert cache.get("a") is None
        assert cache.get_many(["a"]) == {}
        assert cache.get_many(["a"], lambda _: {"a": "new"}) == {"a": "new"}

    def test_invalidated_it_is_gone(self, cache: MetadataCache) -> None:
        cache.invalidate("a")
        assert cache.get_or_load("a", lambda _: "new") == "new"


class TestNegative:
    def test_by_default_nothing_is_remembered(self, gov: GovRedis) -> None:
        assert gov.metadata.get_or_load("a", lambda _: None) is None
        assert gov.metadata.get_or_load("a", lambda _: 1) == 1

    @pytest.mark.parametrize("many", [False, True])
    def test_it_is_remembered_that_there_is_none(self, gov: GovRedis, plain_redis: Any, many: bool) -> None:
        cache = gov.cache("agent_meta", negative_ttl=5)
        if many:
            assert cache.get_many(["a"], lambda _: {}) == {}
        else:
            assert cache.get_or_load("a", lambda _: None) is None
        assert cache.get_or_load("a", never) is None
        assert cache.get_many(["a"], never) == {}
        assert cache.get("a") is None
        assert plain_redis.pttl(KEY) <= 5000
        cache.invalidate("a")
        assert cache.get_or_load("a", lambda _: 1) == 1

    def test_created_it_is_there(self, gov: GovRedis) -> None:
        cache = gov.cache("agent_meta", negative_ttl=5)
        assert cache.get_or_load("a", gov.agents.get) is None
        gov.agents.create("a", {"name": "x"})
        found = cache.get_or_load("a", gov.agents.get)
        assert found is not None
        assert found["metadata"] == {"name": "x"}

    def test_an_older_govredis_takes_it_for_a_miss(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.cache("agent_meta", negative_ttl=5).get_or_load("a", lambda _: None)
        record = json.loads(plain_redis.get(KEY))
        assert record["value"] is None
        assert record["__govredis__"]["bare"]


class TestAllOfANamespace:
    def test_none_is_used_afterwards_here_at_once_and_elsewhere_within_a_second(
        self, gov: GovRedis, other: GovRedis, plain_redis: Any
    ) -> None:
        for cache in (gov.metadata, gov.cache("report")):
            cache.get_many(["a", "b"], lambda ids: dict.fromkeys(ids, 1))
        assert other.metadata.get("a") == 1
        now = 0.0
        generation = other.metadata._generation
        generation._clock = lambda: now
        generation.forget()
        assert other.metadata.get("a") == 1
        plain_redis.config_resetstat()
        gov.metadata.invalidate_all()
        stats = plain_redis.info("commandstats")
        assert sum(s["calls"] for n, s in stats.items() if n in ("cmdstat_set", "cmdstat_del")) == 1
        assert gov.metadata.get_many(["a", "b"]) == {}
        assert gov.cache("agent_meta", ttl=5).get("a") is None
        assert gov.cache("report").get("a") == 1
        assert other.metadata.get("a") == 1
        now = 1.0
        assert other.metadata.get("a") is None
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        assert gov.metadata.set("b", 3)
        assert other.metadata.get_many(["a", "b"]) == {"a": 2, "b": 3}

    def test_what_was_being_loaded_is_not_used(self, gov: GovRedis, other: GovRedis) -> None:
        def load(_: str) -> int:
            other.metadata.invalidate_all()
            gov.metadata.invalidate_all()
            gov.metadata.get("b")  # it knows the new one
            return 1

        gov.metadata.get_or_load("a", load)
        assert gov.metadata.get("a") is None

    def test_of_a_redis_that_is_away_it_raises(self, make_gov: Callable[..., GovRedis]) -> None:
        from govredis import BackendUnavailable

        gov = make_gov(redis_url="redis://127.0.0.1:1")
        with pytest.raises(BackendUnavailable):
            gov.metadata.invalidate_all()
        make_gov(redis_enabled=False).metadata.invalidate_all()


class TestSize:
    def test_larger_values_are_given_and_not_kept(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, metadata_max_bytes=200)
        cache, large = gov.metadata, "x" * 200
        assert cache.get_or_load("a", lambda _: large) == large
        assert cache.get_many(["b"], lambda _: {"b": large, "c": 1}) == {"b": large}
        assert cache.set("c", large) is False
        assert cache.stats()["too_large"] == 3
        assert not plain_redis.exists(KEY)
        assert cache.set("c", "x" * 50) is True

    def test_one_that_has_become_larger_ends_the_old_one(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: "old")
        age(plain_redis, 0, cost=1e9)
        large = "x" * 2_000_000
        assert gov.metadata.get_or_load("a", lambda _: large) == large
        assert gov.metadata.get("a") is None


def test_three_thousand_agents_from_cold_are_three_statements(gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"agent-{n}" for n in range(3000)]
    with gov.postgres.transaction() as tx:
        for i in ids:
            tx.fetch("INSERT INTO govredis_agents (agent_id, metadata) VALUES (%s, '{}')", (i,))
    gov._guard.drain()  # type: ignore[union-attr]
    gov.metadata.get("warm")
    statements = []
    execute = gov.postgres._execute
    monkeypatch.setattr(gov.postgres, "_execute", lambda *a, **k: statements.append(a) or execute(*a, **k))
    found = gov.metadata.get_many(ids, gov.agents.get_many)
    assert list(found) == ids
    loads = [s for s in statements if "govredis_agents" in repr(s)]
    assert len(loads) == 1
    assert len(statements) <= 3
    statements.clear()
    assert gov.metadata.get_many(ids, never) == found
    assert not [s for s in statements if "govredis_agents" in repr(s)]


def test_settings_that_cannot_be_are_refused(gov: GovRedis) -> None:
    for wrong in ({"negative_ttl": 0}, {"negative_ttl": -1}, {"stale": -1}, {"stale": "1"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            gov.cache("report", **wrong)  # type: ignore[arg-type]
    assert os.getpid()
