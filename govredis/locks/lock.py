"""DistributedLock: one holder at a time, by Redis across hosts and by flock on each."""

from __future__ import annotations

import itertools
import math
import os
import random
import time

from .._counters import Counters
from .._fork import renew_in_child
from ..client import LONGEST_POP, RedisClient, Script
from ..errors import BackendUnavailable, LockTimeout, LockUnavailable, check_timeout, check_ttl
from ..keys import Keys, sibling
from .guard import HostGuard, LockFolder, clock
from .held import HeldLock, Lease

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children

#: How long Redis must have been away before anybody goes on without it: a stall must not split the holders.
GRACE = 1.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.002, 0.05
#: The fence outlives the lease by a day; after that the server's clock, being the larger, takes its place.
_FENCE_KEPT_MS = "86400000"


class DistributedLock:
    """Locks by name. `with gov.locks.acquire("agent-123", timeout=5) as held: ...`

    What it promises:

    - on one living Redis, one holder at a time among all hosts, for as long as the holder's lease lasts (`ttl`, renewed
      at a third of it); a holder that dies frees it within the ttl (a degraded one at once);
    - on one host (processes that share a lock folder) holders do not overlap whatever Redis does: killed, hung,
      restarted, flushed. Every holder also holds `flock` on the resource's file;
    - when Redis has been away for a second: GOVREDIS_LOCK_FALLBACK "file" (the default) grants by `flock` alone, one
      holder per *host*, and says so in `held.degraded`; "fail" raises LockUnavailable. Within that second, callers wait
      for it, and raise LockUnavailable if their timeout ends first. With REDIS_ENABLED=0 there is no such second;
    - `held.token` rises with every grant. What no lease can promise: see HeldLock.

    Whoever has waited longest is next: a release hands the lock over, and wakes just that waiter. One that has died, or
    has been stopped for a second, is passed over. A holder from outside (a plain SET NX) is respected, and its end
    noticed within a quarter of a second; an outsider that polls gets it when nobody waits. Without Redis, waiting
    polls, every 2 to 50 ms, in no particular order. Every method raises ValueError for a bad name, ttl or
    timeout before anything is sent.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        *,
        ttl: float,
        fallback: str,
        folder: str | None,
        counters: Counters,
    ) -> None:
        self._keys = keys
        self._redis = redis
        self._ttl = check_ttl(ttl)
        self._fallback = fallback
        self._folder = LockFolder(folder)
        self.counters = counters
        self._acquire = Script(__package__, "queue.lua", "acquire.lua")
        self._release = Script(__package__, "queue.lua", "release.lua")
        self._extend = Script(__package__, "extend.lua")
        if redis is not None:
            redis.on_recovery(self._replay)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._nonce = f"{os.getpid()}-{os.urandom(6).hex()}"
        self._owners = itertools.count()
        #: Grants that may be nobody's: (key, owner, token) of releases and lost acquires that Redis has not answered.
        #: Without a lock, which a signal handler or a destructor that releases could find taken by what it interrupts.
        self._owed: set[tuple[str, str, int]] = set()

    def acquire(
        self,
        name: str,
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLock:
        """Wait for the lock, and hold it.

        Args:
            name: of what is locked.
            timeout: seconds to wait; 0: one try; None: for ever.
            ttl: seconds of its lease; None: REDIS_LOCK_TIMEOUT.
            renew: keep it past its ttl, in the background. False: it ends at its ttl.
            max_hold: seconds after which it is renewed no more; None: no bound.

        Returns a HeldLock: use it with `with`. Raises LockTimeout if somebody else held it all the while,
        LockUnavailable if Redis was away and the fallback forbids another way or its grace had not passed.
        """
        wait = None if timeout is None else check_timeout(timeout)
        return self._wait_for(name, wait, ttl, renew, max_hold)

    def try_acquire(self, name: str, *, ttl: float | None = None, renew: bool = True) -> HeldLock | None:
        """Hold the lock if nobody else does; None if somebody does. Never waits.

        Raises LockUnavailable as `acquire`.
        """
        try:
            return self._wait_for(name, 0.0, ttl, renew, None)
        except LockTimeout:
            return None

    # -- for Lease -----------------------------------------------------------------------------------------------

    def send_extend(self, key: str, owner: str, token: int, ttl: float) -> bool:
        """True if extended, False if lost. Raises BackendUnavailable."""
        assert self._redis is not None
        return bool(self._redis.run(self._extend, self._cells(key)[:2], owner, _ms(ttl), str(token), _FENCE_KEPT_MS))

    def send_release(self, key: str, owner: str, token: int) -> bool:
        """Whether it was still the owner's; where Redis is away, it is released on recovery, and True."""
        assert self._redis is not None
        try:
            return bool(self._redis.run(self._release, self._cells(key), owner, str(token), _FENCE_KEPT_MS))
        except BackendUnavailable:
            self._owe(key, owner, token)
            return True

    # -- inside --------------------------------------------------------------------------------------------------

    def _cells(self, key: str) -> tuple[str, str, str, str]:
        return key, sibling(key, "fence"), sibling(key, "queue"), sibling(key, "waiters")

    def _wait_for(
        self, name: str, timeout: float | None, ttl: float | None, renew: bool, max_hold: float | None
    ) -> HeldLock:
        key = self._keys.lock(name)
        ttl = self._ttl if ttl is None else check_ttl(ttl)
        if max_hold is not None:
            check_ttl(max_hold, "max_hold")
        attempt = _Attempt(self, key, ttl, self._folder.guard(key), f"{self._nonce}-{next(self._owners)}")
        lease: Lease | None = None
        try:
            token, deadline, degraded = attempt.run(timeout)
            self.counters.add("locks.degraded_grants" if degraded else "locks.grants")
            if degraded and attempt.known:
                self._owe(key, attempt.owner, 0)
            lease = Lease(self, key, attempt.owner, token, ttl, deadline, attempt.guard, degraded, renew, max_hold)
            held = HeldLock(name, lease)
            # Last, when there is a handle whose collection would end it.
            lease.start()
            return held
        except BaseException as error:
            if lease is not None:
                lease.end()
            else:
                attempt.give_up()
            if isinstance(error, LockTimeout):
                self.counters.add("locks.timeouts")
            raise

    def _owe(self, key: str, owner: str, token: int) -> None:
        self._owed.add((key, owner, token))
        if self._redis is not None:
            self._redis.replay_soon("locks are to be released on it")

    def _replay(self, redis: RedisClient) -> None:
        """Release what may have been granted to nobody: a hung server executes what timed out when it wakes."""
        owed = list(self._owed)
        if not owed:
            return
        calls = [
            self._release.call(self._cells(key), (owner, str(token), _FENCE_KEPT_MS)) for key, owner, token in owed
        ]
        redis.pipeline(calls, (self._release,))
        self._owed.difference_update(owed)


