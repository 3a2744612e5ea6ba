"""DistributedLock: one holder at a time, by Redis across hosts and by flock on each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from .._boottime import clock
from .._context import Context
from .._counters import Counters
from .._fork import notice_fork
from .._pool import PoolExhausted
from .._templates import check_key, name_of_calls, refuse_unless_plain
from .._uncopied import Uncopied
from ..client import NotServedHere, RedisClient
from ..errors import BackendUnavailable, LockTimeout, LockUnavailable, check_timeout, refuse
from ..keys import Id, id_text
from .acquisition import Acquisition, Claim
from .backends.file_backend import FileLockBackend, FolderFault
from .backends.redis_backend import EXCLUSIVE, SHARED, RedisLockBackend
from .held import HeldLock, HeldLocks
from .held_list import HeldLockList
from .holders import FoundHolders, HeldCounts, LockHolder, read_holder
from .host_lock.base import HostLock, HostProcess
from .host_lock.exclusive import ExclusiveHostLock
from .lease import LockLease
from .resource import HoldOptions, Resource, lock_keys
from .shared_locks import MOST_SLOTS, ReadWriteLock, Semaphore
from .survey import LockSurvey

P = ParamSpec("P")
R = TypeVar("R")

_REMEMBERED = 1000


class DistributedLock(Uncopied):
    """Locks by name. `with gov.locks.acquire("agent-123", timeout=5) as held: ...`

    It promises:

    - on one living Redis, one holder at a time among all hosts, for as long as the holder's lease lasts (`ttl`, renewed
      at a third of it). A holder that dies frees it within the ttl;
    - a holder whose process is killed frees it once somebody on the same host asks for it; the longest waiter of all
      hosts gets it. This needs locks of open file descriptions (Linux has them), and no child forked in C that lives
      on;
    - on one host holders do not overlap whatever Redis does: killed, hung, restarted, flushed. Every holder also has
      the host lock, `flock` on the resource's file. (A host means the processes that share a lock folder: one user's,
      or several users' with a shared folder.) A lock folder that cannot be written to (full, read-only) is
      LockUnavailable; with the fallback "fail", locks work by Redis alone, and the counter `locks.unguarded` and a
      warning say so. A lock folder that somebody else controls is ConfigurationError. A holder whose lock file was
      removed has lost the lock, and notices at its next renewal;
    - when Redis has been away for a second: GOVREDIS_LOCK_FALLBACK "file" (the default) grants by `flock` alone, one
      holder per *host*, and says so in `held.degraded`; "fail" raises LockUnavailable. Within that second, callers wait
      for it, and raise LockUnavailable if their timeout ends first. With REDIS_ENABLED=0 there is no such second;
    - `held.token` rises with every grant, unless an hour after the last lease some clock is behind another, or set
      back, by more than that. HeldLock says what no lease can promise;
    - a lock whose key alone was taken away (a DEL, `force_release`, an eviction) is lost within a renewal. A key that
      went with other data (FLUSHALL, a restart or a failover to older data) is restored, unless somebody else has held
      the lock since. So is a key that was evicted together with its fence; the next token is higher all the same, by
      the server's clock.

    The longest waiter is next: a release hands the lock over, and wakes just that waiter. A waiter that has died, or
    has been stopped for a second, is passed over. A holder from outside (a plain SET NX) is respected, and its end
    noticed within a quarter of a second; an outsider that polls gets it when nobody waits. Without Redis, waiting
    polls, every 2 to 50 ms, in no particular order.

    A single thread of each process renews, up to 99 locks in a round trip, the most urgent first. Beside four threads
    that compute, on two cores, it was measured to keep 400 locks at a ttl of 3 s, 1,000 at 10 s, and 4,000 at 30 s.

    Uncontended, `acquire` and `release` are one round trip each. A waiter that is handed the lock goes in at once,
    while Redis makes the hand-over a lease. Every method raises ValueError for a bad name, ttl or timeout before
    anything is sent. A name leaves a fence in Redis and a file of at most 320 bytes in the lock folder (a semaphore, a
    file for each slot). Both go an hour after the last lease; the file within ten minutes more, if a process that locks
    lives for some seconds then.
    """

    def __init__(self, context: Context) -> None:
        config = context.config
        self._keys = context.keys
        self._redis = context.redis
        self._ttl = config.lock_ttl
        self._fallback = config.lock_fallback
        self.counters: Counters = context.counters
        held_list = HeldLockList(self._redis, self._keys)
        of_both = held_list, self.counters, config.confirm
        self._backend = RedisLockBackend(self._redis, EXCLUSIVE, *of_both)
        self._shared_backend = RedisLockBackend(self._redis, SHARED, *of_both)
        self._file_backend = FileLockBackend(
            config.lock_folder, needed=self._fallback != "fail", counters=self.counters
        )
        #: The lock folder.
        self.folder: str = self._file_backend.path
        #: The same names come again and again.
        self._resources = functools.lru_cache(_REMEMBERED)(self._make_resource)
        self._survey = LockSurvey(self._keys, held_list, (self._backend, self._shared_backend))

    def acquire(
        self,
        name: Id,
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLock:
        """Wait for the lock, and hold it.

        Args:
            name: the lock's.
            timeout: seconds to wait; 0: one try; None: for ever.
            ttl: seconds of its lease; None: lock_ttl.
            renew: keep it past its ttl, in the background. False: it ends at its ttl.
            max_hold: seconds after which it is no longer renewed; None: no bound.

        Returns a HeldLock: use it with `with`. Raises LockTimeout if somebody else held it all the while. Raises
        LockUnavailable if the lock folder cannot be used, or if Redis was away and there is no fallback, or none yet.
        So it does if this process's connections stayed in use, or if no replica confirmed the grant
        (GOVREDIS_CONFIRM). Raises BackendError where Redis answers with an error, and ConfigurationError if somebody
        else controls the lock folder. The timeout is kept to within 50 ms, and
        the socket timeout where Redis hangs just then.
        """
        notice_fork()
        resource = self._resource(name)
        return self._hold(self._backend, resource, ExclusiveHostLock, HoldOptions(timeout, ttl, renew, max_hold))

    def try_acquire(self, name: Id, *, ttl: float | None = None, renew: bool = True) -> HeldLock | None:
        """Hold the lock if it is free; None if it is not. Never waits.

        Raises as `acquire`, but for LockTimeout.
        """
        try:
            return self.acquire(name, timeout=0, ttl=ttl, renew=renew)
        except LockTimeout:
            return None

    def acquire_many(
        self,
        names: Iterable[Id],
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLocks:
        """Wait for several locks, and hold all of them, or none. Arguments as in `acquire`; `timeout` is for all.

        They are taken in sorted order, so that two callers that want the same locks never wait for each other. Returns
        a HeldLocks: use it with `with`. Raises ValueError where there is no name, and whatever `acquire` raises.
        """
        listed = list(map(id_text, names)) if isinstance(names, Iterable) and not isinstance(names, str | bytes) else []
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
            # As at the end of a body that failed: no release hides the cause.
            HeldLocks(held).__exit__(type(error), error, None)
            raise

    def locked(
        self,
        key: str | Callable[..., Id],
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Hold a lock during each call of a function.

        Args:
            key: the lock's name: a template of the function's argument names, "user:{user_id}"; a plain name, for all
                calls; or a callable that gets the call's arguments and returns the name.
            timeout, ttl, renew, max_hold: as in `acquire`.

        Raises ValueError at decoration for a bad argument, and on an async function or a generator. A call raises
        whatever `acquire` raises, ValueError where a callable gave no name, and LockLost where the lock was lost though
        the function succeeded.
        """
        check_key(key, "key", "user:{user_id}")
        HoldOptions(timeout, ttl, renew, max_hold).check()

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            refuse_unless_plain(function, "locked")
            name_of = name_of_calls(key, function)

            @functools.wraps(function)
            def alone(*args: P.args, **kwargs: P.kwargs) -> R:
                with self.acquire(name_of(args, kwargs), timeout=timeout, ttl=ttl, renew=renew, max_hold=max_hold):
                    return function(*args, **kwargs)

            return alone

        return decorate

    def rwlock(self, name: Id) -> ReadWriteLock:
        """A lock that several readers may hold, or one writer. Independent of the lock of that name.

        Returns a ReadWriteLock; nothing is asked yet. Raises ValueError for a bad name.
        """
        key = self._keys.lock(name)
        return ReadWriteLock(functools.partial(self._hold, self._shared_backend), id_text(name), key)

    def semaphore(self, name: Id, *, slots: int) -> Semaphore:
        """A lock that several may hold at once. Independent of the lock of that name.

        Args:
            name: the semaphore's.
            slots: how many may hold it, 1 to 1,000. All callers must give the same number; otherwise each grants by its
                own.

        Returns a Semaphore; nothing is asked yet. Raises ValueError for a bad name or number.
        """
        key = self._keys.lock(name)
        if type(slots) is not int or not 1 <= slots <= MOST_SLOTS:
            raise refuse("slots", slots, f"a whole number from 1 to {MOST_SLOTS}")
        return Semaphore(functools.partial(self._hold, self._shared_backend), id_text(name), key, slots)

    # -- holders ------------------------------------------------------------------------------------------

    def holder(self, name: Id) -> LockHolder | None:
        """The holder of the lock of that name; None if it is free. That may have changed by now.

        Read/write locks and semaphores are other locks: `held` lists them.

        Redis away: the holder on this host, by its lock file, `degraded`; LockUnavailable where the fallback is "fail".
        The answer None says nothing of other hosts then. Another caller on this host may find the lock held in the very
        instant of this look. Raises BackendUnavailable where all of this process's connections to Redis are in use,
        BackendError where Redis answers with an error, and for the lock folder as `acquire`.
        """
        return self.look(name)[0]

    def look(self, name: Id) -> tuple[LockHolder | None, BackendUnavailable | None]:
        """The same, and why Redis has not told it; None: it has, or is disabled. Private to `govredis locks show`."""
        notice_fork()
        resource = self._resource(name)
        away: BackendUnavailable | None = None
        if self._redis is not None:
            try:
                return read_holder(self._redis, resource.name, resource.keys), None
            except (PoolExhausted, NotServedHere):
                raise  # Redis is there, and others may hold the lock
            except BackendUnavailable as error:
                away = error.with_traceback(None)
        if self._fallback == "fail":
            why = away or BackendUnavailable("Redis is disabled")
            raise LockUnavailable(f"{resource.key}: {why}") from why
        record = self._file_backend.look(resource.key)
        if record is None:
            return None, away
        remaining = max(0.0, record.deadline - clock())
        return LockHolder(resource.name, "lock", record.owner, record.token, remaining, True), away

    def check_folder(self) -> FolderFault | None:
        """Returns why the lock folder cannot be used, the consequence and the remedy; None where it can be used."""
        notice_fork()
        return self._file_backend.check()

    def is_locked(self, name: Id) -> bool:
        """Whether the lock has a holder, as `holder` finds it, and raises. While Redis is away, the answer
        False says nothing of other hosts."""
        return self.holder(name) is not None

    def held(self) -> FoundHolders:
        """All locks under our key prefix that are held on this Redis, by name.

        These are locks of every kind through govredis, and an async service's.

        Locks held through govredis stand on a list of our own (`govredis:locks`), a tenth of a second after their grant
        (this process's own at once). Their keys are then read: two round trips. Locks from outside are on no list: SCAN
        finds them, in a round trip for each 1,000 keys in the database, and one for each 150 locks found. So this is
        for people, not for each request. A lock that was granted while Redis was away is not seen. On a Cluster
        `unanswered` of the list names the nodes that did not answer. Raises BackendUnavailable where none did;
        BackendError, as where an ACL refuses SCAN.
        """
        notice_fork()
        return self._survey.held(self._reached("held locks are listed there"))

    def count_held(self) -> HeldCounts:
        """How many locks are held through govredis, by the list of held locks; and how many from outside.

        For health. Names the lock that is held longest, too. A call looks at 10,000 keys of the database at most, and
        the next call goes on there: a lock from outside is counted once a call has come to it. Counts 200 of them at
        most. Raises as `held`.
        """
        notice_fork()
        return self._survey.count(self._reached("held locks are listed there"))

    def glance(self) -> FoundHolders:
        """Some of what `held` has, for a page: without a scan, and with a bound on the work.

        These are 1,000 at most that are held through govredis, and the locks from outside that `count_held` has come
        to. Raises as `held`.
        """
        notice_fork()
        return self._survey.glance(self._reached("held locks are listed there"))

    def force_release(self, name: Id) -> bool:
        """Take the lock from its holder, an outsider too; the longest waiter gets it.

        For an operator who knows that the holder is gone. A holder that is not finds its lock lost at its next renewal,
        a third of its ttl later at the latest. On the holder's own host nobody else gets in before it lets go or dies:
        its host lock is not forced. Read/write locks and semaphores are not taken. Returns whether the lock was held.
        Raises BackendError, and BackendUnavailable; a Redis that hangs may do it when it wakes up.
        """
        notice_fork()
        resource = self._resource(name)
        self._reached("no lock there can be taken from its holder")
        return self._backend.force_release(resource)

    # -- internals --------------------------------------------------------------------------------------------------

    def _resource(self, name: Id) -> Resource:
        if type(name) is not str:
            name = id_text(name)
        try:
            return self._resources(name)
        except TypeError:  # not hashable, so not a name
            return self._make_resource(name)

    def _make_resource(self, name: str) -> Resource:
        key = self._keys.lock(name)
        return Resource("lock", name, key, lock_keys(key), ())

    def _reached(self, why: str) -> RedisClient:
        if self._redis is None:
            raise LockUnavailable(f"Redis is disabled (REDIS_ENABLED=0): {why}")
        return self._redis

    def _hold(
        self,
        backend: RedisLockBackend,
        resource: Resource,
        kind: Callable[[str, HostProcess], HostLock],
        options: HoldOptions,
    ) -> HeldLock:
        options.check()
        ttl = self._ttl if options.ttl is None else options.ttl
        host_lock = self._file_backend.host_lock(resource.key, kind)
        claim = Claim(backend, resource, host_lock, backend.owner(resource.kind))
        acquisition = Acquisition(claim, ttl, self._fallback)
        lease: LockLease | None = None
        try:
            grant = acquisition.run(options.timeout)
            if grant.degraded and acquisition.known:
                backend.release_on_recovery(resource, claim.owner, 0)
            lease = LockLease(claim, grant, ttl, options.renew, options.max_hold, self.counters)
            held = HeldLock(resource.name, lease)
            # Last, when there is a handle whose collection would end it.
            lease.start()
            self._count(acquisition, "locks.degraded_grants" if grant.degraded else "locks.grants")
            return held
        except BaseException as error:
            if lease is not None:
                lease.end()
            else:
                acquisition.give_up()
            if isinstance(error, LockTimeout):
                self._count(acquisition, "locks.timeouts")
            raise

    def _count(self, acquisition: Acquisition, outcome: str) -> None:
        self.counters.add(outcome)
        if acquisition.waits_since is not None:
            self.counters.add("locks.waits")
            self.counters.add("locks.waited_ms", round((clock() - acquisition.waits_since) * 1000))
