"""The identities denied most: counted in the process, told to Redis a second later, bounded in both."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PATIENT, in_child, redis_of

from govredis import BackendUnavailable, GovRedis
from govredis._context import Context
from govredis._counters import Counters
from govredis._latch import Latch
from govredis._teller import Teller
from govredis.keys import Keys
from govredis.limits.denied_counts import KEPT, Denied, DeniedCounts
from govredis.testing.servers import RedisServer

HOUR = 3600 * 1_000_000


class Waiting:
    """A second that ends when the test says so."""

    def __init__(self) -> None:
        self.asleep, self.wake = threading.Semaphore(0), threading.Semaphore(0)

    def wait(self, stopped: Latch) -> bool:
        self.asleep.release()
        while not stopped.is_set() and not self.wake.acquire(timeout=0.05):
            pass
        return stopped.is_set()


@pytest.fixture
def threads() -> Callable[[], list[threading.Thread]]:
    """The threads that tell, of this test: those of the tests before may sleep on for a second."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t.name == "govredis-teller" and t not in before]


@pytest.fixture
def waiting(threads: Callable[[], list[threading.Thread]]) -> Iterator[Waiting]:
    waiting = Waiting()
    yield waiting
    for _ in range(10):
        waiting.wake.release()
    for thread in threads():
        thread.join(20)


class TestLimiter:
    def test_a_closed_limiter_wakes_no_probe(
        self,
        make_gov: Callable[..., GovRedis],
        mortal_redis: RedisServer,
        waiting: Waiting,
        threads: Callable[[], list[threading.Thread]],
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, **PATIENT)
        gov.internal.context.teller._wait = waiting.wait  # type: ignore[method-assign]
        before = set(threading.enumerate())
        for _ in range(2):
            gov.limits.hit("a", "1/hour")
        (teller,) = threads()
        mortal_redis.kill()
        gov.close()
        teller.join(20)
        assert not teller.is_alive()
        assert not {thread.name for thread in set(threading.enumerate()) - before} & {"govredis-probe"}

    def test_refused_hits_count_and_nothing_else_does(self, gov: GovRedis, make_gov: Callable[..., GovRedis]) -> None:
        limits = gov.limits
        for _ in range(4):
            limits.hit("agent:1", "1/hour", operation="kg_store")
        for _ in range(3):
            limits.hit_many([("b", "1/hour")])
        limits.peek("b", "1/hour")
        limits.check("b", 1, 3600)
        limits.get_count("b", 3600)
        limits.close()
        other = make_gov(redis_url=gov.config.redis_url)
        other.limits.wait("b", "1/hour", timeout=0)
        other.close()
        found = [Denied("agent:1", "kg_store", 3), Denied("b", "default", 3)]
        assert sorted(limits.most_denied()) == found
        other.limits.hit("b", "1/hour")
        other.limits.close()
        assert limits.most_denied(1) == [Denied("b", "default", 4)]

    def test_denials_by_a_fallback_are_told_once_redis_is_back(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, **PATIENT)
        mortal_redis.kill()
        for _ in range(3):
            gov.limits.hit("a", "1/hour")
        gov.limits.close()
        with pytest.raises(BackendUnavailable):
            gov.limits.most_denied()
        mortal_redis.restart(data="empty")
        while gov.limits.peek("a", "1/hour").degraded:
            pass
        gov.limits.close()
        assert gov.limits.most_denied() == [Denied("a", "default", 2)]

    def test_without_redis_nothing_is_counted(
        self, make_gov: Callable[..., GovRedis], threads: Callable[[], list[threading.Thread]]
    ) -> None:
        gov = make_gov(redis_enabled=False)
        gov.limits.hit("a", "1/hour")
        assert not gov.limits.hit("a", "1/hour")
        assert threads() == []
        with pytest.raises(BackendUnavailable, match="Redis is disabled"):
            gov.limits.most_denied()


