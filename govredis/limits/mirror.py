"""Mirror: each of the two shared windows is told what the other admitted, so that a switch does not start from nothing.

Redis decides, and PostgreSQL hears of it in batches; PostgreSQL decides while Redis is away, and Redis hears of it when
it is back. Each process tells what it was itself admitted.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from .._counters import Counters
from .._fork import renew_in_child
from ..breaker import CircuitBreaker, Rejected
from ..client import RedisClient
from ..errors import BackendUnavailable, GovRedisError
from .rates import Limit

log = logging.getLogger("govredis")

#: What is kept of each direction until it is told. In memory, some 4 MB.
_KEPT = 20_000
#: The thread outlives the last admission by this many seconds.
_IDLE = 5.0


class Admission(NamedTuple):
    """What one store admitted, for another.

    Attributes:
        key: whose log it stands in.
        at: when its answer was had, in seconds on the mirror's clock. It was admitted a moment earlier.
        cost: whole entries.
        longest_us: the longest window that it was asked for.
        name: unique; the same however often it is told.
    """

    key: str
    at: float
    cost: int
    longest_us: int
    name: str

    def age_us(self, now: float) -> int:
        return int((now - self.at) * 1_000_000)


class CopiedWindow(Protocol):
    """A window that takes what another one admitted.

    `copy` writes each with the time that lies as long ago by the server's clock as `at` does before `now`. Raises
    BackendUnavailable, BackendError, ConfigurationError: then some may have been written.
    """

    backend: str

    def copy(self, admissions: Sequence[Admission], now: float) -> None: ...


class Mirror:
    """Tells PostgreSQL what Redis admitted, and Redis what PostgreSQL admitted, a moment later.

    Every `interval` seconds a thread of this process sends what was admitted here meanwhile: to PostgreSQL in one
    statement, so never more than one an interval (and one at `close`), and to Redis in a pipeline. Redis is also told
    before this process uses it again after an outage. No hit waits for any of this: `note` only appends. Where threads
    cannot run, PostgreSQL is told nothing.

    So a window that spans a switch to PostgreSQL admits at most N and what Redis admitted in the interval before; one
    that spans the way back, N and what is admitted until the last process is back, about half a second. While some
    processes see Redis and others do not, it is N per store, as without a mirror: Redis hears from those who do not
    when they do again.

    A copy's time is the age of the admission by this process's monotonic clock, so no two clocks need agree; it is late
    by the time that telling took, so a copy ends no earlier than what it is a copy of, and hardly later.

    What is not told: what sliding window counters count; what was admitted in the last interval before this process
    died without `close`; the oldest beyond 20,000 that wait; what a server refused; what PostgreSQL did not answer, for
    it may have been written, and twice would be too much. Refunds are not told: a copy stays, which is stricter. The
    counters `limits.mirrored.postgres` and `.redis` say how many admissions each was told;
    `limits.mirror_lost.postgres` and `.redis`, how many it was not.

    Args:
        redis: it says when it is back.
        redis_window, postgres_window: who is told, unless its breaker is open.
        interval: seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        redis: RedisClient,
        redis_window: CopiedWindow,
        postgres_breaker: CircuitBreaker,
        postgres_window: CopiedWindow,
        *,
        interval: float,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = interval
        self._clock = clock
        self._to_redis = _Backlog(redis_window, redis.breaker, counters, clock, again=True)
        self._to_postgres = _Backlog(postgres_window, postgres_breaker, counters, clock, again=False)
        self.renew_after_fork()
        renew_in_child(self)
        redis.on_recovery(lambda _: self._to_redis.tell())

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._warned = False
        self._nonce = os.urandom(6).hex()
        self._numbers = itertools.count()
        # What the parent noted, it tells itself.
        self._to_redis.renew()
        self._to_postgres.renew()

    def note(self, backend: str, key: str, limits: Sequence[Limit], cost: int) -> None:
        """The store named `backend` has admitted this. Returns at once."""
        if backend == "redis":
            backlog = self._to_postgres
        elif backend == "postgres":
            backlog = self._to_redis
        else:
            return  # of this process only
        name = f"{self._nonce}{next(self._numbers)}"
        backlog.add(Admission(key, self._clock(), cost, max(limit.window_us for limit in limits), name))
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._start()

    def forget(self, key: str) -> None:
        """Nothing of this key is to be told any more."""
        self._to_redis.forget(key)
        self._to_postgres.forget(key)

    def tell(self) -> None:
        """Tell whoever is there what waits for it, now."""
        for backlog in (self._to_redis, self._to_postgres):
            backlog.tell_if_there()

    def close(self) -> None:
        """End the thread, waiting for it, and tell what is still to be told. `note` starts it again."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout=5)
        self.tell()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped = threading.Event()
            self._thread = thread = threading.Thread(target=self._run, name="govredis-mirror", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is going down
                if error.__context__ is not None:
                    raise error.__context__ from None  # a signal handler's exception, struck in there
                if not self._warned:
                    self._warned = True
                    log.warning("limits are not mirrored: %s", error)

    def _run(self) -> None:
        stopped, idle = self._stopped, 0.0
        while not stopped.wait(self._interval):
            if self._thread is not threading.current_thread():
                return  # an exception struck `_start` just when it had started this one: there is another
            if self._to_postgres or self._to_redis:
                idle = 0.0
                self.tell()
                continue
            idle += self._interval
            if idle >= _IDLE:
                break
        self._thread = None  # before the last look: whoever notes something from now on starts another
        if (self._to_postgres or self._to_redis) and not stopped.is_set():
            self._start()


class _Backlog:
    """What one window is still to be told. `again`: what it did not answer may be told once more."""

    def __init__(
        self,
        window: CopiedWindow,
        breaker: CircuitBreaker,
        counters: Counters,
        clock: Callable[[], float],
        *,
        again: bool,
    ) -> None:
        self._window = window
        self._breaker = breaker
        self._counters = counters
        self._clock = clock
        self._again = again
        self.renew()

    def renew(self) -> None:
        # Appended to by hits without a lock, which deques bear; taken from under this one only.
        self._telling = threading.RLock()
        self._waiting: deque[Admission] = deque(maxlen=_KEPT)
        self._failed = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, admission: Admission) -> None:
        if len(self._waiting) == _KEPT:
            self._lost(1)
        self._waiting.append(admission)

    def forget(self, key: str) -> None:
        with self._telling:
            for _ in range(len(self._waiting)):
                admission = self._waiting.popleft()
                if admission.key != key:
                    self._waiting.append(admission)

    def tell_if_there(self) -> None:
        """`tell`, unless the server is known to be away. Raises nothing."""
        try:
            self._breaker.check()
            self.tell()
        except (BackendUnavailable, Rejected):
            pass  # counted by `tell`, and said by the breaker

    def tell(self) -> None:
        """Tell all that waits and could still count. Raises BackendUnavailable, Rejected."""
        with self._telling:
            taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
            now = self._clock()
            told = [one for one in taken if one.age_us(now) < one.longest_us]
            if not told:
                return
            try:
                self._window.copy(told, now)
            except BaseException as error:
                answered = isinstance(error, GovRedisError) and not isinstance(error, BackendUnavailable | Rejected)
                if self._again and not answered:
                    self._put_back(told)
                else:
                    self._lost(len(told), error)
                if not answered:
                    raise
            else:
                self._failed = False
                self._counters.add(f"limits.mirrored.{self._window.backend}", len(told))

    def _put_back(self, told: list[Admission]) -> None:
        """Before what came meanwhile, and only as far as there is room: extendleft would push that out."""
        kept = told[max(0, len(told) + len(self._waiting) - _KEPT) :]
        self._waiting.extendleft(reversed(kept))
        self._lost(len(told) - len(kept))

    def _lost(self, count: int, error: BaseException | None = None) -> None:
        if count:
            self._counters.add(f"limits.mirror_lost.{self._window.backend}", count)
        if error is not None and not self._failed:
            self._failed = True
            log.warning("limits could not be mirrored: %s", error)
