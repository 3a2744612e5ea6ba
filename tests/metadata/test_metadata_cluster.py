"""Metadata on a Redis Cluster: each shard for itself, in outages, moves of slots and failovers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import eventually

from govredis import BackendUnavailable, GovRedis
from govredis.client import slot_of
from govredis.keys import sibling
from govredis.metadata import entry_keys
from govredis.metadata.local import MISS
from govredis.metadata.values import stamp
from govredis.testing.servers import PostgresServer, RedisCluster, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: For servers that hang.
PROMPT = {"socket_timeout": 1.0, "connect_timeout": 1.0}
#: Enough for some on each of three shards.
IDS = [f"a{n}" for n in range(30)]


@pytest.fixture(scope="module")
def shared_cluster(redis_binary: str) -> Iterator[RedisCluster]:
    """Three masters without replicas: what is taken away comes back."""
    config = ["cluster-require-full-coverage no"]
    with RedisCluster(3, 0, binary=redis_binary, config=config) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    for node in shared_cluster.masters:
        node.command("FLUSHALL")
    return shared_cluster


@pytest.fixture(params=["freshness lease", "no freshness lease"])
def make(
    request: pytest.FixtureRequest, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
) -> Callable[..., GovRedis]:
    """Makes GovRedis objects; processes, as it were. With PostgreSQL, and without."""
    where = {"database_url": postgres_server.url} if request.param == "freshness lease" else {}
    return lambda cluster, **settings: make_gov(redis_url=cluster.url, **PROMPT, **where, **settings)


@pytest.fixture
def gov(cluster: RedisCluster, make: Callable[..., GovRedis]) -> GovRedis:
    return make(cluster)


@pytest.fixture
def other(cluster: RedisCluster, make: Callable[..., GovRedis]) -> GovRedis:
    return make(cluster)


def key_of(identity: str) -> str:
    return f"agent_meta:{identity}"


def loaded(ids: list[str]) -> dict[str, Any]:
    return {i: {"id": i} for i in ids}


def on(cluster: RedisCluster, node: RedisServer) -> list[str]:
    """The ids whose keys a node has."""
    return [i for i in IDS if cluster.master_of(key_of(i)) is node]


def another(cluster: RedisCluster, node: RedisServer) -> RedisServer:
    return next(master for master in cluster.masters if master is not node)


def is_away(gov: GovRedis, identity: str) -> bool:
    redis = gov.internal.context.redis
    assert redis is not None
    return not redis.at(key_of(identity)).breaker.closed


class TestShards:
    def test_every_call_works_on_every_shard(self, gov: GovRedis, other: GovRedis, cluster: RedisCluster) -> None:
        assert all(on(cluster, node) for node in cluster.masters)
        cache = gov.metadata
        assert cache.get_many(IDS, loaded) == loaded(IDS)
        assert other.metadata.get_many(IDS) == loaded(IDS)
        for i in IDS:
            assert other.metadata.get_or_load(i, pytest.fail) == {"id": i}
            cache.invalidate(i)
            assert other.metadata.get(i) is None
            assert cache.get_or_load(i, lambda i: [i]) == [i]
            assert other.metadata.get(i) == [i]
        assert other.metadata.stats()["hits"] == 3 * len(IDS)
        assert "degraded.reads" not in other.metadata.stats()

    def test_a_shard_that_is_away_has_its_values_loaded_and_the_others_are_hits(
        self, gov: GovRedis, other: GovRedis, cluster: RedisCluster
    ) -> None:
        gov.metadata.get_many(IDS, loaded)
        dead = cluster.masters[0]
        gone = on(cluster, dead)
        here = [i for i in IDS if i not in gone]
        dead.kill()
        try:
            asked: list[list[str]] = []

            def load(ids: list[str]) -> dict[str, Any]:
                asked.append(ids)
                return loaded(ids)

            for _ in range(3):
                assert other.metadata.get_many(IDS, load) == loaded(IDS)
            assert asked == [gone] * 3
            assert other.metadata.get_many(IDS) == loaded(here)
            assert other.metadata.get_or_load(here[0], pytest.fail) == {"id": here[0]}
            assert other.metadata.set(gone[0], 1) is False
            assert other.metadata.set(here[0], 1) is True
            with pytest.raises(BackendUnavailable):
                other.metadata.invalidate(gone[0])
            other.metadata.invalidate(here[0])
            asked.clear()
            assert other.metadata.get_many([gone[0], here[0]], load) == loaded([gone[0], here[0]])
            assert gov.metadata.get(here[0]) == {"id": here[0]}, "it is stored, beside one that cannot be"
        finally:
            dead.start()
        eventually(lambda: other.metadata.get_many(IDS, loaded) and other.metadata.get_many(IDS) == loaded(IDS))

    def test_invalidations_owed_to_a_shard_are_carried_out_at_its_return_and_the_others_are_used_meanwhile(
        self, gov: GovRedis, other: GovRedis, cluster: RedisCluster
    ) -> None:
        gov.metadata.get_many(IDS, loaded)
        hung = cluster.masters[1]
        here, gone, elsewhere = (on(cluster, node) for node in cluster.masters)
        hung.pause()
        try:
            for i in gone[:2]:
                gov.metadata.invalidate_committed(i)
            gov.metadata._pending.add(elsewhere[0])  # owed to another
            assert set(gov.metadata._pending.tokens) == {*gone[:2], elsewhere[0]}
            assert gov.metadata.get_many(here) == loaded(here)
            gov.metadata.invalidate_committed(here[0])
            assert other.metadata.get(here[0]) is None
        finally:
            hung.resume()
        eventually(lambda: not is_away(gov, gone[0]))
        assert [gov.metadata.get(i) for i in gone[:2]] == [None, None]
        assert set(gov.metadata._pending.tokens) == {elsewhere[0]}

    def test_the_walk_finds_the_keys_of_all_nodes(self, gov: GovRedis) -> None:
        gov.metadata.get_many(IDS, loaded)
        redis = gov.internal.context.redis
        assert redis is not None
        found = [key for some in entry_keys.walk(redis, "agent_meta:") for key in some]
        assert sorted(found) == sorted(key_of(i).encode() for i in IDS)


class TestMoves:
    def test_a_value_moves_with_its_slot(self, gov: GovRedis, other: GovRedis, cluster: RedisCluster) -> None:
        gov.metadata.get_many(IDS, loaded)
        other.metadata.get_many(IDS)
        slot, was = slot_of(key_of("a0")), cluster.master_of(key_of("a0"))
        cluster.move_slots([slot], another(cluster, was))
        try:
            is_judged_by_its_node = other.internal.freshness is not None
            assert other.metadata.get_many(IDS) == loaded(IDS[1:] if is_judged_by_its_node else IDS)
            assert other.metadata.get_or_load("a0", lambda _: {"id": "a0"}) == {"id": "a0"}
            assert other.metadata.get("a0") == {"id": "a0"}
            gov.metadata.invalidate("a0")
            assert other.metadata.get("a0") is None
            assert gov.metadata.get_or_load("a0", lambda _: 1) == other.metadata.get("a0") == 1
        finally:
            cluster.move_slots([slot], was)
        assert other.metadata.get("a0") == (None if is_judged_by_its_node else 1)
        assert "degraded.reads" not in other.metadata.stats()

    @pytest.mark.parametrize("arrived", [(), ("value",), ("stamp",), ("value", "stamp")])
    def test_in_a_slot_on_its_way_a_value_is_loaded_or_read_and_invalidated(
        self, gov: GovRedis, other: GovRedis, cluster: RedisCluster, arrived: tuple[str, ...]
    ) -> None:
        key = key_of("a0")
        gov.metadata.get_many(IDS, loaded)
        was = cluster.master_of(key)
        keys = {"value": key, "stamp": sibling(key, "stamp")}
        with cluster.moving(slot_of(key), another(cluster, was), [keys[name] for name in arrived]):
            assert other.metadata.get_or_load("a0", lambda _: {"id": "a0"}) == {"id": "a0"}
            assert other.metadata.get_many(IDS, loaded) == loaded(IDS)
            other.metadata.invalidate_committed("a0")
            assert not other.metadata._pending.tokens
            assert not is_away(other, "a0"), "that is no outage"
            assert other.metadata.get_many(IDS[1:]) == loaded(IDS[1:])
            assert gov.metadata.get("a0") is None
        try:
            assert gov.metadata.get("a0") is None
            assert gov.metadata.set("a0", 1) is False, "its tombstone has come along"
        finally:
            cluster.move_slots([slot_of(key)], was)

    def test_an_invalidation_owed_in_a_slot_on_its_way_keeps_nobody_from_the_node(
        self, gov: GovRedis, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov.metadata.get_many(IDS, loaded)
        key = key_of("a0")
        was = cluster.master_of(key)
        stamped = [sibling(key, "stamp")]
        with cluster.moving(slot_of(key), another(cluster, was), stamped):
            with monkeypatch.context() as patch:
                patch.setattr(entry_keys, "_invalidate_in_steps", lambda *_: pytest.fail("struck"))
                with pytest.raises(pytest.fail.Exception):
                    gov.metadata.invalidate_committed("a0")
            eventually(lambda: not gov.metadata._pending.tokens)
            eventually(lambda: not is_away(gov, "a0"))
            assert gov.metadata.get("a0") is None
        assert gov.metadata.get("a0") is None
        cluster.move_slots([slot_of(key)], was)


class TestGenerations:
    def plant(self, cluster: RedisCluster, identity: str, generation: str) -> None:
        """A value that was on its way when the others were deleted."""
        key, text = key_of(identity), json.dumps({"id": identity})
        node = cluster.master_of(key)
        node.command("SET", key, text)
        about = stamp(text, "", ttl=60, cost=0.0, epoch=None, generation=generation)
        node.command("SET", sibling(key, "stamp"), about)

    def test_none_of_any_shard_is_used_afterwards(self, gov: GovRedis, cluster: RedisCluster) -> None:
        gov.metadata.get_many(IDS, loaded)
        for times in range(2):
            before = gov.metadata._backend.terms(key_of("a0"))
            assert before is not None
            old = before.generation
            gov.metadata.invalidate_all()
            assert gov.metadata.get_many(IDS) == {}
            for i in IDS:
                self.plant(cluster, i, old)
            assert gov.metadata.get_many(IDS) == {}, f"they are of an older generation, {times}"
            gov.metadata.get_many(IDS, loaded)
            assert gov.metadata.get_many(IDS) == loaded(IDS)

    def test_a_node_that_joins_revives_no_value_and_ends_none(
        self, gov: GovRedis, make: Callable[..., GovRedis], redis_binary: str
    ) -> None:
        with RedisCluster(3, 0, binary=redis_binary) as cluster:
            gov = make(cluster)
            gov.metadata.get_many(IDS, loaded)
            gov.metadata.invalidate_all()
            old, new = IDS[:15], IDS[15:]
            for i in old:
                self.plant(cluster, i, "")
            gov.metadata.get_many(new, loaded)
            joined = cluster.add_master()
            cluster.move_slots(sorted({slot_of(key_of(i)) for i in (*old, *new)}), joined)
            for each in (gov, make(cluster)):
                assert each.metadata.get_many(old) == {}
                found = each.metadata.get_many(new)
                assert found == loaded(new) or (found == {} and each.internal.freshness is not None)

    def test_with_a_shard_away_it_raises_and_the_others_are_done(
        self, gov: GovRedis, other: GovRedis, cluster: RedisCluster
    ) -> None:
        gov.metadata.get_many(IDS, loaded)
        dead = cluster.masters[2]
        here = [i for i in IDS if i not in on(cluster, dead)]
        dead.pause()
        try:
            with pytest.raises(BackendUnavailable):
                gov.metadata.invalidate_all()
            assert gov.metadata.get_many(here) == {}
            eventually(lambda: other.metadata.get_many(here) == {})
            gov.metadata.get_many(here, loaded)
            assert gov.metadata.get_many(here) == loaded(here)
        finally:
            dead.resume()
        eventually(lambda: not any(is_away(gov, i) for i in IDS))
        gov.metadata.invalidate_all()
        assert gov.metadata.get_many(IDS) == {}

    def test_a_node_is_asked_for_its_own_mark(self, gov: GovRedis) -> None:
        redis, generation = gov.internal.context.redis, gov.metadata._generation
        assert redis is not None
        for node in redis.nodes():
            assert node.covers(generation.at(node).key)


class TestLocalTier:
    @pytest.fixture
    def one(self, cluster: RedisCluster, make: Callable[..., GovRedis]) -> GovRedis:
        return make(cluster, local_cache=True)

    def held(self, gov: GovRedis, identity: str) -> Any:
        assert gov.metadata._local is not None
        return gov.metadata._local.get(identity)

    def keep(self, gov: GovRedis, ids: list[str]) -> None:
        eventually(lambda: gov.metadata.get_many(ids, loaded) and all(self.held(gov, i) is not MISS for i in ids))

    def test_a_change_on_any_shard_is_heard(self, one: GovRedis, other: GovRedis) -> None:
        other.metadata.get_many(IDS, loaded)
        self.keep(one, IDS)
        for i in IDS:
            other.metadata.invalidate(i)
        for i in IDS:
            eventually(lambda: self.held(one, i) is MISS)  # noqa: B023
        other.metadata.get_many(IDS, loaded)
        self.keep(one, IDS)
        other.metadata.invalidate_all()
        eventually(lambda: all(self.held(one, i) is MISS for i in IDS))
        assert one.metadata.get_many(IDS) == {}

    def test_a_shard_that_hangs_ends_its_values_only(
        self, one: GovRedis, other: GovRedis, cluster: RedisCluster
    ) -> None:
        other.metadata.get_many(IDS, loaded)
        self.keep(one, IDS)
        hung = cluster.masters[0]
        gone = on(cluster, hung)
        here = [i for i in IDS if i not in gone]
        hung.pause()
        try:
            eventually(lambda: all(self.held(one, i) is MISS for i in gone))
            self.keep(one, here)
            other.metadata.invalidate(here[0])
            eventually(lambda: self.held(one, here[0]) is MISS)
        finally:
            hung.resume()
        other.metadata.get_many(IDS, loaded)
        self.keep(one, IDS)

    def test_a_value_whose_slot_moves_is_forgotten_and_kept_anew_from_its_new_node(
        self, one: GovRedis, other: GovRedis, cluster: RedisCluster
    ) -> None:
        other.metadata.get_many(IDS, loaded)
        self.keep(one, IDS)
        key = key_of("a0")
        was = cluster.master_of(key)
        cluster.move_slots([slot_of(key)], another(cluster, was))
        try:
            self.keep(one, ["a0"])
            other.metadata.invalidate("a0")
            eventually(lambda: self.held(one, "a0") is MISS)
            assert one.metadata.get("a0") is None
        finally:
            cluster.move_slots([slot_of(key)], was)

    def test_a_node_that_gives_its_mark_away_is_listened_to_soon_again(
        self, one: GovRedis, other: GovRedis, cluster: RedisCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is asked for its mark, and answers MOVED."""
        other.metadata.get_many(IDS, loaded)
        self.keep(one, IDS)
        redis = one.internal.context.redis
        assert redis is not None
        mark = one.metadata._generation.at(redis.at(key_of("a0"))).key
        was = cluster.master_of(mark)
        cluster.move_slots([slot_of(mark)], another(cluster, was))
        try:
            tier = one.internal.caches.local
            assert tier is not None
            gone = tier.spans.get(redis.at(key_of("a0")))
            eventually(lambda: tier.spans.get(redis.at(key_of("a0"))) is not gone, what="it is begun anew")
            self.keep(one, IDS)
            assert "no values are cached" not in caplog.text
        finally:
            cluster.move_slots([slot_of(mark)], was)


