"""RedisClient: Redis as the features see it, be it one server or the primaries of a Cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._uncopied import Uncopied
from ..breaker import CircuitBreaker
from .commands import Arg, Command, Script

if TYPE_CHECKING:
    from .node import RedisNode


class RedisClient(Uncopied, ABC):
    """Commands and scripts on Redis, one round trip each.

    Every command must be harmless the second time. If its pooled connection turns out dead, it is sent once more on a
    new connection, and its reply may be that of a second arrival. A command that timed out is never sent again.

    A key lives on a node: the one server, or a primary of the Cluster. Each node has a breaker, connections and replays
    of its own, so that a node that is away keeps the keys of others from nobody. Ask `at(key)` for them.

    Attributes:
        name: without password, for logs and errors.
        in_process: is the server this process's own?
        has_slots: is it a Cluster, where the slot of a key says which node has it?
        breaker: is the server away? A Cluster's is open while no node of it has ever answered; each node has its own.
    """

    name: str
    in_process: bool = False
    has_slots: bool = False
    breaker: CircuitBreaker

    # -- calls ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def call(self, *command: Arg) -> Any:
        """Run one command, by its key on the node that has it; without a key, on any node.

        Returns its reply: bytes, int, list or None. Raises BackendUnavailable, BackendError.
        """

    @abstractmethod
    def run(self, script: Script, keys: Sequence[str], *args: Arg) -> Any:
        """Run a script whose keys share a Cluster slot. Returns its reply.

        Takes a round trip, and another after a SCRIPT FLUSH or a restart. Raises BackendUnavailable, BackendError.
        """

    @abstractmethod
    def run_confirmed(self, script: Script, keys: Sequence[str], *args: Arg) -> tuple[Any, bool]:
        """As `run`. Returns the reply, and whether a replica has what this connection has written until then: WAIT 1.

        In the same round trip. Where replicas are away or late, it waits for them: half of the socket timeout less
        0.1 s, and up to 0.1 s more, as Redis looks ten times a second. With several replicas a failover may promote
        another one than has it. Raises as `run`; BackendError where a proxy does not take WAIT.
        """

    @abstractmethod
    def pop(self, key: str, seconds: float) -> Any:
        """Take the first element of a list as soon as it has any: BLPOP, on a connection of its own.

        Args:
            key: of the list.
            seconds: to wait, LONGEST_POP at most; as long for a connection first, where all of them wait.

        Returns None if no element came; a Redis that hangs looks the same. Raises BackendUnavailable, BackendError.
        Raises NotTaken where a proxy does not take BLPOP, from then on at once. An element whose reply is lost with its
        connection is gone.
        """

    @abstractmethod
    def block(self, command: Command, seconds: float) -> Any:
        """Run an XREAD or XREADGROUP that waits in Redis for an entry, on a connection of its own. Returns its reply.

        Args:
            command: without BLOCK, on one key.
            seconds: to wait, LONGEST_BLOCK at most; as long for a connection first, where all of them wait.

        Returns None if no entry came; a Redis that hangs looks the same. Raises BackendUnavailable, BackendError.
        """

    @abstractmethod
    def pipeline(self, commands: Sequence[Command], scripts: Sequence[Script] = (), *, each: bool = False) -> list[Any]:
        """Run several commands in one round trip for each 500 or MB, and node. Others may come between.

        Those of one node run in order; nodes work side by side.

        Args:
            commands: each a tuple; a script's is `script.call(keys, args)`.
            scripts: the scripts among them. If a server does not know one, the commands that had no effect are sent
                once more, with the sources: some proxies do not take SCRIPT LOAD.
            each: a command fails alone: its BackendError stands in the place of its reply. Where a node is away, that
                is the BackendUnavailable of each of its commands.

        Returns the replies in order. Raises BackendUnavailable where no node has answered; without `each`, the
        BackendError of the first command that failed.
        """

    @abstractmethod
    def pipelines(self, parts: Sequence[tuple[RedisNode, Sequence[Command]]]) -> list[list[Any]]:
        """Run commands on the nodes that are named, side by side, and follow no redirection.

        Returns the replies of each part, in order, as `pipeline(each=True)` of its node does. Where all of a part
        fails, its BackendError stands in the place of each reply.
        """

    # -- nodes ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def at(self, key: Arg) -> RedisNode:
        """The node that has the key, by what this process knows. Raises BackendUnavailable where no node has it."""

    @abstractmethod
    def nodes(self) -> Sequence[RedisNode]:
        """All nodes that have keys, by what this process knows."""

    @abstractmethod
    def on_node(self, seen: Callable[[RedisNode], None]) -> None:
        """Have `seen(node)` called for each node: now for those known, and later for each that joins, before its use.

        Nobody is told when a node leaves. `seen` is quick, and raises nothing.
        """

    @abstractmethod
    def away_for(self, key: str) -> float:
        """Seconds for which the node that has the key has been away; 0 while it is there. No node answers: of all."""

    @abstractmethod
    def resends(self) -> int:
        """How many commands of this thread were sent a second time, and may have been carried out twice."""

    # -- recovery ------------------------------------------------------------------------------------------------

    @abstractmethod
    def on_recovery(self, replay: Callable[[RedisNode], None]) -> None:
        """Have `replay(node)` called when a node is back, or has taken keys over from a node that was away.

        It is called before anybody else in this process uses the node again, and carries out what is pending for the
        keys that `node.covers`. If the node goes away meanwhile, or rejects our credentials, the breaker stays open,
        and `replay` is called again after the next probe. Any other error of `replay` is logged: one feature's mistake
        must not keep the node from all.
        """

    @abstractmethod
    def replay_soon(self, why: str, key: str) -> None:
        """Something for a replay was noted: use the node that has `key` no more until its replays have run."""

    # -- life ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def close(self) -> None:
        """Close the idle connections and end the probes. The client reconnects if it is used again."""
