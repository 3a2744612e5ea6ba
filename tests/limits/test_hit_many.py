"""RateLimiter.hit_many: several hits, each for itself, in one round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from support import PATIENT, redis_of

from govredis import BackendError, BackendUnavailable, Config, GovRedis, Limit
from govredis._context import Context
from govredis.limits import RateLimiter
from govredis.limits.backends.backend import Mode, Outcome
from govredis.limits.backends.memory_backend import MemoryLimitBackend
from govredis.testing.servers import PostgresServer, RedisServer


class TestHitMany:
    def test_each_is_decided_for_itself_and_in_order(self, limits: RateLimiter) -> None:
        results = limits.hit_many([("a", "2/hour"), ("b", "1/hour"), ("a", "2/hour"), ("b", "1/hour"), ("a", "2/hour")])
        assert [r.allowed for r in results] == [True, True, True, False, False]
        assert [r.remaining for r in results] == [1, 0, 0, 0, 0]
        assert [r.limit for r in results[:2]] == [Limit(2, 3600), Limit(1, 3600)]
        assert results[3].violated == Limit(1, 3600)
        assert 0 < results[3].retry_after <= 3600
        assert (limits.get_count("a", 3600), limits.get_count("b", 3600)) == (2, 1)

    def test_operation_and_cost_may_be_given_once_for_all(self, limits: RateLimiter) -> None:
        rate = [Limit(5, 3600), Limit(4, 60)]
        limits.hit_many([("a", rate), ("a", rate, "other"), ("a", rate, "other", 1)], operation="op", cost=2)
        assert limits.get_count("a", 3600, operation="op") == 2
        assert limits.get_count("a", 3600, operation="other") == 3
        assert limits.get_count("a", 3600) == 0

    def test_results_are_those_of_hit(self, limits: RateLimiter, request: pytest.FixtureRequest) -> None:
        (result,) = limits.hit_many([("a", "2/hour")])
        backend = request.node.callspec.params["limits"]
        assert (result.backend, result.degraded) == (backend, backend != "redis")
        assert result.refund() is True
        assert limits.get_count("a", 3600) == 0
        assert limits.hit_many([]) == []

    def test_one_round_trip_and_an_unknown_script_costs_one_more(self, gov: GovRedis, plain_redis: Any) -> None:
        trips: list[int] = []
        client: Any = redis_of(gov)
        round_trip = client._round_trip
        client._round_trip = lambda packed, replies=0, **rest: (
            trips.append(replies) or round_trip(packed, replies, **rest)
        )
        asked = [(f"a{n}", "1/hour") for n in range(100)]
        assert all(gov.limits.hit_many(asked))
        plain_redis.script_flush()
        assert not any(gov.limits.hit_many(asked))
        # The server may know the script of the first from an earlier test.
        assert trips in ([100, 100, 100], [100, 100, 100, 100])
        assert (gov.counters.get("limits.allowed"), gov.counters.get("limits.denied")) == (100, 100)

    def test_while_redis_is_away_the_fallback_decides_each(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url, limit_deny_cache=False, **PATIENT)
        asked = [("a", "2/hour"), ("b", "1/hour"), ("b", "1/hour")]
        assert [(r.backend, r.allowed) for r in gov.limits.hit_many(asked)] == [
            ("redis", True), ("redis", True), ("redis", False),
        ]  # fmt: skip
        mortal_redis.kill()
        assert [(r.backend, r.degraded, r.allowed) for r in gov.limits.hit_many(asked)] == [
            ("postgres", True, True), ("postgres", True, True), ("postgres", True, False),
        ]  # fmt: skip
        assert gov.counters.get("limits.degraded.postgres") == 3

    def test_redis_is_not_asked_again_for_hits_that_it_may_have_admitted(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        """A Redis that became a replica in the middle, for example."""
        gov = make_gov(redis_url=mortal_redis.url, **PATIENT)
        gov.limits.hit("warm", "9/hour")
        client: Any = redis_of(gov)
        sent: list[int] = []
        pipeline, run = client.pipeline, client.run

        def demote_it(commands: Any, scripts: Any, **options: Any) -> Any:
            pipeline(commands[:1], scripts, **options)
            mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
            return pipeline(commands[1:], scripts, **options)

        client.pipeline = demote_it
        client.run = lambda *args: sent.append(1) or run(*args)
        results = gov.limits.hit_many([("a", "2/hour"), ("b", "2/hour")])
        assert [r.backend for r in results] == ["local", "local"]
        assert sent == []
        assert mortal_redis.command("ZCARD", "rate_limit:default:a") == 1

    def test_a_backend_that_goes_away_in_the_middle_leaves_all_of_them_to_the_next(self) -> None:
        class Leaving(MemoryLimitBackend):
            calls = 0

            def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
                self.calls += 1
                if self.calls == 3:
                    raise BackendUnavailable("away")
                return super().decide(key, limits, cost, mode)

        limiter, leaving = RateLimiter(Context.of(Config(redis_enabled=False))), Leaving(10)
        limiter._decider.backends.servers.append(leaving)
        results = limiter.hit_many([("a", "2/hour")] * 3)
        assert [(r.backend, r.allowed) for r in results] == [("local", True), ("local", True), ("local", False)]
        assert leaving.count("rate_limit:default:a", 3_600_000_000) == 2, "its admissions count there"

    def test_a_hit_whose_key_holds_something_else_is_refused_alone(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("rate_limit:default:b", "text")
        results = gov.limits.hit_many([("a", "1/hour"), ("b", "1/hour"), ("c", "1/hour")])
        assert [(r.allowed, r.backend) for r in results] == [(True, "redis"), (False, "none"), (True, "redis")]
        with pytest.raises(BackendError, match="rate_limit:default:b"):
            gov.limits.hit("b", "1/hour")
        assert [gov.limits.get_count(i, 3600) for i in "ac"] == [1, 1]

    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            (("{a}", "1/hour"), "id is"),
            (("b", "1/fortnight"), "rate is"),
            (("b", "1/hour", "a:b"), "operation is"),
            (("b", "1/hour", "op", 2), "cost is 2; it must be at most 1"),
            (("b", "1/hour", "op", True), "cost is"),
            (("b",), "hit is"),
            (("b", "1/hour", "op", 1, 1), "hit is"),
            ("ab", "hit is"),
            (None, "hit is"),
        ],
        ids=repr,
    )
    def test_refuses_before_anything_is_sent(self, gov: GovRedis, bad: Any, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            gov.limits.hit_many([("a", "1/hour"), bad])
        assert gov.limits.get_count("a", 3600) == 0
