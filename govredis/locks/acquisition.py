"""Acquisition: one call of acquire. It asks Redis first, then the host lock; where Redis is away, the fallback."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import NamedTuple

from .._boottime import clock
from .._pool import PoolExhausted
from ..client import LONGEST_POP, NotServedHere, Pending
from ..errors import BackendError, BackendUnavailable, LockTimeout, LockUnavailable, NotAsked, NotTaken
from .backends.redis_backend import CONFIRM, RedisLockBackend, UnconfirmedGrant
from .host_lock.base import HostLock
from .host_lock.record import LockRecord
from .resource import Resource

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children

#: Seconds that Redis must have been away before anybody goes on without it: a stall must not split the holders.
GRACE = 1.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.002, 0.05


class Claim(NamedTuple):
    """One caller's claim to a lock: an acquisition pursues it, and the lease that it wins goes on with it.

    Attributes:
        host_lock: opened for this claim alone.
        owner: the owner token in Redis.
    """

    backend: RedisLockBackend
    resource: Resource
    host_lock: HostLock
    owner: str


class Grant(NamedTuple):
    """The result of an acquisition that succeeded.

    Attributes:
        token: the fencing token.
        deadline: the lease's end, on the host's clock.
        degraded: the host lock alone has granted it.
        confirm: None, unless the lock was handed over. Takes in Redis's reply to the confirmation, which makes the
            hand-over a lease: returns its deadline, or None where there is none.
    """

    token: int
    deadline: float
    degraded: bool
    confirm: Callable[[], float | None] | None = None


class Acquisition:
    """One call of acquire.

    Args:
        claim: the claim.
        ttl: seconds of the lease.
        fallback: "file" or "fail".
    """

    __slots__ = (
        "_asked",
        "_away_since",
        "_backend",
        "_confirmation",
        "_confirming",
        "_fallback",
        "_floor",
        "_queued",
        "_redis",
        "_reported_dead",
        "_resource",
        "_token",
        "_ttl",
        "_unanswered",
        "host_lock",
        "known",
        "owner",
        "waits_since",
    )

    def __init__(self, claim: Claim, ttl: float, fallback: str) -> None:
        self._backend, self._resource = claim.backend, claim.resource
        self.host_lock: HostLock = claim.host_lock
        self.owner: str = claim.owner
        self._redis = self._backend.redis
        self._ttl = ttl
        self._fallback = fallback
        #: Whether Redis may know this owner: it has granted the lock, has queued the owner, or has left a try
        #: unanswered.
        self.known: bool = False
        #: On the host's clock; None where the lock was free.
        self.waits_since: float | None = None
        self._queued = False
        self._asked = 0.0
        self._token = 0
        #: The last token that this host has let in, once that turned out to matter.
        self._floor = 0
        #: The dead holder that Redis was told of.
        self._reported_dead: LockRecord | None = None
        self._away_since: float | None = None
        self._unanswered: BackendUnavailable | None = None
        self._confirmation = b""
        self._confirming: Pending | None = None

    def run(self, timeout: float | None) -> Grant:
        """Returns the grant. Raises LockTimeout, LockUnavailable, BackendError; the caller then calls `give_up`."""
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
                    later = ""
                    if self._away_since is not None and self._fallback != "fail":
                        later = f"; lock files take over once it has been away for {GRACE:g} s"
                    raise LockUnavailable(f"{self._resource.key}: {self._unanswered}{later}") from self._unanswered
                held = f"was held by others for all of {timeout:g} s" if timeout else "is held by another"
                raise LockTimeout(f"{self._resource.key} {held}")
            if self.waits_since is None:
                self.waits_since = started
                # Made now, while there is time.
                self._confirmation = self._backend.confirmation(self._resource, self.owner, self._ttl)
            if self._queued and (won := self._wait_for_turn(left)) is not None:
                return won
            if not self._queued:
                # Redis is away, or refuses to queue it, or has granted a lock that the host lock refuses.
                time.sleep(min(left, wait * _random.uniform(0.5, 1.0)))
                wait = min(_LONGEST_WAIT, wait * 2)

    def _wait_for_turn(self, left: float) -> Grant | None:
        """Wait until the lock is handed over, or until it is time to show that this waiter lives and to ask again."""
        try:
            token = self._backend.wait(self._resource, self.owner, min(left, LONGEST_POP))
        except (BackendUnavailable, NotTaken):
            self._queued = False  # the next try fails too, and handles that
            return None
        return None if token is None else self._take_over(token)

    def _take_over(self, token: int) -> Grant | None:
        """Go in with the lock that was handed over, while Redis makes it a lease: its reply is not waited for.

        None where that fails; the next try then asks for all of it, as after a lost reply. Where a replica has to
        confirm the grant, this asks for all of it, too.
        """
        assert self._redis is not None
        if self._backend.confirm:
            return self._try_redis(True)
        now = clock()
        # It was handed over after the last request, so Redis keeps it until then at least.
        handed_until = self._asked + CONFIRM
        if now >= handed_until - CONFIRM / 2:
            return None  # this process was stopped
        self._token = token
        try:
            node = self._redis.at(self._resource.key)
            self._confirming = confirming = node.send(self._confirmation)
        except BackendUnavailable:
            return None
        until = now + self._ttl
        if not self.host_lock.enter(token, self.owner, until, may_pass=True):
            self._settle()
            return None

        breaker = node.breaker

        def confirm() -> float | None:
            if not breaker.closed:
                return None  # many may be handed over: each in turn would wait for a server that hangs
            try:
                return until if confirming.reply()[0] else None
            except BackendError:
                return None  # the renewal finds out

        return Grant(token, min(handed_until, until), False, confirm)

    def _settle(self) -> None:
        """Wait for the reply to a confirmation that is on its way."""
        confirming, self._confirming = self._confirming, None
        if confirming is not None:
            try:
                confirming.reply()
            except BackendError:
                pass

    def _try_redis(self, waits: bool, dead: LockRecord | None = None) -> Grant | None:
        self._asked = sent = clock()
        before, self.known = self.known, True
        try:
            granted, token = self._backend.acquire(self._resource, self.owner, self._ttl, self._floor, waits, dead)
        except BackendUnavailable as error:
            self.known = before or not isinstance(error, NotAsked | NotServedHere)
            return self._without_redis(error)
        self._away_since = self._unanswered = None
        if not granted:
            self._queued = waits
            self.known = before or waits
            self._reported_dead = dead or self._reported_dead
            dead = self.host_lock.dead_holder()
            return None if dead is None or dead == self._reported_dead else self._try_redis(waits, dead)
        self._token = token
        if self.host_lock.enter(token, self.owner, sent + self._ttl, may_pass=True):
            return Grant(token, sent + self._ttl, False)
        self._floor = self.host_lock.last_token()
        if self._floor >= token:
            # This host has let in a token of a clock ahead of Redis's. It is this caller's turn all the same.
            return self._try_redis(waits)
        # Another holder is still inside on this host, whatever Redis says. Other hosts need not wait for this one.
        self._backend.release(self._resource, self.owner, token)
        self.known = before
        return None

    def _without_redis(self, error: BackendUnavailable) -> Grant | None:
        assert self._redis is not None
        self._unanswered = error
        if isinstance(error, PoolExhausted):
            return None  # Redis is there, and may have granted the lock to others
        if isinstance(error, NotServedHere | UnconfirmedGrant):
            self._away_since = None  # so it is here, and grants locks to others at any moment
            return None
        if self._away_since is None:
            self._away_since = clock() - self._redis.away_for(self._resource.key)
        if not self._grace_is_over():
            return None
        return self._fall_back(error)

    def _grace_is_over(self) -> bool:
        return self._away_since is not None and clock() - self._away_since >= GRACE

    def _fall_back(self, why: object) -> Grant | None:
        if self._fallback == "fail":
            raise LockUnavailable(f"{self._resource.key}: {why}")
        now = clock()
        token = max(self.host_lock.last_token() + 1, time.time_ns() // 1000)
        if self.host_lock.enter(token, self.owner, now + self._ttl, may_pass=False):
            return Grant(token, now + self._ttl, True)
        return None

    def give_up(self) -> None:
        """Leave nothing behind: the lock was not got, or an exception struck."""
        self._settle()
        self.host_lock.leave()
        if self.known:
            self._backend.release(self._resource, self.owner, self._token)
