"""Health of a Redis Cluster: the report, the census, the outages and the account know its nodes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from click.testing import CliRunner
from support import in_child

from govredis import BackendUnavailable, GovRedis
from govredis._at_once import at_once
from govredis.cli import main
from govredis.client import slots
from govredis.contrib.prometheus import GovRedisCollector
from govredis.health import Check, census
from govredis.health.fleet import Fleet
from govredis.health.heartbeat import Heartbeat
from govredis.health.nodes import NodeLatencies
from govredis.health.probes.redis_server import RedisProbe
from govredis.keys import Keys
from govredis.testing._base_server import free_port
from govredis.testing.servers import PostgresServer, RedisCluster, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]
Eventually = Callable[..., Any]
ALWAYS = datetime(2020, 1, 1, tzinfo=timezone.utc), datetime(2100, 1, 1, tzinfo=timezone.utc)


@pytest.fixture(scope="module")
def _cluster(redis_binary: str) -> Iterator[RedisCluster]:
    config = ["cluster-require-full-coverage no", "appendonly yes", "appendfsync no"]
    with RedisCluster(replicas=0, binary=redis_binary, config=config) as started:
        yield started


@pytest.fixture
def cluster(_cluster: RedisCluster, eventually: Eventually) -> RedisCluster:
    """Three primaries without replicas: a node that is away stays away. All run, and are empty."""
    for node in _cluster.nodes:
        node.start()
    eventually(lambda: all("cluster_state:ok" in node.command("CLUSTER", "INFO") for node in _cluster.nodes))
    for node in _cluster.nodes:
        node.command("FLUSHALL")
    return _cluster


@pytest.fixture
def gov(make_gov: MakeGov, cluster: RedisCluster) -> GovRedis:
    return make_gov(redis_url=cluster.url)


def address(node: RedisServer) -> str:
    return f"127.0.0.1:{node.port}"


def node_of(cluster: RedisCluster, key: str) -> RedisServer:
    return cluster.nodes[slots.slot_of(key) * len(cluster.nodes) // slots.SLOTS]


#: Two parts of this process tell Redis of counts, each in a slot of its own.
KINDS = "account", "denied"


def key(prefix: str, kind: str) -> str:
    return str(getattr(Keys(prefix), kind)())


def tag(prefix: str, kind: str) -> str:
    return f"{{{key(prefix, kind)}}}"


def other_than(cluster: RedisCluster, *keys: str) -> RedisServer:
    """A node that has none of the keys."""
    busy = [node_of(cluster, key) for key in keys]
    return next(node for node in cluster.nodes if node not in busy)


def check_of(gov: GovRedis, name: str = "redis") -> Check:
    gov.health._last = None  # a look of its own
    return next(check for check in gov.health.check().checks if check.name == name)


def notice(gov: GovRedis, node: RedisServer) -> None:
    """Have the process notice that the node is away."""
    redis = gov.internal.context.redis
    assert redis is not None
    own = next(each for each in redis.nodes() if each.name.endswith(address(node)))
    while own.breaker.closed:
        with pytest.raises(BackendUnavailable):
            own.call("PING")


class TestReport:
    def test_it_adds_up_the_nodes_and_shows_each(self, gov: GovRedis, cluster: RedisCluster) -> None:
        redis = gov.internal.context.redis
        assert redis is not None
        for n in range(30):
            redis.call("SET", f"k{n}", "v")
        check = check_of(gov)
        assert (check.status, check.output) == ("pass", "")
        sizes = [node.command("DBSIZE") for node in cluster.nodes]
        assert check.data["keys"] == sum(sizes)
        shown = {each["address"]: (each["status"], each["keys"]) for each in check.data["nodes"]}
        assert shown == {address(node): ("pass", size) for node, size in zip(cluster.nodes, sizes, strict=True)}
        assert check.data["used_memory"] == sum(each["used_memory"] for each in check.data["nodes"])

    def test_it_names_the_node_that_is_away_and_shows_the_others(self, gov: GovRedis, cluster: RedisCluster) -> None:
        assert check_of(gov).status == "pass"
        lost = cluster.nodes[1]
        lost.kill()
        notice(gov, lost)
        check = check_of(gov)
        assert check.status == "warn"
        assert check.output.startswith(f"1 of 3 nodes are away: Redis at {address(lost)} is away: ")
        assert check.output.endswith("; fallbacks are in use")
        assert gov.health.check().status == "warn", "a site out of service would be worse for all other keys"
        assert check.data["away_for"] >= 0
        assert [each["status"] for each in check.data["nodes"]].count("pass") == 2
        lost.start()

    @pytest.mark.parametrize("number", range(3))
    def test_a_primary_that_serves_no_key_is_away(self, gov: GovRedis, cluster: RedisCluster, number: int) -> None:
        """Whether or not it has a key that health asks for."""
        assert check_of(gov).status == "pass"
        lost, slot = cluster.nodes[number], slots.SLOTS * number // 3 + 1
        lost.command("CONFIG", "SET", "cluster-require-full-coverage", "yes")
        lost.command("CLUSTER", "DELSLOTS", slot)
        try:
            check = check_of(gov)
        finally:
            lost.command("CLUSTER", "ADDSLOTS", slot)
            lost.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        said = f"1 of 3 nodes are away: Redis at {address(lost)} cannot serve: The cluster is down"
        assert (check.status, check.output) == ("warn", f"{said}; fallbacks are in use")
        assert {each["address"]: each["status"] for each in check.data["nodes"]}[address(lost)] == "warn"

    def test_features_are_looked_at_while_a_node_without_their_keys_is_away(
        self, gov: GovRedis, cluster: RedisCluster, eventually: Eventually
    ) -> None:
        keys = gov.internal.context.keys
        redis = gov.internal.context.redis
        assert redis is not None
        lost = other_than(cluster, keys.heartbeat(), keys.unread_heartbeats())
        gov.health.beat(60)
        check_of(gov)
        lost.kill()
        notice(gov, lost)
        assert check_of(gov, "beat").data["seconds_since"] >= 0
        lost.start()
        other = other_than(cluster, keys.fleet())
        eventually(lambda: all(node.breaker.closed for node in redis.nodes()))
        Fleet(gov.internal.context).note("worker", "w1", 60.0, {})
        other.kill()
        notice(gov, other)
        assert check_of(gov, "workers").data == {"alive": 1, "lost": 0}
        lost.start()

    def test_the_others_checks_stay_while_the_node_of_one_is_away(self, gov: GovRedis, cluster: RedisCluster) -> None:
        lost = node_of(cluster, gov.internal.context.keys.fleet())
        check_of(gov)
        lost.kill()
        notice(gov, lost)
        assert check_of(gov).status == "warn"
        assert check_of(gov, "counters").status == "pass"
        lost.start()

    def test_it_fails_where_all_nodes_are_away_and_postgresql_too(self, gov: GovRedis, cluster: RedisCluster) -> None:
        check_of(gov)
        for node in cluster.nodes:
            node.kill()
        for node in cluster.nodes:
            notice(gov, node)
        check = check_of(gov)
        assert check.output.startswith("3 of 3 nodes are away: ")
        assert check.output.endswith("; fallbacks are in use, and no PostgreSQL covers it")
        assert gov.health.check().status == "fail"

    def test_a_part_that_is_away_is_a_warning_also_without_fallbacks(
        self, make_gov: MakeGov, cluster: RedisCluster
    ) -> None:
        gov = make_gov(redis_url=cluster.url, lock_fallback="fail")
        check_of(gov)
        cluster.nodes[0].kill()
        notice(gov, cluster.nodes[0])
        check = check_of(gov)
        assert (check.status, check.output.endswith("; no fallback for locks")) == ("warn", True)

    def test_a_mistake_at_one_node_fails(self, make_gov: MakeGov, cluster: RedisCluster) -> None:
        gov = make_gov(redis_url=cluster.url.replace("://", "://app:x@"))
        for node in cluster.nodes:
            node.command("ACL", "SETUSER", "app", "on", "nopass", "~*", "+@all")
        assert check_of(gov).status == "pass"
        wrong = cluster.nodes[1]
        wrong.command("ACL", "DELUSER", "app")
        check = check_of(gov)
        assert check.status == "fail"
        assert address(wrong) in check.output

    def test_the_beat_is_noted_while_the_node_of_the_unread_ones_is_away(
        self, make_gov: MakeGov, cluster: RedisCluster
    ) -> None:
        kinds = "heartbeat", "unread_heartbeats"
        apart = (p for p in (f"p{n}:" for n in range(100)) if len({node_of(cluster, key(p, k)) for k in kinds}) == 2)
        prefix = next(apart)
        gov = make_gov(redis_url=cluster.url, key_prefix=prefix)
        check_of(gov)
        lost = node_of(cluster, key(prefix, "unread_heartbeats"))
        lost.kill()
        notice(gov, lost)
        assert gov.health.beat(60)
        assert gov.counters.read()["health.degraded.heartbeats"] == 1
        other = node_of(cluster, key(prefix, "heartbeat"))
        lost.start()
        other.kill()
        notice(gov, other)
        assert not gov.health.beat(60)

    def test_it_says_which_node_does_not_answer(
        self, gov: GovRedis, cluster: RedisCluster, eventually: Eventually
    ) -> None:
        probe = RedisProbe(gov.internal.context, Heartbeat(gov.internal.context), [], time.monotonic)
        assert next(iter(probe.look())).status == "pass"
        slow = cluster.nodes[1]
        slow.pause()
        look = threading.Thread(target=lambda: list(probe.look()))
        look.start()
        try:
            said = f"{address(slow)} has not answered for 7.0 s; fallbacks are in use"
            eventually(lambda: probe.hung(7.0)[0].output == said)
        finally:
            slow.resume()
            look.join()

    def test_a_fault_names_its_node(self, gov: GovRedis, cluster: RedisCluster) -> None:
        node = cluster.nodes[2]
        node.command("CONFIG", "SET", "maxmemory", 50_000_000, "maxmemory-policy", "allkeys-lru")
        try:
            check = check_of(gov, "eviction")
        finally:
            node.command("CONFIG", "SET", "maxmemory", 0, "maxmemory-policy", "noeviction")
        assert check.status == "warn"
        assert check.output.startswith(f"{address(node)}: maxmemory_policy is allkeys-lru")

    def test_a_cluster_that_nobody_knows_is_away(self, make_gov: MakeGov) -> None:
        gov = make_gov(redis_url=f"redis+cluster://127.0.0.1:{free_port()}")
        check = check_of(gov)
        assert check.status == "warn"
        assert "away_for" in check.data

    def test_a_key_that_has_moved_is_found(self, gov: GovRedis, cluster: RedisCluster) -> None:
        gov.health.beat(60)
        key = gov.internal.context.keys.heartbeat()
        assert check_of(gov, "beat").status == "pass"
        slot, source = slots.slot_of(key), node_of(cluster, key)
        target = other_than(cluster, key)
        with moved(source, target, slot):
            assert check_of(gov, "beat").status == "pass"


class moved:
    """The slot is the target's, and is given back."""

    def __init__(self, source: RedisServer, target: RedisServer, slot: int) -> None:
        self._places, self._slot = (source, target), slot

    def __enter__(self) -> None:
        self._move(*self._places)

    def __exit__(self, *exc: object) -> None:
        self._move(*reversed(self._places))

    def _move(self, source: RedisServer, target: RedisServer) -> None:
        ids = {node: node.command("CLUSTER", "MYID") for node in (source, target)}
        target.command("CLUSTER", "SETSLOT", self._slot, "IMPORTING", ids[source])
        source.command("CLUSTER", "SETSLOT", self._slot, "MIGRATING", ids[target])
        keys = source.command("CLUSTER", "GETKEYSINSLOT", self._slot, 1000)
        if keys:
            source.command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            node.command("CLUSTER", "SETSLOT", self._slot, "NODE", ids[target])


