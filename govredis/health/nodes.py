"""The nodes of Redis, as health tells of them."""

from __future__ import annotations

import threading

from .._histogram import Histogram
from ..client import RedisClient, RedisNode


def address_in(redis: RedisClient, node: RedisNode) -> str:
    """Host and port of a primary in a Cluster; "" for a server that is alone."""
    return "" if node is redis else node.name.partition(" at ")[2] or node.name


class NodeLatencies:
    """How long the round trips of this process to all nodes took, those to nodes that have left the Cluster too."""

    def __init__(self, redis: RedisClient) -> None:
        self._nodes: list[RedisNode] = []
        self.renew()
        redis.on_node(self._joined)

    def renew(self) -> None:
        """For a forked child, which tells of its own calls alone."""
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._left = Histogram()

    def _joined(self, node: RedisNode) -> None:
        with self._lock:
            self._nodes = [*self._nodes, node]

    def read(self) -> Histogram:
        """The sums. Asks no server."""
        found = Histogram()
        with self._lock:
            retired = [node for node in self._nodes if node.retired]
            self._nodes = [node for node in self._nodes if node not in retired]
            for node in retired:
                _add(self._left, node.latency)
            for each in (self._left, *(node.latency for node in self._nodes)):
                _add(found, each)
        return found


def _add(sums: Histogram, more: Histogram) -> None:
    sums.buckets = [mine + other for mine, other in zip(sums.buckets, more.buckets, strict=True)]
    sums.seconds += more.seconds
