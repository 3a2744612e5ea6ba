"""Redis servers: one alone, a Cluster, and a master with replicas and Sentinels."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from ._base_server import Managed, Server, StrPath, until
from ._binaries import ServerError, find_redis


class RedisServer(Server):
    """A redis-server.

    Args:
        folder: where its files go; a temporary folder, removed on close, without. One server per folder.
        binary: the redis-server to run; `find_redis()` without.
        unix_socket: listen on `folder`/redis.sock only, and on no port.
        port: the port on 127.0.0.1; a free one without.
        config: further lines of redis.conf, such as "maxmemory 10mb".
        persistent: append every write to a file before it is acknowledged, so that data survives `kill()`; costs a
            system call per write. Without it nothing is written, and a restarted server is empty.
    """

    _name = "redis-server"
    _options: Sequence[str] = ()

    def __init__(
        self,
        folder: StrPath | None = None,
        *,
        binary: StrPath | None = None,
        unix_socket: bool = False,
        port: int | None = None,
        config: Iterable[str] = (),
        persistent: bool = False,
    ) -> None:
        self._binary = os.path.abspath(binary or find_redis())
        self._unix_socket, self._config = unix_socket, list(config)
        super().__init__(folder, port=0 if unix_socket else port, persistent=persistent)
        if len(os.fsencode(self._socket)) > 100 and unix_socket:
            self.close()
            raise ValueError(f"too long for the path of a unix socket: {self._socket}")

    @property
    def _socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0 or unix:///PATH?db=0."""
        return f"unix://{quote(str(self._socket))}?db=0" if self._unix_socket else f"redis://127.0.0.1:{self.port}/0"

    def command(self, *args: str | bytes | float) -> Any:
        """Run one command on a connection of its own, 30 s at most; the decoded reply. Raises redis-py's errors."""
        with redis.Redis.from_url(self.url, protocol=2, decode_responses=True, socket_timeout=30) as client:
            return client.execute_command(*args)

    def _prepare(self) -> None:
        self._data.mkdir(exist_ok=True)
        if self._fixed and self._pid:  # a restart: Sentinel and CONFIG REWRITE keep what they know in this file
            return
        # AOF without fsync: what is written outlives the process, and only a crash of the machine would lose it.
        aof = ["appendonly yes", "appendfsync no", "auto-aof-rewrite-percentage 0"] if self.persistent else []
        lines = [
            f"port {self.port}", "bind 127.0.0.1", f'dir "{self._data}"', 'save ""', "repl-diskless-sync-delay 0",
            f'cluster-config-file "{self.folder}/nodes.conf"',  # who it is in a Cluster outlives its data
            *([f'unixsocket "{self._socket}"'] if self._unix_socket else []), *aof, *self._config,
        ]  # fmt: skip
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _argv(self) -> list[str]:
        return [self._binary, str(self.folder / "redis.conf"), *self._options]

    def _ready(self) -> bool:
        reply = b""
        with contextlib.suppress(OSError), socket.socket(*[socket.AF_UNIX] * self._unix_socket) as client:
            client.settimeout(1)
            client.connect(str(self._socket) if self._unix_socket else ("127.0.0.1", self.port))
            # INFO is answered while the data is still being loaded; PING is not.
            client.sendall(b"INFO server\r\nPING\r\n")
            while not re.search(rb"^[+-].*\r\n", reply, re.MULTILINE) and (chunk := client.recv(65536)):
                reply += chunk
        ours = b"\nprocess_id:%d\r" % self._pid in reply
        return reply.startswith(b"-NOAUTH") or (ours and b"\n-LOADING" not in reply)


class _Group(Managed):
    """Several servers that make one service. `servers`: all of them."""

    def __init__(self, binary: StrPath | None) -> None:
        self._binary = binary or find_redis()
        self.servers: list[RedisServer] = []

    def _add(self, kind: type[RedisServer], config: Iterable[str]) -> RedisServer:
        self.servers.append(kind(binary=self._binary, config=config))
        return self.servers[-1].start()

    def close(self) -> None:
        """End all its servers and remove their temporary folders. Idempotent."""
        for server in self.servers:
            server.close()


