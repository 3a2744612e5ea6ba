"""Renewals: a lease stands for as long as its loader runs, and ends soon after a process that was killed."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable

from .._counters import Counters
from .._daemon import make_daemon, start
from .._fork import renew_in_child
from .._latch import Latch
from ..client import Command, RedisClient
from ..errors import BackendError
from . import entry_keys

#: Seconds between two renewals; a lease stands for three of them.
EVERY = 1.0


class Load:
    """A load that is under way, for as long as `running` is held.

    A lock of C, for `with` gives it back in spite of a signal or a soft time limit: the end of a load needs no line of
    ours.

    Args:
        of: whose it is.
        keys: what is loaded.
        leases: under which, by key; those of this process only.
    """

    __slots__ = ("keys", "leases", "of", "pid", "running")

    def __init__(self, of: object, keys: Iterable[str], leases: dict[str, str]) -> None:
        self.of: object = of
        self.keys: frozenset[str] = frozenset(keys)
        self.leases: dict[str, str] = leases
        self.running: threading.Lock = threading.Lock()
        self.pid: int = os.getpid()

    def is_running(self) -> bool:
        return self.running.locked() and self.pid == os.getpid()

    def renewals(self) -> list[Command]:
        return [entry_keys.renew(key, lease) for key, lease in self.leases.items()]


class Renewals:
    """The loads of one GovRedis in this process that have leases, and the thread that renews these each second. It runs
    while there are any.

    If the thread cannot run for two seconds (a loader that lets no other thread run, a stopped process), leases end,
    and another loads. The first one's value is not stored then.
    """

    def __init__(self, redis: RedisClient, counters: Counters) -> None:
        self._redis = redis
        self._counters = counters
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may load too
        self._loads: set[Load] = set()
        self._stopped = Latch()
        self._thread: threading.Thread | None = None

    def add(self, load: Load) -> None:
        """Renew the leases of a load until it ends. To be called while it is running."""
        self._loads.add(load)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped = stopped = Latch()
            self._thread = thread = make_daemon("govredis-leases", _run, weakref.ref(self), stopped)
            start(thread)  # where it cannot be, the lease ends by itself

    def renew(self) -> bool:
        """Renew all leases now. Returns False if there is nothing to do for this thread any more."""
        for load in list(self._loads):
            if not load.is_running():
                self._loads.discard(load)
        with self._lock:  # so that who adds one next sees that this thread is ending
            if self._thread is not threading.current_thread():
                return False  # an exception struck `add` just when it had started this one: there is another
            if not self._loads:
                self._thread = None
                return False
        commands = [command for load in list(self._loads) for command in load.renewals()]
        try:
            replies = self._redis.pipeline(commands, (entry_keys.RENEW,), each=True)
        except BackendError:
            self._counters.add("leases.degraded.renewals")
            return True
        renewed = [reply for reply in replies if not isinstance(reply, BackendError)]
        self._counters.add("leases.renewed", sum(renewed))
        if len(renewed) < len(replies):
            self._counters.add("leases.degraded.renewals")
        return True

    def close(self) -> None:
        """End the thread, waiting for it. It starts again with the next load."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)


def _run(ref: weakref.ref[Renewals], stopped: Latch) -> None:
    """The thread. While it waits it keeps no GovRedis alive."""
    while not stopped.wait(EVERY):
        renewals = ref()
        if renewals is None or not renewals.renew():
            return
        del renewals
