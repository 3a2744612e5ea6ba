"""The renewal thread: one per process, for all locks held in it.

Leases that are due are renewed together, in pipelines. After each round trip, and often after a look at a lock file,
this thread waits for its turn, up to 5 ms for each thread that computes. While many are renewed, turns are shorter.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from operator import attrgetter
from typing import Protocol
from weakref import WeakSet

from .._boottime import clock
from .._daemon import make_daemon, start
from .._fork import renew_in_child
from ..errors import BackendError
from .backends.redis_backend import RedisLockBackend, Renewal
from .host_lock.sweep import Sweep
from .turns import short_turns

log: logging.Logger = logging.getLogger("govredis")

#: Seconds after which a lease is first due, or earlier. Once woken, the thread sleeps no longer than this: otherwise
#: each of many short locks would wake it.
FIRST_DUE = 0.1

#: The thread outlives the last lock by this many seconds, so that short locks do not start one each.
_IDLE = 5.0

#: Leases of one pipeline; with the command that lists them, 100 commands.
_AT_ONCE = 99

#: From this many leases on, turns are short.
_MANY = 10


class RenewedLease(Protocol):
    """A lease as the renewal thread sees it: see lease.py.

    Attributes:
        backend: sends its extensions.
        due: when the thread looks at it next, on the host's clock.
        deadline: when it ends, on the same clock.
    """

    backend: RedisLockBackend
    due: float
    deadline: float

    def begin(self) -> Renewal | None: ...

    def finish(self, reply: bool | BackendError | None, listed: bool) -> None: ...

    def tell(self) -> None: ...


class Renewer:
    """Renews each lease when it is due, the most urgent first. The thread starts with the first, and ends when idle."""

    def __init__(self) -> None:
        self._leases: set[RenewedLease] = set()
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Reentrant: a destructor or a signal handler, which run within any call, may release a lock.
        self._lock = threading.RLock()
        #: Held while nothing is new; its release wakes the thread. Not a Condition, which is written in Python: an
        #: exception in there would leave its lock taken for ever.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._leases = set()  # the parent renews its own
        self._sweeps: WeakSet[Sweep] = WeakSet()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def add(self, lease: RenewedLease) -> None:
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = thread = make_daemon("govredis-renewal", self._run)
                if not start(thread):
                    log.warning("locks are not renewed: no thread can be started")
            elif lease.due < self._wakes_at:
                self._ring()
                # Once is enough, however long the thread takes to wake up. Last: an exception may strike the ringing.
                self._wakes_at = lease.due

    def keep_swept(self, sweep: Sweep) -> None:
        """Start the sweeps of a lock folder when they are due, for as long as `sweep` lives."""
        with self._lock:
            self._sweeps.add(sweep)

    def leases(self) -> list[RenewedLease]:
        with self._lock:
            return list(self._leases)

    def discard(self, lease: RenewedLease) -> None:
        with self._lock:
            self._leases.discard(lease)

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it has been rung already

    def _run(self) -> None:
        # Between two rounds no frame here refers to a lease: a lost lease that nobody uses is collected, and closes its
        # file.
        while (due := self._wait()) is not None:
            self._renew(due)
            del due

    def _wait(self) -> list[RenewedLease] | None:
        """Wait for leases that are due: returns the most urgent; None when this thread has to end."""
        longest, idle = FIRST_DUE, False
        while True:
            self._start_sweeps()  # here, so that a thread without due leases looks too
            with self._lock:
                if self._thread is not threading.current_thread():
                    # An exception struck `add` when it had just started this thread, or asked whether it lives (Python
                    # 3.12 and older take that for its death). There is another, and the bell may have rung for it.
                    self._ring()
                    return None
                now = clock()
                due = [lease for lease in list(self._leases) if lease.due <= now]
                if due:
                    return heapq.nsmallest(_AT_ONCE, due, key=attrgetter("deadline"))
                if idle and not self._leases:
                    self._thread = None
                    return None
                # A lease may be released before, which wakes nobody.
                first = min([lease.due for lease in list(self._leases)], default=now + longest)
                self._wakes_at = min(first, now + longest)
            rung = self._bell.acquire(timeout=max(0.0, self._wakes_at - now))
            idle = not rung and longest >= _IDLE
            longest = FIRST_DUE if rung else _IDLE

    def _start_sweeps(self) -> None:
        with self._lock:
            sweeps = list(self._sweeps)
        for sweep in sweeps:
            sweep.start_if_due()

    def _renew(self, due: list[RenewedLease]) -> None:
        groups: dict[RedisLockBackend, list[RenewedLease]] = {}
        for lease in due:
            groups.setdefault(lease.backend, []).append(lease)
        for backend, leases in groups.items():
            try:
                with short_turns if len(leases) >= _MANY else nullcontext():
                    renew_together(backend, leases)
            except Exception:
                log.exception("locks could not be renewed together")
                for lease in leases:
                    self._renew_alone(lease)
        for lease in due:
            lease.tell()

    def _renew_alone(self, lease: RenewedLease) -> None:
        try:
            renew_together(lease.backend, [lease])
        except Exception:
            log.exception("a lock could not be renewed")
            self.discard(lease)


def renew_together(backend: RedisLockBackend, leases: Iterable[RenewedLease]) -> None:
    """Extend the leases whose time has come, and keep all on the list of held locks, in one pipeline."""
    with backend.extending:
        asked: list[tuple[RenewedLease, Renewal]] = []
        for lease in leases:
            renewal = lease.begin()
            if renewal is None:
                lease.finish(None, True)
            else:
                asked.append((lease, renewal))
        if not asked:
            return
        replies = backend.extend_each([renewal for _, renewal in asked])
        for (lease, _), (reply, listed) in zip(asked, replies, strict=True):
            lease.finish(reply, listed)


renewer: Renewer = Renewer()
