"""DeniedCounts: who is denied most, counted without costing a denial a round trip."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from .._counters import Counters
from .._fork import renew_in_child
from ..client import RedisClient, Script
from ..errors import BackendError, BackendUnavailable
from ..keys import Keys

#: Identities kept of each hour, in Redis, and of each second, in the process.
KEPT = 1000
#: Seconds between two flushes of a process, at least.
_INTERVAL = 1.0
#: Members that one script takes: so long may Redis be busy with nothing else.
_AT_ONCE = 100


class Denied(NamedTuple):
    """Whom a limit refused, and how often."""

    identity: str
    operation: str
    times: int


class DeniedCounts:
    """How often each identity was denied, over all processes, in this hour and in the one before.

    `add` counts in the process; a second later a thread tells Redis, and ends. Redis keeps 1,000 identities an hour by
    Space-Saving (Metwally, Agrawal and El Abbadi, "Efficient computation of frequent and top-k elements in data
    streams", 2005): a count is never too low by what was told, and too high by at most a thousandth of all denials of
    its hour; whoever was denied more often than that is among them.

    What is not told: the last second of a process that ends without `flush`; identities beyond 1,000 in one second.
    While Redis is away, what was counted is kept, within that bound, and told with the next denial after its return.
    The counter limits.denied_untold says how many denials were not told.

    Args:
        redis: None: nothing is counted.
        clock: seconds, monotonic.
        sleep: what the thread waits by.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._tag = f"{{{keys.denied()}}}"
        self._redis = redis
        self._counters = counters
        self._clock = clock
        self._sleep = sleep or time.sleep  # looked up now: gevent may have replaced it
        self._script = Script(__package__, "denied.lua")
        self._most = Script(__package__, "most_denied.lua")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        #: Of (identity, operation). What the parent counted, it tells itself.
        self._counts: dict[tuple[str, str], int] = {}
        self._next = 0.0

    def add(self, identity: str, operation: str) -> None:
        """Count one denial. Returns at once."""
        if self._redis is None:
            return
        who = identity, operation
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
        """Tell Redis what was counted. Raises nothing for Redis being away: then it is kept."""
        with self._lock:
            told, self._counts = self._counts, {}
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
        """The `n` most denied, the most denied first. Raises BackendUnavailable, BackendError."""
        if self._redis is None:
            raise BackendUnavailable("Redis is disabled: who is denied is counted there")
        counts: Counter[str] = Counter()
        for flat in self._redis.run(self._most, (self._tag,), ""):
            for member, count in zip(flat[::2], flat[1::2], strict=True):
                counts[member.decode()] += int(float(count))
        found = []
        for member, count in counts.most_common(n):
            operation, _, identity = member.partition(":")
            found.append(Denied(identity, operation, count))
        return found

    def _count(self, who: tuple[str, str], count: int) -> None:
        """Under the lock."""
        if who in self._counts:
            self._counts[who] += count
        elif len(self._counts) < KEPT:
            self._counts[who] = count
        else:
            self._counters.add("limits.denied_untold", count)

    def _start(self) -> None:
        try:
            threading.Thread(target=self._tell, name="govredis-denied", daemon=True).start()
        except RuntimeError as error:  # no more threads, or the interpreter is going down
            if error.__context__ is not None:
                raise error.__context__ from None  # a signal handler's exception, struck in there

    def _tell(self) -> None:
        self._sleep(_INTERVAL)
        self.flush()
