"""Two hosts that a test cuts off from each other, while the test itself reaches both: network namespaces at one bridge.

They need root, and `ip` of Debian's package iproute2. Packets over the cut are lost without a word, as in a switch that
fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import shutil
import socket
import subprocess
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
from support import PATIENCE, Child, eventually

from govredis import Config, GovRedis
from govredis.client import slot_of
from govredis.testing.servers import RedisServer

_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def _ip(*arguments: str) -> None:
    done = subprocess.run([str(_find_ip()), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _find_ip() -> str | None:
    return shutil.which("ip", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


class Host:
    """A namespace as a host at the bridge."""

    def __init__(self, stack: contextlib.ExitStack, bridge: str, address: str) -> None:
        self.address, number = address, next(_numbers)
        self.name, self.link = f"govredis{os.getpid()}-{number}", f"gr{os.getpid()}-{number}"
        _ip("netns", "add", self.name)
        stack.callback(_ip, "netns", "del", self.name)
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        stack.callback(_ip, "link", "del", self.link)  # a packet that nobody takes keeps the namespace for a while
        _ip("link", "set", self.link, "master", bridge, "up")
        for link in "lo", "eth0":
            _ip("-n", self.name, "link", "set", link, "up")
        _ip("-n", self.name, "addr", "add", f"{address}/24", "dev", "eth0")

    def enter(self) -> None:
        """From now on this thread, and all that it starts, is on this host."""
        with open(f"/run/netns/{self.name}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")


class Network:
    """The hosts `old`, of the old primary, and `rest`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        # An address for tests (RFC 2544). Two runs at once have different ones.
        bridge, net = f"gr{os.getpid()}", f"198.18.{os.getpid() % 250 + 1}"
        try:
            _ip("link", "add", bridge, "type", "bridge")
            stack.callback(_ip, "link", "del", bridge)
            _ip("addr", "add", f"{net}.1/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            self.old, self.rest = (Host(stack, bridge, f"{net}.{place}") for place in (2, 3))
        except OSError as error:  # a container may forbid any of it
            pytest.skip(f"needs root, and Debian's iproute2: {error}")

    def cut(self) -> None:
        self._isolate("on")

    def heal(self) -> None:
        self._isolate("off")

    def _isolate(self, how: str) -> None:
        """Isolated ports of a bridge reach the bridge itself, and not each other."""
        for host in self.old, self.rest:
            _ip("link", "set", host.link, "type", "bridge_slave", "isolated", how)


class ServerOnHost(RedisServer):
    """A RedisServer on a host of the network."""

    def __init__(self, host: Host, config: list[str], binary: str) -> None:
        self.host = host
        super().__init__(binary=binary, config=[f"bind {host.address}", "protected-mode no", *config])

    @property
    def address(self) -> tuple[str, int]:
        return self.host.address, self.port

    @property
    def url(self) -> str:
        return f"redis://{self.host.address}:{self.port}/0"

    def _connect(self, seconds: float = 1) -> socket.socket:
        return socket.create_connection(self.address, seconds)

    def _argv(self) -> list[str]:
        return [str(_find_ip()), "netns", "exec", self.host.name, *super()._argv()]


class SentinelOnHost(ServerOnHost):
    _name = "redis-sentinel"
    _options = ("--sentinel",)


class Split:
    """Servers on both hosts: `old` is the primary on the old host, which the test cuts off.

    Attributes:
        url: for processes anywhere, though those on the old host cannot reach all of it while it is cut off.
    """

    url: str
    old: ServerOnHost

    def __init__(self, stack: contextlib.ExitStack, binary: str, config: tuple[str, ...]) -> None:
        self.network = Network(stack)
        self._stack, self._binary, self._config = stack, binary, config
        self.start()

    def start(self) -> None:
        raise NotImplementedError

    def new_primary(self) -> ServerOnHost | None:
        """The server in the old one's place, by the word of the rest."""
        raise NotImplementedError

    def id_on_old(self, key_of: Callable[[str], str], prefix: str) -> str:
        """An id whose key the old primary has."""
        raise NotImplementedError

    def cut(self) -> ServerOnHost:
        """Cut the old primary off; the new one, once the rest has made it the primary."""
        self.network.cut()
        found: Any = eventually(self.new_primary)
        eventually(lambda: found.command("ROLE")[0] == "master")
        assert self.old.command("ROLE")[0] == "master", "the old one knows of nothing"
        return found  # type: ignore[no-any-return]

    def heal(self) -> None:
        """End the partition. Returns once the old primary is a replica."""
        self.network.heal()
        eventually(lambda: self.old.command("ROLE")[0] == "slave")

    def add(self, host: Host, *config: str, kind: type[ServerOnHost] = ServerOnHost) -> ServerOnHost:
        server = kind(host, list(config), self._binary)
        self._stack.callback(server.close)
        return server.start()  # type: ignore[return-value]


class SentinelSplit(Split):
    """The primary with a Sentinel beside it; two replicas and two Sentinels are the rest, and a majority."""

    def start(self) -> None:
        here, there = self.network.old, self.network.rest
        self.old = self.add(here, *self._config)
        follow = f"replicaof {self.old.host.address} {self.old.port}"
        self._replicas = [self.add(there, follow, *self._config) for _ in range(2)]
        eventually(lambda: len(self.old.command("ROLE")[2]) == 2)
        watch = [
            f"sentinel monitor mymaster {self.old.host.address} {self.old.port} 2",
            "sentinel down-after-milliseconds mymaster 3000",
            "sentinel failover-timeout mymaster 3000",
        ]
        self.sentinels = [self.add(host, *watch, kind=SentinelOnHost) for host in (here, there, there)]
        eventually(lambda: all(map(self._knows_all, self.sentinels)))
        addresses = ",".join("{}:{}".format(*sentinel.address) for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{addresses}/mymaster"

    @staticmethod
    def _knows_all(sentinel: ServerOnHost) -> bool:
        said = sentinel.command("SENTINEL", "MASTER", "mymaster")
        state = dict(zip(said[::2], said[1::2], strict=True))
        return (state["num-slaves"], state["num-other-sentinels"], state["flags"]) == ("2", "2", "master")

    def named_by(self, sentinel: ServerOnHost) -> tuple[str, int]:
        host, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
        return host, int(port)

    def new_primary(self) -> ServerOnHost | None:
        named = self.named_by(self.sentinels[1])
        return next((replica for replica in self._replicas if replica.address == named), None)

    def id_on_old(self, key_of: Callable[[str], str], prefix: str) -> str:
        return prefix


class ClusterSplit(Split):
    """A master on the old host; its replica, and two masters more, are the rest, and a majority."""

    def start(self) -> None:
        here, there = self.network.old, self.network.rest
        lines = ["cluster-enabled yes", "cluster-node-timeout 3000", "cluster-require-full-coverage no", *self._config]
        self._nodes = [self.add(host, *lines) for host in (here, there, there, there)]
        self.old, self._other, another, self._replica = self._nodes
        for number, node in enumerate(self._nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.command("CLUSTER", "MEET", *self.old.address)
        for node, first, last in (self.old, 0, 5460), (self._other, 5461, 10922), (another, 10923, 16383):
            node.command("CLUSTER", "ADDSLOTS", *range(first, last + 1))
        eventually(lambda: all(self._sees(node, 4) for node in self._nodes))
        self._replica.command("CLUSTER", "REPLICATE", self.old.command("CLUSTER", "MYID"))
        eventually(lambda: len(self.old.command("ROLE")[2]) == 1)
        eventually(lambda: all(self._is_told(node) for node in self._nodes))
        self.url = "redis+cluster://" + ",".join("{}:{}".format(*node.address) for node in self._nodes)

    @staticmethod
    def _sees(node: ServerOnHost, count: int) -> bool:
        known = node.command("CLUSTER", "NODES")
        return bool(known.count(" connected") == count and "handshake" not in known)

    @staticmethod
    def _is_told(node: ServerOnHost) -> bool:
        """Does it know the owners of all slots, and the replica?"""
        ranges = node.command("CLUSTER", "SLOTS")
        return sorted(map(len, ranges)) == [3, 3, 4] and "cluster_state:ok" in node.command("CLUSTER", "INFO")

    def new_primary(self) -> ServerOnHost | None:
        owner = next(owner for first, _, owner, *_ in self._other.command("CLUSTER", "SLOTS") if first == 0)
        return self._replica if owner[1] == self._replica.port else None

    def id_on_old(self, key_of: Callable[[str], str], prefix: str) -> str:
        return next(each for each in (f"{prefix}{n}" for n in range(1000)) if slot_of(key_of(each)) <= 5460)


class Remote:
    """A process on a host, with a GovRedis of its own: `remote(function, *args)` is `function(gov, *args)` there."""

    def __init__(self, host: Host, settings: dict[str, Any]) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._child = Child(lambda: self._serve(theirs, host, settings))
        theirs.close()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self._ours.send((function, args))
        assert self._ours.poll(PATIENCE), f"it hangs: {function}"
        worked, value = self._ours.recv()
        assert worked, value
        return value

    def close(self) -> None:
        self._child.kill()
        self._ours.close()

    @staticmethod
    def _serve(connection: Connection, host: Host, settings: dict[str, Any]) -> None:
        host.enter()
        gov = GovRedis(Config(**settings))
        while True:
            function, args = connection.recv()
            try:
                told = True, function(gov, *args)
            except BaseException:  # noqa: BLE001 - for the test
                told = False, traceback.format_exc()
            connection.send(told)
