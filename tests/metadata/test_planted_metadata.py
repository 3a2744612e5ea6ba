"""A foreign value at one of our keys is a miss, counted, replaced by the next write, and fails no neighbour."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from support import redis_of

from govredis import GovRedis
from govredis.keys import sibling
from govredis.metadata.entry_keys import entry_keys
from govredis.metadata.values import Codec, stamp
from govredis.testing.servers import PostgresServer, RedisServer

Plant = Callable[[Any, str], None]

KEY = "agent_meta:a"

TYPES: dict[str, Plant] = {
    "hash": lambda r, key: r.hset(key, "a", 1),
    "list": lambda r, key: r.rpush(key, 1),
    "zset": lambda r, key: r.zadd(key, {"a": 1}),
    "stream": lambda r, key: r.xadd(key, {"a": 1}),
}
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "not JSON": b"x",
    "another's JSON": b'{"name": "x"}',
    "nested": b"[" * 10_000 + b"]" * 10_000,
    "NaN": b'{"y": NaN}',
    "Infinity": b'{"x": 1, "y": Infinity}',
    "null": b"null",
    "a huge number": b"9" * 5000,
    "govredis 0.3's": b'{"x": 1, "__govredis__": {"at": 1.5, "ttl": 9e9, "epoch": 1}}',
    "govredis 0.3's, bare": b'{"value": 5, "__govredis__": {"at": 1.5, "ttl": 9e9, "bare": true}}',
    "a member like 0.3's": b'{"x": 1, "__govredis__": 7}',
    "a version": b"12345678901234567890123",
    "a negative number": b"-5",
    "a fraction": b"1.5",
    "a stamp of words": b"a b c d e f",
    "a stamp without end": b"- inf 1 - - -",
    "a stamp that is no number": b"- nan 1 - - -",
    "a stamp of a huge time": b"- 1e300 1 - - -",
    "a stamp of a cost that is none": b"- 1 -1e300 - - -",
    "a stamp of a huge epoch": b"- 1 1 " + b"9" * 5000 + b" - -",
    "a stamp that is too short": b"- 1 1 - -",
    "space around it": b' {"name": "x"}\n',
    "more behind it": b'{"name": "x"} x',
}
#: The texts that any reader takes for a value, where foreign values are used.
VALUES = {
    "another's JSON", "space around it", "a member like 0.3's", "a version", "a negative number", "a fraction",
}  # fmt: skip


def planting(text: bytes) -> Plant:
    return lambda r, key: r.set(key, text)


PLANTED: dict[str, Plant] = {
    **TYPES,
    **{name: planting(text) for name, text in TEXTS.items()},
    "for ever": lambda r, key: r.set(key, "x", px=10**15),
}


@pytest.fixture(params=["postgres", "no postgres", "in the process"])
def gov(
    request: pytest.FixtureRequest,
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
) -> GovRedis:
    settings: dict[str, Any] = {} if request.param == "no postgres" else {"database_url": postgres_server.url}
    return make_gov(redis_url=redis_server.url, local_cache=request.param == "in the process", **settings)


@pytest.fixture
def raw_redis(redis_server: RedisServer) -> Iterator[Any]:
    client = redis.Redis.from_url(redis_server.url)
    yield client
    client.close()


OPERATIONS: dict[str, Callable[[GovRedis], Any]] = {
    "get": lambda gov: gov.metadata.get("a"),
    "get_many": lambda gov: gov.metadata.get_many(["n", "a"]),
    "get_or_load": lambda gov: gov.metadata.get_or_load("a", lambda _: {"mine": 1}),
    "get_many and load": lambda gov: gov.metadata.get_many(["n", "a"], lambda _: {"a": {"mine": 1}}),
    "reload": lambda gov: gov.metadata.reload("a", lambda _: {"mine": 1}),
    "set": lambda gov: gov.metadata.set("a", {"mine": 1}),
    "invalidate": lambda gov: gov.metadata.invalidate("a"),
    "invalidate of a version": lambda gov: gov.metadata.invalidate("a", version=5),
}
FOUND: dict[str, tuple[Any, ...]] = {
    "get": (None,),
    "get_many": ({"n": {"neighbour": 1}},),
    "get_or_load": ({"mine": 1},),
    "get_many and load": ({"n": {"neighbour": 1}, "a": {"mine": 1}},),
    "reload": ({"mine": 1},),
    "set": (True,),
    "invalidate": (None,),
    "invalidate of a version": (None,),
}


READS = "get", "get_many", "get_or_load", "get_many and load"


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_at_a_value_and_beside_it(gov: GovRedis, raw_redis: Any, planted: str) -> None:
    assert gov.metadata.set("n", {"neighbour": 1})
    mine = {"mine": 1}
    for operation, place in itertools.product(OPERATIONS, entry_keys(KEY)):
        raw_redis.delete(*entry_keys(KEY))
        PLANTED[planted](raw_redis, place)
        stands, used = mine, gov.internal.freshness is None and place == KEY and planted in VALUES
        found = OPERATIONS[operation](gov) if used else settled(gov, operation)
        if used and operation in READS:
            stands = json.loads(TEXTS[planted])
            assert found == ({"n": {"neighbour": 1}, "a": stands} if "many" in operation else stands)
        else:
            assert found in FOUND[operation], (operation, place)
        assert gov.metadata.get_or_load("a", lambda _: mine) == stands
        assert gov.metadata.get("a") == stands, "it is written over, unless it is used"
        assert gov.metadata.get("n") == {"neighbour": 1}
        gov.metadata.invalidate("a")
        assert gov.metadata.get("a") is None
        assert gov.metadata.get_or_load("a", lambda _: {"newer": 1}) == {"newer": 1}
        assert gov.metadata.get("a") == {"newer": 1}


def settled(gov: GovRedis, operation: str) -> Any:
    while gov.metadata.get("a") is not None:  # what is kept in the process is told of by Redis, soon
        time.sleep(0.001)
    return OPERATIONS[operation](gov)


@pytest.mark.parametrize("planted", PLANTED)
def test_is_counted(gov: GovRedis, raw_redis: Any, planted: str) -> None:
    PLANTED[planted](raw_redis, KEY)
    if gov.internal.freshness is None and planted in VALUES:
        assert gov.metadata.get("a") == json.loads(TEXTS[planted])
        assert gov.metadata.stats() == {"hits": 1}
        return
    seen = 0 if planted in TYPES else 1  # who reads is not told of another type; who loads is
    assert gov.metadata.get("a") is None
    assert gov.metadata.stats().get("foreign", 0) == seen
    assert gov.metadata.get_many(["a", "n"]) == {}
    assert gov.metadata.stats().get("foreign", 0) == 2 * seen
    assert gov.metadata.stats()["misses"] == 3
    assert gov.metadata.get_or_load("a", lambda _: 1) == 1
    assert gov.metadata.stats()["foreign"] == 2 * seen + 1


def test_a_value_too_deep_for_what_is_written_in_python(gov: GovRedis, raw_redis: Any) -> None:
    """JSON is read in C, which goes deeper than read-only values do."""
    deep: Any = 1
    for _ in range(600):
        deep = [deep]
    try:
        found = gov.metadata.get_or_load("a", lambda _: deep)
    except ValueError as error:
        assert "nested too deep" in str(error)
    else:
        assert found == deep
        assert gov.metadata.get("a") in (deep, None)
    assert gov.metadata.get_or_load("b", lambda _: 1) == 1


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_at_the_mark_of_a_namespace(gov: GovRedis, raw_redis: Any, planted: str) -> None:
    PLANTED[planted](raw_redis, gov.metadata._generation.key)
    assert gov.metadata.get_or_load("a", lambda _: {"mine": 1}) == {"mine": 1}
    assert gov.metadata.get("a") == {"mine": 1}
    assert len(raw_redis.get(KEY)) < 1000
    gov.metadata.invalidate_all()
    assert gov.metadata.get("a") is None
    assert gov.metadata.get_or_load("a", lambda _: {"mine": 2}) == {"mine": 2}
    assert gov.metadata.get("a") == {"mine": 2}


LEASES: dict[str, Plant] = {
    **PLANTED,
    "four words": lambda r, key: r.set(key, "a b c d"),
    "negative numbers": lambda r, key: r.set(key, "-1 -2 -3 -4"),
    "numbers that are too large": lambda r, key: r.set(key, " ".join(["9" * 300] * 4)),
    "five numbers": lambda r, key: r.set(key, "1 2 3 4 5"),
}


@pytest.mark.parametrize("planted", LEASES)
@pytest.mark.parametrize("local", [False, True])
def test_planted_at_the_freshness_lease(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    raw_redis: Any,
    planted: str,
    local: bool,
) -> None:
    """No valid lease: a counter and health say so, and the next run replaces it. It is never an outage."""
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, local_cache=local)
    assert gov.internal.freshness is not None
    LEASES[planted](raw_redis, "govredis:guard")
    report = gov.health.check()
    assert report.status == "warn"
    (outbox,) = [check for check in report.checks if check.name == "outbox"]
    assert "govredis has not written" in outbox.output
    json.dumps(report.as_dict(), allow_nan=False)
    assert gov.internal.freshness.state().foreign
    assert redis_of(gov) is not None and redis_of(gov).breaker.closed

    assert gov.metadata.get_or_load("a", lambda _: 1) == 1
    assert gov.metadata.get("a") == 1
    assert gov.sessions.bind("s", "agent").agent_id == "agent"
    assert gov.sessions.get_agent_id("s") == "agent"
    assert gov.counters.get("guard.foreign") == 1
    assert len(raw_redis.get("govredis:guard").split()) == 4
    gov.health.renew_after_fork()
    assert gov.health.check().status == "pass"


def test_a_lease_that_nobody_renews_keeps_nobody_waiting(gov: GovRedis, raw_redis: Any) -> None:
    """One that would stand for ever, or for longer than any of ours."""
    for left in (None, 3_100_000):
        raw_redis.set(sibling(KEY, "lease"), "planted", px=left)
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.append(gov.metadata.get_or_load("a", lambda _: 1)), daemon=True)  # noqa: B023
        reader.start()
        reader.join(30)
        assert found == [1]
        assert gov.metadata.stats().get("waits", 0) == 0
        gov.metadata.invalidate("a")


def test_a_stamp_is_read_back_as_it_was_written() -> None:
    text = '{"a": 1}'
    about = stamp(text, "17", ttl=10.0, cost=0.5, epoch=5, generation="0" * 16)
    record = Codec().read(text.encode(), about.encode(), False)
    assert record is not None
    assert (record.value, record.epoch, record.generation, record.cost) == ({"a": 1}, 5, "0" * 16, 0.5)
    assert record.ends_at is not None and abs(record.ends_at - time.time() - 10) < 60
    for other in (b'{"a": 2}', b'{"a":1}', b"", b"{}"):
        assert Codec().read(other, about.encode(), False) is None
