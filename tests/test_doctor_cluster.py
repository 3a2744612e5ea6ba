"""`govredis doctor` on a Cluster, and on the primary of Sentinels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from govredis import Config
from govredis._commands._doctor import _cluster
from govredis._commands._doctor._servers import Measured
from govredis.cli import main
from govredis.client import slots
from govredis.testing.servers import RedisCluster, RedisSentinel, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

Found = list[tuple[str, str, str]]
Ask = Callable[..., dict[str, Found]]
#: Notes of every deployment without PostgreSQL and without persistence.
EVERYWHERE = {"postgres", "persistence"}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Its faults and notes: what each is about, what is wrong, and the remedy. The faults' reasons, and the facts."""
    for field in Config.__dataclass_fields__.values():
        if field.metadata["variable"] is not None:
            monkeypatch.delenv(field.metadata["variable"], raising=False)
    patient = {f"GOVREDIS_{what}_TIMEOUT": "10" for what in ("SOCKET", "CONNECT", "POSTGRES")}
    base = {"GOVREDIS_LOCK_FOLDER": str(tmp_path / "locks"), "REDIS_LOCK_TIMEOUT": "60", **patient}

    def asked(url: str, *args: str) -> dict[str, Found]:
        done = CliRunner().invoke(main, ["doctor", "--json", *args], env={**base, "REDIS_URL": url})
        assert isinstance(done.exception, SystemExit | None), done.exception
        found = json.loads(done.stdout)
        assert done.exit_code == bool(found["faults"])
        for each in found["faults"]:
            assert each["what"] and each["why"] and each["change"], each
        listed: dict[str, Found] = {
            kind: [(each["about"], each["what"], each["change"]) for each in found[kind]]
            for kind in ("faults", "notes")
        }
        listed["whys"] = [(each["about"], each["why"], "") for each in found["faults"]]
        listed["facts"] = [(each["about"], each["seen"], "") for each in found["facts"]]
        return listed

    return asked