class TestCensus:
    def go_round(self, gov: GovRedis) -> dict[str, int]:
        while not gov.health.count_keys(0.001):
            pass
        return check_of(gov, "keys").data

    def test_the_keys_of_all_nodes_are_counted_once(self, gov: GovRedis, cluster: RedisCluster) -> None:
        redis = gov.internal.context.redis
        assert redis is not None
        for n in range(300):
            redis.call("SET", f"session:{n}", "v", "PX", "100000")
        assert all(node.command("DBSIZE") > 50 for node in cluster.nodes)
        assert self.go_round(gov)["session"] == 300

    def test_a_node_that_is_away_is_left_out_and_named(
        self, gov: GovRedis, cluster: RedisCluster, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(census, "REST_MS", 0)
        redis, lost = gov.internal.context.redis, other_than(cluster, gov.internal.context.keys.census())
        assert redis is not None
        for n in range(60):
            redis.call("SET", f"session:{n}", "v")
        there = sum(key.startswith("session:") for key in lost.command("KEYS", "*"))
        lost.kill()
        notice(gov, lost)
        assert self.go_round(gov)["session"] == 60 - there
        assert check_of(gov, "census").data["unanswered"] == [address(lost)]
        lost.start()
        eventually(lambda: all(node.breaker.closed for node in redis.nodes()))
        eventually(lambda: "cluster_state:ok" in lost.command("CLUSTER", "INFO"))
        assert self.go_round(gov)["session"] == 60, "its append-only file has them"
        assert "unanswered" not in check_of(gov, "census").data

    def test_a_round_begins_anew_where_the_nodes_have_changed(self, gov: GovRedis, cluster: RedisCluster) -> None:
        key = gov.internal.context.keys.census()
        redis = gov.internal.context.redis
        assert redis is not None
        redis.call("SET", "session:1", "v")
        gone = [1.0, "0", 100, 7, 0, 9, False, {"session": [7, 0, 0]}, [], ["10.0.0.1:1", "10.0.0.2:1"], 1]
        redis.call("HSET", key, "round", json.dumps(gone))
        assert self.go_round(gov)["session"] == 1

    def test_a_round_goes_on_at_the_node_where_it_stopped(self, gov: GovRedis, cluster: RedisCluster) -> None:
        key = gov.internal.context.keys.census()
        redis = gov.internal.context.redis
        assert redis is not None
        addresses = sorted(map(address, cluster.nodes))
        under_way = [1.0, "0", 100, 7, 0, 9, False, {"session": [7, 0, 0]}, [], addresses, 3 - 1]
        for n in range(60):
            redis.call("SET", f"session:{n}", "v")
        last = next(node for node in cluster.nodes if address(node) == addresses[-1])
        there = sum(key.startswith("session:") for key in last.command("KEYS", "*"))
        redis.call("HSET", key, "round", json.dumps(under_way))
        assert self.go_round(gov)["session"] == 7 + there


class TestOutages:
    def test_an_outage_names_its_node(self, gov: GovRedis, cluster: RedisCluster, eventually: Eventually) -> None:
        account, keys = gov.internal.account, gov.internal.context.keys
        lost = other_than(cluster, f"{{{keys.account()}}}")
        account.flush()
        lost.kill()
        notice(gov, lost)
        account.flush()
        (outage,) = account.outages(*ALWAYS)
        assert (outage.server, outage.node, outage.ended) == ("redis", address(lost), None)
        lost.start()
        eventually(lambda: account.outages(*ALWAYS)[0].ended is not None)
        account.flush()
        assert account.totals().counts["outages.redis"] == 1

    def test_two_nodes_that_are_away_are_two_outages(
        self, make_gov: MakeGov, cluster: RedisCluster, postgres_server: PostgresServer, eventually: Eventually
    ) -> None:
        gov = make_gov(redis_url=cluster.url, database_url=postgres_server.url)
        gov.internal.account.flush()
        gone = cluster.nodes[:2]
        for node in gone:
            node.kill()
        for node in gone:
            notice(gov, node)
        gov.internal.account.flush()
        found = gov.internal.account.outages(*ALWAYS)
        assert {each.node for each in found} == set(map(address, gone))
        for node in gone:
            node.start()

    def test_a_cluster_that_is_away_from_the_start_is_an_outage(
        self, make_gov: MakeGov, cluster: RedisCluster, eventually: Eventually
    ) -> None:
        for node in cluster.nodes:
            node.kill()
        gov = make_gov(redis_url=cluster.url)
        account, redis = gov.internal.account, gov.internal.context.redis
        assert redis is not None
        with pytest.raises(BackendUnavailable):
            redis.call("PING")

        def open_outages() -> list[str]:
            return [record.server for _, record in account._log.records("a process")]

        assert open_outages() == ["redis"]
        assert in_child(open_outages) == ["redis"]
        for node in cluster.nodes:
            node.start()
        eventually(lambda: redis.breaker.closed)

        def ended() -> bool:
            account.flush()
            return any(not each.node and each.ended is not None for each in account.outages(*ALWAYS))

        eventually(ended)

    def test_a_child_tells_of_the_open_breakers_of_its_parent(self, gov: GovRedis, cluster: RedisCluster) -> None:
        lost = cluster.nodes[0]
        gov.internal.account.flush()
        lost.kill()
        notice(gov, lost)

        def nodes() -> list[str]:
            return [record.server for _, record in gov.internal.account._log.records("child")]

        assert in_child(nodes) == [f"redis@{address(lost)}"]
        lost.start()


class TestAccount:
    def test_latencies_stay_where_a_node_leaves(self, redis_binary: str, make_gov: MakeGov) -> None:
        with RedisCluster(replicas=0, binary=redis_binary) as group:
            gov = make_gov(redis_url=group.url)
            redis = gov.internal.context.redis
            assert redis is not None
            latencies = NodeLatencies(redis)
            assert sum(latencies.read().buckets) == 0, "nobody has asked for the nodes yet"
            extra = group.add_master()
            group.move_slots([0, 1], extra)
            redis.call("GET", next(f"k{n}" for n in range(99_999) if slots.slot_of(f"k{n}") < 2))
            (joined,) = [node for node in redis.nodes() if node.name.endswith(address(extra))]
            for _ in range(50):
                joined.call("PING")
            before = sum(latencies.read().buckets)
            assert before >= 50
            group.move_slots([0, 1], group.nodes[0])
            group.remove_master(extra)
            redis._topology.refresh()  # type: ignore[attr-defined]
            assert joined not in redis.nodes()
            assert sum(latencies.read().buckets) >= before
            assert joined not in latencies._nodes, "else a node is kept for each address that ever was"

    def test_a_node_that_never_had_slots_is_not_kept(self, gov: GovRedis) -> None:
        redis = gov.internal.context.redis
        assert redis is not None
        redis.nodes()
        latencies = NodeLatencies(redis)
        topology = redis._topology  # type: ignore[attr-defined]
        other = topology.node(("127.0.0.1", free_port()))
        topology.refresh()
        assert other.retired
        latencies.read()
        assert set(latencies._nodes) == set(redis.nodes())

    def test_it_is_told_while_another_node_is_away(self, gov: GovRedis, cluster: RedisCluster) -> None:
        account, keys = gov.internal.account, gov.internal.context.keys
        lost = other_than(cluster, f"{{{keys.account()}}}")
        account.flush()
        lost.kill()
        notice(gov, lost)
        gov.counters.add("test.a", 3)
        account.flush()
        assert account.totals().counts["test.a"] == 3
        lost.start()

    def test_nothing_is_lost_or_told_twice_while_its_node_is_away(
        self, make_gov: MakeGov, cluster: RedisCluster, eventually: Eventually
    ) -> None:
        apart = (f"p{n}:" for n in range(100) if len({node_of(cluster, tag(f"p{n}:", kind)) for kind in KINDS}) == 2)
        gov = make_gov(redis_url=cluster.url, key_prefix=next(apart))
        context, account = gov.internal.context, gov.internal.account
        lost = node_of(cluster, f"{{{context.keys.account()}}}")
        redis = context.redis
        assert redis is not None
        gov.counters.add("test.a", 1)
        account.flush()
        lost.kill()
        notice(gov, lost)
        gov.counters.add("test.a", 3)
        agents = (f"a{n}" for n in range(100))
        agent = next(each for each in agents if node_of(cluster, context.keys.rate_limit("default", each)) is not lost)
        assert [gov.limits.hit(agent, "1/hour").allowed for _ in range(2)] == [True, False]
        account.flush()  # each alone: there may be new connections, whose servers do not know the scripts
        for times in 2, 3:
            assert not gov.limits.hit(agent, "1/hour").allowed
            assert account.has_pending()
            account.flush()  # both in one exchange
            assert [(each.identity, each.times) for each in gov.limits.most_denied()] == [(agent, times)], "once"
            assert account.problem is None, "a node that is away refuses nothing"
        lost.start()
        eventually(lambda: redis.at(context.keys.account()).breaker.closed)
        account.flush()
        assert account.totals().counts["test.a"] == 4
        assert account.totals().counts["limits.denied"] == 3
        assert [(each.identity, each.times) for each in gov.limits.most_denied()] == [(agent, 3)]

    def test_the_latencies_are_of_all_nodes(self, gov: GovRedis, cluster: RedisCluster) -> None:
        redis = gov.internal.context.redis
        assert redis is not None
        for node in redis.nodes():
            for _ in range(10):
                node.call("PING")
        account = gov.internal.account
        account.flush()
        assert account.totals().latencies["redis"].count >= 30


def test_the_command_shows_the_nodes(cluster: RedisCluster) -> None:
    env = {"REDIS_URL": cluster.url, "GOVREDIS_SOCKET_TIMEOUT": "10", "GOVREDIS_CONNECT_TIMEOUT": "10"}
    shown = CliRunner().invoke(main, ["health"], env=env)
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.partition("NODE ")[2].splitlines()]
    assert {line[0]: line[1] for line in lines[1:]} == {address(node): "pass" for node in cluster.nodes}


