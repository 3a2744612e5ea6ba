"""Messages that wait: each is published at least once, in time, and worked on once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from govredis import BackendUnavailable, GovRedis
from govredis.keys import sibling
from govredis.limits import parked as module
from govredis.limits.parked import LEASE, Arrival, Parked, ParkingLot
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

KEY = "govredis:parked"
BROKER = "redis://h:6379/0"


@pytest.fixture
def lot(gov: GovRedis) -> ParkingLot:
    assert gov.internal.parked is not None
    return gov.internal.parked.lot(BROKER)


def taken(lot: ParkingLot) -> list[bytes]:
    return [taken.message for taken in lot.take()[0]]


def at_once(lot: ParkingLot, run: str, message: bytes = b"m") -> Arrival:
    """The arrival of a message that was parked, and has been published since."""
    assert lot.park(Arrival(run), 0, message)
    (found,) = lot.take()[0]
    assert found.message == message
    lot.remove(found.entry)
    return Arrival(run, 1, "p1")


class TestParking:
    def test_it_waits_until_it_is_due_and_is_taken_once(self, lot: ParkingLot) -> None:
        assert lot.take() == ([], None)
        assert lot.park(Arrival("a"), 0, b"\x00\xff")
        assert lot.park(Arrival("b"), 60, b"later")
        (found,), wait = lot.take()
        assert (found.entry, found.message, found.flushed) == (b"a:1", b"\x00\xff", False)
        assert wait is not None
        assert 0 < wait <= LEASE, "when it is due again, if nobody removes it"
        assert taken(lot) == []
        lot.remove(found.entry)
        assert lot.count() == 1
        _, wait = lot.take()
        assert wait is not None
        assert 55 < wait <= 60

    def test_overdue_messages_come_first_and_many_come_in_parts(self, lot: ParkingLot) -> None:
        for n in range(150):
            lot.park(Arrival(f"{n}"), 0, b"%d" % n)
        first, wait = lot.take()
        assert ([found.message for found in first], wait) == ([b"%d" % n for n in range(100)], 0)
        assert taken(lot) == [b"%d" % n for n in range(100, 150)]

    def test_large_ones_come_one_by_one(self, lot: ParkingLot) -> None:
        large = b"x" * 600_000
        for n in range(3):
            lot.park(Arrival(f"{n}"), 0, large)
        assert [len(lot.take()[0]) for _ in range(3)] == [2, 1, 0]

    def test_another_publisher_takes_over_from_a_killed_one(
        self, lot: ParkingLot, monkeypatch: pytest.MonkeyPatch, plain_redis: Any
    ) -> None:
        monkeypatch.setattr(module, "LEASE", 0.001)
        lot.park(Arrival("a"), 0, b"a")
        assert taken(lot) == [b"a"]
        for _ in range(1000):
            if again := taken(lot):
                break
        assert again == [b"a"]

    def test_parked_twice_it_waits_once(self, lot: ParkingLot) -> None:
        assert lot.park(Arrival("a"), 60, b"one")
        assert not lot.park(Arrival("a"), 0, b"two")
        assert (lot.count(), taken(lot)) == (1, [])
        ((due, message),) = lot.first(10)
        assert (55 < due <= 60, message) == (True, b"one")

    def test_parked_again_after_it_was_published_though_it_was_not_removed(self, lot: ParkingLot) -> None:
        lot.park(Arrival("a"), 0, b"one")
        lot.take()
        assert lot.arrived(Arrival("a", 1, "p1"))
        assert lot.park(Arrival("a", 1, "p1"), 0, b"two")
        assert (lot.count(), taken(lot)) == (1, [b"two"])
        lot.remove(b"a:1")
        assert lot.count() == 1, "who published the first removes the first"

    def test_a_message_that_is_gone_is_no_entry(self, lot: ParkingLot, plain_redis: Any) -> None:
        lot.park(Arrival("a"), 0, b"a")
        plain_redis.delete(sibling(KEY, f"messages:{BROKER}"))
        assert lot.take() == ([], None)
        assert lot.count() == 0

    def test_brokers_have_lots_of_their_own(self, gov: GovRedis, lot: ParkingLot) -> None:
        """A worker of another broker would publish it where nobody looks for it."""
        assert gov.internal.parked is not None
        other = gov.internal.parked.lot("amqp://h:5672/")
        lot.park(Arrival("a"), 0, b"a")
        other.park(Arrival("a"), 0, b"b")
        assert (taken(other), taken(lot)) == ([b"b"], [b"a"])
        assert [one.broker for one in gov.internal.parked.lots()] == ["amqp://h:5672/", BROKER]

    def test_flushed_all_are_due_now_in_their_order(self, lot: ParkingLot, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_FLUSHED_AT_ONCE", 2)
        lot.park(Arrival("due"), 0, b"due")
        for n in (5, 3, 1, 4, 2):
            lot.park(Arrival(f"{n}"), 100 * n, b"%d" % n)
        assert lot.flush() == 6
        assert lot.first(1) == [(0, b"due")]
        found, _ = lot.take()
        assert [each.message for each in found] == [b"due", b"1", b"2", b"3", b"4", b"5"]
        assert all(each.flushed for each in found)
        monkeypatch.setattr(module, "LEASE", 0.0)
        lot.flush()
        for _ in range(2):
            assert [each.flushed for each in lot.take()[0]] == [True] * 6, "also where who took it could not publish it"

    def test_postponed(self, lot: ParkingLot) -> None:
        lot.park(Arrival("a"), 0, b"a")
        (found,) = lot.take()[0]
        lot.postpone(found.entry, 60)
        ((due, _),) = lot.first(1)
        assert 55 < due <= 60
        lot.remove(found.entry)
        lot.postpone(found.entry, 60)
        assert lot.count() == 0, "what is gone stays so"

    def test_tickets_end(self, lot: ParkingLot, plain_redis: Any) -> None:
        ticket = sibling(KEY, f"ticket:{BROKER}:a")
        lot.park(Arrival("a"), 3600, b"a")
        assert 86_400 + 3500 < plain_redis.ttl(ticket) <= 86_400 + 3600
        lot.arrived(Arrival("a", 1, "p1"))
        assert 86_300 < plain_redis.ttl(ticket) <= 86_400

    def test_it_waits_where_the_setting_says(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, mortal_redis: RedisServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, parking_url=mortal_redis.url)
        assert gov.internal.parked is not None
        lot = gov.internal.parked.lot(BROKER)
        lot.park(Arrival("a"), 0, b"a")
        assert mortal_redis.command("EXISTS", KEY) == 1
        assert redis_server.command("EXISTS", KEY) == 0
        mortal_redis.kill()
        with pytest.raises(BackendUnavailable):
            lot.take()
        assert not gov.limits.hit("a", "1/hour").degraded

    def test_without_redis_there_is_no_place(self, make_gov: Callable[..., GovRedis]) -> None:
        assert make_gov(redis_enabled=False).internal.parked is None


class TestSetAside:
    @pytest.fixture
    def parked(self, lot: ParkingLot) -> bytes:
        lot.park(Arrival("a"), 0, b"a")
        return b"a:1"

    def test_a_message_set_aside_is_due_later_each_time(
        self, gov: GovRedis, lot: ParkingLot, parked: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_ASIDE", 100.0)
        monkeypatch.setattr(module, "_LONGEST_ASIDE", 1000.0)
        assert gov.internal.parked is not None
        other = gov.internal.parked.lot(BROKER)  # another worker's
        for tries, least in enumerate((100, 200, 400, 800, 1000, 1000), start=1):
            assert lot.put_aside(parked, "no\nreason") == tries
            (one,) = lot.set_aside()
            assert (one.entry, one.message, one.tries, one.why) == (parked, b"a", tries, "no\nreason")
            assert least - 50 < one.due <= least * 1.25
            assert taken(lot) == taken(other) == []
        assert lot.count() == 1

    def test_tasks_that_failed_together_do_not_come_together(
        self, lot: ParkingLot, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_ASIDE", 10_000.0)
        monkeypatch.setattr(module, "_LONGEST_ASIDE", 10_000.0)
        for n in range(30):
            lot.park(Arrival(f"{n}"), 0, b"%d" % n)
            lot.put_aside(b"%d:1" % n, "x")
        dues = [one.due for one in lot.set_aside()]
        assert dues == sorted(dues)
        assert dues[-1] - dues[0] > 500

    def test_it_comes_again_and_once_published_nothing_is_left_of_it(
        self, lot: ParkingLot, parked: bytes, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_ASIDE", 0.0)
        lot.put_aside(parked, "x")
        assert taken(lot) == [b"a"]
        lot.remove(parked)
        assert lot.set_aside() == []
        assert plain_redis.keys("*aside*") == []
        assert lot.put_aside(parked, "x") == 0, "it is gone"
        assert plain_redis.keys("*aside*") == []

    @pytest.mark.parametrize("flushed_first", [True, False])
    def test_flushed_it_is_due_now(self, lot: ParkingLot, parked: bytes, flushed_first: bool) -> None:
        if flushed_first:
            lot.flush()
        lot.put_aside(parked, "x")
        assert taken(lot) == []
        assert lot.flush() == 1
        (found,) = lot.take()[0]
        assert found.flushed

    def test_a_flushed_message_stays_flushed(
        self, lot: ParkingLot, parked: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_ASIDE", 0.0)
        for flushed in (False, True):
            if flushed:
                lot.flush()
            lot.put_aside(parked, "x")
            (found,) = lot.take()[0]
            assert found.flushed is flushed
            monkeypatch.setattr(module, "LEASE", 0.0)

    def test_parked_again_it_is_set_aside_no_more(self, lot: ParkingLot, parked: bytes) -> None:
        lot.put_aside(parked, "x")
        assert lot.park(Arrival("a", 1, "p1"), 0, b"two")
        assert lot.set_aside() == []
        assert taken(lot) == [b"two"]

    def test_an_entry_set_aside_whose_message_is_gone(self, lot: ParkingLot, parked: bytes, plain_redis: Any) -> None:
        lot.put_aside(parked, "x")
        plain_redis.delete(sibling(KEY, f"messages:{BROKER}"))
        assert lot.set_aside() == []
        lot.flush()
        assert lot.take() == ([], None)
        assert plain_redis.keys("*aside*") == []

    def test_waiting_says_how_many(self, gov: GovRedis, lot: ParkingLot, parked: bytes) -> None:
        assert gov.internal.parked is not None
        lot.park(Arrival("b"), 0, b"b")
        assert [one.set_aside for one in gov.internal.parked.waiting()] == [0]
        lot.put_aside(parked, "x")
        assert [(one.count, one.set_aside) for one in gov.internal.parked.waiting()] == [(2, 1)]
        (check,) = [check for check in gov.health.check().checks if check.name == "parked"]
        assert (check.status, check.data["set_aside"]) == ("warn", 1)
        assert "1 parked tasks cannot be published: `govredis limits parked`" in check.output


class TestPlanted:
    """Keys that others plant among parked messages."""

    @pytest.mark.parametrize("score", ["-inf", "-1e300", "-4", "0.5", "1e300", "+inf"])
    def test_scores(self, gov: GovRedis, lot: ParkingLot, plain_redis: Any, score: str) -> None:
        lot.park(Arrival("a"), 0, b"a")
        lot.park(Arrival("b"), 0, b"b")
        plain_redis.zadd(sibling(KEY, f"due:{BROKER}"), {"a:1": score})
        found, _ = lot.take()
        due = float(score) < 1e9
        assert {each.entry for each in found} == ({b"a:1", b"b:1"} if due else {b"b:1"})
        assert not any(each.flushed for each in found)
        assert taken(lot) == [], "it is leased like any other"
        assert len(lot.first(9)) == 2
        assert gov.internal.parked is not None
        (waiting,) = gov.internal.parked.waiting()
        assert waiting.count == 2
        assert lot.flush() <= 2

    def test_brokers_that_are_no_text(self, gov: GovRedis, lot: ParkingLot, plain_redis: Any) -> None:
        assert gov.internal.parked is not None
        lot.park(Arrival("a"), 0, b"a")
        plain_redis.sadd(KEY, b"\xff\xfe")
        assert [one.broker for one in gov.internal.parked.waiting()] == [BROKER]
        assert gov.health.check().status == "pass"

    @pytest.mark.parametrize("ticket", ["", "x", ":", "-1:", "999999999999999:", "1e9:x", b"\xff:\xff"])
    def test_tickets_that_are_none(self, lot: ParkingLot, plain_redis: Any, ticket: Any) -> None:
        """They are not believed: a message would be taken for a duplicate, and lost."""
        plain_redis.set(sibling(KEY, f"ticket:{BROKER}:a"), ticket)
        assert lot.arrived(Arrival("a", again=True))
        assert lot.park(Arrival("a"), 0, b"a")
        assert taken(lot) == [b"a"]
        plain_redis.set(sibling(KEY, f"ticket:{BROKER}:a"), ticket)
        assert lot.arrived(Arrival("a", 1, "p1"))

    def test_reasons_that_are_none(self, lot: ParkingLot, plain_redis: Any) -> None:
        lot.park(Arrival("a"), 0, b"a")
        for text in (b"", b"\xff\xfe", "x y", "9" * 400, "²"):
            plain_redis.hset(sibling(KEY, f"aside:{BROKER}"), "a:1", text)
            (one,) = lot.set_aside()
            assert (one.entry, one.message) == (b"a:1", b"a")
            assert lot.put_aside(b"a:1", "x") >= 1


class TestArriving:
    def test_a_message_that_was_never_parked(self, lot: ParkingLot, plain_redis: Any) -> None:
        for again in (False, True):
            assert lot.arrived(Arrival("a", again=again))
        assert plain_redis.keys("*") == []

    def test_the_first_of_two_publications_is_worked_on_and_that_again(self, lot: ParkingLot) -> None:
        first = at_once(lot, "a")
        second = Arrival("a", 1, "p2")
        assert [lot.arrived(one) for one in (first, second, first, second)] == [True, False, True, False]

    def test_a_message_whose_run_was_parked_since_is_a_duplicate(self, lot: ParkingLot) -> None:
        """Its worker died before it could tell the broker that it has it parked."""
        first = at_once(lot, "a")
        assert not lot.arrived(Arrival("a", again=True))
        assert lot.arrived(first)
        assert not lot.arrived(Arrival("a", again=True)), "nor when it has been published"
        lot.park(first, 0, b"two")
        assert not lot.arrived(first)
        assert lot.arrived(Arrival("a", 2, "p3"))
        assert not lot.arrived(Arrival("a", 1, "p2"))

    def test_a_new_message_of_the_same_id_is_none_of_the_old_ones(self, lot: ParkingLot) -> None:
        """Applications that name tasks themselves give the same names day by day."""
        assert lot.arrived(at_once(lot, "a"))
        for again in (False, True):
            assert lot.arrived(Arrival("a", again=again))
        assert lot.park(Arrival("a"), 0, b"new")

    def test_a_new_message_of_the_same_id_joins_one_that_waits(self, lot: ParkingLot) -> None:
        lot.park(Arrival("a"), 60, b"old")
        assert lot.arrived(Arrival("a"))
        assert not lot.park(Arrival("a"), 0, b"new")
        assert lot.count() == 1

    def test_after_all_was_lost_publications_are_still_told_apart(self, lot: ParkingLot, plain_redis: Any) -> None:
        first = at_once(lot, "a")
        plain_redis.flushall()
        assert [lot.arrived(one) for one in (first, Arrival("a", 1, "p2"), first)] == [True, False, True]


STEPS = st.lists(
    st.tuples(st.sampled_from(["publish", "deliver", "again", "die early"]), st.integers(0, 20)), max_size=40
)


@settings(max_examples=100)
@given(steps=STEPS, refusals=st.integers(0, 3), runs=st.integers(0, 10**9))
def test_never_lost_and_never_two_begun(lot: ParkingLot, steps: Any, refusals: int, runs: int) -> None:
    """A run that is refused some times: published any number of times, delivered in any order, by workers that die
    between parking and telling the broker. Only a run that was begun may begin again, and only by the same delivery.
    """
    run = f"{runs}"
    lot._redis.call("FLUSHALL")
    queue, numbers = [Arrival(run)], iter(range(100))
    begun: set[Arrival] = set()

    def deliver(arrival: Arrival, dies: bool) -> None:
        if lot.arrived(arrival):
            if arrival.times < refusals:
                lot.park(arrival, 0, b"%d" % (arrival.times + 1))
            else:
                begun.add(Arrival(arrival.run, arrival.times, arrival.publication))
        if dies:
            queue.append(Arrival(arrival.run, arrival.times, arrival.publication, again=True))

    def publish() -> None:
        """As one that is killed before it removes it."""
        for due, message in lot.first(1):
            assert due <= 0
            queue.append(Arrival(run, int(message), f"p{next(numbers)}"))

    for what, which in steps:
        if what == "publish":
            publish()
        elif queue:
            arrival = queue.pop(which % len(queue))
            deliver(arrival, what == "deliver and die")
    for _ in range(20):
        publish()
        while queue:
            deliver(queue.pop(0), False)
    assert len(begun) == 1


def test_names(gov: GovRedis) -> None:
    assert isinstance(gov.internal.parked, Parked)
    assert gov.internal.context.keys.parked() == KEY
