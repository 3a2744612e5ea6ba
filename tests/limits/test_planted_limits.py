"""Keys that other clients plant: said clearly, with the key's name, counted, and nobody else's trouble."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from support import redis_of

from govredis import BackendError, BackendUnavailable, GovRedis, Limit
from govredis.keys import sibling
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.limits.replication import Admission
from govredis.testing.servers import PostgresServer, RedisServer

KEY = "rate_limit:default:a"
WINDOW, COUNTER, RESERVED, MOVED = (sibling(KEY, name) for name in ("window", "counter", "booked", "moved"))
LOG, COUNTED = "5/minute", Limit(5, 60, "sliding_window_counter")

#: Scores that are no seconds: the number of entries is within the limit.
SCORES = {
    "milliseconds": lambda: int(time.time() * 1e3),
    "microseconds": lambda: int(time.time() * 1e6),
    "nanoseconds": lambda: int(time.time() * 1e9),
    "infinity": lambda: "+inf",
    "the largest": lambda: "1.7e308",
}

CALLS: dict[str, Callable[[GovRedis], Any]] = {
    "hit": lambda gov: gov.limits.hit("a", LOG),
    "peek": lambda gov: gov.limits.peek("a", LOG),
    "check": lambda gov: gov.limits.check("a", 5, 60),
    "record": lambda gov: gov.limits.record("a", 60),
    "wait": lambda gov: gov.limits.wait("a", LOG, timeout=3600),
    "get_count": lambda gov: gov.limits.get_count("a", 60),
    "stats": lambda gov: gov.limits.stats("a"),
    "reserve": lambda gov: gov.limits.hit_or_reserve("a", LOG, reservation="b", operation="default"),
    "counted": lambda gov: gov.limits.hit("a", COUNTED),
}


def wrong_type(redis: Any, key: str) -> None:
    redis.delete(key)
    redis.rpush(key, "x")


@pytest.mark.parametrize("scored", SCORES)
@pytest.mark.parametrize("call", [call for call in CALLS if call != "counted"])
def test_scores_that_are_no_seconds(gov: GovRedis, plain_redis: Any, call: str, scored: str) -> None:
    """They would count for ever: so each call says it, as long as one of them is there."""
    plain_redis.zadd(KEY, {"theirs": SCORES[scored]()})
    before = plain_redis.dump(KEY)
    for _ in range(2):
        with pytest.raises(
            BackendError, match=rf"{KEY}: .*scores must be seconds since 1970.*reset the identity"
        ) as error:
            CALLS[call](gov)
        assert not isinstance(error.value, BackendUnavailable)
    assert gov.counters.get("limits.errors") == 2
    assert plain_redis.dump(KEY) == before
    assert plain_redis.keys("*") == [KEY]
    gov.limits.reset("a")
    CALLS[call](gov)


def test_wait_does_not_begin_to_wait(gov: GovRedis, plain_redis: Any) -> None:
    """A client that scores in microseconds has used up the limit: the old answer was to try again 9e12 s ago."""
    plain_redis.zadd(KEY, {f"{n}": int(time.time() * 1e6) for n in range(5)})
    gov.limits._sleep = lambda seconds: pytest.fail(f"slept {seconds} s")
    with pytest.raises(BackendError, match="seconds since 1970"):
        gov.limits.wait("a", LOG, timeout=1)


def test_reservations_centuries_from_now_are_times(gov: GovRedis) -> None:
    """A limit of one a year may have many: they count, and are called for when they are due."""
    waits = []
    for n in range(300):
        result, reserved = gov.limits.hit_or_reserve("a", "1/366 days", reservation=f"{n}", admit=False)
        waits.append(result.retry_after)
        assert reserved
    assert waits == sorted(waits)
    assert waits[-1] > 298 * 366 * 86400
    assert gov.limits.get_count("a", 60) == 300
    assert gov.limits.stats("a").entries == 300


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key", [KEY, WINDOW, COUNTER, RESERVED, MOVED])
def test_another_type(gov: GovRedis, plain_redis: Any, call: str, key: str) -> None:
    """Where a call needs what stands there, it names the identity's key; `reset` mends it."""
    wrong_type(plain_redis, key)
    needs = {
        KEY: CALLS.keys() - {"counted"},
        WINDOW: {"hit", "wait", "record", "reserve", "stats"},
        COUNTER: {"counted", "get_count", "stats"},
        RESERVED: {"reserve"},
        MOVED: {"reserve"},
    }
    if call in needs[key]:
        with pytest.raises(BackendError, match=rf"the limit at {KEY}: .*(wrong kind of value)"):
            CALLS[call](gov)
        assert gov.counters.get("limits.errors") == 1
        assert plain_redis.keys("*") == [key], "nothing was written before it was found"
    gov.limits.reset("a")
    CALLS[call](gov)
    assert gov.counters.get("limits.errors") == int(call in needs[key])