def _ms(ttl: float) -> str:
    # One more: Redis counts from the start of the current millisecond, and shall not forget before we do.
    return str(math.ceil(ttl * 1000) + 1)


class _Attempt:
    """One call of acquire: Redis first, the host guard second, the fallback where Redis is away."""

    def __init__(self, lock: DistributedLock, key: str, ttl: float, guard: HostGuard, owner: str) -> None:
        self._lock = lock
        self._redis = lock._redis
        self._key = key
        self._ttl = ttl
        self.guard = guard
        self.owner = owner
        #: Redis has granted it to us, or has us in the queue; or may have: some try of ours got no answer.
        self.known = False
        self._queued = False
        self._token = 0
        #: The last token that this host is known to have let in: asked for only where it turned out to matter.
        self._floor = 0
        self._away_since: float | None = None
        self._unanswered: BackendUnavailable | None = None

    def run(self, timeout: float | None) -> tuple[int, float, bool]:
        """Returns the token, the deadline of the lease, and whether it is degraded."""
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
                        f"lock {self._key}: {self._unanswered}; the grace of {GRACE:g} s is not over"
                    ) from self._unanswered
                raise LockTimeout(f"lock {self._key} was held by others for all of {timeout:g} s")
            if not self._queued or not self._wait_for_turn(left):
                # Redis is away, or does not let us wait, or has granted what the host's guard does not let in.
                time.sleep(min(left, wait * _random.uniform(0.5, 1.0)))
                wait = min(_LONGEST_WAIT, wait * 2)

    def _wait_for_turn(self, left: float) -> bool:
        """Until the lock is handed to us; or until it is time to be seen alive, and to see how the holder is.

        False if that could not be waited for.
        """
        assert self._redis is not None
        try:
            self._redis.pop(f"{sibling(self._key, 'queue')}:{self.owner}", min(left, LONGEST_POP))
        except BackendUnavailable:
            return False  # the next try finds out too, and knows what to do
        return True

    def _try_redis(self, waits: bool) -> tuple[int, float, bool] | None:
        assert self._redis is not None
        lock = self._lock
        sent = clock()
        before, self.known = self.known, True
        try:
            granted, token = self._redis.run(
                lock._acquire,
                lock._cells(self._key),
                self.owner,
                _ms(self._ttl),
                str(self._floor),
                _FENCE_KEPT_MS,
                "1" if waits else "0",
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
            return token, sent + self._ttl, False
        self._floor = self.guard.last_token()
        if self._floor >= token:
            # Somebody on this host was let in with a token of a clock ahead of Redis's. It is our turn all the same.
            return self._try_redis(waits)
        # Somebody on this host is still inside, whatever Redis says. Other hosts need not wait for us meanwhile.
        lock.send_release(self._key, self.owner, token)
        self.known = before
        return None

    def _without_redis(self, error: BackendUnavailable) -> tuple[int, float, bool] | None:
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

    def _fall_back(self, why: object) -> tuple[int, float, bool] | None:
        if self._lock._fallback == "fail":
            raise LockUnavailable(f"lock {self._key}: {why}")
        now = clock()
        token = max(self.guard.last_token() + 1, time.time_ns() // 1000)
        if self.guard.enter(token, self.owner, now + self._ttl, may_pass=False):
            return token, now + self._ttl, True
        return None

    def give_up(self) -> None:
        """Leave nothing behind: not held, or an exception struck."""
        self.guard.leave()
        if self.known:
            self._lock.send_release(self._key, self.owner, self._token)
