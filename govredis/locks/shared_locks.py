"""ReadWriteLock and Semaphore: locks that several may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .._fork import notice_fork
from .._uncopied import Uncopied
from ..keys import sibling
from .held import HeldLock
from .host_lock.base import HostLock, HostProcess
from .host_lock.shared import ReaderHostLock, SlotHostLock, WriterHostLock
from .resource import HoldOptions, Resource

MOST_SLOTS = 1000
#: A read/write lock is a semaphore of more slots than there can be readers; a writer takes it whole.
_READERS = 1_000_000_000


class Hold(Protocol):
    """The part of `acquire` that is the same for every kind of lock."""

    def __call__(
        self, resource: Resource, kind: Callable[[str, HostProcess], HostLock], options: HoldOptions
    ) -> HeldLock: ...


class ReadWriteLock(Uncopied):
    """Several readers, or one writer. `with gov.locks.rwlock("report").read(timeout=5): ...`

    In the order of arrival: no later reader passes a writer that waits, and the readers behind it all come next, so
    neither side starves. On one living Redis, with leases, renewal, hand-over and `held.token` as in DistributedLock; a
    holder that dies frees its place within the ttl.

    On one host (one lock folder) readers and writers do not overlap whatever Redis does: a reader holds `flock` on the
    lock's file, shared, and a writer alone. Redis away: as in DistributedLock, that `flock` alone after a second of
    grace, with `held.degraded`. There is no order then, so readers that come without a pause keep a writer out. A
    holder that was stopped past its lease keeps its host's others out until it wakes up or dies.

    `held.token`: a writer's is higher than that of every writer before it on this host, whatever befell Redis; so is a
    reader's. Over readers' tokens it rises on one living Redis, and by the clocks otherwise.

    Made by `gov.locks.rwlock(name)`.
    """

    def __init__(self, hold: Hold, name: str, key: str) -> None:
        self._hold = hold
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

        A reader that asks for it again may wait for a writer that waits for this reader.
        """
        notice_fork()
        return self._take("read", ReaderHostLock, HoldOptions(timeout, ttl, renew, max_hold))

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
        notice_fork()
        return self._take("write", WriterHostLock, HoldOptions(timeout, ttl, renew, max_hold))

    def _take(self, kind: str, host_lock: type[WriterHostLock], options: HoldOptions) -> HeldLock:
        keys = shared_lock_keys(self._key, "rwlock")
        return self._hold(Resource(kind, self._name, keys[0], keys, (str(_READERS),)), host_lock, options)


class Semaphore(Uncopied):
    """At most so many holders at once. `with gov.locks.semaphore("gpu", slots=2).acquire(timeout=5): ...`

    In the order of arrival; on one living Redis, with leases, renewal and hand-over as in DistributedLock. A holder
    that dies frees its slot within the ttl. `held.token` is unique, and rises.

    On one host (one lock folder) there are never more whatever Redis does: each holds `flock` on the file of a slot.
    Redis away: as in DistributedLock, that `flock` alone after a second of grace: so many per *host*, `held.degraded`.
    A holder that was stopped past its lease keeps its host's slot until it wakes up or dies.

    Made by `gov.locks.semaphore(name, slots=...)`.
    """

    def __init__(self, hold: Hold, name: str, key: str, slots: int) -> None:
        self._hold = hold
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
        notice_fork()
        keys = shared_lock_keys(self._key, "semaphore")
        return self._hold(
            Resource("semaphore", self._name, keys[0], keys, (str(self._slots),)),
            lambda path, process: SlotHostLock(path, process, self._slots),
            HoldOptions(timeout, ttl, renew, max_hold),
        )


def shared_lock_keys(key: str, kind: str) -> tuple[str, ...]:
    """The keys of its scripts; its lock file is named after the first. No other lock has it: names have no braces."""
    base = sibling(key, kind)
    return base, f"{base}:fence", f"{base}:queue", f"{base}:waiters"
