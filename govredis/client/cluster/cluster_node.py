"""ClusterNode: the RedisNode of one primary of a Cluster."""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import redis

from ..._daemon import start_daemon
from ..._fork import notice_fork
from ..._pool import Pool
from ..._redis_urls import Host
from ...config import Config
from ...errors import BackendError, BackendUnavailable, NotAsked
from ..commands import Command, Script, pack_command, with_source
from ..mapping import NoScript, RedisErrorMapping
from ..node import RedisNode
from ..options import connection_options
from ..redirects import NotServedHere, Redirected, TryAgain
from ..round_trips import Asked
from ..slots import SLOTS, slot_of

if TYPE_CHECKING:
    from .topology import Topology

#: Seconds until pending changes of a slot that was on its way are told again.
_PUT_OFF = 1.0
ASKING = pack_command(("ASKING",))
#: A script is ended where it comes to a missing key, while the slot is on its way to another node.
_IN_SCRIPT = "cript attempted to access a non local key"

#: Among the slots of so many there is each several times.
_TAGS = range(10 * SLOTS)


class ClusterNode(RedisNode):
    """As RedisNode, of the slots that the topology says. It follows no redirection: ClusterClient does.

    A MOVED changes the topology, and is a Redirected. An ASK is a Redirected too, and a TRYAGAIN is a TryAgain. None of
    the three has had an effect, nor says that the node is away.

    Args:
        config: as of RedisNode; its host is not used.
        address: the node's.
        topology: of its Cluster.

    Attributes:
        node_id: by the last view of the Cluster; None until a view has named the node.
    """

    has_slots = True

    def __init__(self, config: Config, address: Host, topology: Topology) -> None:
        self.address: Host = address
        self.node_id: str | None = None
        self._topology = topology
        #: Waits to have the replays run again.
        self._late: threading.Thread | None = None
        super().__init__(config)
        self._replays = topology.replays
        self._question = pack_command(("EVAL", "return 1", "0"))  # a key might be another node's

    def _new_options(self, config: Config) -> dict[str, Any]:
        return connection_options(config, host=self.address)

    def _new_errors(self, *, tls: bool) -> RedisErrorMapping:
        return _ErrorsOfNode(self, tls=tls)

    def covers(self, key: str) -> bool:
        return self._topology.owners[slot_of(key)] is self

    def tag(self) -> str:
        """The least number that makes a hash tag of a slot of this node: it seldom changes where slots move.

        Raises NotAsked where the node has no slots any more, or only those are known that a MOVED has named.
        """
        if self.node_id is None:
            raise NotAsked(f"{self.name} has not yet told all of its slots")
        owners = self._topology.owners
        for tag in map(str, _TAGS):
            if owners[slot_of(tag)] is self:
                return tag
        raise NotAsked(f"{self.name} has no slots any more")

    def pipeline(self, commands: Sequence[Command], scripts: Sequence[Script] = (), *, each: bool = False) -> list[Any]:
        if not self._is_replaying:
            return super().pipeline(commands, scripts, each=each)
        # A replay sees to all keys of this node, also to those that are already where their slot is on its way to.
        replies = super().pipeline(commands, scripts, each=True)
        for i, reply in enumerate(replies):
            if isinstance(reply, Redirected) and reply.ask:
                replies[i] = self._ask_ahead(reply.address, commands[i])
        if not each:
            for reply in replies:
                if isinstance(reply, BackendError):
                    raise reply
        return replies

    def _ask_ahead(self, address: Host, command: Command) -> Any:
        """The reply of the node that the command's slot is on its way to, or the error. That node's are not this one's:
        where it is away, or has a part of the keys, the slot alone is not served yet."""
        to = self._topology.node(address)
        try:
            try:
                return to.asked(pack_command(command))
            except NoScript:  # it never had a key that the script was for
                return to.asked(pack_command(with_source(command)))
        except BackendUnavailable as error:
            return TryAgain(f"{self.name} cannot serve a slot that is on its way: {error}")
        except BackendError as error:
            return error.with_traceback(None)

    def asked(self, packed: bytes, wait: tuple[float, float] | None = None, pool: Pool[Any] | None = None) -> Any:
        """The reply to a command on a key of a slot that is on its way to this node. Raises as `call`."""
        replies = self._round_trip(ASKING + packed, 2, wait, True, pool)
        if replies is None:
            return None
        if isinstance(replies[1], BackendError):
            raise replies[1]
        return replies[1]

    def begin(self, packed: bytes, replies: int) -> _Begun:
        """Send commands whose replies, each for itself, `finish` takes. Raises BackendError where nothing was sent."""
        notice_fork()
        if not self.breaker.closed:
            self._check()
        pool, began = self._pool, perf_counter()
        asked = Asked(self.breaker.period, pool, self._for_place, packed, replies, None, True)
        connection, failed = pool.take(self._for_place), None
        pooled = connection._sock is not None
        if pooled and connection.unread():
            connection = self._another(pool, connection, self._for_place)
            pooled = connection._sock is not None
        try:
            if not pooled:
                self._open(connection)
            connection.send_packed_command((packed,), False)
        except redis.RedisError as error:
            pool.drop(connection)
            failed = error.with_traceback(None)
        except BaseException:
            pool.drop(connection)
            raise
        return _Begun(asked, connection, pooled, began, perf_counter(), failed)

    def finish(self, begun: _Begun) -> Any:
        asked, connection, pooled, began, sent, failed = begun
        # While the replies of other nodes were waited for, these had time to come: the time of all is one timeout.
        left = sent + self._timeout - perf_counter()
        if failed is None and left < self._timeout / 2 and not _has_come(connection._sock, max(left, 0.0)):
            asked.pool.drop(connection)
            failed = redis.TimeoutError("Timeout reading from socket")
        if failed is None:
            try:
                found = self._exchange(asked.pool, connection, b"", asked.replies, None, asked.each)
                self.latency.add(perf_counter() - began)
                return found
            except redis.RedisError as error:
                failed = error
        try:
            return self._once_more(asked, failed, pooled)
        finally:
            del failed, begun  # see wire.py
            took = perf_counter() - began
            self.latency.add(took)
            self.breaker.note_slow(took)

    def view(self, question: bytes, replies: int) -> list[Any]:
        """Ask for its view of the Cluster, also while the breaker is open. Raises BackendError."""
        pool = self._pool
        while True:
            connection = pool.take(0.0)
            pooled = connection._sock is not None
            if pooled and connection.unread():
                pool.drop(connection)
                continue
            try:
                found: list[Any] = self._exchange(pool, connection, question, replies)
                return found
            except redis.RedisError as error:
                if not pooled or not isinstance(error, redis.ConnectionError):
                    raise self._errors.of_connection(error, None) from error
            pool.drop_idle()  # they idled while it was restarted

    def _failed(self, error: redis.RedisError, period: int) -> BackendError:
        self._topology.refresh_soon(avoid=self)  # another node may have its slots by now
        return super()._failed(error, period)

    def _probe(self) -> None:
        if self.breaker.is_away():  # and not only kept from calls until its replays have run
            self._topology.refresh(avoid=self)
        if self.retired:
            self.breaker.retire()  # once more: a call that was under way has opened it
            raise BackendUnavailable(f"{self.name} has no slots any more")
        super()._probe()

    def _replay(self) -> None:
        self._topology.wait_for_heirs()
        super()._replay()

    def _puts_off(self, error: BackendError) -> bool:
        """A slot that is on its way keeps nobody from the node's others. Its pending changes are told again soon."""
        if not isinstance(error, NotServedHere):
            return False
        late = self._late
        if late is None or not late.is_alive():  # one for all replays: each run may put off several
            self._late = start_daemon("govredis-replay", self._replay_again)
        return True

    def _replay_again(self) -> None:
        time.sleep(_PUT_OFF)
        self._late = None  # first: the next run may put off again
        if not self.retired:
            self.breaker.trip("a slot was on its way", quiet=True)

    def renew_after_fork(self) -> None:
        super().renew_after_fork()
        self._late = None  # a fork in C leaves the parent's thread as alive

    def retire(self) -> None:
        """It has no slots any more: nobody is sent to it."""
        self.retired = True
        self.breaker.retire()
        for pool in self._pools:
            pool.retire()


