"""Sessions beside the async service: the newest binding wins, no matter which side made it, whatever the clocks say.

Its clock is an hour behind, or ahead, wherever a clock must not decide.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from async_service.blocking import BlockingService
from support import lease_of, redis_of

from govredis import GovRedis, SessionAlreadyBound
from govredis._sole import SoleMark, nobody
from govredis.sessions.backends.redis_backend import RedisSessionBackend
from govredis.sessions.backends.row_cache import RowCache
from govredis.sessions.backends.rows import SessionRows
from govredis.testing.servers import PostgresServer, RedisServer

MakeGov = Callable[..., GovRedis]

BEHIND, AHEAD = -3600.0, 3600.0
MEMBERS: dict[str, Any] = {
    "api_key_hash": "5e88",
    "display_agent_id": "Agent A",
    "public_agent_id": "A",
    "label": "é",
    "spawn_reason": None,
    "trajectory_required": False,
    "bind_ip_ua": {"ip": "127.0.0.1", "ua": [], "n": 2**60 + 1},
}


@pytest.fixture
def alone(make_gov: MakeGov, redis_server: RedisServer) -> GovRedis:
    """Without PostgreSQL."""
    return make_gov(redis_url=redis_server.url)


@pytest.fixture(params=["redis", "durable"])
def either(request: pytest.FixtureRequest, redis_server: RedisServer) -> GovRedis:
    found: GovRedis = request.getfixturevalue("alone" if request.param == "redis" else "gov")
    return found


@pytest.fixture
def another(make_gov: MakeGov, either: GovRedis) -> GovRedis:
    """Another process of ours, as far as sessions go."""
    return make_gov(redis_url=either.config.redis_url, database_url=either.config.database_url)


@pytest.fixture
def service(async_service: BlockingService) -> BlockingService:
    async_service.skew = BEHIND
    return async_service


def query(server: PostgresServer, sql: str) -> list[Any]:
    connection = psycopg2.connect(server.url)
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        found = cursor.fetchall() if cursor.description else []
    connection.close()
    return found


def members(record: dict[str, Any]) -> dict[str, Any]:
    known = {"agent_id", "bound_at", "bind_count", "data", "__govredis__"}
    return {name: value for name, value in record.items() if name not in known}


def relay(gov: GovRedis) -> None:
    """Run the outbox relay."""
    assert gov.internal.freshness is not None
    assert gov.internal.freshness.drain() is not None


def new_epoch(gov: GovRedis, redis: Any) -> None:
    redis.delete("govredis:guard")
    lease_of(gov)._snapshot = None


def cut_off(gov: GovRedis) -> Callable[[], None]:
    """Cut a process off from its primary backend. Returns a function that ends that."""
    record = gov.sessions._backends.server
    assert record is not None
    breaker = record.breaker
    breaker._probing.holder = SoleMark  # somebody is at it: no probe of its own
    breaker.trip("a test")

    def back() -> None:
        breaker._try_probe()
        breaker._probing.holder = nobody
        assert breaker.closed

    return back


class TestMembersOfTheirs:
    @pytest.mark.parametrize("operation", ["bind", "bind twice", "touch", "update", "rotate"])
    def test_survive(self, either: GovRedis, service: BlockingService, plain_redis: Any, operation: str) -> None:
        sessions, sid = either.sessions, "s"
        service.sessions.bind("s", "a", ttl=1000, **MEMBERS)
        if operation.startswith("bind"):
            assert sessions.bind("s", "a", data={"list": []}).bind_count == 2
        if operation == "bind twice":
            assert sessions.bind("s", "a").bind_count == 3
        if operation == "touch":
            assert sessions.touch("s")
            assert plain_redis.ttl("session:s") > 3500
        if operation == "update":
            assert sessions.update("s", [1]).data == [1]
            assert sessions.update("s", None).data is None
        if operation == "rotate":
            new = sessions.rotate("s")
            assert new is not None
            sid = new
        assert members(service.sessions.get(sid)) == MEMBERS
        if either.config.database_url is not None:  # the row has them
            plain_redis.flushall()
            assert sessions.get_agent_id(sid) == "a"
            assert members(service.sessions.get(sid)) == MEMBERS

    def test_are_the_agents_that_had_them(self, either: GovRedis, service: BlockingService) -> None:
        service.sessions.bind("s", "a", **MEMBERS)
        either.sessions.get("s")
        either.sessions.bind("s", "b")
        assert members(service.sessions.get("s")) == {}
        service.sessions.bind("s", "a", **MEMBERS)
        either.sessions.unbind("s")
        either.sessions.bind("s", "a")
        assert members(service.sessions.get("s")) == {}


class TestBoundDuringABind:
    """The service acts between a bind's look at Redis and its write."""

    @pytest.fixture
    def between(self, either: GovRedis, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Returns a function that has calls made between look and write, one at each try."""
        durable = either.config.database_url is not None
        owner, name = (SessionRows, "bind") if durable else (RedisSessionBackend, "binding")

        def have(*calls: Callable[[], Any]) -> None:
            step, waiting = getattr(owner, name), list(calls)

            def late(self: Any, *args: Any) -> Any:
                if waiting:
                    waiting.pop(0)()
                return step(self, *args)

            monkeypatch.setattr(owner, name, late)

        return have

    @pytest.mark.parametrize("skew", [BEHIND, 0.0, AHEAD])
    @pytest.mark.parametrize("before", ["nothing", "ours", "theirs"])
    def test_its_members_and_its_ttl_stay(
        self,
        either: GovRedis,
        service: BlockingService,
        plain_redis: Any,
        between: Callable[..., None],
        before: str,
        skew: float,
    ) -> None:
        service.skew = skew
        if before == "ours":
            either.sessions.bind("s", "a", data=0)
        if before == "theirs":
            service.sessions.bind("s", "a", ttl=60, label="before")
        between(lambda: service.sessions.bind("s", "a", ttl=86_400, **MEMBERS))
        count = either.sessions.bind("s", "a", data=1).bind_count
        assert count == (2 if before == "nothing" else 3)
        for rebuilt in (False, True):
            record = service.sessions.get("s")
            assert members(record) == MEMBERS
            assert (record["data"], record["bind_count"]) == (1, count)
            assert plain_redis.ttl("session:s") > 86_300
            if rebuilt or either.config.database_url is None:
                break
            plain_redis.flushall()
            assert either.sessions.get_agent_id("s") == "a"

    def test_its_extension_stays(
        self, either: GovRedis, service: BlockingService, plain_redis: Any, between: Callable[..., None]
    ) -> None:
        for extend in (lambda: service.sessions.extend("s", 86_400), lambda: plain_redis.persist("session:s")):
            either.sessions.bind("s", "a", ttl=60)
            between(extend)
            either.sessions.bind("s", "b")
            assert service.sessions.get("s")["agent_id"] == "b"
            assert not 0 <= plain_redis.ttl("session:s") < 86_300
            assert either.sessions.for_agent("b") == ["s"]

    def test_a_ttl_that_the_bind_names_counts(
        self, either: GovRedis, service: BlockingService, plain_redis: Any, between: Callable[..., None]
    ) -> None:
        between(lambda: service.sessions.bind("s", "a", ttl=86_400, **MEMBERS))
        either.sessions.bind("s", "a", ttl=50)
        assert members(service.sessions.get("s")) == MEMBERS
        assert 0 < plain_redis.ttl("session:s") <= 50

    @pytest.mark.parametrize("skew", [BEHIND, 0.0, AHEAD])
    @pytest.mark.parametrize("agent", ["a", "theirs", "not\nin a row"])
    def test_if_absent_finds_it(
        self,
        either: GovRedis,
        another: GovRedis,
        service: BlockingService,
        between: Callable[..., None],
        agent: str,
        skew: float,
    ) -> None:
        service.skew = skew
        between(lambda: service.sessions.bind("s", agent, label="x"))
        if agent == "a":
            assert either.sessions.bind("s", "a", if_absent=True, data=1).data is None
        else:
            with pytest.raises(SessionAlreadyBound) as caught:
                either.sessions.bind("s", "a", if_absent=True)
            assert caught.value.existing.agent_id == agent
        for process in (either, another):
            assert process.sessions.get_agent_id("s") == agent
        assert service.sessions.get("s")["label"] == "x"

    def test_it_is_the_newer_binding_for_readers_meanwhile(
        self, either: GovRedis, another: GovRedis, service: BlockingService, between: Callable[..., None]
    ) -> None:
        """After the row says otherwise, and before the second try."""
        between(
            lambda: service.sessions.bind("s", "a", **MEMBERS),
            lambda: another.sessions.get("s"),
        )
        assert either.sessions.bind("s", "a").bind_count == 2
        assert members(service.sessions.get("s")) == MEMBERS

    def test_it_stands_where_it_comes_at_each_try(
        self, gov: GovRedis, service: BlockingService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bind = SessionRows.bind

        def late(self: Any, *args: Any) -> Any:
            service.sessions.bind("s", "theirs", n=str(time.monotonic_ns()))
            return bind(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(SessionRows, "bind", late)
            assert gov.sessions.bind("s", "a").agent_id == "a"
        assert gov.sessions.get_agent_id("s") == "theirs", "it came last"

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    def test_a_revocation_meanwhile_ends_both(
        self, either: GovRedis, another: GovRedis, service: BlockingService, between: Callable[..., None], end: str
    ) -> None:
        """The second try began before that, as the first did."""
        between(
            lambda: service.sessions.bind("s", "a"),
            lambda: another.sessions.unbind("s") if end == "unbind" else another.sessions.unbind_agent("a"),
        )
        either.sessions.bind("s", "a")
        for process in (either, another):
            assert process.sessions.get("s") is None
        assert service.sessions.get("s") is None

    def test_a_bind_without_it_costs_redis_two_round_trips(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.config_resetstat()
        gov.sessions.bind("s", "b")
        calls = {name: stat["calls"] for name, stat in plain_redis.info("commandstats").items()}
        assert calls["cmdstat_evalsha"] == 3, "the index and the lease, by one pipeline, and the copy"


class TestTTL:
    @pytest.mark.parametrize("agent", ["a", "b"])
    @pytest.mark.parametrize("seen", [False, True])
    def test_a_bind_without_a_ttl_shortens_none(
        self, either: GovRedis, service: BlockingService, plain_redis: Any, agent: str, seen: bool
    ) -> None:
        sessions = either.sessions
        service.sessions.bind("day", "a", ttl=86_400)
        service.sessions.bind("ever", "a", ttl=None)
        sessions.bind("ours", "a", ttl=7200)
        sessions.bind("extended", "a")
        service.sessions.extend("extended", 86_400)
        sessions.bind("persisted", "a")
        plain_redis.persist("session:persisted")
        names = ["day", "ever", "ours", "extended", "persisted"]
        if seen:
            assert [sessions.get_agent_id(sid) for sid in names] == ["a"] * 5
        bound = [sessions.bind(sid, agent) for sid in names]
        for rebuilt in (False, True):
            left = [plain_redis.ttl(f"session:{sid}") for sid in names]
            assert left[1] == left[4] == -1
            assert left[0] > 86_300
            assert 7100 < left[2] <= 7200
            assert left[3] > 86_300
            if rebuilt or either.config.database_url is None:
                break
            plain_redis.flushall()
            assert [sessions.get_agent_id(sid) for sid in names] == [agent] * 5
        assert [binding.expires_at is None for binding in bound] == [False, True, False, False, True]
        assert sessions.for_agent(agent) == sorted(names)

    def test_rows_alone_keep_it_too(self, make_gov: MakeGov, postgres_server: PostgresServer) -> None:
        sessions = make_gov(redis_enabled=False, database_url=postgres_server.url).sessions
        sessions.bind("s", "a", ttl=7200)
        for bound in (sessions.bind("s", "a"), sessions.bind("s", "b")):
            assert bound.expires_at is not None
            assert (bound.expires_at - datetime.now(timezone.utc)).total_seconds() > 7000
        bound = sessions.bind("s", "b", ttl=50)
        assert bound.expires_at is not None
        assert (bound.expires_at - datetime.now(timezone.utc)).total_seconds() < 60

    def test_a_bind_with_a_ttl_has_it(self, either: GovRedis, service: BlockingService, plain_redis: Any) -> None:
        for ttl in (86_400, None):
            service.sessions.bind("s", "a", ttl=ttl)
            either.sessions.get("s")
            either.sessions.bind("s", "a", ttl=50)
            assert 0 < plain_redis.ttl("session:s") <= 50

    def test_a_session_without_end_stays_so(self, either: GovRedis, service: BlockingService, plain_redis: Any) -> None:
        service.sessions.bind("s", "a", ttl=None)
        for _ in range(2):
            found = either.sessions.get("s", touch=True)
            assert found is not None
            assert found.expires_at is None
        either.sessions.update("s", [1])
        assert plain_redis.ttl("session:s") == -1
        new = either.sessions.rotate("s")
        assert new is not None
        assert plain_redis.ttl(f"session:{new}") == -1
        if either.config.database_url is not None:
            plain_redis.flushall()
            assert either.sessions.touch(new)
            assert plain_redis.ttl(f"session:{new}") == -1
            assert either.sessions.purge() == 0
        assert either.sessions.unbind(new) is True
        assert either.sessions.get(new) is None

    def test_rotate_keeps_the_end(self, either: GovRedis, service: BlockingService, plain_redis: Any) -> None:
        for ttl in (50, 86_400, 2 * 10**9):
            service.sessions.bind("s", "a", ttl=ttl)
            new = either.sessions.rotate("s")
            assert new is not None
            assert ttl - 30 <= plain_redis.ttl(f"session:{new}") <= ttl

    def test_a_very_short_one(self, either: GovRedis, plain_redis: Any, eventually: Callable[..., Any]) -> None:
        sessions = either.sessions
        sessions.bind("s", "a", ttl=50)
        sessions.bind("s", "b", ttl=0.001)
        eventually(lambda: sessions.get("s") is None)
        assert not plain_redis.exists("session:s")
        sessions.bind("t", "a", ttl=0.001)
        eventually(lambda: sessions.get("t") is None)
        for ttl in (0.0009, 1e-9):
            with pytest.raises(ValueError, match=r"ttl is .*; it must be seconds, from 0\.001 to less than 1e9"):
                sessions.bind("s", "a", ttl=ttl)

    def test_a_very_short_one_while_we_are_cut_off(self, either: GovRedis, eventually: Callable[..., Any]) -> None:
        back = cut_off(either)
        either.sessions.bind("s", "a", ttl=0.001)
        back()
        eventually(lambda: either.sessions.get("s") is None)

    def test_a_session_ttl_of_a_millisecond(
        self, make_gov: MakeGov, either: GovRedis, eventually: Callable[..., Any]
    ) -> None:
        short = make_gov(
            redis_url=either.config.redis_url, database_url=either.config.database_url, session_ttl=0.001
        ).sessions
        short.bind("s", "a")
        eventually(lambda: short.get("s", touch=True) is None)
        either.sessions.bind("t", "a", data=0)
        assert short.update("t", 1).data == 1
        assert short.rotate("t") is not None
        assert short.unbind("t") is False
        assert short.purge() >= 0


class TestIndex:
    def test_foreign_sessions_are_listed_and_ended_once_they_were_seen(
        self, either: GovRedis, another: GovRedis, service: BlockingService, plain_redis: Any
    ) -> None:
        for sid, ttl in (("day", 86_400), ("ever", None), ("unseen", 600), ("moved", 600), ("updated", 600)):
            service.sessions.bind(sid, "a", ttl=ttl)
        for sid in ("day", "ever", "moved"):
            assert either.sessions.get_agent_id(sid) == "a"
        either.sessions.update("updated", 1)
        service.sessions.bind("moved", "b")
        assert either.sessions.get_agent_id("moved") == "b"
        for process in (either, another):
            assert process.sessions.for_agent("a") == ["day", "ever", "updated"]
            assert process.sessions.for_agent("b") == ["moved"]
        assert plain_redis.ttl("agent_sessions:a") > 0, "every index ends"
        assert another.sessions.unbind_agent("a") == 3
        assert [either.sessions.get(sid) for sid in ("day", "ever", "updated")] == [None] * 3
        assert either.sessions.get_agent_id("moved") == "b"
        assert service.sessions.get("unseen") is not None

    @pytest.mark.parametrize("data", [{"name": "\ud83d"}, {"a": ["\udc00"], "agent_id": "a"}])
    @pytest.mark.parametrize("agent", ["b", 'b"', "b\\"])
    def test_a_session_with_half_of_a_surrogate_pair_is_its_agents_alone(
        self, either: GovRedis, another: GovRedis, data: Any, agent: str
    ) -> None:
        """cjson refuses it, and the index of the agent before still names the session."""
        either.sessions.bind("s", "a")
        either.sessions.bind("s", agent, data=data)
        assert another.sessions.unbind_agent("a") == 0
        found = either.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.data) == (agent, data)
        assert another.sessions.unbind_agent(agent) == 1
        assert either.sessions.get("s") is None

    def test_foreign_sessions_are_noted_once(
        self, either: GovRedis, service: BlockingService, plain_redis: Any
    ) -> None:
        service.sessions.bind("s", "a")
        either.sessions.get("s")
        plain_redis.config_resetstat()
        for _ in range(20):
            assert either.sessions.get_agent_id("s") == "a"
        calls = {name: stat["calls"] for name, stat in plain_redis.info("commandstats").items()}
        assert calls["cmdstat_mget"] == calls["cmdstat_pttl"] == 20
        assert not any("eval" in name for name in calls)

    @pytest.mark.parametrize("by", ["us", "them"])
    @pytest.mark.parametrize("ttl", [86_400, None])
    def test_sessions_that_the_service_keeps_alive_are_listed_and_ended(
        self, either: GovRedis, service: BlockingService, plain_redis: Any, by: str, ttl: int | None
    ) -> None:
        service.sessions.bind("s", "a", ttl=60) if by == "them" else either.sessions.bind("s", "a")
        either.sessions.get("s")
        service.sessions.extend("s", ttl) if ttl is not None else plain_redis.persist("session:s")
        either.sessions.get("s")
        if either.config.database_url is None:  # else the row says it
            left = plain_redis.zscore("agent_sessions:a", "s") - datetime.now().timestamp()
            assert left > (366 * 86_400 if ttl is None else ttl) - 60
            assert plain_redis.ttl("agent_sessions:a") >= left - 60
        assert either.sessions.for_agent("a") == ["s"]
        assert either.sessions.unbind_agent("a") == 1

    def test_foreign_sessions_are_listed_after_redis_has_lost_the_index(
        self, either: GovRedis, service: BlockingService, plain_redis: Any
    ) -> None:
        service.sessions.bind("rebound", "a")
        service.sessions.bind("restored", "a")
        restored = plain_redis.get("session:restored")
        assert [either.sessions.get_agent_id(sid) for sid in ("rebound", "restored")] == ["a"] * 2
        plain_redis.flushall()
        service.sessions.bind("rebound", "a")
        assert either.sessions.get_agent_id("rebound") == "a"
        if either.config.database_url is None:
            assert either.sessions.for_agent("a") == ["rebound"]
            plain_redis.set("session:restored", restored)
            cut_off(either)()
        assert either.sessions.get_agent_id("restored") == "a"
        assert either.sessions.for_agent("a") == ["rebound", "restored"]
        assert either.sessions.unbind_agent("a") == 2

    def test_a_session_that_cannot_be_noted_is_found(
        self, alone: GovRedis, service: BlockingService, redis_server: RedisServer
    ) -> None:
        service.sessions.bind("s", "a")
        redis_server.command("CONFIG", "SET", "min-replicas-to-write", "1")
        try:
            assert alone.sessions.get_agent_id("s") == "a"
        finally:
            redis_server.command("CONFIG", "SET", "min-replicas-to-write", "0")
        assert alone.counters.get("sessions.degraded.index") == 1
        assert alone.sessions.get_agent_id("s") == "a"
        assert alone.sessions.for_agent("a") == ["s"]


class TestRevokedWhileCutOff:
    """By a process that tells the record of it after others have gone on."""

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    @pytest.mark.parametrize("by", ["us", "them"])
    def test_a_later_binding_stays(
        self,
        either: GovRedis,
        another: GovRedis,
        service: BlockingService,
        monkeypatch: pytest.MonkeyPatch,
        end: str,
        by: str,
    ) -> None:
        either.sessions.bind("s", "a")
        back = cut_off(either)
        either.sessions.unbind("s") if end == "unbind" else either.sessions.unbind_agent("a")
        assert either.sessions.get("s") is None
        if by == "us":
            hour_behind = datetime.fromtimestamp(datetime.now().timestamp() - 3600, timezone.utc)
            monkeypatch.setattr(another.sessions, "_now", lambda: hour_behind)
            another.sessions.bind("s", "a")
        else:
            service.sessions.bind("s", "a")
        back()
        for process in (either, another):
            assert process.sessions.get_agent_id("s") == "a"
        if either.internal.freshness is not None:
            relay(either)
        assert service.sessions.get("s")["agent_id"] == "a"
        assert either.sessions.for_agent("a") == ["s"]

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    @pytest.mark.parametrize("by", ["us", "them"])
    def test_a_known_binding_is_over(
        self, either: GovRedis, another: GovRedis, service: BlockingService, end: str, by: str
    ) -> None:
        service.skew = AHEAD
        another.sessions.bind("s", "a", data=0) if by == "us" else service.sessions.bind("s", "a")
        assert either.sessions.get_agent_id("s") == "a"
        back = cut_off(either)
        either.sessions.unbind("s") if end == "unbind" else either.sessions.unbind_agent("a")
        if either.config.database_url is None:  # else Redis was there, and nobody finds it by now
            another.sessions.update("s", "with other data, but bound as it was")
        back()
        for process in (either, another):
            assert process.sessions.get("s") is None
        assert service.sessions.get("s") is None

    def test_the_binding_before_a_bind_here_is_over_too(
        self, either: GovRedis, another: GovRedis, service: BlockingService
    ) -> None:
        service.skew = AHEAD
        service.sessions.bind("s", "a")
        either.sessions.get("s")
        back = cut_off(either)
        either.sessions.bind("s", "b")
        either.sessions.unbind("s")
        back()
        for process in (either, another):
            assert process.sessions.get("s") is None

    @pytest.mark.parametrize("skew", [-60.0, 60.0])
    def test_the_clocks_decide_over_an_unseen_binding(
        self, alone: GovRedis, service: BlockingService, skew: float
    ) -> None:
        service.skew = skew
        back = cut_off(alone)
        for end in (lambda: alone.sessions.unbind("s"), lambda: alone.sessions.unbind_agent("a")):
            end()
        service.sessions.bind("s", "a")
        back()
        assert alone.sessions.get_agent_id("s") == ("a" if skew > 0 else None)

    def test_a_bind_under_way_meanwhile_is_as_old_as_it_is(
        self, either: GovRedis, another: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It began before the revocation was told, and after it was made; or before both."""
        durable = either.config.database_url is not None
        owner, name = (SessionRows, "bind") if durable else (RedisSessionBackend, "binding")
        step = getattr(owner, name)
        ends = [("unbind", "s"), ("unbind_agent", "s"), ("unbind_agent", "unknown")]
        for older, end, sid in [(older, *how) for older in (False, True) for how in ends]:
            either.sessions.bind("s", "a")
            back = cut_off(either)
            before = datetime.now(timezone.utc)
            either.sessions.unbind("s") if end == "unbind" else either.sessions.unbind_agent("a")

            def late(self: Any, *args: Any, back: Callable[[], None] = back) -> Any:
                monkeypatch.setattr(owner, name, step)
                back()
                return step(self, *args)

            with monkeypatch.context() as patched:
                if older:
                    patched.setattr(another.sessions, "_now", lambda before=before: before)
                monkeypatch.setattr(owner, name, late)
                another.sessions.bind(sid, "a", data="under way")
            assert (another.sessions.get(sid) is None) is older
            another.sessions.unbind(sid)
            another.sessions.bind(sid, "a")
            assert another.sessions.get_agent_id(sid) == "a"
            another.sessions.unbind(sid)


def without_redis(make_gov: MakeGov, gov: GovRedis) -> GovRedis:
    """A process of the same PostgreSQL. The agent has an entry there, as each one that was bound has."""
    process = make_gov(redis_enabled=False, database_url=gov.config.database_url)
    process.sessions.bind("another", "a")
    return process


class TestRows:
    def test_the_relay_ends_no_later_binding(
        self, gov: GovRedis, make_gov: MakeGov, service: BlockingService, plain_redis: Any
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        for n in range(30):
            gov.sessions.bind(f"s{n}", "a")
            gov.sessions.unbind(f"s{n}")
            service.sessions.bind(f"s{n}", "b")
            if n % 3 == 0:
                assert other.sessions.get_agent_id(f"s{n}") == "b"
        relay(gov)
        for process in (gov, other):
            assert [process.sessions.get_agent_id(f"s{n}") for n in range(30)] == ["b"] * 30
        relay(gov)
        plain_redis.flushall()
        assert [other.sessions.get_agent_id(f"s{n}") for n in range(30)] == ["b"] * 30, "the rows have them"

    def test_unbind_agent_ends_no_session_that_is_another_agents_by_now(
        self, gov: GovRedis, service: BlockingService, plain_redis: Any
    ) -> None:
        for sid in ("moved", "kept"):
            gov.sessions.bind(sid, "a")
        service.sessions.bind("moved", "b")
        service.sessions.bind("kept", "a")
        gov.sessions.unbind_agent("a")
        assert service.sessions.get("kept") is None
        relay(gov)
        assert service.sessions.get("moved")["agent_id"] == "b"
        assert gov.sessions.get_agent_id("moved") == "b"
        plain_redis.flushall()
        assert [gov.sessions.get_agent_id(sid) for sid in ("moved", "kept")] == ["b", None]

    def test_a_row_that_a_foreign_binding_has_outlived_does_not_come_back(
        self, gov: GovRedis, service: BlockingService, plain_redis: Any
    ) -> None:
        """As unbind_agent ends theirs, which its index names, before the row has adopted it."""
        gov.sessions.bind("s", "b")
        gov.sessions.bind("s", "a")
        service.sessions.bind("s", "b")
        assert gov.sessions.unbind_agent("b") == 1
        assert gov.sessions.for_agent("a") == []
        assert gov.sessions.unbind_agent("a") == 0
        plain_redis.flushall()
        assert gov.sessions.get("s") is None

    def test_a_row_writes_over_nothing_newer(self, gov: GovRedis, service: BlockingService, plain_redis: Any) -> None:
        for skew in (-2.0, BEHIND):
            service.skew = skew
            gov.sessions.bind("s", "a")
            service.sessions.bind("s", "b", label="x")
            for _ in range(2):
                assert gov.sessions.get_agent_id("s") == "b"
                assert service.sessions.get("s")["label"] == "x"
            relay(gov)
            assert service.sessions.get("s")["agent_id"] == "b"
            plain_redis.flushall()
            assert gov.sessions.get_agent_id("s") == "b"
            assert service.sessions.get("s")["label"] == "x"

    @pytest.mark.parametrize("skew", [0.0, -3600.0, 3600.0])
    def test_a_foreign_binding_during_an_adoption_is_newer(
        self, gov: GovRedis, service: BlockingService, monkeypatch: pytest.MonkeyPatch, skew: float
    ) -> None:
        service.skew = skew
        adopt = SessionRows.adopt

        def overtaken(self: SessionRows, *args: Any) -> Any:
            monkeypatch.setattr(SessionRows, "adopt", adopt)
            service.sessions.bind("s", "b")
            return adopt(self, *args)

        service.sessions.bind("s", "a")
        monkeypatch.setattr(SessionRows, "adopt", overtaken)
        gov.sessions.get("s")
        assert service.sessions.get("s")["agent_id"] == "b"
        assert gov.sessions.get_agent_id("s") == "b"
        assert service.sessions.get("s")["agent_id"] == "b"
        assert gov.sessions.for_agent("a") == []

    def test_a_bind_while_redis_was_away_is_newer_than_the_value_there(
        self, gov: GovRedis, service: BlockingService
    ) -> None:
        gov.sessions.bind("s", "a")
        service.sessions.bind("s", "theirs")
        breaker = redis_of(gov).breaker
        breaker._probing.holder = SoleMark
        breaker.trip("a test")
        assert gov.sessions.bind("s", "b").backend == "postgres"
        breaker._try_probe()
        breaker._probing.holder = nobody
        assert gov.sessions.get_agent_id("s") == "b"
        assert service.sessions.get("s")["agent_id"] == "b"

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    def test_a_revocation_while_redis_was_away_ends_no_later_binding(
        self, gov: GovRedis, make_gov: MakeGov, service: BlockingService, end: str
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        for sid in ("again", "over"):
            service.sessions.bind(sid, "a")
            assert gov.sessions.get_agent_id(sid) == "a"
        breaker = redis_of(gov).breaker
        breaker._probing.holder = SoleMark
        breaker.trip("a test")
        for sid in ("again", "over"):
            gov.sessions.unbind(sid) if end == "unbind" else gov.sessions.unbind_agent("a")
        service.sessions.bind("again", "a")
        assert other.sessions.get_agent_id("again") == "a"
        breaker._try_probe()
        breaker._probing.holder = nobody
        relay(gov)
        for process in (gov, other):
            assert [process.sessions.get_agent_id(sid) for sid in ("again", "over")] == ["a", None]
        assert service.sessions.get("over") is None

    @pytest.mark.parametrize("adopted", ["later", "after a purge", "meanwhile"])
    def test_an_agent_is_revoked_without_redis_and_a_session_that_redis_alone_has_is_over(
        self,
        gov: GovRedis,
        make_gov: MakeGov,
        alone: GovRedis,
        plain_redis: Any,
        postgres_server: PostgresServer,
        monkeypatch: pytest.MonkeyPatch,
        adopted: str,
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        note = SessionRows.untold_agent

        def late(self: SessionRows, agent_id: str) -> None:
            if adopted == "meanwhile":
                assert other.sessions.get_agent_id("s") == "a"
            note(self, agent_id)

        monkeypatch.setattr(SessionRows, "untold_agent", late)
        alone.sessions.bind("s", "a")
        alone.sessions.bind("of another", "b")
        breaker = redis_of(gov).breaker
        breaker._probing.holder = SoleMark
        breaker.trip("a test")
        assert gov.sessions.unbind_agent("a") == (1 if adopted == "meanwhile" else 0), "a row knows of it, or none"
        alone.sessions.bind("bound later", "a")
        if adopted == "after a purge":
            query(postgres_server, "UPDATE govredis_session_agents SET revoked_at = revoked_at - interval '2 days'")
            other.sessions.purge()
        if adopted == "meanwhile":
            relay(other)  # which tells Redis that its row has ended, within X
        expected = [None, "b", "a"]
        sids = ["s", "of another", "bound later"]
        assert [other.sessions.get_agent_id(sid) for sid in sids] == expected
        breaker._try_probe()
        breaker._probing.holder = nobody
        relay(gov)
        assert [gov.sessions.get_agent_id(sid) for sid in sids] == expected
        assert not plain_redis.exists("session:s")
        alone.sessions.bind("s", "a")
        assert [process.sessions.get_agent_id("s") for process in (gov, other)] == ["a", "a"]

    def test_after_it_a_session_that_says_no_time_is_none_of_an_earlier_one(
        self, gov: GovRedis, make_gov: MakeGov, plain_redis: Any
    ) -> None:
        without_redis(make_gov, gov).sessions.unbind_agent("a")
        plain_redis.set("session:s", '{"agent_id": "a"}')
        assert gov.sessions.get_agent_id("s") == "a"

    def test_a_process_without_redis_revokes_what_redis_alone_has(
        self, gov: GovRedis, make_gov: MakeGov, alone: GovRedis
    ) -> None:
        alone.sessions.bind("s", "a")
        without_redis(make_gov, gov).sessions.unbind_agent("a")
        assert gov.sessions.get_agent_id("s") is None

    @pytest.mark.parametrize("twice", [False, True])
    def test_a_foreign_binding_after_the_relay_is_newer(
        self, gov: GovRedis, service: BlockingService, plain_redis: Any, twice: bool
    ) -> None:
        """Also after the relay told of the end of an unseen binding, which then stayed."""
        assert gov.sessions.get("warm") is None  # an epoch has begun, in which Redis is told
        for sid in ("s", "t"):
            service.sessions.bind(sid, "a")
        breaker = redis_of(gov).breaker
        breaker._probing.holder = SoleMark
        breaker.trip("a test")
        for sid in ("s", "t"):
            gov.sessions.unbind(sid)
        breaker._try_probe()
        breaker._probing.holder = nobody
        relay(gov)
        service.sessions.bind("s", "b")
        if twice:
            gov.postgres.fetch("SELECT @schema@.govredis_outbox_add('session'::text, 's'::text, NULL::bigint)")
            relay(gov)
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t")] == ["b", None]
        assert not plain_redis.exists("session:t")

    @pytest.mark.parametrize("endless", [False, True])
    def test_a_session_that_the_service_keeps_alive_lives(
        self, gov: GovRedis, service: BlockingService, plain_redis: Any, postgres_server: PostgresServer, endless: bool
    ) -> None:
        """It does so by a plain EXPIRE, and the row knows nothing of that."""
        for sid in ("purged", "looked up", "listed", "ended"):
            gov.sessions.bind(sid, "a" if sid != "ended" else "b")
            plain_redis.persist(f"session:{sid}") if endless else service.sessions.extend(sid, 86_400)
        query(postgres_server, "UPDATE govredis_sessions SET expires_at = clock_timestamp() - interval '1 day'")
        assert gov.sessions.for_agent("a") == ["listed", "looked up", "purged"]
        assert gov.sessions.unbind_agent("b") == 1
        query(
            postgres_server,
            "UPDATE govredis_sessions SET expires_at = clock_timestamp() - interval '1 day' WHERE session <> 'listed'",
        )
        assert gov.sessions.get_agent_id("looked up") == "a"
        new_epoch(gov, plain_redis)
        assert gov.sessions.get_agent_id("looked up") == "a"
        assert plain_redis.ttl("session:looked up") == -1 or plain_redis.ttl("session:looked up") > 86_000
        assert gov.sessions.purge() == 1, "of the one that was ended"
        plain_redis.flushall()
        for sid in ("purged", "looked up", "listed"):
            found = gov.sessions.get(sid)
            assert found is not None
            assert (found.expires_at is None) is endless
        assert gov.sessions.get("ended") is None

    def test_purge_deletes_no_row_while_redis_cannot_say_whether_it_lives(
        self, gov: GovRedis, postgres_server: PostgresServer
    ) -> None:
        for sid in ("over", "revoked"):
            gov.sessions.bind(sid, "a")
        gov.sessions.unbind("revoked")
        query(postgres_server, "UPDATE govredis_sessions SET expires_at = clock_timestamp() - interval '1 day'")
        breaker = redis_of(gov).breaker
        breaker._probing.holder = SoleMark
        breaker.trip("a test")
        assert gov.sessions.purge() == 1
        assert query(postgres_server, "SELECT session FROM govredis_sessions") == [("over",)]
        breaker._try_probe()
        breaker._probing.holder = nobody

    def test_an_update_writes_over_nothing_newer(
        self, gov: GovRedis, service: BlockingService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov.sessions.bind("s", "a", data=0)
        fill = RowCache.fill

        def late(self: RowCache, *args: Any, **options: Any) -> Any:
            monkeypatch.setattr(RowCache, "fill", fill)
            service.sessions.bind("s", "b")
            return fill(self, *args, **options)

        monkeypatch.setattr(RowCache, "fill", late)
        gov.sessions.update("s", 1)
        assert gov.sessions.get_agent_id("s") == "b"

    def test_a_foreign_change_of_our_record_is_adopted(self, gov: GovRedis, plain_redis: Any) -> None:
        """With the agent and the time as they were."""
        bound = gov.sessions.bind("s", "a", data=0)
        theirs = {"agent_id": "a", "bound_at": bound.bound_at.isoformat(), "data": 1, "label": "x"}
        plain_redis.set("session:s", json.dumps(theirs), ex=100)
        for _ in range(2):
            found = gov.sessions.get("s")
            assert found is not None
            assert found.data == 1
            plain_redis.flushall()

    def test_the_row_has_the_newer_data_of_one_binding(self, gov: GovRedis, plain_redis: Any) -> None:
        """If it is not known whether the value in Redis came after it."""
        bound = gov.sessions.bind("s", "a", data=1)
        theirs = {"agent_id": "a", "bound_at": bound.bound_at.isoformat(), "data": 0}
        plain_redis.set("session:s", json.dumps(theirs), ex=100)
        plain_redis.delete("{session:s}:version")
        found = gov.sessions.get("s")
        assert found is not None
        assert found.data == 1

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    @pytest.mark.parametrize("step", ["adopt", "lease", "fill"])
    def test_a_revocation_during_an_adoption_ends_the_session(
        self,
        gov: GovRedis,
        make_gov: MakeGov,
        service: BlockingService,
        plain_redis: Any,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
        end: str,
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        owner: type = SessionRows if step == "adopt" else RowCache
        call = getattr(owner, step)
        service.sessions.bind("s", "a")
        assert other.sessions.get_agent_id("s") == "a"
        service.sessions.bind("s", "a", label="anew")

        def late(self: Any, *args: Any, **options: Any) -> Any:
            monkeypatch.setattr(owner, step, call)
            other.sessions.unbind("s") if end == "unbind" else other.sessions.unbind_agent("a")
            return call(self, *args, **options)

        monkeypatch.setattr(owner, step, late)
        gov.sessions.get("s")
        for process in (gov, other):
            assert process.sessions.get("s") is None
        assert not plain_redis.exists("session:s")

    def test_a_bind_during_an_adoption_is_newer(
        self, gov: GovRedis, make_gov: MakeGov, service: BlockingService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        for seen in (False, True):
            for step in (SessionRows.get, SessionRows.adopt):
                service.sessions.bind("s", "theirs")
                if seen:
                    assert gov.sessions.get_agent_id("s") == "theirs"
                    service.sessions.bind("s", "theirs")

                def late(self: Any, *args: Any, step: Any = step) -> Any:
                    monkeypatch.setattr(SessionRows, step.__name__, step)
                    other.sessions.bind("s", "newer")
                    return step(self, *args)

                monkeypatch.setattr(SessionRows, step.__name__, late)
                assert gov.sessions.get_agent_id("s") == "newer"
                assert service.sessions.get("s")["agent_id"] == "newer"

    def test_read_only_rows_adopt_nothing_and_the_foreign_binding_is_found(
        self, gov: GovRedis, service: BlockingService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov.sessions.bind("s", "a")
        service.sessions.bind("s", "b")
        gov.postgres.fetch("SELECT 1")
        before = gov.counters.get("sessions.degraded.unguarded")
        fetch = type(gov.postgres).fetch

        def refuse(self: Any, sql: str, *args: Any, **options: Any) -> Any:
            if "govredis_session_adopt" in sql:
                return fetch(self, "DO $$ BEGIN RAISE read_only_sql_transaction; END $$")
            return fetch(self, sql, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(type(gov.postgres), "fetch", refuse)
            assert gov.sessions.get_agent_id("s") == "b"
        assert gov.counters.get("sessions.degraded.unguarded") == before + 1


class TestOlderDataRestored:
    """Redis is killed, and starts with the RDB that it saved before."""

    @pytest.fixture
    def saving_redis(self, redis_binary: str, tmp_path: Path) -> Iterator[RedisServer]:
        with RedisServer(tmp_path / "redis", binary=redis_binary) as server:
            yield server

    @pytest.fixture
    def saved(self, saving_redis: RedisServer, make_gov: MakeGov, postgres_server: PostgresServer) -> Iterator[Any]:
        gov = make_gov(
            redis_url=saving_redis.url, database_url=postgres_server.url, socket_timeout=10, connect_timeout=10
        )
        service = BlockingService(saving_redis.url)
        yield gov, service
        service.close()

    @staticmethod
    def restore(server: RedisServer, gov: GovRedis, eventually: Callable[..., Any]) -> None:
        server.kill()
        server.start()
        eventually(lambda: redis_of(gov).breaker.closed)

    @pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen"])
    @pytest.mark.parametrize("relayed", [False, True], ids=["at once", "told before"])
    def test_a_session_revoked_since_does_not_come_back(
        self, saving_redis: RedisServer, saved: Any, eventually: Callable[..., Any], seen: bool, relayed: bool
    ) -> None:
        gov, service = saved
        gov.sessions.bind("ours", "a")
        for sid in ("s", "t", "ours"):
            gov.sessions.bind(sid, "ours")
            service.sessions.bind(sid, "theirs")
            if seen:
                service.skew = AHEAD  # whose clock says that it is newer than what comes
                service.sessions.bind(sid, "theirs")
                assert gov.sessions.get_agent_id(sid) == "theirs"
        saving_redis.command("SAVE")
        gov.sessions.unbind("s")
        gov.sessions.unbind_agent("theirs")
        if not seen:
            gov.sessions.unbind("t")
        gov.sessions.bind("ours", "b")
        if relayed:
            relay(gov)
        self.restore(saving_redis, gov, eventually)
        assert saving_redis.command("EXISTS", "session:s", "session:t") == 2
        new_epoch(gov, _Commands(saving_redis))
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t", "ours")] == [None, None, "b"]
        assert saving_redis.command("EXISTS", "session:s", "session:t") == 0
        relay(gov)
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t", "ours")] == [None, None, "b"]

    def test_a_binding_after_the_revocation_counts(
        self, saving_redis: RedisServer, saved: Any, eventually: Callable[..., Any]
    ) -> None:
        gov, service = saved
        for sid in ("s", "t", "new", "old"):
            gov.sessions.bind(sid, "ours")
            gov.sessions.unbind(sid)
        service.sessions.bind("s", "theirs")
        saving_redis.command("SAVE")
        self.restore(saving_redis, gov, eventually)
        new_epoch(gov, _Commands(saving_redis))
        anew = BlockingService(saving_redis.url)
        anew.sessions.bind("t", "theirs")
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t")] == ["theirs", "theirs"]
        saving_redis.command("FLUSHALL")
        anew.sessions.bind("new", "theirs")
        anew.skew = -60.0  # it may come from anywhere
        anew.sessions.bind("old", "theirs")
        anew.close()
        assert [gov.sessions.get_agent_id(sid) for sid in ("new", "old")] == ["theirs", None]
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t")] == ["theirs", "theirs"]


class _Commands:
    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def delete(self, key: str) -> None:
        self._server.command("DEL", key)
