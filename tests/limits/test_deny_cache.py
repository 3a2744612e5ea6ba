"""Denials remembered in the process: no round trip, the same answer, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import REDIS_AWAY, in_child, in_threads, redis_of

from govredis import BackendUnavailable, Config, GovRedis, Limit
from govredis._context import Context
from govredis._counters import Counters
from govredis._teller import Teller
from govredis.keys import Keys
from govredis.limits import RateLimiter, RateLimitResult
from govredis.limits.backends.backend import Mode, Outcome
from govredis.limits.backends.memory_backend import MemoryLimitBackend
from govredis.limits.deny_cache import DenyCache
from govredis.testing.servers import PostgresServer, RedisServer


class Clock:
    """The clock of server and process. Each reading takes a millisecond, so that there is a before and an after."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Server(MemoryLimitBackend):
    """A backend that passes for Redis, and counts how often it is asked."""

    name = "redis"
    on_server = True
    asked = 0
    away = False

    def decide(self, key: str, limits: Any, cost: int, mode: Mode) -> Outcome:
        self.asked += 1
        if self.away:
            raise BackendUnavailable("away")
        return super().decide(key, limits, cost, mode)


def limiter_of(
    server: MemoryLimitBackend, clock: Clock, entries: int = 100, counters: Counters | None = None
) -> RateLimiter:
    """The limiter of a process."""
    config = Config(redis_enabled=False, local_entries=entries)
    counters = counters or Counters()
    context = Context(config, Keys(), None, None, counters, Teller(None, counters))
    made = RateLimiter(context, sleep=clock.sleep, clock=clock)
    made._decider.backends.servers.insert(0, server)
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(1000, clock)


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def limiter(server: Server, clock: Clock, counters: Counters) -> RateLimiter:
    return limiter_of(server, clock, counters=counters)


def denied(limiter: RateLimiter, identity: str = "a", rate: Any = "1/10 s", **options: Any) -> Any:
    """The denial of a second hit."""
    limiter.hit(identity, rate, **options)
    result = limiter.hit(identity, rate, **options)
    assert not result.allowed
    return result


