"""Denials remembered in the process: a repeated one costs no round trip."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from .._fork import renew_in_child
from .questions import Question
from .rates import Limit
from .result import RateLimitResult

#: Seconds for which a denial is believed at most: so late are another process's refund and reset seen.
MAX_AGE = 1.0


#: When it was sent, and the cache's generation then.
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
    """Of each identity and operation, the last denial by a server.

    Whoever was denied stays so until the denial's retry_after has passed: entries only age, and what others add makes
    it later. So the same question, rate and cost included, has the same answer, its times counted down, unless
    something was given back: by this process, that holds at once (`forget`); another's refund or reset, a server's loss
    of data and a step of its clock are seen within MAX_AGE. Of a cost above 1, `remaining` is as old as the denial.

    Bounded: beyond `entries` the denial that is oldest is forgotten. A forked child starts empty.

    Args:
        entries: identities and operations, at most.
        clock: seconds, monotonic.
    """

    def __init__(self, entries: int, clock: Callable[[], float]) -> None:
        self._entries = entries
        self._clock = clock
        #: How often something was forgotten: a denial that was asked for before does not count any more.
        self.generation = 0
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._known: dict[tuple[str, str], _Denial] = {}

    def find(self, question: Question) -> RateLimitResult | None:
        """What is known of this very question. Nothing of it has been checked yet."""
        identity, rate, operation, cost = question
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
        """To be asked before a question is sent."""
        return self._clock(), self.generation

    def remember(self, question: Question, denial: RateLimitResult, sent: Sent) -> None:
        """Keep the denial that a question sent then has got."""
        identity, rate, operation, cost = question
        # It was decided between the two instants. Counted from the first, its retry_after is over before the server
        # would admit; counted from the second, as its reader counts it, after.
        asked, generation = sent
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
            if generation != self.generation or until <= received:
                return
            self._known.pop((identity, operation), None)  # so that the oldest comes first
            self._known[identity, operation] = known
            if len(self._known) > self._entries:
                del self._known[next(iter(self._known))]

    def forget(self, identity: str, operation: str) -> None:
        """Something was given back: no denial from before holds."""
        with self._lock:
            self.generation += 1
            self._known.pop((identity, operation), None)


def _fixed(rate: Any) -> Any:
    """A list may be changed by its owner."""
    return tuple(rate) if type(rate) is list else rate
