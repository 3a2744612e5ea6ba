"""RateLimiter: exact sliding windows on Redis, with a fallback that really limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

from .. import _boottime
from .._context import Context
from .._fork import notice_fork
from .._uncopied import Uncopied
from ..errors import RateLimitExceeded, check_timeout, refuse
from ..keys import Id, id_text
from .backends.backend import WindowStats
from .decider import Decider
from .denied_counts import Denied
from .hit_request import HitArguments, request_of
from .limit_spec import LimitSpec
from .rates import MAX_COST, Limit, Rate, parse_rate
from .result import RateLimitResult

P = ParamSpec("P")
R = TypeVar("R")

_DEFAULT = "default"

#: Seconds that `wait` sleeps at least.
_SHORTEST_SLEEP = 0.001


class RateLimiter(Uncopied):
    """Sliding window limits, exact: never more than N within any window, and no refusal while within N.

    Check and record are one step, in one round trip, by the server's clock; several limits are all or none, and a
    denial costs the identity nothing. The algorithm is the sliding window log.

    In Redis, entries of other clients count as ours do, and no call but `reset` removes an entry of theirs. An entry is
    kept for as long as the key's TTL says that somebody counts it, and no TTL is shortened. A log holds the entries
    that its clients admit within the longest window that any of them uses, 366 days at most.

    When Redis is away, the same window is kept in PostgreSQL if there is one, and enforced there, exactly. With that
    away too, GOVREDIS_LIMIT_FALLBACK decides: "local" (the default) keeps a window in each process, so P processes
    admit up to P times N; "deny" refuses all; "allow" lets all through.

    Each backend counts for itself. A window that spans failovers, however many, admits at most N per backend, and each
    loss of a backend's data adds N. With GOVREDIS_LIMIT_MIRROR each of the two servers is told what the other admitted
    (see docs/limits.md): such a window admits at most N and the admissions that were not told yet.
    `result.backend` and `result.degraded` say which backend decided.

    The process remembers a server's denial (unless GOVREDIS_LIMIT_DENY_CACHE=0): until its retry_after, but for a
    second at most, the same `hit`, `peek` or `check` is refused again without a round trip, its times counted down. So
    a refund or reset in another process is seen a second late at most; this process sees its own at once.

    Every method raises ValueError, before anything is sent, for a bad identity, rate, cost, operation or timeout. It
    raises BackendError where a server answers with an error, and ConfigurationError where PostgreSQL is asked and lacks
    our tables: run `govredis migrate`.
    """

    def __init__(
        self,
        context: Context,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = _boottime.clock,
    ) -> None:
        self._keys = context.keys
        self._sleep = sleep
        self._clock = clock
        self._decider = Decider(context, clock)

    # -- one step ------------------------------------------------------------------------------------------------

    def hit(self, identity: Id, rate: Rate, *, operation: str = _DEFAULT, cost: int = 1) -> RateLimitResult:
        """Admit and record, or refuse and record nothing, in one step.

        Args:
            identity: the agent, user or address that is limited.
            rate: "20/hour", "20 per hour", "100/15 minutes", several joined by ";", a Limit or a list of them.
            operation: the name of the limited operation; each has windows of its own.
            cost: how much of each limit the call takes: at most the smallest limit, and 10,000 of a log.

        Returns a RateLimitResult. Raises ValueError. A server that rejects the call is a BackendError, counted as
        limits.errors; its text names a key that holds something else. A server that is away is no error: the fallback
        decides. Where all of this process's connections to a server stay in use, raises BackendUnavailable, and no
        other backend is asked.
        """
        return self._decider.decide(identity, rate, operation, cost, "hit")

    def peek(self, identity: Id, rate: Rate, *, operation: str = _DEFAULT, cost: int = 1) -> RateLimitResult:
        """The decision of a `hit` now; `remaining` is after it. Writes nothing. Same arguments, errors and fallback."""
        return self._decider.decide(identity, rate, operation, cost, "peek")

    def require(self, identity: Id, rate: Rate, *, operation: str = _DEFAULT, cost: int = 1) -> RateLimitResult:
        """`hit`, raising RateLimitExceeded(result) where it refuses."""
        result = self._decider.decide(identity, rate, operation, cost, "hit")
        if not result.allowed:
            raise RateLimitExceeded(result)
        return result

    def wait(
        self, identity: Id, rate: Rate, *, timeout: float, operation: str = _DEFAULT, cost: int = 1
    ) -> RateLimitResult:
        """`hit`, sleeping until it is admitted, for up to `timeout` seconds: 0 or more, there is always a bound.

        Returns the last result: a refusal, at once, where its retry_after lies beyond the timeout. (A rate with a lease
        is asked for again after each lease: other processes may give back.) It sleeps for
        `timeout` in all at most, even if results say otherwise. A refused try takes nothing, so other callers may come
        first: there is no queue. Raises as `hit`.
        """
        check_timeout(timeout)
        deadline = self._clock() + timeout
        while True:
            result = self._decider.decide(identity, rate, operation, cost, "hit")
            if result.allowed:
                return result
            # Beside leases, room may come earlier. And never a busy or endless loop, even where two clocks disagree
            # about the last microsecond.
            lease = parse_rate(rate).lease_us / 1_000_000
            wait = max(min(result.retry_after, lease or math.inf), _SHORTEST_SLEEP)
            if not wait <= deadline - self._clock():
                return result
            self._sleep(wait)

    def hit_many(
        self, hits: Sequence[HitArguments], *, operation: str = _DEFAULT, cost: int = 1
    ) -> list[RateLimitResult]:
        """`hit` for each of several identities, each decided for itself, in order, in one round trip for each 500.

        Args:
            hits: tuples of arguments of `hit`, in its order: (identity, rate), (identity, rate, operation) or
                (identity, rate, operation, cost).
            operation, cost: for tuples without them.

        Leases are spent, and none is taken. Returns the results in the order of `hits`. While Redis is away, the
        fallback decides each. While a node of a Redis Cluster is, the fallback decides the hits of its identities.
        Where a server goes away in the middle, the hits that it had admitted by then count there too. A hit whose key
        holds something else is refused: its `backend` is "none", and it is counted as limits.errors.
        Raises ValueError before anything is sent; PoolExhausted.
        """
        notice_fork()
        return self._decider.hit_many([request_of(hit, operation, cost) for hit in hits])

    def hit_or_reserve(
        self,
        identity: Id,
        rate: Rate,
        *,
        reservation: str,
        operation: str = _DEFAULT,
        cost: int = 1,
        patience: float = 0.0,
        admit: bool = True,
    ) -> tuple[RateLimitResult, bool]:
        """`hit`, which reserves room for a refused caller that comes again by itself; for Celery's tasks.

        Everybody else's hits count the reservation. Called again at its time, it is admitted. Where other reservations
        were admitted late meanwhile, it may get a later time; it keeps its place before all later reservations. Only
        Redis takes reservations, and only for logs: elsewhere this is a `hit`.

        Args:
            reservation: its name, the same at each call.
            patience: seconds that the caller waits, where that is enough, to call again: meanwhile it keeps its place.
            admit: False: room that there is now is reserved too, for now.

        Returns the result, and whether there is a reservation, for `retry_after` seconds from now. Raises as `hit`.
        """
        notice_fork()
        request = id_text(identity), rate, operation, cost
        return self._decider.hit_or_reserve(request, reservation, patience=patience, admit=admit)

    # -- two steps -----------------------------------------------------------------------------------------------

    def check(self, identity: Id, limit: int, window: float, *, operation: str = _DEFAULT) -> RateLimitResult:
        """Would another hit be within `limit` per `window` seconds? Records nothing: call `record` after it.

        Between the two calls others may come, so several callers at the limit are all let through. `hit` is one step
        and does not leak: prefer it. `limit` and `window` are as in Limit. Returns the result of a `peek`. Raises as
        `hit`.
        """
        return self._decider.decide(identity, Limit(limit, window), operation, 1, "peek")

    def record(self, identity: Id, window: float, *, operation: str = _DEFAULT, cost: int = 1) -> None:
        """Record `cost` entries, 1 to 10,000, whatever the count is. They are kept for at least `window` seconds.

        Raises as `hit`.
        """
        self._decider.decide(identity, Limit(MAX_COST, window), operation, cost, "record")

    def get_count(self, identity: Id, window: float, *, operation: str = _DEFAULT) -> int:
        """How many entries there are within the last `window` seconds, in the backend that would decide now.

        0 where no server is in reach and GOVREDIS_LIMIT_FALLBACK is "deny" or "allow", which keep no windows. Raises as
        `hit`.
        """
        notice_fork()
        key = self._keys.rate_limit(operation, identity)
        window_us = Limit(1, window).window_us
        return self._decider.backends.first_reachable(lambda backend: backend.count(key, window_us))

    def stats(self, identity: Id, *, operation: str = _DEFAULT) -> WindowStats:
        """The contents of the identity's windows, in the backend that would decide now. Writes nothing.

        Raises BackendUnavailable where no backend in reach keeps windows.
        """
        notice_fork()
        key = self._keys.rate_limit(operation, identity)
        return self._decider.backends.first_reachable(lambda backend: backend.stats(key))

    def most_denied(self, n: int = 10) -> list[Denied]:
        """The identities that `hit` has refused most often, over all processes, in this hour and in the one before.

        Args:
            n: how many, the most denied first.

        Counted in Redis, a second later, without a round trip for each denial, by Space-Saving (Metwally, Agrawal and
        El Abbadi, 2005): a count is too high by at most a thousandth of all denials of its hour. Raises
        BackendUnavailable, also where Redis is disabled; BackendError.
        """
        notice_fork()
        return self._decider.denied_counts.most(n)

    def reset(self, identity: Id, *, operation: str = _DEFAULT) -> None:
        """Forget every entry of the identity, in each backend that can be reached.

        With GOVREDIS_LIMIT_MIRROR, admissions that another process has yet to tell come afterwards, to the server that
        did not admit them. Raises BackendUnavailable if a server could not be reached: the window there is unchanged.
        Where a server answers with an error (BackendError, ConfigurationError), the backends behind it are not reset.
        """
        notice_fork()
        self._decider.reset(id_text(identity), operation)

    def purge(self) -> int:
        """Delete ended windows from PostgreSQL. Returns how many. The other backends forget by themselves.

        Raises BackendUnavailable, BackendError, ConfigurationError.
        """
        notice_fork()
        return self._decider.backends.purge()

    def close(self) -> None:
        """Tell the servers what is pending: the denials of the last second here and, with GOVREDIS_LIMIT_MIRROR, what
        the other server admitted. The limiter may be used again.
        """
        notice_fork()
        self._decider.close()

    # -- decorator -----------------------------------------------------------------------------------------------

    def rate_limited(
        self,
        rate: Rate | Callable[..., Rate],
        *,
        key: str | Callable[..., Id],
        operation: str = _DEFAULT,
        cost: int | Callable[..., int] = 1,
        exempt: Callable[..., bool] | None = None,
        on_limit: Literal["raise", "wait"] = "raise",
        timeout: float = 60.0,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Limit the calls of a function.

        Args:
            rate: as in `hit`, or a callable that gets the call's arguments and returns one: a limit that depends on a
                plan, say. It holds from the next call on.
            key: a template of the function's argument names, "{agent_id}"; a plain name such as "mail", for a limit of
                all calls together; or a callable that gets the call's arguments.
            operation: the name of the limited operation.
            cost: as in `hit`, or a callable that gets the call's arguments and returns one.
            exempt: a callable that gets the call's arguments; a call for which it returns True is let through, unasked
                and uncounted.
            on_limit: "raise" raises RateLimitExceeded; "wait" sleeps up to `timeout` seconds, then raises it.
            timeout: seconds, for "wait".

        Raises ValueError at decoration for a bad argument; a call does for a bad value that a callable returned. Else
        each call raises, and promises when Redis is away, what `hit` does.
        """
        if on_limit not in {"raise", "wait"}:
            raise refuse("on_limit", on_limit, '"raise" or "wait"')
        check_timeout(timeout)
        spec = LimitSpec(rate, key, operation, cost, exempt)

        def admit(identity: Any, rate: Rate, cost: int) -> None:
            if on_limit == "wait":
                result = self.wait(identity, rate, timeout=timeout, operation=operation, cost=cost)
            else:
                result = self.hit(identity, rate, operation=operation, cost=cost)
            if not result.allowed:
                raise RateLimitExceeded(result)

        return lambda function: spec.limit(function, admit)
