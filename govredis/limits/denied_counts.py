"""DeniedCounts: the identities that are denied most, counted without a round trip for each denial."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from .._context import Context
from .._daemon import start_daemon
from .._exit import write_at_exit
from .._fork import renew_in_child
from ..client import Script
from ..errors import BackendError, BackendUnavailable

#: Identities kept for each hour, in Redis, and for each second, in the process.
KEPT = 1000
#: Seconds between two flushes of a process, at least.
_INTERVAL = 1.0
#: Denials of one identity in an hour, at most.
_MOST = 10**12
#: Members in one call of the script, which keeps Redis from everything else meanwhile.
_AT_ONCE = 100


class Denied(NamedTuple):
    """An identity that a limit refused, and how often."""

    identity: str
    operation: str
    times: int


class DeniedCounts:
    """How often each identity was denied, over all processes, in this hour and in the one before.

    `add` counts in the process; a second later a thread tells Redis, and ends. Redis keeps 1,000 identities an hour by
    Space-Saving (Metwally, Agrawal and El Abbadi, "Efficient computation of frequent and top-k elements in data
    streams", 2005). A count is never too low by what Redis was told, and too high by at most a thousandth of all
    denials of its hour. Every identity that was denied more often than that is among them.

    Redis is not told of the last second of a killed process, nor of identities beyond 1,000 in one second. A process
    that ends by itself tells its last second, if Redis answers within a second. While Redis is away, the counts are
    kept, within that bound, and told with the next denial after its return. The counter limits.denied_untold says how
    many denials Redis was not told of.

    Args:
        context: without Redis, nothing is counted.
        clock: seconds, monotonic.
        sleep: makes the thread wait.
    """

    def __init__(
        self,
        context: Context,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._tag = f"{{{context.keys.denied()}}}"
        self._redis = context.redis
        self._counters = context.counters
        self._clock = clock
        self._sleep = sleep or time.sleep  # looked up now: gevent may have replaced it
        self._script = Script(__package__, "clock.lua", "denied.lua")
        self._most = Script(__package__, "clock.lua", "most_denied.lua")
        self.renew_after_fork()
        renew_in_child(self)
        write_at_exit(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._telling = threading.RLock()
        #: By identity and operation. The parent tells what the parent counted.
        self._counts: dict[tuple[str, str], int] = {}
        self._told: dict[tuple[str, str], int] = {}
        self._next = 0.0
        self._closed = False

    def add(self, identity: str, operation: str) -> None:
        """Count one denial. Returns at once."""
        if self._redis is None:
            return
        who = identity, operation
        self._closed = False
        with self._lock:
            if who in self._counts:
                self._counts[who] += 1
            else:
                self._count(who, 1)
        now = self._clock()
        if now >= self._next:
            # Set before the thread is there: if an exception strikes in between, the next second's denial starts one.
            self._next = now + _INTERVAL
            self._start()

    def flush(self) -> None:
        """Tell Redis the counts. Where Redis is away, they are kept, and nothing is raised."""
        with self._telling:
            with self._lock:
                self._told, self._counts = self._counts, {}
            try:
                self._tell(self._told)
            finally:
                self._told = {}

    write_pending = flush

    def close(self) -> None:
        """`flush`, and leave the rest to the next denial: the thread must not wake a client that was closed."""
        self._closed = True
        self.flush()

    def has_pending(self) -> bool:
        return bool(self._counts or self._told)

    def _tell(self, told: dict[tuple[str, str], int]) -> None:
        if not told or self._redis is None:
            return
        pairs = [(f"{operation}:{identity}", str(count)) for (identity, operation), count in told.items()]
        commands = [
            self._script.call((self._tag,), (str(KEPT), "", *(arg for pair in pairs[i : i + _AT_ONCE] for arg in pair)))
            for i in range(0, len(pairs), _AT_ONCE)
        ]
        try:
            self._redis.pipeline(commands, [self._script])
        except BackendUnavailable:
            with self._lock:
                for who, count in told.items():
                    self._count(who, count)
        except BackendError:
            self._counters.add("limits.denied_untold", sum(told.values()))

    def most(self, n: int) -> list[Denied]:
        """The `n` most denied, the most denied first. Raises BackendUnavailable, BackendError.

        Members that govredis has not written are left out, and counted as limits.unreadable.
        """
        if self._redis is None:
            raise BackendUnavailable("Redis is disabled, and denials are counted there")
        try:
            hours = self._redis.run(self._most, (self._tag,), "")
        except BackendUnavailable:
            raise
        except BackendError as error:
            raise BackendError(f"the denials counted at {self._tag}: {error}") from error.__cause__
        counts: Counter[tuple[str, str]] = Counter()
        for flat in hours:
            for member, score in zip(flat[::2], flat[1::2], strict=True):
                try:
                    operation, colon, identity = member.decode().partition(":")
                    count = int(float(score))
                except (ValueError, OverflowError):  # not UTF-8; an infinite score
                    colon = ""
                if not colon or not 0 < count <= _MOST:
                    self._counters.add("limits.unreadable")
                    continue
                counts[identity, operation] += count
        return [Denied(identity, operation, count) for (identity, operation), count in counts.most_common(n)]

    def _count(self, who: tuple[str, str], count: int) -> None:
        """Under the lock."""
        if who in self._counts:
            self._counts[who] += count
        elif len(self._counts) < KEPT:
            self._counts[who] = count
        else:
            self._counters.add("limits.denied_untold", count)

    def _start(self) -> None:
        start_daemon("govredis-denied", self._flush_later)

    def _flush_later(self) -> None:
        self._sleep(_INTERVAL)
        if not self._closed:
            self.flush()
