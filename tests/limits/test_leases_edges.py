"""Leases: races, failures in the middle, odd arguments, other clients."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from leasing import LEASE, Process, count, limit
from support import Background, all_in_use, eventually, redis_of

from govredis import BackendUnavailable, GovRedis, Limit
from govredis._pool import PoolExhausted
from govredis.keys import sibling
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.limits.leases import Leases
from govredis.testing.servers import RedisServer


class TestArguments:
    def test_a_subclass_of_list_is_a_rate(self, gov: GovRedis) -> None:
        class Rates(list):  # type: ignore[type-arg]
            pass

        assert gov.limits.hit("k", Rates([Limit(10, 60)]))
        assert gov.limits.hit("k", Rates([limit(10)]))

    @pytest.mark.parametrize("rate", [[[]], [{}], [["20/hour"]]])
    def test_a_list_of_lists_is_refused_as_any_bad_rate(self, gov: GovRedis, rate: Any) -> None:
        for call in (gov.limits.peek, gov.limits.hit):
            with pytest.raises(ValueError, match="rate"):
                call("k", rate)

    def test_a_bad_operation_beside_a_list_of_limits_is_refused(self, gov: GovRedis) -> None:
        operation: Any = []
        for call in (gov.limits.peek, gov.limits.hit):
            with pytest.raises(ValueError, match="operation"):
                call("k", [Limit(10, 60)], operation=operation)

    def test_an_operation_that_equals_another_spends_nothing_of_its_batch(
        self, gov: GovRedis, process: Callable[[], Process]
    ) -> None:
        """As Decider.check has it."""

        class Sly(str):
            __slots__ = ()

            def __eq__(self, other: object) -> bool:
                return True

            def __hash__(self) -> int:
                return hash("default")

        one, rate = process(), limit(1000)
        one.warm(rate)
        taken = gov.counters.get("limits.leased")
        assert one.limiter.hit("k", rate, operation=Sly("elsewhere"))
        assert gov.counters.get("limits.leased") == taken


class TestTheThread:
    def test_a_short_lease_goes_back_beside_a_long_one(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        """The thread sleeps until the long one ends: that is no reason to keep the short one."""
        one, short, long = process(), limit(1000, algorithm), Limit(1000, 3600, algorithm, lease=360)
        while not one.leases.has_pending():
            assert one.limiter.hit("long", long)
        assert one.hits(3, short) == 3
        assert count(gov, short) == 8
        one.now += LEASE
        eventually(lambda: count(gov, short) == 3, what="the short lease's rest went back")
        assert one.leases.has_pending()

    def test_without_a_thread_spent_batches_are_not_kept(
        self, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As under uWSGI without threads."""
        monkeypatch.setattr(Leases, "_start", lambda leases: None)
        one, rate = process(), limit(1_000_000, "sliding_window_counter")
        for _ in range(200):
            one.hits(20, rate)
            one.now += LEASE
        assert len(one.leases._ending) < 10


class TestReset:
    def test_a_lease_that_is_taken_during_a_reset_is_ended_too(
        self, gov: GovRedis, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch, algorithm: Any
    ) -> None:
        """Its script came before the reset's, its reply after."""
        one, rate = process(), limit(1000, algorithm)
        one.hits(6, rate)
        (batch,) = one.leases._batches.values()
        batch.take_unspent()
        lease = RedisLimitBackend.lease

        def late(*args: Any) -> Any:
            reply = lease(*args)
            monkeypatch.undo()
            one.limiter.reset("k")
            return reply

        monkeypatch.setattr(RedisLimitBackend, "lease", late)
        one.hits(1, rate)
        other = process()
        assert other.hits(5, rate) == 5
        leased = gov.counters.get("limits.leased")
        one.hits(20, rate)
        other.limiter.close()
        one.limiter.close()
        # After the reset 25 were admitted; the one before may be recorded or not.
        assert count(gov, rate) >= 25, f"{gov.counters.get('limits.leased') - leased} came from before the reset"


