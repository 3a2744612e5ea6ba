"""The cost of a Cluster's client beside that of the same node alone: the same server, the same keys, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis
from redis.cluster import RedisCluster as PeersClient

from govredis import Config
from govredis.client import Script, connect
from govredis.testing.servers import RedisCluster

from .samples import figure, ratio
from .sites import PATIENT

OURS, OURS_ALONE = "govredis, on a Cluster", "govredis, on the node alone"
PEER, PEER_ALONE = "redis-py, RedisCluster", "redis-py, on the node alone"
#: Keys in a pipeline over all nodes.
AT_ONCE = 300
#: Such pipelines in a turn.
_FEW = 3
SCRIPT = Script("govredis.outbox", "look.lua")

Calls = dict[str, dict[str, Callable[[], object]]]


def measure(rounds: int, turn: int) -> dict[str, Any]:
    """By operation and contestant: the figures, and the ratio of its CPU to that on the node alone."""
    with RedisCluster(replicas=0) as cluster:
        client = connect(Config(redis_url=cluster.url, **PATIENT))
        client.call("SET", "bench", "v")
        node = client.at("bench")
        port = int(node.name.rpartition(":")[2])
        with redis.Redis(port=port) as alone, PeersClient(host="127.0.0.1", port=port) as peer:
            alone.script_load(SCRIPT.source)
            many = [("GET", f"bench-{n}") for n in range(AT_ONCE)]

            def peers_pipeline() -> object:
                pipeline = peer.pipeline()
                for _, key in many:
                    pipeline.get(key)
                return pipeline.execute()

            calls: Calls = {
                "GET": {
                    OURS: lambda: client.call("GET", "bench"),
                    OURS_ALONE: lambda: node.call("GET", "bench"),
                    PEER: lambda: peer.get("bench"),
                    PEER_ALONE: lambda: alone.get("bench"),
                },
                "a script": {
                    OURS: lambda: client.run(SCRIPT, ("bench",)),
                    OURS_ALONE: lambda: node.run(SCRIPT, ("bench",)),
                    PEER: lambda: peer.evalsha(SCRIPT.sha, 1, "bench"),
                    PEER_ALONE: lambda: alone.evalsha(SCRIPT.sha, 1, "bench"),
                },
                f"{AT_ONCE} GETs in a pipeline": {OURS: lambda: client.pipeline(many), PEER: peers_pipeline},
            }
            found = {name: _in_turns(by, rounds, turn if len(by) > 2 else _FEW) for name, by in calls.items()}
        client.close()
    return found


def _in_turns(by: dict[str, Callable[[], object]], rounds: int, turn: int) -> dict[str, Any]:
    client: dict[str, list[float]] = {who: [] for who in by}
    wall: dict[str, list[float]] = {who: [] for who in by}
    for _ in range(rounds):
        for who, call in by.items():
            began, used = time.perf_counter_ns(), time.process_time_ns()
            for _ in range(turn):
                call()
            client[who].append((time.process_time_ns() - used) / 1000 / turn)
            wall[who].append((time.perf_counter_ns() - began) / 1000 / turn)
    found: dict[str, Any] = {}
    for who in by:
        found[who] = {"wall_us": figure(wall[who]), "client_us": figure(client[who])}
        base = {OURS: OURS_ALONE, PEER: PEER_ALONE}.get(who)
        if base in by:
            found[who]["to_one"] = ratio(client[who], client[base])
    return found
