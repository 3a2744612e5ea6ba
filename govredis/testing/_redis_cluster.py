"""A Redis Cluster: started, resharded, failed over, and with nodes that join and leave."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis

from ._base_server import StrPath, until
from ._binaries import ServerError
from ._redis_servers import RedisServer, ServerGroup

SLOTS = 16384
_MIGRATED_AT_ONCE = 100  # keys
_FAILOVER_LASTS = 6.0  # seconds after which a CLUSTER FAILOVER that came to nothing is over


def _id(node: RedisServer) -> str:
    return str(node.command("CLUSTER", "MYID"))


def _view(node: RedisServer) -> str:
    """Its word of slots and replicas."""
    ranges = node.command("CLUSTER", "SLOTS")
    return str(sorted((first, last, master[1], sorted(r[1] for r in rest)) for first, last, master, *rest in ranges))


def _is_ok(node: RedisServer) -> bool:
    """Does it call the Cluster ok, and is its master's data its own?"""
    role, *state = node.command("ROLE")
    return "cluster_state:ok" in node.command("CLUSTER", "INFO") and (role == "master" or state[2] == "connected")


class _Move:
    """Moves slots to a node, over a connection to each master."""

    def __init__(self, cluster: RedisCluster, to: RedisServer) -> None:
        self._to, self._auth = to, cluster._auth
        self._clients = {node: node._client() for node in {*cluster.masters, to} if node.answers}
        self._ids = {node: _id(node) for node in self._clients}

    def begin(self, slot: int, source: RedisServer | None, keys: Sequence[str]) -> None:
        if source is self._to:
            return
        if source not in self._clients:
            raise ServerError(f"slot {slot} cannot be moved: its node, {source!r}, does not answer")
        self._set(self._to, slot, "IMPORTING", self._ids[source])
        self._set(source, slot, "MIGRATING", self._ids[self._to])
        self._migrate(source, keys)

    def finish(self, slot: int, source: RedisServer | None) -> None:
        if source is self._to or source is None:
            return
        while keys := self._clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, _MIGRATED_AT_ONCE):
            self._migrate(source, keys)
        # First the new owner: else, for a moment, no node would have the slot.
        for node in sorted(self._clients, key=lambda node: (node is not self._to, node is not source)):
            try:
                self._set(node, slot, "NODE", self._ids[self._to])
            except redis.ResponseError as error:
                if node is self._to or "only with masters" not in str(error):
                    raise
                # It has heard that its last slot went, and has become a replica.

    def _set(self, node: RedisServer, slot: int, *how: str) -> None:
        self._clients[node].execute_command("CLUSTER", "SETSLOT", slot, *how)

    def _migrate(self, source: RedisServer, keys: Sequence[str]) -> None:
        if keys:
            order = ("MIGRATE", "127.0.0.1", self._to.port, "", 0, 30_000, *self._auth, "KEYS", *keys)
            self._clients[source].execute_command(*order)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


