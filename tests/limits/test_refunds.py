"""RateLimitResult.refund: the entries of a hit, given back once, to the backend that took them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import PATIENT, REDIS_AWAY, all_in_use, redis_of

from govredis import BackendUnavailable, GovRedis, Limit, RateLimitExceeded
from govredis.keys import sibling
from govredis.limits import RateLimiter, RateLimitResult
from govredis.testing.servers import PostgresServer, RedisServer

SECOND = 1_000_000


class TestResult:
    def test_gives_back_what_the_hit_took_and_once(self, limits: RateLimiter) -> None:
        limits.hit("a", "5/hour")
        result = limits.hit("a", "5/hour", cost=3)
        limits.hit("a", "5/hour")
        assert not limits.hit("a", "5/hour")
        assert result.refund() is True
        assert limits.get_count("a", 3600) == 2
        assert result.refund() is False
        assert limits.get_count("a", 3600) == 2
        assert limits.hit("a", "5/hour", cost=3).remaining == 0

    def test_every_limit_gets_it_back(self, limits: RateLimiter) -> None:
        assert limits.require("a", "2/hour;1/minute").refund()
        assert limits.wait("a", "2/hour;1/minute", timeout=0).refund()
        assert limits.hit("a", "2/hour;1/minute").remaining == 0

    def test_a_result_that_took_nothing_gives_nothing_back(self, limits: RateLimiter) -> None:
        taken = limits.hit("a", "1/hour")
        for result in (limits.hit("a", "1/hour"), limits.peek("a", "2/hour"), limits.check("a", 2, 3600)):
            assert result.refund() is False
        assert limits.get_count("a", 3600) == 1
        assert taken.refund()

    def test_after_a_reset_there_is_nothing_left(self, gov: GovRedis) -> None:
        before = gov.limits.hit("a", "1/hour")
        gov.limits.reset("a")
        after = gov.limits.hit("a", "1/hour")
        assert before.refund() is False
        assert gov.limits.get_count("a", 3600) == 1
        assert after.refund() is True

    def test_only_one_of_several_threads_gives_back(self, limits: RateLimiter) -> None:
        limits.hit("a", "9/hour")
        result = limits.hit("a", "9/hour")
        given: list[bool] = []
        threads = [threading.Thread(target=lambda: given.append(result.refund())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(given) == [False] * 7 + [True]
        assert limits.get_count("a", 3600) == 1

    @pytest.mark.parametrize(
        "how", [lambda r: pickle.loads(pickle.dumps(r)), copy.copy, copy.deepcopy, dataclasses.replace], ids=range(4)
    )
    def test_a_copy_is_equal_and_gives_nothing_back(
        self, limits: RateLimiter, how: Callable[[RateLimitResult], RateLimitResult]
    ) -> None:
        result = limits.hit("a", "2/hour")
        other = how(result)
        assert (other == result, repr(other)) == (True, repr(result))
        assert other.refund() is False
        assert limits.get_count("a", 3600) == 1
        assert result.refund() is True
        assert other == result

    def test_a_pickle_of_the_version_before_is_read(self) -> None:
        old = (
            b"\x80\x04\x95\xb5\x00\x00\x00\x00\x00\x00\x00\x8c\x17govredis.limits.limiter\x94\x8c\x0fRateLimitResult\x94\x93"
            b"\x94)\x81\x94N}\x94(\x8c\x07allowed\x94\x89\x8c\x05limit\x94K\x07\x8c\tremaining\x94K\x00\x8c\x0bretry_after"
            b"\x94G?\xe0\x00\x00\x00\x00\x00\x00\x8c\x0breset_after\x94G?\xf0\x00\x00\x00\x00\x00\x00\x8c\x08violated\x94N"
            b"\x8c\x07backend\x94\x8c\x05redis\x94\x8c\x08degraded\x94\x89u\x86\x94b."
        )
        read = pickle.loads(old)
        assert (type(read), read.retry_after, read.backend, read.refund()) == (RateLimitResult, 0.5, "redis", False)

    def test_the_result_that_an_error_carries_is_pickled_with_it(self, limits: RateLimiter) -> None:
        limits.hit("a", "1/hour")
        with pytest.raises(RateLimitExceeded) as raised:
            limits.require("a", "1/hour")
        assert pickle.loads(pickle.dumps(raised.value)).result == raised.value.result

    def test_shows_its_fields_and_nothing_else(self, limits: RateLimiter) -> None:
        result = limits.hit("a", "1/hour")
        assert set(dataclasses.asdict(result)) == {
            "allowed", "limit", "remaining", "retry_after", "reset_after", "violated", "backend", "degraded",
        }  # fmt: skip
        assert "taken" not in repr(result)

    @pytest.mark.parametrize("fallback", ["deny", "allow"])
    def test_an_answer_of_the_fallback_has_nothing_to_refund(
        self, make_gov: Callable[..., GovRedis], fallback: str
    ) -> None:
        gov = make_gov(redis_url=REDIS_AWAY, limit_fallback=fallback)
        assert gov.limits.hit("a", "1/hour").refund() is False


class TestOutages:
    def test_the_backend_that_admitted_is_refunded(
        self, make_gov: Callable[..., GovRedis], persistent_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=persistent_redis.url, database_url=postgres_server.url, **PATIENT)
        of_redis = gov.limits.hit("a", "5/hour", cost=2)
        gov.limits.hit("a", "5/hour")
        persistent_redis.kill()
        of_postgres = gov.limits.hit("a", "5/hour")
        with pytest.raises(BackendUnavailable):
            of_redis.refund()
        assert (of_postgres.backend, gov.limits.get_count("a", 3600)) == ("postgres", 1)
        persistent_redis.restart()
        assert persistent_redis.command("ZCARD", "rate_limit:default:a") == 3
        while gov.limits.peek("b", "5/hour").degraded:
            pass
        assert of_redis.refund() is True, "it may be tried again"
        assert of_redis.refund() is False
        assert persistent_redis.command("ZCARD", "rate_limit:default:a") == 1
        assert of_postgres.refund() is True
        assert persistent_redis.command("ZCARD", "rate_limit:default:a") == 1

    def test_a_counters_refund_whose_reply_was_lost_is_tried_once(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Redis remembers few calls of a counter: after others a second try would give back twice."""
        gov = make_gov(redis_url=redis_server.url)
        rate = Limit(1000, 3600, "sliding_window_counter")
        result = gov.limits.hit("a", rate, cost=2)
        client = redis_of(gov)
        exchange = client._round_trip

        def lost(*args: Any, **options: Any) -> Any:
            exchange(*args, **options)
            monkeypatch.undo()
            raise BackendUnavailable("the reply was lost")

        monkeypatch.setattr(client, "_round_trip", lost)
        with pytest.raises(BackendUnavailable, match="lost"):
            result.refund()
        for _ in range(20):
            gov.limits.hit("a", rate)
        assert result.refund() is False
        assert gov.limits.get_count("a", 3600) == 20

    @pytest.mark.parametrize("algorithm", ["sliding_window_log", "sliding_window_counter"])
    def test_a_refund_that_could_not_be_sent_may_be_tried_again(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, algorithm: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, redis_connections=1)
        result = gov.limits.hit("a", Limit(1000, 3600, algorithm))
        with all_in_use(redis_of(gov)._pool), pytest.raises(BackendUnavailable, match="in use"):
            result.refund()
        assert result.refund() is True

    def test_a_refund_by_postgres_is_tried_once(
        self, make_gov: Callable[..., GovRedis], mortal_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_enabled=False, database_url=mortal_postgres.url, **PATIENT)
        result = gov.limits.hit("a", "5/hour")
        assert result.backend == "postgres"
        mortal_postgres.kill()
        with pytest.raises(BackendUnavailable):
            result.refund()
        assert result.refund() is False


