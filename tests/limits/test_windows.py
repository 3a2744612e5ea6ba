"""The contract of a sliding window, the same tests over every backend."""

from __future__ import annotations

from typing import Any

import pytest

from govredis.limits import Limit
from govredis.limits.backends.backend import Outcome, WindowStats
from govredis.limits.rates import MAX_COST

pytestmark = pytest.mark.once

SECOND = 1_000_000
TWO = [Limit(2, 1)]


class TestWindow:
    def test_an_entry_counts_until_exactly_its_window_has_passed(self, clocked: Any) -> None:
        hit = lambda: clocked.backend.decide("k", [Limit(1, 1)], 1, "hit")  # noqa: E731
        assert hit().admitted
        clocked.now += SECOND - 1
        assert hit() == Outcome(False, 0, 0, 1, 1)
        assert clocked.backend.count("k", SECOND) == 1
        clocked.now += 1
        assert clocked.backend.count("k", SECOND) == 0
        assert hit() == Outcome(True, 0, 0, 0, SECOND)

    def test_retry_after_is_the_first_moment_that_admits(self, clocked: Any) -> None:
        for step in (0, 100_003, 200_000):
            clocked.now += step
            clocked.backend.decide("k", [Limit(3, 1)], 1, "hit")
        clocked.now += 7
        for cost in (3, 2, 1):
            refused = clocked.backend.decide("k", [Limit(3, 1)], cost, "hit")
            assert not refused.admitted
            start = clocked.now
            clocked.now = start + refused.retry_after_us - 1
            assert not clocked.backend.decide("k", [Limit(3, 1)], cost, "peek").admitted
            clocked.now += 1
            assert clocked.backend.decide("k", [Limit(3, 1)], cost, "peek").admitted
            clocked.now = start

    def test_reset_after_is_when_the_deciding_limit_is_full_again(self, clocked: Any) -> None:
        clocked.backend.decide("k", TWO, 1, "hit")
        clocked.now += 300_000
        assert clocked.backend.decide("k", TWO, 1, "hit").reset_after_us == SECOND
        clocked.now += 200_000
        looked = clocked.backend.decide("k", TWO, 1, "peek")
        assert looked.reset_after_us == 800_000
        clocked.now += looked.reset_after_us - 1
        assert clocked.backend.decide("k", TWO, 1, "peek").remaining == 0
        clocked.now += 1
        assert clocked.backend.decide("k", TWO, 1, "peek") == Outcome(True, 0, 1, 0, 0)

    def test_several_limits_are_all_or_none(self, clocked: Any) -> None:
        limits = [Limit(10, 60), Limit(2, 1)]
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(True, 1, 1, 0, SECOND)
        assert clocked.backend.decide("k", limits, 1, "hit").admitted
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(False, 1, 0, SECOND, SECOND)
        assert clocked.backend.count("k", 60 * SECOND) == 2

    def test_the_limit_violated_longest_decides_a_refusal(self, clocked: Any) -> None:
        limits = [Limit(1, 1), Limit(1, 60), Limit(1, 30)]
        clocked.backend.decide("k", limits, 1, "hit")
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(False, 1, 0, 60 * SECOND, 60 * SECOND)

    def test_the_limit_with_the_least_left_decides_an_admission(self, clocked: Any) -> None:
        limits = [Limit(9, 1), Limit(3, 60), Limit(5, 30)]
        assert clocked.backend.decide("k", limits, 1, "hit") == Outcome(True, 1, 2, 0, 60 * SECOND)

    def test_a_refusal_writes_nothing(self, clocked: Any) -> None:
        clocked.backend.decide("k", TWO, 2, "hit")
        before = clocked.entries("k")
        for _ in range(3):
            clocked.now += 1
            assert not clocked.backend.decide("k", [Limit(2, 99)], 1, "hit").admitted
        assert clocked.entries("k") == before
        clocked.now = before[0] + SECOND
        assert clocked.backend.decide("k", TWO, 2, "hit").admitted, "the refused window of 99 s widened nothing"

    def test_peek_says_what_hit_would_and_writes_nothing(self, clocked: Any) -> None:
        assert clocked.backend.decide("k", TWO, 2, "peek") == Outcome(True, 0, 0, 0, 0)
        assert clocked.entries("k") == []
        clocked.backend.decide("k", TWO, 1, "hit")
        before = clocked.entries("k")
        assert clocked.backend.decide("k", TWO, 2, "peek") == Outcome(False, 0, 1, SECOND, SECOND)
        assert clocked.entries("k") == before

    @pytest.mark.parametrize("cost", [999, 1000, 1001, 2000, MAX_COST])
    def test_a_large_cost_is_written_and_given_back_whole(self, clocked: Any, cost: int) -> None:
        limits = [Limit(2 * MAX_COST, 1)]
        other = clocked.backend.decide("k", limits, 1, "hit")
        outcome = clocked.backend.decide("k", limits, cost, "hit")
        assert (outcome.admitted, outcome.remaining) == (True, 2 * MAX_COST - cost - 1)
        assert len(clocked.entries("k")) == cost + 1
        assert clocked.backend.refund("k", outcome.entries, cost)
        assert clocked.backend.count("k", SECOND) == 1
        assert clocked.backend.refund("k", other.entries, 1)

    def test_a_cost_takes_as_many_entries(self, clocked: Any) -> None:
        assert clocked.backend.decide("k", [Limit(5, 1)], 3, "hit").remaining == 2
        assert clocked.backend.count("k", SECOND) == 3
        assert clocked.backend.decide("k", [Limit(5, 1)], 3, "hit") == Outcome(False, 0, 2, SECOND, SECOND)
        assert clocked.backend.decide("k", [Limit(5, 1)], 2, "hit").admitted

    def test_record_records_whatever_the_count_is(self, clocked: Any) -> None:
        for _ in range(3):
            assert clocked.backend.decide("k", TWO, 1, "record").admitted
        assert clocked.backend.count("k", SECOND) == 3
        assert clocked.backend.decide("k", TWO, 1, "peek") == Outcome(False, 0, 0, SECOND, SECOND)

    def test_reset_forgets_everything(self, clocked: Any) -> None:
        clocked.backend.decide("k", TWO, 2, "hit")
        clocked.backend.decide("other", TWO, 1, "hit")
        clocked.backend.reset("k")
        assert clocked.backend.count("k", SECOND) == 0
        assert clocked.backend.decide("k", TWO, 2, "hit").admitted
        assert clocked.backend.count("other", SECOND) == 1

    def test_a_change_of_the_limit_holds_at_the_next_call(self, clocked: Any) -> None:
        clocked.backend.decide("k", [Limit(5, 10)], 3, "hit")
        assert not clocked.backend.decide("k", [Limit(3, 10)], 1, "hit").admitted
        assert clocked.backend.decide("k", [Limit(4, 10)], 1, "hit").admitted
        clocked.now += SECOND
        assert clocked.backend.decide("k", [Limit(4, 1)], 1, "hit").remaining == 3

    def test_a_narrow_window_does_not_prune_what_the_widest_needs(self, clocked: Any) -> None:
        clocked.backend.decide("k", [Limit(5, 60)], 2, "hit")
        clocked.now += 30 * SECOND
        clocked.backend.decide("k", [Limit(5, 1)], 1, "hit")
        assert clocked.backend.decide("k", [Limit(3, 60)], 1, "peek").admitted is False

    def test_entries_that_no_window_needs_are_pruned(self, clocked: Any) -> None:
        clocked.backend.decide("k", [Limit(5, 2)], 3, "hit")
        clocked.now += 2 * SECOND
        clocked.backend.decide("k", [Limit(5, 1)], 1, "hit")
        assert clocked.entries("k") == [clocked.now]

    def test_counts_only_the_window_asked_for(self, clocked: Any) -> None:
        clocked.backend.decide("k", [Limit(9, 60)], 2, "hit")
        clocked.now += 5 * SECOND
        clocked.backend.decide("k", [Limit(9, 60)], 1, "hit")
        assert [clocked.backend.count("k", w * SECOND) for w in (1, 5, 6)] == [1, 1, 3]
        assert clocked.backend.count("unknown", SECOND) == 0


