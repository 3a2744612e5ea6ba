"""SessionCache on a living Redis: its values, counters, TTLs, refusals, and the values of other clients."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import pytest
from support import OF_SENTINELS, POSTGRES_AWAY, REDIS_AWAY, redis_of

from govredis import BackendError, GovRedis, SessionAlreadyBound
from govredis.client import Script
from govredis.sessions import SessionCache
from govredis.testing.servers import RedisServer

UTC = timezone.utc


def sent(plain_redis: Any) -> set[str]:
    """The commands that reached the server since CONFIG RESETSTAT, the asking excepted."""
    names = {name.removeprefix("cmdstat_") for name in plain_redis.info("commandstats").keys() - OF_SENTINELS}
    return {name for name in names if not name.startswith(("config", "info", "client", "select"))}


HERE = "that of the test"

#: How a GovRedis is set up, and who answers then.
MODES: dict[str, tuple[dict[str, Any], str]] = {
    "redis": ({}, "redis"),
    "durable": ({"database_url": HERE}, "redis"),
    "durable, hashed": ({"database_url": HERE, "session_hash_ids": True}, "redis"),
    "durable, redis away": ({"database_url": HERE, "redis_url": REDIS_AWAY}, "postgres"),
    "durable, redis disabled": ({"database_url": HERE, "redis_enabled": False}, "postgres"),
    "disabled": ({"redis_enabled": False}, "local"),
}
#: With nobody to ask, what this process does not know is unknown: for the promises that hold then, too.
AWAY_MODES: dict[str, tuple[dict[str, Any], str]] = {
    "redis away": ({"redis_url": REDIS_AWAY}, "local"),
    "both away": ({"redis_url": REDIS_AWAY, "database_url": POSTGRES_AWAY}, "local"),
    "postgres away": ({"database_url": POSTGRES_AWAY}, "redis"),
}


class Mode(NamedTuple):
    gov: GovRedis
    backend: str

    def named(self, *session_ids: str) -> list[str]:
        """The names that `for_agent` uses."""
        if not self.gov.config.session_hash_ids:
            return sorted(session_ids)
        return sorted(hashlib.sha256(sid.encode()).hexdigest() for sid in session_ids)


@pytest.fixture
def mode(
    request: pytest.FixtureRequest,
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
) -> Mode:
    settings, backend = {**MODES, **AWAY_MODES}[request.param]
    here = {}
    if settings.get("database_url") == HERE:
        here = {"database_url": request.getfixturevalue("postgres_server").url}
    return Mode(make_gov(**{"redis_url": redis_server.url, "session_ttl": 100, **settings, **here}), backend)


everywhere = pytest.mark.parametrize("mode", [*MODES, *AWAY_MODES], indirect=True)
where_asked = pytest.mark.parametrize("mode", MODES, indirect=True)


@pytest.fixture
def redis_alone(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


class TestContract:
    @everywhere
    def test_bind_and_get(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        before = datetime.now(UTC)
        bound = sessions.bind("s", "agent")
        after = datetime.now(UTC)
        assert (bound.session_id, bound.agent_id, bound.bind_count, bound.data) == ("s", "agent", 1, None)
        assert before <= bound.bound_at <= after
        assert bound.bound_at.utcoffset() == timedelta(0)
        assert bound.expires_at is not None
        assert abs((bound.expires_at - before).total_seconds() - 100) < 30
        found = sessions.get("s")
        assert found is not None
        assert (found.session_id, found.agent_id, found.bound_at, found.bind_count) == ("s", "agent", bound.bound_at, 1)
        assert found.expires_at is not None
        assert found.expires_at.utcoffset() == timedelta(0)
        assert abs((found.expires_at - bound.expires_at).total_seconds()) < 30
        assert found.backend == mode.backend
        assert sessions.get_agent_id("s") == "agent"

    @where_asked
    def test_an_unknown_session_is_none(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        assert sessions.get("unknown") is None
        assert sessions.get_agent_id("unknown") is None
        assert sessions.touch("unknown") is False
        assert sessions.get("unknown", touch=True) is None
        assert sessions.rotate("unknown") is None
        assert sessions.unbind("unknown") is False
        assert sessions.for_agent("unknown") == []
        assert sessions.unbind_agent("unknown") == 0

    @everywhere
    def test_rebinding_counts_and_goes_to_the_new_agent(self, mode: Mode) -> None:
        for count, agent in enumerate(("a", "a", "b"), 1):
            assert mode.gov.sessions.bind("s", agent).bind_count == count
        assert mode.gov.sessions.get_agent_id("s") == "b"
        assert mode.gov.sessions.unbind_agent("a") == 0
        assert mode.gov.sessions.get_agent_id("s") == "b"

    @where_asked
    def test_rebinding_moves_it_to_the_new_agents_list(self, mode: Mode) -> None:
        for agent in ("a", "b"):
            mode.gov.sessions.bind("s", agent)
        assert mode.gov.sessions.for_agent("a") == []
        assert mode.gov.sessions.for_agent("b") == mode.named("s")

    @where_asked
    def test_if_absent(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        first = sessions.bind("s", "a", if_absent=True, ttl=50, data=1)
        again = sessions.bind("s", "a", if_absent=True, data=2)
        assert (again.bind_count, again.data, again.bound_at) == (1, 1, first.bound_at)
        with pytest.raises(SessionAlreadyBound, match="'a'") as refused:
            sessions.bind("s", "b", if_absent=True, ttl=70)
        existing = refused.value.existing
        assert existing is not None
        assert (existing.session_id, existing.agent_id, existing.data) == ("s", "a", 1)
        for binding in (again, existing):
            assert binding.expires_at is not None
            left = (binding.expires_at - datetime.now(UTC)).total_seconds()
            assert left <= 50, "when it ends, not when it would have, had it been bound now"
        assert sessions.get_agent_id("s") == "a"

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
    @where_asked
    def test_data_comes_back_as_it_was(self, mode: Mode, data: Any) -> None:
        sessions = mode.gov.sessions
        assert sessions.bind("s", "a", data=data).data == data
        found = sessions.get("s")
        assert found is not None
        assert found.data == data
        assert sessions.bind("s", "a", if_absent=True).data == data
        with pytest.raises(SessionAlreadyBound):
            sessions.bind("s", "b", if_absent=True)
        assert sessions.for_agent("a") == mode.named("s")
        assert sessions.unbind_agent("a") == 1
        assert sessions.get("s") is None

    @everywhere
    def test_unbind(self, mode: Mode) -> None:
        mode.gov.sessions.bind("s", "a")
        assert mode.gov.sessions.unbind("s") is True
        assert mode.gov.sessions.get("s") is None
        assert mode.gov.sessions.unbind("s") is False
        assert mode.gov.sessions.touch("s") is False

    @everywhere
    def test_a_session_that_was_revoked_can_be_bound_anew(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        for end in (lambda: sessions.unbind("s"), lambda: sessions.unbind_agent("a")):
            sessions.bind("s", "a")
            sessions.bind("s", "a")
            end()
            assert sessions.get("s") is None
            again = sessions.bind("s", "a", if_absent=True)
            assert (again.agent_id, again.bind_count) == ("a", 1)
            found = sessions.get("s")
            assert found is not None
            assert (found.agent_id, found.bind_count) == ("a", 1)

    @where_asked
    def test_for_agent_and_unbind_agent(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        for sid in ("s2", "s1", "s3"):
            sessions.bind(sid, "a")
        sessions.bind("other", "b")
        sessions.unbind("s3")
        assert sessions.for_agent("a") == mode.named("s1", "s2")
        assert sessions.for_agent("nobody") == []
        assert sessions.unbind_agent("a") == 2
        assert sessions.unbind_agent("a") == 0
        assert sessions.for_agent("a") == []
        assert sessions.get("s1") is None
        assert sessions.get_agent_id("other") == "b"

    @everywhere
    def test_unbind_agent_ends_known_sessions(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        sessions.bind("s", "a")
        sessions.bind("t", "a")
        assert sessions.unbind_agent("a") == 2
        assert sessions.get("s") is None
        assert sessions.get("t") is None

    @everywhere
    def test_start(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        sessions.bind("planted", "mallory", data={"of": "mallory"})
        started = sessions.start("ada", replacing="planted", ttl=60, data={"x": []})
        assert len(started.session_id) >= 43, "256 bits"
        assert sessions.start("ada").session_id != started.session_id
        assert (started.agent_id, started.bind_count, started.data) == ("ada", 1, {"x": []})
        assert started.expires_at is not None
        assert abs((started.expires_at - started.bound_at).total_seconds() - 60) < 5
        found = sessions.get(started.session_id)
        assert found is not None
        assert (found.agent_id, found.data) == ("ada", {"x": []})
        assert sessions.get("planted") is None, "nobody is logged in under an id that somebody else may know"

    @everywhere
    @pytest.mark.parametrize("replacing", [None, "unknown", "", "{", "a\x00b", "x" * 600, "\ud800"], ids=repr)
    def test_a_login_does_not_fail_for_its_old_id(self, mode: Mode, replacing: str | None) -> None:
        sessions = mode.gov.sessions
        started = sessions.start("ada", replacing=replacing)
        assert sessions.get_agent_id(started.session_id) == "ada"

    @pytest.mark.parametrize("mode", ["redis", "durable, hashed", "disabled"], indirect=True)
    def test_bad_arguments_of_start_are_refused_before_anything_is_sent(self, mode: Mode, plain_redis: Any) -> None:
        plain_redis.config_resetstat()
        for options in ({"replacing": b"cookie"}, {"replacing": 5.5}, {"ttl": 0}, {"data": {1}}):
            with pytest.raises(ValueError, match=r"^(replacing is|ttl is|data cannot)"):
                mode.gov.sessions.start("ada", **options)
        with pytest.raises(ValueError, match="agent_id is"):
            mode.gov.sessions.start("")
        assert sent(plain_redis) == set()

    @everywhere
    def test_the_session_that_is_replaced_ends_after_the_new_one_is_bound(
        self, mode: Mode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A login that fails leaves the visitor as he was."""
        sessions = mode.gov.sessions
        sessions.bind("s", "ada")

        def fail(self: SessionCache, *args: Any, **options: Any) -> Any:
            raise BackendError("a test")

        with monkeypatch.context() as patched:
            patched.setattr(SessionCache, "bind", fail)
            with pytest.raises(BackendError):
                sessions.start("ada", replacing="s")
        assert sessions.get_agent_id("s") == "ada"

    @everywhere
    def test_rotate(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        old = sessions.bind("s", "a", data={"x": []}, ttl=60)
        sid = sessions.rotate("s")
        assert sid is not None
        assert len(sid) >= 43, "256 bits"
        assert sessions.get("s") is None
        found = sessions.get(sid)
        assert found is not None
        assert (found.session_id, found.agent_id, found.data) == (sid, "a", {"x": []})
        assert found.expires_at is not None
        assert old.expires_at is not None
        assert abs((found.expires_at - old.expires_at).total_seconds()) < 5, "it ends when it would have"
        assert sessions.rotate("s") is None

    @everywhere
    def test_a_session_revoked_while_it_is_rotated_is_under_no_id(
        self, mode: Mode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sessions = mode.gov.sessions
        sessions.bind("s", "a")
        bind, made = SessionCache._bind, []

        def bind_late(self: SessionCache, order: Any) -> Any:
            self.unbind("s")
            made.append(order.session_id)
            return bind(self, order)

        monkeypatch.setattr(SessionCache, "_bind", bind_late)
        assert sessions.rotate("s") is None
        assert sessions.get(made[0]) is None

    @where_asked
    def test_a_session_ends(self, mode: Mode) -> None:
        mode.gov.sessions.bind("s", "a", ttl=0.05)
        time.sleep(0.1)
        assert mode.gov.sessions.get("s") is None
        assert mode.gov.sessions.touch("s") is False
        assert mode.gov.sessions.bind("s", "b", if_absent=True).bind_count == 1

    @everywhere
    def test_touch(self, mode: Mode) -> None:
        mode.gov.sessions.bind("s", "a", ttl=50)
        assert mode.gov.sessions.touch("s") is True
        found = mode.gov.sessions.get("s")
        assert found is not None
        assert found.expires_at is not None
        assert (found.expires_at - datetime.now(UTC)).total_seconds() > 60
        mode.gov.sessions.bind("t", "a", ttl=500)
        touched = mode.gov.sessions.get("t", touch=True)
        assert touched is not None
        assert touched.expires_at is not None
        assert (touched.expires_at - datetime.now(UTC)).total_seconds() > 400, "never less"

    @everywhere
    def test_touch_by_a_ttl_of_its_own(self, mode: Mode) -> None:
        sessions = mode.gov.sessions
        sessions.bind("s", "a", data={"n": 1})
        for ttl in 10**6, 50, None:
            assert sessions.touch("s", ttl=ttl) is True
            found = sessions.get("s", touch=True)
            assert found is not None and found.expires_at is not None
            assert (found.expires_at - datetime.now(UTC)).total_seconds() > 900_000, "never less"
            assert found.data == {"n": 1}
        with pytest.raises(ValueError, match="ttl is 0"):
            sessions.touch("s", ttl=0)
        sessions.unbind("s")
        assert sessions.touch("s", ttl=10**6) is False

    @pytest.mark.parametrize("mode", ["redis", "durable, hashed", "disabled"], indirect=True)
    @pytest.mark.parametrize("bad", ["", "{s}", "a\x00", "a" * 513, b"s", None, 5.5], ids=repr)
    def test_bad_ids_are_refused_before_anything_is_sent(self, mode: Mode, plain_redis: Any, bad: Any) -> None:
        plain_redis.config_resetstat()
        sessions = mode.gov.sessions
        for refused in (
            lambda: sessions.bind(bad, "a"),
            lambda: sessions.bind("s", bad),
            lambda: sessions.get(bad),
            lambda: sessions.get_agent_id(bad),
            lambda: sessions.touch(bad),
            lambda: sessions.unbind(bad),
            lambda: sessions.for_agent(bad),
            lambda: sessions.unbind_agent(bad),
            lambda: sessions.rotate(bad),
        ):
            with pytest.raises(ValueError, match="_id is"):
                refused()
        assert sent(plain_redis) == set()

    @pytest.mark.parametrize("mode", ["redis", "durable", "disabled"], indirect=True)
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
        self, mode: Mode, plain_redis: Any, options: dict[str, Any]
    ) -> None:
        plain_redis.config_resetstat()
        with pytest.raises(ValueError, match=r"ttl is|data cannot be stored|data is"):
            mode.gov.sessions.bind("s", "a", **options)
        assert sent(plain_redis) == set()


class TestOnRedis:
    def test_the_wire_format(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        bound = redis_alone.sessions.bind("s", "agent-é", data={"list": []})
        record = json.loads(plain_redis.get("session:s"))
        assert record == {
            "agent_id": "agent-é",
            "bound_at": bound.bound_at.isoformat(timespec="microseconds"),
            "data": {"list": []},
            "bind_count": 1,
            "__govredis__": {},
        }
        assert record["bound_at"].endswith("+00:00")
        redis_alone.sessions.bind("t", "agent-é")
        assert set(json.loads(plain_redis.get("session:t"))) == {"agent_id", "bound_at", "bind_count", "__govredis__"}
        assert plain_redis.zrange("agent_sessions:agent-é", 0, -1) == ["s", "t"]

    def test_every_key_ends(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        redis_alone.sessions.bind("s", "a", ttl=50)
        assert 0 < plain_redis.pttl("session:s") <= 50_000
        assert 60_000 < plain_redis.pttl("agent_sessions:a") <= 110_000
        redis_alone.sessions.bind("t", "a", ttl=500)
        redis_alone.sessions.bind("u", "a", ttl=50)
        assert 500_000 < plain_redis.pttl("agent_sessions:a") <= 560_000, "an index lives as long as what it names"
        redis_alone.sessions.bind("v", "a")
        assert 3_500_000 < plain_redis.pttl("session:v") <= 3_600_000
        assert all(plain_redis.pttl(key) > 0 for key in plain_redis.keys("*"))

    def test_an_index_forgets_sessions_that_have_ended(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        plain_redis.zadd("agent_sessions:a", {"ended": 1})
        redis_alone.sessions.bind("s", "a")
        assert plain_redis.zrange("agent_sessions:a", 0, -1) == ["s"]

    def test_an_index_never_names_a_session_for_less_long_than_it_lives(
        self, redis_alone: GovRedis, plain_redis: Any
    ) -> None:
        redis_alone.sessions.bind("s", "a", ttl=500)
        longest = plain_redis.zscore("agent_sessions:a", "s")
        redis_alone.sessions.bind("s", "a", ttl=5)
        assert plain_redis.zscore("agent_sessions:a", "s") == longest

    def test_touch_extends_after_a_tenth_and_the_index_with_it(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        redis_alone.sessions.bind("s", "a")
        plain_redis.pexpire("session:s", 3_300_000)
        plain_redis.config_resetstat()
        assert redis_alone.sessions.touch("s") is True
        assert plain_redis.pttl("session:s") <= 3_300_000, "not a tenth has passed"
        assert not any("eval" in name for name in sent(plain_redis))
        plain_redis.pexpire("session:s", 3_200_000)
        plain_redis.pexpire("agent_sessions:a", 50_000)
        score = plain_redis.zscore("agent_sessions:a", "s")
        plain_redis.zadd("agent_sessions:a", {"s": score - 3000})
        found = redis_alone.sessions.get("s", touch=True)
        assert found is not None
        assert found.expires_at is not None
        assert (found.expires_at - datetime.now(UTC)).total_seconds() > 3500
        assert plain_redis.pttl("session:s") > 3_500_000
        assert plain_redis.pttl("agent_sessions:a") > 3_610_000
        assert plain_redis.zscore("agent_sessions:a", "s") >= score

    def test_touch_never_shortens_and_revives_nothing(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        redis_alone.sessions.bind("s", "a", ttl=7200)
        assert redis_alone.sessions.touch("s")
        assert plain_redis.pttl("session:s") > 7_100_000
        plain_redis.set("session:forever", json.dumps({"agent_id": "a"}))
        assert redis_alone.sessions.touch("forever")
        assert plain_redis.pttl("session:forever") == -1
        # As where the key changes between reading and extending.
        touch = Script("govredis.sessions", "touch.lua")
        keys = ("session:s", "session:forever", "session:none")
        assert [redis_of(redis_alone).run(touch, (key,), "1000") for key in keys] == [1, 1, 0]
        assert plain_redis.pttl("session:s") > 7_100_000
        assert plain_redis.pttl("session:forever") == -1
        assert not plain_redis.exists("session:none")

    def test_get_is_one_round_trip_without_a_write(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        redis_alone.sessions.bind("s", "a")
        plain_redis.config_resetstat()
        redis_alone.sessions.get("s")
        assert sent(plain_redis) == {"mget", "pttl"}

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
        self, redis_alone: GovRedis, plain_redis: Any, record: dict[str, Any], bound_at: datetime
    ) -> None:
        plain_redis.set("session:s", json.dumps({**record, "api_key_hash": "x"}))
        found = redis_alone.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.bound_at, found.bind_count, found.data) == ("a", bound_at, 1, None)
        assert found.expires_at is None
        assert found.bound_at.utcoffset() is not None
        with pytest.raises(SessionAlreadyBound):
            redis_alone.sessions.bind("s", "b", if_absent=True)
        assert redis_alone.sessions.for_agent("a") == ["s"], "once it was seen"
        assert redis_alone.sessions.bind("s", "b").bind_count == 2

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
    def test_a_corrupt_record_is_an_error_until_bound_over(
        self, redis_alone: GovRedis, plain_redis: Any, raw: bytes
    ) -> None:
        plain_redis.set("session:s", raw)
        for refused in (
            lambda: redis_alone.sessions.get("s"),
            lambda: redis_alone.sessions.touch("s"),
            lambda: redis_alone.sessions.bind("s", "b", if_absent=True),
        ):
            with pytest.raises(BackendError, match="record of session 's'"):
                refused()
        assert redis_alone.sessions.bind("s", "a").agent_id == "a"
        assert redis_alone.sessions.get_agent_id("s") == "a"

    def test_unbind_agent_ends_unreadable_records(self, redis_alone: GovRedis, plain_redis: Any) -> None:
        redis_alone.sessions.bind("s", "a")
        deep = '{"agent_id": "a", "data": ' + "[" * 1100 + "]" * 1100 + "}"
        plain_redis.set("session:s", deep, ex=100)
        assert redis_alone.sessions.unbind_agent("a") == 1
        assert not plain_redis.exists("session:s")

    def test_a_bind_that_arrives_twice_counts_once(
        self, redis_alone: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = redis_of(redis_alone)
        pipeline = type(client).pipeline

        def twice(self: Any, commands: Any, scripts: Any = (), **options: Any) -> Any:
            replies = pipeline(self, commands, scripts, **options)
            return pipeline(self, commands, scripts, **options) if len(commands) == 1 else replies

        monkeypatch.setattr(type(client), "pipeline", twice)
        bound = redis_alone.sessions.bind("s", "a", data=[1], ttl=50)
        assert (bound.bind_count, bound.data, bound.backend) == (1, [1], "redis")
        assert json.loads(plain_redis.get("session:s"))["bind_count"] == 1

    def test_counts(self, redis_alone: GovRedis) -> None:
        redis_alone.sessions.bind("s", "a")
        redis_alone.sessions.get("s")
        redis_alone.sessions.get("none")
        with pytest.raises(SessionAlreadyBound):
            redis_alone.sessions.bind("s", "b", if_absent=True)
        counted = redis_alone.counters.read()
        assert (counted["sessions.bound"], counted["sessions.hits"], counted["sessions.misses"]) == (1, 1, 1)

    def test_a_prefix_keeps_two_apart(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        one, two = (make_gov(redis_url=redis_server.url, key_prefix=prefix) for prefix in ("one:", "two:"))
        one.sessions.bind("s", "a")
        assert two.sessions.get("s") is None
        assert redis_server.command("EXISTS", "one:session:s") == 1