class RedisCluster(ServerGroup):
    """A Redis Cluster on 127.0.0.1 with temporary folders: `masters` masters, each with `replicas` replicas.

    Args:
        masters, replicas: how many; a Cluster elects by majority, hence 3 or more masters.
        binary: the redis-server to run; `find_redis()` without.
        config: further lines of every node's redis.conf.
        password, tls, persistent: as of RedisServer, of every node.

    `nodes`: its RedisServers, the masters (as of the start) first. A node is taken to be down after 1 s. It may be one
    that was killed or paused: the methods ask the others.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 1,
        *,
        binary: StrPath | None = None,
        config: Iterable[str] = (),
        password: str | None = None,
        tls: StrPath | None = None,
        persistent: bool = False,
    ) -> None:
        if masters < 1 or replicas < 0:
            raise ValueError(f"masters is {masters} and replicas is {replicas}; they must be 1 or more, and 0 or more")
        super().__init__(binary)
        self._masters, self._size = masters, masters * (1 + replicas)
        self._config = ["cluster-enabled yes", "cluster-node-timeout 1000", "cluster-announce-ip 127.0.0.1", *config]
        self._how = {"password": password, "tls": tls, "persistent": persistent}
        self._auth = ["AUTH", password] if password else []

    @property
    def nodes(self) -> list[RedisServer]:
        """Its servers; the first ones were started as masters."""
        return self.servers

    @property
    def url(self) -> str:
        """redis+cluster://127.0.0.1:PORT,127.0.0.1:PORT,... of all its nodes; rediss+cluster:// with TLS."""
        parts = urlsplit(self.nodes[0].url)
        user = parts.netloc.rpartition("@")
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"{parts.scheme}+cluster://{user[0]}{user[1]}{hosts}" + (f"?{parts.query}" if parts.query else "")

    def start(self) -> RedisCluster:
        """Start it and return it once every node calls the Cluster ok, slots covered, replicas in step (about 2 s)."""
        if self.nodes:
            return self
        for _ in range(self._size):
            self._start_node()
        masters = self.nodes[: self._masters]
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for other in self.nodes[:number]:
                node.command("CLUSTER", "MEET", "127.0.0.1", other.port)
        for number, node in enumerate(masters):
            first, end = (SLOTS * n // len(masters) for n in (number, number + 1))
            node.command("CLUSTER", "ADDSLOTS", *range(first, end))
        self._meet()
        for number, node in enumerate(self.nodes[self._masters :]):
            node.command("CLUSTER", "REPLICATE", _id(masters[number % len(masters)]))
        until("the Cluster did not come up", lambda: all(map(self._settled, self.nodes)), self.nodes)
        return self

    # -- who has the keys ----------------------------------------------------------------------------------------

    @property
    def masters(self) -> list[RedisServer]:
        """The nodes that have slots, as the newest word of all that answer has it."""
        owners = self._owners()
        return [node for node in self.nodes if node in owners]

    def master_of(self, key_or_slot: str | int) -> RedisServer:
        """The node that has a slot, or a key's slot, as the newest word of all that answer has it.

        It may be down: until another is elected, it has its slots. Raises ServerError where no node has the slot.
        """
        slot = key_or_slot
        if isinstance(slot, str):
            slot = self._answering()[0].command("CLUSTER", "KEYSLOT", slot)
        owner = self._owners()[int(slot)]
        if owner is None:
            raise ServerError(f"no node of the Cluster has slot {slot}")
        return owner

    def replicas_of(self, node: RedisServer) -> list[RedisServer]:
        """The nodes that replicate `node`, by their own word; those that do not answer are left out."""
        return [other for other in self._answering() if self._replicated(other) == node.port]

    # -- changes -------------------------------------------------------------------------------------------------

    def move_slots(self, slots: Iterable[int], to: RedisServer) -> None:
        """Move slots with their keys while clients use them, as `redis-cli --cluster reshard` does.

        Returns once all nodes that answer know it. Raises redis-py's ResponseError, with BUSYKEY, where both nodes
        have a key; the slot is half moved then.
        """
        owners = self._owners()
        with contextlib.closing(_Move(self, to)) as move:
            for slot in slots:
                move.begin(slot, owners[slot], ())
                move.finish(slot, owners[slot])
        self._agree()

    @contextlib.contextmanager
    def moving(self, slot: int, to: RedisServer, keys: Sequence[str] = ()) -> Iterator[None]:
        """A slot that is on its way in the body: these of its keys have arrived, the others come after the body.

        Once it is left, all nodes that answer know the slot's new place.
        """
        owner = self.master_of(slot)
        with contextlib.closing(_Move(self, to)) as move:
            move.begin(slot, owner, keys)
            try:
                yield
            finally:
                move.finish(slot, owner)
        self._agree()

    def failover(self, node: RedisServer) -> RedisServer:
        """Have a replica take over from a master; the new master, once all nodes that answer know it.

        From a master that answers, nothing is lost, and it is a replica afterwards. From one that does not, the replica
        takes over by force at once, with the writes that it has. Raises ServerError if no replica answers.
        """
        replicas = self.replicas_of(node)
        if not replicas:
            raise ServerError(f"{node!r} has no replica")
        if not node.answers:
            replicas[0].command("CLUSTER", "FAILOVER", "TAKEOVER")
            self._agree()
            return replicas[0]
        new, asked = replicas[0], 0.0

        def took_over() -> bool:
            nonlocal asked
            if self._replicated(node) == new.port:
                return True
            # Again, where nothing came of it. A replica that won an election a few node timeouts ago may take those
            # votes for new ones: it is a master for a moment only (Redis 7.0).
            if time.monotonic() > asked + _FAILOVER_LASTS and self._replicated(new) is not None:
                new.command("CLUSTER", "FAILOVER")
                asked = time.monotonic()
            return False

        self._agree()  # else its master may not know it, or another master, and nothing would come of it
        self._until("the replica did not take over", took_over)
        self._agree()
        return new

    def add_master(self) -> RedisServer:
        """Have a new node join, without slots; `move_slots` gives it some. Returns it once all nodes know it."""
        node = self._start_node()
        node.command("CLUSTER", "MEET", "127.0.0.1", self._answering()[0].port)
        self._meet()
        self._agree()
        return node

    def remove_master(self, node: RedisServer) -> None:
        """Have a node leave, and end it. Raises ServerError while it has slots: `move_slots` takes them away."""
        if node in self.masters:
            raise ServerError(f"{node!r} has slots; move_slots must take them away first")
        self._until("its replicas did not leave it", lambda: not self.replicas_of(node))
        name = _id(node)
        self.servers.remove(node)
        for other in self._answering():
            other.command("CLUSTER", "FORGET", name)
        node.close()
        self._agree()

    def _start_node(self) -> RedisServer:
        return self._add(RedisServer, self._config, **self._how)

    # -- by the nodes' words -------------------------------------------------------------------------------------

    def _answering(self) -> list[RedisServer]:
        found = [node for node in self.nodes if node.answers]
        if not found:
            raise ServerError("no node of the Cluster answers")
        return found

    def _owners(self) -> list[RedisServer | None]:
        """The node of each slot, by the highest epoch that any node knows."""
        ports = {node.port: node for node in self.nodes}
        words: list[tuple[int, int, list[str]]] = []
        for node in self._answering():
            for line in node.command("CLUSTER", "NODES").splitlines():
                _, address, flags, _, _, _, epoch, _, *ranges = line.split(" ")
                if "master" in flags:
                    words.append((int(epoch), int(re.split("[:@]", address)[1]), ranges))
        owners: list[RedisServer | None] = [None] * SLOTS
        for _, port, ranges in sorted(words):
            for each in ranges:
                if not each.startswith("["):  # else it is on its way
                    first, _, last = each.partition("-")
                    owners[int(first) : int(last or first) + 1] = [ports.get(port)] * (
                        int(last or first) + 1 - int(first)
                    )
        return owners

    def _replicated(self, node: RedisServer) -> int | None:
        """The port of the master that it replicates; None: it is a master."""
        role, *state = node.command("ROLE")
        return None if role == "master" else int(state[1])

    # -- waiting -------------------------------------------------------------------------------------------------

    def _until(self, what: str, ready: Any) -> None:
        until(what, ready, self._answering())

    def _meet(self) -> None:
        self._until("the Cluster's nodes did not meet", lambda: all(map(self._met, self._answering())))

    def _agree(self) -> None:
        """Wait until all that answer say the same of slots and replicas, and that the Cluster is ok."""

        def agreed() -> bool:
            nodes = self._answering()
            return len({_view(node) for node in nodes}) == 1 and all(map(_is_ok, nodes))

        self._until("the Cluster's nodes do not agree", agreed)

    def _met(self, node: RedisServer) -> bool:
        known = node.command("CLUSTER", "NODES")
        return bool(known.count(" connected") == len(self.nodes) and "handshake" not in known)

    def _settled(self, node: RedisServer) -> bool:
        roles = re.findall(r"[ ,](master|slave) ", node.command("CLUSTER", "NODES"))
        return (
            _is_ok(node)
            and "cluster_slots_ok:16384" in node.command("CLUSTER", "INFO")
            and roles.count("master") == self._masters
            and len(roles) == self._size
        )
