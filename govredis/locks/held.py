"""HeldLock and HeldLocks: the handles of a lock that is held, and of several."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Literal

from .._boottime import clock
from .._fork import notice_fork
from .._uncopied import Uncopied
from ..errors import BackendError, GovRedisError, LockLost, check_ttl
from ..keys import Id, id_text
from .lease import LeaseState, LockLease

log: logging.Logger = logging.getLogger("govredis")


class HeldLock(Uncopied):
    """A lock that is held: use it with `with`, or call `release`.

    It belongs to the code that has the handle, not to a thread; it cannot be copied or pickled (TypeError). Unless
    acquired with renew=False, one thread per process renews it at a third of its ttl. Its lease counts from when each
    grant or renewal was *sent*: at its end the lock is lost, and says so, never later than Redis forgets it.

    No lease can promise that the holder is still running when it ends: a stopped process wakes up and goes on writing.
    Where that matters the resource must check `token` and refuse one lower than the highest it has seen.

    Attributes:
        name: the lock's, as a str.
        token: the fencing token: rises with every grant, over expiry, loss of data and degraded grants on this host.
        degraded: True if Redis was away when it was granted: exclusive on this host (this lock folder) only.
    """

    __slots__ = ("__weakref__", "_lease", "degraded", "name", "token")

    def __init__(self, name: str, lease: LockLease) -> None:
        self._lease = lease
        self.name: str = name
        self.token: int = lease.token
        self.degraded: bool = lease.degraded

    def remaining(self) -> float:
        """Seconds until the lease ends if it is not renewed; 0 if it has ended, was lost or released. Asks nobody."""
        notice_fork()
        lease = self._lease
        if lease.over or lease.lost is not None:
            return 0.0
        return max(0.0, lease.left())

    def raise_if_lost(self) -> None:
        """Raise LockLost if the lease has ended while held. Asks nobody: cheap enough for every step of a loop."""
        notice_fork()
        lease = self._lease
        if lease.lost is not None or (not lease.over and clock() >= lease.deadline and lease.left() <= 0):
            raise LockLost(f"lock {self.name!r} was lost: {lease.lost or 'its lease ran out'}")

    def extend(self, ttl: float | None = None) -> None:
        """Make the lease end `ttl` seconds from now (None: its own ttl), once.

        Raises LockLost if it is not held any more; BackendUnavailable when Redis is away: the lease ends when it would
        have, or after `ttl` if that is sooner. Raises ValueError for a bad ttl, and BackendError where Redis answers
        with an error.
        """
        notice_fork()
        self._lease.extend(self._lease.ttl if ttl is None else check_ttl(ttl))

    def release(self) -> bool:
        """Let go. True if the lock was held until now, False if it was lost or released before. Never raises for Redis
        being away: the release is then carried out when it is back, and the lease ends anyway. Raises BackendError
        where Redis answers with an error: then, too, the lease ends.
        """
        notice_fork()
        return self._lease.end()

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback()` called, in the renewal thread, when the lock is lost. An exception of it is logged.

        If the lock is lost already, it is called at once, in this thread, and its exception is raised. It holds up the
        renewal of all locks of this process, so it should set an Event, say, and not more.
        """
        notice_fork()
        self._lease.on_lost(callback)

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Release. Raises LockLost, or the BackendError of the release, only if the body succeeded."""
        notice_fork()
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
        notice_fork()
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease.over:
            lease.abandon()
            warnings.warn(
                f"lock {self.name!r} was collected while held; it ends with its lease", ResourceWarning, stacklevel=2
            )

    def __repr__(self) -> str:
        notice_fork()
        state = "over" if self._lease.state is LeaseState.ENDED else f"{self.remaining():.1f} s left"
        return f"<HeldLock {self.name!r} token={self.token} {state}{' degraded' if self.degraded else ''}>"


class HeldLocks(Uncopied, Mapping[str, HeldLock]):
    """Several locks that are held together, by name: use it with `with`, or call `release`.

    `degraded` is True if any of them is. Each is a HeldLock with a token and lease of its own.
    """

    def __init__(self, held: dict[str, HeldLock]) -> None:
        self._held = held
        self.degraded: bool = any(lock.degraded for lock in held.values())

    def __getitem__(self, name: Id) -> HeldLock:
        return self._held[id_text(name)]

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
        """End all, the last first, whatever becomes of the others. Raises the first error, a foreign before ours."""
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
