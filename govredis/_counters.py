"""Counters of events, by name, for health and for tests. The features of a GovRedis share them."""

from __future__ import annotations

import threading
from collections import defaultdict

from ._fork import notice_fork, renew_in_child
from ._uncopied import Uncopied


class Counters(Uncopied):
    """Names are `feature.event`. Counts are of this process, since it started or was forked."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.RLock()  # a signal handler may count too
        renew_in_child(self)

    def add(self, name: str, n: int = 1) -> None:
        notice_fork()
        with self._lock:
            self._values[name] += n

    def add_each(self, *names: str) -> None:
        """Add 1 to each."""
        notice_fork()
        with self._lock:
            for name in names:
                self._values[name] += 1

    def get(self, name: str) -> int:
        notice_fork()
        return self._values.get(name, 0)

    def read(self) -> dict[str, int]:
        notice_fork()
        with self._lock:
            return dict(self._values)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()
        self._values = defaultdict(int)
