"""ClusterClient: the RedisClient of a Redis Cluster (redis.io, "Redis cluster specification")."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from ..._redis_urls import Host
from ...breaker import CircuitBreaker
from ...config import Config
from ...errors import BackendError, BackendUnavailable
from ..commands import Arg, Command, Script, pack_command, with_source
from ..mapping import NoScript
from ..node import RedisNode
from ..redirects import NotServedHere, Redirected, TryAgain
from ..redis_client import RedisClient
from ..slots import slot_of, slot_of_command
from .cluster_node import ClusterNode
from .part import Part, side_by_side
from .topology import Topology

T = TypeVar("T")

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children

#: Seconds for which a call is sent from node to node, or waits for a slot that is on its way.
_PATIENCE = 0.2
#: Redirections that are followed at once.
_AT_ONCE = 2
#: Seconds between two tries at a slot that is on its way, about.
_AGAIN = 0.005


class ClusterClient(RedisClient):
    """As RedisClient. Each primary of the Cluster is a RedisNode, with connections, breaker and replays of its own.

    So a primary that is away keeps nobody from the keys of the others, and its changes wait for it alone. A failover
    puts another primary in its place, once the nodes say so. Redis acknowledges a write before a replica has it, so a
    failover may lose the last moments.

    Redirections are followed for 0.2 s, and so are slots that are on their way. After that a call raises
    BackendUnavailable, and no breaker opens. A slot that was left half moved answers no script of several keys: its
    keys have the fallbacks until it has arrived.

    Safe to share between threads, and across fork.

    Args:
        config: as of RedisNode.
        seeds: addresses of nodes, which tell the others.
    """

    has_slots: bool = True

    def __init__(self, config: Config, seeds: tuple[Host, ...]) -> None:
        names = ", ".join(f"{host}:{port}" for host, port in seeds)
        self.name: str = f"Redis Cluster of {names}"
        self._topology = Topology(config, self.name, seeds)
        self.breaker: CircuitBreaker = self._topology.breaker
        ClusterNode(config, seeds[0], self._topology).retire()  # refuses a wrong URL now

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, *command: Arg) -> Any:
        slot = slot_of_command(command)
        if slot is None:
            return self._any().call(*command)
        return self._routed(slot, pack_command(command))

    def run(self, script: Script, keys: Sequence[str], *args: Arg) -> Any:
        slot = slot_of(keys[0])
        try:
            return self._routed(slot, pack_command(("EVALSHA", script.sha, str(len(keys)), *keys, *args)))
        except NoScript:
            return self._routed(slot, pack_command(("EVAL", script.source, str(len(keys)), *keys, *args)))

    def run_confirmed(self, script: Script, keys: Sequence[str], *args: Arg) -> tuple[Any, bool]:
        return self._followed(slot_of(keys[0]), lambda node: node.run_confirmed(script, keys, *args))

    def pop(self, key: str, seconds: float) -> Any:
        return self._followed(slot_of(key), lambda node: node.pop(key, seconds))

    def block(self, command: Command, seconds: float) -> Any:
        slot = slot_of_command(command)
        assert slot is not None
        return self._followed(slot, lambda node: node.block(command, seconds))

    def _followed(self, slot: int, ask: Callable[[RedisNode], T]) -> T:
        """As `_routed`, for commands that wait. An ASK is not followed: the slot will have moved soon."""
        give_up = None
        while True:
            try:
                return ask(self._topology.owner(slot))
            except NotServedHere:
                give_up = give_up or time.monotonic() + _PATIENCE
                if time.monotonic() >= give_up:
                    raise
                time.sleep(_AGAIN)

    def _routed(self, slot: int, packed: bytes) -> Any:
        node = self._topology.owners[slot] or self._topology.owner(slot)
        try:
            return node._round_trip(packed)
        except NotServedHere as error:
            refused = error
        try:
            return self._elsewhere(slot, packed, refused, time.monotonic() + _PATIENCE)
        finally:
            del refused  # see wire.py

    def _elsewhere(self, slot: int, packed: bytes, refused: NotServedHere, give_up: float) -> Any:
        """The reply to a command that was not carried out: from where it was sent to, or a little later.

        Args:
            give_up: when the last attempt begins. There is one at least.
        """
        try:
            for hops in itertools.count():
                if not isinstance(refused, Redirected | TryAgain):
                    raise refused
                # Nodes that send us to each other do not agree yet.
                if (isinstance(refused, TryAgain) or hops > _AT_ONCE) and time.monotonic() < give_up:
                    time.sleep(_AGAIN * _random.uniform(0.5, 1.5))
                try:
                    if isinstance(refused, Redirected) and refused.ask:
                        return self._topology.node(refused.address).asked(packed)
                    return self._topology.owner(slot)._round_trip(packed)
                except NotServedHere as error:
                    if time.monotonic() >= give_up:
                        raise
                    refused = error
        finally:
            del refused  # see wire.py

    # -- pipelines -----------------------------------------------------------------------------------------------

    def pipeline(self, commands: Sequence[Command], scripts: Sequence[Script] = (), *, each: bool = False) -> list[Any]:
        replies: list[Any] = [None] * len(commands)
        by_node: dict[ClusterNode, list[int]] = {}
        for i, command in enumerate(commands):
            slot = slot_of_command(command)
            try:
                node = self._any() if slot is None else self._topology.owner(slot)
            except BackendUnavailable as error:
                replies[i] = error.with_traceback(None)
            else:
                by_node.setdefault(node, []).append(i)
        self._exchange(commands, scripts, by_node, replies)
        give_up = time.monotonic() + _PATIENCE  # for all together: many may be of a slot that is on its way
        for i, reply in enumerate(replies):
            if isinstance(reply, NotServedHere):
                replies[i] = self._once_more(commands[i], reply, give_up)
        if replies and all(isinstance(reply, BackendUnavailable) for reply in replies):
            raise replies[0]
        if not each:
            for reply in replies:
                if isinstance(reply, BackendError):
                    raise reply
        return replies

    def _exchange(
        self,
        commands: Sequence[Command],
        scripts: Sequence[Script],
        by_node: dict[ClusterNode, list[int]],
        replies: list[Any],
    ) -> None:
        found = side_by_side([Part(node, [commands[i] for i in indices], scripts) for node, indices in by_node.items()])
        for indices, of_node in zip(by_node.values(), found, strict=True):
            for i, reply in zip(indices, of_node, strict=True):
                replies[i] = reply

    def pipelines(self, parts: Sequence[tuple[RedisNode, Sequence[Command]]]) -> list[list[Any]]:
        return side_by_side([Part(cast(ClusterNode, node), commands, ()) for node, commands in parts])

    def _once_more(self, command: Command, refused: NotServedHere, give_up: float) -> Any:
        slot = slot_of_command(command)
        assert slot is not None
        try:
            try:
                return self._elsewhere(slot, pack_command(command), refused, give_up)
            except NoScript:
                return self._routed(slot, pack_command(with_source(command)))
        except BackendError as error:
            return error.with_traceback(None)

    # -- nodes ---------------------------------------------------------------------------------------------------

    def at(self, key: Arg) -> ClusterNode:
        return self._topology.owner(slot_of(key))

    def nodes(self) -> Sequence[ClusterNode]:
        return self._topology.nodes()

    def on_node(self, seen: Callable[[RedisNode], None]) -> None:
        self._topology.on_node(seen)

    def away_for(self, key: str) -> float:
        try:
            return self.at(key).away_for()
        except BackendUnavailable:
            return self.breaker.away_for()

    def _any(self) -> ClusterNode:
        nodes = self.nodes()
        return _random.choice([node for node in nodes if node.breaker.closed] or nodes)

    def resends(self) -> int:
        return sum(node.resends() for node in self._topology.known())

    # -- recovery and life ---------------------------------------------------------------------------------------

    def on_recovery(self, replay: Callable[[RedisNode], None]) -> None:
        self._topology.replays.append(replay)

    def replay_soon(self, why: str, key: str) -> None:
        node = None
        try:
            while node is not (owner := self.at(key)):  # its heir, where that has changed meanwhile
                node = owner
                node.replay_soon(why)
        except BackendUnavailable:
            self._topology.owes = True  # nobody has the key: its next owner
            slot = slot_of(key)
            if (owner_now := self._topology.owners[slot]) is not None:  # since just now
                owner_now.replay_soon(why)

    def close(self) -> None:
        self._topology.close()
