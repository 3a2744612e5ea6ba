"""Beside the async service: the value is plain JSON, and what it sets and deletes counts for as much as what we do."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from async_service.blocking import Agent, BlockingService
from support import redis_of

from govredis import ConfigurationError, GovRedis
from govredis.client import Script
from govredis.keys import sibling
from govredis.metadata import MetadataCache, entry_keys
from govredis.metadata.values import stamp
from govredis.testing.servers import PostgresServer, RedisServer

KEY = "agent_meta:a"
TOMBSTONE, LEASE = sibling(KEY, "tombstone"), sibling(KEY, "lease")
THEIRS = Agent("a", {"by": "them"}, version=1)
RECORD = {"agent_id": "a", "metadata": {"by": "them"}, "status": "active", "version": 1}
OURS = {**RECORD, "metadata": {"by": "us"}}

#: As govredis 0.3 wrote them.
OLD = [
    '{"x": 1, "__govredis__": {"at": 1795884356.1, "ttl": 300.000}}',
    '{"__govredis__": {"at": 1795884356.1, "ttl": 300.000, "cost": 0.1, "generation": "", "epoch": 5, "version": 7}}',
    '{"value": [1], "__govredis__": {"at": 1795884356.1, "ttl": 300.000, "bare": true}}',
    '{"value": null, "__govredis__": {"at": 1795884356.1, "ttl": 5.000, "bare": true}}',
]


def never(_: Any) -> Any:
    raise AssertionError("not a miss")


def agent(record: dict[str, Any]) -> Agent:
    return Agent(**record)


@pytest.fixture(params=["no postgres", "postgres", "postgres, use"])
def mode(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def make_cache(
    mode: str, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> Callable[..., MetadataCache]:
    """Caches of agents, each of another process, as it were."""
    where: dict[str, Any] = {} if mode == "no postgres" else {"database_url": postgres_server.url}
    foreign: Any = "use" if mode == "postgres, use" else None

    def make(*, local: bool = False, **settings: Any) -> MetadataCache:
        gov = make_gov(redis_url=redis_server.url, local_cache=local, **where)
        return gov.cache("agent_meta", foreign=foreign, **settings)

    return make


@pytest.fixture
def cache(make_cache: Callable[..., MetadataCache]) -> MetadataCache:
    return make_cache()


class TestForeignValues:
    def test_is_used_or_loaded_anew(
        self, cache: MetadataCache, mode: str, async_service: BlockingService, plain_redis: Any
    ) -> None:
        async_service.metadata.set(THEIRS)
        if mode == "postgres":
            assert cache.get("a") is None
            assert cache.get_many(["a"]) == {}
            assert cache.get_or_load("a", lambda _: OURS) == OURS
            assert cache.get("a") == OURS
            assert async_service.metadata.get("a") == agent(OURS)
        else:
            assert cache.get("a") == cache.get_or_load("a", never) == cache.get_many(["a"], never)["a"] == RECORD
            assert async_service.metadata.get("a") == THEIRS
            plain_redis.pexpire(KEY, 1)
            while plain_redis.exists(KEY):
                pass
            assert cache.get_or_load("a", lambda _: OURS) == OURS, "until its TTL"

    def test_over_ours_too(self, cache: MetadataCache, mode: str, async_service: BlockingService) -> None:
        """The stamp of ours is there still."""
        assert cache.get_or_load("a", lambda _: OURS) == OURS
        async_service.metadata.set(THEIRS)
        assert cache.get("a") == (None if mode == "postgres" else RECORD)

    def test_our_set_takes_its_place(self, cache: MetadataCache, async_service: BlockingService) -> None:
        async_service.metadata.set(THEIRS)
        assert cache.set("a", OURS) is True
        assert cache.get("a") == OURS
        assert async_service.metadata.get("a") == agent(OURS)

    def test_under_a_tombstone_it_is_a_miss(
        self, cache: MetadataCache, mode: str, async_service: BlockingService, plain_redis: Any
    ) -> None:
        """They had read it before the write, and did not hear of it."""
        for version in (None, 5):
            cache.invalidate("a", version=version)
            async_service.metadata.set(THEIRS)
            assert cache.get("a") is None
            assert cache.get_many(["a"]) == {}
            plain_redis.delete(TOMBSTONE)
            assert cache.get("a") == (None if mode == "postgres" else RECORD)
        cache.invalidate("a")
        async_service.metadata.set(THEIRS)
        assert cache.get_or_load("a", lambda _: OURS) == OURS, "nor is it what a lease finds"
        assert async_service.metadata.get("a") == agent(OURS), "and it is written over"

    def test_an_invalidation_drops_it(self, cache: MetadataCache, async_service: BlockingService) -> None:
        """Also where ours, whose stamp is still there, was as new."""
        for version in (None, 0):
            cache.get_or_load("a", lambda _: OURS)
            async_service.metadata.set(THEIRS)
            cache.invalidate("a", version=version)
            assert async_service.metadata.get("a") is None

    def test_an_invalidation_that_keeps_a_value_as_new_keeps_ours_only(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer,
        async_service: BlockingService,
    ) -> None:  # fmt: skip
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
        record = gov.agents.create("a", {})
        gov.metadata.get_or_load("a", gov.agents.get)
        gov.metadata.invalidate("a", version=record["version"])
        assert gov.metadata.get("a") == record
        async_service.metadata.set(THEIRS)  # beside the stamp of ours
        gov.metadata.invalidate("a", version=record["version"])
        assert async_service.metadata.get("a") is None

    def test_a_known_absence_gives_way_to_it(
        self, make_cache: Callable[..., MetadataCache], mode: str, async_service: BlockingService
    ) -> None:
        cache = make_cache(negative_ttl=60)
        assert cache.get_or_load("a", lambda _: None) is None
        assert cache.get_or_load("a", never) is None
        assert async_service.metadata.get("a") is None
        async_service.metadata.set(THEIRS)
        assert cache.get_or_load("a", lambda _: OURS) == (OURS if mode == "postgres" else RECORD)

    @pytest.mark.parametrize("raw", OLD)
    def test_a_value_that_govredis_0_3_set_is_a_miss(self, cache: MetadataCache, plain_redis: Any, raw: str) -> None:
        plain_redis.set(KEY, raw)
        assert cache.get("a") is None
        assert cache.get_many(["a"]) == {}
        assert cache.get_or_load("a", lambda _: OURS) == OURS
        assert json.loads(plain_redis.get(KEY)) == OURS
        plain_redis.set(KEY, raw)  # of a process that has not been renewed yet, over ours
        assert cache.get("a") is None

    def test_it_is_not_kept_in_the_process(
        self, make_cache: Callable[..., MetadataCache], mode: str, async_service: BlockingService
    ) -> None:
        cache = make_cache(local=True)
        for version in range(20):
            async_service.metadata.set(Agent("a", version=version))
            found = cache.get("a")
            assert found is None if mode == "postgres" else found["version"] == version
        assert cache.stats()["local_hits"] == 0


@pytest.mark.parametrize("first", ["them", "us"])
def test_a_hundred_reads_by_each_side_in_turn_are_two_loads(
    cache: MetadataCache, async_service: BlockingService, first: str
) -> None:
    loads = []

    def load(who: str) -> dict[str, Any]:
        loads.append(who)
        return RECORD

    def they() -> None:
        found = async_service.metadata.get("a")
        if found is None:
            found = Agent(**load("them"))
            async_service.metadata.set(found)
        assert found == THEIRS

    def we() -> None:
        assert cache.get_or_load("a", lambda _: load("us")) == RECORD

    for _ in range(100):
        for side in (they, we) if first == "them" else (we, they):
            side()
    assert len(loads) <= 2


class TestForeignWritesDuringALoad:
    @pytest.fixture(params=["get_or_load", "get_many", "refresh"])
    def load(self, request: pytest.FixtureRequest, cache: MetadataCache) -> Callable[[Callable[[], None]], Any]:
        """Has a value of ours loaded while something happens; returns what the caller gets."""

        def loading(meanwhile: Callable[[], None]) -> Any:
            def loader(_: Any) -> Any:
                meanwhile()
                return {"a": OURS} if request.param == "get_many" else OURS

            if request.param == "get_many":
                return cache.get_many(["a"], loader)["a"]
            return (cache.get_or_load if request.param == "get_or_load" else cache.reload)("a", loader)

        return loading

    def test_a_set_that_stands_wins(
        self, load: Any, cache: MetadataCache, async_service: BlockingService, plain_redis: Any
    ) -> None:
        assert load(lambda: async_service.metadata.set(THEIRS)) == OURS, "what was loaded"
        assert async_service.metadata.get("a") == THEIRS
        assert cache.stats()["fills_refused"] == 1
        assert not plain_redis.exists(LEASE), "nobody waits for what will not come"

    def test_a_set_over_what_stood_wins(
        self, load: Any, cache: MetadataCache, mode: str, async_service: BlockingService, plain_redis: Any
    ) -> None:
        plain_redis.set(KEY, OLD[0])  # a miss for all
        load(lambda: async_service.metadata.set(THEIRS))
        assert async_service.metadata.get("a") == THEIRS

    def test_a_delete_of_what_stood_wins(self, load: Any, async_service: BlockingService, plain_redis: Any) -> None:
        plain_redis.set(KEY, OLD[0])
        load(lambda: async_service.metadata.invalidate("a"))
        assert not plain_redis.exists(KEY)
        assert not plain_redis.exists(LEASE)

    def test_a_delete_where_nothing_stood_leaves_no_trace(
        self, load: Any, cache: MetadataCache, async_service: BlockingService
    ) -> None:
        """So the docstring of MetadataCache says."""
        load(lambda: async_service.metadata.invalidate("a"))
        assert cache.get("a") == OURS

    def test_nothing_done_it_is_stored_over_what_stood(self, load: Any, cache: MetadataCache, plain_redis: Any) -> None:
        plain_redis.set(KEY, OLD[0])
        assert load(lambda: None) == OURS
        assert cache.get("a") == OURS


# -- every order of two loads of ours and one write of theirs ------------------------------------------------------

Step = tuple[int, str]


def orders(*runs: tuple[str, ...]) -> Iterator[list[Step]]:
    """Every order of what several do, each in its own order."""
    who = [n for n, run in enumerate(runs) for _ in run]
    for order in sorted(set(itertools.permutations(who))):
        at = [iter(run) for run in runs]
        yield [(n, next(at[n])) for n in order]


class Violation(AssertionError):
    pass


class Race:
    """Loads of ours, by the scripts on a real Redis, and a write of theirs: each is held against what it must reply."""

    def __init__(self, gov: GovRedis, tell: str) -> None:
        self._redis = redis_of(gov)
        self._tell = tell

    def run(self, before: str, steps: list[Step]) -> None:
        """`before`: who had set what stands at the key. Raises Violation."""
        self._redis.call("DEL", *entry_keys.entry_keys(KEY))
        if before == "us":
            self._fill("0", "", b"")
        elif before == "them":
            self._redis.call("SET", KEY, "0")
        version, told = 0, 0
        leases: dict[int, tuple[str, bytes, str]] = {}
        loaded: dict[int, int] = {}
        for who, step in steps:
            now = self._now()
            if step == "take":
                reply = self._redis.pipeline([entry_keys.take(KEY, f"lease{who}")], (entry_keys.LEASE,))[0]
                leases[who] = reply[0].decode(), reply[2], now
            elif step == "load":
                loaded[who] = version
            elif step == "fill":
                token, stood, was = leases[who]
                held = self._redis.call("GET", LEASE)
                stored = self._fill(str(loaded[who]), token, stood)
                if stored != (held is not None and held.decode() == token and now == was):
                    raise Violation(f"a fill was {'' if stored else 'not '}stored: {was!r} stood, and {now!r} stands")
            elif step == "write":
                version = 1
            elif self._tell == "SET":
                self._redis.call("SET", KEY, "1")
                told = 1
            elif self._redis.call("DEL", KEY):
                told = 1
            if int(self._now() or "1") < told:
                raise Violation(f"{self._now()} stands where {told} was told")

    def _now(self) -> str:
        return (self._redis.call("GET", KEY) or b"").decode()

    def _fill(self, text: str, token: str, stood: bytes) -> bool:
        about = stamp(text, "", ttl=9.0, cost=0.0, epoch=None, generation="")
        fill = entry_keys.fill(KEY, text, about, ttl=9.0, stale=0.0, lease=token, stood=stood, version="")
        return bool(self._redis.pipeline([fill], (entry_keys.FILL,))[0])


LOAD, WRITE = ("take", "load", "fill"), ("write", "tell")


@pytest.mark.once
@pytest.mark.one_redis
@pytest.mark.parametrize("tell", ["SET", "DEL"])
@pytest.mark.parametrize("before", ["nobody", "us", "them"])
def test_every_order(make_gov: Callable[..., GovRedis], redis_server: RedisServer, tell: str, before: str) -> None:
    race = Race(make_gov(redis_url=redis_server.url), tell)
    ran = 0
    for steps in orders(LOAD, LOAD, WRITE):
        race.run(before, steps)
        ran += 1
    assert ran == 560


def without(script: Script, line: str, instead: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    def patched(patch: pytest.MonkeyPatch) -> None:
        assert line in script.source
        source = script.source.replace(line, instead)
        patch.setattr(script, "source", source)
        patch.setattr(script, "sha", hashlib.sha1(source.encode()).hexdigest())

    return patched


CHANGED = "if stands ~= ARGV[6]"
MUTANTS = {
    "a fill looks for no change": (without(entry_keys.FILL, CHANGED, "if false"), "SET", "nobody"),
    "a fill looks only at a value": (
        without(entry_keys.FILL, CHANGED, "if value and stands ~= ARGV[6]"), "DEL", "them"
    ),
    "a fill looks only whether a value is": (
        without(entry_keys.FILL, CHANGED, "if (stands == '') ~= (ARGV[6] == '')"), "SET", "them",
    ),
    "who shares a lease is not told what stands": (
        without(entry_keys.LEASE, "{lease, 0, stood,", "{lease, 0, '',"), "SET", "them",
    ),
    "a fill leaves its lease": (without(entry_keys.FILL, "redis.call('DEL', KEYS[3])  --", "--"), "DEL", "nobody"),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.one_redis
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_rule_is_needed(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    break_it, tell, before = MUTANTS[mutant]
    break_it(monkeypatch)
    race = Race(make_gov(redis_url=redis_server.url), tell)
    with pytest.raises(Violation):
        for steps in orders(LOAD, LOAD, WRITE):
            race.run(before, steps)


# -- all of a namespace ---------------------------------------------------------------------------------------------


class TestAllOfANamespace:
    def test_nothing_is_left_that_they_would_read(
        self, cache: MetadataCache, async_service: BlockingService, plain_redis: Any
    ) -> None:
        cache.get_many(["a", "b"], lambda ids: dict.fromkeys(ids, OURS))
        async_service.metadata.set(Agent("c"))
        for n in range(3000):
            plain_redis.set(f"other:{n}", 1)
        plain_redis.config_resetstat()
        cache.invalidate_all()
        calls = {name: found["calls"] for name, found in plain_redis.info("commandstats").items()}
        assert calls["cmdstat_scan"] <= 2 * 7, "a thousand keys a step, and each key twice"
        assert calls["cmdstat_unlink"] == 3
        assert plain_redis.keys("agent_meta:*") == []
        assert len(plain_redis.keys("other:*")) == 3000

    def test_nor_what_was_being_loaded(
        self, make_cache: Callable[..., MetadataCache], cache: MetadataCache, plain_redis: Any
    ) -> None:
        def load(_: str) -> Any:
            make_cache().invalidate_all()
            return OURS

        assert cache.get_or_load("a", load) == OURS
        assert plain_redis.keys("agent_meta:*") == []

    def test_a_load_that_ends_behind_the_walk_stores_nothing(
        self, make_cache: Callable[..., MetadataCache], cache: MetadataCache, plain_redis: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """The walk over the values has passed its place when it fills."""
        walk, other = entry_keys.walk, make_cache()

        def load(_: str) -> Any:
            other.invalidate_all()
            return OURS

        def filling(redis: Any, start: str, end: str = "") -> Iterator[list[bytes]]:
            yield from walk(redis, start, end)
            if end:
                assert not plain_redis.exists(LEASE)

        monkeypatch.setattr(entry_keys, "walk", filling)
        cache.get_or_load("a", load)
        assert cache.stats()["fills_refused"] == 1

    def test_keys_of_others_stay(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any
    ) -> None:
        """Their prefix begins with the namespace, or ours looks like a pattern that matches theirs."""
        gov, theirs = (make_gov(redis_url=redis_server.url, key_prefix=prefix) for prefix in ("", "app:"))
        odd, even = (make_gov(redis_url=redis_server.url, key_prefix=prefix) for prefix in ("p*:", "pp:"))
        theirs.sessions.bind("s", "agent")
        assert theirs.metadata.set("a", 1) and even.metadata.set("a", 1)
        held = theirs.locks.acquire("x")
        gov.cache("app").set("a", 1)
        gov.cache("app").invalidate_all()
        odd.metadata.invalidate_all()
        assert not plain_redis.exists("app:a")
        assert theirs.sessions.get_agent_id("s") == "agent"
        assert theirs.metadata.get("a") == even.metadata.get("a") == 1
        assert held.release()


def test_bad_settings_are_refused(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    for wrong in ("miss", "", True, 1):
        with pytest.raises(ValueError, match=r"foreign is .*it must be 'use' or None"):
            gov.cache("report", foreign=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"foreign is 'use'; it must be None for a strict cache"):
        gov.cache("report", foreign="use", strict=True)
    with pytest.raises(ConfigurationError):
        make_gov(redis_url=redis_server.url).cache("report", strict=True)
