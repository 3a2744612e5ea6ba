"""ClusterClient while slots move, under load: no answer is wrong, and no call fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster_load import THREE, ClusterLoad, key_in, slots_of

from govredis import Config
from govredis.client import ClusterClient, NotServedHere, connect
from govredis.client.cluster import cluster_client
from govredis.testing.servers import RedisCluster

pytestmark = pytest.mark.once

MakeClient = Callable[[], ClusterClient]


@pytest.fixture(scope="module")
def cluster(redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(binary=redis_binary, config=["cluster-node-timeout 10000"]) as started:
        yield started


@pytest.fixture
def make_client(cluster: RedisCluster) -> Iterator[MakeClient]:
    made: list[ClusterClient] = []

    def make() -> ClusterClient:
        client = connect(Config(redis_url=cluster.url, socket_timeout=20, connect_timeout=20))
        assert isinstance(client, ClusterClient)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def follows_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stalls while a slot is half moved makes no call give up."""
    monkeypatch.setattr(cluster_client, "_PATIENCE", 60.0)


def opened(client: ClusterClient) -> int:
    return sum(node.breaker.times_opened for node in client.nodes())


@pytest.mark.usefixtures("follows_for_long")
def test_used_slots_move_and_move_back(cluster: RedisCluster, make_client: MakeClient) -> None:
    client = make_client()
    source, to, other = cluster.masters
    moving, staying = slots_of(cluster, source, 60), slots_of(cluster, other, 2)
    used = moving[:10]
    with ClusterLoad(client, used + staying) as load:
        load.goes_on(used)
        cluster.move_slots(moving, to)
        load.goes_on(used + staying)
        there = client.at(key_in(slots_of(cluster, to, 1)[0]))
        assert {client.at(key_in(slot)) for slot in used} == {there}
        cluster.move_slots(moving, source)
        load.goes_on(used + staying)
    assert load.failures(used + staying) == {}
    assert opened(client) == 0


@pytest.mark.usefixtures("follows_for_long")
def test_a_node_joins_has_slots_and_leaves(cluster: RedisCluster, make_client: MakeClient) -> None:
    client = make_client()
    source = cluster.masters[0]
    moving = slots_of(cluster, source, 20)
    with ClusterLoad(client, moving[:5]) as load:
        load.goes_on(moving[:5])
        node = cluster.add_master()
        cluster.move_slots(moving, node)
        load.goes_on(moving[:5])
        joined = client.at(key_in(moving[0]))
        assert joined in client.nodes()
        cluster.move_slots(moving, source)
        load.goes_on(moving[:5])
        cluster.remove_master(node)
        load.goes_on(moving[:5])
    assert load.failures(moving) == {}
    client._topology.refresh()
    assert joined not in client.nodes()
    assert joined.retired
    assert opened(client) <= 1, "its heir has had the replays first"


def test_of_a_slot_half_moved_each_key_answers_and_no_script_of_keys_apart(
    cluster: RedisCluster, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    """And the node's other keys are not concerned: its breaker stays closed."""
    client, (source, to, _) = make_client(), cluster.masters
    slot, beside = slots_of(cluster, source, 2)
    keys = [key_in(slot, part) for part in "abc"]
    assert client.run(THREE, keys, "1") == [None] * 3
    with cluster.moving(slot, to, keys[:1]):
        assert [client.call("GET", key) for key in keys] == [b"1"] * 3
        assert client.pipeline([("GET", key) for key in keys]) == [b"1"] * 3
        assert client.call("SET", key_in(slot, "new"), "2") == b"OK"
        for _ in range(3):
            with pytest.raises(NotServedHere, match=r"Multiple keys request during rehashing|answered ASK"):
                client.run(THREE, keys, "2")
            replies = client.pipeline(
                [THREE.call(keys, ("2",)), ("SET", key_in(beside), "3"), ("GET", keys[0])], [THREE], each=True
            )
            assert isinstance(replies[0], NotServedHere)
            assert replies[1:] == [b"OK", b"1"]
        assert client.at(keys[0]).breaker.closed
        assert client.run(THREE, [key_in(beside, part) for part in "abc"], "1") is not None
    assert client.run(THREE, keys, "2") == [b"1"] * 3
    assert client.call("GET", key_in(slot, "new")) == b"2"
    assert opened(client) == 0
    cluster.move_slots([slot], source)


@pytest.mark.usefixtures("follows_for_long")
def test_calls_wait_for_a_slot_that_is_on_its_way(cluster: RedisCluster, make_client: MakeClient) -> None:
    """TRYAGAIN until it has arrived."""
    client, (source, to, _) = make_client(), cluster.masters
    slots = slots_of(cluster, source, 5)
    with ClusterLoad(client, slots) as load:
        for slot in slots:
            load.goes_on(slots)
            keys = cluster.master_of(slot).command("CLUSTER", "GETKEYSINSLOT", slot, 100)
            with cluster.moving(slot, to, keys[::2]):
                load.goes_on([other for other in slots if other != slot], 0)
        load.goes_on(slots)
    assert load.failures(slots) == {}
    assert opened(client) == 0
    cluster.move_slots(slots, source)


@pytest.mark.usefixtures("follows_for_long")
def test_a_replica_takes_over_from_a_primary_that_lives(cluster: RedisCluster, make_client: MakeClient) -> None:
    """A planned failover: the primary holds writes back until the replica has all, and hands over."""
    client, old = make_client(), cluster.masters[0]
    slots = [slots_of(cluster, node, 2) for node in cluster.masters]
    used = [slot for some in slots for slot in some]
    with ClusterLoad(client, used) as load:
        load.goes_on(used)
        new = cluster.failover(old)
        load.goes_on(used)
        assert cluster.failover(new) is old
        load.goes_on(used)
    assert load.failures(used) == {}
    assert opened(client) <= 2, "each heir has had the replays first"


def test_a_client_that_idled_through_a_failover_writes_to_the_new_primary(
    cluster: RedisCluster, make_client: MakeClient
) -> None:
    idle, old = make_client(), cluster.masters[1]
    slot = slots_of(cluster, old, 1)[0]
    idle.call("SET", key_in(slot), "before")
    new = cluster.failover(old)
    idle.call("SET", key_in(slot, "x"), "after")
    assert new.command("MGET", key_in(slot), key_in(slot, "x")) == ["before", "after"]
    assert cluster.failover(new) is old
