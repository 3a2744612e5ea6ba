"""Leases: admissions that a process takes in advance. test_leases_machine.py has the arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from leasing import LEASE, Process, count, limit
from support import PATIENCE, PATIENT, eventually, in_child, in_threads, redis_of

from govredis import BackendUnavailable, GovRedis, Limit
from govredis.limits import RateLimiter
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.limits.leases import Leases
from govredis.limits.rates import RateLimits
from govredis.testing.servers import PostgresServer, RedisServer


def scripts_run(server: RedisServer) -> int:
    stats = server.command("INFO", "commandstats")
    return sum(int(stats[name]["calls"]) for name in ("cmdstat_evalsha", "cmdstat_eval") if name in stats)


class TestSpending:
    def test_a_busy_identity_costs_few_round_trips(
        self, gov: GovRedis, redis_server: RedisServer, process: Callable[[], Process], algorithm: Any
    ) -> None:
        one, rate = process(), limit(100_000, algorithm)
        before = scripts_run(redis_server)
        assert one.hits(2000, rate) == 2000
        # 1, 1, 6, 21, 73, 256, 896 and 1,001; a script that Redis does not know is sent twice.
        assert scripts_run(redis_server) - before <= 9
        assert gov.counters.get("limits.allowed") == 2000
        assert gov.counters.get("limits.leased") >= 1990

    def test_the_result_says_what_is_left_without_all_that_is_leased(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        one.now += 1
        result = one.limiter.hit("k", rate)
        taken = count(gov, rate)
        assert result.allowed
        assert (result.limit, result.violated, result.backend, result.degraded) == (rate, None, "redis", False)
        assert result.remaining == 1000 - taken
        assert result.retry_after == 0
        # A lease counts from its end; a bucket of a counter a sixtieth of the window longer.
        assert 3600 + LEASE - 2 < result.reset_after <= 3600 + LEASE + 60
        assert one.limiter.peek("k", rate).remaining == 1000 - taken - 1

    def test_a_batch_is_recorded_at_the_end_of_its_lease(
        self, gov: GovRedis, redis_server: RedisServer, process: Callable[[], Process]
    ) -> None:
        one, rate = process(), limit(1000)
        seconds, micros = redis_server.command("TIME")
        earliest = int(seconds) + int(micros) / 1e6 + LEASE
        one.warm(rate)
        seconds, micros = redis_server.command("TIME")
        latest = int(seconds) + int(micros) / 1e6 + LEASE
        found = redis_server.command("ZRANGE", "rate_limit:default:k", "0", "-1", "WITHSCORES")
        scores = sorted(float(score) for score in found[1::2])
        assert len(scores) == 8
        assert scores[1] < earliest, "the first two calls took no batch"
        assert all(earliest <= score <= latest for score in scores[2:])

    def test_nothing_of_it_is_spent_at_its_end(self, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        one.now += LEASE * 0.998
        (batch,) = one.leases._batches.values()
        assert one.leases.spend(("k", rate, "default", 1)) is batch
        one.now += LEASE * 0.002
        assert one.leases.spend(("k", rate, "default", 1)) is None

    def test_its_end_counts_from_when_it_was_asked_for(
        self, process: Callable[[], Process], algorithm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reply may be late, and the process may have stood still."""
        one, rate = process(), limit(1000, algorithm)
        lease = RedisLimitBackend.lease

        def late(*args: Any) -> Any:
            found = lease(*args)
            one.now += 10
            return found

        monkeypatch.setattr(RedisLimitBackend, "lease", late)
        one.warm(rate)
        one.now += LEASE - 10
        assert one.leases.spend(("k", rate, "default", 1)) is None

    def test_costs(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(10_000, algorithm)
        one.warm(rate)
        assert one.limiter.hit("k", rate, cost=3), "of the 5 that are left"
        assert gov.counters.get("limits.leased") == 1
        assert count(gov, rate) == 8
        assert one.limiter.hit("k", rate, cost=7)
        assert one.limiter.hit("k", rate, cost=2000), "which no batch is asked for"
        one.limiter.close()
        assert count(gov, rate) == 3 + 3 + 7 + 2000

    @pytest.mark.parametrize("cost", [True, 0, -1, 1.0, "1", None])
    def test_bad_costs_are_refused_beside_a_batch(self, process: Callable[[], Process], cost: Any) -> None:
        one, rate = process(), limit(1000)
        one.warm(rate)
        with pytest.raises(ValueError, match="cost"):
            one.limiter.hit("k", rate, cost=cost)
        with pytest.raises(ValueError, match="cost"):
            one.limiter.hit_many([("k", rate, "default", cost)])

    def test_too_few_units_for_a_cost_are_given_back_and_count_for_it(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        one, rate = process(), limit(9, algorithm)
        one.warm(rate)
        assert count(gov, rate) == 6, "3, and then half of what is left"
        assert one.limiter.hit("k", rate, cost=6), "3 are spent, and 6 of 9 are left"
        assert count(gov, rate) == 9

    def test_several_limits(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one = process()
        rates = [limit(100, algorithm), Limit(30, 7200, algorithm)]
        assert one.hits(40, rates) == 30
        result = one.limiter.hit("k", rates)
        assert result.violated == rates[1]
        assert gov.counters.get("limits.leased") > 10

    def test_other_rates_operations_and_identities_have_batches_of_their_own(
        self, process: Callable[[], Process], redis_server: RedisServer
    ) -> None:
        one, rate = process(), limit(1000)
        one.warm(rate)
        for identity, other, operation in (("k", limit(999), "default"), ("k", rate, "op"), ("l", rate, "default")):
            assert one.leases.spend((identity, other, operation, 1)) is None
        assert one.leases.spend(("k", [rate], "default", 1)) is None
        assert one.leases.spend(("k", limit(1000), "default", 1)) is not None, "an equal rate"

    def test_hit_many_spends_too(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        results = one.limiter.hit_many([("k", rate), ("l", rate), ("k", rate)])
        assert [result.allowed for result in results] == [True] * 3
        assert gov.counters.get("limits.leased") == 2

    def test_a_rate_without_lease_and_other_methods_do_not(self, gov: GovRedis, process: Callable[[], Process]) -> None:
        one, rate = process(), limit(1000)
        one.warm(rate)
        leased = gov.counters.get("limits.leased")
        one.limiter.peek("k", rate)
        one.limiter.check("k", 1000, 3600)
        one.limiter.record("k", 3600)
        one.limiter.hit("k", "1000/hour")
        assert one.limiter.hit_or_reserve("k", rate, reservation="r")[0]
        assert gov.counters.get("limits.leased") == leased


class TestSharing:
    def test_several_processes_admit_n_in_all_and_nothing_is_lost(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        processes, rate = [process() for _ in range(3)], limit(500, algorithm)
        admitted = 0
        for _ in range(60):
            for one in processes:
                admitted += one.hits(4, rate)
        assert 400 <= admitted <= 500
        for one in processes:
            one.limiter.close()
        assert count(gov, rate) == admitted
        admitted += processes[0].hits(200, rate)
        assert admitted == 500

    def test_half_of_the_rest_is_left_to_others(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        greedy, other, rate = process(), process(), limit(1000, algorithm)
        greedy.hits(300, rate)
        rest = 1000 - count(gov, rate)
        assert rest >= 300
        assert other.limiter.hit("k", rate, cost=300)

    def test_a_batch_is_what_was_needed_in_the_last_lease_and_a_quarter_more(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        one, rate = process(), limit(100_000, algorithm)
        one.hits(500, rate)
        for _ in range(4):
            one.now += LEASE
            before = count(gov, rate)
            one.hits(100, rate)
        assert count(gov, rate) - before == 100, "26 of the last batch came back, and 26 of this one are unspent"
        one.now += 10 * LEASE
        assert one.hits(1, rate) == 1
        batch = one.leases._batches["k", "default", rate]
        assert batch.granted == 1 + 12, "100 in ten leases, a quarter more, and the call itself"

    def test_threads_do_not_wait_for_another_that_takes_a_batch(
        self, gov: GovRedis, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rate = process(), limit(1000)
        one.warm(rate)
        (batch,) = one.leases._batches.values()
        batch.take_unspent()
        asked, go_on = threading.Event(), threading.Event()
        lease = RedisLimitBackend.lease

        def late(backend: Any, key: str, limits: Any, cost: int, wanted: int, *rest: Any) -> Any:
            if wanted > cost:
                asked.set()
                assert go_on.wait(PATIENCE)
            return lease(backend, key, limits, cost, wanted, *rest)

        monkeypatch.setattr(RedisLimitBackend, "lease", late)
        taking = threading.Thread(target=lambda: one.hits(1, rate))
        taking.start()
        assert asked.wait(PATIENCE)
        before = count(gov, rate)
        assert one.hits(3, rate) == 3
        assert count(gov, rate) == before + 3
        go_on.set()
        taking.join(PATIENCE)

    def test_threads_spend_each_unit_once(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(600, algorithm)
        admitted = in_threads(*[lambda: one.hits(100, rate) for _ in range(8)])
        assert 300 <= sum(admitted) <= 600
        one.limiter.close()
        assert count(gov, rate) == sum(admitted)


class TestGivingBack:
    def test_with_the_next_batch(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(10_000, algorithm)
        one.hits(10, rate)
        assert count(gov, rate) > 10
        one.now += 1000 * LEASE
        assert one.hits(1, rate) == 1
        assert count(gov, rate) == 11, "and with so little demand it takes no batch"

    def test_by_a_thread_soon_after_the_end(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        assert count(gov, rate) == 8
        one.now += LEASE
        eventually(lambda: count(gov, rate) == 3)
        eventually(lambda: one.leases._thread is None)
        assert not one.leases.has_pending()

    def test_a_refusal_that_was_remembered_is_forgotten_then(
        self, gov: GovRedis, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rate = process(), limit(9)
        monkeypatch.setattr(Leases, "_start", lambda leases: None)
        one.warm(rate)
        tight = limit(5)
        for _ in range(2):
            assert not one.limiter.hit("k", tight)
        assert gov.counters.get("limits.denied_cached") == 1
        one.leases._give_back(list(one.leases._ending))
        assert one.limiter.hit("k", tight)

    def test_a_rest_that_redis_does_not_take_is_counted(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, algorithm: Any
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, **PATIENT)
        one, rate = Process(gov), limit(1000, algorithm)
        one.warm(rate)
        mortal_redis.kill()
        one.limiter.close()
        assert gov.counters.get("limits.lease_lost") == 5
        one.limiter.close()
        assert gov.counters.get("limits.lease_lost") == 5

    def test_beyond_local_entries_the_oldest_batch_is_forgotten_and_given_back(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, local_entries=2)
        one, rate = Process(gov), limit(1000)
        one.warm(rate)
        for identity in "lm":
            one.limiter.hit(identity, rate)
        assert one.leases.spend(("k", rate, "default", 1)) is None
        one.limiter.close()
        assert count(gov, rate) == 3


def test_wait_asks_again_after_each_lease(gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
    """Another process may give back by then, long before anything ages out."""
    one, rate, slept = process(), limit(9, algorithm), list[float]()
    one.warm(rate)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        one.limiter.close()

    waiting = RateLimiter(gov.internal.context, sleep=sleep, clock=lambda: 1000.0 + sum(slept))
    assert sum(waiting.hit("k", rate).allowed for _ in range(4)) == 3
    assert waiting.wait("k", rate, timeout=2 * LEASE)
    assert slept == [LEASE]
    assert not waiting.wait("k", limit(1, algorithm), timeout=LEASE / 2), "sooner than a lease it is not asked again"
    waiting.close()


class TestRefund:
    def test_gives_back_one_hit_and_once(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.warm(rate)
        result = one.limiter.hit("k", rate, cost=2)
        taken = count(gov, rate)
        assert result.refund()
        assert count(gov, rate) == taken - 2
        assert not result.refund()
        one.limiter.close()
        assert count(gov, rate) == taken - 2 - 3, "and the units that were not spent"

    def test_the_call_that_took_the_batch_gives_back_its_own(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.hits(2, rate)
        result = one.limiter.hit("k", rate)
        assert one.leases.has_pending()
        assert count(gov, rate) == 8
        assert result.refund()
        assert count(gov, rate) == 7
        assert one.hits(5, rate) == 5
        assert count(gov, rate) == 7

    def test_a_second_try_after_a_lost_reply_gives_back_no_more(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.hits(20, rate)
        result = one.limiter.hit("k", rate)
        taken = count(gov, rate)
        client = redis_of(gov)
        exchange = client._round_trip

        def lost(*args: Any, **options: Any) -> Any:
            exchange(*args, **options)
            monkeypatch.undo()
            raise BackendUnavailable("the reply was lost")

        monkeypatch.setattr(client, "_round_trip", lost)
        with pytest.raises(BackendUnavailable, match="lost"):
            result.refund()
        assert result.refund() in (True, False)
        assert count(gov, rate) == taken - 1

    def test_a_hit_without_lease_beside_one(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        """It counts at its own time, though a lease counts ahead of it."""
        one, rate = process(), limit(1000, algorithm)
        first = [one.limiter.hit("k", rate) for _ in range(2)]
        one.warm(rate)
        assert [result.refund() for result in first] == [True, True]
        result = one.limiter.hit("k", Limit(1000, 3600, algorithm))
        assert count(gov, rate) == 7
        assert result.refund()
        assert count(gov, rate) == 6

    def test_after_the_end_of_the_lease(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(1000, algorithm)
        results = [one.limiter.hit("k", rate) for _ in range(20)]
        one.limiter.close()
        assert count(gov, rate) == 20
        assert [result.refund() for result in results] == [True] * 20
        assert count(gov, rate) == 0


class TestReset:
    def test_ends_this_processs_leases(self, gov: GovRedis, process: Callable[[], Process], algorithm: Any) -> None:
        one, rate = process(), limit(1000, algorithm)
        one.hits(20, rate)
        one.limiter.reset("k")
        assert count(gov, rate) == 0
        one.hits(7, rate)
        one.limiter.close()
        assert count(gov, rate) == 7

    def test_units_from_before_take_nothing_from_what_came_after(
        self, gov: GovRedis, process: Callable[[], Process], algorithm: Any
    ) -> None:
        """A counter knows only numbers."""
        one, other, rate = process(), process(), limit(1000, algorithm)
        result = one.limiter.hit("k", rate)
        one.hits(19, rate)
        leased = one.limiter.hit("k", rate)
        assert one.leases.has_pending()
        other.limiter.reset("k")
        assert other.hits(50, rate) == 50
        other.limiter.close()
        assert not leased.refund()
        one.now += LEASE
        assert one.hits(1, rate) == 1
        one.limiter.close()
        assert count(gov, rate) == 51
        assert result.allowed


class TestOutage:
    def test_a_lease_is_spent_to_its_end_and_then_the_fallback_decides(
        self,
        make_gov: Callable[..., GovRedis],
        mortal_redis: RedisServer,
        postgres_server: PostgresServer,
        algorithm: Any,
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url)
        one, rate = Process(gov), limit(1000, algorithm)
        one.warm(rate)
        mortal_redis.kill()
        result = one.limiter.hit("k", rate)
        assert (result.allowed, result.backend, result.degraded) == (True, "redis", False)
        one.now += LEASE
        result = one.limiter.hit("k", rate)
        assert (result.allowed, result.backend, result.degraded) == (True, "postgres", True)
        assert result.remaining == 999
        assert one.hits(1000, rate) == 999, "and PostgreSQL decides each"

    def test_admissions_are_replicated_one_by_one(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=3600)
        rate = limit(1000)
        for _ in range(20):
            assert gov.limits.hit("k", rate)
        gov.limits.close()
        assert gov.postgres.fetch("SELECT cardinality(entries) FROM govredis_limit_windows") == [(20,)]


class TestScripts:
    """A script that arrives twice, as after a lost reply."""

    def lease(self, gov: GovRedis, rate: Limit, wanted: int, member: str = "m") -> Any:
        backend = gov.limits._decider.backends.redis
        assert backend is not None
        return backend._leases.take("rate_limit:default:k", RateLimits([rate]), 1, wanted, 10_000_000, None, member)

    def test_where_there_is_room_for_both(self, gov: GovRedis, algorithm: Any) -> None:
        rate = limit(100, algorithm)
        self.lease(gov, rate, 20)
        outcome, units = self.lease(gov, rate, 20)
        assert outcome.admitted
        assert units is None or units.granted == 20
        assert count(gov, rate) == 20

    def test_where_there_is_none(self, gov: GovRedis, algorithm: Any) -> None:
        rate = limit(2, algorithm)
        self.lease(gov, rate, 1)
        self.lease(gov, rate, 1, "n")
        outcome, units = self.lease(gov, rate, 1)
        assert (outcome.admitted, units) == (True, None)
        assert count(gov, rate) == 2
        assert not self.lease(gov, rate, 1, "o")[0].admitted


class TestFork:
    def test_a_child_neither_spends_nor_gives_back(self, gov: GovRedis, algorithm: Any) -> None:
        rate = limit(1000, algorithm)
        leases = gov.limits._decider._leases
        while not leases.has_pending():
            gov.limits.hit("k", rate)
        taken = count(gov, rate)

        def child() -> None:
            assert not leases.has_pending()
            assert gov.limits.hit("k", rate)
            assert count(gov, rate) == taken + 1
            gov.close()

        in_child(child)
        assert count(gov, rate) == taken + 1
        leased = gov.counters.get("limits.leased")
        for _ in range(3):
            assert gov.limits.hit("k", rate)
        assert gov.counters.get("limits.leased") == leased + 3
        assert count(gov, rate) == taken + 1


_SCRIPT = """
import json, os, signal, sys
from govredis import Config, GovRedis, Limit
settings, how, algorithm = json.loads(sys.argv[1])
gov = GovRedis(Config(**settings))
rate = Limit(1000, 3600, algorithm, lease=100)
for _ in range(50):
    assert gov.limits.hit("k", rate)
assert gov.limits._decider._leases.has_pending()
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "an exception":
    raise SystemError("that nobody catches")
"""


@pytest.mark.parametrize("how", ["after its last line", "an exception", "killed"])
def test_the_end_of_a_process(gov: GovRedis, redis_server: RedisServer, how: str, algorithm: Any) -> None:
    arguments = [{"redis_url": redis_server.url, "socket_timeout": 20, "connect_timeout": 20}, how, algorithm]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(arguments)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == {"killed": -9, "an exception": 1}.get(how, 0), done.stderr
    rate = limit(1000, algorithm)
    taken = count(gov, rate)
    if how == "killed":
        # Beside the call itself two and a half times as many as were spent so far, if those are four or more.
        assert taken == 1 + 1 + 6 + 21 + 73
    else:
        assert taken == 50
    assert sum(gov.limits.hit("k", limit(1000, algorithm)).allowed for _ in range(1100)) == 1000 - taken


class TestArguments:
    @pytest.mark.parametrize("lease", [0, -1, 0.0001, 6.1, True, "1", float("nan")])
    def test_a_bad_lease_is_refused(self, lease: Any) -> None:
        with pytest.raises(ValueError, match=r"lease.*0\.001 to a tenth of the shortest window, here 6"):
            Limit(10, 60, lease=lease)

    def test_a_tenth_of_the_shortest_window_of_a_rate(self, gov: GovRedis) -> None:
        with pytest.raises(ValueError, match="lease"):
            gov.limits.hit("k", [Limit(10, 3600, lease=100), Limit(5, 60)])
        assert gov.limits.hit("k", [Limit(10, 3600, lease=6), Limit(5, 60)])

    @pytest.mark.parametrize("window", [0.01, 0.07, 0.3, 1, 60, 86400])
    def test_exactly_a_tenth_is_right(self, window: float) -> None:
        assert RateLimits([Limit(10, window, lease=window * 0.1)]).lease_us == round(window * 100_000)
        assert RateLimits([Limit(10, window, lease=window / 10), Limit(10, window)]).lease_us

    def test_the_shortest_of_several_holds_for_all(self) -> None:
        rates = RateLimits([Limit(10, 60, lease=6), Limit(10, 60, lease=1), Limit(10, 60)])
        assert rates.lease_us == 1_000_000