class TestStores:
    """`refund` of each backend."""

    def test_removes_the_entries_of_that_outcome_only(self, clocked: Any) -> None:
        limits = [Limit(9, 60)]
        outcomes = []
        for cost in (1, 3, 2):
            outcomes.append((clocked.backend.decide("k", limits, cost, "hit"), cost, clocked.now))
            clocked.now += 7
        second, cost, _ = outcomes[1]
        assert clocked.backend.refund("k", second.entries, cost)
        assert clocked.entries("k") == [outcomes[0][2]] + [outcomes[2][2]] * 2
        assert not clocked.backend.refund("k", second.entries, cost)
        assert len(clocked.entries("k")) == 3

    def test_no_more_than_its_own_entries_of_the_same_microsecond(self, clocked: Any) -> None:
        limits = [Limit(9, 60)]
        first = clocked.backend.decide("k", limits, 2, "hit")
        clocked.backend.decide("k", limits, 3, "hit")
        clocked.backend.refund("k", first.entries, 2)
        assert clocked.entries("k") == [clocked.now] * 3

    def test_the_last_one(self, clocked: Any) -> None:
        outcome = clocked.backend.decide("k", [Limit(1, 60)], 1, "hit")
        assert clocked.backend.refund("k", outcome.entries, 1)
        assert clocked.entries("k") == []
        assert clocked.backend.decide("k", [Limit(1, 60)], 1, "hit").admitted

    def test_entries_that_were_pruned_or_reset_are_gone(self, clocked: Any) -> None:
        outcome = clocked.backend.decide("k", [Limit(1, 1)], 1, "hit")
        clocked.now += SECOND
        clocked.backend.decide("k", [Limit(1, 1)], 1, "hit")
        assert not clocked.backend.refund("k", outcome.entries, 1)
        assert clocked.backend.count("k", SECOND) == 1
        clocked.backend.reset("k")
        assert not clocked.backend.refund("k", outcome.entries, 1)
        assert not clocked.backend.refund("unknown", outcome.entries, 1)

    def test_the_widest_window_stays_known(self, clocked: Any) -> None:
        outcome = clocked.backend.decide("k", [Limit(5, 60)], 1, "hit")
        clocked.backend.decide("k", [Limit(5, 1)], 1, "hit")
        clocked.backend.refund("k", outcome.entries, 1)
        clocked.now += 30 * SECOND
        clocked.backend.decide("k", [Limit(5, 1)], 1, "hit")
        assert clocked.backend.count("k", 60 * SECOND) == 2

    def test_redis_keeps_the_ttl_and_other_clients_entries(self, clocked_redis: Any) -> None:
        clocked_redis.server.command("ZADD", "k", clocked_redis.now // SECOND, "theirs")
        outcome = clocked_redis.backend.decide("k", [Limit(5, 60)], 2, "hit")
        clocked_redis.server.command("PEXPIRE", "k", 5000)
        assert clocked_redis.backend.refund("k", outcome.entries, 2)
        assert clocked_redis.server.command("ZRANGE", "k", 0, -1) == ["theirs"]
        assert 0 < clocked_redis.server.command("PTTL", "k") <= 5000
        assert clocked_redis.server.command("GET", sibling("k", "window")) == "60000000"

    def test_postgres_sees_what_came_while_it_waited_for_the_row(
        self, postgres_server: PostgresServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        import psycopg2

        gov = make_gov(redis_enabled=False, database_url=postgres_server.url)
        result = gov.limits.hit("a", "9/hour", cost=2)
        holder, watcher = psycopg2.connect(postgres_server.url), psycopg2.connect(postgres_server.url)
        watcher.autocommit = True
        given: list[bool] = []
        try:
            with holder.cursor() as cursor, watcher.cursor() as look:
                cursor.execute("UPDATE govredis_limit_windows SET entries = ARRAY[1, 2] || entries || entries[1] + 9")
                thread = threading.Thread(target=lambda: given.append(result.refund()))
                thread.start()
                while True:
                    look.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                    if look.fetchone() != (0,):
                        break
                holder.commit()
                thread.join()
                look.execute("SELECT entries[:2], cardinality(entries) FROM govredis_limit_windows")
                assert (given, look.fetchone()) == ([True], ([1, 2], 3))
        finally:
            holder.close()
            watcher.close()