class _Begun(NamedTuple):
    """Commands that are sent, or failed to be; for `finish`."""

    asked: Asked
    connection: Any
    pooled: bool
    began: float
    sent: float
    failed: redis.RedisError | None


def _has_come(sock: Any, seconds: float) -> bool:
    """Is there anything to read, by then at the latest?"""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(seconds))


class _ErrorsOfNode(RedisErrorMapping):
    """A node's own answers about slots, and the rest as RedisErrorMapping has it."""

    def __init__(self, node: ClusterNode, *, tls: bool) -> None:
        super().__init__(node.name, node._secrets, node.breaker, node._pattern, tls=tls)
        self._node = node

    def of_reply(self, error: redis.ResponseError, packed: bytes = b"") -> BackendError:
        if isinstance(error, redis.exceptions.AskError):  # MovedError is one
            return self._redirected(error)
        if isinstance(error, redis.exceptions.TryAgainError):
            return TryAgain(f"{self._name} cannot serve: {self.said(error)}")
        if _IN_SCRIPT in str(error):
            return TryAgain(f"{self._name} has ended a script: {self.said(error)}")
        if isinstance(error, redis.exceptions.ClusterDownError):
            self._node._topology.refresh_soon(avoid=self._node)
            if "slot" in str(error):  # this key's has no node; the others are served
                return NotServedHere(f"{self._name} cannot serve: {self.said(error)}")
        return super().of_reply(error, packed)

    def _redirected(self, error: Any) -> Redirected:
        node, ask = self._node, not isinstance(error, redis.exceptions.MovedError)
        # Without a host it is that of the node which was asked.
        address = error.host or node.address[0], error.port
        if not ask:
            node._topology.moved(error.slot_id, address)
        text = f"{self._name} answered {'ASK' if ask else 'MOVED'} {self.said(error)}"
        return Redirected(text, ask, error.slot_id, address)