class TestFailures:
    def test_units_stay_where_the_pool_was_exhausted(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        """Nothing was sent: they can go back another time."""
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        spent = gov.counters.get("limits.allowed")
        with all_in_use(redis_of(gov)._pool), pytest.raises(PoolExhausted):
            one.hits(1, rate, cost=10)
        one.limiter.close()
        assert count(gov, rate) == spent
        assert gov.counters.get("limits.lease_lost") == 0

    def test_a_refused_request_counts_for_no_demand(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        """Units that went back with a denial were not spent."""
        one, rate = process(), limit(1000, algorithm)
        for _ in range(3):
            one.now += LEASE
            one.hits(100, rate)
        (batch,) = one.leases._batches.values()
        spent = batch.granted - _left(batch)
        assert _left(batch) > 10
        rest = gov.limits.peek("k", Limit(1000, 3600, algorithm)).remaining + 1
        fits = gov.limits.hit("k", Limit(1000, 3600, algorithm), cost=rest)
        one.now += LEASE
        result = one.limiter.hit("k", rate, cost=900)
        assert not result.allowed
        assert fits.refund()
        one.hits(1, rate)
        assert one.leases._batches["k", "default", rate].granted <= 1 + spent * 1.25

    def test_another_rates_denial_is_forgotten_when_units_go_back_with_a_lease(
        self, gov: GovRedis, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rate, tight = process(), limit(9), Limit(5, 3600)
        monkeypatch.setattr(Leases, "_start", lambda leases: None)
        one.warm(rate)  # 6 are taken, 3 of them unspent
        one.now += 10 * LEASE - 0.5
        assert not one.limiter.hit("k", tight)
        one.now += 0.5
        assert one.hits(1, rate)
        assert count(gov, rate) == 4
        assert one.limiter.hit("k", tight)

    def test_a_rest_that_a_counter_no_longer_knows_is_counted_as_lost(
        self, gov: GovRedis, process: Callable[[], Process], plain_redis: Any
    ) -> None:
        """A process of an older version deletes the field "origin", with each call."""
        one, rate = process(), limit(1000, "sliding_window_counter")
        one.warm(rate)
        spent = gov.counters.get("limits.allowed")
        assert plain_redis.hdel(sibling("rate_limit:default:k", "counter"), "origin")
        one.limiter.close()
        assert count(gov, rate) <= spent + gov.counters.get("limits.lease_lost")


def _left(batch: Any) -> int:
    return batch._left.__length_hint__() + sum(batch._spare)


class TestStruck:
    def test_units_stay_where_an_exception_struck_before_they_were_sent(
        self, gov: GovRedis, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch, algorithm: Any
    ) -> None:
        """As Celery's soft time limit does, most likely in a round trip."""
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        spent = gov.counters.get("limits.allowed")

        def struck(*args: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(redis_of(gov), "_round_trip", struck)
            with pytest.raises(KeyboardInterrupt):
                one.hits(1, rate, cost=10)
        one.limiter.close()
        assert count(gov, rate) <= spent + gov.counters.get("limits.lease_lost")


class TestRaces:
    def test_two_threads_may_take_the_rest_at_once(self, process: Callable[[], Process]) -> None:
        one, rate = process(), limit(1000)
        one.warm(rate)
        (batch,) = one.leases._batches.values()

        class Spare(type(batch._spare)):  # type: ignore[misc]
            """As where the other thread comes between two steps."""

            def __bool__(self) -> bool:
                there = len(self) > 0
                self.clear()
                return there

        batch._spare = Spare([3])
        assert batch.take_unspent() >= 0

    def test_a_late_reply_to_a_first_call_does_not_replace_a_batch(
        self, gov: GovRedis, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rate = process(), limit(1000)
        asked, go_on = threading.Event(), threading.Event()
        lease, main = RedisLimitBackend.lease, threading.current_thread()

        def late(*args: Any) -> Any:
            reply = lease(*args)
            if threading.current_thread() is not main:
                asked.set()
                assert go_on.wait(60)
            return reply

        monkeypatch.setattr(RedisLimitBackend, "lease", late)
        first = Background(lambda: one.hits(1, rate))
        assert asked.wait(60)
        one.warm(rate)
        go_on.set()
        assert first.result() == 1
        leased = gov.counters.get("limits.leased")
        assert one.hits(1, rate)
        assert gov.counters.get("limits.leased") == leased + 1


class TestCounters:
    def test_a_plain_hit_is_refunded_where_a_lease_alone_counts(
        self, gov: GovRedis, process: Callable[[], Process]
    ) -> None:
        one, other = process(), process()
        rate, plain = limit(1000, "sliding_window_counter"), Limit(1000, 3600, "sliding_window_counter")
        one.warm(rate)
        other.limiter.reset("k")
        one.hits(20, rate)  # so that the counters have a bucket ahead only
        before = count(gov, rate)
        assert before
        result = other.limiter.hit("k", plain)
        assert result.refund()
        assert count(gov, rate) == before


class TestClock:
    def test_a_lease_ends_while_the_host_is_suspended(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """time.monotonic stands still meanwhile; Redis's clock, and the window, do not."""
        with monkeypatch.context() as suspended:
            suspended.setattr(time, "monotonic", lambda: 1000.0)
            gov = make_gov(redis_url=redis_server.url)
        rate = Limit(1000, 3600, lease=0.05)
        leases = gov.limits._decider._leases
        monkeypatch.setattr(Leases, "_start", lambda leases: None)
        eventually(lambda: [gov.limits.hit("k", rate) for _ in range(10)] and leases.has_pending())
        taken = time.clock_gettime(time.CLOCK_BOOTTIME)
        eventually(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > taken + 0.06)
        assert leases.spend(("k", rate, "default", 1)) is None

    def test_a_limit_that_an_older_version_pickled(self) -> None:
        """As in the result of a Celery task, during a rolling deploy."""
        held = Limit.__new__(Limit)
        held.__setstate__([10, 60, "sliding_window_log"])  # type: ignore[attr-defined]
        assert held == Limit(10, 60)
        assert pickle.loads(pickle.dumps(held)) == held


class TestOtherClients:
    @pytest.mark.parametrize("leased", [False, True])
    def test_a_lease_hides_no_window_of_another_client(
        self, gov: GovRedis, process: Callable[[], Process], plain_redis: Any, leased: bool
    ) -> None:
        """The entry of a lease is the newest; theirs came since we last wrote, 95 seconds ago."""
        one, key, day = process(), "rate_limit:default:k", 86400
        if leased:
            one.warm(limit(1000))
        seconds, micros = plain_redis.time()
        now = seconds + micros / 1e6
        for member in plain_redis.zrange(key, 0, -1):
            plain_redis.zadd(key, {member: now + 60}, xx=True)
        plain_redis.zadd(key, {"old": now - day + 20, "theirs": now - 95})
        plain_redis.pexpire(key, (day + 60 - 95) * 1000)
        plain_redis.pexpire(sibling(key, "window"), 3_700_000)
        assert gov.limits.hit("k", "1000/hour")
        assert plain_redis.zscore(key, "old") is not None


class TestLostReplies:
    def test_units_of_a_lease_whose_reply_was_lost_are_counted_as_lost_or_go_back(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.hits(50, rate)
        (batch,) = one.leases._batches.values()
        one.hits(_left(batch), rate)
        spent = count(gov, rate)
        client = redis_of(gov)
        exchange = client._round_trip

        def lost(*args: Any) -> Any:
            exchange(*args)
            monkeypatch.undo()
            raise BackendUnavailable("the reply was lost")

        monkeypatch.setattr(client, "_round_trip", lost)
        assert one.limiter.hit("k", rate).backend == "postgres"
        one.limiter.close()
        unaccounted = count(gov, rate) - spent - 1
        assert unaccounted <= gov.counters.get("limits.lease_lost")
