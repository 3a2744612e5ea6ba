"""The freshness leases of a real Cluster's nodes: slots that move, failovers with and without loss, a dead shard.

The writer is psql. The reader is the smallest that there can be: a value is the epoch and the version that it was
loaded with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import PATIENT, client_of, eventually

from govredis import BackendUnavailable, GovRedis
from govredis.client.redirects import NotServedHere
from govredis.client.slots import slot_of
from govredis.keys import sibling
from govredis.outbox import FreshnessLease, FreshnessSnapshot, NodeLease
from govredis.outbox import relay as relay_module
from govredis.outbox.record import FreshnessRecord
from govredis.outbox.relay import OutboxRelay
from govredis.testing.servers import PostgresServer, RedisCluster, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: Ids, some of each node.
IDS = [str(n) for n in range(12)]


def key_of(identity: str) -> str:
    return f"kept:{identity}"


class Process:
    """A process that keeps values of the namespace "kept"."""

    def __init__(self, gov: GovRedis) -> None:
        freshness = gov.internal.freshness
        assert freshness is not None
        self.freshness: FreshnessLease = freshness
        self.client = client_of(gov)
        self.counters = gov.counters
        #: inf: it finds no node anew, and runs no relay, for a key that no lease covers.
        self.widen_at = 0.0
        freshness._threads = False
        freshness.watch("kept", lambda entries: [("DEL", key_of(identity)) for identity, _ in entries])

    def lease(self, identity: str) -> NodeLease:
        """That of the id's node."""
        return self.freshness.of(self.client.at(key_of(identity)))

    def look(self, identity: str) -> FreshnessSnapshot | None:
        """The lease as it is now."""
        for lease in self.freshness._leases.values():
            lease._snapshot, lease._widen_at = None, self.widen_at
        snapshot = self.freshness.look(key_of(identity))
        return snapshot if snapshot is not None and snapshot.covers(key_of(identity)) else None

    def fill(self, identity: str, version: int) -> bool:
        snapshot = self.look(identity)
        if snapshot is None or snapshot.node is None:
            return False
        snapshot.node.call("SET", key_of(identity), f"{snapshot.epoch} {version}")
        return True

    def hit(self, identity: str) -> int | None:
        """The version that a reader uses; None: it would load."""
        for _ in range(2):
            snapshot = self.look(identity)
            if snapshot is None or snapshot.node is None:
                return None
            try:
                raw = snapshot.node.call("GET", key_of(identity))
            except NotServedHere:  # the client has noted where the slot is
                continue
            epoch, version = map(int, (raw or b"0 0").split())
            return version if epoch == snapshot.epoch and self.freshness.stands(snapshot) else None
        return None


class World:
    """A Cluster and a PostgreSQL, with two processes."""

    def __init__(self, cluster: RedisCluster, govs: tuple[GovRedis, GovRedis], sql: Callable[..., Any]) -> None:
        self.cluster = cluster
        self.one, self.two = map(Process, govs)
        self._sql = sql

    def write(self, identity: str) -> None:
        self._sql(f"SELECT govredis_outbox_add('kept', '{identity}', NULL)")

    def record(self, identity: str) -> FreshnessRecord:
        relay = self.one.lease(identity).relay
        held = FreshnessRecord.parse(relay.redis.call("GET", relay.key))
        assert held is not None
        return held

    def master(self, identity: str) -> RedisServer:
        return self.cluster.master_of(key_of(identity))

    def others(self, identity: str) -> list[str]:
        """Ids of other nodes."""
        return [other for other in IDS if self.master(other) is not self.master(identity)]

    def fill_all(self) -> None:
        assert self.two.freshness.drain() is not None
        for identity in IDS:
            assert self.one.fill(identity, 1)
            assert self.two.hit(identity) == 1

    def kill(self, identity: str) -> None:
        """Kill the id's node; both processes use the one that takes over."""
        dead = self.master(identity)
        dead.kill()
        eventually(lambda: self.master(identity) is not dead)
        eventually(lambda: all(map(self._is_up, (self.one, self.two), (identity, identity))))

    def drain_back(self, identity: str) -> None:
        """Run the relay of a node that is just back. Recoveries run it too, and a run beside another does nothing."""
        eventually(lambda: self.two.lease(identity).drain() is not None)

    def _is_up(self, process: Process, identity: str) -> bool:
        try:
            process.client.call("SET", sibling(key_of(identity), "up"), "x")
            return bool(process.client.at(key_of(identity)).tag())  # all of the node's slots are known
        except BackendUnavailable:
            return False


