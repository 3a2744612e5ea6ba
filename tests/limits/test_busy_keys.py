"""Keys that are hit many times a second: what such a hit leaves out of Redis's work, and what it must not leave out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from support import redis_of

from govredis import GovRedis, Limit
from govredis.keys import sibling
from govredis.limits import RateLimiter
from govredis.testing.servers import RedisServer

KEY = "rate_limit:default:a"
WINDOW, COUNTER = sibling(KEY, "window"), sibling(KEY, "counter")
HOUR_MS, SLACK_MS = 3_600_000, 60_000
#: A window that is no multiple of its buckets: the oldest ends within the newest.
ODD, BUCKET = 0.0011, 19
STEP = st.one_of(st.integers(0, BUCKET), st.integers(-BUCKET, 70 * BUCKET), st.just(0))


@pytest.fixture
def limits(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> RateLimiter:
    return make_gov(redis_url=redis_server.url, limit_deny_cache=False).limits


def calls(plain_redis: Any, command: str) -> int:
    return int(plain_redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


class TestLogs:
    def test_a_busy_key_is_not_kept_anew_by_each_hit(self, limits: RateLimiter, plain_redis: Any) -> None:
        def renewals() -> int:
            plain_redis.config_resetstat()
            for _ in range(50):
                assert limits.hit("a", "100000/hour")
            return calls(plain_redis, "pexpire")

        # A busy machine takes a second for a hit, now and then.
        assert any(renewals() <= 4 for _ in range(20))

    def test_a_longer_window_is_kept_at_once(self, limits: RateLimiter, plain_redis: Any) -> None:
        for _ in range(3):
            assert limits.hit("a", "5/minute")
        assert limits.hit("a", "600/hour")
        assert int(plain_redis.get(WINDOW)) == HOUR_MS * 1000
        assert plain_redis.pttl(KEY) > HOUR_MS
        assert plain_redis.pttl(WINDOW) > HOUR_MS
        assert limits.hit("a", "5/minute;600/hour").remaining == 0

    def test_two_rates_at_once_admit_no_more_than_each(self, limits: RateLimiter, plain_redis: Any) -> None:
        admitted = 0
        for n in range(200):
            admitted += bool(limits.hit("a", "1000/0.001 seconds"))
            admitted += bool(limits.hit("a", "60/hour"))
            if n == 50:
                plain_redis.delete(WINDOW)  # an eviction, say
        of_the_hour = admitted - 200
        assert of_the_hour <= 60
        assert limits.get_count("a", window=3600) >= 60

    @pytest.mark.parametrize("left_ms", [10_000, HOUR_MS + SLACK_MS - 30_000])
    def test_a_key_that_is_due_is_kept_anew(self, limits: RateLimiter, plain_redis: Any, left_ms: int) -> None:
        limits.hit("a", "100/hour")
        plain_redis.pexpire(KEY, left_ms)
        plain_redis.pexpire(WINDOW, left_ms)
        limits.hit("a", "100/hour")
        assert min(plain_redis.pttl(KEY), plain_redis.pttl(WINDOW)) > HOUR_MS + SLACK_MS - 25_000

    def test_a_ttl_of_anothers_longer_window_is_noted(self, limits: RateLimiter, plain_redis: Any) -> None:
        limits.hit("a", "100/hour")
        seconds, micros = plain_redis.time()
        plain_redis.zadd(KEY, {"theirs": seconds + micros / 1e6 - 100})  # their clock is behind: ours is the last
        plain_redis.pexpire(KEY, 24 * HOUR_MS + SLACK_MS)
        limits.hit("a", "100/hour")
        assert int(plain_redis.get(WINDOW)) >= 24 * HOUR_MS * 1000
        assert plain_redis.pttl(KEY) > 23 * HOUR_MS

    def test_a_ttl_of_anothers_that_has_aged_is_not_taken_for_ours(
        self, limits: RateLimiter, redis_server: RedisServer, plain_redis: Any
    ) -> None:
        """Its window of 10 s and a minute, after 9.2 s, is what we give for a window of a second."""
        seconds, micros = plain_redis.time()
        now = seconds + micros / 1e6
        plain_redis.zadd(KEY, {"ours": now - 9.3, "theirs": now - 9.2})
        plain_redis.set(WINDOW, 1_000_000, px=51_700)
        plain_redis.pexpire(KEY, 60_800)
        assert limits.hit("a", "100/second")
        assert plain_redis.zscore(KEY, "theirs") is not None
        assert int(plain_redis.get(WINDOW)) >= 9_900_000

    def test_our_own_ttl_is_never_taken_for_anothers(
        self, limits: RateLimiter, redis_server: RedisServer, make_gov: Callable[..., GovRedis], plain_redis: Any
    ) -> None:
        """Redis's clock goes on within a script: the two TTLs are read in an order that makes ours look no longer."""
        client = redis_of(make_gov(redis_url=redis_server.url))
        backend = limits._decider.backends.redis
        assert backend is not None
        for n in range(20):
            commands = []
            for m in range(500):
                commands += [("PEXPIRE", KEY, "3720000"), ("PEXPIRE", WINDOW, "3720000")]
                args = ["hit", "1", f"{n}-{m}", "", "100000", "3600000000"]
                commands.append(backend._script.call((KEY, WINDOW), args))
            client.pipeline(commands, (backend._script,))
        assert int(plain_redis.get(WINDOW)) == HOUR_MS * 1000

    def test_a_key_without_an_end_gets_none(self, limits: RateLimiter, plain_redis: Any) -> None:
        limits.hit("a", "100/hour")
        plain_redis.persist(KEY)
        limits.hit("a", "100/hour")
        assert plain_redis.pttl(KEY) == -1

    def test_an_entry_to_come_is_kept_for_its_whole_window(self, limits: RateLimiter, plain_redis: Any) -> None:
        limits.hit("a", "100/hour")
        seconds, micros = plain_redis.time()
        plain_redis.zadd(KEY, {"theirs": seconds + micros / 1e6 + 600})
        plain_redis.pexpire(KEY, HOUR_MS + SLACK_MS)
        result = limits.hit("a", "100/hour")
        assert result.reset_after > 3600 + 500
        assert plain_redis.pttl(KEY) > HOUR_MS + 500_000

    def test_an_evicted_key_begins_anew(self, limits: RateLimiter, plain_redis: Any) -> None:
        limits.hit("a", "2/hour")
        plain_redis.delete(KEY)
        assert [limits.hit("a", "2/hour").allowed for _ in range(3)] == [True, True, False]
        assert plain_redis.pttl(KEY) > HOUR_MS

    @pytest.mark.parametrize("cost", [1, 3])
    def test_a_hit_that_arrives_twice_is_answered_as_at_first(
        self, clocked_redis: Any, monkeypatch: pytest.MonkeyPatch, cost: int
    ) -> None:
        backend, limits = clocked_redis.backend, [Limit(10, 60)]
        monkeypatch.setattr(backend, "_member", lambda: "the same")
        first, entries = backend.decide("k", limits, cost, "hit"), clocked_redis.entries("k")
        clocked_redis.now += 5_000_000
        again = backend.decide("k", limits, cost, "hit")
        assert (again.admitted, again.remaining) == (True, 10 - cost)
        assert again.reset_after_us == first.reset_after_us - 5_000_000
        assert clocked_redis.entries("k") == entries


