"""LateReleases: releases of locks whose slots are on their way to another node of a Cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ..._daemon import start_daemon
from ..._fork import renew_in_child
from ...client import NotServedHere
from ...errors import BackendError

log: logging.Logger = logging.getLogger("govredis")

#: Seconds between two attempts.
_BETWEEN = 0.1
#: Seconds for which it is attempted. A slot that was left half moved for so long is for an operator to mend.
_KEPT = 600.0


class Release(NamedTuple):
    """A call of the release script: its keys and arguments."""

    keys: tuple[str, ...]
    args: tuple[str, ...]


class LateReleases:
    """Carries them out in a thread, which ends with the last: no other node's work waits for a slot.

    Where no thread can be started, and after ten minutes, such a lock ends with its lease.

    Args:
        release: carries one out. Raises NotServedHere while the slot is on its way.
    """

    def __init__(self, release: Callable[[Release], None]) -> None:
        self._release = release
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        #: Without a mutex, as `RedisLockBackend.pending_releases`.
        self._waiting: dict[Release, float] = {}
        self._thread: threading.Thread | None = None
        self._never = threading.Event()

    def add(self, release: Release) -> None:
        self._waiting.setdefault(release, time.monotonic() + _KEPT)
        if self._thread is None or not self._thread.is_alive():
            self._thread = start_daemon("govredis-releases", self._run)

    def __len__(self) -> int:
        return len(self._waiting)

    def _run(self) -> None:
        while True:
            self._never.wait(_BETWEEN)
            for release, until in list(self._waiting.items()):
                try:
                    self._release(release)
                except NotServedHere:
                    if time.monotonic() < until:
                        continue
                except BackendError:
                    log.exception("lock %s could not be released", release.keys[0])
                self._waiting.pop(release, None)
            if not self._waiting:
                self._thread = None
                if not self._waiting:
                    return
                # Added meanwhile, and perhaps another thread with it: a release is harmless the second time.