class TestInTheProcess:
    @pytest.fixture
    def context(self, gov: GovRedis, waiting: Waiting) -> Context:
        """Another prefix, and a teller for nothing else."""
        counters = Counters()
        teller = Teller(redis_of(gov), counters)
        teller._wait = waiting.wait  # type: ignore[method-assign]
        return replace(gov.internal.context, keys=Keys("p:"), counters=counters, teller=teller)

    @pytest.fixture
    def denied(self, context: Context) -> DeniedCounts:
        return DeniedCounts(context)

    def test_a_thread_tells_after_a_second_and_ends(
        self,
        denied: DeniedCounts,
        waiting: Waiting,
        plain_redis: Any,
        threads: Callable[[], list[threading.Thread]],
    ) -> None:
        for _ in range(5):
            denied.add("a", "op")
        assert waiting.asleep.acquire(timeout=20)
        denied.add("b", "op")
        assert len(threads()) == 1
        assert denied.most(9) == [], "no denial waits for Redis"
        waiting.wake.release()
        for thread in threads():
            thread.join(20)
        assert denied.most(9) == [Denied("a", "op", 5), Denied("b", "op", 1)]
        denied.add("b", "op")
        assert waiting.asleep.acquire(timeout=20), "the next second has a thread of its own"
        waiting.wake.release()
        for thread in threads():
            thread.join(20)
        assert denied.most(1) == [Denied("a", "op", 5)]
        assert denied.most(9)[1] == Denied("b", "op", 2)
        (key,) = plain_redis.keys("*denied*")
        assert key.startswith("{p:govredis:denied}:")
        assert 3_600_000 < plain_redis.pttl(key) <= 7_200_000

    def test_is_bounded(self, denied: DeniedCounts, context: Context) -> None:
        for n in range(KEPT + 5):
            denied.add(f"a{n}", "op")
        denied.add("a0", "op")
        assert len(denied._counts) == KEPT
        assert context.counters.get("limits.denied_untold") == 5
        context.teller.flush()
        assert denied.most(1) == [Denied("a0", "op", 2)]
        assert len(denied.most(2 * KEPT)) == KEPT

    def test_counts_that_redis_refuses_are_counted_as_untold(
        self, denied: DeniedCounts, context: Context, plain_redis: Any
    ) -> None:
        denied.add("a", "op")
        context.teller.flush()
        (key,) = plain_redis.keys("*denied*")
        plain_redis.set(key, "text")
        for _ in range(3):
            denied.add("a", "op")
        context.teller.flush()
        assert context.counters.get("limits.denied_untold") == 3

    def test_a_child_tells_only_what_it_counts_itself(
        self, denied: DeniedCounts, context: Context, threads: Callable[[], list[threading.Thread]]
    ) -> None:
        denied.add("a", "op")

        def child() -> None:
            context.teller._wait = lambda stopped: False  # type: ignore[method-assign]
            denied.add("a", "op")
            for thread in threads():
                thread.join(20)
            context.teller.flush()

        in_child(child)
        assert denied.most(9) == [Denied("a", "op", 1)]
        context.teller.flush()
        assert denied.most(9) == [Denied("a", "op", 2)]

    def test_denials_are_counted_where_no_thread_can_be_started(
        self, denied: DeniedCounts, context: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def start(_: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        denied.add("a", "op")
        context.teller.flush()
        assert denied.most(9) == [Denied("a", "op", 1)]


# The scripts, with less room and by a clock that the test sets.

TAG = "{govredis:denied}"


def hours(first: int, count: int) -> tuple[list[str], str]:
    """The keys of so many hours, and the number of the first."""
    return [f"{TAG}:{hour}" for hour in range(first, first + count)], str(first)


def tell(gov: GovRedis, room: int, now: int, *pairs: tuple[str, int]) -> None:
    denied: Any = gov.limits._decider.denied_counts
    keys, first = hours(now // HOUR - 1, 3)
    arguments = [first, *(str(part) for pair in pairs for part in pair)]
    assert redis_of(gov).run(denied._script, keys, str(room), str(now), *arguments) == 1


def most(gov: GovRedis, now: int) -> dict[bytes, int]:
    denied: Any = gov.limits._decider.denied_counts
    counts: Counter[bytes] = Counter()
    keys, first = hours(now // HOUR - 2, 4)
    for flat in redis_of(gov).run(denied._most, keys, str(now), first):
        counts.update({m: int(n) for m, n in zip(flat[::2], flat[1::2], strict=True)})
    return dict(counts)


def test_this_hour_and_the_one_before(gov: GovRedis) -> None:
    tell(gov, 9, 10 * HOUR, ("a", 1))
    tell(gov, 9, 11 * HOUR - 1, ("a", 2), ("b", 5))
    tell(gov, 9, 11 * HOUR, ("a", 4))
    assert most(gov, 11 * HOUR) == {b"a": 7, b"b": 5}
    assert most(gov, 12 * HOUR) == {b"a": 4}
    assert most(gov, 13 * HOUR) == {}


@pytest.mark.parametrize(("first", "counted"), [(9, "10"), (10, "10"), (8, "10"), (5, "7"), (20, "20")])
def test_an_hour_that_the_process_does_not_name_is_the_one_nearest_to_it(
    gov: GovRedis, first: int, counted: str
) -> None:
    denied: Any = gov.limits._decider.denied_counts
    keys, number = hours(first, 3)
    redis_of(gov).run(denied._script, keys, "9", str(10 * HOUR), number, "a", "1")
    assert redis_of(gov).call("EXISTS", f"{TAG}:{counted}")
    keys, number = hours(first - 1, 4)
    assert redis_of(gov).run(denied._most, keys, str(10 * HOUR), number) == [[b"a", b"1"], []]


@settings(max_examples=60)
@given(
    denials=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 9)), min_size=1, max_size=40),
    room=st.integers(1, 6),
    at_once=st.integers(1, 5),
)
def test_counts_are_bounds_from_above_by_a_share_of_all(
    gov: GovRedis, denials: list[tuple[str, int]], room: int, at_once: int
) -> None:
    redis_of(gov).call("DEL", f"{TAG}:10")
    for i in range(0, len(denials), at_once):
        tell(gov, room, 10 * HOUR, *denials[i : i + at_once])
    true: Counter[bytes] = Counter()
    for member, count in denials:
        true[member.encode()] += count
    found, total = most(gov, 10 * HOUR), sum(true.values())
    assert len(found) <= room
    for member, count in found.items():
        assert true[member] <= count <= true[member] + total / room
    assert {member for member, count in true.items() if count > total / room} <= set(found)