def test_prometheus_has_the_time_that_each_primary_is_away(gov: GovRedis, cluster: RedisCluster) -> None:
    lost = cluster.nodes[0]
    check_of(gov)
    lost.kill()
    notice(gov, lost)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in GovRedisCollector(gov).collect()
        for sample in metric.samples
    }
    assert found["govredis_breaker_open", "redis"] == 1
    away = {node: found["govredis_node_away_seconds", address(node)] for node in cluster.nodes}
    assert found["govredis_away_seconds", "redis"] >= away[lost] > 0
    assert [away[node] for node in cluster.nodes[1:]] == [0, 0]
    lost.start()


def test_the_figures_of_nodes_are_not_kept_in_the_history(gov: GovRedis) -> None:
    gov.health.snapshot()
    (point,) = gov.health.history()
    assert point.values["redis.keys"] >= 0
    assert not any(name.startswith("redis.nodes") for name in point.values)


def test_servers_are_asked_at_once() -> None:
    met = threading.Barrier(3)

    def wait() -> int:
        return met.wait(60)  # for the two others

    assert sorted(at_once([wait, wait, wait])) == [0, 1, 2]
    assert at_once([]) == []
    with pytest.raises(ZeroDivisionError):
        at_once([lambda: 1.0, lambda: 1 / 0])
