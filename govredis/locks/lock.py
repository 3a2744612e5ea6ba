"""DistributedLock: one holder at a time, by Redis across hosts and by flock on each."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from .._counters import Counters
from .._templates import KeyTemplate, refuse_unless_plain
from ..client import RedisClient, Script
from ..errors import BackendUnavailable, LockTimeout, LockUnavailable, check_timeout, check_ttl, refuse
from ..keys import Keys, sibling
from .arbiter import FENCE_KEPT_MS, Arbiter, Resource
from .attempt import Attempt
from .guard import Guard, LockFolder, clock
from .held import HeldLock, HeldLocks
from .holders import Entry, LockHolder, read_holder, read_list, still_held
from .lease import Lease
from .renewal import renewer
from .shared import MOST_SLOTS, ReadWriteLock, Semaphore, cells

P = ParamSpec("P")
R = TypeVar("R")

_REMEMBERED = 1000


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
    polls, every 2 to 50 ms, in no particular order.

    Uncontended, `acquire` and `release` are one round trip each; who is handed the lock goes in at once, while Redis
    makes it a lease. Every method raises ValueError for a bad name, ttl or timeout before anything is sent. A lock
    folder holds a file of 128 bytes for each name ever locked there, and one for each slot of a semaphore.
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
        self._arbiter = Arbiter(
            redis, ("queue.lua", "hand.lua"), ("acquire.lua", "extend.lua", "release.lua"), keys.held_locks()
        )
        self._shared = Arbiter(
            redis,
            ("queue.lua", "slots.lua"),
            ("slots_acquire.lua", "slots_extend.lua", "slots_release.lua"),
            keys.held_locks(),
        )
        #: The same names come again and again.
        self._resources = functools.lru_cache(_REMEMBERED)(self._make_resource)
        self._force = Script(__package__, "queue.lua", "hand.lua", "force.lua")

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
        LockUnavailable if Redis was away and the fallback forbids another way or its grace had not passed. The timeout
        is kept to within 50 ms, and the socket timeout where Redis hangs just then.
        """
        resource = self._resource(name)
        return self._hold(self._arbiter, resource, self._folder.guard(resource.key), timeout, ttl, renew, max_hold)

    def try_acquire(self, name: str, *, ttl: float | None = None, renew: bool = True) -> HeldLock | None:
        """Hold the lock if nobody else does; None if somebody does. Never waits.

        Raises LockUnavailable as `acquire`.
        """
        try:
            return self.acquire(name, timeout=0, ttl=ttl, renew=renew)
        except LockTimeout:
            return None

    def acquire_for(self, run: str, name: str, *, ttl: float | None = None) -> HeldLock:
        """One try of `acquire` for a run that may be begun again after a crash, as a Celery task of the same id is.

        Whoever died on this host while it held the lock for the same run is succeeded at once: the kernel has freed its
        file, so that it is certainly gone. Elsewhere nobody can tell, and its lease is waited for.

        Args:
            run: what identifies it.
        """
        _check(0, ttl, None)
        resource = self._resource(name)
        suffix = f"~{hashlib.sha256(run.encode()).hexdigest()[:12]}"
        # Not by the owner token of whom it succeeds: a release that is still owed to Redis would be of both.
        owner = self._arbiter.owner("lock") + suffix
        guard = self._folder.guard(resource.key)
        return self._hold(self._arbiter, resource, guard, 0, ttl, True, None, owner, guard.claim(suffix))

    def acquire_many(
        self,
        names: Iterable[str],
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLocks:
        """Wait for several locks, and hold all of them; or none. Arguments as of `acquire`; `timeout` is for all.

        They are taken in sorted order, so that two callers that want the same ones never wait for each other. Returns a
        HeldLocks: use it with `with`. Raises ValueError for no name, and what `acquire` raises.
        """
        listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else []
        if not listed:
            raise refuse("names", names, "the names of the locks, one at least")
        for name in listed:
            self._keys.lock(name)
        until = None if timeout is None else clock() + check_timeout(timeout)
        held: dict[str, HeldLock] = {}
        try:
            for name in sorted(set(listed)):
                left = None if until is None else max(0.0, until - clock())
                held[name] = self.acquire(name, timeout=left, ttl=ttl, renew=renew, max_hold=max_hold)
            return HeldLocks(held)
        except BaseException as error:
            # As at the end of a body that failed: no release hides why.
            HeldLocks(held).__exit__(type(error), error, None)
            raise

    def locked(
        self,
        name: str,
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Hold a lock during the calls of a function, one of its own each.

        Args:
            name: of the lock: a template of the function's argument names, "user:{user_id}", or a plain name.
            timeout, ttl, renew, max_hold: as of `acquire`.

        Raises ValueError at decoration for a bad argument, and on an async function or a generator. A call raises what
        `acquire` raises, and LockLost where the lock was lost though the function succeeded.
        """
        if not isinstance(name, str):
            raise refuse("name", name, 'a template such as "user:{user_id}"')
        _check(timeout, ttl, max_hold)

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            refuse_unless_plain(function, "locked")
            template = KeyTemplate(name, function, shared=True)
            if template.plain is not None:
                self._keys.lock(template.plain)

            @functools.wraps(function)
            def alone(*args: P.args, **kwargs: P.kwargs) -> R:
                filled = template.fill(args, kwargs)
                with self.acquire(filled, timeout=timeout, ttl=ttl, renew=renew, max_hold=max_hold):
                    return function(*args, **kwargs)

            return alone

        return decorate

    def rwlock(self, name: str) -> ReadWriteLock:
        """A lock that several readers may hold, or one writer. Independent of the lock of that name."""
        key = self._keys.lock(name)
        return ReadWriteLock(self._hold, self._shared, self._folder, name, key)

    def semaphore(self, name: str, *, slots: int) -> Semaphore:
        """A lock that so many may hold at once, 1 to 1,000. Independent of the lock of that name.

        All who use it shall say the same number; where they do not, each grants by its own.
        """
        key = self._keys.lock(name)
        if type(slots) is not int or not 1 <= slots <= MOST_SLOTS:
            raise refuse("slots", slots, f"a whole number from 1 to {MOST_SLOTS}")
        return Semaphore(self._hold, self._shared, self._folder, name, key, slots)

    # -- who holds what ------------------------------------------------------------------------------------------

    def holder(self, name: str) -> LockHolder | None:
        """Who holds the lock of that name; None if nobody does, which may have changed by now.

        Redis away: who holds it on this host, by its lock file, `degraded`; LockUnavailable where the fallback is
        "fail". A try of somebody else's on this host may then find it held in the very instant of this look. Raises
        BackendUnavailable where all of this process's connections to Redis are in use.
        """
        resource = self._resource(name)
        redis, why = self._redis, BackendUnavailable("Redis is disabled")
        if redis is not None:
            try:
                return read_holder(redis, name, resource.cells)
            except BackendUnavailable as error:
                if error.__cause__ is None and redis.breaker.closed:
                    raise  # our own pool is full: Redis is there, and others may hold the lock
                why = error
        if self._fallback == "fail":
            raise LockUnavailable(f"lock {resource.key}: {why}") from why
        record = self._folder.look(resource.key)
        if record is None:
            return None
        return LockHolder(name, "lock", record.owner, record.token, max(0.0, record.deadline - clock()), True)

    def is_locked(self, name: str) -> bool:
        """Whether `holder` finds one, which may have changed by now. Raises as it does."""
        return self.holder(name) is not None

    def held(self) -> list[LockHolder]:
        """All locks that are held through govredis on this Redis, of every kind, by name.

        By a list of our own (`govredis:locks`), without a scan: two round trips. A lock comes on it a tenth of a second
        after its grant (this process's own at once), and is then asked for. Not on it: what an async service holds, and
        what was granted while Redis was away. Raises BackendUnavailable.
        """
        redis = self._reached("what is held is listed there")
        leases = [lease for lease in renewer.leases() if isinstance(lease, Lease) and not lease.degraded]
        mine = [lease.entry() for lease in leases if lease.of(self._arbiter) or lease.of(self._shared)]
        entries = {(e.kind, e.name, e.owner): e for e in (*read_list(redis, self._keys.held_locks()), *mine)}
        return still_held(redis, [(entry, self._cells(entry)) for entry in entries.values()])

    def force_release(self, name: str) -> bool:
        """Take the lock from whoever holds it, an outsider too; the waiter that has waited longest gets it.

        For an operator who knows that the holder is gone. Its owner finds its lock lost at its next renewal, a third of
        its ttl later at the latest. On the holder's own host nobody else gets in before it lets go or dies: its lock
        file is not forced. Returns whether somebody held it. Raises BackendUnavailable; a Redis that hangs may do it
        when it wakes up.
        """
        resource = self._resource(name)
        redis = self._reached("there is nothing to be forced")
        return bool(redis.run(self._force, resource.cells, FENCE_KEPT_MS))

    # -- inside --------------------------------------------------------------------------------------------------

    def _resource(self, name: str) -> Resource:
        try:
            return self._resources(name)
        except TypeError:  # it cannot be remembered: no name
            return self._make_resource(name)

    def _make_resource(self, name: str) -> Resource:
        key = self._keys.lock(name)
        cells = key, sibling(key, "fence"), sibling(key, "queue"), sibling(key, "waiters")
        return Resource("lock", name, key, cells, ())

    def _cells(self, entry: Entry) -> tuple[str, ...]:
        if entry.kind == "lock":
            return self._resource(entry.name).cells
        return cells(self._keys.lock(entry.name), "semaphore" if entry.kind == "semaphore" else "rwlock")

    def _reached(self, why: str) -> RedisClient:
        if self._redis is None:
            raise LockUnavailable(f"Redis is disabled (REDIS_ENABLED=0): {why}")
        return self._redis

    def _hold(
        self,
        arbiter: Arbiter,
        resource: Resource,
        guard: Guard,
        timeout: float | None,
        ttl: float | None,
        renew: bool,
        max_hold: float | None,
        owner: str = "",
        succeeds: str | None = None,
    ) -> HeldLock:
        _check(timeout, ttl, max_hold)
        if ttl is None:
            ttl = self._ttl
        owner = owner or arbiter.owner(resource.kind)
        attempt = Attempt(arbiter, resource, ttl, guard, owner, self._fallback, succeeds)
        lease: Lease | None = None
        try:
            grant = attempt.run(timeout)
            if grant.degraded and attempt.known:
                arbiter.owe(resource, attempt.owner, 0)
            lease = Lease(arbiter, resource, attempt.owner, ttl, grant, attempt.guard, renew, max_hold, self.counters)
            held = HeldLock(resource.name, lease)
            # Last, when there is a handle whose collection would end it.
            lease.start()
            self._count(attempt, "locks.degraded_grants" if grant.degraded else "locks.grants")
            return held
        except BaseException as error:
            if lease is not None:
                lease.end()
            else:
                attempt.give_up()
            if isinstance(error, LockTimeout):
                self._count(attempt, "locks.timeouts")
            raise

    def _count(self, attempt: Attempt, outcome: str) -> None:
        self.counters.add(outcome)
        if attempt.waits_since is not None:
            self.counters.add("locks.waits")
            self.counters.add("locks.waited_ms", round((clock() - attempt.waits_since) * 1000))


def _check(timeout: float | None, ttl: float | None, max_hold: float | None) -> None:
    if timeout is not None:
        check_timeout(timeout)
    if ttl is not None:
        check_ttl(ttl)
    if max_hold is not None:
        check_ttl(max_hold, "max_hold")
