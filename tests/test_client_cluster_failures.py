"""ClusterClient while a primary is away: its keys alone have no answers, and no answer is wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster_load import ClusterLoad, key_in, slots_of
from support import PATIENCE, Background, WatchedSocket, in_child, wait_at_most

from govredis import BackendUnavailable, Config
from govredis.client import ClusterClient, RedisNode, connect
from govredis.client.cluster.topology import Topology
from govredis.testing.servers import RedisCluster, RedisServer

pytestmark = pytest.mark.once

MakeClient = Callable[..., ClusterClient]


@pytest.fixture
def cluster(redis_binary: str) -> Iterator[RedisCluster]:
    """Its nodes call none of them dead in the time of a test: replicas take over when the test says so."""
    with RedisCluster(binary=redis_binary, config=["cluster-node-timeout 60000"]) as started:
        yield started


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    made: list[ClusterClient] = []

    def make(cluster: RedisCluster, **settings: Any) -> ClusterClient:
        client = connect(Config(**{"redis_url": cluster.url, "socket_timeout": 20, "connect_timeout": 20, **settings}))
        assert isinstance(client, ClusterClient)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def slots_by_master(cluster: RedisCluster, count: int = 2) -> dict[RedisServer, list[int]]:
    return {node: slots_of(cluster, node, count) for node in cluster.masters}


def live_connections(client: ClusterClient) -> list[int]:
    return [len(node._pool.live) for node in client.nodes()]


THREADS = 4


def test_a_primary_is_killed_and_its_replica_takes_over(
    cluster: RedisCluster, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    client, slots = make_client(cluster), slots_by_master(cluster)
    old, *others = slots
    living = [slot for node in others for slot in slots[node]]
    with ClusterLoad(client, slots[old] + living, THREADS) as load:
        load.goes_on(slots[old] + living)
        with load.standing():
            assert old.command("WAIT", 1, 60_000) == 1
            old.kill()
        load.fails(slots[old], 3)
        load.goes_on(living)
        assert not client.at(key_in(slots[old][0])).breaker.closed
        new = cluster.failover(old)
        load.goes_on(slots[old] + living)
        assert load.failures(living) == {}
        before = set(load.failures(slots[old]))
        assert client.at(key_in(slots[old][0])).address[1] == new.port
        old.restart("empty")
        eventually(lambda: cluster.replicas_of(new) == [old])
        assert cluster.failover(new) is old
        load.goes_on(slots[old] + living)
        assert set(load.failures(slots[old])) == before, "handing back costs no call"
    assert load.failures(living) == {}
    assert max(live_connections(client)) <= THREADS + 1  # and that of the view


def test_a_primary_hangs_and_each_thread_waits_once(
    cluster: RedisCluster,
    make_client: MakeClient,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    """And once it goes on it is a replica, without a wrong answer."""
    monkeypatch.setattr(socket, "socket", WatchedSocket)
    client, slots = make_client(cluster), slots_by_master(cluster)
    old, *others = slots
    living = [slot for node in others for slot in slots[node]]
    with ClusterLoad(client, slots[old] + living, THREADS) as load:
        load.goes_on(slots[old] + living)
        with load.standing():
            assert old.command("WAIT", 1, 60_000) == 1
            wait_at_most(client.at(key_in(slots[old][0])), 1)
            old.pause()
        load.fails(slots[old], 3)
        load.goes_on(living)
        new = cluster.failover(old)
        load.goes_on(slots[old] + living)
        old.resume()
        eventually(lambda: cluster.replicas_of(new) == [old])
        load.goes_on(slots[old] + living)
    assert load.failures(living) == {}
    assert [thread.timeouts <= 1 for thread in load.threads] == [True] * THREADS


def test_a_primary_hangs_and_goes_on(
    cluster: RedisCluster, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    client, slots = make_client(cluster), slots_by_master(cluster)
    old, *others = slots
    living = [slot for node in others for slot in slots[node]]
    with ClusterLoad(client, slots[old] + living, THREADS) as load:
        load.goes_on(slots[old] + living)
        node = client.at(key_in(slots[old][0]))
        with load.standing():
            wait_at_most(node, 1)
            old.pause()
        load.fails(slots[old], 3)
        wait_at_most(node, 20)
        old.resume()
        load.goes_on(slots[old] + living)
    assert load.failures(living) == {}
    assert client.at(key_in(slots[old][0])) is node


def test_the_nodes_elect_a_replica_themselves(
    redis_binary: str, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    """As in production. With full coverage the nodes refuse all keys for that time."""
    with RedisCluster(binary=redis_binary, config=["cluster-require-full-coverage no"]) as cluster:
        client, slots = make_client(cluster), slots_by_master(cluster)
        old = next(iter(slots))
        used = [slot for some in slots.values() for slot in some]
        with ClusterLoad(client, used, THREADS) as load:
            load.goes_on(used)
            with load.standing():
                old.command("WAIT", 1, 60_000)
                old.kill()
            eventually(lambda: cluster.master_of(slots[old][0]) is not old)
            load.goes_on(used)


def test_a_client_that_idled_while_a_primary_died_loses_no_acknowledged_write(
    cluster: RedisCluster, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    """The old primary is back, and may not know yet that it is a replica."""
    slots = slots_by_master(cluster)
    old = next(iter(slots))
    key = key_in(slots[old][0])
    idle = [make_client(cluster) for _ in range(5)]
    for client in idle:
        client.call("SET", key, "before")
    assert old.command("WAIT", 1, 60_000) == 1
    old.kill()
    new = cluster.failover(old)
    old.restart("empty")
    written: list[str] = []

    def writes(client: ClusterClient) -> bool:
        name = f"{key}{len(written)}"
        try:
            assert client.call("SET", name, "after") == b"OK"
        except BackendUnavailable:
            return False
        written.append(name)
        return True

    for client in idle * 3:
        eventually(lambda client=client: writes(client))  # type: ignore[misc]
    assert new.command("EXISTS", key, *written) == 1 + len(written)


def test_all_nodes_go_away_and_come_back(
    cluster: RedisCluster, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    """Also for a client that was made meanwhile, and has seen none of them."""
    client, slots = make_client(cluster), slots_by_master(cluster)
    keys = [key_in(some[0]) for some in slots.values()]
    for key in keys:
        client.call("SET", key, "v")
    for node in cluster.nodes:
        node.kill()
    late = make_client(cluster)
    for one in (client, late):
        for key in keys:
            for _ in range(3):
                with pytest.raises(BackendUnavailable):
                    one.call("GET", key)
        with pytest.raises(BackendUnavailable):
            one.pipeline([("GET", key) for key in keys], each=True)
    for node in cluster.nodes:
        node.restart("empty")

    def works(one: ClusterClient, key: str) -> bool:
        try:
            return bool(one.call("SET", key, "v"))
        except BackendUnavailable:
            return False

    for one in (client, late):
        for key in keys:
            eventually(lambda one=one, key=key: works(one, key))  # type: ignore[misc]
        assert one.pipeline([("GET", key) for key in keys], each=True) == [b"v"] * 3


class ViewsSpy:
    """Counts the threads that read the topology at the same time, and holds the first one up where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._views = Topology._views
        self._lock = threading.Lock()
        self.now = self.most = self.all = 0
        self.go_on = threading.Event()
        self.go_on.set()
        monkeypatch.setattr(Topology, "_views", lambda *args: self.read(*args))

    def read(self, *args: Any) -> Any:
        with self._lock:
            self.now += 1
            self.all += 1
            self.most = max(self.most, self.now)
        try:
            assert self.go_on.wait(PATIENCE)
            return self._views(*args)
        finally:
            with self._lock:
                self.now -= 1


