"""RateLimiter: results, the two-step calls, waiting, the decorator, the order of fallbacks, and what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
from support import OF_SENTINELS, PATIENT, POSTGRES_AWAY, REDIS_AWAY, eventually

from govredis import BackendUnavailable, Config, ConfigurationError, GovRedis, Limit, RateLimitExceeded, RateLimitResult
from govredis._context import Context
from govredis.limits import RateLimiter
from govredis.testing.servers import PostgresServer, RedisServer


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def local_limiter(clock: Clock, fallback: str = "local") -> RateLimiter:
    config = Config(redis_enabled=False, limit_fallback=fallback, local_entries=100)
    return RateLimiter(Context.of(config), sleep=clock.sleep, clock=clock)


class TestCalls:
    def test_hit(self, limits: RateLimiter, request: pytest.FixtureRequest) -> None:
        first = limits.hit("agent-123", "3/hour;2/minute", operation="kg_store")
        assert first
        assert (first.allowed, first.limit, first.remaining, first.retry_after) == (True, Limit(2, 60), 1, 0)
        assert 59 < first.reset_after <= 60
        assert first.violated is None
        backend = request.node.callspec.params["limits"]
        assert (first.backend, first.degraded) == (backend, backend != "redis")
        assert limits.hit("agent-123", "3/hour;2/minute", operation="kg_store", cost=1)
        refused = limits.hit("agent-123", "3/hour;2/minute", operation="kg_store")
        assert not refused
        assert refused.violated == refused.limit == Limit(2, 60)
        assert refused.remaining == 0
        assert 0 < refused.retry_after <= 60
        assert limits.get_count("agent-123", 3600, operation="kg_store") == 2

    def test_identities_and_operations_have_windows_of_their_own(self, limits: RateLimiter) -> None:
        assert limits.hit("a", "1/hour")
        assert not limits.hit("a", "1/hour")
        assert limits.hit("b", "1/hour")
        assert limits.hit("a", "1/hour", operation="other")
        assert not limits.hit("a", "1/hour", operation="default")

    def test_check_and_record_as_the_brief_has_them(self, limits: RateLimiter) -> None:
        for _ in range(20):
            assert limits.check("agent-123", limit=20, window=3600, operation="kg_store")
            limits.record("agent-123", window=3600, operation="kg_store")
        refused = limits.check("agent-123", limit=20, window=3600, operation="kg_store")
        assert not refused
        assert 0 < refused.retry_after <= 3600
        limits.record("agent-123", window=3600, operation="kg_store", cost=5)
        assert limits.get_count("agent-123", 3600, operation="kg_store") == 25

    def test_check_and_peek_record_nothing(self, limits: RateLimiter) -> None:
        assert limits.check("a", limit=1, window=60)
        assert limits.peek("a", "5/hour", cost=2).remaining == 3
        assert limits.get_count("a", 3600) == 0

    def test_require_raises_with_the_result(self, limits: RateLimiter) -> None:
        assert limits.require("a", "1/hour").remaining == 0
        with pytest.raises(RateLimitExceeded) as raised:
            limits.require("a", "1/hour")
        assert raised.value.result is not None
        assert raised.value.result.violated == Limit(1, 3600)

    def test_reset(self, limits: RateLimiter, request: pytest.FixtureRequest) -> None:
        limits.hit("a", "1/hour")
        if request.node.callspec.params["limits"] == "redis":
            limits.reset("a")
        else:
            with pytest.raises(BackendUnavailable):
                limits.reset("a")
        assert limits.hit("a", "1/hour"), "forgotten in each backend that can be reached"

    def test_cost_up_to_the_smallest_limit(self, limits: RateLimiter) -> None:
        assert limits.hit("a", "5/hour;3/minute", cost=3).remaining == 0
        with pytest.raises(ValueError, match="cost is 4; it must be at most 3"):
            limits.hit("b", "5/hour;3/minute", cost=4)

    def test_a_cost_too_large_for_a_log_is_told_what_takes_it(self, limits: RateLimiter) -> None:
        """The same in every backend, so that no backend refuses what another has admitted."""
        assert limits.hit("a", "1000000/hour", cost=10_000).remaining == 990_000
        for call in (limits.hit, limits.peek, limits.require):
            with pytest.raises(
                ValueError, match=r"cost is 10001; .* at most 10000 .*algorithm=\"sliding_window_counter\""
            ):
                call("a", "1000000/hour", cost=10_001)
        with pytest.raises(ValueError, match=r"algorithm=\"sliding_window_counter\""):
            limits.record("a", 3600, cost=10_001)
        with pytest.raises(ValueError, match=r"algorithm=\"sliding_window_counter\""):
            limits.rate_limited("1000000/hour", key="plain", cost=10_001)
        counted = limits.hit("a", Limit(1_000_000, 3600, "sliding_window_counter"), cost=100_000)
        assert counted.remaining == 900_000
        assert counted.refund()


class TestWait:
    def test_sleeps_until_it_is_admitted(self) -> None:
        clock = Clock()
        limiter = local_limiter(clock)
        for _ in range(2):
            assert limiter.wait("a", "1/10 s", timeout=10.0)
        assert clock.slept == [10.0]
        assert not limiter.peek("a", "1/10 s")

    def test_returns_a_refusal_at_once_where_it_would_take_too_long(self) -> None:
        clock = Clock()
        limiter = local_limiter(clock)
        limiter.hit("a", "1/10 s")
        refused = limiter.wait("a", "1/10 s", timeout=9.99)
        assert (refused.allowed, refused.retry_after, clock.slept) == (False, 10.0, [])

    @pytest.mark.parametrize("retry_after", [float("nan"), float("inf"), 9e12, -9e12, -1e-9, 0.0, 1e-9, 0.3], ids=repr)
    @pytest.mark.parametrize("timeout", [0, 0.0005, 1])
    def test_ends_by_its_timeout_whatever_a_refusal_says(self, retry_after: float, timeout: float) -> None:
        """A client that scores in microseconds had it poll 4,000 times a second, without end."""
        clock, asked = Clock(), []
        limiter, limit = local_limiter(clock), Limit(1, 10)
        refusal = RateLimitResult(False, limit, 0, retry_after, 10.0, limit, "redis", False)

        def refuse(*request: Any) -> RateLimitResult:
            asked.append(request)
            assert len(asked) < 2000, "it does not end"
            return refusal

        limiter._decider.decide = refuse  # type: ignore[method-assign]
        assert limiter.wait("a", limit, timeout=timeout) is refusal
        assert sum(clock.slept) <= timeout + 1e-9
        assert all(slept >= 0.001 for slept in clock.slept)

        @limiter.rate_limited(limit, key=lambda: "a", on_limit="wait", timeout=timeout)
        def limited() -> None: ...

        asked.clear()
        with pytest.raises(RateLimitExceeded):
            limited()

    def test_tries_again_where_others_came_first_and_never_in_a_busy_loop(self) -> None:
        clock = Clock()
        limiter = local_limiter(clock)
        limiter.hit("a", "1/10 s")
        sleep = clock.sleep

        def sleep_while_another_hits(seconds: float) -> None:
            sleep(seconds)
            if len(clock.slept) < 3:
                limiter.hit("a", "1/10 s")

        limiter._sleep = sleep_while_another_hits
        assert limiter.wait("a", "1/10 s", timeout=60)
        assert clock.slept == [10.0, 10.0, 10.0]
        # A millisecond's limit whose retry_after is below one.
        limiter._sleep = sleep
        limiter.hit("b", "1/0.001 s")
        clock.now += 0.0009
        assert limiter.wait("b", "1/0.001 s", timeout=1)
        assert clock.slept[-1] == 0.001

    @pytest.mark.parametrize("timeout", [-1, float("nan"), "1", None, True])
    def test_refuses_a_bad_timeout(self, timeout: Any) -> None:
        with pytest.raises(ValueError, match="timeout is"):
            local_limiter(Clock()).wait("a", "1/hour", timeout=timeout)


async def always(*args: Any) -> bool:
    return True


class TestDecorator:
    def test_limits_by_a_template_and_keeps_the_signature(self, limits: RateLimiter) -> None:
        @limits.rate_limited("2/hour", key="{agent_id}:{kind}", operation="kg_store")
        def store(agent_id: str, discovery: str, *, kind: str = "x") -> str:
            """Stores."""
            return discovery + kind

        assert (store("a", "d"), store("a", discovery="e")) == ("dx", "ex")
        with pytest.raises(RateLimitExceeded):
            store("a", "d")
        assert store("a", "d", kind="y") == "dy"
        assert limits.get_count("a:x", 3600, operation="kg_store") == 2
        assert (store.__name__, store.__doc__) == ("store", "Stores.")
        assert list(inspect.signature(store).parameters) == ["agent_id", "discovery", "kind"]

    def test_a_plain_key_is_a_limit_of_all_calls(self, limits: RateLimiter) -> None:
        @limits.rate_limited("2/hour", key="mail", operation="sent")
        def send(to: str) -> str:
            return to

        assert [send("ann"), send(to="bob")] == ["ann", "bob"]
        with pytest.raises(RateLimitExceeded):
            send("cyd")
        assert limits.get_count("mail", 3600, operation="sent") == 2, "also a direct call's"
        with pytest.raises(TypeError):
            send()  # type: ignore[call-arg]

    @pytest.mark.parametrize("key", ["", "a\nb", "{{to}}", "x" * 600])
    def test_a_plain_key_that_is_no_id_is_refused_at_decoration(self, key: str) -> None:
        with pytest.raises(ValueError, match=r"key is .*; it must be a non-empty str"):
            local_limiter(Clock()).rate_limited("2/hour", key=key)(lambda to: to)

    def test_a_key_whose_braces_were_forgotten_is_refused_at_decoration(self) -> None:
        def send(to: str) -> str:
            return to

        with pytest.raises(
            ValueError, match=r"key 'to' of .*send is the name of an argument; write '\{to\}' for a limit of each value"
        ):
            local_limiter(Clock()).rate_limited("2/hour", key="to")(send)

    @pytest.mark.parametrize("key", [None, 5, b"mail", always])
    def test_a_key_of_another_kind_is_refused_at_decoration(self, key: Any) -> None:
        with pytest.raises(ValueError, match=r"key is .*; it must be a template .*, a plain name, or a plain callable"):
            local_limiter(Clock()).rate_limited("2/hour", key=key)

    def test_key_and_rate_may_be_callables_of_the_arguments(self) -> None:
        limiter = local_limiter(Clock())

        @limiter.rate_limited(lambda who, plan: f"{plan}/hour", key=lambda who, plan: who.upper())
        def work(who: str, plan: int) -> int:
            return plan

        assert work("a", 1) == 1
        with pytest.raises(RateLimitExceeded):
            work("A", plan=1)
        assert work("a", plan=2) == 2

    def test_cost_may_be_a_number_or_a_callable_of_the_arguments(self) -> None:
        limiter = local_limiter(Clock())

        @limiter.rate_limited("5/hour", key="{who}", cost=lambda who, pages=1: pages)
        def read(who: str, pages: int = 1) -> int:
            return pages

        assert (read("a", 3), read("a"), read(who="a")) == (3, 1, 1)
        with pytest.raises(RateLimitExceeded):
            read("a")
        for pages in (0, 6, "2"):
            with pytest.raises(ValueError, match="cost is"):
                read("b", pages)  # type: ignore[arg-type]
        for on_limit in ("raise", "wait"):
            plain = limiter.rate_limited("5/hour", key="{who}", cost=4, operation="plain", on_limit=on_limit)(read)
            plain(on_limit)
            assert limiter.get_count(on_limit, 3600, operation="plain") == 4

    def test_an_exempt_call_is_not_asked_for_anything(self) -> None:
        limiter = local_limiter(Clock())
        asked = []

        def key(who: str, admin: bool = False) -> str:
            asked.append(who)
            return who

        for on_limit in ("raise", "wait"):

            @limiter.rate_limited(
                "1/hour", key=key, exempt=lambda who, admin=False: admin, on_limit=on_limit, timeout=0
            )
            def work(who: str, admin: bool = False) -> str:
                return who

            assert [work(on_limit, admin=True) for _ in range(3)] == [on_limit] * 3
            assert (asked, limiter.get_count(on_limit, 3600)) == ([], 0)
            assert work(on_limit) == on_limit
            with pytest.raises(RateLimitExceeded):
                work(on_limit)
            asked.clear()

    def test_a_change_of_the_limit_holds_from_the_next_call_on(self, limits: RateLimiter) -> None:
        plan = {"a": "2/hour"}

        @limits.rate_limited(lambda who: plan[who], key="{who}")
        def work(who: str) -> None: ...

        def admitted(calls: int) -> int:
            count = 0
            for _ in range(calls):
                try:
                    work("a")
                except RateLimitExceeded:
                    continue
                count += 1
            return count

        assert admitted(3) == 2
        plan["a"] = "4/hour;9/minute"
        assert admitted(3) == 2, "what was taken before counts"
        plan["a"] = "3/hour"
        assert admitted(3) == 0
        plan["a"] = "9/hour"
        assert admitted(9) == 5

    def test_methods(self) -> None:
        limiter = local_limiter(Clock())

        class Agent:
            name = "x"

            @limiter.rate_limited("1/hour", key="{self.name}")
            def act(self) -> int:
                return 1

        assert Agent().act() == 1
        with pytest.raises(RateLimitExceeded):
            Agent().act()

    def test_the_function_does_not_run_where_it_is_refused_and_its_errors_pass(self) -> None:
        ran = []
        limiter = local_limiter(Clock())

        @limiter.rate_limited("1/hour", key="{a}")
        def work(a: str) -> None:
            ran.append(a)
            raise KeyError(a)

        with pytest.raises(KeyError):
            work("a")
        with pytest.raises(RateLimitExceeded):
            work("a")
        assert ran == ["a"]

    def test_on_limit_wait(self) -> None:
        clock = Clock()

        @local_limiter(clock).rate_limited("1/10 s", key="{a}", on_limit="wait", timeout=15)
        def work(a: str) -> float:
            return clock.now

        assert (work("a"), work("a")) == (1000.0, 1010.0)
        clock.now += 0.0
        limiter = local_limiter(clock)
        limiter.hit("a", "1/20 s", operation="slow")
        with pytest.raises(RateLimitExceeded):
            limiter.rate_limited("1/20 s", key="{a}", operation="slow", on_limit="wait", timeout=15)(work)("a")

    @pytest.mark.parametrize(
        "options",
        [
            {"rate": "20/fortnight"},
            {"rate": None},
            {"key": "{nobody}"},
            {"key": "agent_id"},
            {"key": "{agent_id"},
            {"key": ""},
            {"key": None},
            {"key": 5},
            {"operation": "a:b"},
            {"operation": ""},
            {"on_limit": "retry"},
            {"timeout": -1},
            {"cost": 0},
            {"cost": 21},
            {"cost": True},
            {"cost": "1"},
            {"exempt": True},
            {"exempt": always},
        ],
    )
    def test_refuses_at_decoration(self, options: dict[str, Any]) -> None:
        rate = options.pop("rate", "20/hour")
        limiter = local_limiter(Clock())

        def work(agent_id: str) -> None: ...

        with pytest.raises(ValueError, match=r"must be|must name|names|key"):
            limiter.rate_limited(rate, **{"key": "{agent_id}", **options})(work)

    def test_refuses_a_bad_identity_at_the_call(self) -> None:
        @local_limiter(Clock()).rate_limited("1/hour", key="{a}")
        def work(a: str) -> None: ...

        with pytest.raises(ValueError, match="id is"):
            work("{brace}")


class TestFallback:
    def test_redis_then_postgres_then_local(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, mortal_postgres: PostgresServer
    ) -> None:
        """At most N per backend, also when a server dies in the middle of the traffic."""
        gov = make_gov(redis_url=mortal_redis.url, database_url=mortal_postgres.url, limit_deny_cache=False, **PATIENT)
        hits = lambda: [gov.limits.hit("a", "20/hour") for _ in range(30)]  # noqa: E731
        results = hits()
        mortal_redis.kill()
        results += hits()
        mortal_postgres.kill()
        results += hits()
        found = [(r.backend, r.degraded, r.allowed) for r in results]
        assert found == [
            (backend, backend != "redis", n < 20) for backend in ("redis", "postgres", "local") for n in range(30)
        ]
        counted = gov.counters.read()
        assert (counted["limits.allowed"], counted["limits.denied"]) == (60, 30)
        assert (counted["limits.degraded.postgres"], counted["limits.degraded.local"]) == (30, 30)

    @pytest.mark.parametrize(("fallback", "allowed"), [("deny", False), ("allow", True)])
    def test_deny_and_allow(self, make_gov: Callable[..., GovRedis], fallback: str, allowed: bool) -> None:
        gov = make_gov(redis_url=REDIS_AWAY, limit_fallback=fallback)
        for _ in range(3):
            result = gov.limits.hit("a", "1/hour")
            assert (result.allowed, result.backend, result.degraded) == (allowed, "none", True)
        assert (result.violated is None) == allowed
        assert (result.retry_after > 0) != allowed
        assert gov.counters.get("limits.degraded.none") == 3
        assert gov.limits.get_count("a", 3600) == 0

    def test_disabled_redis(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        result = make_gov(redis_enabled=False).limits.hit("a", "1/hour")
        assert (result.backend, result.degraded) == ("local", True)
        gov = make_gov(redis_enabled=False, database_url=postgres_server.url)
        assert gov.limits.hit("a", "1/hour").backend == "postgres"

    def test_missing_tables_are_an_error_that_says_what_to_run(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        url = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        with pytest.raises(ConfigurationError, match="govredis migrate"):
            make_gov(redis_url=REDIS_AWAY, database_url=url).limits.hit("a", "1/hour")

    def test_a_bad_answer_of_redis_is_an_error_not_an_outage(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("rate_limit:default:a", "text")
        with pytest.raises(Exception, match="WRONGTYPE"):
            gov.limits.hit("a", "1/hour")

    def test_redis_counts_again_once_it_is_back(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url)
        gov.limits.hit("a", "2/hour")
        mortal_redis.pause()
        assert gov.limits.hit("a", "2/hour").backend == "local"
        mortal_redis.resume()
        eventually(lambda: not gov.limits.peek("a", "2/hour").degraded)
        result = gov.limits.peek("a", "2/hour")
        # The hit that timed out may have been applied on waking: stricter, never more.
        assert result.remaining in {0, 1} or not result.allowed


class TestRefusals:
    BAD_IDS = ["", "{a}", "a}", "a\nb", "é" * 300, "a" * 513, b"a", None, 5.5, True, "\ud800"]

    @pytest.mark.parametrize("identity", BAD_IDS, ids=repr)
    def test_bad_ids_are_refused_before_anything_is_sent(self, gov: GovRedis, plain_redis: Any, identity: Any) -> None:
        plain_redis.config_resetstat()
        limits = gov.limits
        for call in (limits.hit, limits.peek, limits.require):
            with pytest.raises(ValueError, match="id is"):
                call(identity, "1/hour")
        for refused in (
            lambda: limits.wait(identity, "1/hour", timeout=1),
            lambda: limits.check(identity, 1, 1),
            lambda: limits.record(identity, 1),
            lambda: limits.get_count(identity, 1),
            lambda: limits.reset(identity),
        ):
            with pytest.raises(ValueError, match="id is"):
                refused()
        sent = set(plain_redis.info("commandstats")) - OF_SENTINELS
        assert sent <= {"cmdstat_config", "cmdstat_config|resetstat"}
        assert gov.postgres.statements == 0

    @pytest.mark.parametrize("cost", [0, -1, 1.0, True, "1", None, 10_001])
    def test_bad_costs(self, gov: GovRedis, plain_redis: Any, cost: Any) -> None:
        plain_redis.config_resetstat()
        for call in (gov.limits.hit, gov.limits.peek, gov.limits.require):
            with pytest.raises(ValueError, match="cost is"):
                call("a", "100000/hour", cost=cost)
        with pytest.raises(ValueError, match="cost is"):
            gov.limits.record("a", 1, cost=cost)
        assert not any("eval" in name for name in plain_redis.info("commandstats"))

    def test_bad_operations_rates_and_windows(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.config_resetstat()
        with pytest.raises(ValueError, match="operation is"):
            gov.limits.hit("a", "1/hour", operation="a:b")
        with pytest.raises(ValueError, match="rate is"):
            gov.limits.hit("a", "1/fortnight")
        with pytest.raises(ValueError, match="limit is"):
            gov.limits.check("a", 0, 1)
        with pytest.raises(ValueError, match="window is"):
            gov.limits.record("a", -1)
        with pytest.raises(ValueError, match="window is"):
            gov.limits.get_count("a", 0)
        assert not any("eval" in name for name in plain_redis.info("commandstats"))


class TestPurge:
    def test_deletes_the_windows_that_have_ended(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_enabled=False, database_url=postgres_server.url)
        gov.limits.hit("now", "1/hour")
        gov.postgres.fetch(  # more than are deleted at once
            "INSERT INTO govredis_limit_windows SELECT 'old' || n, '{}', 1, 5 FROM generate_series(1, 2500) n"
        )
        assert gov.limits.purge() == 2500
        gov.limits.hit("now", Limit(1, 3600, algorithm="sliding_window_counter"))
        gov.postgres.fetch(
            "INSERT INTO govredis_limit_counters SELECT 'old' || n / 9, 60, n, 1, 5 FROM generate_series(1, 2500) n"
        )
        assert gov.limits.purge() == 2500
        assert gov.postgres.fetch("SELECT key FROM govredis_limit_counters") == [("rate_limit:default:now",)]
        assert gov.postgres.fetch("SELECT key FROM govredis_limit_windows") == [("rate_limit:default:now",)]
        assert not gov.limits.hit("now", "1/hour").allowed
        assert gov.limits.purge() == 0

    def test_waits_for_nobody(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        gov = make_gov(redis_enabled=False, database_url=postgres_server.url)
        gov.postgres.fetch("INSERT INTO govredis_limit_windows VALUES ('held', '{}', 1, 5), ('free', '{}', 1, 5)")
        holder = psycopg2.connect(postgres_server.url)
        with holder.cursor() as cursor:
            cursor.execute("SELECT 1 FROM govredis_limit_windows WHERE key = 'held' FOR UPDATE")
            assert gov.limits.purge() == 1
        holder.rollback()  # closing alone does not wait until the server has noticed
        holder.close()
        assert gov.limits.purge() == 1

    def test_without_a_postgres_there_is_nothing(self, gov: GovRedis, make_gov: Callable[..., GovRedis]) -> None:
        assert make_gov(redis_url=gov.config.redis_url).limits.purge() == 0

    def test_raises_what_is_wrong(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        away = make_gov(redis_enabled=False, database_url=POSTGRES_AWAY)
        with pytest.raises(BackendUnavailable):
            away.limits.purge()
        unmigrated = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        with pytest.raises(ConfigurationError, match="govredis migrate"):
            make_gov(redis_enabled=False, database_url=unmigrated).limits.purge()
