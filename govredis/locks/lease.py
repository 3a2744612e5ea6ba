"""Lease: what is held, as the handle and the renewal thread share it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

from .._counters import Counters
from .._fork import renew_in_child
from ..errors import BackendError, BackendUnavailable, LockLost
from .arbiter import CONFIRM, Arbiter, Resource
from .attempt import Grant
from .guard import Guard, clock
from .holders import Entry
from .renewal import FIRST_TICK, renewer

#: Seconds that a release waits for the renewal of the same lock. That takes two round trips, each with its timeout.
_PATIENCE = 1.0

log = logging.getLogger("govredis")


class Lease:
    """What is held: shared by the handle and the renewal thread, so that a forgotten handle can be collected.

    Args:
        arbiter: sends the extensions and the release.
        resource, owner: of the lock.
        ttl: seconds.
        grant: what the attempt won; its deadline counts from when it was *sent*.
        guard: entered.
        renew: False: it ends at its deadline.
        max_hold: seconds after which it is renewed no more.
        counters: of the GovRedis.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_arbiter",
        "_confirm",
        "_counters",
        "_ending",
        "_listed",
        "_mutex",
        "_next",
        "_renew_until",
        "_resource",
        "callbacks",
        "deadline",
        "degraded",
        "due",
        "guard",
        "key",
        "lost",
        "over",
        "owner",
        "token",
        "ttl",
    )

    def __init__(
        self,
        arbiter: Arbiter,
        resource: Resource,
        owner: str,
        ttl: float,
        grant: Grant,
        guard: Guard,
        renew: bool,
        max_hold: float | None,
        counters: Counters,
    ) -> None:
        self._arbiter = arbiter
        self._resource = resource
        self.key = resource.key
        self.owner = owner
        self.token, self.deadline, self.degraded, self._confirm = grant
        self.ttl = ttl
        self.guard = guard
        self.lost: str | None = None
        self.over = False
        self.callbacks: list[Callable[[], object]] = []
        now = clock()
        self._renew_until = 0.0 if not renew else math.inf if max_hold is None else now + max_hold
        self._counters = counters
        self._mutex = threading.RLock()
        self._abandoned = False
        self._ending = False
        #: As it stands on the list of what is held.
        self._listed: str | None = None
        # First for the list, on which no lock comes that is gone again by then.
        self._next = self._next_renewal(now)
        self.due = min(self._next, now + FIRST_TICK)
        renew_in_child(self)

    def start(self) -> None:
        renewer.add(self)

    def renew_after_fork(self) -> None:
        # The lock stays with the process that acquired it.
        self._mutex = threading.RLock()
        self.over = True
        self.lost = "it belongs to the parent process"
        self.callbacks = []
        self._confirm = None

    def of(self, arbiter: Arbiter) -> bool:
        return self._arbiter is arbiter

    def entry(self) -> Entry:
        """What stands, or will, on the list of what is held."""
        return Entry(self._resource.kind, self._resource.name, self.owner, self.token)

    def tick(self) -> None:
        """Renew, if it is still to be renewed; declare the loss when its time has come."""
        with self._mutex:
            if self._abandoned:
                self.over = True
                self.guard.leave()
            if self._ending:
                self.end()
            if self.over:
                renewer.discard(self)
                return
            self._settle()
            now = clock()
            renewing = now < self._renew_until
            if self.lost is None and now >= self.deadline:
                self._lose("its lease ran out before it could be renewed")
            if self.lost is None and now >= self._next:
                try:
                    extended = renewing and self._extend(self.ttl)
                except BackendError as error:
                    log.warning("lock %s could not be renewed: %s", self.key, error)
                    extended = False
                again = self.ttl / (3 if extended else 10)
                self._next = min(now + again, self.deadline) if renewing else self.deadline
            if self.lost is None:
                self._enlist()
                self.due = self._next
            if self.lost is not None:
                # Lost in Redis, but this process is still inside: on this host nobody else shall be.
                if renewing and self.guard.refresh(self.token, now + self.ttl):
                    self.due = now + self.ttl / 3
                else:
                    renewer.discard(self)
                callbacks, self.callbacks = self.callbacks, []
            else:
                callbacks = []
            if self._ending:
                self.due = 0.0
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("on_lost callback of %s failed", self.key)

    def _next_renewal(self, now: float) -> float:
        if now >= self._renew_until:
            return self.deadline
        # Of one that was handed over and is not confirmed yet, the deadline is near; and so is this.
        span = self.ttl if self._confirm is None or self.ttl < CONFIRM else CONFIRM
        return self.deadline - span * 2 / 3

    def _settle(self) -> None:
        """Take in Redis's reply to the confirmation of a hand-over, if it has not been."""
        confirm, self._confirm = self._confirm, None
        if confirm is not None and (deadline := confirm()) is not None:
            self.deadline = deadline
            self._next = self._next_renewal(clock())

    def left(self) -> float:
        """Seconds; 0 or less where the lease has ended."""
        if self._confirm is not None:
            with self._mutex:
                self._settle()
        return self.deadline - clock()

    def _enlist(self) -> None:
        left = self.deadline - clock()
        if self.degraded or left <= 0:
            return
        try:
            self._listed = self._arbiter.enlist(self._resource, self.owner, self.token, left)
        except BackendError:
            # Only the list lacks it; the renewal tells whether more is wrong.
            self._counters.add("locks.unlisted")

    def _lose(self, why: str) -> None:
        self.lost = why
        self._counters.add("locks.lost")
        log.warning("lock %s was lost: %s", self.key, why)

    def _extend(self, ttl: float) -> bool:
        """Make the lease end `ttl` from now. False if Redis was away (the lease stands) or the lock is lost."""
        self._settle()
        sent = clock()
        if sent >= self.deadline:
            self._lose("its lease ran out")
            return False
        # The record vouches for this process, whatever Redis says.
        vouched = self.guard.refresh(self.token, sent + ttl)
        if self.degraded:
            if not vouched:
                self._lose("its record ran out")
                return False
        else:
            try:
                if not self._arbiter.extend(self._resource, self.owner, self.token, ttl):
                    self._lose("somebody else holds it, or has held it")
                    return False
            except BackendUnavailable:
                self._counters.add("locks.renewals_missed")
                # It may have been carried out all the same, which matters where it shortens the lease.
                self.deadline = min(self.deadline, sent + ttl)
                return False
        self.deadline = sent + ttl
        return True

    def extend(self, ttl: float) -> None:
        with self._mutex:
            if self.over:
                raise LockLost(f"lock {self.key} is not held: {self.lost or 'it was released'}")
            extended = self.lost is None and self._extend(ttl)
            if self.lost is not None:
                self.due = 0.0  # for the callbacks
            else:
                self._next = self.deadline - (ttl * 2 / 3 if clock() < self._renew_until else 0)
                self.due = min(self.due, self._next)
        renewer.add(self)
        if self.lost is not None:
            raise LockLost(f"lock {self.key} was lost: {self.lost}")
        if not extended:
            raise BackendUnavailable(f"Redis is away: lock {self.key} keeps the lease that it has")

    def end(self) -> bool:
        if not self._mutex.acquire(timeout=_PATIENCE):
            # Whoever has it may be waiting for this very thread: a collection runs destructors anywhere, in the midst
            # of a renewal too, and they release locks. The renewal thread sees to it.
            held = not self.over and self.lost is None and clock() < self.deadline
            self._ending, self.due = True, 0.0
            renewer.add(self)
            return held
        try:
            if self.over:
                return False
            # Before the release, which would make it one of nothing.
            self._settle()
            held = self.lost is None and clock() < self.deadline
            self.over = True
            try:
                return self._let_go() and held
            except BackendError:
                raise
            except BaseException:
                # A signal handler's exception struck somewhere in there: all of it is harmless the second time.
                self._let_go()
                raise
        finally:
            self._mutex.release()

    def _let_go(self) -> bool:
        renewer.discard(self)
        # The guard first: while anybody on this host could get in through Redis, it has been left already.
        self.guard.leave()
        return self.degraded or self._arbiter.release(self._resource, self.owner, self.token, self._listed)

    def abandon(self) -> None:
        """Stop renewing, without a word to Redis: the lease runs out by itself.

        Called by a destructor, in any thread, at any point: takes no lock, and leaves the rest to the renewal thread.
        """
        self._abandoned = True