@pytest.mark.parametrize(
    "garbage", ["", "x", "-5", "0", "inf", "-inf", "nan", "1e300", "0x1p99", b"\xff\xfe", "9" * 400]
)
def test_a_window_that_none_can_be_is_none(gov: GovRedis, plain_redis: Any, garbage: Any) -> None:
    for call in ("stats", "reserve", "hit"):
        gov.limits.reset("a")
        plain_redis.zadd(KEY, {"old": time.time() - 7200, "new": time.time() - 1})
        plain_redis.set(WINDOW, garbage)
        CALLS[call](gov)
        if call != "stats":
            assert plain_redis.get(WINDOW) == str(60 * 10**6), "replaced"
            assert gov.limits.get_count("a", 3600) == 2
    assert gov.counters.get("limits.errors") == 0


@pytest.mark.parametrize("score", ["-inf", "-1.7e308", -1, 0, 5, "1e-320"])
def test_scores_of_long_ago_are_over(gov: GovRedis, plain_redis: Any, score: Any) -> None:
    for call, operation in CALLS.items():
        gov.limits.reset("a")
        plain_redis.zadd(KEY, {b"\xff\x00\xfe": score})
        answer = operation(gov)
        if call in {"hit", "peek", "wait", "check"}:
            assert (answer.allowed, answer.remaining, answer.retry_after) == (True, 4, 0)
            assert 0 <= answer.reset_after <= 60
    assert gov.counters.get("limits.errors") == 0


@pytest.mark.parametrize(
    "held",
    [
        "99999999999999999999 1",  # a bucket of no time
        f"{10**17} 1",
        "1 " + "9" * 400,  # over, though no count of ours
        "{bucket} " + "9" * 16,
        "{bucket} 1" + " 1" * 100_000,  # more buckets than there are
        "text",
        "",
        "{bucket}",
        b"\xff\xfe",
    ],
    ids=lambda held: repr(held[:20]),
)
def test_counters_that_are_none_of_ours(gov: GovRedis, plain_redis: Any, held: Any) -> None:
    bucket = int(plain_redis.time()[0]) + 2
    text = held if isinstance(held, bytes) else held.replace("{bucket}", str(bucket))
    wrong = isinstance(text, str) and (len(text.split(" ")[0]) > 17 or text.startswith(f"{bucket} 9"))
    calls = [CALLS["counted"], CALLS["get_count"], CALLS["stats"]]
    for call in calls:
        plain_redis.hset(COUNTER, str(60 * 10**6), text)
        if wrong:
            with pytest.raises(BackendError, match=rf"the limit at {KEY}: .*another client has changed it"):
                call(gov)
        else:
            call(gov)
    assert gov.counters.get("limits.errors") == (3 if wrong else 0)
    gov.limits.reset("a")
    assert gov.limits.hit("a", COUNTED).remaining == 4


def test_fields_that_are_no_window_are_left_out_and_go(gov: GovRedis, plain_redis: Any) -> None:
    fields: list[Any] = ["x", "", "1e6", "inf", "-5", "0", "nan", b"\xff", "9" * 30]
    for field in fields:
        plain_redis.hset(COUNTER, field, "1 1")
    assert not gov.limits.stats("a")
    assert gov.limits.hit("a", COUNTED)
    assert gov.limits.stats("a").counters == {60.0: 1}
    assert sorted(plain_redis.hkeys(COUNTER)) == ["60000000", "calls"]


def test_a_refund_of_what_was_planted_over(gov: GovRedis, plain_redis: Any) -> None:
    for rate, key in ((LOG, KEY), (COUNTED, COUNTER)):
        result = gov.limits.hit("a", rate)
        wrong_type(plain_redis, key)
        with pytest.raises(BackendError, match=f"the limit at {KEY}: "):
            result.refund()
        gov.limits.reset("a")


