"""Any sequence of calls, clock steps and other clients' doings: each backend answers as the oracle does."""

from __future__ import annotations

import itertools
import uuid
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from limits_oracle import Oracle

from govredis import Config, Limit
from govredis._context import Context
from govredis.limits import RateLimiter, RateLimitResult
from govredis.limits.backends.backend import Outcome

pytestmark = pytest.mark.once

START = 1_750_000_000_123_457
MS, SECOND = 1000, 1_000_000

windows = st.sampled_from([0.003, 0.005, 1.0, 2.0])
rates = st.lists(st.builds(Limit, st.integers(1, 4), windows), min_size=1, max_size=3)
#: Sums of windows, so that many entries age out at the very microsecond that is asked about.
steps = st.integers(0, 6).map(lambda ms: ms * MS) | st.sampled_from([1, 999, 1001, SECOND - MS, SECOND, 2 * SECOND])


class LimitsMachine(RuleBasedStateMachine):
    """An identity whose limit is another at every call, so that all windows mix on its key."""

    clocked: Any
    hits: Bundle[Any] = Bundle("hits")

    def __init__(self) -> None:
        super().__init__()
        self.clocked.now = START
        config = Config(redis_enabled=False, limit_fallback="deny", limit_deny_cache=False)
        self.limiter = RateLimiter(Context.of(config))
        self.limiter._decider.backends.servers.append(self.clocked.backend)
        self.identity = uuid.uuid4().hex
        self.key = f"rate_limit:default:{self.identity}"
        self.oracle = Oracle(in_order=self.clocked.in_order, by_time=self.clocked.by_time)
        self.refunded: set[object] = set()
        self.strangers = itertools.count()

    # -- calls -------------------------------------------------------------------------------------------------------

    def decide(self, limits: list[Limit], cost: int, mode: Literal["hit", "peek"], owner: object) -> RateLimitResult:
        expected = self.oracle.decide(self.clocked.now, limits, cost, mode, owner)
        result: RateLimitResult = getattr(self.limiter, mode)(self.identity, limits, cost=cost)
        found = Outcome(
            result.allowed,
            expected.deciding,
            result.remaining,
            round(result.retry_after * SECOND),
            round(result.reset_after * SECOND),
        )
        limit = limits[expected.deciding]
        assert (found, result.limit, result.violated) == (expected, limit, None if expected.admitted else limit)
        return result

    def cost(self, data: st.DataObject, limits: list[Limit]) -> int:
        return data.draw(st.integers(1, min(limit.count for limit in limits)), "cost")

    @rule(target=hits, limits=rates, data=st.data())
    def hit(self, limits: list[Limit], data: st.DataObject) -> Any:
        cost, owner = self.cost(data, limits), object()
        result = self.decide(limits, cost, "hit", owner)
        return (result, self.oracle.log[-1][0], cost, owner) if result.allowed else multiple()

    @rule(limits=rates, data=st.data())
    def peek(self, limits: list[Limit], data: st.DataObject) -> None:
        self.decide(limits, self.cost(data, limits), "peek", None)

    @rule(window=windows, cost=st.integers(1, 7))
    def record(self, window: float, cost: int) -> None:
        self.oracle.take(self.clocked.now, Limit(1, window).window_us, cost, object())
        self.limiter.record(self.identity, window, cost=cost)

    @rule(hit=hits)
    def refund(self, hit: Any) -> None:
        result, at, cost, owner = hit
        expected = owner not in self.refunded and self.oracle.refund(at, cost, owner)
        self.refunded.add(owner)
        assert result.refund() == expected

    @rule()
    def reset(self) -> None:
        self.oracle.reset()
        self.limiter.reset(self.identity)

    @rule(window=windows)
    def get_count(self, window: float) -> None:
        expected = self.oracle.used(Limit(1, window).window_us, self.clocked.now)
        assert self.limiter.get_count(self.identity, window) == expected

    # -- clocks ------------------------------------------------------------------------------------------------------

    @rule(us=steps)
    def time_passes(self, us: int) -> None:
        self.clocked.now += us

    @precondition(lambda self: self.oracle.log)
    @rule(window=windows, just_before=st.booleans(), data=st.data())
    def an_entry_ages_out(self, window: float, just_before: bool, data: st.DataObject) -> None:
        """Now, or in a microsecond; and the next call sees that."""
        entry, _ = data.draw(st.sampled_from(list(self.oracle.log)), "entry")
        self.clocked.now = max(self.clocked.now, entry + Limit(1, window).window_us - just_before)
        self.get_count(window)
        for count in range(1, 5):
            self.decide([Limit(count, window)], 1, "peek", None)

    @precondition(lambda self: self.clocked.steps_back)
    @rule(us=steps)
    def the_clock_is_set_back(self, us: int) -> None:
        self.clocked.now -= us

    # -- other clients -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.clocked.foreign)
    @rule(ago=st.integers(-3, 2), whole=st.booleans(), ms=st.integers(0, 6))
    def a_stranger_records(self, ago: int, whole: bool, ms: int) -> None:
        """In whole seconds or not, in the past or in the future."""
        at = (self.clocked.now // SECOND - ago) * SECOND if whole else self.clocked.now - ago * ms * MS
        member = f"stranger-{next(self.strangers)}"
        self.oracle.take_from(member, at)
        self.clocked.command("ZADD", self.key, f"{at // SECOND}.{at % SECOND:06d}", member)

    @precondition(lambda self: self.clocked.foreign)
    @rule(seconds=st.integers(-1, 2))
    def a_stranger_prunes(self, seconds: int) -> None:
        whole = self.clocked.now // SECOND - seconds
        self.oracle.prune(whole * SECOND)
        self.clocked.command("ZREMRANGEBYSCORE", self.key, "0", str(whole))

    @precondition(lambda self: self.clocked.foreign)
    @rule()
    def a_stranger_counts(self) -> None:
        assert self.clocked.command("ZCARD", self.key) == len(self.oracle.log)

    # -- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def the_entries_are_those_of_the_oracle(self) -> None:
        assert sorted(self.clocked.entries(self.key)) == sorted(entry for entry, _ in self.oracle.log)


def test_every_backend_answers_as_the_oracle_does(clocked: Any) -> None:
    machine = type("Machine", (LimitsMachine,), {"clocked": clocked})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50,
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )
