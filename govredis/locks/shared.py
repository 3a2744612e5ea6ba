"""ReadWriteLock and Semaphore: locks that several may hold."""

from __future__ import annotations

from typing import Protocol

from ..keys import sibling
from .arbiter import Arbiter, Resource
from .guard import Guard, LockFolder
from .held import HeldLock
from .shared_guard import ReaderGuard, SlotGuard, WriterGuard

MOST_SLOTS = 1000
#: A read/write lock is a semaphore of more slots than there can be readers; a writer takes it whole.
_READERS = 1_000_000_000


class Hold(Protocol):
    """What DistributedLock lends: everything of `acquire` but what is particular to a kind."""

    def __call__(
        self,
        arbiter: Arbiter,
        resource: Resource,
        guard: Guard,
        timeout: float | None,
        ttl: float | None,
        renew: bool,
        max_hold: float | None,
    ) -> HeldLock: ...


class ReadWriteLock:
    """Several readers, or one writer. `with gov.locks.rwlock("report").read(timeout=5): ...`

    In the order of arrival: a writer that waits lets no later reader in, and the readers behind it all come next, so
    neither side starves. On one living Redis, with leases, renewal, hand-over and `held.token` as in DistributedLock; a
    holder that dies frees its place within the ttl.

    On one host (one lock folder) readers and writers do not overlap whatever Redis does: a reader holds `flock` on the
    lock's file, shared, and a writer alone. Redis away: as in DistributedLock, that `flock` alone after a second of
    grace, with `held.degraded`; in no particular order then, so that readers who come without a pause keep a writer
    out. A holder that was stopped past its lease keeps its host's others out until it wakes up or dies.

    `held.token`: whatever befell Redis, a writer's is higher than that of every writer before it on this host, and a
    reader's too. Over readers' tokens it rises on one living Redis, and by the clocks otherwise.

    Made by `gov.locks.rwlock(name)`.
    """

    def __init__(self, hold: Hold, arbiter: Arbiter, folder: LockFolder, name: str, key: str) -> None:
        self._hold = hold
        self._arbiter = arbiter
        self._folder = folder
        self._name = name
        self._key = key

    def read(
        self,
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLock:
        """Wait until no writer holds it or came before, and hold it, as others may. As `DistributedLock.acquire`.

        A reader that asks for it once more may wait for a writer that waits for it.
        """
        return self._take("read", ReaderGuard, timeout, ttl, renew, max_hold)

    def write(
        self,
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLock:
        """Wait until nobody else holds it, and hold it alone. As `DistributedLock.acquire`.

        A reader that asks for it without letting go waits for itself.
        """
        return self._take("write", WriterGuard, timeout, ttl, renew, max_hold)

    def _take(
        self,
        kind: str,
        guard: type[WriterGuard],
        timeout: float | None,
        ttl: float | None,
        renew: bool,
        max_hold: float | None,
    ) -> HeldLock:
        keys = cells(self._key, "rwlock")
        resource = Resource(kind, self._name, keys[0], keys, (str(_READERS),))
        opened = self._folder.open(resource.key, guard)
        return self._hold(self._arbiter, resource, opened, timeout, ttl, renew, max_hold)


class Semaphore:
    """At most so many holders at once. `with gov.locks.semaphore("gpu", slots=2).acquire(timeout=5): ...`

    In the order of arrival; on one living Redis, with leases, renewal and hand-over as in DistributedLock. A holder
    that dies frees its slot within the ttl. `held.token` is unique, and rises.

    On one host (one lock folder) there are never more whatever Redis does: each holds `flock` on the file of a slot.
    Redis away: as in DistributedLock, that `flock` alone after a second of grace: so many per *host*, `held.degraded`.
    A holder that was stopped past its lease keeps its host's slot until it wakes up or dies.

    Made by `gov.locks.semaphore(name, slots=...)`.
    """

    def __init__(self, hold: Hold, arbiter: Arbiter, folder: LockFolder, name: str, key: str, slots: int) -> None:
        self._hold = hold
        self._arbiter = arbiter
        self._folder = folder
        self._name = name
        self._key = key
        self._slots = slots

    def acquire(
        self,
        *,
        timeout: float | None = 5.0,
        ttl: float | None = None,
        renew: bool = True,
        max_hold: float | None = None,
    ) -> HeldLock:
        """Wait for a slot, and hold it. As `DistributedLock.acquire`."""
        keys = cells(self._key, "semaphore")
        resource = Resource("semaphore", self._name, keys[0], keys, (str(self._slots),))
        opened = self._folder.open(resource.key, lambda path, boot: SlotGuard(path, boot, self._slots))
        return self._hold(self._arbiter, resource, opened, timeout, ttl, renew, max_hold)


def cells(key: str, kind: str) -> tuple[str, ...]:
    """The keys of its scripts; by the first its lock file goes. No lock has such a key: names have no braces."""
    base = sibling(key, kind)
    return base, f"{base}:fence", f"{base}:queue", f"{base}:waiters"
