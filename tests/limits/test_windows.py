"""The contract of a sliding window, the same tests over every store."""

from __future__ import annotations

from typing import Any

import pytest

from govredis.limits import Limit
from govredis.limits.windows import Outcome, Standing

pytestmark = pytest.mark.once

SECOND = 1_000_000
TWO = [Limit(2, 1)]


class TestWindow:
    def test_an_entry_counts_until_exactly_its_window_has_passed(self, store: Any) -> None:
        hit = lambda: store.window.decide("k", [Limit(1, 1)], 1, "hit")  # noqa: E731
        assert hit().admitted
        store.now += SECOND - 1
        assert hit() == Outcome(False, 0, 0, 1, 1)
        assert store.window.count("k", SECOND) == 1
        store.now += 1
        assert store.window.count("k", SECOND) == 0
        assert hit() == Outcome(True, 0, 0, 0, SECOND)

    def test_retry_after_is_the_first_moment_that_admits(self, store: Any) -> None:
        for step in (0, 100_003, 200_000):
            store.now += step
            store.window.decide("k", [Limit(3, 1)], 1, "hit")
        store.now += 7
        for cost in (3, 2, 1):
            refused = store.window.decide("k", [Limit(3, 1)], cost, "hit")
            assert not refused.admitted
            start = store.now
            store.now = start + refused.retry_after_us - 1
            assert not store.window.decide("k", [Limit(3, 1)], cost, "peek").admitted
            store.now += 1
            assert store.window.decide("k", [Limit(3, 1)], cost, "peek").admitted
            store.now = start

    def test_reset_after_is_when_the_deciding_limit_is_full_again(self, store: Any) -> None:
        store.window.decide("k", TWO, 1, "hit")
        store.now += 300_000
        assert store.window.decide("k", TWO, 1, "hit").reset_after_us == SECOND
        store.now += 200_000
        looked = store.window.decide("k", TWO, 1, "peek")
        assert looked.reset_after_us == 800_000
        store.now += looked.reset_after_us - 1
        assert store.window.decide("k", TWO, 1, "peek").remaining == 0
        store.now += 1
        assert store.window.decide("k", TWO, 1, "peek") == Outcome(True, 0, 1, 0, 0)

    def test_several_limits_are_all_or_none(self, store: Any) -> None:
        limits = [Limit(10, 60), Limit(2, 1)]
        assert store.window.decide("k", limits, 1, "hit") == Outcome(True, 1, 1, 0, SECOND)
        assert store.window.decide("k", limits, 1, "hit").admitted
        assert store.window.decide("k", limits, 1, "hit") == Outcome(False, 1, 0, SECOND, SECOND)
        assert store.window.count("k", 60 * SECOND) == 2

    def test_the_limit_violated_longest_decides_a_refusal(self, store: Any) -> None:
        limits = [Limit(1, 1), Limit(1, 60), Limit(1, 30)]
        store.window.decide("k", limits, 1, "hit")
        assert store.window.decide("k", limits, 1, "hit") == Outcome(False, 1, 0, 60 * SECOND, 60 * SECOND)

    def test_the_limit_with_the_least_left_decides_an_admission(self, store: Any) -> None:
        limits = [Limit(9, 1), Limit(3, 60), Limit(5, 30)]
        assert store.window.decide("k", limits, 1, "hit") == Outcome(True, 1, 2, 0, 60 * SECOND)

    def test_a_refusal_writes_nothing(self, store: Any) -> None:
        store.window.decide("k", TWO, 2, "hit")
        before = store.entries("k")
        for _ in range(3):
            store.now += 1
            assert not store.window.decide("k", [Limit(2, 99)], 1, "hit").admitted
        assert store.entries("k") == before
        store.now = before[0] + SECOND
        assert store.window.decide("k", TWO, 2, "hit").admitted, "the refused window of 99 s widened nothing"

    def test_peek_says_what_hit_would_and_writes_nothing(self, store: Any) -> None:
        assert store.window.decide("k", TWO, 2, "peek") == Outcome(True, 0, 0, 0, 0)
        assert store.entries("k") == []
        store.window.decide("k", TWO, 1, "hit")
        before = store.entries("k")
        assert store.window.decide("k", TWO, 2, "peek") == Outcome(False, 0, 1, SECOND, SECOND)
        assert store.entries("k") == before

    def test_a_cost_takes_as_many_entries(self, store: Any) -> None:
        assert store.window.decide("k", [Limit(5, 1)], 3, "hit").remaining == 2
        assert store.window.count("k", SECOND) == 3
        assert store.window.decide("k", [Limit(5, 1)], 3, "hit") == Outcome(False, 0, 2, SECOND, SECOND)
        assert store.window.decide("k", [Limit(5, 1)], 2, "hit").admitted

    def test_record_records_whatever_the_count_is(self, store: Any) -> None:
        for _ in range(3):
            assert store.window.decide("k", TWO, 1, "record").admitted
        assert store.window.count("k", SECOND) == 3
        assert store.window.decide("k", TWO, 1, "peek") == Outcome(False, 0, 0, SECOND, SECOND)

    def test_reset_forgets_everything(self, store: Any) -> None:
        store.window.decide("k", TWO, 2, "hit")
        store.window.decide("other", TWO, 1, "hit")
        store.window.reset("k")
        assert store.window.count("k", SECOND) == 0
        assert store.window.decide("k", TWO, 2, "hit").admitted
        assert store.window.count("other", SECOND) == 1

    def test_a_change_of_the_limit_holds_at_the_next_call(self, store: Any) -> None:
        store.window.decide("k", [Limit(5, 10)], 3, "hit")
        assert not store.window.decide("k", [Limit(3, 10)], 1, "hit").admitted
        assert store.window.decide("k", [Limit(4, 10)], 1, "hit").admitted
        store.now += SECOND
        assert store.window.decide("k", [Limit(4, 1)], 1, "hit").remaining == 3

    def test_a_narrow_window_does_not_prune_what_the_widest_needs(self, store: Any) -> None:
        store.window.decide("k", [Limit(5, 60)], 2, "hit")
        store.now += 30 * SECOND
        store.window.decide("k", [Limit(5, 1)], 1, "hit")
        assert store.window.decide("k", [Limit(3, 60)], 1, "peek").admitted is False

    def test_what_no_window_needs_is_pruned(self, store: Any) -> None:
        store.window.decide("k", [Limit(5, 2)], 3, "hit")
        store.now += 2 * SECOND
        store.window.decide("k", [Limit(5, 1)], 1, "hit")
        assert store.entries("k") == [store.now]

    def test_counts_only_the_window_asked_for(self, store: Any) -> None:
        store.window.decide("k", [Limit(9, 60)], 2, "hit")
        store.now += 5 * SECOND
        store.window.decide("k", [Limit(9, 60)], 1, "hit")
        assert [store.window.count("k", w * SECOND) for w in (1, 5, 6)] == [1, 1, 3]
        assert store.window.count("unknown", SECOND) == 0