class TestWindowStats:
    def test_stats_say_what_each_window_holds(self, clocked: Any) -> None:
        backend = clocked.backend
        assert backend.stats("k") == WindowStats(backend.name)
        assert not backend.stats("k")
        backend.decide("k", [Limit(9, 60), Limit(9, 1)], 2, "hit")
        clocked.now += 2 * SECOND
        backend.decide("k", [Limit(9, 1)], 1, "hit")
        clocked.now += SECOND // 2
        backend.decide("k", [Limit(9, w, "sliding_window_counter") for w in (60, 0.5)], 4, "hit")
        found = backend.stats("k")
        assert (found.backend, found.entries, found.window) == (backend.name, 3, 60)
        assert found.oldest == pytest.approx(2.5, abs=1e-5)
        assert found.newest == pytest.approx(0.5, abs=1e-5)
        assert found.counters == {60: 4, 0.5: 4}
        clocked.now += 58 * SECOND
        found = backend.stats("k")
        assert (found.entries, found.counters) == (1, {60: 4})
        assert found.oldest == found.newest == pytest.approx(58.5, abs=1e-5)
        clocked.now += 10 * SECOND
        found = backend.stats("k")
        assert (found.entries, found.oldest, found.newest, found.counters) == (0, None, None, {})
        assert not found

    def test_all_of_a_log_that_only_others_write_counts(self, clocked_redis: Any) -> None:
        clocked_redis.server.command(
            "ZADD", "k", clocked_redis.now // SECOND - 9, "theirs", clocked_redis.now // SECOND, "b"
        )
        found = clocked_redis.backend.stats("k")
        assert (found.entries, found.window) == (2, None)
        assert found.oldest == pytest.approx(9.123457, abs=1e-5)

    def test_a_reservation_lies_ahead(self, clocked_redis: Any) -> None:
        clocked_redis.server.command("ZADD", "k", clocked_redis.now // SECOND + 5, "theirs")
        assert clocked_redis.backend.stats("k").newest == pytest.approx(-4.876543, abs=1e-5)
