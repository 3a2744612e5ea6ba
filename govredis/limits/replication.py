"""Replication: each server is told what the other admitted, so that a failover does not start from nothing."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .._context import Context
from .._counters import Counters
from .._daemon import make_daemon, start
from .._exit import write_at_exit
from .._fork import renew_in_child
from .._latch import Latch
from .._pool import PoolExhausted
from ..breaker import CircuitBreaker, Rejected
from ..client import RedisClient, RedisNode
from ..errors import BackendUnavailable, GovRedisError
from .backends.backend import Admission, ServerLimitBackend
from .rates import Limit

log: logging.Logger = logging.getLogger("govredis")

#: Admissions kept for each server until it is told. In memory, some 4 MB.
_KEPT = 20_000
#: The thread outlives the last admission by this many seconds.
_IDLE = 5.0


class Replication:
    """Tells PostgreSQL what Redis admitted, and Redis what PostgreSQL admitted, a moment later.

    Every GOVREDIS_LIMIT_MIRROR seconds a thread of this process tells each server what the other admitted here
    meanwhile. PostgreSQL gets one statement an interval, and one at `close` and at the end of the process; Redis gets a
    pipeline. Redis is also told before this process uses it again after an outage. No hit waits for any of this: `note`
    only appends. Where threads cannot run, PostgreSQL is told nothing before the process ends.

    So a window that spans a failover to PostgreSQL admits at most N and what Redis admitted in the interval before. A
    window that spans the way back admits at most N and what is admitted until the last process is back, about half a
    second. While some processes see Redis and others do not, it is N per server, as without replication: Redis hears
    from the others when they see it again.

    A replica's time is the age of the admission by this process's monotonic clock, so no two clocks need agree. It is
    late by the time that telling took. So a replica ends no earlier than the entry that it replicates, and hardly
    later.

    Each node of a Redis Cluster is told of its own keys. A node that is away keeps no other from being told.

    Some admissions are lost: those of sliding window counters, of the last interval of a killed process, and the
    oldest beyond 20,000 that wait. So are those that a server refused, or that PostgreSQL did not answer, for it may
    have recorded them. A process that ends by itself tells its last interval, if the server answers within a second.
    Refunds are not replicated: the replica stays, which is stricter. The counters `limits.mirrored.postgres` and
    `.redis` say how many admissions each was told; `limits.mirror_lost.postgres` and `.redis`, how many it was not.

    Args:
        redis: says when a node of it is back.
        to_redis, to_postgres: told unless the breaker is open, a node's or PostgreSQL's.
        interval: seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        redis: RedisClient,
        to_redis: ServerLimitBackend,
        postgres_breaker: CircuitBreaker,
        to_postgres: ServerLimitBackend,
        *,
        interval: float,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = interval
        self._clock = clock
        self._redis = redis
        self._postgres_breaker = postgres_breaker
        self._to_redis = _PendingAdmissions(to_redis, counters, clock, again=True)
        self._to_postgres = _PendingAdmissions(to_postgres, counters, clock, again=False)
        self.renew_after_fork()
        renew_in_child(self)
        write_at_exit(self)
        redis.on_recovery(self._to_redis.tell)

    @classmethod
    def of(
        cls, context: Context, to_redis: ServerLimitBackend | None, to_postgres: ServerLimitBackend | None
    ) -> Replication | None:
        """The replication that the settings ask for; None: they ask for none, or one of the servers is not there."""
        interval, redis, postgres = context.config.limit_mirror, context.redis, context.postgres
        if interval is None or redis is None or postgres is None or to_redis is None or to_postgres is None:
            return None
        return cls(redis, to_redis, postgres.breaker, to_postgres, interval=interval, counters=context.counters)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._thread: threading.Thread | None = None
        self._stopped = Latch()
        self._warned = False
        self._nonce = os.urandom(6).hex()
        self._numbers = itertools.count()
        # The parent tells what the parent noted.
        self._to_redis.renew()
        self._to_postgres.renew()

    def note(self, backend: str, key: str, limits: Sequence[Limit], cost: int) -> None:
        """The backend of that name has admitted this. Returns at once."""
        if backend == "redis":
            pending = self._to_postgres
        elif backend == "postgres":
            pending = self._to_redis
        else:
            return  # windows of this process only
        name = f"{self._nonce}{next(self._numbers)}"
        pending.add(Admission(key, self._clock(), cost, max(limit.window_us for limit in limits), name))
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._start()

    def forget(self, key: str) -> None:
        """Tell nothing more about this key."""
        self._to_redis.forget(key)
        self._to_postgres.forget(key)

    def tell(self) -> None:
        """Tell each server in reach what is pending for it, now."""
        if self._to_redis:
            for node in self._redis.nodes():
                self._to_redis.tell_if_reachable(node.breaker, node)
        self._to_postgres.tell_if_reachable(self._postgres_breaker)

    def close(self) -> None:
        """End the thread, waiting for it, and tell what is pending. `note` starts it again."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout=5)
        self.tell()

    write_pending = close

    def has_pending(self) -> bool:
        return self._to_redis.busy() or self._to_postgres.busy()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped = Latch()
            self._thread = thread = make_daemon("govredis-replication", self._run)
            if not start(thread) and not self._warned:
                self._warned = True
                log.warning("admissions of limits are not replicated: no thread can be started")

    def _run(self) -> None:
        stopped, idle = self._stopped, 0.0
        while not stopped.wait(self._interval):
            if self._thread is not threading.current_thread():
                return  # an exception struck `_start` just when it had started this thread: there is another
            if self._to_postgres or self._to_redis:
                idle = 0.0
                self.tell()
                continue
            idle += self._interval
            if idle >= _IDLE:
                break
        self._thread = None  # before the last look: a `note` from now on starts another
        if (self._to_postgres or self._to_redis) and not stopped.is_set():
            self._start()


class _PendingAdmissions:
    """The admissions that a server was not told yet. True while there are any.

    Args:
        again: admissions that it did not answer may be told once more.
    """

    def __init__(
        self,
        backend: ServerLimitBackend,
        counters: Counters,
        clock: Callable[[], float],
        *,
        again: bool,
    ) -> None:
        self._backend = backend
        self._counters = counters
        self._clock = clock
        self._again = again
        self.renew()

    def renew(self) -> None:
        # Hits append without a lock, which deques bear; only the holder of this lock takes from it.
        self._telling = threading.RLock()
        self._waiting: deque[Admission] = deque(maxlen=_KEPT)
        self._failed = False
        self._on_its_way = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def busy(self) -> bool:
        """Whether some wait, or are on their way."""
        return self._on_its_way or bool(self._waiting)

    def add(self, admission: Admission) -> None:
        if len(self._waiting) == _KEPT:
            self._lose(1)
        self._waiting.append(admission)

    def forget(self, key: str) -> None:
        with self._telling:
            for _ in range(len(self._waiting)):
                admission = self._waiting.popleft()
                if admission.key != key:
                    self._waiting.append(admission)

    def tell_if_reachable(self, breaker: CircuitBreaker, node: RedisNode | None = None) -> None:
        """`tell`, unless the server is known to be away, by its breaker. Raises nothing."""
        try:
            breaker.check()
            self.tell(node)
        except (BackendUnavailable, Rejected):
            pass  # counted by `tell`, and said by the breaker

    def tell(self, node: RedisNode | None = None) -> None:
        """Tell all that wait and could still count: of a node's keys, where one is given.

        Raises BackendUnavailable, Rejected.
        """
        with self._telling:
            self._on_its_way = True
            try:
                self._tell(node)
            finally:
                self._on_its_way = False

    def _tell(self, node: RedisNode | None) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        now = self._clock()
        admissions = [admission for admission in taken if admission.age_us(now) < admission.longest_us]
        if node is not None:
            others = [admission for admission in admissions if not node.covers(admission.key)]
            if others:
                self._put_back(others)
                admissions = [admission for admission in admissions if node.covers(admission.key)]
        if not admissions:
            return
        try:
            refused, reason = self._backend.replicate(admissions, now, node)
        except BaseException as error:
            answered = isinstance(error, GovRedisError) and not isinstance(error, BackendUnavailable | Rejected)
            if isinstance(error, PoolExhausted) or (self._again and not answered):  # the former was not even sent
                self._put_back(admissions)
            else:
                self._lose(len(admissions), error)
            if not answered:
                raise
        else:
            if reason is None:
                self._failed = False
            self._lose(refused, reason)
            self._counters.add(f"limits.mirrored.{self._backend.name}", len(admissions) - refused)

    def _put_back(self, admissions: list[Admission]) -> None:
        """Put them before those that came meanwhile, as far as there is room: extendleft would push the latter out."""
        kept = admissions[max(0, len(admissions) + len(self._waiting) - _KEPT) :]
        self._waiting.extendleft(reversed(kept))
        self._lose(len(admissions) - len(kept))

    def _lose(self, count: int, error: BaseException | None = None) -> None:
        if count:
            self._counters.add(f"limits.mirror_lost.{self._backend.name}", count)
        if error is not None and not self._failed:
            self._failed = True
            log.warning("admissions of limits could not be replicated: %s", error)
