"""LockLease: a lock that is held, as the handle and the renewal thread share it."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from enum import Enum, auto

from .._boottime import clock
from .._counters import Counters
from .._fork import renew_in_child
from ..errors import BackendError, BackendUnavailable, LockLost
from .acquisition import Claim, Grant
from .backends.redis_backend import CONFIRM, RedisLockBackend, Renewal
from .holders import ListedLock
from .host_lock.base import HostLock
from .renewal import FIRST_DUE, renewer

log: logging.Logger = logging.getLogger("govredis")

#: A lease is renewed when this share of its ttl has passed.
RENEWED_AFTER = 1 / 3

#: A renewal that failed is tried again after this share of the ttl.
TRIED_AGAIN_AFTER = 1 / 10


class LeaseState(Enum):
    """The state of a lease; the states come in this order, and none comes back.

    | state | the holder | Redis | the host lock | next |
    | --- | --- | --- | --- | --- |
    | HANDED_OVER | works | has its confirmation, unanswered | inside | HELD by the reply; LOST at the deadline |
    | HELD | works | renewed at a third of the ttl | inside, kept fresh | LOST by a reply or at the deadline; ENDED |
    | LOST | is told, and may still be at work | not asked again | kept fresh while it renews | ENDED |
    | ENDED | has let go, or is a forked parent | told to release, unless degraded | left | |

    A degraded lease goes the same way without Redis, and is never handed over.
    """

    HANDED_OVER = auto()
    HELD = auto()
    LOST = auto()
    ENDED = auto()


class LockLease:
    """A lock that is held: shared by the handle and the renewal thread, so that a forgotten handle can be collected.

    Its mutex is never held while Redis is asked for a new lease: a release does not wait for a renewal, and Redis
    refuses a renewal that arrives after it. A single extension at a time is on its way: its sender holds
    `backend.extending`, and takes the mutex within that.

    The state is told by marks that are set once and never cleared (`over`, `lost`, `_confirm`). A signal handler may
    release the lock between any two bytecodes of this class; a mark keeps what it did, an assigned state would not.

    Args:
        claim: the claim that won it; its host lock is entered.
        grant: its deadline counts from when the request was *sent*.
        ttl: seconds of each lease.
        renew: False: it ends at its deadline.
        max_hold: seconds after which it is no longer renewed; None: no bound.
        counters: of the GovRedis.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_callbacks",
        "_confirm",
        "_counters",
        "_listed",
        "_mutex",
        "_next",
        "_renew_until",
        "_resource",
        "_telling",
        "_until",
        "backend",
        "deadline",
        "degraded",
        "due",
        "host_lock",
        "key",
        "lost",
        "over",
        "owner",
        "token",
        "ttl",
    )

    def __init__(
        self, claim: Claim, grant: Grant, ttl: float, renew: bool, max_hold: float | None, counters: Counters
    ) -> None:
        self.backend: RedisLockBackend = claim.backend
        self._resource = claim.resource
        self.host_lock: HostLock = claim.host_lock
        self.owner: str = claim.owner
        self.key: str = claim.resource.key
        self.token: int = grant.token
        self.deadline: float = grant.deadline
        self.degraded: bool = grant.degraded
        self._confirm = grant.confirm
        self.ttl: float = ttl
        #: Why it is lost; None: it is not. Hot paths read this mark and the next in place of `state`.
        self.lost: str | None = None
        #: Whether it has ended.
        self.over: bool = False
        self._callbacks: list[Callable[[], object]] = []
        self._telling: list[Callable[[], object]] = []
        now = clock()
        self._renew_until = 0.0 if not renew else math.inf if max_hold is None else now + max_hold
        self._counters = counters
        self._mutex = threading.RLock()
        self._abandoned = False
        #: Its entry on the list of held locks.
        self._listed: str | None = None
        #: The end of the lease if the request on its way is granted.
        self._until = 0.0
        # First for the list: a lock that is released by then does not come on it.
        self._next = self._next_renewal(now, min(ttl, CONFIRM) if self._confirm is not None else ttl)
        self.due: float = min(self._next, now + FIRST_DUE)
        renew_in_child(self)

    @property
    def state(self) -> LeaseState:
        if self.over:
            return LeaseState.ENDED
        if self.lost is not None:
            return LeaseState.LOST
        return LeaseState.HELD if self._confirm is None else LeaseState.HANDED_OVER

    def start(self) -> None:
        renewer.add(self)

    def renew_after_fork(self) -> None:
        # The lock stays with the process that acquired it.
        self._mutex = threading.RLock()
        self.over = True
        self.lost = "it belongs to the parent process"
        self._callbacks = []
        self._confirm = None

    def entry(self) -> ListedLock:
        """Its entry on the list of held locks, now or soon."""
        return ListedLock(self._resource.kind, self._resource.name, self.owner, self.token)

    # -- the renewal thread's: `begin`, `finish`, `tell`; the first two under `backend.extending` ----------------------

    def begin(self) -> Renewal | None:
        """Returns the request for Redis, or None for no request. The caller calls `finish` next."""
        with self._mutex:
            if self._abandoned:
                self.over = True
                self.host_lock.leave()
            if self.over:
                return None
            self._settle()
            now = clock()
            if self.lost is None and now >= self.deadline:
                self._lose("its lease ran out before it could be renewed")
            if self.lost is not None:
                return None
            extends = self._next <= now < self._renew_until and self._prepare(self.ttl)
            if self.degraded or self.state is not LeaseState.HELD:
                return None
            self._listed = json.dumps(self.entry())
            left = self.ttl if extends else self.deadline - now
            return Renewal(self._resource, self.owner, self.token, left, extends, self._listed)

    def finish(self, reply: bool | BackendError | None, listed: bool) -> None:
        """Take in the reply, and see when the lease is due again.

        Args:
            reply: whether it was extended, or why nobody knows; None where Redis was not asked.
            listed: whether it is on the list of held locks, if it should be.
        """
        with self._mutex:
            if self.over:
                renewer.discard(self)
                return
            now = clock()
            renewing = now < self._renew_until
            if not listed:
                # Only the list lacks it; the renewal tells whether more is wrong.
                self._listed = None
                self._counters.add("locks.unlisted")
            if reply is not None and self.lost is None:
                self._take_in(reply)
            if self.lost is not None:
                self._telling, self._callbacks = self._callbacks, []
                # Lost in Redis, but this process may still be at work: nobody else on this host may go in.
                if renewing and self.host_lock.refresh(self.token, now + self.ttl):
                    self.due = now + self.ttl * RENEWED_AFTER
                else:
                    renewer.discard(self)
                return
            if now >= self._next:
                share = TRIED_AGAIN_AFTER if isinstance(reply, BackendError) else RENEWED_AFTER
                self._next = min(now + self.ttl * share, self.deadline) if renewing else self.deadline
            self.due = self._next

    def tell(self) -> None:
        """Run the callbacks of a lease that `finish` has found lost."""
        callbacks, self._telling = self._telling, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("on_lost callback of %s failed", self.key)

    # -- under the mutex -------------------------------------------------------------------------------------------

    def _next_renewal(self, now: float, span: float) -> float:
        """When its share of the granted time has passed. A lease that is not confirmed yet is urgent."""
        return self.deadline - (span * (1 - RENEWED_AFTER) if now < self._renew_until else 0)

    def _settle(self) -> None:
        """Take in Redis's reply to the confirmation of a hand-over, if there was one."""
        confirm, self._confirm = self._confirm, None
        if confirm is not None and (deadline := confirm()) is not None:
            self.deadline = deadline
            self._next = self._next_renewal(clock(), self.ttl)

    def _prepare(self, ttl: float) -> bool:
        """Returns whether Redis must be asked to let the lease end `ttl` from now.

        False where the lease is lost, and where it is degraded: then it has its new end already.
        """
        self._settle()
        sent = clock()
        if sent >= self.deadline:
            self._lose("its lease ran out")
            return False
        # The record vouches for this process, whatever Redis says.
        vouched_until = self.host_lock.refresh(self.token, sent + ttl)
        if not vouched_until:
            self._lose("its record ran out, or its lock file was removed")
            return False
        self._until = min(sent + ttl, vouched_until)
        if not self.degraded:
            if sent + ttl < self.deadline:
                # A shorter lease counts from now on: nobody may ever know whether the request was carried out.
                self.deadline = sent + ttl
                self._next = self.due = self._next_renewal(sent, ttl)
            return True
        self.deadline = self._until
        return False

    def _take_in(self, reply: bool | BackendError) -> None:
        """Take in the reply to a request that `_prepare` has allowed."""
        if isinstance(reply, BackendError):
            if isinstance(reply, BackendUnavailable):
                self._counters.add("locks.renewals_missed")
            else:
                log.warning("lock %s could not be renewed: %s", self.key, reply)
        elif reply:
            self.deadline = self._until
        else:
            self._lose("somebody else holds it, or has held it, or has taken it away")

    def _lose(self, why: str) -> None:
        self.lost = why
        self._counters.add("locks.lost")
        log.warning("lock %s was lost: %s", self.key, why)

    # -- the handle's ----------------------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds; 0 or less where the lease has ended."""
        if self._confirm is not None:
            with self._mutex:
                self._settle()
        return self.deadline - clock()

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback()` called when it is lost; at once if it is lost already."""
        with self._mutex:
            if self.lost is None:
                self._callbacks.append(callback)
                return
        callback()

    def extend(self, ttl: float) -> None:
        reply: bool | BackendError | None = None
        try:
            with self.backend.extending:
                with self._mutex:
                    asks = not self.over and self.lost is None and self._prepare(ttl)
                if asks:
                    reply = self.backend.extend(self._resource, self.owner, self.token, ttl)
                with self._mutex:
                    if self.over:
                        raise LockLost(f"lock {self.key} is not held: {self.lost or 'it was released'}")
                    if reply is not None and self.lost is None:
                        self._take_in(reply)
                    if self.lost is not None:
                        self.due = 0.0  # for the callbacks
                    else:
                        self._next = self._next_renewal(clock(), ttl)
                        self.due = min(self.due, self._next)
        finally:
            renewer.add(self)
        if self.lost is not None:
            raise LockLost(f"lock {self.key} was lost: {self.lost}")
        if isinstance(reply, BackendUnavailable):
            raise BackendUnavailable(f"Redis is away: lock {self.key} keeps the lease that it has") from reply
        if isinstance(reply, BackendError):
            raise reply

    def end(self) -> bool:
        held: bool | None = None
        try:
            with self._mutex:
                if self.over:
                    return False
                # Before the release, after which the confirmation would find no hand-over.
                self._settle()
                held = self.lost is None and clock() < self.deadline
                self.over = True
            return self._let_go() and held
        except BackendError:
            raise
        except BaseException:
            # A signal handler's exception struck somewhere in there: all of it is harmless the second time.
            if held is not None or not self.over:
                self.over = True
                self._let_go()
            raise

    def _let_go(self) -> bool:
        renewer.discard(self)
        # The host lock first: when another holder of this host can get in through Redis, it has been left already.
        self.host_lock.leave()
        return self.degraded or self.backend.release(self._resource, self.owner, self.token, self._listed)

    def abandon(self) -> None:
        """Stop renewing, without a word to Redis: the lease runs out by itself.

        Called by a destructor, in any thread, at any point: takes no lock, and leaves the rest to the renewal thread.
        """
        self._abandoned = True
