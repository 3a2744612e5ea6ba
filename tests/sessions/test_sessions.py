"""SessionCache on a living Redis: what it stores, counts, extends, refuses and reads of what others stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from govredis import BackendError, GovRedis, SessionAlreadyBound
from govredis.testing.servers import RedisServer

UTC = timezone.utc


def sent(plain_redis: Any) -> set[str]:
    """The commands that reached the server since CONFIG RESETSTAT, the asking excepted."""
    names = {name.removeprefix("cmdstat_") for name in plain_redis.info("commandstats")}
    return {name for name in names if not name.startswith(("config", "info", "client", "select"))}


@pytest.fixture(params=["redis", "disabled"])
def either(request: pytest.FixtureRequest, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    """The contract of both stores: Redis, and this process where Redis is disabled."""
    return make_gov(redis_url=redis_server.url, redis_enabled=request.param == "redis", session_ttl=100)


class TestContract:
    def test_bind_and_get(self, either: GovRedis) -> None:
        before = datetime.now(UTC)
        bound = either.sessions.bind("s", "agent")
        after = datetime.now(UTC)
        assert (bound.session_id, bound.agent_id, bound.bind_count, bound.data) == ("s", "agent", 1, None)
        assert before <= bound.bound_at <= after
        assert bound.bound_at.utcoffset() == timedelta(0)
        assert bound.expires_at is not None
        assert abs((bound.expires_at - before).total_seconds() - 100) < 30
        found = either.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.bound_at, found.bind_count) == ("agent", bound.bound_at, 1)
        assert found.backend == bound.backend == ("redis" if either._redis else "local")
        assert either.sessions.get_agent_id("s") == "agent"
        assert either.sessions.get("unknown") is None
        assert either.sessions.get_agent_id("unknown") is None

    def test_rebinding_counts_and_goes_to_the_new_agent(self, either: GovRedis) -> None:
        for count, agent in enumerate(("a", "a", "b"), 1):
            assert either.sessions.bind("s", agent).bind_count == count
        assert either.sessions.get_agent_id("s") == "b"
        assert (either.sessions.for_agent("a"), either.sessions.for_agent("b")) == ([], ["s"])
        assert either.sessions.unbind_agent("a") == 0
        assert either.sessions.get_agent_id("s") == "b"

    def test_if_absent(self, either: GovRedis) -> None:
        first = either.sessions.bind("s", "a", if_absent=True, ttl=50, data=1)
        again = either.sessions.bind("s", "a", if_absent=True, data=2)
        assert (again.bind_count, again.data, again.bound_at) == (1, 1, first.bound_at)
        with pytest.raises(SessionAlreadyBound, match="'a'") as refused:
            either.sessions.bind("s", "b", if_absent=True, ttl=70)
        existing = refused.value.existing
        assert (existing.agent_id, existing.data) == ("a", 1)
        for binding in (again, existing):
            assert binding.expires_at is not None
            left = (binding.expires_at - datetime.now(UTC)).total_seconds()
            assert left <= 50, "when it ends, not when it would have, had it been bound now"
        assert either.sessions.get_agent_id("s") == "a"

    @pytest.mark.parametrize(
        "data",
        [
            [],
            {},
            "",
            0,
            False,
            [[], {"a": []}],
            {"k": [1, 2.5, None, True]},
            'ü🎉\x00"\\',
            {"": {}},
            10**30,
            "x" * 65534,
            "\ud800",
        ],
        ids=lambda d: repr(d)[:20],
    )
    def test_data_comes_back_as_it_was(self, either: GovRedis, data: Any) -> None:
        assert either.sessions.bind("s", "a", data=data).data == data
        found = either.sessions.get("s")
        assert found is not None
        assert found.data == data
        assert either.sessions.bind("s", "a", if_absent=True).data == data
        with pytest.raises(SessionAlreadyBound):
            either.sessions.bind("s", "b", if_absent=True)
        assert either.sessions.for_agent("a") == ["s"]
        assert either.sessions.unbind_agent("a") == 1
        assert either.sessions.get("s") is None

    def test_unbind(self, either: GovRedis) -> None:
        either.sessions.bind("s", "a")
        assert either.sessions.unbind("s") is True
        assert either.sessions.get("s") is None
        assert either.sessions.unbind("s") is False
        assert either.sessions.for_agent("a") == []

    def test_for_agent_and_unbind_agent(self, either: GovRedis) -> None:
        for sid in ("s2", "s1", "s3"):
            either.sessions.bind(sid, "a")
        either.sessions.bind("other", "b")
        either.sessions.unbind("s3")
        assert either.sessions.for_agent("a") == ["s1", "s2"]
        assert either.sessions.for_agent("nobody") == []
        assert either.sessions.unbind_agent("a") == 2
        assert either.sessions.unbind_agent("a") == 0
        assert either.sessions.for_agent("a") == []
        assert either.sessions.get("s1") is None
        assert either.sessions.get_agent_id("other") == "b"

    def test_touch_of_what_is_not_there(self, either: GovRedis) -> None:
        assert either.sessions.touch("s") is False
        assert either.sessions.get("s", touch=True) is None
        either.sessions.bind("s", "a")
        assert either.sessions.touch("s") is True

    @pytest.mark.parametrize("bad", ["", "{s}", "a\x00", "a" * 513, b"s", None, 5], ids=repr)
    def test_bad_ids_are_refused_before_anything_is_sent(self, either: GovRedis, plain_redis: Any, bad: Any) -> None:
        plain_redis.config_resetstat()
        sessions = either.sessions
        for refused in (
            lambda: sessions.bind(bad, "a"),
            lambda: sessions.bind("s", bad),
            lambda: sessions.get(bad),
            lambda: sessions.get_agent_id(bad),
            lambda: sessions.touch(bad),
            lambda: sessions.unbind(bad),
            lambda: sessions.for_agent(bad),
            lambda: sessions.unbind_agent(bad),
        ):
            with pytest.raises(ValueError, match="_id is"):
                refused()
        assert sent(plain_redis) == set()

    @pytest.mark.parametrize(
        "options",
        [
            {"ttl": 0},
            {"ttl": -1},
            {"ttl": "5"},
            {"ttl": float("nan")},
            {"data": float("nan")},
            {"data": {1, 2}},
            {"data": "x" * 65535},
            {"data": ["é"] * 10_000},
            {"data": object()},
            {"data": {"a": float("inf")}},
        ],
        ids=lambda o: repr(o)[:30],
    )
    def test_bad_ttl_and_data_are_refused_before_anything_is_sent(
        self, either: GovRedis, plain_redis: Any, options: dict[str, Any]
    ) -> None:
        plain_redis.config_resetstat()
        with pytest.raises(ValueError, match=r"ttl is|data cannot be stored|data is"):
            either.sessions.bind("s", "a", **options)
        assert sent(plain_redis) == set()


class TestOnRedis:
    def test_the_wire_format(self, gov: GovRedis, plain_redis: Any) -> None:
        bound = gov.sessions.bind("s", "agent-é", data={"list": []})
        record = json.loads(plain_redis.get("session:s"))
        assert record == {
            "agent_id": "agent-é",
            "bound_at": bound.bound_at.isoformat(timespec="microseconds"),
            "data": {"list": []},
            "bind_count": 1,
        }
        assert record["bound_at"].endswith("+00:00")
        gov.sessions.bind("t", "agent-é")
        assert set(json.loads(plain_redis.get("session:t"))) == {"agent_id", "bound_at", "bind_count"}
        assert plain_redis.zrange("agent_sessions:agent-é", 0, -1) == ["s", "t"]

    def test_every_key_ends(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a", ttl=50)
        assert 49_000 < plain_redis.pttl("session:s") <= 50_000
        assert 109_000 < plain_redis.pttl("agent_sessions:a") <= 110_000
        gov.sessions.bind("t", "a", ttl=500)
        gov.sessions.bind("u", "a", ttl=5)
        assert 559_000 < plain_redis.pttl("agent_sessions:a") <= 560_000, "an index lives as long as what it names"
        gov.sessions.bind("v", "a")
        assert 3_590_000 < plain_redis.pttl("session:v") <= 3_600_000
        assert all(plain_redis.pttl(key) > 0 for key in plain_redis.keys("*"))

    def test_an_index_forgets_sessions_that_have_ended(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.zadd("agent_sessions:a", {"ended": 1})
        gov.sessions.bind("s", "a")
        assert plain_redis.zrange("agent_sessions:a", 0, -1) == ["s"]

    def test_an_index_never_names_a_session_for_less_long_than_it_lives(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a", ttl=500)
        longest = plain_redis.zscore("agent_sessions:a", "s")
        gov.sessions.bind("s", "a", ttl=5)
        assert plain_redis.zscore("agent_sessions:a", "s") == longest

    def test_touch_extends_after_a_tenth_and_the_index_with_it(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.pexpire("session:s", 3_300_000)
        plain_redis.config_resetstat()
        assert gov.sessions.touch("s") is True
        assert plain_redis.pttl("session:s") <= 3_300_000, "not a tenth has passed"
        assert not any("eval" in name for name in sent(plain_redis))
        plain_redis.pexpire("session:s", 3_200_000)
        plain_redis.pexpire("agent_sessions:a", 5000)
        score = plain_redis.zscore("agent_sessions:a", "s")
        plain_redis.zadd("agent_sessions:a", {"s": score - 3000})
        found = gov.sessions.get("s", touch=True)
        assert found is not None
        assert found.expires_at is not None
        assert (found.expires_at - datetime.now(UTC)).total_seconds() > 3500
        assert plain_redis.pttl("session:s") > 3_590_000
        assert plain_redis.pttl("agent_sessions:a") > 3_650_000
        assert plain_redis.zscore("agent_sessions:a", "s") >= score

    def test_touch_never_shortens_and_revives_nothing(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a", ttl=7200)
        assert gov.sessions.touch("s")
        assert plain_redis.pttl("session:s") > 7_190_000
        plain_redis.set("session:forever", json.dumps({"agent_id": "a"}))
        assert gov.sessions.touch("forever")
        assert plain_redis.pttl("session:forever") == -1
        # As where the key changes between reading and extending.
        run = lambda key: gov._redis.run(gov.sessions._touch, (key,), 1000)  # type: ignore[union-attr] # noqa: E731
        assert (run("session:s"), run("session:forever"), run("session:none")) == (1, 1, 0)
        assert plain_redis.pttl("session:s") > 7_190_000
        assert plain_redis.pttl("session:forever") == -1
        assert not plain_redis.exists("session:none")

    def test_get_is_one_round_trip_without_a_write(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.config_resetstat()
        gov.sessions.get("s")
        assert sent(plain_redis) == {"get", "pttl"}

    @pytest.mark.parametrize(
        ("record", "bound_at"),
        [
            ({"agent_id": "a"}, datetime(1970, 1, 1, tzinfo=UTC)),
            ({"agent_id": "a", "bound_at": "2026-01-02T03:04:05Z"}, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
            ({"agent_id": "a", "bound_at": "2026-01-02T03:04:05"}, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
            ({"agent_id": "a", "bound_at": "2026-01-02T03:04:05+02:00"}, datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)),
            ({"agent_id": "a", "bound_at": "yesterday"}, datetime(1970, 1, 1, tzinfo=UTC)),
            ({"agent_id": "a", "bound_at": 5, "bind_count": None}, datetime(1970, 1, 1, tzinfo=UTC)),
        ],
    )
    def test_records_of_the_async_service(
        self, gov: GovRedis, plain_redis: Any, record: dict[str, Any], bound_at: datetime
    ) -> None:
        plain_redis.set("session:s", json.dumps({**record, "api_key_hash": "x"}))
        found = gov.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.bound_at, found.bind_count, found.data) == ("a", bound_at, 1, None)
        assert found.expires_at is None
        assert found.bound_at.utcoffset() is not None
        with pytest.raises(SessionAlreadyBound):
            gov.sessions.bind("s", "b", if_absent=True)
        assert gov.sessions.for_agent("a") == []
        assert gov.sessions.bind("s", "b").bind_count == 2

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"x",
            b"[]",
            b'"a"',
            b"null",
            b"5",
            b"{}",
            b'{"agent_id": null}',
            b'{"agent_id": 5}',
            b"\xff\xfe",
            b'{"agent_id": "a", "bind_count": "x"}',
            b'{"agent_id": "a", "bind_count": [1]}',
            b'{"agent_id": "a", "bind_count": 1e999}',
        ],
        ids=repr,
    )
    def test_a_corrupt_record_is_an_error_until_bound_over(self, gov: GovRedis, plain_redis: Any, raw: bytes) -> None:
        plain_redis.set("session:s", raw)
        for refused in (
            lambda: gov.sessions.get("s"),
            lambda: gov.sessions.touch("s"),
            lambda: gov.sessions.bind("s", "b", if_absent=True),
        ):
            with pytest.raises(BackendError, match="record of session 's'"):
                refused()
        assert gov.sessions.bind("s", "a").agent_id == "a"
        assert gov.sessions.get_agent_id("s") == "a"

    def test_unbind_agent_ends_what_nobody_can_read(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a")
        deep = '{"agent_id": "a", "data": ' + "[" * 1100 + "]" * 1100 + "}"
        plain_redis.set("session:s", deep, ex=100)
        assert gov.sessions.unbind_agent("a") == 1
        assert not plain_redis.exists("session:s")

    def test_a_bind_that_arrives_twice_counts_once(self, gov: GovRedis, plain_redis: Any) -> None:
        head, at = '{"agent_id": "a", "bound_at": "t"', "t"
        run = lambda: gov._redis.run(  # type: ignore[union-attr] # noqa: E731
            gov.sessions._bind, ("session:s",), head, "a", at, 5000, 0
        )
        first, second = run(), run()
        assert json.loads(first[1]) == json.loads(second[1]) == {"agent_id": "a", "bound_at": "t", "bind_count": 1}
        assert 0 < second[2] <= 5000

    def test_counts(self, gov: GovRedis) -> None:
        gov.sessions.bind("s", "a")
        gov.sessions.get("s")
        gov.sessions.get("none")
        with pytest.raises(SessionAlreadyBound):
            gov.sessions.bind("s", "b", if_absent=True)
        counted = gov.counters.read()
        assert (counted["sessions.bound"], counted["sessions.hits"], counted["sessions.misses"]) == (1, 1, 1)

    def test_a_prefix_keeps_two_apart(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        one, two = (make_gov(redis_url=redis_server.url, key_prefix=prefix) for prefix in ("one:", "two:"))
        one.sessions.bind("s", "a")
        assert two.sessions.get("s") is None
        assert redis_server.command("EXISTS", "one:session:s") == 1
