"""The contract of sliding window counters, over every backend: never looser than a log, a bucket stricter at most."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from govredis.limits import Limit, RateLimiter
from govredis.limits.backends.backend import Mode, Outcome
from govredis.limits.rates import BUCKETS

pytestmark = pytest.mark.once

SECOND = 1_000_000


def counted(count: int, window: float) -> Limit:
    return Limit(count, window, algorithm="sliding_window_counter")


def end(at: int, window_us: int) -> int:
    """From when on a counter of this window counts what was counted at `at` no more."""
    width = -(-window_us // BUCKETS)
    return (at // width + 1) * width - 1 + window_us


class Entries:
    """The oracle: every entry by itself, counted until its bucket has left the window."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int]] = []

    def used(self, window_us: int, at: int) -> int:
        return sum(cost for entry, cost in self.entries if end(entry, window_us) > at)

    def logged(self, window_us: int, at: int) -> int:
        """An exact log of these entries."""
        return sum(cost for entry, cost in self.entries if at - window_us < entry <= at)

    def decide(self, now: int, limits: list[Limit], cost: int, mode: Mode) -> Outcome:
        waits = []
        for limit in limits:
            ends = sorted(end(entry, limit.window_us) for entry, _ in self.entries)
            moments = [now, *(moment for moment in ends if moment > now)]
            waits.append(next(m for m in moments if self.used(limit.window_us, m) + cost <= limit.count) - now)
        left = [limit.count - self.used(limit.window_us, now) for limit in limits]
        if max(waits) == 0 or mode == "record":
            admitted, retry_after = True, 0
            deciding = min(range(len(limits)), key=lambda i: left[i])
            remaining = max(0, left[deciding] - cost)
        else:
            admitted, retry_after = False, max(waits)
            deciding = waits.index(retry_after)
            remaining = max(0, left[deciding])
        if admitted and mode != "peek":
            self.entries.append((now, cost))
        window_us = limits[deciding].window_us
        return Outcome(
            admitted, deciding, remaining, retry_after, max([0, *(end(e, window_us) - now for e, _ in self.entries)])
        )


