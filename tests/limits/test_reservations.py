"""Reservations: exact, in order, and never more than the limit, whenever it is called for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REDIS_AWAY

from govredis import GovRedis, Limit
from govredis.keys import sibling

pytestmark = pytest.mark.once

#: A window in Redis, by the clock that it reads; see conftest.py.
ClockedRedis: TypeAlias = Any

KEY = "rate_limit:x:a"
SECOND = 1_000_000
START = 1_750_000_000_123_457


@pytest.fixture
def clocked_redis(clocked_redis: ClockedRedis) -> ClockedRedis:
    clocked_redis.now = START
    return clocked_redis


def reserve(clocked: ClockedRedis, reservation: str, *limits: Limit, cost: int = 1, **options: Any) -> tuple[bool, int]:
    """Whether it was admitted, and the time reserved, from START on."""
    outcome, at = clocked.backend.reserve(KEY, limits or (Limit(2, 10),), cost, reservation, **options)
    return outcome.admitted, at and at - START


def hit(clocked: ClockedRedis, *limits: Limit, cost: int = 1) -> bool:
    return clocked.backend.decide(KEY, limits or (Limit(2, 10),), cost, "hit").admitted


def at(clocked: ClockedRedis, seconds: float) -> None:
    clocked.now = START + round(seconds * SECOND)


def reserved(clocked: ClockedRedis) -> list[int]:
    return [us - START for us in clocked.entries(sibling(KEY, "booked"))]


class TestReservations:
    def test_a_call_for_which_there_is_room_is_admitted_like_a_hit(self, clocked_redis: ClockedRedis) -> None:
        assert reserve(clocked_redis, "a") == (True, 0)
        assert clocked_redis.entries(KEY) == [START]
        assert reserved(clocked_redis) == []

    def test_other_calls_reserve_in_their_order_the_first_time_with_room(self, clocked_redis: ClockedRedis) -> None:
        assert reserve(clocked_redis, "a") == (True, 0)
        at(clocked_redis, 3)
        assert reserve(clocked_redis, "b") == (True, 0)
        at(clocked_redis, 4)
        assert [reserve(clocked_redis, name)[1] // SECOND for name in "cdefg"] == [10, 13, 20, 23, 30]
        at(clocked_redis, 5)
        assert reserve(clocked_redis, "c") == (False, 10 * SECOND), "and is not put last when it calls again"
        assert len(clocked_redis.entries(KEY)) == 7

    def test_each_is_admitted_at_its_time_and_not_before(self, clocked_redis: ClockedRedis) -> None:
        for name in "abcde":
            reserve(clocked_redis, name)
        assert reserved(clocked_redis) == [10 * SECOND, 10 * SECOND, 20 * SECOND]
        clocked_redis.now = START + 10 * SECOND - 1
        assert reserve(clocked_redis, "c") == (False, 10 * SECOND)
        at(clocked_redis, 10)
        assert [reserve(clocked_redis, name)[0] for name in "cd"] == [True, True]
        assert reserve(clocked_redis, "e") == (False, 20 * SECOND)
        at(clocked_redis, 20)
        assert reserve(clocked_redis, "e") == (True, 0)
        assert reserved(clocked_redis) == []

    def test_hits_stay_behind_reservations(self, clocked_redis: ClockedRedis) -> None:
        for name in "abcd":
            reserve(clocked_redis, name)
        at(clocked_redis, 10)
        assert not hit(clocked_redis), "the room is for those that were promised it"
        assert reserve(clocked_redis, "late") == (False, 20 * SECOND)
        at(clocked_redis, 15)
        assert (reserve(clocked_redis, "c")[0], reserve(clocked_redis, "d")[0]) == (True, True)
        assert not hit(clocked_redis)

    def test_a_late_call_has_its_turn_and_moves_those_that_it_must(self, clocked_redis: ClockedRedis) -> None:
        limit = Limit(1, 10)
        assert reserve(clocked_redis, "a", limit) == (True, 0)
        assert [reserve(clocked_redis, name, limit)[1] // SECOND for name in "bcd"] == [10, 20, 30]
        at(clocked_redis, 14)
        assert reserve(clocked_redis, "b", limit) == (True, 0)
        at(clocked_redis, 20)
        assert reserve(clocked_redis, "c", limit) == (False, 24 * SECOND), (
            "ten seconds after the one before was admitted"
        )
        at(clocked_redis, 24)
        assert reserve(clocked_redis, "c", limit) == (True, 0)
        at(clocked_redis, 30)
        assert reserve(clocked_redis, "d", limit) == (False, 34 * SECOND), "what was late once is late once, not twice"

    def test_a_call_when_all_are_late_does_not_wait_for_those_behind(self, clocked_redis: ClockedRedis) -> None:
        """Else a queue that is slow for a while would refuse all that it delivers."""
        for n in range(12):
            reserve(clocked_redis, f"{n}")
        at(clocked_redis, 35)  # 2 to 7 are overdue, and all come at once
        told = [reserve(clocked_redis, f"{n}")[1] // SECOND for n in range(2, 8)]
        assert told == [0, 0, 45, 45, 55, 55], "in their order, each for a time of its own: none comes in vain"
        at(clocked_redis, 40)
        assert [reserve(clocked_redis, f"{n}")[1] // SECOND for n in (8, 9)] == [65, 65], "after those that were before"
        at(clocked_redis, 45)
        assert [reserve(clocked_redis, f"{n}")[0] for n in (4, 5)] == [True, True]
        at(clocked_redis, 50)
        assert [reserve(clocked_redis, f"{n}")[1] // SECOND for n in (10, 11)] == [75, 75]
        for moment, names in {55: (6, 7), 65: (8, 9), 75: (10, 11)}.items():
            at(clocked_redis, moment)
            assert [reserve(clocked_redis, f"{n}")[0] for n in names] == [True, True]

    def test_a_call_that_waits_a_moment_keeps_its_place(self, clocked_redis: ClockedRedis) -> None:
        limit = Limit(1, 10)
        reserve(clocked_redis, "a", limit)
        assert [reserve(clocked_redis, name, limit)[1] // SECOND for name in "bcd"] == [10, 20, 30]
        at(clocked_redis, 10.3)
        assert reserve(clocked_redis, "b", limit) == (True, 0)
        at(clocked_redis, 20)
        assert reserve(clocked_redis, "c", limit, patience_us=SECOND) == (False, 20 * SECOND)
        assert reserved(clocked_redis) == [20 * SECOND, 30 * SECOND]
        assert reserve(clocked_redis, "c", limit, patience_us=299_999) == (False, 20.3 * SECOND), (
            "no longer than it can"
        )
        assert reserved(clocked_redis) == [30 * SECOND]

    def test_a_moved_reservation_comes_before_those_that_nobody_has_called_for(
        self, clocked_redis: ClockedRedis
    ) -> None:
        for n in range(6):
            reserve(clocked_redis, f"{n}")
        at(clocked_redis, 15)
        assert [reserve(clocked_redis, f"{n}")[0] for n in (2, 3)] == [True, True]
        at(clocked_redis, 20)
        assert [reserve(clocked_redis, f"{n}")[1] // SECOND for n in (4, 5)] == [25, 25]
        reserve(clocked_redis, "6")
        clocked_redis.server.command("ZADD", KEY, f"{(START + 24 * SECOND) / SECOND:.6f}", "6-1")
        clocked_redis.server.command("ZADD", sibling(KEY, "booked"), f"{(START + 24 * SECOND) / SECOND:.6f}", "6-1")
        at(clocked_redis, 25)
        assert [reserve(clocked_redis, f"{n}")[0] for n in (4, 5)] == [True, True], (
            "one reserved for 24 has not come yet"
        )

    def test_places_are_kept_longer_than_the_log_keeps_entries(self, clocked_redis: ClockedRedis) -> None:
        """Nobody worked for a while: a reservation called for after that is not put last."""
        limit = Limit(1, 10)
        assert [reserve(clocked_redis, name, limit)[1] // SECOND for name in "abc"] == [0, 10, 20]
        at(clocked_redis, 60)
        assert reserve(clocked_redis, "d", limit) == (True, 0), "and what was not called for makes no room in vain"
        assert reserved(clocked_redis) == [10 * SECOND, 20 * SECOND]
        assert reserve(clocked_redis, "e", limit)[1] // SECOND == 70
        assert reserve(clocked_redis, "b", limit)[1] // SECOND == 70, "before one that was reserved for later"

    def test_a_reservation_that_is_never_called_for_counts_at_its_time(self, clocked_redis: ClockedRedis) -> None:
        for name in "abcd":
            reserve(clocked_redis, name)
        at(clocked_redis, 19)
        assert not hit(clocked_redis)
        at(clocked_redis, 20)
        assert [hit(clocked_redis) for _ in range(3)] == [True, True, False]

    def test_all_limits_or_none_and_the_last_that_has_room_decides(self, clocked_redis: ClockedRedis) -> None:
        limits = Limit(3, 60), Limit(1, 10)
        assert [reserve(clocked_redis, name, *limits)[1] // SECOND for name in "abcde"] == [0, 10, 20, 60, 70]
        at(clocked_redis, 10)
        assert reserve(clocked_redis, "b", *limits) == (True, 0)

    def test_several_entries_at_once(self, clocked_redis: ClockedRedis) -> None:
        limit = Limit(5, 10)
        assert reserve(clocked_redis, "a", limit, cost=3) == (True, 0)
        assert reserve(clocked_redis, "b", limit, cost=3) == (False, 10 * SECOND)
        assert reserve(clocked_redis, "c", limit, cost=2) == (False, 10 * SECOND)
        assert reserve(clocked_redis, "d", limit) == (False, 20 * SECOND)
        at(clocked_redis, 10)
        assert reserve(clocked_redis, "b", limit, cost=2) == (True, 0), "it costs less now"
        assert len(clocked_redis.entries(KEY)) == 2 + 2 + 1, "the first three are over"
        assert len(reserved(clocked_redis)) == 2 + 1

    def test_an_early_caller_has_the_room_that_was_made(self, clocked_redis: ClockedRedis) -> None:
        for name in "abcdef":
            reserve(clocked_redis, name)
        wider = Limit(4, 10)
        at(clocked_redis, 1)
        assert [reserve(clocked_redis, name, wider) for name in "cde"] == [(True, 0), (True, 0), (False, 10 * SECOND)]

    def test_for_now_and_to_be_called_for(self, clocked_redis: ClockedRedis) -> None:
        assert [reserve(clocked_redis, name, admit=False) for name in "ab"] == [(True, 0)] * 2
        assert reserve(clocked_redis, "c", admit=False) == (False, 10 * SECOND)
        assert not hit(clocked_redis)
        at(clocked_redis, 1)
        assert reserve(clocked_redis, "a") == (True, 0)
        assert [us - START for us in clocked_redis.entries(KEY)] == [0, SECOND, 10 * SECOND]

    def test_a_reset_forgets_reservations(self, clocked_redis: ClockedRedis) -> None:
        for name in "abcd":
            reserve(clocked_redis, name)
        clocked_redis.backend.reset(KEY)
        assert clocked_redis.server.command("KEYS", "*") == []
        assert [reserve(clocked_redis, name)[0] for name in "dcx"] == [True, True, False]

    def test_a_log_that_others_have_removed_makes_no_room(self, clocked_redis: ClockedRedis) -> None:
        """A client that deletes the plain key, as the async service does, leaves its siblings."""
        for n in range(20):
            reserve(clocked_redis, f"{n}")
        clocked_redis.server.command("DEL", KEY)
        assert [hit(clocked_redis) for _ in range(3)] == [True, True, False]
        assert [reserve(clocked_redis, f"{n}") for n in (2, 3, 4)] == [(False, 10 * SECOND)] * 2 + [
            (False, 20 * SECOND)
        ]
        assert len(reserved(clocked_redis)) == 3

    def test_the_same_call_arriving_again_is_admitted_once(self, clocked_redis: ClockedRedis) -> None:
        class Twice:
            def run(_, *args: Any) -> Any:
                first = client.run(*args)
                assert client.run(*args)[0] == first[0]
                return first

        client = clocked_redis.backend._client
        clocked_redis.backend._client = Twice()
        assert [reserve(clocked_redis, name)[1] // SECOND for name in "abc"] == [0, 0, 10]
        assert len(clocked_redis.entries(KEY)) == 3
        at(clocked_redis, 10)
        assert reserve(clocked_redis, "c") == (True, 0)
        assert len(clocked_redis.entries(KEY)) == 1

    def test_a_reservation_whose_booking_was_lost_is_decided_without_its_own_entry(
        self, clocked_redis: ClockedRedis
    ) -> None:
        """By an eviction, say. The log has its entry, which must not stand in its own way."""
        limit = Limit(1, 10)
        assert hit(clocked_redis, limit)
        assert reserve(clocked_redis, "r", limit) == (False, 10 * SECOND)
        clocked_redis.server.command("DEL", sibling(KEY, "booked"))
        at(clocked_redis, 10)
        assert reserve(clocked_redis, "r", limit) == (True, 0)
        assert clocked_redis.entries(KEY)[-1] == START + 10 * SECOND

    def test_everything_is_forgotten_when_it_cannot_count_any_more(self, clocked_redis: ClockedRedis) -> None:
        for name in "abcd":
            reserve(clocked_redis, name)
        for key in (KEY, sibling(KEY, "window")):
            assert 20_000 < clocked_redis.server.command("PTTL", key) <= 80_000
        assert 86_400_000 < clocked_redis.server.command("PTTL", sibling(KEY, "booked")) <= 86_480_000
        at(clocked_redis, 10 + 86_400 + 11)
        for name in "xyz":
            reserve(clocked_redis, name)
        assert reserved(clocked_redis) == [(86_400 + 31) * SECOND], "a day after its time nobody calls for it"


def most_within(times: Sequence[int], window: int) -> int:
    return max((sum(last - window < other <= last for other in times) for last in times), default=0)


LIMITS = st.lists(st.builds(Limit, st.integers(1, 4), st.sampled_from([1.0, 2.5, 10.0])), min_size=1, max_size=2)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "call", "call", "hit", "on time"]),
        st.integers(0, 7),
        st.integers(0, 3_000_000),
    ),
    max_size=30,
)


@settings(max_examples=100)
@given(
    limits=LIMITS,
    steps=STEPS,
    cost=st.integers(1, 2),
    back=st.integers(0, 30),
    back_by=st.integers(0, 5_000_000),
    patience=st.sampled_from([0, 1_000_000]),
)
def test_never_more_than_the_limit_whatever_the_order_of_calls(
    clocked_redis: ClockedRedis, limits: list[Limit], steps: Any, cost: int, back: int, back_by: int, patience: int
) -> None:
    """Hits, reservations, and calls for them early, late, twice or never; and a clock that steps back once."""
    clocked_redis.backend.reset(KEY)
    clocked_redis.now, cost = START, min(cost, *(limit.count for limit in limits))
    admitted: list[int] = []
    elapsed, real, due = 0, [], {}  # by a clock that never steps, which counts admissions too
    for number, (what, which, us) in enumerate(steps):
        elapsed += us
        clocked_redis.now += us
        if number == back:
            clocked_redis.now -= back_by
        if what == "on time" and due:
            which = min(due, key=lambda one: due[one])
            elapsed += max(0, due[which] - clocked_redis.now)
            clocked_redis.now = max(clocked_redis.now, due[which])
        if what == "hit":
            was = hit(clocked_redis, *limits, cost=cost)
        else:
            outcome, at_us = clocked_redis.backend.reserve(KEY, limits, cost, f"b{which}", patience_us=patience)
            was = outcome.admitted
            due.pop(which, None)
            if not was:
                due[which] = at_us
        if was:
            admitted += [clocked_redis.now] * cost
            real += [elapsed] * cost
    for limit in limits:
        assert most_within(real, limit.window_us) <= limit.count
        if back >= len(steps):  # else its clock has read a time twice, and one that has aged out may come before it
            assert most_within(admitted, limit.window_us) <= limit.count


@settings(max_examples=40)
@given(
    limits=LIMITS,
    arrivals=st.lists(st.integers(0, 1_500_000), min_size=1, max_size=25),
    late=st.lists(st.integers(0, 200_000), min_size=60, max_size=60),
    punctual=st.booleans(),
)
def test_each_is_admitted_at_its_time_in_order_and_no_later_than_the_latest(
    clocked_redis: ClockedRedis, limits: list[Limit], arrivals: list[int], late: list[int], punctual: bool
) -> None:
    clocked_redis.backend.reset(KEY)
    clocked_redis.now = START
    calls, admitted, first_told, tries = [], [], {}, dict.fromkeys(range(len(arrivals)), 0)
    moment = START
    for number, us in enumerate(arrivals):
        moment += us
        calls.append((moment, number))
    lateness = iter(late * 10)
    while calls:
        calls.sort()
        clocked_redis.now, number = calls.pop(0)
        tries[number] += 1
        outcome, _ = clocked_redis.backend.reserve(KEY, limits, 1, f"b{number}", patience_us=10 * SECOND)
        if outcome.admitted:
            admitted.append((number, clocked_redis.now))
            first_told.setdefault(number, clocked_redis.now)
        else:
            again = number in first_told  # then it waits itself
            told = clocked_redis.now + outcome.retry_after_us
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


def test_the_clock_stepping_back_makes_it_stricter(clocked_redis: ClockedRedis) -> None:
    for name in "abc":
        reserve(clocked_redis, name)
    at(clocked_redis, -5)
    assert not hit(clocked_redis)
    assert reserve(clocked_redis, "c") == (False, 10 * SECOND)
    assert reserve(clocked_redis, "d") == (False, 10 * SECOND)


class TestLimiter:
    def test_refused_calls_reserve_and_admitted_calls_do_not(self, gov: GovRedis) -> None:
        first, first_reserved = gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="one")
        refused, refused_reserved = gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="two")
        assert (first.allowed, first_reserved) == (True, False)
        assert (refused.allowed, refused_reserved, refused.backend) == (False, True, "redis")
        assert 3590 < refused.retry_after <= 3600
        assert (
            gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="two")[0].retry_after
            < refused.retry_after
        )
        later, reserved = gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="three", admit=False)
        assert (later.allowed, reserved) == (False, True)
        assert 7190 < later.retry_after <= 7200
        now, reserved = gov.limits.hit_or_reserve("b", "1/hour", operation="x", reservation="one", admit=False)
        assert (now.allowed, reserved, gov.limits.peek("b", "1/hour", operation="x").allowed) == (True, True, False)
        assert (gov.counters.get("limits.allowed"), gov.counters.get("limits.denied")) == (1, 2)

    def test_without_redis_there_are_no_reservations(self, make_gov: Any) -> None:
        gov = make_gov(redis_url=REDIS_AWAY)
        assert gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="one", admit=False)[0].allowed
        first, reserved = gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="one")
        assert (first.allowed, first.degraded, reserved) == (True, True, False)
        refused, reserved = gov.limits.hit_or_reserve("a", "1/hour", operation="x", reservation="two")
        assert (refused.allowed, refused.degraded, reserved) == (False, True, False)

    @pytest.mark.parametrize("bad", [{"cost": 2}, {"operation": "a:b"}])
    def test_bad_arguments(self, gov: GovRedis, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"cost|operation"):
            gov.limits.hit_or_reserve("a", "1/hour", reservation="one", **{"operation": "x", **bad})
