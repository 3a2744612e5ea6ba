"""Whatever somebody has put at our keys: a miss or a clear error, counted, replaced by the next write; and never one
for the sessions beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from support import redis_of

from govredis import BackendError, GovRedis, SessionAlreadyBound
from govredis._sole import SoleMark, nobody
from govredis.testing.servers import PostgresServer, RedisServer

Plant = Callable[[Any, str], None]

DEEP = '{"agent_id": "a", "data": ' + "[" * 10_000 + "]" * 10_000 + "}"


def string(value: str | bytes) -> Plant:
    return lambda redis, key: redis.set(key, value)


OTHER_TYPES: dict[str, Plant] = {
    "a list": lambda redis, key: redis.lpush(key, "x"),
    "a hash": lambda redis, key: redis.hset(key, "agent_id", "a"),
    "a set": lambda redis, key: redis.sadd(key, "a"),
    "a stream": lambda redis, key: redis.xadd(key, {"agent_id": "a"}),
}
NO_RECORDS: dict[str, Plant] = {
    **OTHER_TYPES,
    "a sorted set": lambda redis, key: redis.zadd(key, {"a": 1}),
    "nothing": string(""),
    "not UTF-8": string(b'{"agent_id": "\xff\xfe"}'),
    "UTF-16": string('{"agent_id": "a"'.encode("utf-16")),
    "nested too deep": string(DEEP),
    "NaN": string("NaN"),
    "a huge number": string("9" * 10_000),
    "a list in JSON": string("[]"),
    "null": string("null"),
    "no agent": string("{}"),
    "an empty agent": string('{"agent_id": ""}'),
    "a list as the agent": string('{"agent_id": ["a"]}'),
    "a text as the count": string('{"agent_id": "a", "bind_count": "x"}'),
    "NaN as the count": string('{"agent_id": "a", "bind_count": NaN}'),
}
NO_STRINGS = {*OTHER_TYPES, "a sorted set"}
#: Records that name an agent, though no possible one: they are not the agent's whose index names the session.
OTHERS = {"not UTF-8", "an empty agent"}
#: Agents that have no key of ours, and no row.
ODD_AGENTS = {"braces": "{a}", "an escape": "\x1b[31m", "long": "a" * 600, "no UTF-8": "\ud800", "NUL": "a\x00b"}
#: Odd, and records all the same: of the agent "a", as others can see.
ODD_RECORDS: dict[str, str] = {
    "a huge count": '{"agent_id": "a", "bind_count": 1%s}' % ("0" * 400),
    "a negative count": '{"agent_id": "a", "bind_count": -5}',
    "a fraction as the count": '{"agent_id": "a", "bind_count": 1.5}',
    "the first year": '{"agent_id": "a", "bound_at": "0001-01-01T00:00:00+14:00"}',
    "the last year": '{"agent_id": "a", "bound_at": "9999-12-31T23:59:59-14:00"}',
    "NaN in the data": '{"agent_id": "a", "data": [NaN, Infinity, 1%s]}' % ("0" * 400),
    "a huge stamp": '{"agent_id": "a", "__govredis__": {"epoch": 100000000000000000000, "version": 1e30}}',
    "a huge version": '{"agent_id": "a", "__govredis__": {"epoch": 1, "version": 100000000000000000000}}',
    "a negative stamp": '{"agent_id": "a", "__govredis__": {"epoch": -1, "version": -1}}',
}
NO_MARKS: dict[str, Plant] = {
    **OTHER_TYPES,
    "no number": string("x"),
    "not UTF-8": string(b"\xff\xfe"),
    "NaN": string("nan"),
    "a huge number": string("9" * 400),
    "a negative number": string("-5"),
    "in hexadecimal": string("0x7fffffffffff"),
    "with an exponent": string("1e15"),
}
BAD_MEMBERS = [b"\xff\xfe", b"{s}", b"", b"\x1b[31m", b"x" * 600]


@pytest.fixture
def alone(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    """Without PostgreSQL."""
    return make_gov(redis_url=redis_server.url)


@pytest.fixture(params=["redis", "durable"])
def either(request: pytest.FixtureRequest) -> GovRedis:
    found: GovRedis = request.getfixturevalue("alone" if request.param == "redis" else "gov")
    return found


def malformed(gov: GovRedis) -> int:
    return gov.counters.get("sessions.malformed")


def plant(redis: Any, key: str, planted: Plant) -> None:
    redis.delete(key)
    planted(redis, key)


@pytest.mark.parametrize("planted", NO_RECORDS.values(), ids=NO_RECORDS)
class TestNoRecord:
    """A value that is no record, in the place of a record."""

    def test_is_an_error_until_it_is_bound_over(self, alone: GovRedis, plain_redis: Any, planted: Plant) -> None:
        sessions = alone.sessions
        plant(plain_redis, "session:s", planted)
        for n, refused in enumerate(
            (
                lambda: sessions.get("s"),
                lambda: sessions.get_agent_id("s", touch=True),
                lambda: sessions.touch("s"),
                lambda: sessions.rotate("s"),
                lambda: sessions.bind("s", "a", if_absent=True),
            ),
            1,
        ):
            with pytest.raises(
                BackendError, match=r"^the record of session 's' is not a JSON object with an agent_id$"
            ):
                refused()
            assert malformed(alone) == n
        assert sessions.bind("s", "a").bind_count == 2, "what nobody can read is somebody's nevertheless"
        found = sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.bind_count) == ("a", 2)
        assert malformed(alone) == 5

    def test_can_be_ended(self, either: GovRedis, plain_redis: Any, planted: Plant) -> None:
        plant(plain_redis, "session:s", planted)
        assert either.sessions.unbind("s") is True
        assert not plain_redis.exists("session:s")
        assert either.sessions.get("s") is None
        plant(plain_redis, "session:s", planted)
        started = either.sessions.start("b", replacing="s")
        assert not plain_redis.exists("session:s")
        assert either.sessions.get_agent_id(started.session_id) == "b"

    def test_is_no_error_for_those_beside_it(self, either: GovRedis, plain_redis: Any, planted: Plant) -> None:
        sessions = either.sessions
        which = next(name for name, found in NO_RECORDS.items() if found is planted)
        for sid in ("r", "s", "t"):
            sessions.bind(sid, "a")
        plant(plain_redis, "session:s", planted)
        durable = either.config.database_url is not None
        assert sessions.for_agent("a") == (["r", "s", "t"] if durable else ["r", "t"])
        assert malformed(either) == (0 if durable or which in NO_STRINGS else 1)
        if durable:
            assert sessions.verify().differing == ()
        kept = which in OTHERS
        assert sessions.unbind_agent("a") == (3 if durable else 3 - kept), "its row has ended"
        assert plain_redis.exists("session:r", "session:s", "session:t") == kept
        assert [sessions.get(sid) for sid in ("r", "t")] == [None] * 2

    def test_does_not_count_where_there_is_a_row(self, gov: GovRedis, plain_redis: Any, planted: Plant) -> None:
        sessions = gov.sessions
        sessions.bind("s", "a", data=[1])
        calls: list[Callable[[], Any]] = [
            lambda: sessions.get("s"),
            lambda: sessions.get("s", touch=True),
            lambda: sessions.bind("s", "a", if_absent=True),
        ]
        for n, call in enumerate(calls, 1):
            plant(plain_redis, "session:s", planted)
            found = call()
            assert (found.agent_id, found.data) == ("a", [1])
            assert malformed(gov) == n
            found = sessions.get("s")
            assert found is not None
            assert found.backend == "redis", "put right"
        plant(plain_redis, "session:s", planted)
        assert sessions.bind("s", "b").agent_id == "b"
        assert sessions.get_agent_id("s") == "b"
        plant(plain_redis, "session:s", planted)
        new = sessions.rotate("s")
        assert new is not None
        assert (sessions.get_agent_id(new), sessions.get("s")) == ("b", None)

    def test_without_a_row_is_an_error_too(self, gov: GovRedis, plain_redis: Any, planted: Plant) -> None:
        plant(plain_redis, "session:s", planted)
        with pytest.raises(BackendError, match=r"^the record of session 's'"):
            gov.sessions.get("s")
        assert malformed(gov) == 1
        assert gov.sessions.bind("s", "a").agent_id == "a"
        assert gov.sessions.get_agent_id("s") == "a"
        gov.sessions.unbind("s")
        plant(plain_redis, "session:s", planted)
        assert gov.sessions.get("s") is None, "the row says that it has ended"


@pytest.mark.parametrize("record", ODD_RECORDS.values(), ids=ODD_RECORDS)
def test_odd_records_are_read_and_bound_over(either: GovRedis, plain_redis: Any, record: str) -> None:
    sessions = either.sessions
    for options in ({}, {"ex": 100}):
        plain_redis.set("session:s", record, **options)
        for touch in (False, True):
            found = sessions.get("s", touch=touch)
            assert found is not None
            assert found.agent_id == "a"
            assert 1 <= found.bind_count < 2**31
            assert found.bound_at.utcoffset().total_seconds() == 0  # type: ignore[union-attr]
        with pytest.raises(SessionAlreadyBound):
            sessions.bind("s", "b", if_absent=True)
        count = sessions.bind("s", "b").bind_count
        assert 1 <= count < 2**31
        found = sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.bind_count) == ("b", count)
        assert sessions.unbind("s")


@pytest.mark.parametrize("agent", ODD_AGENTS.values(), ids=ODD_AGENTS)
def test_any_agent_id_is_accepted(either: GovRedis, plain_redis: Any, agent: str) -> None:
    """The async service has its own rules for ids."""
    sessions = either.sessions
    for second, options, ttl in ((5, {}, -1), (6, {"ex": 100}, 3_500_000)):
        record = {"agent_id": agent, "bound_at": f"2026-01-02T03:04:{second:02}"}
        plain_redis.set("session:s", json.dumps(record), **options)
        for touch in (True, False, True):
            found = sessions.get("s", touch=touch)
            assert found is not None
            assert found.agent_id == agent
        assert plain_redis.pttl("session:s") >= ttl
        assert sessions.exists("s")
        assert sessions.update("s", [1]).data == [1]
        with pytest.raises(SessionAlreadyBound):
            sessions.bind("s", "b", if_absent=True)
        assert sessions.unbind("s") is True
        assert not plain_redis.exists("session:s")


def test_a_huge_ttl(either: GovRedis, plain_redis: Any) -> None:
    sessions = either.sessions
    for key in ("session:s", "{session:s}:revoked", "{session:s}:version", "agent_sessions:a"):
        sessions.bind("s", "a")
        plain_redis.execute_command("PEXPIREAT", key, 2**63 - 1)
        for found in (sessions.get("s"), sessions.get("s", touch=True), sessions.bind("s", "a", if_absent=True)):
            assert found is not None
            assert found.agent_id == "a"
        assert sessions.for_agent("a") == ["s"]
        plain_redis.execute_command("PEXPIREAT", key, 2**63 - 1)
        new = sessions.rotate("s")
        assert new is not None
        assert sessions.get_agent_id(new) == "a"
        assert sessions.get("s") is None
        sessions.bind("s", "a")
        plain_redis.execute_command("PEXPIREAT", key, 2**63 - 1)
        assert sessions.unbind_agent("a") == 2


@pytest.mark.parametrize("name", ["revoked", "lease", "version"])
@pytest.mark.parametrize("planted", NO_MARKS.values(), ids=NO_MARKS)
def test_siblings(either: GovRedis, plain_redis: Any, name: str, planted: Plant) -> None:
    sessions, key = either.sessions, f"{{session:s}}:{name}"

    def doing(call: Callable[[], Any]) -> Any:
        plant(plain_redis, key, planted)
        return call()

    assert doing(lambda: sessions.bind("s", "a")).agent_id == "a"
    assert doing(lambda: sessions.get_agent_id("s", touch=True)) == "a"
    assert doing(lambda: sessions.bind("s", "b")).bind_count == 2
    plain_redis.delete("session:s")
    if either.config.database_url is not None:
        assert doing(lambda: sessions.get_agent_id("s")) == "b"
        assert sessions.get_agent_id("s") == "b"
    else:
        assert doing(lambda: sessions.get_agent_id("s")) is None
        sessions.bind("s", "b")
    assert doing(lambda: sessions.unbind("s")) is True
    assert doing(lambda: sessions.get("s")) is None
    assert doing(lambda: sessions.bind("s", "a")).agent_id == "a"
    assert doing(lambda: sessions.for_agent("a")) == ["s"]
    assert doing(lambda: sessions.unbind_agent("a")) == 1
    assert sessions.get("s") is None


@pytest.mark.parametrize("planted", OTHER_TYPES.values(), ids=OTHER_TYPES)
class TestNoIndex:
    def test_is_an_error_until_a_session_is_bound(self, alone: GovRedis, plain_redis: Any, planted: Plant) -> None:
        sessions = alone.sessions
        sessions.bind("s", "a")
        plant(plain_redis, "agent_sessions:a", planted)
        for call in (sessions.for_agent, sessions.unbind_agent):
            with pytest.raises(
                BackendError, match=r"^the index of the sessions of agent 'a' is no sorted set: .*WRONGTYPE"
            ):
                call("a")
        assert malformed(alone) == 2
        assert sessions.get_agent_id("s") == "a"
        sessions.bind("t", "a")
        assert sessions.for_agent("a") == ["t"]
        assert sessions.unbind_agent("a") == 1

    def test_touching_replaces_it_too(self, alone: GovRedis, plain_redis: Any, planted: Plant) -> None:
        alone.sessions.bind("s", "a", ttl=100)
        plant(plain_redis, "agent_sessions:a", planted)
        assert alone.sessions.touch("s")
        assert alone.sessions.for_agent("a") == ["s"]

    def test_does_not_count_where_there_are_rows(self, gov: GovRedis, plain_redis: Any, planted: Plant) -> None:
        gov.sessions.bind("s", "a")
        plant(plain_redis, "agent_sessions:a", planted)
        assert gov.sessions.for_agent("a") == ["s"]
        assert gov.sessions.unbind_agent("a") == 1
        assert gov.sessions.get("s") is None
        assert malformed(gov) == 1
        gov.sessions.bind("t", "a")
        assert plain_redis.zrange("agent_sessions:a", 0, -1) == ["t"]


def test_bad_members_of_an_index(either: GovRedis, plain_redis: Any, redis_server: RedisServer) -> None:
    sessions = either.sessions
    sessions.bind("s", "a")
    sessions.bind("t", "a")
    plain_redis.zadd("agent_sessions:a", dict.fromkeys(BAD_MEMBERS, float("inf")))
    plain_redis.zadd("agent_sessions:a", {"s": float("inf")})
    assert sessions.for_agent("a") == ["s", "t"]
    sessions.bind("s", "a")
    assert sessions.unbind_agent("a") == 2
    assert [sessions.get(sid) for sid in ("s", "t")] == [None, None]
    assert malformed(either) == len(BAD_MEMBERS) * (1 if either.config.database_url else 2)


@pytest.mark.once
def test_pending_writes_are_told_beside_them(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer
) -> None:
    """Pending writes of this process, beside values planted meanwhile."""
    for options in ({}, {"database_url": postgres_server.url}):
        gov = make_gov(redis_url=mortal_redis.url, **options)
        for sid in ("s", "t", "u"):
            gov.sessions.bind(sid, "a")
        breaker = redis_of(gov).breaker
        breaker._probing.holder = SoleMark  # somebody is at it: no probe of its own
        breaker.trip("a test")
        assert gov.sessions.unbind("s")
        gov.sessions.unbind("t")
        gov.sessions.bind("v", "b")
        gov.sessions.bind("w", "b")
        for sid in ("s", "v"):
            mortal_redis.command("DEL", f"session:{sid}")
            mortal_redis.command("LPUSH", f"session:{sid}", "x")
            mortal_redis.command("DEL", f"{{session:{sid}}}:revoked")
            mortal_redis.command("LPUSH", f"{{session:{sid}}}:revoked", "x")
        breaker._try_probe()
        breaker._probing.holder = nobody
        assert breaker.closed
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t", "u", "w")] == [None, None, "a", "b"]
        gov.sessions.bind("v", "b")
        assert gov.sessions.get_agent_id("v") == "b"
        mortal_redis.command("FLUSHALL")