class TestCounter:
    def test_an_entry_counts_until_its_bucket_has_left_the_window(self, clocked: Any) -> None:
        hit = lambda: clocked.backend.decide("k", [counted(1, 60)], 1, "hit")  # noqa: E731
        into = clocked.now % SECOND
        left = 61 * SECOND - 1 - into
        assert hit() == Outcome(True, 0, 0, 0, left)
        assert hit() == Outcome(False, 0, 0, left, left)
        clocked.now += left - 1
        assert hit() == Outcome(False, 0, 0, 1, 1)
        assert clocked.backend.count("k", 60 * SECOND) == 1
        clocked.now += 1
        assert clocked.backend.count("k", 60 * SECOND) == 0
        assert hit().admitted

    def test_a_limit_too_large_for_a_log(self, clocked: Any) -> None:
        limits = [counted(10**12, 86400)]
        assert clocked.backend.decide("k", limits, 10**12 - 5, "hit").remaining == 5
        assert clocked.backend.decide("k", limits, 5, "hit").remaining == 0
        refused = clocked.backend.decide("k", limits, 1, "hit")
        assert not refused.admitted
        assert 86400 * SECOND <= refused.retry_after_us <= (86400 + 1440) * SECOND
        assert clocked.backend.count("k", 86400 * SECOND) == 10**12

    def test_several_limits_are_all_or_none(self, clocked: Any) -> None:
        limits = [counted(3, 60), counted(2, 1), counted(9, 60)]
        assert [clocked.backend.decide("k", limits, 1, "hit").admitted for _ in range(3)] == [True, True, False]
        assert clocked.backend.count("k", 60 * SECOND) == 2
        clocked.now += 2 * SECOND
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(
            True, 0, 0, 0, clocked.backend.decide("k", limits, 1, "peek").reset_after_us
        )

    def test_the_same_window_twice_counts_once(self, clocked: Any) -> None:
        assert clocked.backend.decide("k", [counted(5, 60), counted(3, 60)], 2, "hit").remaining == 1
        assert clocked.backend.count("k", 60 * SECOND) == 2

    def test_a_refusal_and_a_peek_write_nothing(self, clocked: Any) -> None:
        clocked.backend.decide("k", [counted(2, 60)], 2, "hit")
        for mode in ("hit", "peek"):
            assert not clocked.backend.decide("k", [counted(9, 60), counted(2, 60)], 1, mode).admitted
        assert clocked.backend.decide("k", [counted(9, 30)], 1, "peek").remaining == 8
        assert clocked.backend.count("k", 60 * SECOND) == 2
        assert clocked.backend.count("k", 30 * SECOND) == 0

    def test_log_and_counter_of_an_identity_know_nothing_of_each_other(self, clocked: Any) -> None:
        assert clocked.backend.decide("k", [counted(1, 60)], 1, "hit").admitted
        assert clocked.backend.decide("k", [Limit(2, 60)], 2, "hit").admitted
        assert clocked.backend.count("k", 60 * SECOND) == 2, "the larger"
        clocked.backend.decide("k", [counted(9, 60)], 4, "hit")
        assert clocked.backend.count("k", 60 * SECOND) == 5

    def test_reset_forgets_both(self, clocked: Any) -> None:
        clocked.backend.decide("k", [counted(1, 60)], 1, "hit")
        clocked.backend.decide("k", [Limit(1, 60)], 1, "hit")
        clocked.backend.reset("k")
        assert clocked.backend.count("k", 60 * SECOND) == 0
        assert clocked.backend.decide("k", [counted(1, 60)], 1, "hit").admitted

    def test_a_clock_set_back_is_stricter(self, clocked: Any) -> None:
        limits = [counted(3, 60)]
        until = clocked.now + clocked.backend.decide("k", limits, 2, "hit").reset_after_us
        clocked.now -= 600 * SECOND
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(True, 0, 0, 0, until - clocked.now)
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(
            False, 0, 0, until - clocked.now, until - clocked.now
        )

    def test_a_refund_gives_back_what_its_hit_took_to_every_window(self, clocked: Any) -> None:
        limits = [counted(9, 60), counted(8, 600)]
        outcomes = []
        for cost in (1, 3, 2):
            outcomes.append(clocked.backend.decide("k", limits, cost, "hit"))
            clocked.now += 10 * SECOND
        assert clocked.backend.refund("k", outcomes[1].entries, 3)
        assert [clocked.backend.count("k", w * SECOND) for w in (60, 600)] == [3, 3]
        clocked.now += 50 * SECOND
        assert clocked.backend.count("k", 60 * SECOND) == 2, "the first has aged out, the third is there"

    def test_entries_that_are_gone_are_not_given_back(self, clocked: Any) -> None:
        limits = [counted(5, 6)]
        first = clocked.backend.decide("k", limits, 3, "hit")
        clocked.now += 7 * SECOND
        clocked.backend.decide("k", limits, 1, "hit")
        assert not clocked.backend.refund("k", first.entries, 3)
        second = clocked.backend.decide("k", limits, 3, "hit")
        clocked.backend.reset("k")
        clocked.backend.decide("k", limits, 1, "hit")
        assert not clocked.backend.refund("k", second.entries, 3)
        assert clocked.backend.count("k", 6 * SECOND) == 1
        assert not clocked.backend.refund("unknown", second.entries, 3)

    def test_an_emptied_counter_is_full_again(self, clocked: Any) -> None:
        outcome = clocked.backend.decide("k", [counted(2, 60)], 2, "hit")
        assert clocked.backend.refund("k", outcome.entries, 2)
        assert clocked.backend.decide("k", [counted(2, 60)], 1, "peek") == Outcome(True, 0, 1, 0, 0)

    @settings(max_examples=40)
    @given(data=st.data())
    def test_decides_as_counting_every_entry_does(self, clocked: Any, data: st.DataObject) -> None:
        oracle, key = Entries(), uuid.uuid4().hex
        for _ in range(data.draw(st.integers(1, 12), "steps")):
            clocked.now += data.draw(
                st.integers(0, 40)  # within a bucket of the narrowest
                | st.integers(0, 6000)
                | st.sampled_from([999, 1000, 1016, 1017, 5000, 5083, SECOND, SECOND + 16_666, 2 * SECOND]),
                "microseconds",
            )
            mode: Mode = data.draw(st.sampled_from(["hit", "hit", "hit", "peek", "record"]), "mode")
            pairs = data.draw(
                st.lists(
                    st.tuples(st.integers(1, 6), st.sampled_from([0.001, 0.005, 0.06, 1.0])), min_size=1, max_size=3
                ),
                "limits",
            )
            # A counter counts what it was there for, so all are named at each call.
            limits = [counted(*pair) for pair in pairs] + [counted(10**9, w) for w in (0.001, 0.005, 0.06, 1.0)]
            cost = data.draw(st.integers(1, min(limit.count for limit in limits)), "cost")
            assert clocked.backend.decide(key, limits, cost, mode) == oracle.decide(clocked.now, limits, cost, mode)
            for window_us in (1000, 5000, 60_000, SECOND):
                assert clocked.backend.count(key, window_us) == oracle.used(window_us, clocked.now)

    @settings(max_examples=40)
    @given(
        gaps=st.lists(
            st.integers(0, 2) | st.integers(15, 18) | st.integers(980, 1020) | st.integers(0, 1020),
            min_size=2,
            max_size=30,
        ),
        count=st.integers(1, 5),
        window_us=st.sampled_from([1000, 1001, 1020, 1059]),
    )
    def test_is_never_looser_than_a_log_and_at_most_a_bucket_stricter(
        self, clocked: Any, gaps: list[int], count: int, window_us: int
    ) -> None:
        """Whatever the times of arrival: at most N in any window; refused only if a bucket more of a log is full."""
        limit, admitted, key = counted(count, window_us / SECOND), Entries(), uuid.uuid4().hex
        width = -(-window_us // BUCKETS)
        for gap in gaps:
            clocked.now += gap
            full = admitted.logged(window_us, clocked.now) >= count
            full_of_a_bucket_more = admitted.logged(window_us + width - 1, clocked.now) >= count
            found = clocked.backend.decide(key, [limit], 1, "hit")
            if found.admitted:
                assert not full
                admitted.entries.append((clocked.now, 1))
            else:
                assert full_of_a_bucket_more
                assert found.retry_after_us <= window_us + width - 1


class TestLimiter:
    """The same calls."""

    RATE = counted(5, 3600)

    def test_hit_peek_count_and_refund(self, limits: RateLimiter) -> None:
        result = limits.hit("a", self.RATE, operation="kg_store", cost=3)
        assert (result.allowed, result.limit, result.remaining, result.retry_after) == (True, self.RATE, 2, 0)
        assert 3600 <= result.reset_after <= 3660
        assert limits.peek("a", self.RATE, operation="kg_store").remaining == 1
        refused = limits.hit("a", self.RATE, operation="kg_store", cost=3)
        assert (refused.allowed, refused.violated, refused.remaining) == (False, self.RATE, 2)
        assert 3600 - 60 < refused.retry_after <= 3660
        assert limits.get_count("a", 3600, operation="kg_store") == 3
        assert limits.get_count("a", 1800, operation="kg_store") == 0, "of just that window"
        assert result.refund() is True
        assert result.refund() is False
        assert refused.refund() is False
        assert limits.get_count("a", 3600, operation="kg_store") == 0

    def test_hit_many_may_mix_them(self, limits: RateLimiter) -> None:
        found = limits.hit_many([("a", self.RATE), ("a", "5/hour"), ("b", [self.RATE, counted(1, 1)])], cost=1)
        assert [result.remaining for result in found] == [4, 4, 0]
        assert all(result.refund() for result in found)
        assert limits.get_count("a", 3600) == 0

    def test_a_cost_may_be_as_large_as_the_limit(self, limits: RateLimiter) -> None:
        assert limits.hit("bytes", counted(10**12, 86400), cost=10**12 - 1).remaining == 1
        with pytest.raises(
            ValueError, match="cost is 1000000000001; it must be a whole number from 1 to 1000000000000"
        ):
            limits.hit("bytes", counted(10**12, 86400), cost=10**12 + 1)
        with pytest.raises(ValueError, match="cost is 6; it must be at most 5"):
            limits.hit("bytes", [counted(9, 60), self.RATE], cost=6)

    def test_algorithms_are_not_mixed_in_a_rate(self, limits: RateLimiter) -> None:
        with pytest.raises(ValueError, match="it must be limits of one algorithm"):
            limits.hit("a", [self.RATE, Limit(1, 1)])