@pytest.mark.parametrize("plant", [wrong_type, lambda redis, key: redis.zadd(key, {"ms": time.time() * 1e3})])
def test_in_hit_many_the_others_are_decided_and_told(gov: GovRedis, plain_redis: Any, plant: Any) -> None:
    plant(plain_redis, KEY)
    hits = [("b", LOG), ("a", LOG), ("c", COUNTED), ("a", COUNTED), ("b", LOG)]
    for n in (1, 2):
        results = gov.limits.hit_many(hits)
        assert [result.allowed for result in results] == [True, False, True, True, True]
        assert [result.backend for result in results] == ["redis", "none", "redis", "redis", "redis"]
        assert (results[1].degraded, results[1].remaining) == (True, 0)
        assert results[1].retry_after > 0
        assert gov.counters.get("limits.errors") == n, "never remembered as a denial"
    assert gov.limits.get_count("b", 60) == 4


@pytest.mark.parametrize("plant", [wrong_type, lambda redis, key: redis.zadd(key, {"ms": time.time() * 1e3})])
def test_replication_goes_on_past_a_planted_key(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    plain_redis: Any,
    plant: Any,
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=3600)
    replication = gov.limits._decider.replication
    assert replication is not None
    plant(plain_redis, KEY)
    for n in range(1500):
        replication.note("postgres", KEY if n % 500 == 0 else f"rate_limit:default:{n}", [Limit(9, 600)], 1)
    replication.tell()
    assert gov.counters.get("limits.mirror_lost.redis") == 3
    assert gov.counters.get("limits.mirrored.redis") == 1497
    assert len(plain_redis.keys("rate_limit:default:*")) == 1498


def test_many_costly_admissions_are_told_in_bounded_parts(gov: GovRedis, plain_redis: Any) -> None:
    """Redis does one thing at a time, and each part is one thing."""
    backend, pipeline, sizes = RedisLimitBackend(redis_of(gov)), redis_of(gov).pipeline, []

    class Client:
        @staticmethod
        def pipeline(commands: Any, scripts: Any, *, each: bool) -> Any:
            sizes.append(sum(int(cost) for command in commands for cost in command[8::3]))
            return pipeline(commands, scripts, each=each)

    backend._client = Client  # type: ignore[assignment]
    costs = [10_000, 1, 9_999, 4_000, 4_000, 4_000]
    told = [Admission(KEY, 0.0, cost, 3600 * 10**6, f"m{n}") for n, cost in enumerate(costs)]
    assert backend.replicate(told, 1.0) == (0, None)
    assert sizes == [10_000, 10_000, 8_000, 4_000]
    assert plain_redis.zcard(KEY) == sum(costs)


def test_most_denied_leaves_out_what_others_planted(gov: GovRedis, plain_redis: Any) -> None:
    gov.limits.hit("a", "1/hour")
    assert not gov.limits.hit("a", "1/hour")
    gov.internal.context.teller.flush()
    (key,) = plain_redis.keys("*govredis:denied*")
    plain_redis.zadd(
        key, {b"default:\xff": 7, "no colon": 8, "default:inf": "+inf", "default:-inf": "-inf", "default:neg": -3}
    )
    assert [(d.identity, d.times) for d in gov.limits.most_denied()] == [("a", 1)]
    assert gov.counters.get("limits.unreadable") == 5
    wrong_type(plain_redis, key)
    with pytest.raises(BackendError, match=r"the denials counted at .*govredis:denied"):
        gov.limits.most_denied()


def test_a_place_taken_from_what_was_planted_counts_from_nought(
    gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("govredis.limits.denied_counts.KEPT", 1)
    counts = gov.limits._decider.denied_counts
    counts.add("first", "default")
    gov.internal.context.teller.flush()
    (key,) = plain_redis.keys("*govredis:denied*")
    for planted in ("-inf", "-5"):
        plain_redis.delete(key)
        plain_redis.zadd(key, {"default:planted": planted})
        counts.add("a", "default")
        gov.internal.context.teller.flush()
        assert [(d.identity, d.times) for d in counts.most(9)] == [("a", 1)]
