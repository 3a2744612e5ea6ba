"""Counters of events, by name, for health and for tests. The features of a GovRedis share them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from ._fork import notice_fork, renew_in_child
from ._uncopied import Uncopied


class Counters(Uncopied):
    """Names are `feature.event`. Counts are of this process, since it started or was forked."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.RLock()  # a signal handler may count too
        #: Called after an addition, where somebody waits for one.
        self.on_add: Callable[[], None] | None = None
        renew_in_child(self)

    def add(self, name: str, n: int = 1) -> None:
        notice_fork()
        with self._lock:
            self._values[name] += n
        if (on_add := self.on_add) is not None:
            on_add()

    def add_each(self, *names: str) -> None:
        """Add 1 to each."""
        notice_fork()
        with self._lock:
            for name in names:
                self._values[name] += 1
        if (on_add := self.on_add) is not None:
            on_add()

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
