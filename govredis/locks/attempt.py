"""Attempt: one call of acquire. Redis first, the host's guard second, the fallback where Redis is away."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import NamedTuple

from ..client import LONGEST_POP, Pending
from ..errors import BackendError, BackendUnavailable, LockTimeout, LockUnavailable
from .arbiter import CONFIRM, Arbiter, Resource
from .guard import Guard, clock

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children

#: How long Redis must have been away before anybody goes on without it: a stall must not split the holders.
GRACE = 1.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.002, 0.05


class Grant(NamedTuple):
    """What an attempt won.

    Attributes:
        token: the fencing token.
        deadline: of the lease, on guard.clock.
        degraded: the host's guard alone has granted it.
        confirm: None; or, where it was handed over, takes in Redis's reply to the confirmation, which makes it a lease:
            returns the new deadline, or None where there is none.
    """

    token: int
    deadline: float
    degraded: bool
    confirm: Callable[[], float | None] | None = None


class Attempt:
    """One call of acquire.

    Args:
        arbiter, resource, guard, owner: of the lock.
        ttl: seconds of its lease.
        fallback: "file" or "fail".
        succeeds: whom it succeeds, by what `guard` has claimed.
    """

    __slots__ = (
        "_arbiter",
        "_asked",
        "_away_since",
        "_confirmation",
        "_confirming",
        "_fallback",
        "_floor",
        "_queued",
        "_redis",
        "_resource",
        "_succeeds",
        "_token",
        "_ttl",
        "_unanswered",
        "guard",
        "known",
        "owner",
        "waits_since",
    )

    def __init__(
        self,
        arbiter: Arbiter,
        resource: Resource,
        ttl: float,
        guard: Guard,
        owner: str,
        fallback: str,
        succeeds: str | None = None,
    ) -> None:
        self._arbiter = arbiter
        self._redis = arbiter.redis
        self._resource = resource
        self._ttl = ttl
        self._fallback = fallback
        self._succeeds = succeeds
        self.guard = guard
        self.owner = owner
        #: Redis has granted it to us, or has us in the queue; or may have: some try of ours got no answer.
        self.known = False
        #: Of `clock`; None for one that had it at once.
        self.waits_since: float | None = None
        self._queued = False
        self._asked = 0.0
        self._token = 0
        #: The last token that this host is known to have let in: asked for only where it turned out to matter, or where
        #: the guard shall not refuse the first token granted, which would let another one claim it.
        self._floor = 0 if succeeds is None else guard.last_token()
        self._away_since: float | None = None
        self._unanswered: BackendUnavailable | None = None
        self._confirmation = b""
        self._confirming: Pending | None = None

    def run(self, timeout: float | None) -> Grant:
        """Returns what it won. Raises LockTimeout, LockUnavailable, BackendError; `give_up` is then to be called."""
        started = clock()
        deadline = None if timeout is None else started + timeout
        wait = _SHORTEST_WAIT
        while True:
            self._queued = False
            left = math.inf if deadline is None else deadline - clock()
            won = self._try_redis(left > 0) if self._redis is not None else self._fall_back("Redis is disabled")
            if won is not None:
                return won
            if left <= 0:
                if self._unanswered is not None and not self._grace_is_over():
                    raise LockUnavailable(
                        f"lock {self._resource.key}: {self._unanswered}; the grace of {GRACE:g} s is not over"
                    ) from self._unanswered
                raise LockTimeout(f"lock {self._resource.key} was held by others for all of {timeout:g} s")
            if self.waits_since is None:
                self.waits_since = started
                # Now, while there is time.
                self._confirmation = self._arbiter.confirmation(self._resource, self.owner, self._ttl)
            if self._queued and (won := self._wait_for_turn(left)) is not None:
                return won
            if not self._queued:
                # Redis is away, or does not let us wait, or has granted what the host's guard does not let in.
                time.sleep(min(left, wait * _random.uniform(0.5, 1.0)))
                wait = min(_LONGEST_WAIT, wait * 2)

    def _wait_for_turn(self, left: float) -> Grant | None:
        """Until the lock is handed to us; or until it is time to be seen alive, and to see how the holder is."""
        try:
            token = self._arbiter.wait(self._resource, self.owner, min(left, LONGEST_POP))
        except BackendUnavailable:
            self._queued = False  # the next try finds out too, and knows what to do
            return None
        return None if token is None else self._take_over(token)

    def _take_over(self, token: int) -> Grant | None:
        """Go in with what was handed to us, while Redis makes it a lease: its reply is not waited for.

        None where that will not do; the next try then asks for all of it, as after a lost reply.
        """
        assert self._redis is not None
        now = clock()
        # It was handed over after we had asked, so Redis keeps it until then at least.
        handed_until = self._asked + CONFIRM
        if now >= handed_until - CONFIRM / 2:
            return None  # we were stopped
        self._token = token
        try:
            self._confirming = confirming = self._redis.send(self._confirmation)
        except BackendUnavailable:
            return None
        until = now + self._ttl
        if not self.guard.enter(token, self.owner, until, may_pass=True):
            self._settle()
            return None

        def confirm() -> float | None:
            try:
                return until if confirming.reply()[0] else None
            except BackendError:
                return None  # the renewal finds out

        return Grant(token, min(handed_until, until), False, confirm)

    def _settle(self) -> None:
        """Have a confirmation that is on its way behind us."""
        confirming, self._confirming = self._confirming, None
        if confirming is not None:
            try:
                confirming.reply()
            except BackendError:
                pass

    def _try_redis(self, waits: bool) -> Grant | None:
        self._asked = sent = clock()
        before, self.known = self.known, True
        try:
            granted, token = self._arbiter.acquire(
                self._resource, self.owner, self._ttl, self._floor, waits, self._succeeds
            )
        except BackendUnavailable as error:
            # Without a cause it was our breaker or our pool that said no: nothing was sent.
            self.known = before or error.__cause__ is not None
            return self._without_redis(error)
        self._away_since = self._unanswered = None
        if not granted:
            self._queued = waits
            self.known = before or waits
            return None
        self._token = token
        if self.guard.enter(token, self.owner, sent + self._ttl, may_pass=True):
            return Grant(token, sent + self._ttl, False)
        self._floor = self.guard.last_token()
        if self._floor >= token:
            # Somebody on this host was let in with a token of a clock ahead of Redis's. It is our turn all the same.
            return self._try_redis(waits)
        # Somebody on this host is still inside, whatever Redis says. Other hosts need not wait for us meanwhile.
        self._arbiter.release(self._resource, self.owner, token)
        self.known = before
        return None

    def _without_redis(self, error: BackendUnavailable) -> Grant | None:
        assert self._redis is not None
        self._unanswered = error
        if error.__cause__ is None and self._redis.breaker.closed:
            return None  # our own pool is full: Redis is there, and may have granted the lock to others
        if self._away_since is None:
            self._away_since = clock() - self._redis.breaker.away_for()
        if not self._grace_is_over():
            return None
        return self._fall_back(error)

    def _grace_is_over(self) -> bool:
        return self._away_since is not None and clock() - self._away_since >= GRACE

    def _fall_back(self, why: object) -> Grant | None:
        if self._fallback == "fail":
            raise LockUnavailable(f"lock {self._resource.key}: {why}")
        now = clock()
        token = max(self.guard.last_token() + 1, time.time_ns() // 1000)
        if self.guard.enter(token, self.owner, now + self._ttl, may_pass=False):
            return Grant(token, now + self._ttl, True)
        return None

    def give_up(self) -> None:
        """Leave nothing behind: not held, or an exception struck."""
        self._settle()
        self.guard.leave()
        if self.known:
            self._arbiter.release(self._resource, self.owner, self._token)
