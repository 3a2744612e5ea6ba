"""Limits on a Redis Cluster: a node that is away costs its own identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from shards import FAILING_OVER, SHAPE, Shards, closed
from support import PATIENT, client_of, eventually

from govredis import BackendUnavailable, GovRedis, Limit
from govredis.keys import Keys
from govredis.limits.parked import Arrival, Parked
from govredis.testing.servers import PostgresServer, RedisCluster

pytestmark = [pytest.mark.once]

KEYS = Keys()


def limit_key(identity: str) -> str:
    return KEYS.rate_limit("default", identity)


@pytest.fixture(scope="module")
def running(one_redis_binary: str) -> Iterator[Shards]:
    with RedisCluster(binary=one_redis_binary, **SHAPE) as cluster:
        yield Shards(cluster)


@pytest.fixture
def shards(running: Shards) -> Shards:
    running.revive()
    return running


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], shards: Shards, postgres_server: PostgresServer) -> GovRedis:
    return make_gov(redis_url=shards.url, database_url=postgres_server.url, **PATIENT)


def test_identities_on_all_nodes(gov: GovRedis, shards: Shards) -> None:
    ids = shards.ids(limit_key)
    for rate in ("2/hour", Limit(2, 3600, "sliding_window_counter")):
        for identity in ids:
            results = [gov.limits.hit(identity, rate) for _ in range(3)]
            assert [(result.allowed, result.degraded) for result in results] == [(True, False)] * 2 + [(False, False)]
            assert results[1].refund()
            assert gov.limits.peek(identity, rate).allowed
            gov.limits.reset(identity)
    hits = gov.limits.hit_many([(identity, "1/hour") for identity in (*ids, *ids)])
    assert [result.allowed for result in hits] == [True] * 3 + [False] * 3


def test_a_node_that_is_away_costs_its_own_identities(gov: GovRedis, shards: Shards) -> None:
    ids = shards.ids(limit_key)
    gov.limits.hit_many([(identity, "3/hour") for identity in ids])
    shards.cluster.nodes[1].kill()
    many = gov.limits.hit_many([(identity, "3/hour") for identity in ids])
    assert [(result.backend, result.degraded) for result in many] == [
        ("redis", False),
        ("postgres", True),
        ("redis", False),
    ]
    assert [result.remaining for result in many] == [1, 2, 1]
    for identity, backend in zip(ids, ("redis", "postgres", "redis"), strict=True):
        assert gov.limits.hit(identity, "3/hour").backend == backend
    assert gov.counters.get("limits.degraded.postgres") == 2
    shards.start(shards.cluster.nodes[1])
    closed(gov, map(limit_key, ids))
    again = gov.limits.hit_many([(identity, "3/hour") for identity in ids])
    assert [(result.allowed, result.backend) for result in again] == [
        (False, "redis"),
        (True, "redis"),
        (False, "redis"),
    ]


def test_leases_go_back_to_each_node_that_is_there(gov: GovRedis, shards: Shards) -> None:
    ids, rate = shards.ids(limit_key), Limit(1000, 3600, lease=60)
    for _ in range(20):
        for identity in ids:
            assert gov.limits.hit(identity, rate).allowed
    shards.cluster.nodes[1].kill()
    gov.limits.close()
    shards.start(shards.cluster.nodes[1])
    closed(gov, map(limit_key, ids))
    counts = [gov.limits.get_count(identity, 3600) for identity in ids]
    assert (counts[0], counts[2]) == (20, 20)
    assert counts[1] > 20
    assert gov.counters.get("limits.lease_lost") == counts[1] - 20


def test_each_node_is_told_at_its_return_what_postgres_admitted(
    make_gov: Callable[..., GovRedis], shards: Shards, postgres_server: PostgresServer
) -> None:
    gov = make_gov(redis_url=shards.url, database_url=postgres_server.url, limit_mirror=3600, **PATIENT)
    ids = shards.ids(limit_key)
    for dead in (1, 2):
        shards.cluster.nodes[dead].kill()
    for identity in ids:
        for _ in range(2):
            assert gov.limits.hit(identity, "9/hour").allowed
    replication = gov.limits._decider.replication
    assert replication is not None
    replication.tell()
    assert len(replication._to_redis._waiting) == 4
    shards.start(shards.cluster.nodes[1])
    closed(gov, [limit_key(ids[1])])
    assert gov.limits.peek(ids[1], "9/hour").remaining == 6
    assert {admission.key for admission in replication._to_redis._waiting} == {limit_key(ids[2])}
    shards.start(shards.cluster.nodes[2])
    closed(gov, [limit_key(ids[2])])
    assert gov.limits.peek(ids[2], "9/hour").remaining == 6
    assert (gov.counters.get("limits.mirrored.redis"), gov.counters.get("limits.mirror_lost.redis")) == (4, 0)


def test_denials_wait_for_the_node_that_counts_them(gov: GovRedis, shards: Shards) -> None:
    counts = shards.node(f"{{{KEYS.denied()}}}:1")
    other = next(n for n, node in enumerate(shards.cluster.nodes) if node is not counts)
    identity = shards.ids(limit_key)[other]
    counts.kill()
    for _ in range(3):
        gov.limits.hit(identity, "1/hour")
    gov.internal.context.teller.flush()
    assert gov.limits.hit(identity, "9/hour").backend == "redis"
    with pytest.raises(BackendUnavailable):
        gov.limits.most_denied()
    shards.start(counts)
    closed(gov, [f"{{{KEYS.denied()}}}:1"])
    gov.internal.context.teller.flush()
    assert [(denied.identity, denied.times) for denied in gov.limits.most_denied()] == [(identity, 2)]


def test_a_slot_that_was_half_moved_costs_its_identities_alone(gov: GovRedis, shards: Shards) -> None:
    first, second = shards.cluster.nodes[:2]
    ids = shards.ids(limit_key)
    slot = first.command("CLUSTER", "KEYSLOT", limit_key(ids[0]))
    gov.limits.hit(ids[0], "5/hour")
    with shards.cluster.moving(slot, second, keys=[limit_key(ids[0])]):
        many = gov.limits.hit_many([(identity, "5/hour") for identity in ids])
        assert [result.backend for result in many] == ["postgres", "redis", "redis"]
        assert client_of(gov).at(limit_key(ids[0])).breaker.closed, "it is no outage"
    try:
        assert gov.limits.hit(ids[0], "5/hour").remaining == 3
    finally:
        shards.cluster.move_slots([slot], first)


def test_parked_messages(gov: GovRedis, shards: Shards, make_gov: Callable[..., GovRedis]) -> None:
    client = client_of(gov)
    parked = Parked(KEYS, client)
    lot = parked.lot("broker")
    arrival = Arrival("run", 0, "", False)
    assert lot.park(arrival, 60, b"message")
    assert not lot.park(arrival, 60, b"message")
    ((due, message),) = lot.first(9)
    assert message == b"message"
    assert 0 < due <= 60
    assert [(waiting.broker, waiting.count) for waiting in parked.waiting()] == [("broker", 1)]
    assert lot.flush() == 1
    taken, _ = lot.take()
    assert [one.message for one in taken] == [b"message"]
    assert lot.put_aside(taken[0].entry, "why") == 1
    assert [(one.tries, one.why) for one in lot.set_aside()] == [(1, "why")]
    lot.postpone(taken[0].entry, 0.0)
    eventually(lambda: lot.take()[0])
    lot.remove(taken[0].entry)
    assert lot.count() == 0
    shards.node(KEYS.parked()).kill()
    with pytest.raises(BackendUnavailable):
        lot.park(arrival, 60, b"message")


def test_the_replica_that_is_promoted_goes_on(
    make_gov: Callable[..., GovRedis], one_redis_binary: str, postgres_server: PostgresServer
) -> None:
    with RedisCluster(binary=one_redis_binary, **FAILING_OVER) as cluster:
        gov = make_gov(redis_url=cluster.url, database_url=postgres_server.url, **PATIENT)
        ids = [f"id{n}" for n in range(12)]
        for result in gov.limits.hit_many([(identity, "3/hour") for identity in ids]):
            assert result.backend == "redis"
        first = cluster.master_of(limit_key(ids[0]))
        (replica,) = cluster.replicas_of(first)
        eventually(lambda: replica.command("DBSIZE") == first.command("DBSIZE"))
        first.kill()
        assert gov.limits.hit(ids[0], "3/hour").backend == "postgres"
        eventually(lambda: gov.limits.peek(ids[0], "3/hour").backend == "redis")
        assert cluster.master_of(limit_key(ids[0])) is not first
        for identity in ids:
            eventually(lambda identity=identity: gov.limits.peek(identity, "3/hour").backend == "redis")
            assert gov.limits.peek(identity, "3/hour").remaining == 1, "what was admitted before counts on"
