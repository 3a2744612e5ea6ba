"""FreshnessLease: may values that are cached in Redis be used now? Each node has a lease of its own; see node_lease.py.

So a node that is away, or has lost data, keeps nobody from the values of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._boottime import clock
from .._context import Context
from .._fork import notice_fork
from ..client import RedisNode, Script
from ..errors import BackendUnavailable, ConfigurationError
from .invalidator import Invalidations, Invalidator, Values
from .node_lease import FreshnessSnapshot, FreshnessState, NodeLease
from .shard import find_slot

__all__ = ["FreshnessLease"]


class FreshnessLease:
    """The leases of one Redis and key prefix, one for each of its nodes. Safe to share between threads, across fork.

    To use a cached value, call `snapshot = look(key)` before it is read, from `snapshot.node`, and `stands(snapshot)`
    after. The value's epoch must be `snapshot.epoch`, and `snapshot.covers(key)`. A value that is loaded after `look`
    is stored with that epoch.

    Args:
        values: invalidates entries of a namespace without a `watch` of its own.
        clock: seconds, never set.
        threads: False: the caller that finds a lease ended renews it.
    """

    def __init__(
        self,
        context: Context,
        values: Values,
        *,
        clock: Callable[[], float] = clock,
        threads: bool = True,
    ) -> None:
        if context.redis is None or context.postgres is None:
            raise ConfigurationError("the outbox needs Redis and PostgreSQL")
        #: X, in seconds: how far a value used under a valid lease may be behind what is committed.
        self.staleness: float = context.config.metadata_staleness
        self._redis = context.redis
        self._context = context
        self._invalidator = Invalidator(context.keys, values)
        self._clock = clock
        self._threads = threads
        self._leases: dict[RedisNode, NodeLease] = {}

    def of(self, node: RedisNode) -> NodeLease:
        """The lease of a node."""
        lease = self._leases.get(node)
        if lease is None:
            made = NodeLease(self._context, node, self._invalidator, self._clock, self._threads)
            lease = self._leases.setdefault(node, made)
        return lease

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self, key: str) -> FreshnessSnapshot | None:
        """The lease of the node that has the key, if it is valid. See NodeLease.look, and `widen`: the snapshot may not
        cover the key even so."""
        snapshot = self.of(self._redis.at(key)).look()
        if snapshot is None or snapshot.covers(key) or not self.widen(key):
            return snapshot
        return self.of(self._redis.at(key)).look()

    def widen(self, key: str) -> bool:
        """Have a lease cover a key that its node's does not. Returns whether to look again.

        The slot may have moved: its node is found anew, and told, once a second at most. Raises BackendUnavailable,
        BackendError.
        """
        if not self.of(self._redis.at(key)).may_widen():
            return False
        find_slot(self._redis, key)
        self.of(self._redis.at(key)).widen(key)
        return True

    def stands(self, snapshot: FreshnessSnapshot) -> bool:
        """Was everything since `look` read under this snapshot? If not, look and read again."""
        return snapshot.node is None or self.of(snapshot.node).stands(snapshot)

    def blind(self, key: str) -> bool:
        """See NodeLease.blind, of the node that has the key. Raises BackendUnavailable where none has it."""
        return self.of(self._redis.at(key)).blind

    def last_epoch(self, key: str) -> int | None:
        """The epoch of the key's node that this process has read last, valid or not."""
        try:
            return self.of(self._redis.at(key)).last_epoch
        except BackendUnavailable:  # no node has it
            return None

    def state(self, *, timeout: float | None = None) -> FreshnessState:
        """The state of the nodes that answer, and how far the one that is furthest behind is. Does not run the relay.

        Raises BackendUnavailable where no node answers; BackendError, ConfigurationError.
        """
        notice_fork()
        states, failed = [], None
        for node in self._redis.nodes():
            try:
                states.append(self.of(node).state(timeout=timeout))
            except BackendUnavailable as error:
                failed = error
        if failed is not None and not states:
            raise failed
        lags = [state.lag for state in states if state.lag is not None]
        return FreshnessState(
            all(state.valid for state in states),
            max(lags, key=lambda lag: (lag.oldest, lag.entries), default=None),
            any(state.foreign for state in states),
        )

    # -- over a connection of the in-process tier's ----------------------------------------------------------------

    def questions(self, node: RedisNode) -> list[tuple[str, ...]]:
        """The commands that ask for a node's lease."""
        return self.of(node).questions()

    def answered(self, node: RedisNode, sent: float, replies: list[Any]) -> FreshnessSnapshot | None:
        """See NodeLease.answered."""
        return self.of(node).answered(sent, replies)

    # -- running the relay -------------------------------------------------------------------------------------

    def drain(self) -> int | None:
        """Run the relay of every node now; see NodeLease.drain.

        Returns how many entries of the outbox were told to the node that was told most; None if some node could not be
        told.
        """
        notice_fork()
        try:
            nodes = self._redis.nodes()
        except BackendUnavailable:
            self._context.counters.add("guard.degraded.redis")
            return None
        for node in set(self._leases).difference(nodes):
            self._leases.pop(node, None)  # it has left
        told = [self.of(node).drain() for node in nodes]
        return None if None in told else max(filter(None, told), default=0)

    def watch(self, namespace: str, invalidations: Invalidations, scripts: Sequence[Script] = ()) -> None:
        """Say how the outbox's entries of a namespace are invalidated. By default they are invalidated as cached
        values.

        Args:
            invalidations: makes the commands for (id, version) pairs. Each must be harmless the second time, and where
                there is nothing to invalidate.
            scripts: those among the commands.
        """
        self._invalidator.register(namespace, invalidations, scripts)

    def close(self) -> None:
        """Wait for the threads that renew, if there are any."""
        notice_fork()
        for lease in list(self._leases.values()):
            lease.close()
