"""A Cluster in the place of the one RedisServer of the tests, and redis-py as somebody else who looks at it."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from govredis.testing.servers import RedisCluster, RedisServer

#: No replicas, so no failover: a machine that stalls costs no data.
SHAPE = {"masters": 3, "replicas": 0, "config": ["cluster-node-timeout 60000"]}
#: Commands in Redis's statistics that clients of a Cluster send of themselves.
_OF_CLIENTS = tuple(f"cmdstat_{name}" for name in ("cluster", "command", "asking", "client", "hello", "auth"))


class ClusterService:
    """In the place of a RedisServer. A command goes to the node of its key; one without a key to all nodes, summed.

    Attributes:
        url: by which govredis uses it.
    """

    def __init__(self, group: RedisCluster, url: str) -> None:
        self.group = group
        self.url = url

    @cached_property
    def plain(self) -> Any:
        return PlainCluster(self.group)

    def command(self, *args: str | bytes | float) -> Any:
        name, *rest = args
        whole = {"INFO": self.plain.info, "KEYS": self.plain.keys, "DBSIZE": self.plain.dbsize}
        return whole[name](*rest) if name in whole else self.plain.execute_command(*args)  # type: ignore[index]

    def flush(self) -> None:
        for node in self.group.nodes:
            flush_node(node)

    def close(self) -> None:
        if "plain" in vars(self):
            self.plain.close()


class PlainCluster(redis.RedisCluster):
    """redis-py on a Cluster. Without a key it asks or changes all nodes."""

    def __init__(self, group: RedisCluster) -> None:
        super().__init__(url=group.nodes[0].url, decode_responses=True)

    def keys(self, pattern: str = "*") -> list[str]:
        return list(self.execute_command("KEYS", pattern, target_nodes="primaries"))

    def dbsize(self) -> int:
        return int(super().dbsize(target_nodes="primaries"))

    def info(self, section: str = "default") -> dict[str, Any]:
        """Numbers are summed, also those of commands; else the last node's word."""
        whole: dict[str, Any] = {}
        for one in super().info(section, target_nodes="primaries").values():
            for name, value in one.items():
                if name.startswith(_OF_CLIENTS):
                    continue
                if isinstance(value, dict):
                    whole[name] = dict(Counter(whole.get(name, {})) + Counter(value))
                else:
                    whole[name] = whole.get(name, 0) + value if isinstance(value, (int, float)) else value
        return whole

    def config_resetstat(self) -> Any:
        return super().config_resetstat(target_nodes="primaries")

    def config_set(self, *args: Any) -> Any:
        return super().config_set(*args, target_nodes="primaries")


def flush_node(server: RedisServer) -> None:
    """Deletes all keys and scripts. A client of redis-py takes ten times as long to make as this."""
    password = unquote(urlsplit(server.url).password or "")
    commands = [*[f"AUTH {password}".encode()] * bool(password), b"FLUSHALL", b"SCRIPT FLUSH"]
    with server._connect(120) as connection:
        connection.sendall(b"".join(command + b"\r\n" for command in commands))
        reply = b""
        while reply.count(b"\r\n") < len(commands):
            received = connection.recv(1000)
            assert received, f"it ended after {reply!r}"
            reply += received
    assert reply == b"+OK\r\n" * len(commands), reply