class TestCounters:
    HOURLY = Limit(100_000, 3600, algorithm="sliding_window_counter")

    def test_a_bucket_is_kept_by_its_first_hit(self, limits: RateLimiter, plain_redis: Any) -> None:
        plain_redis.config_resetstat()
        for _ in range(50):
            assert limits.hit("a", self.HOURLY)
        assert calls(plain_redis, "hset") == 50
        assert calls(plain_redis, "pttl") <= 2  # a bucket is a minute
        assert plain_redis.pttl(COUNTER) > HOUR_MS

    def test_the_next_bucket_is_kept_longer(self, clocked_redis: Any) -> None:
        backend, counter = clocked_redis.backend, sibling("k", "counter")
        backend.decide("k", [self.HOURLY], 1, "hit")
        clocked_redis.command("PEXPIRE", counter, 10_000)
        clocked_redis.now += 60_000_000
        backend.decide("k", [self.HOURLY], 1, "hit")
        assert clocked_redis.command("PTTL", counter) > HOUR_MS

    def test_the_oldest_bucket_ends_within_the_newest(self, clocked_redis: Any) -> None:
        limits = [Limit(3, ODD, algorithm="sliding_window_counter")]
        clocked_redis.now = clocked_redis.now // BUCKET * BUCKET
        remaining = []
        for step in 0, 58 * BUCKET, 16:
            clocked_redis.now += step
            remaining.append(clocked_redis.backend.decide("k", limits, 1, "hit").remaining)
        assert remaining == [2, 1, 1]

    def test_more_buckets_than_a_window_has_are_counted_without_a_sum(self, clocked_redis: Any) -> None:
        """As another client may write them, in the future."""
        planted = f"{clocked_redis.now // 60_000_000 + 300}" + " 1" * 200
        clocked_redis.command("HSET", sibling("k", "counter"), "3600000000", planted)
        outcome = clocked_redis.backend.decide("k", [self.HOURLY], 1, "hit")
        assert (outcome.admitted, outcome.remaining) == (True, self.HOURLY.count - 201)
        assert clocked_redis.command("HGET", sibling("k", "counter"), "3600000000")[-1] == "1"

    def test_another_windows_first_bucket_is_kept_too(self, limits: RateLimiter, plain_redis: Any) -> None:
        minute = Limit(100, 60, algorithm="sliding_window_counter")
        limits.hit("a", minute)
        limits.hit("a", [self.HOURLY, minute])
        assert plain_redis.pttl(COUNTER) > HOUR_MS


@hypothesis.given(
    hits=st.lists(st.tuples(STEP, st.integers(1, 9), st.booleans()), max_size=40),
    count=st.integers(9, 60),
)
def test_the_sum_at_the_end_is_that_of_the_buckets(
    clocked_redis: Any, count: int, hits: list[tuple[int, int, bool]]
) -> None:
    """An older version writes the text without it, and is understood."""
    clocked, limits = clocked_redis, [Limit(count, ODD, algorithm="sliding_window_counter")]
    clocked.command("FLUSHDB")
    for step, cost, refunded in hits:
        clocked.now += step
        outcomes = []
        for key in "new", "old":
            if key == "old" and (held := clocked.command("HGET", sibling(key, "counter"), "1100")):
                clocked.command("HSET", sibling(key, "counter"), "1100", re.sub(r" [@-}][a-p]+$", "", held))
            outcome = clocked.backend.decide(key, limits, cost, "hit")
            if refunded and outcome.admitted:
                clocked.backend.refund(key, outcome.entries, cost)
            outcomes.append((outcome.admitted, outcome.remaining, outcome.retry_after_us, outcome.reset_after_us))
        assert outcomes[0] == outcomes[1]
        held = clocked.command("HGET", sibling("new", "counter"), "1100")
        assert not outcomes[0][0] or re.search(r" [@-}][a-p]+$", held)