class TestAnswers:
    def test_the_same_call_is_refused_again_without_a_question(
        self, limiter: RateLimiter, server: Server, counters: Counters
    ) -> None:
        first = denied(limiter)
        again = [limiter.hit("a", "1/10 s") for _ in range(5)]
        assert server.asked == 2
        for result in again:
            assert (result.allowed, result.limit, result.remaining) == (False, Limit(1, 10), 0)
            assert (result.violated, result.backend, result.degraded) == (first.violated, "redis", False)
            assert result.refund() is False
        assert counters.read() == {"limits.allowed": 1, "limits.denied": 6, "limits.denied_cached": 5}

    def test_its_times_count_down_to_the_instant_the_first_answer_named(
        self, limiter: RateLimiter, clock: Clock, server: Server
    ) -> None:
        first = denied(limiter, rate="2/10 s", cost=2)
        received = clock.now
        for _ in range(3):
            clock.now += 0.25
            again = limiter.hit("a", "2/10 s", cost=2)
            assert again.retry_after == pytest.approx(received + first.retry_after - clock.now)
            assert again.reset_after == pytest.approx(received + first.reset_after - clock.now)
        assert server.asked == 2

    def test_it_is_believed_until_its_retry_after_counted_from_before_it_was_asked(
        self, limiter: RateLimiter, clock: Clock, server: Server
    ) -> None:
        limiter.hit("a", "1/0.5 s")
        clock.now += 0.2
        before = clock.now + 0.001  # the reading before it is sent
        first = limiter.hit("a", "1/0.5 s")
        clock.now = before + first.retry_after - 0.002
        assert not limiter.hit("a", "1/0.5 s")
        assert server.asked == 2
        assert limiter.hit("a", "1/0.5 s"), "admitted the moment the server admits it"
        assert server.asked == 3

    def test_it_is_believed_for_a_second_at_most(self, limiter: RateLimiter, clock: Clock, server: Server) -> None:
        denied(limiter, rate="1/hour")
        sent = clock.now
        clock.now = sent + 0.99
        limiter.hit("a", "1/hour")
        assert server.asked == 2
        clock.now = sent + 1.001
        limiter.hit("a", "1/hour")
        assert server.asked == 3

    def test_a_denial_that_took_longer_to_come_than_it_holds_is_not_kept(
        self, limiter: RateLimiter, clock: Clock, server: Server
    ) -> None:
        decide = server.decide

        def slowly(*args: Any) -> Outcome:
            outcome = decide(*args)
            clock.now += 2
            return outcome

        limiter.hit("a", "1/10 s")
        server.decide = slowly  # type: ignore[method-assign]
        limiter.hit("a", "1/10 s")
        limiter.hit("a", "1/10 s")
        assert server.asked == 3

    def test_peek_and_check_are_answered_and_remembered_too_and_not_counted(
        self, limiter: RateLimiter, server: Server, counters: Counters
    ) -> None:
        limiter.record("a", 10)
        assert not limiter.check("a", 1, 10)
        for ask in (limiter.hit, limiter.peek):
            assert not ask("a", Limit(1, 10))
        assert not limiter.check("a", 1, 10)
        assert server.asked == 2
        assert counters.read() == {"limits.denied": 1, "limits.denied_cached": 1}

    def test_record_is_not_refused(self, limiter: RateLimiter) -> None:
        """Not even where somebody's limit is the one that it is sent with."""
        rate = Limit(10_000, 10)
        limiter.hit("a", rate, cost=10_000)
        assert not limiter.hit("a", rate)
        limiter.record("a", 10)
        assert limiter.get_count("a", 10) == 10_001

    def test_an_admission_is_never_remembered(self, limiter: RateLimiter, server: Server) -> None:
        for _ in range(3):
            assert limiter.peek("a", "9/hour")
            assert limiter.hit("a", "9/hour")
        assert server.asked == 6

    @pytest.mark.parametrize(
        "other",
        [
            {"identity": "b"},
            {"operation": "other"},
            {"rate": "2/10 s"},
            {"rate": Limit(2, 10)},
            {"rate": [Limit(2, 10)]},
            {"cost": 1},
        ],
        ids=str,
    )
    def test_another_question_is_asked(self, limiter: RateLimiter, server: Server, other: dict[str, Any]) -> None:
        denied(limiter, rate="2/10  s", cost=2)
        given = {"identity": "a", "rate": "2/10  s", "cost": 2, **other}
        asked = server.asked
        limiter.hit(given.pop("identity"), given.pop("rate"), **given)
        assert server.asked == asked + 1

    @pytest.mark.parametrize("rate", ["1/10 s", Limit(1, 10), [Limit(1, 10)], (Limit(1, 10), Limit(9, 60))], ids=str)
    def test_every_form_of_a_rate(self, limiter: RateLimiter, server: Server, rate: Any) -> None:
        denied(limiter, rate=rate)
        assert not limiter.hit("a", rate)
        assert server.asked == 2

    def test_a_list_that_its_owner_changes(self, limiter: RateLimiter, server: Server) -> None:
        rate = [Limit(1, 10)]
        denied(limiter, rate=rate)
        rate[0] = Limit(2, 10)
        assert limiter.hit("a", rate), "a change of the limit holds at the next call"

    def test_bad_arguments_are_refused_after_a_denial_too(self, limiter: RateLimiter) -> None:
        denied(limiter)
        for wrong in (
            lambda: limiter.hit("a", "1/10 s", cost=True),
            lambda: limiter.hit("a", "1/10 s", cost=1.0),  # type: ignore[arg-type]
            lambda: limiter.hit(["a"], "1/10 s"),  # type: ignore[arg-type]
            lambda: limiter.hit("a", "1/10 s", operation={}),  # type: ignore[arg-type]
            lambda: limiter.hit("a", None),  # type: ignore[arg-type]
        ):
            with pytest.raises(ValueError, match="must be"):
                wrong()

    def test_hit_many_asks_only_for_the_others(self, gov: GovRedis) -> None:
        denied(gov.limits, rate="1/hour")
        client: Any = redis_of(gov)
        pipeline, sent = client.pipeline, []
        client.pipeline = lambda commands, *rest, **how: sent.extend(commands) or pipeline(commands, *rest, **how)
        results = gov.limits.hit_many([("a", "1/hour"), ("b", "1/hour"), ("a", "1/hour"), ("b", "1/hour")])
        assert [r.allowed for r in results] == [False, True, False, False]
        assert len(sent) == 2
        assert [r.allowed for r in gov.limits.hit_many([("b", "1/hour")])] == [False]
        assert len(sent) == 2, "what it was denied is remembered as well"


class TestGivenBack:
    def test_by_this_process_it_is_seen_at_once(self, limiter: RateLimiter) -> None:
        taken = limiter.hit("a", "1/hour")
        assert not limiter.hit("a", "1/hour")
        assert taken.refund()
        assert limiter.hit("a", "1/hour")
        assert not limiter.hit("a", "1/hour")
        limiter.reset("a")
        assert limiter.hit("a", "1/hour")

    def test_by_another_process_it_is_seen_within_a_second(
        self, limiter: RateLimiter, server: Server, clock: Clock
    ) -> None:
        denied(limiter, rate="1/hour")
        sent = clock.now
        limiter_of(server, clock).reset("a")
        assert not limiter.hit("a", "1/hour")
        clock.now = sent + 1
        assert limiter.hit("a", "1/hour")

    @pytest.mark.parametrize("give_back", ["reset", "refund"])
    def test_a_denial_from_before_that_comes_after_it_does_not_count(
        self, limiter: RateLimiter, server: Server, give_back: str
    ) -> None:
        """Another thread gives back between the decision and its answer."""
        taken = limiter.hit("a", "1/hour")
        decide = server.decide

        def overtaken(*args: Any) -> Outcome:
            outcome = decide(*args)
            limiter.reset("a") if give_back == "reset" else taken.refund()
            return outcome

        server.decide = overtaken  # type: ignore[method-assign]
        assert not limiter.hit("a", "1/hour")
        server.decide = decide  # type: ignore[method-assign]
        assert limiter.hit("a", "1/hour")

    def test_also_where_a_store_could_not_be_reached(self, limiter: RateLimiter, server: Server) -> None:
        denied(limiter, rate="1/hour")
        reset = server.reset

        def lose_the_answer(key: str) -> None:
            reset(key)
            raise BackendUnavailable("the answer was lost")

        server.reset = lose_the_answer  # type: ignore[method-assign]
        with pytest.raises(BackendUnavailable):
            limiter.reset("a")
        assert limiter.hit("a", "1/hour")


