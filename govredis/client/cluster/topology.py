"""Topology: which node of a Cluster has which slot, by what the nodes say.

It is read when nothing is known, and then beside the calls: after a redirection, after a node was not reached, and in
the probe of a node that is away. No call waits for it, except while nothing is known. The addresses that the settings
name are asked for ever, where no other node answers: a Cluster may have been set up anew. The first is
asked alone, and the others side by side: so those that hang cost a caller the timeouts of two at most.

Each node has a breaker and replays of its own. A node that takes slots over from a node that is not in use may owe
these slots' keys some changes. So it begins open, and its first probe runs the replays, before any call may use it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

from ..._at_once import at_once
from ..._daemon import start_daemon
from ..._fork import notice_fork, renew_in_child
from ..._latch import Latch
from ..._redis_urls import Host
from ..._sole import Sole, nobody
from ...breaker import CircuitBreaker, Rejected
from ...config import Config
from ...errors import BackendError, BackendUnavailable, NotAsked
from ..commands import Command, pack_command
from ..redirects import NotServedHere
from ..slots import SLOTS
from .cluster_node import ClusterNode

log: logging.Logger = logging.getLogger("govredis")

# Not the generator of the module `random`: its numbers are the application's, and forked children would share them.
_random = random.SystemRandom()

#: Seconds between two readings that calls ask for, at least.
_BETWEEN = 0.1
#: Nodes whose views are compared.
_VIEWS = 2
#: Seconds for which no node has told the newest epoch any more, until an older one is believed: of a Cluster that was
#: set up anew. Before, it is of a node that has not yet heard of a failover.
_FORGOTTEN = 5.0
CLUSTER_INFO: Command = ("CLUSTER", "INFO")
_QUESTION = pack_command(CLUSTER_INFO) + pack_command(("CLUSTER", "SLOTS"))
_NO_CLUSTER = "cluster support disabled"
_UNSET = "REDIS_CLUSTER must stay unset, and the URL must begin with redis:// or rediss://"
_INHERITED = "it has slots of a node that is not used any more"


class _ClusterView(NamedTuple):
    """A node's view of the Cluster: its epoch; and the first slot, the last slot, address and id of each range."""

    epoch: int
    ranges: list[tuple[int, int, Host, str]]


