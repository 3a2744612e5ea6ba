"""The host guards of what several may hold: read/write locks and semaphores.

They keep to `flock` alone: a record has room for one. So nobody is passed here: a holder that was stopped past its
lease keeps its place on its host until it wakes up or dies.
"""

from __future__ import annotations

import fcntl
import random

from ..errors import LockUnavailable
from .guard import HostGuard

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


class WriterGuard(HostGuard):
    """The file of a read/write lock, for one that writes. Its record is there for the last token alone."""

    __slots__ = ()

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        return super().enter(token, owner, deadline, may_pass=False)


class ReaderGuard(WriterGuard):
    """The file of a read/write lock, for those that read: they share it."""

    __slots__ = ()

    _how = fcntl.LOCK_SH

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        # A writer with a higher token has been here: what Redis granted us was over before we came.
        self.inside = self._try_flock() and self.last_token() < token
        if self._flocked and not self.inside:
            self._unlock()
        return self.inside

    def refresh(self, token: int, deadline: float) -> bool:
        return self.inside


class SlotGuard(HostGuard):
    """The files of a semaphore, one for each slot: whichever is free.

    Args:
        path: what their names begin with.
        slots: how many.
    """

    __slots__ = ("_base", "_slots", "_tried")

    def __init__(self, path: str, boot: str, slots: int) -> None:
        self._base = path
        self._slots = slots
        self._tried = _random.randrange(slots)  # not all at the first, to find it taken
        super().__init__(f"{path}.{self._tried}", boot)

    def last_token(self) -> int:
        return 0  # they are not ordered by their tokens

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        try:
            for _ in range(self._slots):
                if self._try_flock():
                    self.inside = True
                    return True
                self._tried = (self._tried + 1) % self._slots
                self._path = f"{self._base}.{self._tried}"
                self._close()
                self._open()
        except OSError as error:  # no descriptor left, no space left
            raise LockUnavailable(f"lock file {self._path} cannot be opened: {error.strerror}") from error
        return False

    def refresh(self, token: int, deadline: float) -> bool:
        return self.inside