class RedisCluster(_Group):
    """A Redis Cluster on 127.0.0.1 with temporary folders: `masters` masters, each with `replicas` replicas.

    Args:
        masters, replicas: how many; a Cluster elects by majority, hence 3 or more masters.
        binary: the redis-server to run; `find_redis()` without.
        config: further lines of every node's redis.conf.

    `nodes`: its RedisServers, the masters (as of the start) first. A node is taken to be down after 1 s.
    """

    def __init__(
        self, masters: int = 3, replicas: int = 1, *, binary: StrPath | None = None, config: Iterable[str] = ()
    ) -> None:
        if masters < 1 or replicas < 0:
            raise ValueError(f"a Cluster of {masters} masters with {replicas} replicas each")
        super().__init__(binary)
        self._masters, self._size = masters, masters * (1 + replicas)
        self._config = ["cluster-enabled yes", "cluster-node-timeout 1000", "cluster-announce-ip 127.0.0.1", *config]

    @property
    def nodes(self) -> list[RedisServer]:
        """Its servers; the first ones were started as masters."""
        return self.servers

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0 of the first node that runs; a Cluster client finds the others."""
        return next((node for node in self.nodes if node.running), self.nodes[0]).url

    def start(self) -> RedisCluster:
        """Start it and return it once every node calls the Cluster ok, slots covered, replicas in step (about 2 s)."""
        if self.nodes:
            return self
        for _ in range(self._size):
            self._add(RedisServer, self._config)
        masters = self.nodes[: self._masters]
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for other in self.nodes[:number]:
                node.command("CLUSTER", "MEET", "127.0.0.1", other.port)
        for number, node in enumerate(masters):
            first, end = (16384 * n // len(masters) for n in (number, number + 1))
            node.command("CLUSTER", "ADDSLOTS", *range(first, end))
        until("the Cluster's nodes did not meet", lambda: all(map(self._met, self.nodes)), self.nodes)
        for number, node in enumerate(self.nodes[self._masters :]):
            node.command("CLUSTER", "REPLICATE", masters[number % len(masters)].command("CLUSTER", "MYID"))
        until("the Cluster did not come up", lambda: all(map(self._settled, self.nodes)), self.nodes)
        return self

    def _met(self, node: RedisServer) -> bool:
        known = node.command("CLUSTER", "NODES")
        return bool(known.count(" connected") == self._size and "handshake" not in known)

    def _settled(self, node: RedisServer) -> bool:
        info, (role, *state) = node.command("CLUSTER", "INFO"), node.command("ROLE")
        roles = re.findall(r"[ ,](master|slave) ", node.command("CLUSTER", "NODES"))
        return (
            "cluster_state:ok" in info
            and "cluster_slots_ok:16384" in info
            and roles.count("master") == self._masters
            and len(roles) == self._size
            and (role == "master" or state[2] == "connected")
        )


class _Sentinel(RedisServer):
    _name = "redis-sentinel"
    _options = ("--sentinel",)


class RedisSentinel(_Group):
    """A Redis master with two replicas, watched by three Sentinels, on 127.0.0.1 with temporary folders.

    Args:
        binary: the redis-server to run; `find_redis()` without.
        master_name: what the Sentinels call the master.
        config: further lines of the data servers' redis.conf.

    The master is taken to be down after 0.5 s; a failover takes 1 to 3 s.
    """

    def __init__(
        self, *, binary: StrPath | None = None, master_name: str = "mymaster", config: Iterable[str] = ()
    ) -> None:
        super().__init__(binary)
        self.master_name: str = master_name
        self._config = list(config)

    @property
    def nodes(self) -> list[RedisServer]:
        """The three data servers; the first was started as the master."""
        return self.servers[:3]

    @property
    def sentinel_servers(self) -> list[RedisServer]:
        """The servers of the three Sentinels."""
        return self.servers[3:]

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """Host and port of the three Sentinels."""
        return [("127.0.0.1", server.port) for server in self.sentinel_servers]

    @property
    def master(self) -> RedisServer:
        """The data server that the Sentinels call the master now."""
        for sentinel in filter(lambda server: server.running, self.sentinel_servers):
            _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master_name)
            return next(node for node in self.nodes if node.port == int(port))
        raise ServerError("no Sentinel runs")

    @property
    def replicas(self) -> list[RedisServer]:
        """The other data servers."""
        master = self.master
        return [node for node in self.nodes if node is not master]

    def start(self) -> RedisSentinel:
        """Start it and return it once every Sentinel knows both replicas and the two other Sentinels (about 2 s)."""
        if self.servers:
            return self
        master = self._add(RedisServer, self._config)
        for _ in range(2):
            self._add(RedisServer, [f"replicaof 127.0.0.1 {master.port}", *self._config])
        until("the replicas did not connect", lambda: len(master.command("ROLE")[2]) == 2, self.nodes)
        watch = [
            f"sentinel monitor {self.master_name} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {self.master_name} 500",
            f"sentinel failover-timeout {self.master_name} 3000",
        ]
        for _ in range(3):
            self._add(_Sentinel, watch)
        until("the Sentinels did not meet", lambda: all(map(self._settled, self.sentinel_servers)), self.servers)
        return self

    def _settled(self, sentinel: RedisServer) -> bool:
        reply = sentinel.command("SENTINEL", "MASTER", self.master_name)
        state = dict(zip(reply[::2], reply[1::2], strict=True))
        return (state["num-slaves"], state["num-other-sentinels"], state["flags"]) == ("2", "2", "master")
