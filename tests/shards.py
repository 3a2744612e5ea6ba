"""Shards: a Cluster whose nodes a test kills and restarts, and keys by the node that has them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from support import client_of, eventually

from govredis import GovRedis
from govredis.client import slot_of
from govredis.testing.servers import RedisCluster, RedisServer

#: No replicas, so that a node which is killed stays away. Data survives a kill.
SHAPE = {
    "masters": 3,
    "replicas": 0,
    "config": [
        "cluster-require-full-coverage no",
        "appendonly yes",
        "appendfsync always",
        "cluster-node-timeout 60000",
    ],
}

#: The same, with a replica for each master, which takes its place a second later.
FAILING_OVER = {"config": ["cluster-require-full-coverage no", "appendonly yes"]}


class Shards:
    """Three masters without replicas."""

    def __init__(self, cluster: RedisCluster) -> None:
        self.cluster = cluster
        self.url = cluster.url
        by_port = {node.port: node for node in cluster.nodes}
        #: First slot, last slot, and the node that has them: as it was in the beginning.
        self._ranges = [
            (first, last, by_port[owner[1]]) for first, last, owner in cluster.nodes[0].command("CLUSTER", "SLOTS")
        ]

    def node(self, key: str) -> RedisServer:
        slot = slot_of(key)
        return next(node for first, last, node in self._ranges if first <= slot <= last)

    def ids(self, key_of: Callable[[str], str], prefix: str = "id") -> list[str]:
        """An id for each node, in the order of `nodes`, whose key is there."""
        found: dict[int, str] = {}
        for number in itertools.count():
            identity = f"{prefix}{number}"
            found.setdefault(self.cluster.nodes.index(self.node(key_of(identity))), identity)
            if len(found) == len(self.cluster.nodes):
                return [found[n] for n in sorted(found)]
        raise AssertionError

    def start(self, node: RedisServer) -> None:
        """Start a node that was killed. It serves once it has heard of the others again."""
        node.start()
        eventually(lambda: "cluster_state:ok" in node.command("CLUSTER", "INFO"))

    def revive(self) -> None:
        """All nodes run, and are empty."""
        for node in self.cluster.nodes:
            self.start(node)
            node.command("FLUSHALL")
            node.command("SCRIPT", "FLUSH")


def closed(gov: GovRedis, keys: Iterable[str]) -> None:
    """Wait until the nodes of these keys are used again."""
    client = client_of(gov)
    for key in keys:
        eventually(lambda key=key: client.at(key).breaker.closed)  # type: ignore[misc]
