"""RateLimiter: exact sliding windows on Redis, with a fallback that really limits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from .._counters import Counters
from ..errors import BackendUnavailable, RateLimitExceeded, check_timeout, refuse
from ..keys import Keys
from .calls import LimitedCalls
from .denied import Denied, DeniedCounts
from .deny_cache import DenyCache, Sent
from .local_window import LocalWindow
from .mirror import Mirror
from .questions import Hit, Question, question_of
from .rates import MAX_COST, Limit, Rate, check_cost, parse_rate
from .redis_window import RedisWindow
from .result import RateLimitResult
from .windows import Mode, Outcome, Standing, Window

if TYPE_CHECKING:
    from ..client import RedisClient
    from ..postgres import Postgres
    from .postgres_window import PostgresWindow

P = ParamSpec("P")
R = TypeVar("R")

_DEFAULT = "default"

#: The stores whose denials are remembered: what this process decides is as cheap as remembering it.
_SERVERS = frozenset({"redis", "postgres"})


class RateLimiter:
    """Sliding window limits, exact: never more than N within any window, and none refused while within N.

    Check and record are one step, in one round trip, by the server's clock; several limits are all or none, and a
    denial costs the identity nothing. The algorithm is the sliding window log.

    When Redis is away, the same window is kept in PostgreSQL if there is one, and enforced there, exactly. With that
    away too, GOVREDIS_LIMIT_FALLBACK says: "local" (the default) keeps a window in each process, so P processes admit
    up to P times N; "deny" refuses all; "allow" lets all through. Each store counts for itself: a window that spans
    switches, however many, admits at most N per store, and each loss of a store's data adds N. With
    GOVREDIS_LIMIT_MIRROR each of the two servers is told what the other admitted (see mirror.Mirror): such a window
    admits at most N and what was not told yet. `result.backend` and `result.degraded` say who decided.

    A server's denial is remembered in the process (unless GOVREDIS_LIMIT_DENY_CACHE=0): until its retry_after, but for
    a second at most, the same `hit`, `peek` or `check` is refused again without a round trip, its times counted down.
    So late, at most, are a refund or reset in another process seen; those of this one are seen at once.

    Every method raises ValueError, before anything is sent, for a bad identity, rate, cost or operation.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        postgres: Postgres | None,
        *,
        fallback: str,
        local_entries: int,
        counters: Counters,
        deny_cache: bool = True,
        mirror: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._counters = counters
        self._fallback = fallback
        self._sleep = sleep
        self._clock = clock
        self._denied_counts = DeniedCounts(keys, redis, counters)
        self._windows: list[Window] = []
        self._mirror: Mirror | None = None
        self._redis_window = redis_window = RedisWindow(redis) if redis is not None else None
        if redis_window is not None:
            self._windows.append(redis_window)
        self._postgres_window: PostgresWindow | None = None
        if postgres is not None:
            from .postgres_window import PostgresWindow

            self._postgres_window = PostgresWindow(postgres)
            self._windows.append(self._postgres_window)
            if mirror is not None and redis is not None and redis_window is not None:
                self._mirror = Mirror(
                    redis, redis_window, postgres.breaker, self._postgres_window, interval=mirror, counters=counters
                )
        if fallback == "local":
            self._windows.append(LocalWindow(local_entries, clock))
        self._denials = DenyCache(local_entries, clock) if deny_cache else None

    # -- one step ------------------------------------------------------------------------------------------------

    def hit(self, identity: str, rate: Rate, *, operation: str = _DEFAULT, cost: int = 1) -> RateLimitResult:
        """Admit and record, or refuse and record nothing, in one step.

        Args:
            identity: whom to limit.
            rate: "20/hour", "20 per hour", "100/15 minutes", several joined by ";", a Limit or a list of them.
            operation: what is limited; each has windows of its own.
            cost: how much of each limit the call takes, 0 < cost <= the smallest limit.

        Returns a RateLimitResult. Raises ValueError; BackendError when a server rejects the call (not when it is
        away: then the fallback decides).
        """
        return self._decide((identity, rate, operation, cost), "hit")

    def peek(self, identity: str, rate: Rate, *, operation: str = _DEFAULT, cost: int = 1) -> RateLimitResult:
        """What `hit` would decide now; `remaining` is after it. Writes nothing. Same arguments, errors and fallback."""
        return self._decide((identity, rate, operation, cost), "peek")

    def require(self, identity: str, rate: Rate, *, operation: str = _DEFAULT, cost: int = 1) -> RateLimitResult:
        """`hit`, raising RateLimitExceeded(result) where it refuses."""
        result = self._decide((identity, rate, operation, cost), "hit")
        if not result.allowed:
            raise RateLimitExceeded(result)
        return result

    def wait(
        self, identity: str, rate: Rate, *, timeout: float, operation: str = _DEFAULT, cost: int = 1
    ) -> RateLimitResult:
        """`hit`, sleeping until it is admitted, for up to `timeout` seconds.

        Returns the last result: a refusal, at once, where its retry_after lies beyond the timeout. A refused try takes
        nothing, so others who hit meanwhile may come first: there is no queue.
        """
        check_timeout(timeout)
        deadline = self._clock() + timeout
        while True:
            result = self._decide((identity, rate, operation, cost), "hit")
            if result.allowed or self._clock() + result.retry_after > deadline:
                return result
            # Never a busy loop, even where two clocks disagree about the last microsecond.
            self._sleep(max(result.retry_after, 0.001))

    def hit_many(self, hits: Sequence[Hit], *, operation: str = _DEFAULT, cost: int = 1) -> list[RateLimitResult]:
        """`hit` for each of several identities, each decided for itself, in order, in one round trip for each 500.

        Args:
            hits: tuples of what `hit` takes, in its order: (identity, rate), (identity, rate, operation) or (identity,
                rate, operation, cost).
            operation, cost: of those that name none.

        Returns the results in the order of `hits`. While Redis is away, the fallback decides each; where Redis went
        away in the middle, what it had admitted by then counts there too. Raises ValueError before anything is sent;
        BackendError as `hit`: the others have been decided then.
        """
        questions = [question_of(hit, operation, cost) for hit in hits]
        checked = [self._check(question) for question in questions]
        results = [self._known(question, "hit") for question in questions]
        unknown = [n for n, result in enumerate(results) if result is None]
        stores = self._windows
        first = stores[0] if stores else None
        if isinstance(first, RedisWindow) and unknown:
            sent = self._sent()
            try:
                outcomes = first.hit_many([(*checked[n], questions[n][3]) for n in unknown])
            except BackendUnavailable:
                stores = stores[1:]
            else:
                for n, outcome in zip(unknown, outcomes, strict=True):
                    results[n] = self._result(outcome, first, checked[n][1], questions[n], "hit", sent)
        return [
            self._ask(question, "hit", stores) if result is None else result
            for question, result in zip(questions, results, strict=True)
        ]

    def hit_or_book(
        self,
        identity: str,
        rate: Rate,
        *,
        booking: str,
        operation: str = _DEFAULT,
        cost: int = 1,
        patience: float = 0.0,
        admit: bool = True,
    ) -> tuple[RateLimitResult, bool]:
        """`hit`, for what comes again by itself: what is refused is booked, and everybody else's hits count it.

        Called again when that time has come, it is admitted; where others were admitted meanwhile later than they were
        booked for, it may be told a later time, and keeps its place before all that was booked for later. Only Redis
        books, and only windows that are logs: the others are hit.

        Args:
            booking: what identifies it: the same at each call.
            patience: seconds that the caller waits, where that is enough, to call again: meanwhile it keeps its place.
            admit: False: what there is room for is booked too, for now.

        Returns the result, and whether it is booked, for `retry_after` seconds from now.
        """
        question: Question = (identity, rate, operation, cost)
        key, limits = self._check(question)
        # What is only booked is neither counted nor mirrored: it is, when it is called for.
        mode: Literal["hit", "peek"] = "hit" if admit else "peek"
        store, stores = self._redis_window, self._windows
        if store is not None and not limits[0].counted:
            patience_us = int(patience * 1_000_000)
            try:
                outcome, at = store.book(key, limits, cost, booking, patience_us=patience_us, admit=admit)
            except BackendUnavailable:
                stores = stores[1:]
            else:
                return self._result(outcome, store, limits, question, mode, None), at > 0
        return self._ask(question, mode, stores), False

    # -- two steps -----------------------------------------------------------------------------------------------

    def check(self, identity: str, limit: int, window: float, *, operation: str = _DEFAULT) -> RateLimitResult:
        """Would one more be within `limit` per `window` seconds? Records nothing: call `record` after it.

        Between the two calls others may come, so several callers at the limit are all let through. `hit` is one step
        and does not leak: prefer it.
        """
        return self._decide((identity, Limit(limit, window), operation, 1), "peek")

    def record(self, identity: str, window: float, *, operation: str = _DEFAULT, cost: int = 1) -> None:
        """Record `cost` entries, whatever the count is. They are kept for at least `window` seconds."""
        self._decide((identity, Limit(MAX_COST, window), operation, cost), "record")

    def get_count(self, identity: str, window: float, *, operation: str = _DEFAULT) -> int:
        """How many entries there are within the last `window` seconds, in the store that would decide now."""
        key = self._keys.rate_limit(operation, identity)
        window_us = Limit(1, window).window_us
        for store in self._windows:
            with contextlib.suppress(BackendUnavailable):
                return store.count(key, window_us)
        return 0

    def standing(self, identity: str, *, operation: str = _DEFAULT) -> Standing:
        """What stands in the identity's windows, in the store that would decide now. Writes nothing.

        Raises BackendUnavailable where there is none.
        """
        key = self._keys.rate_limit(operation, identity)
        for store in self._windows:
            with contextlib.suppress(BackendUnavailable):
                return store.standing(key)
        raise BackendUnavailable("Redis and PostgreSQL are away, and GOVREDIS_LIMIT_FALLBACK keeps no windows")

    def most_denied(self, n: int = 10) -> list[Denied]:
        """Whom `hit` has refused most often, over all processes, in this hour and in the one before.

        Args:
            n: how many, the most denied first.

        Counted in Redis, a second later, without a round trip of the denial's own; see denied.DeniedCounts for how far
        off a count may be. Raises BackendUnavailable, also where Redis is disabled; BackendError.
        """
        return self._denied_counts.most(n)

    def reset(self, identity: str, *, operation: str = _DEFAULT) -> None:
        """Forget every entry of the identity, in each store that can be reached.

        With GOVREDIS_LIMIT_MIRROR, what another process has yet to tell comes afterwards, to the store that did not
        decide it. Raises BackendUnavailable if one could not: the window there is as it was.
        """
        key = self._keys.rate_limit(operation, identity)
        if self._mirror is not None:
            self._mirror.forget(key)
        failed: BackendUnavailable | None = None
        try:
            for store in self._windows:
                try:
                    store.reset(key)
                except BackendUnavailable as error:
                    failed = error
        finally:
            self._forget(identity, operation)
        if failed is not None:
            raise failed

    def purge(self) -> int:
        """Delete the windows that have ended from PostgreSQL. Returns how many. The other stores forget by themselves.

        Raises BackendUnavailable, ConfigurationError.
        """
        return self._postgres_window.purge() if self._postgres_window is not None else 0

    def close(self) -> None:
        """Tell the servers what they are to hear yet: whom this process denied in the last second, and, with
        GOVREDIS_LIMIT_MIRROR, what each admitted. The limiter may be used again.
        """
        self._denied_counts.flush()
        if self._mirror is not None:
            self._mirror.close()

    # -- decorator -----------------------------------------------------------------------------------------------

    def rate_limited(
        self,
        rate: Rate | Callable[..., Rate],
        *,
        key: str | Callable[..., str],
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
            key: a template of the function's argument names, "{agent_id}", or a callable that gets its arguments.
            operation: what is limited.
            cost: as in `hit`, or a callable that gets the call's arguments and returns one.
            exempt: a callable that gets the call's arguments; a call for which it returns True is let through, unasked
                and uncounted.
            on_limit: "raise" raises RateLimitExceeded; "wait" sleeps up to `timeout` seconds, then raises it.
            timeout: seconds, for "wait".

        Raises ValueError at decoration for a bad argument; a call does for what a callable returned. What each call may
        raise or promises when Redis is away is as for `hit`.
        """
        if on_limit not in {"raise", "wait"}:
            raise refuse("on_limit", on_limit, '"raise" or "wait"')
        check_timeout(timeout)
        calls = LimitedCalls(rate, key, operation, cost, exempt)

        def admit(identity: Any, rate: Rate, cost: int) -> None:
            if on_limit == "wait":
                result = self.wait(identity, rate, timeout=timeout, operation=operation, cost=cost)
            else:
                result = self.hit(identity, rate, operation=operation, cost=cost)
            if not result.allowed:
                raise RateLimitExceeded(result)

        return lambda function: calls.limit(function, admit)

    # -- inside --------------------------------------------------------------------------------------------------

    def _decide(self, question: Question, mode: Mode) -> RateLimitResult:
        known = self._known(question, mode)
        return self._ask(question, mode, self._windows) if known is None else known

    def _known(self, question: Question, mode: Mode) -> RateLimitResult | None:
        """The denial that is remembered."""
        if self._denials is None or mode == "record":
            return None
        known = self._denials.find(question)
        if known is not None:
            if mode == "hit":
                self._counters.add_each("limits.denied", "limits.denied_cached")
                self._denied_counts.add(question[0], question[2])
            if known.degraded:
                self._counters.add(f"limits.degraded.{known.backend}")
        return known

    def _ask(self, question: Question, mode: Mode, stores: Sequence[Window]) -> RateLimitResult:
        """The answer of the first store that can be reached."""
        key, limits = self._check(question)
        sent = self._sent()
        for store in stores:
            try:
                outcome = store.decide(key, limits, question[3], mode)
            except BackendUnavailable:
                continue
            return self._result(outcome, store, limits, question, mode, sent)
        return self._result(self._no_store(limits), None, limits, question, mode, sent)

    def _check(self, question: Question) -> tuple[str, Sequence[Limit]]:
        """The key and the limits. Raises ValueError for what cannot be sent."""
        identity, rate, operation, cost = question
        limits = parse_rate(rate)
        key = self._keys.rate_limit(operation, identity)
        check_cost(cost, limits)
        return key, limits

    def _sent(self) -> Sent | None:
        return None if self._denials is None else self._denials.sent()

    def _no_store(self, limits: Sequence[Limit]) -> Outcome:
        if self._fallback == "allow":
            return Outcome(True, 0, limits[0].count, 0, 0)
        return Outcome(False, 0, 0, 1_000_000, 1_000_000)

    def _result(
        self,
        outcome: Outcome,
        store: Window | None,
        limits: Sequence[Limit],
        question: Question,
        mode: Mode,
        sent: Sent | None,
    ) -> RateLimitResult:
        admitted = outcome.admitted
        limit = limits[outcome.deciding]
        backend = "none" if store is None else store.backend
        degraded = backend != "redis"
        if mode == "hit":
            self._counters.add("limits.allowed" if admitted else "limits.denied")
            if not admitted:
                self._denied_counts.add(question[0], question[2])
        if degraded:
            self._counters.add(f"limits.degraded.{backend}")
        result = RateLimitResult(
            admitted,
            limit,
            outcome.remaining,
            outcome.retry_after_us / 1_000_000,
            outcome.reset_after_us / 1_000_000,
            None if admitted else limit,
            backend,
            degraded,
        )
        if admitted:
            if self._mirror is not None and mode != "peek" and not limit.counted:
                identity, _, operation, cost = question
                self._mirror.note(backend, self._keys.rate_limit(operation, identity), limits, cost)
            if mode == "hit" and store is not None:
                taken = store, question, outcome.entries
                result._taken = self._give_back, taken  # type: ignore[misc]  # mypy does not see the slot of the base
        elif sent is not None and backend in _SERVERS:
            assert self._denials is not None
            self._denials.remember(question, result, sent)
        return result

    def _give_back(self, store: Window, question: Question, entries: Any) -> bool:
        identity, _, operation, cost = question
        try:
            return store.refund(self._keys.rate_limit(operation, identity), entries, cost)
        finally:
            self._forget(identity, operation)

    def _forget(self, identity: str, operation: str) -> None:
        if self._denials is not None:
            self._denials.forget(identity, operation)
