"""DeniedCounts: the identities that are denied most, counted without a round trip for each denial."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._context import Context
from .._fork import renew_in_child
from .._teller import Party
from ..client import Command, Script
from ..errors import BackendError, BackendUnavailable
from ..keys import sibling

#: Identities kept for each hour, in Redis, and for each second, in the process.
KEPT = 1000
#: Denials of one identity in an hour, at most.
_MOST = 10**12
#: Members in one call of the script, which keeps Redis from everything else meanwhile.
_AT_ONCE = 100


class Denied(NamedTuple):
    """An identity that a limit refused.

    Attributes:
        identity, operation: as in `hit`.
        times: how often.
    """

    identity: str
    operation: str
    times: int


class DeniedCounts(Party):
    """How often each identity was denied, over all processes, in this hour and in the one before.

    `add` counts in the process; a second later the teller's thread tells Redis. Redis keeps 1,000 identities an hour by
    Space-Saving (Metwally, Agrawal and El Abbadi, "Efficient computation of frequent and top-k elements in data
    streams", 2005). A count is never too low by what Redis was told, and too high by at most a thousandth of all
    denials of its hour. Every identity that was denied more often than that is among them.

    Redis is not told of the last second of a killed process, nor of identities beyond 1,000 in one second. A process
    that ends by itself tells its last second, if Redis answers within a second. While Redis is away, the counts are
    kept, within that bound, and told with the next denial after its return. The counter limits.denied_untold says how
    many denials Redis was not told of.

    Args:
        context: without Redis, nothing is counted.
    """

    def __init__(self, context: Context) -> None:
        self._key = context.keys.denied()
        self._redis = context.redis
        self._counters = context.counters
        self._teller = context.teller
        self._script = Script(__package__, "clock.lua", "denied.lua")
        self._most = Script(__package__, "clock.lua", "most_denied.lua")
        self.scripts: Sequence[Script] = (self._script,)
        self.renew_after_fork()
        renew_in_child(self)
        context.teller.join(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        #: By identity and operation. The parent tells what the parent counted.
        self._counts: dict[tuple[str, str], int] = {}
        self._told: dict[tuple[str, str], int] = {}

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
        if self._counters.on_add is not None:
            self._teller.wake()

    def has_pending(self) -> bool:
        return bool(self._counts or self._told)

    def take(self, *, last: bool) -> list[Command]:
        with self._lock:
            self._told, self._counts = self._counts, {}
        pairs = [(f"{operation}:{identity}", str(count)) for (identity, operation), count in self._told.items()]
        (_, *keys), first = self._hours()
        return [
            self._script.call(
                keys, (str(KEPT), "", str(first + 1), *(arg for pair in pairs[i : i + _AT_ONCE] for arg in pair))
            )
            for i in range(0, len(pairs), _AT_ONCE)
        ]

    def told(self, replies: list[Any]) -> None:
        told, self._told = self._told, {}
        if any(isinstance(reply, BackendError) for reply in replies):
            self._counters.add("limits.denied_untold", sum(told.values()))

    def give_back(self, *, last: bool) -> None:
        told, self._told = self._told, {}
        with self._lock:
            for who, count in told.items():
                self._count(who, count)

    def most(self, n: int) -> list[Denied]:
        """The `n` most denied, the most denied first. Raises BackendUnavailable, BackendError.

        Members that govredis has not written are left out, and counted as limits.unreadable.
        """
        if self._redis is None:
            raise BackendUnavailable("Redis is disabled, and denials are counted there")
        if self._redis.in_process:
            self._teller.flush()
        keys, first = self._hours()
        try:
            hours = self._redis.run(self._most, keys, "", str(first))
        except BackendUnavailable:
            raise
        except BackendError as error:
            raise BackendError(f"the denials counted at {keys[0]}: {error}") from error.__cause__
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

    def _hours(self) -> tuple[list[str], int]:
        """The keys of the hour before the last, the last, this and the next; and the number of the first. By this
        process's clock: a script must name its keys, and the server's clock has another hour for a moment only.
        """
        first = int(time.time() // 3600) - 2
        return [sibling(self._key, str(hour)) for hour in range(first, first + 4)], first

    def _count(self, who: tuple[str, str], count: int) -> None:
        """Under the lock."""
        if who in self._counts:
            self._counts[who] += count
        elif len(self._counts) < KEPT:
            self._counts[who] = count
        else:
            self._counters.add("limits.denied_untold", count)