def test_a_refresh_is_read_by_one_thread_at_a_time_and_no_call_waits_for_it(
    cluster: RedisCluster, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    client, slots = make_client(cluster), slots_by_master(cluster)
    old, *others = slots
    living = [slot for node in others for slot in slots[node]]
    client.call("GET", key_in(living[0]))
    views = ViewsSpy(monkeypatch)
    with ClusterLoad(client, slots[old] + living, threads=8) as load:
        load.goes_on(slots[old] + living)
        with load.standing():
            views.go_on.clear()
            old.kill()
        load.fails(slots[old], 3)
        eventually(lambda: views.now)
        load.fails(slots[old], 3)
        load.goes_on(living)
        assert views.most == 1
        views.go_on.set()
        cluster.failover(old)
        load.goes_on(slots[old])
    assert views.most == 1


def test_a_child_that_is_forked_during_a_refresh_reads_its_own(
    cluster: RedisCluster, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    client, slots = make_client(cluster), slots_by_master(cluster)
    old, other, _ = slots
    client.call("SET", key_in(slots[old][0]), "v")
    views = ViewsSpy(monkeypatch)
    views.go_on.clear()
    reading = Background(client._topology.refresh)
    eventually(lambda: views.now == 1)
    cluster.move_slots(slots[old], other)

    def of_child() -> Any:
        views.go_on.set()
        found = client.call("GET", key_in(slots[old][0]))  # MOVED: and a refresh beside the call
        eventually(lambda: views.all > 1)
        client._topology.refresh()
        return found, client.at(key_in(slots[old][0])).address[1]

    assert in_child(of_child) == (b"v", other.port)
    views.go_on.set()
    reading.result()
    assert client.call("GET", key_in(slots[old][0])) == b"v"


def test_a_client_outlives_all_nodes_that_it_knew(
    cluster: RedisCluster, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    """Each hands over to a node that the client has not met."""
    client, slots = make_client(cluster), slots_by_master(cluster)
    keys = [key_in(some[0]) for some in slots.values()]
    for key in keys:
        client.call("SET", key, "v")
    known: list[RedisNode] = [*client.nodes()]
    for node, key in zip(slots, keys, strict=True):
        assert node.command("WAIT", 1, 60_000) == 1
        node.kill()
        cluster.failover(node)
        eventually(lambda key=key: reads(client, key))  # type: ignore[misc]
    assert not set(known) & set(client.nodes())


def reads(client: ClusterClient, key: str) -> bool:
    try:
        return bool(client.call("GET", key) == b"v")
    except BackendUnavailable:
        return False
