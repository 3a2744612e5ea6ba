"""ClusterClient on a real Cluster: the way of each command, redirections, pipelines, pending changes, settings."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from strikes import lost_mutexes, strike_anywhere
from support import PATIENCE, Background

from govredis import BackendError, BackendUnavailable, Config
from govredis._sole import nobody
from govredis.breaker import Rejected
from govredis.client import ClusterClient, Redirected, RedisNode, Script, connect, slot_of
from govredis.client.cluster import cluster_client as client_module
from govredis.client.cluster import cluster_node as node_module
from govredis.client.cluster.cluster_node import ClusterNode
from govredis.errors import NotAsked
from govredis.testing.servers import RedisCluster, RedisServer

pytestmark = pytest.mark.one_redis

PATIENT = {"socket_timeout": 10.0, "connect_timeout": 10.0}
#: Some in each third of the slots.
KEYS = [f"k{n}" for n in range(30)]
#: A script of one key that leaves nothing.
LOOK = Script("govredis.outbox", "look.lua")


@pytest.fixture(scope="module")
def cluster(one_redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(replicas=0, binary=one_redis_binary, config=["cluster-require-full-coverage no"]) as started:
        yield started


@pytest.fixture
def mortal_cluster(one_redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(replicas=0, binary=one_redis_binary, config=["cluster-require-full-coverage no"]) as started:
        yield started


@pytest.fixture
def make_client() -> Iterator[Callable[..., ClusterClient]]:
    with contextlib.ExitStack() as stack:

        def make(to: RedisCluster | str, **settings: Any) -> ClusterClient:
            url = to if isinstance(to, str) else to.url
            client = connect(Config(**{"redis_url": url, **PATIENT, **settings}))
            assert isinstance(client, ClusterClient)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(cluster: RedisCluster, make_client: Callable[..., ClusterClient]) -> ClusterClient:
    client = make_client(cluster)
    client.pipeline([("DEL", key) for key in KEYS])
    return client


def port_of(node: RedisNode) -> int:
    assert isinstance(node, ClusterNode)
    return node.address[1]


def server_of(cluster: RedisCluster, node: RedisNode) -> RedisServer:
    return next(server for server in cluster.nodes if server.port == port_of(node))


def read(cluster: RedisCluster, client: ClusterClient) -> list[str | None]:
    """KEYS, each asked for at its own server."""
    return [server_of(cluster, client.at(key)).command("GET", key) for key in KEYS]


def test_each_command_goes_to_the_node_that_has_its_key(cluster: RedisCluster, client: ClusterClient) -> None:
    for key in KEYS:
        client.call("SET", key, key)
    assert read(cluster, client) == KEYS
    assert {port_of(node) for node in map(client.at, KEYS)} == {node.port for node in cluster.nodes}
    assert {port_of(node) for node in client.nodes()} == {node.port for node in cluster.nodes}
    for node in client.nodes():
        assert all(node.covers(key) is (client.at(key) is node) for key in KEYS)
    assert not any("errorstat_MOVED" in node.command("INFO", "errorstats") for node in cluster.nodes), "none in vain"


@pytest.mark.parametrize("key", ["plain", "{tag}:rest", "a{b}c", "{}whole", "{a}{b}", "}{", "{open", "é", "x{é}"])
def test_slots_are_those_of_redis(cluster: RedisCluster, key: str) -> None:
    assert slot_of(key) == slot_of(key.encode()) == cluster.nodes[0].command("CLUSTER", "KEYSLOT", key)


def test_commands_whose_key_is_not_the_second_word(client: ClusterClient) -> None:
    for key in KEYS[:12]:
        assert client.call("XGROUP", "CREATE", key, "g", "$", "MKSTREAM") == b"OK"
        assert client.call("XINFO", "STREAM", key)
        assert client.call("XREADGROUP", "GROUP", "g", "c", "COUNT", "1", "STREAMS", key, ">") is None
        assert client.block(("XREAD", "COUNT", "1", "STREAMS", key, "$"), 0.01) is None
        assert client.call("OBJECT", "ENCODING", key)
        assert client.call("EVAL", "return redis.call('DEL', KEYS[1])", "1", key) == 1
        assert client.pop(key, 0.01) is None
    assert client.call("EVAL", "return 7", "0") == 7
    assert client.call("PING") == b"PONG"


def test_a_script_that_a_node_does_not_know(cluster: RedisCluster, client: ClusterClient) -> None:
    for node in cluster.nodes:
        node.command("SCRIPT", "FLUSH")
    for key in KEYS:
        assert len(client.run(LOOK, (key,))) >= 2
    for node in cluster.nodes:
        node.command("SCRIPT", "FLUSH")
    client.call("SET", KEYS[0], "v")
    found = client.pipeline([LOOK.call((key,), ()) for key in KEYS], (LOOK,))
    assert [reply[2:] for reply in found] == [[b"v"]] + [[None]] * (len(KEYS) - 1)


class TestPipelines:
    def test_replies_come_in_order_and_errors_in_their_places(self, client: ClusterClient) -> None:
        client.pipeline([("SET", key, key) for key in KEYS])
        assert client.pipeline([("GET", key) for key in KEYS]) == [key.encode() for key in KEYS]
        assert client.pipeline([]) == []
        wrong = [("LPUSH" if n % 7 == 3 else "GET", key, *["x"] * (n % 7 == 3)) for n, key in enumerate(KEYS)]
        for n, reply in enumerate(client.pipeline(wrong, each=True)):
            assert isinstance(reply, BackendError) if n % 7 == 3 else reply == KEYS[n].encode()
        with pytest.raises(BackendError, match="WRONGTYPE"):
            client.pipeline(wrong)

    def test_more_than_one_exchange_of_each(self, client: ClusterClient) -> None:
        many = [("SET", f"many{n}", str(n), "PX", "60000") for n in range(2500)]
        assert client.pipeline(many) == [b"OK"] * 2500
        assert client.pipeline([("GET", key) for _, key, *_ in many]) == [str(n).encode() for n in range(2500)]

    def test_all_nodes_are_asked_before_any_is_waited_for(
        self, client: ClusterClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        begin, finish = ClusterNode.begin, ClusterNode.finish

        def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: (order.append(name), method(*args))[1]

        monkeypatch.setattr(ClusterNode, "begin", noted("begin", begin))
        monkeypatch.setattr(ClusterNode, "finish", noted("finish", finish))
        client.pipeline([("GET", key) for key in KEYS])
        assert order == ["begin"] * 3 + ["finish"] * 3

    def test_nodes_that_hang_cost_one_timeout_together(
        self, mortal_cluster: RedisCluster, make_client: Callable[..., ClusterClient], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = make_client(mortal_cluster, socket_timeout=3600.0)
        client.pipeline([("SET", key, key) for key in KEYS])
        well = client.at(KEYS[0])
        for node in client.nodes():
            if node is not well:
                server_of(mortal_cluster, node).pause()
        # An hour passes between any two looks at the clock, but none for the replies of the node that is well.
        hours = itertools.count(0.0, 3600.0)
        monkeypatch.setattr(node_module, "perf_counter", lambda: next(hours))
        come = node_module._has_come
        monkeypatch.setattr(node_module, "_has_come", lambda sock, left: come(sock, max(left, 1.0)))
        for key, reply in zip(KEYS, client.pipeline([("GET", key) for key in KEYS], each=True), strict=True):
            assert reply == key.encode() if well.covers(key) else isinstance(reply, BackendUnavailable)
        for node in mortal_cluster.nodes:
            node.resume()

    def test_a_node_that_is_gone_costs_its_own_commands_alone(
        self, mortal_cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        client = make_client(mortal_cluster)
        client.pipeline([("SET", key, key) for key in KEYS])
        lost = client.at(KEYS[0])
        theirs = [key for key in KEYS if lost.covers(key)]
        server_of(mortal_cluster, lost).kill()
        for _ in range(3):
            for key, reply in zip(KEYS, client.pipeline([("GET", key) for key in KEYS], each=True), strict=True):
                assert isinstance(reply, BackendUnavailable) if key in theirs else reply == key.encode()
            with pytest.raises(BackendUnavailable):
                client.pipeline([("GET", key) for key in KEYS])
            with pytest.raises(BackendUnavailable):
                client.pipeline([("GET", key) for key in theirs], each=True)
        assert not lost.breaker.closed
        assert [node.breaker.closed for node in client.nodes() if node is not lost] == [True, True]
        server_of(mortal_cluster, lost).start()
        eventually(lambda: lost.breaker.closed, within=60)
        eventually(lambda: not any(isinstance(r, BackendError) for r in self._read_all(client)), within=60)

    def _read_all(self, client: ClusterClient) -> list[Any]:
        try:
            return client.pipeline([("GET", key) for key in KEYS], each=True)
        except BackendUnavailable as error:
            return [error]


class TestRedirections:
    def test_a_slot_that_moved_is_followed_and_noted(
        self, cluster: RedisCluster, client: ClusterClient, eventually: Callable[..., Any]
    ) -> None:
        key, before = KEYS[0], client.at(KEYS[0])
        client.call("SET", key, "v")
        other = next(node for node in cluster.nodes if node.port != port_of(before))
        cluster.move_slots([slot_of(key)], other)
        with pytest.raises(Redirected):
            before.call("GET", key)
        assert port_of(client.at(key)) == other.port
        assert client.call("GET", key) == b"v"
        cluster.move_slots([slot_of(key)], server_of(cluster, before))
        assert client.pipeline([("GET", key), ("SET", KEYS[1], "w")]) == [b"v", b"OK"]
        eventually(lambda: client.at(key) is before)
        assert client.at(KEYS[1]).call("GET", KEYS[1]) == b"w"

    def test_a_slot_that_is_on_its_way(
        self, cluster: RedisCluster, client: ClusterClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module, "_AGAIN", 0.0)
        key, sibling = KEYS[0], f"{{{KEYS[0]}}}:x"
        client.pipeline([("SET", key, "v"), ("DEL", sibling)])
        before = client.at(key)
        other = next(node for node in cluster.nodes if node.port != port_of(before))
        with cluster.moving(slot_of(key), other):
            assert client.call("GET", key) == b"v", "here or there"
            assert client.call("SET", sibling, "w") == b"OK"
            assert client.pipeline([("GET", key), ("GET", sibling)]) == [b"v", b"w"]
            with pytest.raises(BackendUnavailable, match=r"TRYAGAIN|ASK|cannot serve"):
                before.call("MGET", key, sibling, f"{{{key}}}:nowhere")
            with pytest.raises(BackendUnavailable):
                client.call("MGET", key, sibling, f"{{{key}}}:nowhere")
            assert before.breaker.closed
            assert client.at(key) is before
        assert client.call("MGET", key, sibling) == [b"v", b"w"]
        cluster.move_slots([slot_of(key)], server_of(cluster, before))

    def test_a_replay_reaches_what_has_gone_ahead(
        self, cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        """The key's slot is half moved, and the key is there already: its pending change is carried out there."""
        client = make_client(cluster)
        key = KEYS[0]
        client.call("SET", key, "v")
        before = client.at(key)
        owed = [key]

        def replay(node: RedisNode) -> None:
            node.pipeline([("DEL", each) for each in owed if node.covers(each)])

        client.on_recovery(replay)
        other = next(node for node in cluster.nodes if node.port != port_of(before))
        with cluster.moving(slot_of(key), other):
            client.replay_soon("a test", key)
            eventually(lambda: before.breaker.closed)
            owed.clear()
            assert client.call("GET", key) is None
        cluster.move_slots([slot_of(key)], server_of(cluster, before))

    def test_a_replays_script_may_be_new_to_the_node_ahead(
        self, cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        client = make_client(cluster)
        key = KEYS[0]
        client.call("SET", key, "v")
        before, found = client.at(key), list[Any]()
        client.on_recovery(
            lambda node: found.extend(node.pipeline([LOOK.call((key,), ())], (LOOK,))) if node.covers(key) else None
        )
        other = next(node for node in cluster.nodes if node.port != port_of(before))
        with cluster.moving(slot_of(key), other):
            server_of(cluster, before).command("SCRIPT", "LOAD", LOOK.source)
            other.command("SCRIPT", "FLUSH")
            client.replay_soon("a test", key)
            eventually(lambda: before.breaker.closed)
            assert [reply[2:] for reply in found] == [[b"v"]]
        cluster.move_slots([slot_of(key)], server_of(cluster, before))

    def test_a_change_that_waits_for_a_slot_on_its_way_keeps_no_other_key(
        self, cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        client = make_client(cluster)
        key = KEYS[0]
        before = client.at(key)
        beside = next(other for other in KEYS[1:] if before.covers(other))
        client.pipeline([("DEL", key), ("SET", beside, "v")])
        owed, tries = [key], list[RedisNode]()

        def replay(node: RedisNode) -> None:
            if owed and node.covers(key):
                tries.append(node)
                node.pipeline([("MSET", key, "told", f"{{{key}}}:x", "told")])  # TRYAGAIN: there is no such key yet
                owed.clear()

        client.on_recovery(replay)
        client.on_recovery(replay)  # two that are put off have one thread wait for them
        most = list[int]()
        client.on_recovery(lambda _: most.append(sum(t.name == "govredis-replay" for t in threading.enumerate())))
        other = next(node for node in cluster.nodes if node.port != port_of(before))
        with cluster.moving(slot_of(key), other):
            client.replay_soon("a test", key)
            eventually(lambda: len(tries) >= 8 and before.breaker.closed)
            assert max(most) <= 2, "that which waits, and that which has just had them run"
            assert client.call("GET", beside) == b"v"
            assert owed
        eventually(lambda: not owed)
        assert client.call("GET", key) == b"told"
        cluster.move_slots([slot_of(key)], server_of(cluster, before))


class TestPendingChanges:
    def test_they_wait_for_their_own_node(
        self, mortal_cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        client = make_client(mortal_cluster)
        client.pipeline([("SET", key, key) for key in KEYS])
        lost = client.at(KEYS[0])
        theirs = [key for key in KEYS if lost.covers(key)]
        owed = set(KEYS)
        told: list[RedisNode] = []

        def replay(node: RedisNode) -> None:
            mine = [key for key in owed if node.covers(key)]
            told.append(node)
            node.pipeline([("SET", key, "told") for key in mine])
            owed.difference_update(mine)

        client.on_recovery(replay)
        server_of(mortal_cluster, lost).kill()
        eventually(lambda: not lost.breaker.closed or client.pipeline([("GET", k) for k in KEYS], each=True) is None)
        for key in KEYS:
            client.replay_soon("a test", key)
        others = [key for key in KEYS if key not in theirs]
        for key in others:
            assert client.call("GET", key) == b"told", "the others have had theirs, and go on"
        assert owed == set(theirs)
        assert lost not in told
        server_of(mortal_cluster, lost).start()
        eventually(lambda: not owed, within=60)
        eventually(lambda: lost.breaker.closed, within=60)
        assert client.pipeline([("GET", key) for key in theirs]) == [b"told"] * len(theirs)

    def test_an_heir_is_told_before_it_is_used(
        self, mortal_cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        """A slot goes to another node while its owner is closed to calls, as after a failover."""
        client = make_client(mortal_cluster)
        key = KEYS[0]
        client.call("SET", key, "old")
        was, stop = client.at(key), threading.Event()
        told: list[RedisNode] = []

        def replay(node: RedisNode) -> None:
            if node is was and not stop.is_set():
                raise BackendUnavailable("a test keeps it away")
            if node.covers(key):
                node.call("SET", key, "told")
                told.append(node)

        client.on_recovery(replay)
        client.replay_soon("a test", key)
        heir = next(node for node in client.nodes() if node is not was)
        mortal_cluster.move_slots([slot_of(key)], server_of(mortal_cluster, heir))
        assert was.breaker.is_away() or not was.breaker.closed
        eventually(lambda: client.at(key) is heir)  # its probes read the topology
        eventually(lambda: told == [heir])
        assert client.call("GET", key) == b"told"
        stop.set()
        eventually(lambda: was.breaker.closed)

    def test_those_of_a_slot_that_nobody_has_wait_for_its_next_owner(
        self, mortal_cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        url = mortal_cluster.url
        for node in mortal_cluster.nodes:
            node.pause()
        client = make_client(url, socket_timeout=0.05, connect_timeout=0.05)
        told: list[RedisNode] = []
        client.on_recovery(lambda node: told.append(node) if node.covers(KEYS[0]) else None)
        with pytest.raises(BackendUnavailable):
            client.call("GET", KEYS[0])
        client.replay_soon("a test", KEYS[0])
        for node in mortal_cluster.nodes:
            node.resume()
        eventually(lambda: _answers(client, KEYS[0]), within=60)
        assert told
        assert told[0] is client.at(KEYS[0])


def _answers(client: ClusterClient, key: str) -> bool:
    try:
        client.call("GET", key)
    except BackendUnavailable:
        return False
    return True


class TestBeginnings:
    def test_any_seed_will_do(self, cluster: RedisCluster, make_client: Callable[..., ClusterClient]) -> None:
        client = make_client(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.nodes[2].port}")
        assert client.call("PING") == b"PONG"
        assert len(client.nodes()) == 3
        client = make_client(cluster.nodes[1].url, cluster=True)
        assert client.call("SET", KEYS[0], "v") == b"OK"

    def test_where_no_seed_answers_each_call_says_so_at_once(
        self, make_client: Callable[..., ClusterClient], caplog: pytest.LogCaptureFixture
    ) -> None:
        client = make_client("redis+cluster://127.0.0.1:1,127.0.0.1:2")
        for _ in range(5):
            with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1"):
                client.call("GET", "k")
            with pytest.raises(BackendUnavailable):
                client.pipeline([("GET", "k")], each=True)
            with pytest.raises(NotAsked):
                client.at("k")
        assert [r.levelno for r in caplog.records] == [logging.WARNING]

    def test_many_threads_ask_in_one_round(
        self, cluster: RedisCluster, make_client: Callable[..., ClusterClient]
    ) -> None:
        client = make_client(cluster)
        for node in cluster.nodes:
            node.command("CONFIG", "RESETSTAT")
        replies: list[Any] = []
        threads = [threading.Thread(target=lambda: replies.append(client.call("PING"))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replies == [b"PONG"] * 20
        assert sum(_asked(node) for node in cluster.nodes) == 1

    def test_a_server_that_is_no_cluster_is_refused_by_name(
        self, redis_server: RedisServer, make_client: Callable[..., ClusterClient]
    ) -> None:
        client = make_client(redis_server.url, cluster=True)
        for _ in range(3):
            with pytest.raises(Rejected, match="is no node of a Cluster: REDIS_CLUSTER must stay unset") as caught:
                client.call("GET", "k")
            assert not isinstance(caught.value, BackendUnavailable), "a fallback would hide the mistake"

    def test_a_seed_that_is_a_node_is_enough(
        self,
        cluster: RedisCluster,
        redis_server: RedisServer,
        make_client: Callable[..., ClusterClient],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Another seed's address may belong to another server by now."""
        monkeypatch.setattr("govredis.client.cluster.topology._random.sample", lambda seeds, _: list(seeds))
        seeds = f"127.0.0.1:1,127.0.0.1:{redis_server.port},127.0.0.1:{cluster.nodes[0].port}"
        assert make_client(f"redis+cluster://{seeds}").call("GET", "k") is None

    def test_a_node_that_has_not_joined_knows_nothing(
        self, one_redis_binary: str, make_client: Callable[..., ClusterClient]
    ) -> None:
        with RedisServer(binary=one_redis_binary, config=["cluster-enabled yes"]) as alone:
            client = make_client(f"redis+cluster://127.0.0.1:{alone.port}")
            for ask in (client.nodes, lambda: client.call("TIME"), lambda: client.pipeline([("GET", "k")])):
                with pytest.raises(BackendUnavailable, match="knows of no slots"):
                    ask()

    def test_a_wrong_password_is_no_outage(
        self, cluster: RedisCluster, make_client: Callable[..., ClusterClient]
    ) -> None:
        client = make_client(cluster.url.replace("://", "://nobody:hunter2@"))
        for _ in range(2):
            with pytest.raises(Rejected, match="rejected our credentials") as caught:
                client.call("GET", "k")
            assert "hunter2" not in str(caught.value)

    def test_a_cluster_set_up_anew_at_the_seeds_is_found(
        self, one_redis_binary: str, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
    ) -> None:
        """No address but the seeds' is the same, and the epochs begin anew."""
        with RedisCluster(masters=3, replicas=0, binary=one_redis_binary) as first:
            ports = [node.port for node in first.nodes]
            with RedisCluster(masters=3, replicas=0, binary=one_redis_binary) as second:
                seeds = f"127.0.0.1:{ports[0]},127.0.0.1:{second.nodes[0].port}"
                client = make_client(f"redis+cluster://{seeds}")
                client._topology._seeds = (("127.0.0.1", ports[0]),)
                assert client.call("SET", "k", "first") == b"OK"
                client._topology._seeds = (("127.0.0.1", second.nodes[0].port),)
                for node in first.nodes:
                    node.kill()
                eventually(lambda: _answers(client, "k"), within=60)
                assert {port_of(node) for node in client.nodes()} == {node.port for node in second.nodes}
                assert client.call("GET", "k") is None

    def test_seeds_that_hang_are_asked_side_by_side(self, make_client: Callable[..., ClusterClient]) -> None:
        both, asked = threading.Barrier(2), itertools.count()

        def hang(seed: socket.socket) -> None:
            while True:
                try:
                    connection, _ = seed.accept()
                except OSError:  # the test is over
                    return
                with connection:
                    if next(asked) in (1, 2):  # all but the first, which is asked alone
                        both.wait(PATIENCE / 2)

        with contextlib.ExitStack() as stack:
            seeds = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            hanging = [Background(partial(hang, seed)) for seed in seeds]
            names = ",".join(f"127.0.0.1:{seed.getsockname()[1]}" for seed in seeds)
            client = make_client(f"redis+cluster://{names}", socket_timeout=PATIENCE)
            with pytest.raises(BackendUnavailable):
                client.call("GET", "k")
            assert not both.broken
            assert next(asked) >= len(seeds)
            for seed in seeds:
                seed.shutdown(socket.SHUT_RDWR)
            for each in hanging:
                each.result()


def _asked(node: RedisServer) -> int:
    """How often it was asked for its view."""
    stats = node.command("INFO", "commandstats")
    if "cmdstat_cluster" in stats:  # of Redis 6.2: INFO and SLOTS are one
        return int(stats["cmdstat_cluster"]["calls"]) // 2
    return int(stats.get("cmdstat_cluster|slots", {"calls": 0})["calls"])


@pytest.mark.once
def test_a_node_that_left_is_used_no_more(
    mortal_cluster: RedisCluster, make_client: Callable[..., ClusterClient], eventually: Callable[..., Any]
) -> None:
    client = make_client(mortal_cluster)
    client.pipeline([("SET", key, key) for key in KEYS])
    left = client.at(KEYS[0])
    assert isinstance(left, ClusterNode)
    seen: list[RedisNode] = []
    client.on_node(seen.append)
    assert set(seen) == set(client.nodes())
    told: list[RedisNode] = []
    client.on_recovery(told.append)
    server = server_of(mortal_cluster, left)
    to = next(node for node in mortal_cluster.nodes if node is not server)
    mine = [slot for slot in range(16384) if client._topology.owners[slot] is left]
    mortal_cluster.move_slots(mine, to)
    eventually(lambda: client.call("GET", KEYS[0]) == KEYS[0].encode() and left.retired, within=60)
    assert left not in client.nodes()
    eventually(
        lambda: {port_of(node) for node in told} == {to.port}
    )  # it may be a failover that this process slept through
    assert not left._pool.idle
    assert client.pipeline([("GET", key) for key in KEYS]) == [key.encode() for key in KEYS]
    left.breaker.failed(left.breaker.period, "a call that was under way", timed_out=True)
    eventually(lambda: left.breaker._thread is None)  # its probe ends


def test_a_child_uses_the_map_and_connections_of_its_own(cluster: RedisCluster, client: ClusterClient) -> None:
    client.pipeline([("SET", key, key) for key in KEYS])
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            ok = client.pipeline([("GET", key) for key in KEYS]) == [key.encode() for key in KEYS]
            client._topology.refresh()
            code = 0 if ok and client.call("SET", KEYS[0], "child") == b"OK" else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.call("GET", KEYS[0]) == b"child"


def test_a_child_forked_during_a_reading_reads_for_itself(cluster: RedisCluster, client: ClusterClient) -> None:
    assert client.call("PING") == b"PONG"
    mark = client._topology._reading.take()
    assert mark is not None
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if client._topology._read_alone() else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not client._topology._read_alone(), "here it goes on"
    client._topology._reading.holder = nobody


@pytest.mark.usefixtures("destructors_struck")
@pytest.mark.once
def test_no_exception_leaves_anything_taken(cluster: RedisCluster, make_client: Callable[..., ClusterClient]) -> None:
    client = make_client(cluster)
    client.pipeline([("SET", key, key) for key in KEYS])

    def operation(_: object) -> None:
        client._topology.refresh()
        client._topology.moved(0, client.nodes()[0].address)  # type: ignore[attr-defined]
        client.pipeline([("GET", key) for key in KEYS[:6]])
        client.call("GET", KEYS[0])

    def works() -> None:
        assert not lost_mutexes()
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append((client._topology._read_alone(), client.pipeline([("GET", k) for k in KEYS])))
        )
        thread.start()
        thread.join()
        assert found[0][1] == [key.encode() for key in KEYS]

    assert strike_anywhere(operation, works) > 10
