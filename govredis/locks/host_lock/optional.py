"""Host locks of a folder that locks can do without."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable

from ...errors import LockUnavailable
from .base import HostLock
from .record import LockRecord


class NoHostLock:
    """Lets everybody in, and keeps nobody out."""

    def last_token(self) -> int:
        return 0

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        return True

    def refresh(self, token: int, deadline: float) -> float:
        return math.inf

    def leave(self) -> None:
        pass

    def dead_holder(self) -> LockRecord | None:
        return None


class OptionalHostLock:
    """A host lock for as long as its file can be used; otherwise its substitute.

    Args:
        open_one: opens the host lock.
        substitute: takes the reason why it cannot be used.
    """

    def __init__(self, open_one: Callable[[], HostLock], substitute: Callable[[LockUnavailable], HostLock]) -> None:
        self._substitute = substitute
        try:
            self._host_lock = open_one()
        except LockUnavailable as error:
            self._do_without(error)

    def last_token(self) -> int:
        try:
            return self._host_lock.last_token()
        except LockUnavailable as error:
            self._do_without(error)
            return 0

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        try:
            return self._host_lock.enter(token, owner, deadline, may_pass=may_pass)
        except LockUnavailable as error:
            self._host_lock.leave()
            self._do_without(error)
            return True

    def refresh(self, token: int, deadline: float) -> float:
        return self._host_lock.refresh(token, deadline)

    def leave(self) -> None:
        self._host_lock.leave()

    def dead_holder(self) -> LockRecord | None:
        try:
            return self._host_lock.dead_holder()
        except LockUnavailable as error:
            self._do_without(error)
            return None

    def _do_without(self, error: LockUnavailable) -> None:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            raise error  # the process is out of descriptors, which is no fault of the folder
        self._host_lock = self._substitute(error)
