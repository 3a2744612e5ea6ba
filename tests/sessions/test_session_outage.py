"""SessionCache while Redis is away, and what it tells Redis when it is back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from govredis import BackendUnavailable, GovRedis, SessionAlreadyBound, SessionStoreUnavailable
from govredis._counters import Counters
from govredis.keys import Keys
from govredis.sessions import SessionCache
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


@pytest.fixture
def keeping_redis(redis_binary: str) -> Iterator[RedisServer]:
    """A Redis of the test's own whose data survives a kill."""
    with RedisServer(binary=redis_binary, persistent=True) as server:
        yield server


Away = Callable[[], None]
#: How Redis goes away, and how it is back: with its data, empty, or as if nothing had been.
OUTAGES: dict[str, tuple[Callable[[RedisServer], Any], Callable[[RedisServer], Any], bool]] = {
    "restarted with its data": (RedisServer.kill, lambda server: server.restart("keep"), True),
    "restarted empty": (RedisServer.kill, lambda server: server.restart("empty"), False),
    "paused": (RedisServer.pause, RedisServer.resume, True),
}


@pytest.fixture(params=OUTAGES)
def outage(request: pytest.FixtureRequest, keeping_redis: RedisServer) -> tuple[Away, Away, bool]:
    """(begin, end, whether Redis keeps its data)."""
    begin, end, keeps = OUTAGES[request.param]
    return lambda: begin(keeping_redis), lambda: end(keeping_redis), keeps


@pytest.fixture
def cut(make_gov: Callable[..., GovRedis], keeping_redis: RedisServer) -> GovRedis:
    """The GovRedis that is to lose its Redis."""
    return make_gov(redis_url=keeping_redis.url)


