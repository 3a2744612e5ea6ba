"""Any sequence of calls, clock steps and other clients' doings: each store answers as the oracle does."""

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

from govredis import Limit
from govredis._counters import Counters
from govredis.keys import Keys
from govredis.limits import RateLimiter, RateLimitResult
from govredis.limits.windows import Outcome

pytestmark = pytest.mark.once

START = 1_750_000_000_123_457
MS, SECOND = 1000, 1_000_000

windows = st.sampled_from([0.003, 0.005, 1.0, 2.0])
rates = st.lists(st.builds(Limit, st.integers(1, 4), windows), min_size=1, max_size=3)
#: Of windows, so that many entries age out at the very microsecond that is asked about.
steps = st.integers(0, 6).map(lambda ms: ms * MS) | st.sampled_from([1, 999, 1001, SECOND - MS, SECOND, 2 * SECOND])


class LimitsMachine(RuleBasedStateMachine):
    """One identity; its limit is another one at every call, so that all windows mix on its key."""

    store: Any
    hits: Bundle[Any] = Bundle("hits")

    def __init__(self) -> None:
        super().__init__()
        self.store.now = START
        self.limiter = RateLimiter(
            Keys(), None, None, fallback="deny", local_entries=1, counters=Counters(), deny_cache=False
        )
        self.limiter._windows.append(self.store.window)
        self.identity = uuid.uuid4().hex
        self.key = f"rate_limit:default:{self.identity}"
        self.oracle = Oracle(in_order=self.store.in_order, by_time=self.store.by_time)
        self.refunded: set[object] = set()
        self.strangers = itertools.count()

    # -- calls -------------------------------------------------------------------------------------------------------

    def decide(self, limits: list[Limit], cost: int, mode: Literal["hit", "peek"], owner: object) -> RateLimitResult:
        expected = self.oracle.decide(self.store.now, limits, cost, mode, owner)
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
        self.oracle.take(self.store.now, Limit(1, window).window_us, cost, object())
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
        expected = self.oracle.used(Limit(1, window).window_us, self.store.now)
        assert self.limiter.get_count(self.identity, window) == expected

    # -- clocks ------------------------------------------------------------------------------------------------------

    @rule(us=steps)
    def time_passes(self, us: int) -> None:
        self.store.now += us

    @precondition(lambda self: self.oracle.log)
    @rule(window=windows, just_before=st.booleans(), data=st.data())
    def an_entry_ages_out(self, window: float, just_before: bool, data: st.DataObject) -> None:
        """Now, or in a microsecond; and whoever asks sees that."""
        entry, _ = data.draw(st.sampled_from(list(self.oracle.log)), "entry")
        self.store.now = max(self.store.now, entry + Limit(1, window).window_us - just_before)
        self.get_count(window)
        for count in range(1, 5):
            self.decide([Limit(count, window)], 1, "peek", None)

    @precondition(lambda self: self.store.steps_back)
    @rule(us=steps)
    def the_clock_is_set_back(self, us: int) -> None:
        self.store.now -= us

    # -- other clients -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.store.foreign)
    @rule(ago=st.integers(-3, 2), whole=st.booleans(), ms=st.integers(0, 6))
    def a_stranger_records(self, ago: int, whole: bool, ms: int) -> None:
        """In whole seconds or not, in the past or in the future."""
        at = (self.store.now // SECOND - ago) * SECOND if whole else self.store.now - ago * ms * MS
        member = f"stranger-{next(self.strangers)}"
        self.oracle.log.append((at, member))
        self.store.command("ZADD", self.key, f"{at // SECOND}.{at % SECOND:06d}", member)

    @precondition(lambda self: self.store.foreign)
    @rule(seconds=st.integers(-1, 2))
    def a_stranger_prunes(self, seconds: int) -> None:
        whole = self.store.now // SECOND - seconds
        self.oracle.prune(whole * SECOND)
        self.store.command("ZREMRANGEBYSCORE", self.key, "0", str(whole))

    @precondition(lambda self: self.store.foreign)
    @rule()
    def a_stranger_counts(self) -> None:
        assert self.store.command("ZCARD", self.key) == len(self.oracle.log)

    # -- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def the_entries_are_those_of_the_oracle(self) -> None:
        assert sorted(self.store.entries(self.key)) == sorted(entry for entry, _ in self.oracle.log)


def test_every_store_answers_as_the_oracle_does(store: Any) -> None:
    machine = type("Machine", (LimitsMachine,), {"store": store})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