class Topology:
    """The nodes of one Cluster, and their slots.

    Args:
        config: of each node.
        name: the Cluster's, for logs and errors.
        seeds: the addresses that the settings name.
    """

    def __init__(self, config: Config, name: str, seeds: tuple[Host, ...]) -> None:
        self._config = config
        self._name = name
        self._seeds = seeds
        #: By slot. Replaced as a whole, or one slot at a time.
        self.owners: list[ClusterNode | None] = [None] * SLOTS
        self._nodes: dict[Host, ClusterNode] = {}
        #: Those that have slots.
        self._serving: tuple[ClusterNode, ...] = ()
        #: Those of each node.
        self.replays: list[Callable[[Any], None]] = []
        self._watchers: list[Callable[[ClusterNode], None]] = []
        #: Whether anything is known of the Cluster. Open: no node has answered yet.
        self.breaker: CircuitBreaker = CircuitBreaker(name, self._find)
        self._known = False
        #: The newest epoch, and when a node last told it.
        self._epoch, self._epoch_at = -1, float("-inf")
        #: Changes are pending for keys of slots that no node had.
        self.owes: bool = False
        self._patience = config.connect_timeout + config.socket_timeout
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._changing = threading.RLock()
        self._reading = Sole()
        self._read_at = float("-inf")
        self._read = Latch()

    # -- for calls -----------------------------------------------------------------------------------------------

    def owner(self, slot: int) -> ClusterNode:
        """The node that has the slot. Raises NotServedHere where none has it, NotAsked where no node answers."""
        node = self.owners[slot]
        if node is not None:
            return node
        self._find_first()
        node = self.owners[slot]
        if node is not None:
            return node
        self.refresh_soon()
        raise NotServedHere(f"no node of {self._name} has slot {slot}")

    def nodes(self) -> tuple[ClusterNode, ...]:
        """Those that have slots. Raises NotAsked where no node answers."""
        self._find_first()
        if not self._serving:
            raise NotAsked(f"no node of {self._name} has slots")
        return self._serving

    def known(self) -> list[ClusterNode]:
        """All nodes, with or without slots."""
        return list(self._nodes.values())

    def node(self, address: Host) -> ClusterNode:
        """The node at an address, with or without slots."""
        with self._changing:
            node = self._nodes.get(address)
            if node is not None:
                return node
            node = ClusterNode(self._config, address, self)
            for seen in self._watchers:
                seen(node)
            self._nodes[address] = node
            return node

    def on_node(self, seen: Callable[[ClusterNode], None]) -> None:
        """As RedisClient has it."""
        with self._changing:
            self._watchers.append(seen)
            for node in self._nodes.values():
                seen(node)

    def _find_first(self) -> None:
        """See to it that something is known. Raises NotAsked where no node answers, Rejected for wrong settings."""
        if self._known:
            return
        notice_fork()
        if not self.breaker.closed:
            self.breaker.check()
            return
        period, read = self.breaker.period, self._read
        try:
            if not self._read_alone():
                read.wait(self._patience)  # another thread does
        except BackendUnavailable as error:
            self.breaker.failed(period, str(error), timed_out=True, kind="refused")
            raise NotAsked(f"{self._name} is away: {error}") from error
        if not self._known:
            raise NotAsked(f"{self._name} is away: no node has told yet which slots there are")

    def _find(self) -> None:
        """The probe while nothing is known."""
        if not self._known:
            self._read_alone()
        if not self._known:
            raise BackendUnavailable(f"no node of {self._name} answers")

    # -- changes -------------------------------------------------------------------------------------------------

    def moved(self, slot: int, address: Host) -> None:
        """A node has said that the slot is at another address."""
        with self._changing:
            node, was = self.node(address), self.owners[slot]
            if node is not was:
                list(self._let_inherit({(was, node)}, self._serving))
                self.owners[slot] = node
                self._serving = (*(other for other in self._serving if other is not node), node)
        self.refresh_soon()

    def _adopt(self, view: _ClusterView) -> None:
        with self._changing:
            owners: list[ClusterNode | None] = [None] * SLOTS
            for first, last, address, node_id in view.ranges:
                node = self.node(address)
                node.node_id = node_id
                owners[first : last + 1] = [node] * (last + 1 - first)
            serving = tuple({node for node in owners if node is not None})
            inherited = list(self._let_inherit(set(zip(self.owners, owners, strict=True)), serving))
            self.owners, self._serving = owners, serving
            self._known = True
            self.owes = self.owes and None in owners
            left = set(self._nodes.values()).difference(self._serving)
            for node in left:
                del self._nodes[node.address]
        for was, heir in inherited:
            if was in left:
                log.info("%s: %s has slots of %s, which was away", self._name, _text(heir), _text(was))
        for node in left:
            node.retire()

    def _let_inherit(
        self, changes: set[tuple[ClusterNode | None, ClusterNode | None]], serving: Collection[ClusterNode]
    ) -> Iterator[tuple[ClusterNode | None, ClusterNode]]:
        """Keep calls from the nodes that take slots over from others that are not in use, until their replays have run.

        So too where a node has left: a failover may have come while this process was idle. Called before the change is
        published, and with the mutex that `wait_for_heirs` waits for: the replays see it. Yields pairs of the former
        node and its heir.
        """
        for was, heir in changes:
            if was is heir:
                continue
            inherits = self.owes if was is None else not was.breaker.closed or was not in serving
            if heir is None:
                self.owes = self.owes or inherits
            elif inherits:
                heir.breaker.trip(_INHERITED, quiet=True)
                yield was, heir

    def wait_for_heirs(self) -> None:
        """Before replays: wait until the change that has asked for them is published."""
        with self._changing:
            pass

    # -- reading -------------------------------------------------------------------------------------------------

    def refresh_soon(self, avoid: ClusterNode | None = None) -> None:
        """Read it anew, beside the calls. `avoid`: a node that cannot be asked, or is not to be believed."""
        now = time.monotonic()
        if now < self._read_at + _BETWEEN:
            return
        self._read_at = now
        if start_daemon("govredis-topology", self.refresh, avoid) is None:
            self.refresh(avoid)

    def refresh(self, avoid: ClusterNode | None = None) -> None:
        """Read it anew, unless another thread does. Where no node answers, it stays as it is known."""
        notice_fork()
        try:
            self._read_alone(avoid)
        except BackendError:
            pass  # each node's breaker says so

    def _read_alone(self, avoid: ClusterNode | None = None) -> bool:
        """Returns False where another thread reads it. Raises BackendError where no node answers."""
        mark = self._reading.take()
        if mark is None:
            return False
        try:
            self._read_at = time.monotonic()
            view = max(self._views(avoid), key=lambda view: view.epoch)
            if view.epoch >= self._epoch or self._read_at > self._epoch_at + _FORGOTTEN:
                self._epoch, self._epoch_at = view.epoch, self._read_at
                self._adopt(view)
        finally:
            self._reading.holder = nobody
            read, self._read = self._read, Latch()
            read.set()
        return True

    def _views(self, avoid: ClusterNode | None) -> list[_ClusterView]:
        known = [node for node in list(self._nodes.values()) if node is not avoid]
        known = _random.sample(known, len(known))
        known.sort(key=lambda node: not node.breaker.closed)  # those that are away may answer all the same
        views: list[_ClusterView] = []
        failed: BackendError | None = None
        for node in known:
            try:
                views.append(_view_of(node))
            except BackendError as error:
                failed = error.with_traceback(None)
            if len(views) == _VIEWS:
                break
        if not views:  # nobody else answers, or nobody else is known: then those of the settings, whatever they are now
            views, failed = self._views_of_seeds(failed)
        if not views:
            try:
                raise failed or BackendUnavailable(f"no node of {self._name} answers")
            finally:
                del failed  # see wire.py
        return views

    def _views_of_seeds(self, failed: BackendError | None) -> tuple[list[_ClusterView], BackendError | None]:
        """Their views, and the error to raise where there is none."""
        seeds = _random.sample(self._seeds, len(self._seeds))
        for some in seeds[:1], seeds[1:]:
            found = at_once([partial(self._ask_seed, seed) for seed in some])
            if views := [view for view in found if isinstance(view, _ClusterView)]:
                return views, failed
            for seed, error in zip(some, found, strict=True):
                if _NO_CLUSTER in str(error):
                    self.breaker.give_up(f"{self._name}: {seed[0]}:{seed[1]} is no node of a Cluster: {_UNSET}")
                    self.breaker.check()
                if isinstance(error, BackendError) and (failed is None or isinstance(error, Rejected)):
                    failed = error
        return [], failed

    def _ask_seed(self, seed: Host) -> _ClusterView | BackendError:
        node = ClusterNode(self._config, seed, self)
        try:
            return _view_of(node)
        except BackendError as error:
            return error.with_traceback(None)
        finally:
            node.retire()

    def close(self) -> None:
        self.breaker.close()
        for node in list(self._nodes.values()):
            node.close()


def _text(node: ClusterNode) -> str:
    return f"{node.address[0]}:{node.address[1]}"


def _view_of(node: ClusterNode) -> _ClusterView:
    info, ranges = node.view(_QUESTION, 2)
    fields = dict(line.split(b":", 1) for line in info.split(b"\r\n") if b":" in line)
    found = []
    for first, last, (host, port, node_id, *_), *_ in ranges:
        # A node that does not know its own address leaves it out.
        name = host.decode() if host and host != b"?" else node.address[0]
        found.append((first, last, (name, port), node_id.decode()))
    if not found:
        raise BackendUnavailable(f"{node.name} knows of no slots")  # it has left the Cluster, or has not joined yet
    return _ClusterView(int(fields[b"cluster_current_epoch"]), found)
