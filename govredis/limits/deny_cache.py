"""DenyCache: denials remembered in the process, so that a repeated denial costs no round trip."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from .._fork import renew_in_child
from .hit_request import HitRequest
from .rates import Limit
from .result import RateLimitResult

#: Seconds for which a denial is believed at most: another process's refund or reset is seen so late.
MAX_AGE = 1.0


#: When a request was sent, and how often the cache had forgotten something by then.
Sent: TypeAlias = tuple[float, int]


class _Denial(NamedTuple):
    """Instants are seconds of the clock."""

    rate: Any
    cost: int
    until: float
    admitted_at: float
    full_at: float
    limit: Limit
    remaining: int
    backend: str
    degraded: bool


class DenyCache:
    """The last denial by a server, for each identity and operation.

    A denial holds until its retry_after has passed: entries only age, and entries that others add make it later. So the
    same request, rate and cost included, has the same answer, its times counted down, unless something was given back.
    This process's own refund or reset is seen at once (`forget`); another's, a server's loss of data and a step of its
    clock within MAX_AGE. For a cost above 1, `remaining` is as old as the denial.

    Bounded: beyond `entries` the oldest denial is forgotten. A forked child starts empty.

    Args:
        entries: identities and operations, at most.
        clock: seconds, monotonic.
    """

    def __init__(self, entries: int, clock: Callable[[], float]) -> None:
        self._entries = entries
        self._clock = clock
        #: How often something was forgotten: a denial that was asked for before does not count any more.
        self.forgotten: int = 0
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._known: dict[tuple[str, str], _Denial] = {}

    def find(self, request: HitRequest) -> RateLimitResult | None:
        """The denial of this very request, if it is remembered. Nothing in the request has been checked yet."""
        identity, rate, operation, cost = request
        try:
            known = self._known.get((identity, operation))
        except TypeError:  # not hashable: no identity
            return None
        if known is None:
            return None
        held, held_cost, until, admitted_at, full_at, limit, remaining, backend, degraded = known
        if cost != held_cost or type(cost) is not int or (rate is not held and _fixed(rate) != held):
            return None
        now = self._clock()
        if now >= until:
            return None
        return RateLimitResult(False, limit, remaining, admitted_at - now, full_at - now, limit, backend, degraded)

    def sent(self) -> Sent:
        """The moment, as `remember` needs it: ask just before the request is sent."""
        return self._clock(), self.forgotten

    def remember(self, request: HitRequest, denial: RateLimitResult, sent: Sent) -> None:
        """Keep the denial that answered a request."""
        identity, rate, operation, cost = request
        # The server decided between the two instants. Counted from the first, its retry_after is over before the server
        # would admit; counted from the second, as its reader counts it, after.
        asked, forgotten = sent
        received = self._clock()
        until = asked + min(denial.retry_after, MAX_AGE)
        known = _Denial(
            _fixed(rate),
            cost,
            until,
            received + denial.retry_after,
            received + denial.reset_after,
            denial.limit,
            denial.remaining,
            denial.backend,
            denial.degraded,
        )
        with self._lock:
            if forgotten != self.forgotten or until <= received:
                return
            self._known.pop((identity, operation), None)  # so that the oldest comes first
            self._known[identity, operation] = known
            if len(self._known) > self._entries:
                del self._known[next(iter(self._known))]

    def forget(self, identity: str, operation: str) -> None:
        """Something was given back: no earlier denial holds."""
        with self._lock:
            self.forgotten += 1
            self._known.pop((identity, operation), None)


def _fixed(rate: Any) -> Any:
    """The rate as nobody can change it: a list belongs to the caller."""
    return tuple(rate) if type(rate) is list else rate
