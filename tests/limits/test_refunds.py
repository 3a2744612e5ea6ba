"""RateLimitResult.refund: what a hit took, given back once, in the store that it was taken from."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from govredis import BackendUnavailable, GovRedis, Limit, RateLimitExceeded
from govredis.keys import sibling
from govredis.limits import RateLimiter, RateLimitResult
from govredis.testing.servers import PostgresServer, RedisServer

SECOND = 1_000_000
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def keeping_redis(redis_binary: str) -> Iterator[RedisServer]:
    """One that keeps its data over a kill."""
    with RedisServer(binary=redis_binary, persistent=True) as server:
        yield server


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

    def test_what_took_nothing_gives_nothing_back(self, limits: RateLimiter) -> None:
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

    def test_one_thread_of_several_gives_back(self, limits: RateLimiter) -> None:
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

    def test_what_was_pickled_by_the_version_before_is_read(self) -> None:
        old = (
            b"\x80\x04\x95\xb5\x00\x00\x00\x00\x00\x00\x00\x8c\x17govredis.limits.limiter\x94\x8c\x0fRateLimitResult\x94\x93"
            b"\x94)\x81\x94N}\x94(\x8c\x07allowed\x94\x89\x8c\x05limit\x94K\x07\x8c\tremaining\x94K\x00\x8c\x0bretry_after"
            b"\x94G?\xe0\x00\x00\x00\x00\x00\x00\x8c\x0breset_after\x94G?\xf0\x00\x00\x00\x00\x00\x00\x8c\x08violated\x94N"
            b"\x8c\x07backend\x94\x8c\x05redis\x94\x8c\x08degraded\x94\x89u\x86\x94b."
        )
        read = pickle.loads(old)
        assert (type(read), read.retry_after, read.backend, read.refund()) == (RateLimitResult, 0.5, "redis", False)

    def test_the_one_that_an_error_carries_is_pickled_with_it(self, limits: RateLimiter) -> None:
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
    def test_where_the_fallback_decided_without_a_store(self, make_gov: Callable[..., GovRedis], fallback: str) -> None:
        gov = make_gov(redis_url=NOWHERE, limit_fallback=fallback)
        assert gov.limits.hit("a", "1/hour").refund() is False


class TestOutages:
    def test_the_store_that_admitted_is_the_one_refunded(
        self, make_gov: Callable[..., GovRedis], keeping_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=keeping_redis.url, database_url=postgres_server.url)
        of_redis = gov.limits.hit("a", "5/hour", cost=2)
        gov.limits.hit("a", "5/hour")
        keeping_redis.kill()
        of_postgres = gov.limits.hit("a", "5/hour")
        with pytest.raises(BackendUnavailable):
            of_redis.refund()
        assert (of_postgres.backend, gov.limits.get_count("a", 3600)) == ("postgres", 1)
        keeping_redis.restart()
        assert keeping_redis.command("ZCARD", "rate_limit:default:a") == 3
        while gov.limits.peek("b", "5/hour").degraded:
            pass
        assert of_redis.refund() is True, "it may be tried again"
        assert of_redis.refund() is False
        assert keeping_redis.command("ZCARD", "rate_limit:default:a") == 1
        assert of_postgres.refund() is True
        assert keeping_redis.command("ZCARD", "rate_limit:default:a") == 1

    def test_of_postgres_it_is_tried_once(
        self, make_gov: Callable[..., GovRedis], mortal_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_enabled=False, database_url=mortal_postgres.url)
        result = gov.limits.hit("a", "5/hour")
        assert result.backend == "postgres"
        mortal_postgres.kill()
        with pytest.raises(BackendUnavailable):
            result.refund()
        assert result.refund() is False


class TestStores:
    """Each store's `refund`."""

    def test_removes_the_entries_of_that_outcome_only(self, store: Any) -> None:
        limits = [Limit(9, 60)]
        outcomes = []
        for cost in (1, 3, 2):
            outcomes.append((store.window.decide("k", limits, cost, "hit"), cost, store.now))
            store.now += 7
        second, cost, _ = outcomes[1]
        assert store.window.refund("k", second.entries, cost)
        assert store.entries("k") == [outcomes[0][2]] + [outcomes[2][2]] * 2
        assert not store.window.refund("k", second.entries, cost)
        assert len(store.entries("k")) == 3

    def test_of_those_at_the_same_microsecond_no_more_than_its_own(self, store: Any) -> None:
        limits = [Limit(9, 60)]
        first = store.window.decide("k", limits, 2, "hit")
        store.window.decide("k", limits, 3, "hit")
        store.window.refund("k", first.entries, 2)
        assert store.entries("k") == [store.now] * 3

    def test_the_last_one(self, store: Any) -> None:
        outcome = store.window.decide("k", [Limit(1, 60)], 1, "hit")
        assert store.window.refund("k", outcome.entries, 1)
        assert store.entries("k") == []
        assert store.window.decide("k", [Limit(1, 60)], 1, "hit").admitted

    def test_what_has_been_pruned_or_reset_is_gone(self, store: Any) -> None:
        outcome = store.window.decide("k", [Limit(1, 1)], 1, "hit")
        store.now += SECOND
        store.window.decide("k", [Limit(1, 1)], 1, "hit")
        assert not store.window.refund("k", outcome.entries, 1)
        assert store.window.count("k", SECOND) == 1
        store.window.reset("k")
        assert not store.window.refund("k", outcome.entries, 1)
        assert not store.window.refund("unknown", outcome.entries, 1)

    def test_the_widest_window_stays_known(self, store: Any) -> None:
        outcome = store.window.decide("k", [Limit(5, 60)], 1, "hit")
        store.window.decide("k", [Limit(5, 1)], 1, "hit")
        store.window.refund("k", outcome.entries, 1)
        store.now += 30 * SECOND
        store.window.decide("k", [Limit(5, 1)], 1, "hit")
        assert store.window.count("k", 60 * SECOND) == 2

    def test_of_redis_another_clients_entries_and_the_ttl_stay(self, redis_store: Any) -> None:
        redis_store.server.command("ZADD", "k", redis_store.now // SECOND, "theirs")
        outcome = redis_store.window.decide("k", [Limit(5, 60)], 2, "hit")
        redis_store.server.command("PEXPIRE", "k", 5000)
        assert redis_store.window.refund("k", outcome.entries, 2)
        assert redis_store.server.command("ZRANGE", "k", 0, -1) == ["theirs"]
        assert 0 < redis_store.server.command("PTTL", "k") <= 5000
        assert redis_store.server.command("GET", sibling("k", "window")) == "60000000"

    def test_of_postgres_one_that_waits_for_the_row_sees_what_came_meanwhile(
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