class TestStanding:
    def test_says_what_stands_in_each_window(self, store: Any) -> None:
        window = store.window
        assert window.standing("k") == Standing(window.backend)
        assert not window.standing("k")
        window.decide("k", [Limit(9, 60), Limit(9, 1)], 2, "hit")
        store.now += 2 * SECOND
        window.decide("k", [Limit(9, 1)], 1, "hit")
        store.now += SECOND // 2
        window.decide("k", [Limit(9, w, "sliding_window_counter") for w in (60, 0.5)], 4, "hit")
        found = window.standing("k")
        assert (found.backend, found.entries, found.window) == (window.backend, 3, 60)
        assert found.oldest == pytest.approx(2.5, abs=1e-5)
        assert found.newest == pytest.approx(0.5, abs=1e-5)
        assert found.counters == {60: 4, 0.5: 4}
        store.now += 58 * SECOND
        found = window.standing("k")
        assert (found.entries, found.counters) == (1, {60: 4})
        assert found.oldest == found.newest == pytest.approx(58.5, abs=1e-5)
        store.now += 10 * SECOND
        found = window.standing("k")
        assert (found.entries, found.oldest, found.newest, found.counters) == (0, None, None, {})
        assert not found

    def test_of_a_log_that_only_others_write_all_counts(self, redis_store: Any) -> None:
        redis_store.server.command("ZADD", "k", redis_store.now // SECOND - 9, "theirs", redis_store.now // SECOND, "b")
        found = redis_store.window.standing("k")
        assert (found.entries, found.window) == (2, None)
        assert found.oldest == pytest.approx(9.123457, abs=1e-5)

    def test_what_is_booked_lies_ahead(self, redis_store: Any) -> None:
        redis_store.server.command("ZADD", "k", redis_store.now // SECOND + 5, "theirs")
        assert redis_store.window.standing("k").newest == pytest.approx(-4.876543, abs=1e-5)