@pytest.fixture(scope="module")
def _cluster_of_six(redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(binary=redis_binary) as started:
        yield started


@pytest.fixture
def cluster(_cluster_of_six: RedisCluster) -> RedisCluster:
    """With the settings that a doctor likes."""
    for node in _cluster_of_six.nodes:
        configure(node, **WELL)
    return _cluster_of_six


WELL = {
    "cluster-require-full-coverage": "no",
    "min-replicas-to-write": "1",
    "min-replicas-max-lag": "10",
}


def configure(node: RedisServer, **settings: Any) -> None:
    node.command("CONFIG", "SET", *(word for pair in settings.items() for word in pair))


def address(node: RedisServer) -> str:
    return f"127.0.0.1:{node.port}"


def told_of(node: RedisServer, port: int) -> bool:
    return any(place[1] == port for _, _, *places in node.command("CLUSTER", "SLOTS") for place in places)


def about(found: Found, *names: str) -> list[str]:
    return [what for name, what, _ in found if name in names]


def test_nothing_is_wrong_with_a_cluster_that_is_well(ask: Ask, cluster: RedisCluster) -> None:
    said = ask(cluster.url)
    assert said["faults"] == []
    assert {name for name, *_ in said["notes"]} <= EVERYWHERE
    assert about(said["facts"], "cluster") == ["3 primaries, 3 replicas"]
    servers = about(said["facts"], "redis")
    assert len(servers) == 3
    assert all(any(address(node) in seen for seen in servers) for node in cluster.nodes[:3])
    assert len(about(said["facts"], "acl")) == 1, "all nodes say the same"


def test_a_cluster_that_stops_as_a_whole_is_noted(ask: Ask, cluster: RedisCluster) -> None:
    configure(cluster.nodes[1], **{"cluster-require-full-coverage": "yes"})
    (what,) = about(ask(cluster.url)["notes"], "cluster")
    assert what == f"cluster-require-full-coverage is yes: {address(cluster.nodes[1])}"


@pytest.mark.parametrize("setting", ["min-replicas-to-write", "min-replicas-max-lag"])
def test_a_primary_that_takes_writes_alone_is_noted(ask: Ask, cluster: RedisCluster, setting: str) -> None:
    configure(cluster.nodes[2], **{setting: "0"})
    ((_, what, change),) = [each for each in ask(cluster.url)["notes"] if each[0] == "replication"]
    assert what == f"min-replicas-to-write or min-replicas-max-lag is 0: {address(cluster.nodes[2])}"
    assert "set min-replicas-to-write 1" in change


def test_the_primary_of_sentinels_likewise(ask: Ask, redis_binary: str) -> None:
    with RedisSentinel(binary=redis_binary) as group:
        (what,) = about(ask(group.url)["notes"], "replication")
        assert what == "min-replicas-to-write or min-replicas-max-lag is 0: the primary"
        configure(group.master, **{"min-replicas-to-write": "1"})
        assert about(ask(group.url)["notes"], "replication") == []


def test_a_sentinel_that_hangs_is_a_fault(ask: Ask, redis_binary: str) -> None:
    with RedisSentinel(binary=redis_binary) as group:
        assert about(ask(group.url)["faults"], "sentinels") == []
        hung = group.sentinel_servers[1]
        hung.pause()
        ((_, what, change),) = [each for each in ask(group.url)["faults"] if each[0] == "sentinels"]
        assert what == f"no answer, or a refusal, from 1 of 3 Sentinels: 127.0.0.1:{hung.port}"
        assert change.startswith("start them, or correct their addresses")
        shown = CliRunner().invoke(main, ["health", "--json"], env={"REDIS_URL": group.url})
        assert "sentinels" in json.loads(shown.stdout)["checks"], "in the first report of a process, too"
        hung.resume()


def test_a_redis_alone_has_no_replicas_to_wait_for(ask: Ask, redis_server: RedisServer) -> None:
    assert {name for name, *_ in ask(redis_server.url)["notes"]} <= EVERYWHERE


def test_rights_are_tried_at_each_node(ask: Ask, cluster: RedisCluster) -> None:
    rules = "on", "nopass", "~*", "+@all"
    for node in cluster.nodes:
        node.command("ACL", "SETUSER", "app", *rules, *(["-get"] if node is cluster.nodes[1] else []))
    said = ask(cluster.url.replace("://", "://app:x@"))
    assert about(said["faults"], "acl") == [f"{address(cluster.nodes[1])}: the user app lacks +get"]


def test_slots_and_replicas_that_are_missing(ask: Ask, redis_binary: str) -> None:
    with RedisCluster(replicas=0, binary=redis_binary, config=["cluster-require-full-coverage no"]) as group:
        alone = ", ".join(sorted(address(node) for node in group.nodes))
        assert f"primaries without a replica that lives: {alone}" in about(ask(group.url)["notes"], "cluster")
        for node in group.nodes:
            node.command("CLUSTER", "DELSLOTS", 7, 100, 101)
        assert about(ask(group.url)["faults"], "cluster") == ["no node has the slots 7, 100-101"]
        for node in group.nodes:
            node.command("CLUSTER", "SETSLOT", 7, "NODE", group.nodes[0].command("CLUSTER", "MYID"))


def test_a_slot_that_was_left_half_moved_is_noted(ask: Ask, cluster: RedisCluster) -> None:
    source, target = cluster.nodes[:2]
    source.command("CLUSTER", "SETSLOT", 5, "MIGRATING", target.command("CLUSTER", "MYID"))
    try:
        assert about(ask(cluster.url)["notes"], "cluster") == ["half moved: the slots 5"]
    finally:
        source.command("CLUSTER", "SETSLOT", 5, "STABLE")


def test_an_announced_address_that_is_not_reached_is_a_fault(
    ask: Ask, redis_binary: str, eventually: Callable[..., Any]
) -> None:
    with RedisCluster(replicas=0, binary=redis_binary) as group:
        wrong = group.nodes[2]
        configure(wrong, **{"cluster-announce-port": "1"})
        eventually(lambda: all(told_of(node, 1) for node in group.nodes))  # the client believes any of them
        faults = ask(group.url)["faults"]
        (what,) = about(faults, "addresses")
        assert what == "the Cluster announces 127.0.0.1:1, and this host does not reach it"
        assert len(about(faults, "redis")) == 1


def test_a_replica_that_is_not_reached_is_a_fault(ask: Ask, redis_binary: str, eventually: Callable[..., Any]) -> None:
    with RedisCluster(binary=redis_binary) as group:
        wrong = group.nodes[5]
        configure(wrong, **{"cluster-announce-port": "1"})
        eventually(lambda: all(told_of(node, 1) for node in group.nodes[:3]))
        ((_, what, change),) = [each for each in ask(group.url)["faults"] if each[0] == "addresses"]
        assert what.startswith("the Cluster announces a replica at 127.0.0.1:1 (")
        assert "cluster-announce-ip" in change


def test_a_node_that_is_away_is_a_fault_and_the_others_are_looked_at(ask: Ask, redis_binary: str) -> None:
    with RedisCluster(replicas=0, binary=redis_binary, config=["cluster-require-full-coverage no"]) as group:
        group.nodes[1].kill()
        said = ask(group.url)
        ((_, what, change),) = [each for each in said["faults"] if each[0] == "redis"]
        assert f"1 of 3 nodes are away: Redis at {address(group.nodes[1])} is away: " in what
        assert change == "start the redis-server that is away, or give its slots to another node"
        assert (
            "redis",
            "calls for keys of such a node take their fallback, or fail where there is none",
            "",
        ) in said["whys"]
        assert len(about(said["facts"], "redis")) == 2


def test_clocks_of_primaries_that_differ_are_a_fault() -> None:
    def said(*ahead: float, trip: float = 0.001) -> list[str]:
        measured = {f"n{n}": Measured(trip, each) for n, each in enumerate(ahead)}
        return [each.what for each in _cluster.of_clocks(measured)]

    assert said(5.0, 5.05, 5.09) == []
    assert said(5.0, 5.2, 5.1) == ["the clock of n1 is 0.2 s ahead of that of n0"]
    assert said(5.0, 5.2, trip=0.2) == [], "nobody knows"


def test_slots_are_named_by_ranges() -> None:
    assert _cluster._ranges({1, 2, 3, 7}) == "1-3, 7"
    assert _cluster._ranges(set(range(0, slots.SLOTS, 2))).endswith(", ...")
