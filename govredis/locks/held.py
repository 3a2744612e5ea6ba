"""HeldLock: the handle of a lock that is held, and its lease."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Literal

from .._counters import Counters
from .._fork import renew_in_child
from ..errors import BackendError, BackendUnavailable, GovRedisError, LockLost, check_ttl
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
        """Seconds; less than 0 where the lease has ended."""
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


class HeldLock:
    """A lock that is held: use it with `with`, or call `release`.

    It belongs to whoever has the handle, not to a thread. Unless acquired with renew=False, one thread per process
    renews it at a third of its ttl. Its lease counts from when each grant or renewal was *sent*: at its end the lock is
    lost, and said to be so, never later than Redis forgets it.

    No lease can promise that the holder is still running when it ends: a stopped process wakes up and goes on writing.
    Where that matters the resource must check `token` and refuse one lower than the highest it has seen.

    Attributes:
        name: as acquired.
        token: the fencing token: rises with every grant, over expiry, loss of data and degraded grants on this host.
        degraded: True if Redis was away when it was granted: exclusive on this host (this lock folder) only.
    """

    __slots__ = ("__weakref__", "_lease", "degraded", "name", "token")

    def __init__(self, name: str, lease: Lease) -> None:
        self._lease = lease
        self.name = name
        self.token = lease.token
        self.degraded = lease.degraded

    def remaining(self) -> float:
        """Seconds until the lease ends if it is not renewed; 0 if it has, was lost or released. Asks nobody."""
        lease = self._lease
        if lease.over or lease.lost is not None:
            return 0.0
        return max(0.0, lease.left())

    def raise_if_lost(self) -> None:
        """Raise LockLost if the lease has ended while held. Asks nobody: cheap enough for every step of a loop."""
        lease = self._lease
        if lease.lost is not None or (not lease.over and clock() >= lease.deadline and lease.left() < 0):
            raise LockLost(f"lock {self.name!r} was lost: {lease.lost or 'its lease ran out'}")

    def extend(self, ttl: float | None = None) -> None:
        """Make the lease end `ttl` seconds from now (None: its own ttl), once.

        Raises LockLost if it is not held any more; BackendUnavailable when Redis is away: the lease ends when it would
        have, or after `ttl` if that is sooner.
        """
        self._lease.extend(self._lease.ttl if ttl is None else check_ttl(ttl))

    def release(self) -> bool:
        """Let go. True if the lock was held until now, False if it was lost or released before. Never raises for Redis
        being away: the release is then carried out when it is back, and the lease ends anyway.
        """
        return self._lease.end()

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback()` called, in the renewal thread, when the lock is lost. At once if it is lost already.

        It holds up the renewal of all locks of this process, so it should set an Event, say, and not more.
        """
        lease = self._lease
        with lease._mutex:
            if lease.lost is None:
                lease.callbacks.append(callback)
                return
        callback()

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Release. Raises LockLost if the lock was lost and the body succeeded; never hides the body's own error."""
        lease = self._lease
        was_over = lease.over
        try:
            held = self.release()
        except BackendError:
            if error is None:
                raise
            log.exception("lock %s could not be released", lease.key)
            return False
        if not held and not was_over and error is None:
            raise LockLost(f"lock {self.name!r} was lost: {lease.lost or 'its lease ran out'}")
        return False

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease.over:
            lease.abandon()
            warnings.warn(
                f"lock {self.name!r} was collected while held; it ends with its lease", ResourceWarning, stacklevel=2
            )

    def __repr__(self) -> str:
        state = "over" if self._lease.over else f"{self.remaining():.1f} s left"
        return f"<HeldLock {self.name!r} token={self.token} {state}{' degraded' if self.degraded else ''}>"


class HeldLocks(Mapping[str, HeldLock]):
    """Several locks that are held together, by name: use it with `with`, or call `release`.

    `degraded` is True if one of them is. Each is a HeldLock of its own, with its own token and lease.
    """

    def __init__(self, held: dict[str, HeldLock]) -> None:
        self._held = held
        self.degraded = any(lock.degraded for lock in held.values())

    def __getitem__(self, name: str) -> HeldLock:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def remaining(self) -> float:
        """Seconds until the first of the leases ends if it is not renewed. Asks nobody."""
        return min(lock.remaining() for lock in self._held.values())

    def raise_if_lost(self) -> None:
        """Raise LockLost if one of them is lost. Asks nobody."""
        for lock in self._held.values():
            lock.raise_if_lost()

    def release(self) -> bool:
        """Let go of all. True if all were held until now. Never raises for Redis being away, as HeldLock.release."""
        return all(self._each(HeldLock.release))

    def __enter__(self) -> HeldLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Release. Raises LockLost if one was lost and the body succeeded; never hides the body's own error."""
        self._each(lambda lock: lock.__exit__(kind, error, trace))
        return False

    def _each(self, end: Callable[[HeldLock], bool]) -> list[bool]:
        """End all, the last first, whatever becomes of the others. Raises the first error, or what struck meanwhile."""
        ended: list[bool] = []
        failed: BaseException | None = None
        for lock in reversed(self._held.values()):
            try:
                ended.append(end(lock))
            except BaseException as error:  # noqa: BLE001
                if failed is None or (isinstance(failed, GovRedisError) and not isinstance(error, GovRedisError)):
                    failed = error
        if failed is not None:
            raise failed
        return ended

    def __repr__(self) -> str:
        return f"<HeldLocks {list(self._held.values())!r}>"
