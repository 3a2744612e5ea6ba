"""The host locks of read/write locks and semaphores, which several may hold.

They keep to `flock` alone, for a file has no room for the records of several. So nobody is passed here: a holder that
was stopped past its lease keeps its place on its host until it wakes up or dies.
"""

from __future__ import annotations

import fcntl
import random

from .base import HostProcess, raises_unusable
from .exclusive import ExclusiveHostLock
from .record import LockRecord

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


class WriterHostLock(ExclusiveHostLock):
    """The file of a read/write lock, for a writer. Its record is there for the last token alone."""

    __slots__ = ()

    def dead_holder(self) -> LockRecord | None:
        return None  # Redis releases for the dead only where there is a single holder

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        return super().enter(token, owner, deadline, may_pass=False)


class ReaderHostLock(WriterHostLock):
    """The file of a read/write lock, for a reader. Readers share it."""

    __slots__ = ()

    _how = fcntl.LOCK_SH

    @raises_unusable
    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        # Where a writer with a higher token has been here, the grant was over before this reader came.
        self.inside: bool = self._try_flock() and self._was_granted_since(token) and self.last_token() < token
        if self._flocked and not self.inside:
            self._unlock()
        return self.inside

    def refresh(self, token: int, deadline: float) -> float:
        return self._refresh_without_record(deadline)


class SlotHostLock(ExclusiveHostLock):
    """The files of a semaphore, one for each slot. It goes in by the first that it finds free.

    Args:
        path: the beginning of their names.
        process: this process.
        slots: how many.
    """

    __slots__ = ("_base", "_slots", "_tried")

    def __init__(self, path: str, process: HostProcess, slots: int) -> None:
        self._base = path
        self._slots = slots
        self._tried = _random.randrange(slots)  # not all at the first, to find it taken
        super().__init__(f"{path}.{self._tried}", process)

    def dead_holder(self) -> LockRecord | None:
        return None

    def last_token(self) -> int:
        return 0  # they are not ordered by their tokens

    @raises_unusable
    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        for _ in range(self._slots):
            if self._try_flock():
                self.inside = True
                return True
            self._tried = (self._tried + 1) % self._slots
            self._path = f"{self._base}.{self._tried}"
            self._close()
            self._open()
        return False

    def refresh(self, token: int, deadline: float) -> float:
        return self._refresh_without_record(deadline)
