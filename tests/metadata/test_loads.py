"""Loads: one caller loads, none too early but some on purpose, and what it stores ends apart from the others'."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis
from govredis.errors import BackendUnavailable
from govredis.keys import sibling
from govredis.metadata import MetadataCache, loading, renewals, values
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

KEY = "agent_meta:a"


def never(_: Any) -> Any:
    raise AssertionError("not a miss")


def age(plain_redis: Any, seconds: float, key: str = KEY, cost: float | None = None) -> None:
    """Have a stored value be older by so much: at its key it ends, beside it stays what is there for longer."""
    left = plain_redis.pttl(key) - int(seconds * 1000)
    for beside in (sibling(key, "stamp"), sibling(key, "stale")):
        digest, end, took, rest = (plain_redis.get(beside) or "- 0 0 ").split(" ", 3)
        aged = f"{digest} {float(end) - seconds:.3f} {took if cost is None else cost} {rest}"
        plain_redis.set(beside, aged, keepttl=True, xx=True)
    plain_redis.pexpire(key, left)
    if left <= 0:
        assert not plain_redis.exists(key)


@pytest.fixture
def other(make_gov: Callable[..., GovRedis], gov: GovRedis) -> GovRedis:
    """Another process, as it were."""
    return make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)


class TestOneLoads:
    def test_a_waiter_gets_the_loaded_value(self, gov: GovRedis, other: GovRedis) -> None:
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
    def test_a_waiter_loads_itself_after_a_load_that_stores_nothing(
        self, gov: GovRedis, other: GovRedis, outcome: str, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if outcome == "is killed":
            monkeypatch.setattr(renewals, "EVERY", 1000.0)  # as no thread of it lives to renew its lease, which ends
        found: list[Any] = []

        def load(_: str) -> Any:
            thread.start()
            while not other.metadata.stats().get("waits"):
                time.sleep(0.002)
            if outcome == "raises":
                raise KeyError("loader")
            if outcome == "is killed":
                assert plain_redis.pexpire(sibling(KEY, "lease"), 1)
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

    def test_a_write_meanwhile_is_seen_by_a_waiter(self, gov: GovRedis, other: GovRedis) -> None:
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

    def test_get_many_gives_back_the_leases_of_ids_that_it_does_not_store(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        assert gov.metadata.get_many(["a", "b"], lambda _: {"b": 1}) == {"b": 1}
        with pytest.raises(KeyError):
            gov.metadata.get_many(["c"], lambda _: {}[0])
        assert not plain_redis.keys("*:lease")


class TestEarly:
    def test_the_chance_grows_with_the_cost_and_the_nearness_of_the_end(self) -> None:
        def share(left: float, cost: float) -> float:
            record = values.MetadataEntry(1, None, "", time.time() + left, cost)
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
        assert float(plain_redis.get(sibling(KEY, "stamp")).split(" ")[2]) > 0
        age(plain_redis, 200, cost=1e9)
        loads = []

        def load(_: str) -> str:
            assert other.metadata.get_or_load("a", never) == "old"
            loads.append(1)
            return "new"

        assert gov.metadata.get_or_load("a", load) == "new"
        assert other.metadata.get_or_load("a", never) == "new"
        assert loads == [1]

    def test_an_early_load_that_fails_harms_nobody(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: "old")
        age(plain_redis, 0, cost=1e9)
        assert gov.metadata.get_or_load("a", lambda _: {}["x"]) == "old"
        assert gov.metadata.stats()["degraded.loads"] == 1
        assert gov.metadata.get("a") == "old"

    @pytest.mark.parametrize("many", [False, True])
    def test_a_load_that_finds_its_store_away_gives_what_another_has_stored(
        self, gov: GovRedis, other: GovRedis, many: bool
    ) -> None:
        def load(_: Any) -> Any:
            assert other.metadata.set("a", "stored")
            raise BackendUnavailable("hung since")

        if many:
            assert gov.metadata.get_many(["a"], load) == {"a": "stored"}
        else:
            assert gov.metadata.get_or_load("a", load) == "stored"
        assert gov.metadata.stats()["degraded.loads"] == 1

    def test_an_early_load_that_finds_none_ends_the_value(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: "old")
        age(plain_redis, 0, cost=1e9)
        assert gov.metadata.get_or_load("a", lambda _: None) is None
        assert gov.metadata.get("a") is None

    def test_values_loaded_together_do_not_end_together(self, gov: GovRedis, plain_redis: Any) -> None:
        ids = [str(n) for n in range(50)]
        gov.metadata.get_many(ids, lambda ids: dict.fromkeys(ids, 1))
        ttls = [plain_redis.pttl(f"agent_meta:{i}") for i in ids]
        assert 265_000 < min(ttls) < 285_000 < max(ttls) <= 300_000


class TestStale:
    @pytest.fixture
    def cache(self, gov: GovRedis, plain_redis: Any) -> MetadataCache:
        """A cache with a value that is over, but still there."""
        cache = gov.cache("report", ttl=60, stale=30)
        cache.get_or_load("a", lambda _: "old")
        assert 50_000 < plain_redis.pttl("report:a") <= 60_000, "at its key nothing is over age"
        assert 80_000 < plain_redis.pttl(sibling("report:a", "stale")) <= 90_000
        assert cache.get("a") == "old"
        age(plain_redis, 61, "report:a")
        return cache

    def test_one_caller_loads_and_the_others_use_the_stale_value(self, cache: MetadataCache, other: GovRedis) -> None:
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

    def test_it_is_not_used_after_another_client_has_deleted_the_value(self, gov: GovRedis, plain_redis: Any) -> None:
        """Before the end of its TTL: nothing else makes the value be gone so soon."""
        cache = gov.cache("report", ttl=60, stale=30)
        cache.get_or_load("a", lambda _: "old")
        plain_redis.delete("report:a")
        with pytest.raises(KeyError):
            cache.get_or_load("a", lambda _: {}["x"])
        assert cache.get_or_load("a", lambda _: "new") == "new"

    def test_a_set_without_stale_leaves_no_stale_value(
        self, cache: MetadataCache, gov: GovRedis, plain_redis: Any
    ) -> None:
        """A cache without `stale` leaves no copy, nor one of a value before its own."""
        gov.cache("report", ttl=60).set("a", "new")
        plain_redis.delete("report:a")
        with pytest.raises(KeyError):
            cache.get_or_load("a", lambda _: {}["x"])

    def test_invalidated_it_is_gone(self, cache: MetadataCache) -> None:
        cache.invalidate("a")
        assert cache.get_or_load("a", lambda _: "new") == "new"


class TestNegative:
    def test_by_default_nothing_is_remembered(self, gov: GovRedis) -> None:
        assert gov.metadata.get_or_load("a", lambda _: None) is None
        assert gov.metadata.get_or_load("a", lambda _: 1) == 1

    @pytest.mark.parametrize("many", [False, True])
    def test_it_is_remembered_that_there_is_none(self, gov: GovRedis, plain_redis: Any, many: bool) -> None:
        cache = gov.cache("agent_meta", negative_ttl=60)
        if many:
            assert cache.get_many(["a"], lambda _: {}) == {}
        else:
            assert cache.get_or_load("a", lambda _: None) is None
        assert cache.get_or_load("a", never) is None
        assert cache.get_many(["a"], never) == {}
        assert cache.get("a") is None
        assert not plain_redis.exists(KEY)
        assert 0 < plain_redis.pttl(sibling(KEY, "stamp")) <= 60_000
        cache.invalidate("a")
        assert cache.get_or_load("a", lambda _: 1) == 1

    def test_created_it_is_there(self, gov: GovRedis) -> None:
        cache = gov.cache("agent_meta", negative_ttl=60)
        assert cache.get_or_load("a", gov.agents.get) is None
        gov.agents.create("a", {"name": "x"})
        found = cache.get_or_load("a", gov.agents.get)
        assert found is not None
        assert found["metadata"] == {"name": "x"}


class TestAllOfANamespace:
    def test_no_value_is_used_afterwards_here_at_once_and_elsewhere_within_a_second(
        self, gov: GovRedis, other: GovRedis, plain_redis: Any
    ) -> None:
        for cache in (gov.metadata, gov.cache("report")):
            cache.get_many(["a", "b"], lambda ids: dict.fromkeys(ids, 1))
        mine, others = (g.cache("agent_meta", negative_ttl=60) for g in (gov, other))
        assert mine.get_or_load("none", lambda _: None) is None
        assert other.metadata.get("a") == 1
        now = 0.0
        generation = other.metadata._generation
        generation._clock = lambda: now
        generation.forget()
        assert other.metadata.get("a") == 1
        gov.metadata.invalidate_all()
        assert gov.metadata.get_many(["a", "b"]) == {}
        assert gov.cache("agent_meta", ttl=5).get("a") is None
        assert gov.cache("report").get("a") == 1
        assert other.metadata.get("a") is None, "it is deleted"
        assert others.get_or_load("none", never) is None, "that there is none is not: it stands in the stamp"
        now = 1.0
        assert others.get_or_load("none", lambda _: 5) == 5
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        assert gov.metadata.set("b", 3)
        assert other.metadata.get_many(["a", "b"]) == {"a": 2, "b": 3}

    def test_a_load_that_was_under_way_is_not_used(self, gov: GovRedis, other: GovRedis) -> None:
        def load(_: str) -> int:
            other.metadata.invalidate_all()
            gov.metadata.invalidate_all()
            gov.metadata.get("b")  # it knows the new one
            return 1

        gov.metadata.get_or_load("a", load)
        assert gov.metadata.get("a") is None

    def test_it_raises_while_redis_is_away(self, make_gov: Callable[..., GovRedis]) -> None:
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

    def test_a_value_that_has_become_too_large_ends_the_old_one(self, gov: GovRedis, plain_redis: Any) -> None:
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
    gov.internal.freshness.drain()  # type: ignore[union-attr]
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