@pytest.fixture
def make_world(
    redis_binary: str, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer, sql: Callable[..., Any]
) -> Callable[[RedisCluster], World]:
    def make(cluster: RedisCluster) -> World:
        where = {"redis_url": cluster.url, "database_url": postgres_server.url, "metadata_staleness": 60.0}
        return World(cluster, (make_gov(**where, **PATIENT), make_gov(**where, **PATIENT)), sql)

    return make


@pytest.fixture(scope="module")
def lasting(redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(masters=3, replicas=0, binary=redis_binary) as started:
        yield started


@pytest.fixture
def world(lasting: RedisCluster, make_world: Callable[..., World]) -> World:
    """Without replicas; no node dies."""
    for node in lasting.nodes:
        node.command("FLUSHALL")
    return make_world(lasting)


@pytest.fixture
def mortal(redis_binary: str, make_world: Callable[..., World]) -> Iterator[World]:
    """With replicas, and to be damaged."""
    config = ["cluster-require-full-coverage no"]
    with RedisCluster(masters=3, replicas=1, binary=redis_binary, config=config) as started:
        yield make_world(started)


class TestWrites:
    def test_a_write_is_told_to_the_node_that_has_it(self, world: World) -> None:
        world.fill_all()
        for identity in IDS:
            world.write(identity)
            assert world.one.hit(identity) == 1, "nobody has told Redis"
            assert world.two.freshness.drain() == 1
            assert [each for each in IDS if world.one.hit(each) is None] == [identity]
            world.one.fill(identity, 1)
        assert world.one.counters.get("guard.epochs") + world.two.counters.get("guard.epochs") == 3

    def test_each_node_is_told_of_its_own_slots_only(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world.fill_all()
        for identity in IDS:
            world.write(identity)
        found = []
        of_slots = relay_module.of_slots
        monkeypatch.setattr(relay_module, "of_slots", lambda *args: found.append(of_slots(*args)) or found[-1])
        assert world.two.freshness.drain() == len(IDS)
        assert sorted(str(key) for commands in found for _, key in commands) == sorted(map(key_of, IDS))
        assert len(list(filter(None, found))) == 3
        assert [world.one.hit(identity) for identity in IDS] == [None] * len(IDS)

    def test_its_lease_is_asked_for_over_a_connection_of_the_callers_too(self, world: World) -> None:
        world.fill_all()
        for node in world.one.client.nodes():
            replies = node.pipeline(world.one.freshness.questions(node))
            snapshot = world.one.freshness.answered(node, 0.0, replies)
            assert snapshot is not None
            assert [i for i in IDS if snapshot.covers(key_of(i))] == [i for i in IDS if node.covers(key_of(i))]

    def test_the_state_is_that_of_all_nodes(self, world: World) -> None:
        world.fill_all()
        state = world.one.freshness.state()
        assert (state.valid, state.lag, state.foreign) == (True, (0, 0.0), False)
        world.write("0")
        state = world.one.freshness.state()
        assert state.lag is not None
        assert state.lag.entries == 1
        relay = world.one.lease("0").relay
        relay.redis.call("SET", relay.key, "no record")
        state = world.one.freshness.state()
        assert (state.valid, state.foreign) == (False, True)
        assert world.two.freshness.drain() == 1
        assert world.one.freshness.state().valid


class TestMoves:
    @pytest.fixture
    def moved(self, world: World) -> Iterator[tuple[str, RedisServer, RedisServer]]:
        """An id, its node, and another one: it moves, and comes back in the end."""
        world.fill_all()
        home, away = world.master("0"), world.master(world.others("0")[0])
        yield "0", home, away
        world.cluster.move_slots([slot_of(key_of("0"))], home)

    def test_a_slot_that_moves_costs_its_own_values_only(
        self, world: World, moved: tuple[str, RedisServer, RedisServer]
    ) -> None:
        identity, _, away = moved
        before = {other: world.record(other).epoch for other in IDS}
        world.cluster.move_slots([slot_of(key_of(identity))], away)
        assert world.one.client.call("GET", key_of(identity)) is not None, "it came along"
        assert world.one.hit(identity) is None
        assert world.two.freshness.drain() == 0
        assert world.one.fill(identity, 2)
        eventually(lambda: world.two.hit(identity) == 2)  # it asks once a second for what is not covered
        for other in IDS:
            if other != identity:
                assert world.record(other).epoch == before[other]
                assert world.one.hit(other) == 1
        world.write(identity)
        assert world.two.freshness.drain() == 1
        assert world.one.hit(identity) is None

    def test_values_of_a_slot_that_the_lease_does_not_cover_are_not_used(
        self, world: World, moved: tuple[str, RedisServer, RedisServer]
    ) -> None:
        """A relay that ran before the slot came has acknowledged its entries untold."""
        identity, _, away = moved
        world.one.widen_at = math.inf
        there = next(other for other in IDS if world.master(other) is away)
        world.write(identity)
        assert world.two.lease(there).drain() == 1
        world.cluster.move_slots([slot_of(key_of(identity))], away)
        world.one.client.call("SET", key_of(identity), f"{world.record(there).epoch} 1")
        assert world.one.hit(identity) is None
        assert not world.one.fill(identity, 2)
        world.one.widen_at = 0.0
        assert world.one.fill(identity, 2), "it is told at once, as somebody asks for it"
        eventually(lambda: world.two.hit(identity) == 2)  # it asks once a second for what is not covered

    def test_a_lease_is_asked_for_what_it_does_not_cover_once_a_second(
        self, world: World, moved: tuple[str, RedisServer, RedisServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity, home, away = moved
        stays = next(other for other in IDS if other != identity and world.master(other) is home)
        slot = slot_of(key_of(identity))
        with world.cluster.moving(slot, away):
            assert world.two.freshness.drain() is not None
            lease = world.one.lease(identity)
            assert world.one.look(identity) is None
            now = lease._clock()
            lease._clock = lambda: now
            ticks = world.one.counters.get("guard.ticks")
            for _ in range(3):
                snapshot = world.one.freshness.look(key_of(identity))
                assert snapshot is not None
                assert not snapshot.covers(key_of(identity))
            assert world.one.counters.get("guard.ticks") == ticks
            now += 1.0
            for _ in range(3):
                world.one.freshness.look(key_of(identity))
            assert world.one.counters.get("guard.ticks") == ticks + 1
            assert world.one.hit(stays) == 1

    def test_a_slot_that_comes_back_in_the_same_epoch_begins_a_new_one(
        self, world: World, moved: tuple[str, RedisServer, RedisServer]
    ) -> None:
        identity, home, away = moved
        before = world.record(identity).epoch
        world.cluster.move_slots([slot_of(key_of(identity))], away)
        world.write(identity)
        stays = next(other for other in IDS if world.master(other) is home)
        assert world.two.lease(stays).drain() == 1, "it has acknowledged the entry untold"
        world.one.client.call("SET", key_of(identity), f"{before} 1")  # a late fill, say
        world.cluster.move_slots([slot_of(key_of(identity))], home)
        assert world.one.hit(identity) is None, "the lease does not cover it"
        assert world.two.freshness.drain() is not None
        assert world.record(identity).epoch != before
        assert world.one.hit(identity) is None

    def test_one_that_was_away_between_two_runs_does_not(
        self, world: World, moved: tuple[str, RedisServer, RedisServer]
    ) -> None:
        identity, home, away = moved
        before = world.record(identity).epoch
        world.cluster.move_slots([slot_of(key_of(identity))], away)
        world.write(identity)
        world.cluster.move_slots([slot_of(key_of(identity))], home)
        assert world.one.hit(identity) == 1, "the lease is from before the write"
        assert world.two.freshness.drain() == 1
        assert world.record(identity).epoch == before
        assert world.one.hit(identity) is None

    def test_one_that_leaves_while_it_is_told_has_the_run_begin_again(
        self, world: World, moved: tuple[str, RedisServer, RedisServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity, home, away = moved
        world.write(identity)
        stays = next(other for other in IDS if other != identity and world.master(other) is home)
        world.write(stays)
        tell, runs = OutboxRelay._tell, []

        def tell_late(self: OutboxRelay, *args: Any) -> Any:
            runs.append(self)
            if len(runs) == 1:
                world.cluster.move_slots([slot_of(key_of(identity))], away)
            return tell(self, *args)

        monkeypatch.setattr(OutboxRelay, "_tell", tell_late)
        lease = world.two.lease(stays)
        assert lease.drain() == 2
        assert runs == [lease.relay] * 2
        shard = world.record(stays).shard
        assert shard is not None
        assert shard.left == 1 << slot_of(key_of(identity))
        assert world.one.hit(stays) is None
        assert world.one.hit(identity) is None

    def test_a_half_moved_slot_keeps_nobody_from_the_others(
        self, world: World, moved: tuple[str, RedisServer, RedisServer]
    ) -> None:
        identity, home, away = moved
        stays = next(other for other in IDS if other != identity and world.master(other) is home)
        slot = slot_of(key_of(identity))
        with world.cluster.moving(slot, away, [key_of(identity)]):
            world.write(identity)
            world.write(stays)
            lease = world.two.lease(stays)
            assert lease.drain() == 2
            assert world.one.hit(stays) is None
            assert world.one.fill(stays, 2)
            assert world.two.hit(stays) == 2
            assert world.two.look(identity) is None, "it is not covered"

    def test_the_slot_of_a_lease_may_move(self, world: World, moved: tuple[str, RedisServer, RedisServer]) -> None:
        """The record goes with it, to a node whose data it says nothing of."""
        identity, home, away = moved
        relay = world.one.lease(identity).relay
        raw = relay.redis.call("GET", relay.key)
        slot = slot_of(relay.key)
        other = next(other for other in IDS if world.master(other) is away)
        adopting = world.one.lease(other).relay
        adopting.redis.call("SET", adopting.key, raw)
        assert world.one.look(other) is None or world.record(other).epoch != world.record(identity).epoch
        assert world.two.freshness.drain() is not None
        assert world.record(other).epoch != world.record(identity).epoch
        assert world.one.hit(other) is None
        world.cluster.move_slots([slot], away)
        try:
            assert world.one.hit(identity) is None
            assert world.two.freshness.drain() is not None
            assert world.one.fill(identity, 1)
            assert world.two.hit(identity) == 1
        finally:
            world.cluster.move_slots([slot], home)


class TestFailovers:
    def cut_off(self, mortal: World, identity: str) -> None:
        """The id's replica hears of nothing any more."""
        master = mortal.master(identity)
        (replica,) = mortal.cluster.replicas_of(master)
        replica.command("CONFIG", "SET", "masteruser", "nobody")
        replica.command("CONFIG", "SET", "masterauth", "nobody's")
        master.command("CLIENT", "KILL", "TYPE", "replica")
        eventually(lambda: replica.command("ROLE")[3] != "connected" and master.command("ROLE")[2] == [])

    def replicated(self, mortal: World) -> None:
        """All replicas have what their masters have."""
        for node in mortal.one.client.nodes():
            assert eventually(lambda node=node: node.call("WAIT", "1", "1000")) == 1  # type: ignore[misc]

    def test_one_without_loss_keeps_the_epoch(self, mortal: World) -> None:
        mortal.fill_all()
        before = mortal.record("0")
        self.replicated(mortal)
        mortal.kill("0")
        mortal.write("0")
        mortal.drain_back("0")
        after = mortal.record("0")
        assert after.epoch == before.epoch
        assert after.shard is not None
        assert before.shard is not None
        assert after.shard.replication != before.shard.replication
        assert mortal.one.hit("0") is None
        same = [other for other in IDS if other not in mortal.others("0") and other != "0"]
        assert [mortal.one.hit(other) for other in same] == [1] * len(same)

    def test_one_by_hand_keeps_the_epoch(self, mortal: World) -> None:
        mortal.fill_all()
        before = mortal.record("0").epoch
        mortal.cluster.failover(mortal.master("0"))
        eventually(lambda: mortal._is_up(mortal.one, "0") and mortal._is_up(mortal.two, "0"))
        mortal.drain_back("0")
        assert mortal.record("0").epoch == before
        assert mortal.one.hit("0") == 1

    def test_one_with_loss_begins_a_new_epoch(self, mortal: World) -> None:
        mortal.fill_all()
        before = mortal.record("0").epoch
        self.replicated(mortal)
        self.cut_off(mortal, "0")
        mortal.write("0")
        assert mortal.two.freshness.drain() == 1
        assert mortal.one.hit("0") is None
        mortal.kill("0")
        assert mortal.one.client.call("GET", key_of("0")) is not None, "it is back"
        mortal.drain_back("0")
        assert mortal.record("0").epoch != before
        assert mortal.one.hit("0") is None

    def test_a_record_that_was_elsewhere_meanwhile_is_no_record_of_what_was_lost(self, mortal: World) -> None:
        """Its slot left the node that failed, and came to the one that took over, say."""
        mortal.fill_all()
        before = mortal.record("0").epoch
        self.replicated(mortal)
        self.cut_off(mortal, "0")
        mortal.write("0")
        assert mortal.two.freshness.drain() == 1
        relay = mortal.two.lease("0").relay
        raw = relay.redis.call("GET", relay.key)
        mortal.kill("0")
        relay = mortal.two.lease("0").relay
        relay.redis.call("SET", relay.key, raw)
        assert mortal.one.hit("0") is None
        mortal.drain_back("0")
        assert mortal.record("0").epoch != before
        assert mortal.one.hit("0") is None

    def test_a_dead_shard_costs_its_own_values_only(self, mortal: World) -> None:
        mortal.fill_all()
        dead = mortal.master("0")
        (replica,) = mortal.cluster.replicas_of(dead)
        replica.kill()
        dead.kill()
        others = mortal.others("0")
        mortal.write(others[0])
        degraded = mortal.two.counters.get("guard.degraded.redis")
        assert mortal.two.freshness.drain() is None, "one could not be told"
        assert mortal.two.counters.get("guard.degraded.redis") == degraded + 1
        assert mortal.one.hit(others[0]) is None, "the others were"
        assert mortal.one.hit(others[1]) == 1
        assert mortal.one.fill(others[0], 2)
        assert mortal.two.hit(others[0]) == 2
        assert mortal.two.freshness.state().valid
        with pytest.raises(BackendUnavailable):
            mortal.one.look("0")


def test_the_text_of_a_record() -> None:
    text = b"1 2 3 4 " + b"a" * 40 + b" 77 0-5460,5462-5462,16383-16383 5461-5461"
    record = FreshnessRecord.parse(text)
    assert record is not None
    assert record.shard is not None
    assert str(record).encode() == text
    covered = [slot for slot in range(16384) if record.shard.slots >> slot & 1]
    assert covered == [*range(5461), 5462, 16383]
    for broken in (
        text + b" 1",
        text.rpartition(b" ")[0],
        text.replace(b"16383", b"16384"),
        text.replace(b"5462-5462", b"5462-5461"),
        text.replace(b"77", b"x"),
        text.replace(b"0-5460", b"\xff"),
    ):
        assert FreshnessRecord.parse(broken) is None
    assert FreshnessRecord.parse(b"1 2 3 4 " + b"a" * 40 + b" 0 - -") is not None


def test_a_redirection_is_an_outage_of_no_node() -> None:
    assert issubclass(NotServedHere, BackendUnavailable)
