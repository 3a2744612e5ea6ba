"""Rows of PostgreSQL in the cache: what has no form in JSON gets one, and hit and miss give the same."""

from __future__ import annotations

import datetime
import decimal
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis
from govredis.metadata import MetadataCache
from govredis.testing.servers import RedisServer

KEY = "report:a"
ROW = """
    SELECT '2026-11-28 14:29:32.5+00'::timestamptz, DATE '2026-11-28', TIME '16:29:32', 12.50::numeric,
           '12345678-1234-5678-1234-567812345678'::uuid, '\\x00ff'::bytea, TIMESTAMP '2026-11-28 16:29:32'
"""
NAMES = "at", "day", "time", "price", "id", "raw", "local"
PLAIN = {
    "at": "2026-11-28T14:29:32.500000+00:00",
    "day": "2026-11-28",
    "time": "16:29:32",
    "price": "12.50",
    "id": "12345678-1234-5678-1234-567812345678",
    "raw": "AP8=",
    "local": "2026-11-28T16:29:32",
}


def never(_: Any) -> Any:
    raise AssertionError("not a miss")


def to_json(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return {"$decimal": str(value)}
    raise TypeError(f"a {type(value).__name__}")


def from_json(found: dict[str, Any]) -> Any:
    return decimal.Decimal(found["$decimal"]) if "$decimal" in found else found


@pytest.fixture(params=[False, True], ids=["", "in the process"])
def gov(request: pytest.FixtureRequest, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url, local_cache=request.param)


def given(cache: MetadataCache, value: Any) -> list[Any]:
    """The value as each way of reading gives it: misses first, then hits."""
    for identity in ("a", "b", "c"):
        cache._redis.call("DEL", f"report:{identity}")  # type: ignore[union-attr]
        while cache.get(identity) is not None:  # what is kept in the process is told of by Redis, soon
            time.sleep(0.001)
    found = [
        cache.get_or_load("a", lambda _: value),
        cache.get_many(["b"], lambda _: {"b": value})["b"],
        cache.reload("a", lambda _: value),
        cache.get_or_load("a", never),
        cache.get("a"),
        cache.get_many(["a", "b"], never)["b"],
    ]
    assert cache.set("c", value)
    return [*found, cache.get("c")]


def test_a_row_with_all_of_the_types(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: Any, connect: Callable[[], Any]
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    with connect() as connection, connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
        cursor.execute(ROW)
        row = dict(zip(NAMES, cursor.fetchone(), strict=True))
    assert {type(value).__name__ for value in row.values()} == {
        "datetime", "date", "time", "Decimal", "str", "memoryview"
    }  # fmt: skip
    row["id"] = uuid.UUID(row["id"])
    assert given(gov.cache("report"), row) == [PLAIN] * 7


@pytest.mark.parametrize(
    ("value", "back"),
    [
        (datetime.datetime(2026, 11, 28, tzinfo=datetime.timezone.utc), "2026-11-28T00:00:00+00:00"),
        (datetime.date(2026, 11, 28), "2026-11-28"),
        (decimal.Decimal("1E+3"), "1E+3"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (b"", ""),
        (bytearray(b"\xff"), "/w=="),
        (memoryview(b"\xff"), "/w=="),
        ([{"deep": (b"x",)}], [{"deep": ["eA=="]}]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_type_from_hit_and_miss_alike(gov: GovRedis, plain_redis: Any, value: Any, back: Any) -> None:
    assert given(gov.cache("report"), value) == [back] * 7
    assert json.loads(plain_redis.get(KEY)) == back


def test_a_type_that_has_no_form_is_refused_and_named(gov: GovRedis, plain_redis: Any) -> None:
    for value in (datetime.timedelta(1), {1}, object(), 1j):
        name = type(value).__name__
        for call in (lambda: gov.cache("report").set("a", value), lambda: gov.cache("report").get_or_load("a", lambda _: value)):  # noqa: B023, E501  # fmt: skip
            with pytest.raises(
                ValueError, match=rf"value cannot be stored as JSON: {name} has no form in JSON; give the"
            ):
                call()
    assert plain_redis.keys("*report*") == []


def test_a_default_and_an_object_hook(gov: GovRedis, plain_redis: Any) -> None:
    cache = gov.cache("report", default=to_json, object_hook=from_json)
    price = decimal.Decimal("12.50")
    assert given(cache, {"price": price}) == [{"price": price}] * 7
    assert given(cache, price) == [price] * 7
    assert json.loads(plain_redis.get(KEY)) == {"$decimal": "12.50"}
    with pytest.raises(ValueError, match="value cannot be stored as JSON: a date"):
        cache.set("a", datetime.date(2026, 11, 28))


def test_caches_of_one_namespace_keep_their_own_forms(gov: GovRedis) -> None:
    """In the process too, where values are kept as they are handed out."""
    plain, made = gov.cache("report"), gov.cache("report", default=to_json, object_hook=from_json)
    made.set("a", {"price": decimal.Decimal(1)})
    for _ in range(50):
        assert plain.get("a") == {"price": {"$decimal": "1"}}
        assert made.get("a") == {"price": decimal.Decimal(1)}
    made.invalidate("a")
    assert plain.get("a") is None and made.get("a") is None


def test_a_value_that_the_object_hook_refuses_is_not_stored(gov: GovRedis, plain_redis: Any) -> None:
    cache = gov.cache("report", object_hook=lambda found: found["missing"])
    for call in (lambda: cache.set("a", {"x": 1}), lambda: cache.get_or_load("a", lambda _: {"x": 1})):
        with pytest.raises(KeyError, match="missing"):
            call()
    assert plain_redis.keys("*report*") == []
    plain_redis.set(KEY, '{"of": "another"}')
    assert cache.get("a") is None, "another's is a miss, and counted"
    assert cache.stats()["foreign"] == 1


class Struck(Exception):
    """As of a soft time limit."""


def test_an_exception_from_outside_is_not_taken_for_bad_json(gov: GovRedis, plain_redis: Any) -> None:
    plain_redis.set(KEY, '{"x": 1}')

    def struck(_: Any) -> Any:
        raise Struck

    with pytest.raises(Struck):
        gov.cache("report", object_hook=struck).get("a")


def test_arguments_are_checked_before_the_loader_runs(gov: GovRedis, plain_redis: Any) -> None:
    async def later(_: Any) -> Any:
        raise AssertionError

    def one_by_one(_: Any) -> Any:
        yield 1

    cache = gov.cache("report")
    plain_redis.config_resetstat()
    for loader in (5, None, {"a": 1}, later, one_by_one):
        with pytest.raises(ValueError, match=r"loader is .*it must be a plain function"):
            cache.get_or_load("a", loader)  # type: ignore[arg-type]
        if loader is not None:
            with pytest.raises(ValueError, match=r"load_many is .*it must be a plain function"):
                cache.get_many(["a"], loader)  # type: ignore[arg-type]
    for ids in ("abc", b"abc", 5, None):
        with pytest.raises(ValueError, match=r"identities is .*it must be an iterable of ids"):
            cache.get_many(ids, never)  # type: ignore[arg-type]
    for wrong in ({"ttl": 0}, {"ttl": "5"}, {"ttl": float("nan")}):
        with pytest.raises(ValueError, match="ttl is"):
            cache.get_or_load("a", never, **wrong)  # type: ignore[arg-type]
    for name in ("default", "object_hook"):
        for function in (5, {}, "str"):
            with pytest.raises(ValueError, match=rf"{name} is .*it must be a function of one argument, or None"):
                gov.cache("report", **{name: function})  # type: ignore[arg-type]
    stats = plain_redis.info("commandstats")
    assert not [name for name in stats if name.startswith("cmdstat_eval")], "no lease was taken"
