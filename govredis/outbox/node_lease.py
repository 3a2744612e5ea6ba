"""NodeLease: may values that are cached on one node be used now? The reader's side; relay.py keeps the lease true.

A reader asks for the lease once and keeps a snapshot of it until its end, so that a hit stays one MGET. The end is
counted from before the question was sent, on a clock that is never set.

A snapshot says nothing of another server, or of a server that restarted with older data. Both are reached over a new
connection only. So the client's count of connects, as it was before the question, must stand after the value was read.
If it does not, lease *and* value are read again, in this order: a lease that became valid after the value was read says
nothing of that value. (A master that becomes a replica must drop its clients, as Sentinel makes it do. A proxy must not
change servers behind a connection.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .._context import Context
from .._daemon import start_daemon
from .._fork import notice_fork, renew_in_child
from ..breaker import ReadOnly
from ..client import RedisNode
from ..client.redirects import NotServedHere
from ..client.slots import slot_of
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .invalidator import Invalidator
from .outbox import Outbox, OutboxLag
from .relay import Found, OutboxRelay, PostgresAway
from .shard import Slots

__all__ = ["FreshnessSnapshot", "FreshnessState", "NodeLease"]

log: logging.Logger = logging.getLogger("govredis")

#: The part of a lease's life that is left when it is renewed in the background.
_RENEWED_AT = 1 / 3
#: Seconds that a reader without a valid lease waits for another's run of the relay, at most.
_PATIENCE = 0.25
_SLICE = 0.01
#: Seconds for which a thread that runs the relay keeps the others from it, at most.
_CLAIMED_FOR = 5.0
#: Seconds between two tries that failed.
_BETWEEN_TRIES = 1.0


class FreshnessSnapshot:
    """A node's lease as this process has read it: valid until `until`, while the node's `connects` stands.

    It is for values that are read from that node, and for keys that it covers. `node` is None for values of any node,
    `slots` for all keys.
    """

    __slots__ = ("connects", "epoch", "node", "renew_at", "slots", "until")

    def __init__(
        self,
        node: RedisNode | None,
        epoch: int,
        until: float,
        renew_at: float,
        connects: int,
        slots: Slots | None = None,
    ) -> None:
        self.node: RedisNode | None = node
        self.epoch: int = epoch
        self.until: float = until
        self.renew_at: float = renew_at
        self.connects: int = connects
        self.slots: Slots | None = slots

    def covers(self, key: str) -> bool:
        """May values of this key be used and stored under it?"""
        return self.slots is None or self.slots >> slot_of(key) & 1 == 1


class FreshnessState(NamedTuple):
    #: Is the lease valid?
    valid: bool
    #: None: Redis was never told of anything, or has forgotten it.
    lag: OutboxLag | None
    #: Does its key hold something that no relay has written? Then no lease is valid until the next run replaces it.
    foreign: bool


class NodeLease:
    """The lease of one node and key prefix, and its relay. Safe to share between threads, and across fork.

    Args:
        invalidator: see OutboxRelay.
        clock: seconds, never set.
        threads: False: the caller that finds the lease ended renews it.
    """

    def __init__(
        self, context: Context, node: RedisNode, invalidator: Invalidator, clock: Callable[[], float], threads: bool
    ) -> None:
        self.relay: OutboxRelay = OutboxRelay(context, node, invalidator)
        self._staleness = context.config.metadata_staleness
        self._outbox = Outbox(self.relay.postgres)
        #: The relay could not reach PostgreSQL.
        self._relay_failed = False
        self._node = node
        self._counters = context.counters
        self._clock = clock
        self._threads = threads
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._claimed_until = 0.0
        self._snapshot: FreshnessSnapshot | None = None
        self._again_at = 0.0
        self._widen_at = 0.0
        self._thread: threading.Thread | None = None

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self) -> FreshnessSnapshot | None:
        """The lease, if it is valid; None: go to the source (or, where `blind`, take what there is).

        Costs nothing while a snapshot is valid. Else one round trip; where the lease is not valid, also a run of the
        relay, for which others wait up to 0.25 s. Raises BackendUnavailable if Redis is away; ConfigurationError naming
        `govredis migrate`.
        """
        snapshot = self._snapshot
        if snapshot is None or snapshot.connects != self._node.connects:
            return self._find()
        now = self._clock()
        if now >= snapshot.renew_at:
            if now >= snapshot.until:
                return self._find()
            snapshot.renew_at = snapshot.until  # once
            self._renew_soon()
        return snapshot

    def stands(self, snapshot: FreshnessSnapshot) -> bool:
        """Was everything since `look` read under this snapshot? If not, look and read again."""
        return snapshot.connects == self._node.connects and self._clock() < snapshot.until

    @property
    def blind(self) -> bool:
        """Is PostgreSQL known to be away? Then a lease that has ended is not renewed, and nothing is better than the
        cached values."""
        # The relay may still be waiting for an answer when another call has found out.
        return self._relay_failed or self.relay.postgres.breaker.is_away()

    @property
    def last_epoch(self) -> int | None:
        """The epoch that this process has read last, valid or not."""
        return None if self._snapshot is None else self._snapshot.epoch

    def state(self, *, timeout: float | None = None) -> FreshnessState:
        """The state in Redis, and the changes that Redis has not been told of. Does not run the relay.

        Raises BackendUnavailable, BackendError, ConfigurationError.
        """
        notice_fork()
        found = self.relay.read()
        held = found.held
        lag = None if held is None else self._outbox.lag(held.epoch, timeout=timeout)
        return FreshnessState(self._ask() is not None, lag, found.foreign)

    def _find(self) -> FreshnessSnapshot | None:
        snapshot = self._ask()
        deadline = self._clock() + _PATIENCE
        while snapshot is None and self._again_at <= self._clock() < deadline:
            if self._claim():
                try:
                    snapshot = self._run_and_ask()
                finally:
                    self._claimed_until = 0.0
            else:
                time.sleep(_SLICE)  # another thread runs it
                snapshot = self._snapshot
                if snapshot is not None and not self.stands(snapshot):
                    snapshot = None
        return snapshot

    def _run_and_ask(self) -> FreshnessSnapshot | None:
        snapshot = self._ask()  # while we waited for our turn another may have run it
        if snapshot is None:
            self._run_relay()
            snapshot = self._ask()
            if snapshot is None:
                time.sleep(_SLICE)  # another process runs it
        return snapshot

    def _ask(self) -> FreshnessSnapshot | None:
        """A new snapshot of the lease in Redis, if it is valid."""
        for is_last in (False, True):  # the first time, perhaps, over a new connection
            connects, sent = self._node.connects, self._clock()
            try:
                found = self.relay.read()
            except NotServedHere:  # the slot of the lease has left, and the client knows now
                if is_last:
                    raise
                continue
            if self._node.connects == connects:
                break
        snapshot = self._valid(found, sent, connects)
        if snapshot is not None:
            with self._lock:
                known = self._snapshot
                # Another thread may have asked after us, and been answered first.
                if known is None or known.connects < connects or known.until < snapshot.until:
                    self._snapshot = snapshot
            self._relay_failed = False
        return snapshot

    def _valid(self, found: Found, sent: float, connects: int) -> FreshnessSnapshot | None:
        held = found.held
        # After a time that is later than now, the clock was set back: how long it has been valid is unknown.
        if held is None or held.at > found.now:
            return None
        left = self._staleness - (found.now - held.at) / 1_000_000
        if left <= 0:
            return None
        until, slots = sent + left, None if held.shard is None else held.shard.slots
        return FreshnessSnapshot(self._node, held.epoch, until, until - self._staleness * _RENEWED_AT, connects, slots)

    # -- over a connection of the in-process tier's ----------------------------------------------------------------

    def questions(self) -> list[tuple[str, ...]]:
        """The commands that ask for the lease. Raises BackendUnavailable for a node that has no slots any more."""
        return self.relay.questions()

    def answered(self, sent: float, replies: list[Any]) -> FreshnessSnapshot | None:
        """A snapshot from their replies, if the lease is valid; `sent`: when they were asked, on this object's
        clock."""
        return self._valid(self.relay.answered(replies), sent, -1)

    def _claim(self) -> bool:
        """May this thread run the relay? Not while another does. The claim of a thread that an exception struck ends by
        itself: two runs at once are harmless."""
        with self._lock:
            now = self._clock()
            if now < self._claimed_until:
                return False
            self._claimed_until = now + _CLAIMED_FOR
            return True

    # -- running the relay -------------------------------------------------------------------------------------

    def drain(self) -> int | None:
        """Run the relay now. Returns how many entries of the outbox Redis was told of; None if it could not be told, or
        another relay is running. Redis or PostgreSQL being away is counted, not raised; ConfigurationError is raised.
        """
        notice_fork()
        return self._run_relay()

    def _run_relay(self) -> int | None:
        try:
            told = self.relay.run()
        except BackendUnavailable as error:
            self._relay_failed = isinstance(error, PostgresAway)
            of_postgres = isinstance(error, PostgresAway | ReadOnly)
            self._counters.add("guard.degraded.postgres" if of_postgres else "guard.degraded.redis")
            self._again_at = self._clock() + _BETWEEN_TRIES
            return None
        self._relay_failed = False
        return told

    def may_widen(self) -> bool:
        """Was it not asked for a slot that it does not cover in the last second?"""
        now = self._clock()
        if now < self._widen_at:
            return False
        self._widen_at = now + _BETWEEN_TRIES
        return True

    def widen(self, key: str) -> None:
        """Have the lease cover a key whose slot has come to the node since. Raises BackendUnavailable, BackendError."""
        snapshot = self._ask()
        if (snapshot is None or not snapshot.covers(key)) and self._claim():
            try:
                self._run_relay()
                self._ask()
            finally:
                self._claimed_until = 0.0

    def _renew_soon(self) -> None:
        thread = self._thread
        if not self._threads or (thread is not None and thread.is_alive()):  # it is about to run the relay
            return
        # Where it cannot be started, a caller renews at the end of the lease.
        self._thread = start_daemon("govredis-freshness", self._renew)

    def _renew(self) -> None:
        if not self._claim():
            return
        try:
            snapshot = self._ask()
            # Not its `renew_at`: another thread may have taken that by now.
            if snapshot is None or self._clock() >= snapshot.until - self._staleness * _RENEWED_AT:
                self._run_relay()
                self._ask()
        except (BackendError, ConfigurationError) as error:
            if not isinstance(error, BackendUnavailable):
                log.error("the freshness lease of cached values could not be renewed: %s", error)
        finally:
            self._claimed_until = 0.0

    def close(self) -> None:
        """Wait for the thread that renews, if there is one."""
        notice_fork()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