def until(condition: Callable[[], Any], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def back(gov: GovRedis) -> None:
    assert gov._redis is not None
    until(lambda: gov._redis.breaker.closed)  # type: ignore[union-attr]


class TestAway:
    def test_what_is_known_is_found_and_what_is_not_is_no_logout(
        self, cut: GovRedis, keeping_redis: RedisServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        make_gov(redis_url=keeping_redis.url).sessions.bind("seen", "b", data=[1])
        cut.sessions.bind("bound", "a")
        cut.sessions.get("seen")
        cut.sessions.bind("revoked before", "a")
        cut.sessions.unbind("revoked before")
        keeping_redis.kill()
        for sid, agent in (("bound", "a"), ("seen", "b")):
            found = cut.sessions.get(sid)
            assert found is not None
            assert (found.agent_id, found.backend) == (agent, "local")
        for sid in ("unknown", "revoked before"):
            for call in (cut.sessions.get, cut.sessions.touch, cut.sessions.get_agent_id):
                with pytest.raises(SessionStoreUnavailable, match="does not know the session"):
                    call(sid)
        with pytest.raises(SessionStoreUnavailable):
            cut.sessions.for_agent("a")
        assert isinstance(SessionStoreUnavailable("x"), BackendUnavailable)
        assert cut.counters.get("sessions.degraded.get") == 8

    def test_what_redis_said_is_gone_is_not_remembered(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        cut.sessions.bind("s", "a")
        cut.sessions.bind("t", "b")
        keeping_redis.command("DEL", "session:s")
        assert cut.sessions.get("s") is None
        assert cut.sessions.unbind_agent("b") == 1
        keeping_redis.kill()
        for sid in ("s", "t"):
            with pytest.raises(SessionStoreUnavailable):
                cut.sessions.get(sid)

    def test_a_revocation_here_holds_here(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        cut.sessions.bind("s", "a")
        cut.sessions.bind("t", "a")
        keeping_redis.kill()
        assert cut.sessions.unbind("s") is True
        assert cut.sessions.unbind("s") is False
        assert cut.sessions.unbind("elsewhere") is False
        assert cut.sessions.get("s") is None
        assert cut.sessions.get("elsewhere") is None
        assert cut.sessions.touch("s") is False
        assert cut.sessions.unbind_agent("a") == 1
        assert cut.sessions.get("t") is None
        counted = cut.counters.read()
        assert (counted["sessions.degraded.unbind"], counted["sessions.degraded.unbind_agent"]) == (3, 1)

    def test_bind(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        cut.sessions.bind("known", "a")
        keeping_redis.kill()
        bound = cut.sessions.bind("new", "b", data={"x": []}, ttl=50)
        assert (bound.backend, bound.bind_count, bound.data) == ("local", 1, {"x": []})
        assert cut.sessions.get("new") == bound
        assert cut.sessions.bind("known", "b").bind_count == 2
        assert cut.sessions.bind("new", "b", if_absent=True) == bound
        with pytest.raises(SessionAlreadyBound):
            cut.sessions.bind("new", "c", if_absent=True)
        with pytest.raises(SessionStoreUnavailable):
            cut.sessions.bind("unknown", "a", if_absent=True)
        cut.sessions.unbind("new")
        assert cut.sessions.bind("new", "c", if_absent=True).agent_id == "c", "revoked here: known to be unbound"

    def test_sessions_end_and_slide_here_too(
        self, make_gov: Callable[..., GovRedis], keeping_redis: RedisServer
    ) -> None:
        client = make_gov(redis_url=keeping_redis.url)._redis
        skew = timedelta()
        sessions = SessionCache(
            Keys(),
            client,
            ttl=100,
            local_entries=10,
            counters=Counters(),
            now=lambda: datetime.now(timezone.utc) + skew,
        )
        sessions.bind("s", "a")
        sessions.bind("touched", "a")
        sessions.bind("slid", "a")
        keeping_redis.command("PEXPIRE", "session:s", 50_000)
        sessions.get("s")
        keeping_redis.command("PEXPIRE", "session:slid", 50_000)
        sessions.get("slid", touch=True)
        keeping_redis.kill()
        skew = timedelta(seconds=60)
        with pytest.raises(SessionStoreUnavailable):
            sessions.get("s")
        assert sessions.get_agent_id("slid") == "a", "what the touch gave it counts here too"
        assert sessions.touch("touched")
        skew = timedelta(seconds=155)
        assert sessions.get_agent_id("touched") == "a"
        skew = timedelta(seconds=165)
        with pytest.raises(SessionStoreUnavailable):
            sessions.get("touched")

    def test_a_full_memory_refuses_rather_than_loses(
        self, make_gov: Callable[..., GovRedis], keeping_redis: RedisServer
    ) -> None:
        gov = make_gov(redis_url=keeping_redis.url, local_entries=3)
        keeping_redis.kill()
        for n in range(3):
            gov.sessions.bind(f"s{n}", "a")
            gov.sessions.unbind(f"x{n}")
            gov.sessions.unbind_agent(f"a{n}")
        for refused in (
            lambda: gov.sessions.bind("s3", "a"),
            lambda: gov.sessions.unbind("x3"),
            lambda: gov.sessions.unbind_agent("a3"),
        ):
            with pytest.raises(SessionStoreUnavailable, match="owes it 3 changes"):
                refused()
        assert [gov.sessions.get_agent_id(f"s{n}") for n in range(3)] == ["a"] * 3
        keeping_redis.restart("empty")
        back(gov)
        assert sorted(keeping_redis.command("KEYS", "session:*")) == ["session:s0", "session:s1", "session:s2"]
        gov.sessions.bind("s3", "a")

    def test_disabled_is_not_degraded(self, make_gov: Callable[..., GovRedis]) -> None:
        gov = make_gov(redis_enabled=False)
        assert gov.sessions.get("unknown") is None
        gov.sessions.bind("s", "a", if_absent=True)
        assert gov.sessions.for_agent("a") == ["s"]
        assert not any("degraded" in name for name in gov.counters.read())


class TestRecovery:
    def test_revocations_first_then_bindings_where_still_unbound(
        self, cut: GovRedis, keeping_redis: RedisServer, outage: tuple[Away, Away, bool]
    ) -> None:
        begin, end, keeps = outage
        for sid in ("revoked", "renewed", "of-revoked-agent", "rebound"):
            cut.sessions.bind(sid, "gone" if sid == "of-revoked-agent" else "a")
        keeping_redis.command("SET", "session:theirs", '{"agent_id": "them"}')
        begin()
        cut.sessions.unbind("revoked")
        cut.sessions.unbind("theirs")
        cut.sessions.unbind("renewed")
        cut.sessions.bind("renewed", "b")
        cut.sessions.unbind_agent("gone")
        cut.sessions.bind("of-gone-again", "gone")
        cut.sessions.bind("new", "a", ttl=500, data=[])
        cut.sessions.bind("rebound", "b")
        end()
        back(cut)
        assert keeping_redis.command("EXISTS", "session:revoked", "session:of-revoked-agent", "session:theirs") == 0
        agents = {sid: cut.sessions.get_agent_id(sid) for sid in ("renewed", "of-gone-again", "new", "rebound")}
        assert agents == {"renewed": "b", "of-gone-again": "gone", "new": "a", "rebound": "a" if keeps else "b"}
        found = cut.sessions.get("new")
        assert found is not None
        assert (found.data, found.backend) == ([], "redis")
        assert 400_000 < keeping_redis.command("PTTL", "session:new") <= 500_000
        assert cut.sessions.for_agent("gone") == ["of-gone-again"]
        assert cut.counters.get("sessions.replays_refused") == int(keeps)
        assert cut.sessions._local.debts() == ([], [], [])
        assert all(keeping_redis.command("PTTL", key) > 0 for key in keeping_redis.command("KEYS", "*"))

    def test_redis_is_not_used_before_it_was_told(
        self, make_gov: Callable[..., GovRedis], keeping_redis: RedisServer, outage: tuple[Away, Away, bool]
    ) -> None:
        """A reader hammers while Redis comes back: it never sees the revoked session alive, nor the new one missing."""
        begin, end, _ = outage
        gov = make_gov(redis_url=keeping_redis.url)
        gov.sessions.bind("revoked", "a")
        begin()
        gov.sessions.unbind("revoked")
        gov.sessions.bind("new", "a")
        seen: set[tuple[str | None, str | None]] = set()
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                seen.add((gov.sessions.get_agent_id("revoked"), gov.sessions.get_agent_id("new")))

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            end()
            back(gov)
            until(lambda: gov.counters.get("sessions.hits") > 20)
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert seen == {(None, "a")}

    def test_somebody_elses_binding_stands_and_is_remembered(
        self, make_gov: Callable[..., GovRedis], keeping_redis: RedisServer
    ) -> None:
        cut, other = (make_gov(redis_url=keeping_redis.url) for _ in range(2))
        keeping_redis.pause()
        cut.sessions.bind("s", "mine")
        with cut._redis.breaker._probing:  # type: ignore[union-attr]  # hold its recovery off: `other` comes first
            keeping_redis.kill()
            keeping_redis.restart("empty")
            other.sessions.bind("s", "theirs", ttl=50)
            assert cut.sessions.get_agent_id("s") == "mine"
        back(cut)
        assert cut.sessions.get_agent_id("s") == "theirs"
        assert cut.counters.get("sessions.replays_refused") == 1
        keeping_redis.kill()
        known = cut.sessions.get("s")
        assert known is not None
        assert known.agent_id == "theirs"
        assert known.expires_at is not None
        assert (known.expires_at - datetime.now(timezone.utc)).total_seconds() <= 50

    def test_one_that_cannot_be_told_does_not_hinder_the_rest(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        keeping_redis.command("LPUSH", "agent_sessions:odd", "a list")
        keeping_redis.command("LPUSH", "session:odd", "a list")
        cut.sessions.bind("of-a", "a")
        keeping_redis.pause()
        cut.sessions.unbind_agent("odd")
        cut.sessions.unbind_agent("a")
        cut.sessions.bind("odd", "b")
        cut.sessions.bind("new", "b")
        keeping_redis.resume()
        back(cut)
        assert keeping_redis.command("EXISTS", "session:of-a") == 0
        assert cut.sessions.get_agent_id("new") == "b"
        assert cut.counters.get("sessions.replays_failed") == 2
        assert cut.sessions._local.debts() == ([], [], [])

    def test_a_bind_that_redis_has_no_memory_for_is_told_later(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        """Such an answer does not open the breaker by itself; what is owed does."""
        cut.sessions.get("warm")
        keeping_redis.command("CONFIG", "SET", "maxmemory", "1")
        assert cut.sessions.bind("s", "a").backend == "local"
        assert cut.sessions.get_agent_id("s") == "a"
        assert keeping_redis.command("EXISTS", "session:s") == 0
        keeping_redis.command("CONFIG", "SET", "maxmemory", "0")
        back(cut)
        found = cut.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.backend) == ("a", "redis")

    def test_a_late_execution_of_the_bind_itself_is_the_same_bind(
        self, cut: GovRedis, keeping_redis: RedisServer
    ) -> None:
        cut.sessions.get("warm")
        keeping_redis.pause()
        bound = cut.sessions.bind("s", "a")
        keeping_redis.resume()
        back(cut)
        found = cut.sessions.get("s")
        assert found is not None
        assert (found.bind_count, found.bound_at) == (1, bound.bound_at)

    def test_a_child_does_not_tell_what_its_parent_owes(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        cut.sessions.bind("s", "a")
        keeping_redis.kill()
        cut.sessions.unbind("s")
        cut.sessions.bind("new", "a")
        ready, go = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:  # after the parent has paid and others have bound anew, the child comes back to Redis
            status = 1
            try:
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                until(lambda: _usable(cut))
                cut.sessions.bind("child", "a")
                status = 0
            finally:
                os._exit(status)
        os.read(ready[0], 1)
        keeping_redis.restart("empty")
        back(cut)
        cut.sessions.bind("s", "b")
        cut.sessions.unbind("new")
        os.write(go[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
        for end in (*ready, *go):
            os.close(end)
        assert cut.sessions.get_agent_id("s") == "b"
        assert cut.sessions.get("new") is None
        assert cut.sessions.get_agent_id("child") == "a"


def _usable(gov: GovRedis) -> bool:
    try:
        gov.sessions.get("anything")
    except SessionStoreUnavailable:
        return False
    return True


class TestUnderTraffic:
    def test_redis_comes_back_while_sessions_are_being_bound(self, cut: GovRedis, keeping_redis: RedisServer) -> None:
        """Each bind owes Redis something, and must not hold up its own telling for ever."""
        keeping_redis.kill()
        done = threading.Event()

        def bind_on(k: int) -> None:
            n = 0
            while not done.is_set():
                n += 1
                cut.sessions.bind(f"s{k}-{n % 500}", "agent")
                sum(range(20_000))  # what a request does besides

        threads = [threading.Thread(target=bind_on, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: not cut._redis.breaker.closed)  # type: ignore[union-attr]
            keeping_redis.restart("empty")
            back(cut)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        until(lambda: cut.sessions.get("s0-1").backend == "redis")  # type: ignore[union-attr]

    def test_ten_thousand_sessions_of_one_agent_end_in_one_call(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        assert gov._redis is not None
        sessions = [f"s{n}" for n in range(10_000)]
        index = gov._keys.agent_sessions("agent")
        for few in range(0, 10_000, 1000):
            some = sessions[few : few + 1000]
            gov._redis.pipeline([("SET", gov._keys.session(s), '{"agent_id": "agent"}') for s in some])
            gov._redis.call("ZADD", index, *[x for s in some for x in ("9999999999", s)])
        assert gov.sessions.unbind_agent("agent") == 10_000


def test_rejected_credentials_at_recovery_pay_no_debt(
    make_gov: Callable[..., GovRedis], keeping_redis: RedisServer
) -> None:
    gov = make_gov(redis_url=keeping_redis.url)
    gov.sessions.bind("s", "alice")
    gov.metadata.set("x", "old")
    keeping_redis.pause()
    gov.sessions.unbind("s")
    gov.metadata.invalidate_or_owe("x")
    keeping_redis.resume()
    # Nobody knows whether it has been told by now; what follows owes anew, while Redis wants a password.
    back(gov)
    keeping_redis.command("CONFIG", "SET", "requirepass", "secret")
    gov._redis._pool.drop_idle()  # type: ignore[union-attr]
    gov.sessions._local.unbind("t")
    gov.metadata._owed["y"] = object()
    gov._redis.replay_soon("a test")  # type: ignore[union-attr]
    until(lambda: "credentials" in gov._redis.breaker.reason)  # type: ignore[union-attr]
    assert not gov._redis.breaker.closed  # type: ignore[union-attr]
    assert list(gov.sessions._local._to_unbind) == ["t"]
    assert list(gov.metadata._owed) == ["y"]


def test_a_touch_never_shortens(make_gov: Callable[..., GovRedis], keeping_redis: RedisServer) -> None:
    gov = make_gov(redis_url=keeping_redis.url, session_ttl=60)
    bound = gov.sessions.bind("long", "agent", ttl=3600)
    keeping_redis.pause()
    touched = gov.sessions.get("long", touch=True)
    assert touched is not None
    assert touched.expires_at == bound.expires_at


def test_what_was_read_before_a_revocation_here_is_not_remembered(
    cut: GovRedis, keeping_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut.sessions.bind("s", "agent")
    pipeline = cut._redis.pipeline  # type: ignore[union-attr]

    def read_then_revoke(*args: Any) -> Any:
        replies = pipeline(*args)
        monkeypatch.undo()
        worker = threading.Thread(target=cut.sessions.unbind, args=("s",))
        worker.start()
        worker.join()
        return replies

    monkeypatch.setattr(cut._redis, "pipeline", read_then_revoke)
    assert cut.sessions.get("s") is not None, "it was read before"
    keeping_redis.kill()
    with pytest.raises(SessionStoreUnavailable):
        cut.sessions.get("s")
