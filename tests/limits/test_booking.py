"""What is booked: exact, in order, and never more than the limit, whenever it is called for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from govredis import GovRedis, Limit
from govredis.keys import sibling
from govredis.limits.booking import hit_or_book

pytestmark = pytest.mark.once

#: A window in Redis, by the clock that it reads; see conftest.py.
RedisStore: TypeAlias = Any

KEY = "rate_limit:x:a"
SECOND = 1_000_000
START = 1_750_000_000_123_457


@pytest.fixture
def redis_store(redis_store: RedisStore) -> RedisStore:
    redis_store.now = START
    return redis_store


def book(store: RedisStore, booking: str, *limits: Limit, cost: int = 1, **options: Any) -> tuple[bool, int]:
    """Whether it was admitted, and the time booked, from START on."""
    outcome, at = store.window.book(KEY, limits or (Limit(2, 10),), cost, booking, **options)
    return outcome.admitted, at and at - START


def hit(store: RedisStore, *limits: Limit, cost: int = 1) -> bool:
    return store.window.decide(KEY, limits or (Limit(2, 10),), cost, "hit").admitted


def at(store: RedisStore, seconds: float) -> None:
    store.now = START + round(seconds * SECOND)


def booked(store: RedisStore) -> list[int]:
    return [us - START for us in store.entries(sibling(KEY, "booked"))]


class TestBooking:
    def test_what_there_is_room_for_is_admitted_as_a_hit_is(self, redis_store: RedisStore) -> None:
        assert book(redis_store, "a") == (True, 0)
        assert redis_store.entries(KEY) == [START]
        assert booked(redis_store) == []

    def test_the_others_are_booked_in_their_order_each_for_the_first_time_there_is_room(
        self, redis_store: RedisStore
    ) -> None:
        assert book(redis_store, "a") == (True, 0)
        at(redis_store, 3)
        assert book(redis_store, "b") == (True, 0)
        at(redis_store, 4)
        assert [book(redis_store, name)[1] // SECOND for name in "cdefg"] == [10, 13, 20, 23, 30]
        at(redis_store, 5)
        assert book(redis_store, "c") == (False, 10 * SECOND), "and is not put last when it calls again"
        assert len(redis_store.entries(KEY)) == 7

    def test_each_is_admitted_at_its_time_and_not_before(self, redis_store: RedisStore) -> None:
        for name in "abcde":
            book(redis_store, name)
        assert booked(redis_store) == [10 * SECOND, 10 * SECOND, 20 * SECOND]
        redis_store.now = START + 10 * SECOND - 1
        assert book(redis_store, "c") == (False, 10 * SECOND)
        at(redis_store, 10)
        assert [book(redis_store, name)[0] for name in "cd"] == [True, True]
        assert book(redis_store, "e") == (False, 20 * SECOND)
        at(redis_store, 20)
        assert book(redis_store, "e") == (True, 0)
        assert booked(redis_store) == []

    def test_others_stay_behind_what_is_booked(self, redis_store: RedisStore) -> None:
        for name in "abcd":
            book(redis_store, name)
        at(redis_store, 10)
        assert not hit(redis_store), "the room is for those that were promised it"
        assert book(redis_store, "late") == (False, 20 * SECOND)
        at(redis_store, 15)
        assert (book(redis_store, "c")[0], book(redis_store, "d")[0]) == (True, True)
        assert not hit(redis_store)

    def test_one_that_comes_late_has_its_turn_and_moves_whom_it_must(self, redis_store: RedisStore) -> None:
        limit = Limit(1, 10)
        assert book(redis_store, "a", limit) == (True, 0)
        assert [book(redis_store, name, limit)[1] // SECOND for name in "bcd"] == [10, 20, 30]
        at(redis_store, 14)
        assert book(redis_store, "b", limit) == (True, 0)
        at(redis_store, 20)
        assert book(redis_store, "c", limit) == (False, 24 * SECOND), "ten seconds after the one before was admitted"
        at(redis_store, 24)
        assert book(redis_store, "c", limit) == (True, 0)
        at(redis_store, 30)
        assert book(redis_store, "d", limit) == (False, 34 * SECOND), "what was late once is late once, not twice"

    def test_who_comes_when_all_are_late_does_not_wait_for_those_behind(self, redis_store: RedisStore) -> None:
        """Else a queue that is slow for a while would refuse all that it delivers."""
        for n in range(12):
            book(redis_store, f"{n}")
        at(redis_store, 35)  # 2 to 7 are overdue, and all come at once
        told = [book(redis_store, f"{n}")[1] // SECOND for n in range(2, 8)]
        assert told == [0, 0, 45, 45, 55, 55], "in their order, each for a time of its own: none comes in vain"
        at(redis_store, 40)
        assert [book(redis_store, f"{n}")[1] // SECOND for n in (8, 9)] == [65, 65], "after those that were before"
        at(redis_store, 45)
        assert [book(redis_store, f"{n}")[0] for n in (4, 5)] == [True, True]
        at(redis_store, 50)
        assert [book(redis_store, f"{n}")[1] // SECOND for n in (10, 11)] == [75, 75]
        for moment, names in {55: (6, 7), 65: (8, 9), 75: (10, 11)}.items():
            at(redis_store, moment)
            assert [book(redis_store, f"{n}")[0] for n in names] == [True, True]

    def test_who_waits_a_moment_keeps_its_place(self, redis_store: RedisStore) -> None:
        limit = Limit(1, 10)
        book(redis_store, "a", limit)
        assert [book(redis_store, name, limit)[1] // SECOND for name in "bcd"] == [10, 20, 30]
        at(redis_store, 10.3)
        assert book(redis_store, "b", limit) == (True, 0)
        at(redis_store, 20)
        assert book(redis_store, "c", limit, patience_us=SECOND) == (False, 20 * SECOND)
        assert booked(redis_store) == [20 * SECOND, 30 * SECOND]
        assert book(redis_store, "c", limit, patience_us=299_999) == (False, 20.3 * SECOND), "no longer than it can"
        assert booked(redis_store) == [30 * SECOND]

    def test_who_was_moved_comes_before_all_that_nobody_has_called_for(self, redis_store: RedisStore) -> None:
        for n in range(6):
            book(redis_store, f"{n}")
        at(redis_store, 15)
        assert [book(redis_store, f"{n}")[0] for n in (2, 3)] == [True, True]
        at(redis_store, 20)
        assert [book(redis_store, f"{n}")[1] // SECOND for n in (4, 5)] == [25, 25]
        book(redis_store, "6")
        redis_store.server.command("ZADD", KEY, f"{(START + 24 * SECOND) / SECOND:.6f}", "6-1")
        redis_store.server.command("ZADD", sibling(KEY, "booked"), f"{(START + 24 * SECOND) / SECOND:.6f}", "6-1")
        at(redis_store, 25)
        assert [book(redis_store, f"{n}")[0] for n in (4, 5)] == [True, True], "one booked for 24 has not come yet"

    def test_places_are_kept_longer_than_the_log_keeps_entries(self, redis_store: RedisStore) -> None:
        """Nobody worked for a while: who comes then is not put last."""
        limit = Limit(1, 10)
        assert [book(redis_store, name, limit)[1] // SECOND for name in "abc"] == [0, 10, 20]
        at(redis_store, 60)
        assert book(redis_store, "d", limit) == (True, 0), "and what was not called for makes no room in vain"
        assert booked(redis_store) == [10 * SECOND, 20 * SECOND]
        assert book(redis_store, "e", limit)[1] // SECOND == 70
        assert book(redis_store, "b", limit)[1] // SECOND == 70, "before one that was booked for later"

    def test_what_never_comes_counts_at_its_time(self, redis_store: RedisStore) -> None:
        for name in "abcd":
            book(redis_store, name)
        at(redis_store, 19)
        assert not hit(redis_store)
        at(redis_store, 20)
        assert [hit(redis_store) for _ in range(3)] == [True, True, False]

    def test_all_limits_or_none_and_the_last_that_has_room_decides(self, redis_store: RedisStore) -> None:
        limits = Limit(3, 60), Limit(1, 10)
        assert [book(redis_store, name, *limits)[1] // SECOND for name in "abcde"] == [0, 10, 20, 60, 70]
        at(redis_store, 10)
        assert book(redis_store, "b", *limits) == (True, 0)

    def test_several_entries_at_once(self, redis_store: RedisStore) -> None:
        limit = Limit(5, 10)
        assert book(redis_store, "a", limit, cost=3) == (True, 0)
        assert book(redis_store, "b", limit, cost=3) == (False, 10 * SECOND)
        assert book(redis_store, "c", limit, cost=2) == (False, 10 * SECOND)
        assert book(redis_store, "d", limit) == (False, 20 * SECOND)
        at(redis_store, 10)
        assert book(redis_store, "b", limit, cost=2) == (True, 0), "it costs less now"
        assert len(redis_store.entries(KEY)) == 2 + 2 + 1, "the first three are over"
        assert len(booked(redis_store)) == 2 + 1

    def test_where_room_was_made_one_that_calls_early_has_it(self, redis_store: RedisStore) -> None:
        for name in "abcdef":
            book(redis_store, name)
        wider = Limit(4, 10)
        at(redis_store, 1)
        assert [book(redis_store, name, wider) for name in "cde"] == [(True, 0), (True, 0), (False, 10 * SECOND)]

    def test_for_now_and_to_be_called_for(self, redis_store: RedisStore) -> None:
        assert [book(redis_store, name, admit=False) for name in "ab"] == [(True, 0)] * 2
        assert book(redis_store, "c", admit=False) == (False, 10 * SECOND)
        assert not hit(redis_store)
        at(redis_store, 1)
        assert book(redis_store, "a") == (True, 0)
        assert [us - START for us in redis_store.entries(KEY)] == [0, SECOND, 10 * SECOND]

    def test_a_reset_forgets_what_is_booked(self, redis_store: RedisStore) -> None:
        for name in "abcd":
            book(redis_store, name)
        redis_store.window.reset(KEY)
        assert redis_store.server.command("KEYS", "*") == []
        assert [book(redis_store, name)[0] for name in "dcx"] == [True, True, False]

    def test_a_log_that_others_have_removed_makes_no_room(self, redis_store: RedisStore) -> None:
        """Who deletes the plain key, as the async service does, does not know of what is beside it."""
        for n in range(20):
            book(redis_store, f"{n}")
        redis_store.server.command("DEL", KEY)
        assert [hit(redis_store) for _ in range(3)] == [True, True, False]
        assert [book(redis_store, f"{n}") for n in (2, 3, 4)] == [(False, 10 * SECOND)] * 2 + [(False, 20 * SECOND)]
        assert len(booked(redis_store)) == 3

    def test_the_same_call_arriving_again_is_admitted_once(self, redis_store: RedisStore) -> None:
        class Twice:
            def run(_, *args: Any) -> Any:
                first = client.run(*args)
                assert client.run(*args)[0] == first[0]
                return first

        client = redis_store.window._client
        redis_store.window._client = Twice()
        assert [book(redis_store, name)[1] // SECOND for name in "abc"] == [0, 0, 10]
        assert len(redis_store.entries(KEY)) == 3
        at(redis_store, 10)
        assert book(redis_store, "c") == (True, 0)
        assert len(redis_store.entries(KEY)) == 1

    def test_everything_is_forgotten_when_it_cannot_count_any_more(self, redis_store: RedisStore) -> None:
        for name in "abcd":
            book(redis_store, name)
        for key in (KEY, sibling(KEY, "window")):
            assert 20_000 < redis_store.server.command("PTTL", key) <= 80_000
        assert 86_400_000 < redis_store.server.command("PTTL", sibling(KEY, "booked")) <= 86_480_000
        at(redis_store, 10 + 86_400 + 11)
        for name in "xyz":
            book(redis_store, name)
        assert booked(redis_store) == [(86_400 + 31) * SECOND], "a day after its time nobody calls for it"


def most_within(times: Sequence[int], window: int) -> int:
    return max((sum(last - window < other <= last for other in times) for last in times), default=0)


LIMITS = st.lists(st.builds(Limit, st.integers(1, 4), st.sampled_from([1.0, 2.5, 10.0])), min_size=1, max_size=2)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["book", "book", "call", "call", "hit", "on time"]),
        st.integers(0, 7),
        st.integers(0, 3_000_000),
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limits=LIMITS,
    steps=STEPS,
    cost=st.integers(1, 2),
    back=st.integers(0, 30),
    back_by=st.integers(0, 5_000_000),
    patience=st.sampled_from([0, 1_000_000]),
)
def test_never_more_than_the_limit_whoever_calls_when(
    redis_store: RedisStore, limits: list[Limit], steps: Any, cost: int, back: int, back_by: int, patience: int
) -> None:
    """Hits, bookings, and calls for them early, late, twice or never; and a clock that steps back once."""
    redis_store.window.reset(KEY)
    redis_store.now, cost = START, min(cost, *(limit.count for limit in limits))
    admitted: list[int] = []
    elapsed, real, due = 0, [], {}  # of a clock that never steps: what is admitted is counted by it too
    for number, (what, which, us) in enumerate(steps):
        elapsed += us
        redis_store.now += us
        if number == back:
            redis_store.now -= back_by
        if what == "on time" and due:
            which = min(due, key=lambda one: due[one])
            elapsed += max(0, due[which] - redis_store.now)
            redis_store.now = max(redis_store.now, due[which])
        if what == "hit":
            was = hit(redis_store, *limits, cost=cost)
        else:
            outcome, at_us = redis_store.window.book(KEY, limits, cost, f"b{which}", patience_us=patience)
            was = outcome.admitted
            due.pop(which, None)
            if not was:
                due[which] = at_us
        if was:
            admitted += [redis_store.now] * cost
            real += [elapsed] * cost
    for limit in limits:
        assert most_within(real, limit.window_us) <= limit.count
        if back >= len(steps):  # else its clock has read a time twice, and one that has aged out may come before it
            assert most_within(admitted, limit.window_us) <= limit.count


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limits=LIMITS,
    arrivals=st.lists(st.integers(0, 1_500_000), min_size=1, max_size=25),
    late=st.lists(st.integers(0, 200_000), min_size=60, max_size=60),
    punctual=st.booleans(),
)
def test_each_is_admitted_at_its_time_in_order_and_no_later_than_the_latest(
    redis_store: RedisStore, limits: list[Limit], arrivals: list[int], late: list[int], punctual: bool
) -> None:
    redis_store.window.reset(KEY)
    redis_store.now = START
    calls, admitted, first_told, tries = [], [], {}, dict.fromkeys(range(len(arrivals)), 0)
    moment = START
    for number, us in enumerate(arrivals):
        moment += us
        calls.append((moment, number))
    lateness = iter(late * 10)
    while calls:
        calls.sort()
        redis_store.now, number = calls.pop(0)
        tries[number] += 1
        outcome, _ = redis_store.window.book(KEY, limits, 1, f"b{number}", patience_us=10 * SECOND)
        if outcome.admitted:
            admitted.append((number, redis_store.now))
            first_told.setdefault(number, redis_store.now)
        else:
            again = number in first_told  # then it waits itself
            told = redis_store.now + outcome.retry_after_us
            first_told.setdefault(number, told)
            calls.append((told + (0 if punctual or again else next(lateness)), number))
    if punctual:
        assert max(tries.values()) <= 2
        assert [number for number, _ in admitted] == sorted(tries), "first come, first served"
        assert dict(admitted) == first_told, "at exactly the time that it was told first"
    for limit in limits:
        assert most_within([us for _, us in admitted], limit.window_us) <= limit.count
    for number, us in admitted:
        assert us - first_told[number] <= max(late), "lateness does not add up"


def test_the_clock_stepping_back_makes_it_stricter(redis_store: RedisStore) -> None:
    for name in "abc":
        book(redis_store, name)
    at(redis_store, -5)
    assert not hit(redis_store)
    assert book(redis_store, "c") == (False, 10 * SECOND)
    assert book(redis_store, "d") == (False, 10 * SECOND)


class TestLimiter:
    def test_who_books_and_who_does_not(self, gov: GovRedis) -> None:
        first, first_booked = hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="one")
        refused, refused_booked = hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="two")
        assert (first.allowed, first_booked) == (True, False)
        assert (refused.allowed, refused_booked, refused.backend) == (False, True, "redis")
        assert 3590 < refused.retry_after <= 3600
        assert hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="two")[0].retry_after < refused.retry_after
        later, booked = hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="three", admit=False)
        assert (later.allowed, booked) == (False, True)
        assert 7190 < later.retry_after <= 7200
        now, booked = hit_or_book(gov.limits, "b", "1/hour", operation="x", booking="one", admit=False)
        assert (now.allowed, booked, gov.limits.peek("b", "1/hour", operation="x").allowed) == (True, True, False)
        assert (gov.counters.get("limits.allowed"), gov.counters.get("limits.denied")) == (1, 2)

    def test_without_redis_nothing_is_booked(self, make_gov: Any) -> None:
        gov = make_gov(redis_url="redis://127.0.0.1:1/0")
        assert hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="one", admit=False)[0].allowed
        first, booked = hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="one")
        assert (first.allowed, first.degraded, booked) == (True, True, False)
        refused, booked = hit_or_book(gov.limits, "a", "1/hour", operation="x", booking="two")
        assert (refused.allowed, refused.degraded, booked) == (False, True, False)

    @pytest.mark.parametrize("bad", [{"cost": 2}, {"operation": "a:b"}])
    def test_bad_arguments(self, gov: GovRedis, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"cost|operation"):
            hit_or_book(gov.limits, "a", "1/hour", booking="one", **{"operation": "x", **bad})