class TestFailover:
    @pytest.fixture
    def replicated(self, redis_binary: str) -> Iterator[RedisCluster]:
        with RedisCluster(3, 1, binary=redis_binary, config=["cluster-require-full-coverage no"]) as cluster:
            yield cluster

    def test_values_stay_and_a_demoted_primary_is_not_listened_to(
        self, replicated: RedisCluster, make: Callable[..., GovRedis]
    ) -> None:
        one = make(replicated, local_cache=True)
        other = make(replicated)
        values = one.metadata._local
        assert values is not None
        other.metadata.get_many(IDS, loaded)
        eventually(lambda: one.metadata.get_many(IDS) and all(values.get(i) is not MISS for i in IDS))
        old = replicated.masters[0]
        moved = on(replicated, old)
        new = replicated.failover(old)
        assert on(replicated, new) == moved
        eventually(lambda: other.metadata.get_many(IDS) == loaded(IDS))
        eventually(lambda: one.metadata.get_many(moved) and all(values.get(i) is not MISS for i in moved))
        old.pause()  # it is told nothing from now on, and could tell nothing
        try:
            other.metadata.invalidate(moved[0])
            eventually(lambda: values.get(moved[0]) is MISS, what="the successor is listened to")
            assert one.metadata.get(moved[0]) is None
        finally:
            old.resume()

    def test_a_killed_primary_keeps_its_values_from_nobody_for_long(
        self, replicated: RedisCluster, make: Callable[..., GovRedis]
    ) -> None:
        gov = make(replicated)
        gov.metadata.get_many(IDS, loaded)
        dead = replicated.masters[0]
        gone = on(replicated, dead)
        here = [i for i in IDS if i not in gone]
        dead.kill()
        while gov.metadata.get(gone[0]) is None:
            assert gov.metadata.get_many(here) == loaded(here)
        gov.metadata.invalidate_committed(gone[0])
        assert gov.metadata.get_many(IDS) == loaded([i for i in IDS if i != gone[0]])
