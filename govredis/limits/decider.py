"""Decider: has the first backend in reach decide, and keeps account of each decision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .._context import Context
from .._fork import notice_fork
from .._pool import PoolExhausted
from ..errors import BackendError, BackendUnavailable
from ..keys import Id, Keys, id_text
from .backends.backend import LimitBackend, Mode, Outcome
from .backends.chain import LimitBackendChain, NoLimitBackend
from .denied_counts import DeniedCounts
from .deny_cache import DenyCache, Sent
from .hit_request import HitRequest
from .leases import MOST_COST, Batch, Leases
from .rates import Limit, Rate, RateLimits, check_cost, parse_rate
from .replication import Replication
from .result import RateLimitResult

#: How many requests a Decider knows to be right, with their keys.
_CHECKED = 1024

#: Decides where a server refuses one hit of many.
_NONE = NoLimitBackend(allow=False)


class Decider:
    """Makes every decision in the same way, whatever method asks for it.

    It answers from memory where that is exact, else the first backend in reach decides. Each decision is counted, a
    denial is remembered, and an admission is replicated.

    Attributes:
        backends: in their order.
        denied_counts: how often each identity was denied.
        replication: None where GOVREDIS_LIMIT_MIRROR is not set, or where one of the two servers is not configured.
    """

    def __init__(self, context: Context, clock: Callable[[], float]) -> None:
        config = context.config
        self._keys = context.keys
        self._counters = context.counters
        self._teller = context.teller
        self._clock = clock
        self.backends: LimitBackendChain = LimitBackendChain(context, clock)
        self.denied_counts: DeniedCounts = DeniedCounts(context)
        self.replication: Replication | None = Replication.of(context, self.backends.redis, self.backends.postgres)
        self._denials = DenyCache(config.local_entries, clock) if config.limit_deny_cache else None
        self._leases = Leases(context.counters, config.local_entries, clock, self._forget)
        # By type too: a cost of True is refused, and 1 is not.
        self._check = functools.partial(_check, context.keys)
        self._check_once = functools.lru_cache(_CHECKED, typed=True)(self._check)

    def decide(self, identity: Id, rate: Rate, operation: str, cost: int, mode: Mode) -> RateLimitResult:
        """Raises ValueError, BackendError."""
        notice_fork()
        request = identity if type(identity) is str else id_text(identity), rate, operation, cost
        if mode == "hit" and type(rate) is not str and (batch := self._leases.spend(request)) is not None:
            return self._admitted(batch, request)
        sent = None
        if self._denials is not None:
            if mode != "record" and (denial := self._denials.find(request)) is not None:
                return self._repeated(denial, request, mode)
            sent = self._denials.sent()
        key, limits = self.check(request)

        def ask(backend: LimitBackend) -> RateLimitResult:
            if limits.lease_us and backend.leases and mode == "hit" and cost <= MOST_COST:
                outcome = self._leases.take(request, key, limits, backend)
            else:
                outcome = backend.decide(key, limits, cost, mode)
            return self._result(outcome, backend, limits, request, mode, sent)

        return self.backends.first_reachable(ask)

    def hit_many(self, requests: Sequence[HitRequest]) -> list[RateLimitResult]:
        """`decide` in mode "hit" for each, in order. Raises ValueError before anything is sent; BackendError."""
        checked = [self.check(request) for request in requests]
        results: list[RateLimitResult | None] = [None] * len(requests)
        for n, request in enumerate(requests):
            if checked[n][1].lease_us and (batch := self._leases.spend(request)) is not None:
                results[n] = self._admitted(batch, request)
        sent = None
        if self._denials is not None:
            for n, request in enumerate(requests):
                if results[n] is None and (denial := self._denials.find(request)) is not None:
                    results[n] = self._repeated(denial, request, "hit")
            sent = self._denials.sent()

        def ask(backend: LimitBackend) -> None:
            unknown = [n for n, result in enumerate(results) if result is None]
            away: list[BackendUnavailable] = []
            for n, outcome in zip(
                unknown, backend.hit_many([(*checked[n], requests[n][3]) for n in unknown]), strict=True
            ):
                if isinstance(outcome, BackendUnavailable):
                    away.append(outcome)  # a part of the backend is: the next one decides this hit
                elif isinstance(outcome, BackendError):
                    results[n] = self._refused(*checked[n], requests[n])
                else:
                    results[n] = self._result(outcome, backend, checked[n][1], requests[n], "hit", sent)
            if away:
                raise next((error for error in away if isinstance(error, PoolExhausted)), away[0])

        if None in results:
            self.backends.first_reachable(ask)
        return [result for result in results if result is not None]

    def hit_or_reserve(
        self, request: HitRequest, reservation: str, *, patience: float, admit: bool
    ) -> tuple[RateLimitResult, bool]:
        """See RateLimiter.hit_or_reserve."""
        key, limits = self.check(request)
        sent = None if self._denials is None else self._denials.sent()

        def ask(backend: LimitBackend) -> tuple[RateLimitResult, bool]:
            outcome, at = backend.reserve(
                key, limits, request[3], reservation, patience_us=int(patience * 1_000_000), admit=admit
            )
            reserved = at > 0
            # A reservation is neither counted nor replicated before it is called for; and the same denial does not
            # come again for somebody who asks without one.
            mode: Mode = "hit" if admit else "peek"
            return self._result(outcome, backend, limits, request, mode, None if reserved else sent), reserved

        return self.backends.first_reachable(ask)

    def check(self, request: HitRequest) -> tuple[str, RateLimits]:
        """The key and the limits. Raises ValueError for arguments that cannot be sent."""
        if type(request[2]) is not str:  # a subclass may say that it equals another operation
            return self._check(*request)
        try:
            return self._check_once(*request)
        except TypeError:  # a list of Limit, say: it has no hash, and may change
            return self._check(*request)

    def reset(self, identity: str, operation: str) -> None:
        """See RateLimiter.reset."""
        key = self._keys.rate_limit(operation, identity)
        self._leases.forget(identity, operation)
        if self.replication is not None:
            self.replication.forget(key)
        try:
            self.backends.reset(key)
        finally:
            self._leases.forget(identity, operation)  # and those that were taken before the key was gone
            self._forget(identity, operation)

    def close(self) -> None:
        """See RateLimiter.close."""
        self._teller.close()
        self._leases.close()
        if self.replication is not None:
            self.replication.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _repeated(self, denial: RateLimitResult, request: HitRequest, mode: Mode) -> RateLimitResult:
        """The denial that was remembered, counted once more."""
        if mode == "hit":
            self._counters.add_each("limits.denied", "limits.denied_cached")
            self.denied_counts.add(request[0], request[2])
        if denial.degraded:
            self._counters.add(f"limits.degraded.{denial.backend}")
        return denial

    def _admitted(self, batch: Batch, request: HitRequest) -> RateLimitResult:
        """The result of a hit that a batch admits."""
        self._counters.add_each("limits.allowed", "limits.leased")
        limit, name = batch.limit, batch.backend.name
        left = batch.full_at - self._clock()
        result = RateLimitResult(True, limit, batch.remaining, 0.0, left, None, name, False)
        if self.replication is not None and not limit.counted:
            self.replication.note(name, *self.check(request), request[3])
        if batch.units is not None:
            result._taken = self.refund, (batch.backend, request, batch.units.part())  # type: ignore[misc]
        return result

    def _refused(self, key: str, limits: Sequence[Limit], request: HitRequest) -> RateLimitResult:
        """The result of a hit whose key holds something else."""
        self._counters.add("limits.errors")
        return self._result(_NONE.decide(key, limits, request[3], "hit"), _NONE, limits, request, "hit", None)

    def _result(
        self,
        outcome: Outcome,
        backend: LimitBackend,
        limits: Sequence[Limit],
        request: HitRequest,
        mode: Mode,
        sent: Sent | None,
    ) -> RateLimitResult:
        admitted = outcome.admitted
        limit = limits[outcome.deciding]
        degraded = backend.name != "redis"
        if mode == "hit":
            self._counters.add("limits.allowed" if admitted else "limits.denied")
            if not admitted:
                self.denied_counts.add(request[0], request[2])
        if degraded:
            self._counters.add(f"limits.degraded.{backend.name}")
        result = RateLimitResult(
            admitted,
            limit,
            outcome.remaining,
            outcome.retry_after_us / 1_000_000,
            outcome.reset_after_us / 1_000_000,
            None if admitted else limit,
            backend.name,
            degraded,
        )
        if admitted:
            if self.replication is not None and mode != "peek" and not limit.counted:
                identity, _, operation, cost = request
                self.replication.note(backend.name, self._keys.rate_limit(operation, identity), limits, cost)
            if mode == "hit" and outcome.entries is not None:
                taken = backend, request, outcome.entries
                result._taken = self.refund, taken  # type: ignore[misc]  # mypy does not see the slot of the base
        elif sent is not None and backend.on_server:  # this process decides as cheaply as it remembers
            assert self._denials is not None
            self._denials.remember(request, result, sent)
        return result

    def refund(self, backend: LimitBackend, request: HitRequest, entries: Any) -> bool:
        """See RateLimitResult.refund."""
        notice_fork()
        identity, _, operation, cost = request
        try:
            return backend.refund(self._keys.rate_limit(operation, identity), entries, cost)
        finally:
            self._forget(identity, operation)

    def _forget(self, identity: str, operation: str) -> None:
        if self._denials is not None:
            self._denials.forget(identity, operation)


def _check(keys: Keys, identity: str, rate: Rate, operation: str, cost: int) -> tuple[str, RateLimits]:
    limits = parse_rate(rate)
    key = keys.rate_limit(operation, identity)
    check_cost(cost, limits)
    return key, limits