class TestWait:
    def test_is_admitted_as_soon_as_without_it(self, limiter: RateLimiter, server: Server, clock: Clock) -> None:
        limiter.hit("a", "1/10 s")
        began = clock.now
        for _ in range(100):
            limiter.hit("a", "1/10 s")
        assert limiter.wait("a", "1/10 s", timeout=30)
        assert clock.now - began == pytest.approx(10, abs=0.02)
        assert len(clock.slept) == 1, "not in small steps"

    def test_comes_again_where_somebody_else_was_first(
        self, limiter: RateLimiter, server: Server, clock: Clock
    ) -> None:
        limiter.hit("a", "1/10 s")
        sleep = clock.sleep

        def another_comes(seconds: float) -> None:
            sleep(seconds)
            if len(clock.slept) < 3:
                limiter.hit("a", "1/10 s")
                limiter.hit("a", "1/10 s")

        limiter._sleep = another_comes
        assert limiter.wait("a", "1/10 s", timeout=60)
        assert len(clock.slept) == 3


class TestBackends:
    def test_a_denial_of_postgres_says_so_when_it_is_repeated(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url)
        denied(gov.limits, rate="1/hour")
        statements = gov.postgres.statements
        again = gov.limits.hit("a", "1/hour")
        assert (again.allowed, again.backend, again.degraded) == (False, "postgres", True)
        assert gov.postgres.statements == statements
        assert gov.counters.get("limits.degraded.postgres") == 3

    @pytest.mark.parametrize("fallback", ["local", "deny"])
    def test_denials_by_this_process_itself_are_not_remembered(
        self, make_gov: Callable[..., GovRedis], fallback: str
    ) -> None:
        gov = make_gov(redis_url=REDIS_AWAY, limit_fallback=fallback)
        for _ in range(3):
            gov.limits.hit("a", "1/hour")
        assert gov.counters.get("limits.denied_cached") == 0

    def test_off_by_the_setting(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        for on in True, False:
            gov = make_gov(redis_url=redis_server.url, limit_deny_cache=on, key_prefix=f"{on}:")
            denied(gov.limits, rate="1/hour")
            gov.limits.hit("a", "1/hour")
            assert gov.counters.get("limits.denied_cached") == on
            assert gov.limits.hit_many([("b", "1/hour"), ("b", "1/hour")])[1].allowed is False
            gov.limits.reset("a")
            assert gov.limits.hit("a", "1/hour").refund()


class TestBounds:
    QUESTION = ("a", "1/minute", "op", 1)
    DENIAL = RateLimitResult(False, Limit(1, 60), 0, 5.0, 5.0, Limit(1, 60), "redis", False)

    def test_the_oldest_denial_is_forgotten_beyond_its_bound(self) -> None:
        cache = DenyCache(3, lambda: 1.0)
        for identity in "abcad":
            cache.remember((identity, "1/minute", "op", 1), self.DENIAL, cache.sent())
        known = [i for i in "abcd" if cache.find((i, "1/minute", "op", 1)) is not None]
        assert known == ["a", "c", "d"]

    def test_a_forked_child_starts_empty(self) -> None:
        cache = DenyCache(5, lambda: 1.0)
        cache.remember(self.QUESTION, self.DENIAL, cache.sent())
        with cache._lock:  # as another thread may hold it at the fork
            assert in_child(lambda: cache.find(self.QUESTION)) is None
            in_child(lambda: in_threads(lambda: cache.forget("a", "op")))
        assert cache.find(self.QUESTION) is not None

    def test_threads(self) -> None:
        cache = DenyCache(20, lambda: 1.0)

        def hammer(seed: int) -> None:
            for n in range(3000):
                question = (f"{n * seed % 50}", "1/minute", "op", 1)
                cache.remember(question, self.DENIAL, cache.sent())
                cache.find(question)
                if n % 7 == 0:
                    cache.forget(question[0], "op")

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(hammer, range(1, 7)))
        assert len(cache._known) <= 20
