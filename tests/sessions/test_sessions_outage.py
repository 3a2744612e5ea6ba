"""SessionCache while Redis is away, and the pending writes that it tells on the return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from support import PATIENT, Child, Gate, eventually, redis_of

from govredis import BackendUnavailable, GovRedis, SessionAlreadyBound, SessionStoreUnavailable
from govredis._sole import SoleMark, nobody
from govredis.sessions import SessionCache
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


Away = Callable[[], None]
#: How Redis goes away, and how it is back: with its data, empty, or as if nothing had been.
OUTAGES: dict[str, tuple[Callable[[RedisServer], Any], Callable[[RedisServer], Any], bool]] = {
    "restarted with its data": (RedisServer.kill, lambda server: server.restart("keep"), True),
    "restarted empty": (RedisServer.kill, lambda server: server.restart("empty"), False),
    "paused": (RedisServer.pause, RedisServer.resume, True),
}


@pytest.fixture(params=OUTAGES)
def outage(request: pytest.FixtureRequest, persistent_redis: RedisServer) -> tuple[Away, Away, bool]:
    """(begin, end, whether Redis keeps its data)."""
    begin, end, keeps = OUTAGES[request.param]
    return lambda: begin(persistent_redis), lambda: end(persistent_redis), keeps


@pytest.fixture
def cut(make_gov: Callable[..., GovRedis], persistent_redis: RedisServer) -> GovRedis:
    """The GovRedis that is to lose its Redis."""
    return make_gov(redis_url=persistent_redis.url, **PATIENT)


@pytest.fixture
def cut_impatient(make_gov: Callable[..., GovRedis], persistent_redis: RedisServer) -> GovRedis:
    """The same, for a Redis that hangs: a timeout of a second is waited for."""
    return make_gov(redis_url=persistent_redis.url)


def back(gov: GovRedis) -> None:
    eventually(lambda: redis_of(gov).breaker.closed)


class TestAway:
    def test_known_sessions_are_found_and_an_unknown_one_is_no_logout(
        self, cut: GovRedis, persistent_redis: RedisServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        make_gov(redis_url=persistent_redis.url, **PATIENT).sessions.bind("seen", "b", data=[1])
        cut.sessions.bind("bound", "a")
        cut.sessions.get("seen")
        cut.sessions.bind("revoked before", "a")
        cut.sessions.unbind("revoked before")
        persistent_redis.kill()
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

    def test_a_session_that_redis_has_ended_is_not_remembered(
        self, cut: GovRedis, persistent_redis: RedisServer
    ) -> None:
        cut.sessions.bind("s", "a")
        cut.sessions.bind("t", "b")
        persistent_redis.command("DEL", "session:s")
        assert cut.sessions.get("s") is None
        assert cut.sessions.unbind_agent("b") == 1
        persistent_redis.kill()
        for sid in ("s", "t"):
            with pytest.raises(SessionStoreUnavailable):
                cut.sessions.get(sid)

    def test_a_revocation_here_holds_here(self, cut: GovRedis, persistent_redis: RedisServer) -> None:
        cut.sessions.bind("s", "a")
        cut.sessions.bind("t", "a")
        persistent_redis.kill()
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

    def test_bind(self, cut: GovRedis, persistent_redis: RedisServer) -> None:
        cut.sessions.bind("known", "a")
        persistent_redis.kill()
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
        self, make_gov: Callable[..., GovRedis], persistent_redis: RedisServer
    ) -> None:
        began, skew = datetime.now(timezone.utc), timedelta()  # of a clock that stands: a stall takes no time then
        settings = {"session_ttl": 100, "local_entries": 10, **PATIENT}
        context = make_gov(redis_url=persistent_redis.url, **settings).internal.context
        sessions = SessionCache(context, now=lambda: began + skew)
        sessions.bind("s", "a")
        sessions.bind("touched", "a")
        sessions.bind("slid", "a")
        persistent_redis.command("PEXPIRE", "session:s", 50_000)
        sessions.get("s")
        persistent_redis.command("PEXPIRE", "session:slid", 50_000)
        sessions.get("slid", touch=True)
        persistent_redis.kill()
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
        self, make_gov: Callable[..., GovRedis], persistent_redis: RedisServer
    ) -> None:
        gov = make_gov(redis_url=persistent_redis.url, local_entries=3, **PATIENT)
        persistent_redis.kill()
        for n in range(3):
            gov.sessions.bind(f"s{n}", "a")
            gov.sessions.unbind(f"x{n}")
            gov.sessions.unbind_agent(f"a{n}")
        for refused in (
            lambda: gov.sessions.bind("s3", "a"),
            lambda: gov.sessions.unbind("x3"),
            lambda: gov.sessions.unbind_agent("a3"),
        ):
            with pytest.raises(SessionStoreUnavailable, match="3 changes of this process wait"):
                refused()
        assert [gov.sessions.get_agent_id(f"s{n}") for n in range(3)] == ["a"] * 3
        persistent_redis.restart("empty")
        back(gov)
        assert sorted(persistent_redis.command("KEYS", "session:*")) == ["session:s0", "session:s1", "session:s2"]
        gov.sessions.bind("s3", "a")

    def test_disabled_is_not_degraded(self, make_gov: Callable[..., GovRedis]) -> None:
        gov = make_gov(redis_enabled=False)
        assert gov.sessions.get("unknown") is None
        gov.sessions.bind("s", "a", if_absent=True)
        assert gov.sessions.for_agent("a") == ["s"]
        assert not any("degraded" in name for name in gov.counters.read())


class TestRecovery:
    def test_revocations_first_then_bindings_where_still_unbound(
        self, cut_impatient: GovRedis, persistent_redis: RedisServer, outage: tuple[Away, Away, bool]
    ) -> None:
        cut = cut_impatient
        begin, end, keeps = outage
        for sid in ("revoked", "renewed", "of-revoked-agent", "rebound"):
            cut.sessions.bind(sid, "gone" if sid == "of-revoked-agent" else "a")
        persistent_redis.command("SET", "session:theirs", '{"agent_id": "them"}')
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
        assert persistent_redis.command("EXISTS", "session:revoked", "session:of-revoked-agent", "session:theirs") == 0
        agents = {sid: cut.sessions.get_agent_id(sid) for sid in ("renewed", "of-gone-again", "new", "rebound")}
        assert agents == {"renewed": "b", "of-gone-again": "gone", "new": "a", "rebound": "a" if keeps else "b"}
        found = cut.sessions.get("new")
        assert found is not None
        assert (found.data, found.backend) == ([], "redis")
        assert 400_000 < persistent_redis.command("PTTL", "session:new") <= 500_000
        assert cut.sessions.for_agent("gone") == ["of-gone-again"]
        assert cut.counters.get("sessions.replays_refused") == int(keeps)
        assert cut.sessions._memory.pending() == ([], [], [])
        assert all(persistent_redis.command("PTTL", key) > 0 for key in persistent_redis.command("KEYS", "*"))

    def test_redis_is_not_used_before_it_was_told(
        self, make_gov: Callable[..., GovRedis], persistent_redis: RedisServer, outage: tuple[Away, Away, bool]
    ) -> None:
        """A reader hammers while Redis comes back: it never sees the revoked session alive, nor the new one missing."""
        begin, end, _ = outage
        gov = make_gov(redis_url=persistent_redis.url)
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
            eventually(lambda: gov.counters.get("sessions.hits") > 20)
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert seen == {(None, "a")}

    def test_another_processs_binding_stands_and_is_remembered(
        self, make_gov: Callable[..., GovRedis], persistent_redis: RedisServer
    ) -> None:
        cut, other = (make_gov(redis_url=persistent_redis.url) for _ in range(2))
        persistent_redis.pause()
        cut.sessions.bind("s", "mine")
        persistent_redis.kill()
        breaker = redis_of(cut).breaker
        prober = SoleMark()
        while breaker._probing.holder() is not prober:  # hold its recovery off: `other` comes first
            with breaker._lock:
                if breaker._probing.holder() is None:
                    breaker._probing.holder = lambda: prober
        persistent_redis.restart("empty")
        other.sessions.bind("s", "theirs", ttl=50)
        assert cut.sessions.get_agent_id("s") == "mine"
        breaker._probing.holder = nobody
        back(cut)
        assert cut.sessions.get_agent_id("s") == "theirs"
        assert cut.counters.get("sessions.replays_refused") == 1
        persistent_redis.kill()
        known = cut.sessions.get("s")
        assert known is not None
        assert known.agent_id == "theirs"
        assert known.expires_at is not None
        assert (known.expires_at - datetime.now(timezone.utc)).total_seconds() <= 50

    def test_a_write_that_cannot_be_told_does_not_hinder_the_rest(
        self, cut_impatient: GovRedis, persistent_redis: RedisServer
    ) -> None:
        cut = cut_impatient
        persistent_redis.command("LPUSH", "agent_sessions:odd", "a list")
        persistent_redis.command("LPUSH", "session:odd", "a list")
        cut.sessions.bind("of-a", "a")
        persistent_redis.pause()
        cut.sessions.unbind_agent("odd")
        cut.sessions.unbind_agent("a")
        cut.sessions.bind("odd", "b")
        cut.sessions.bind("new", "b")
        persistent_redis.resume()
        back(cut)
        assert persistent_redis.command("EXISTS", "session:of-a") == 0
        assert cut.sessions.get_agent_id("new") == "b"
        assert cut.counters.get("sessions.replays_failed") == 2
        assert cut.sessions._memory.pending() == ([], [], [])

    def test_a_bind_that_redis_has_no_memory_for_is_told_later(
        self, cut: GovRedis, persistent_redis: RedisServer
    ) -> None:
        """Such an answer does not open the breaker by itself; a pending write does."""
        cut.sessions.get("warm")
        persistent_redis.command("CONFIG", "SET", "maxmemory", "1")
        assert cut.sessions.bind("s", "a").backend == "local"
        assert cut.sessions.get_agent_id("s") == "a"
        assert persistent_redis.command("EXISTS", "session:s") == 0
        persistent_redis.command("CONFIG", "SET", "maxmemory", "0")
        back(cut)
        found = cut.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.backend) == ("a", "redis")

    def test_a_late_execution_of_the_bind_itself_is_the_same_bind(
        self, cut_impatient: GovRedis, persistent_redis: RedisServer
    ) -> None:
        cut = cut_impatient
        cut.sessions.get("warm")
        persistent_redis.pause()
        bound = cut.sessions.bind("s", "a")
        persistent_redis.resume()
        back(cut)
        found = cut.sessions.get("s")
        assert found is not None
        assert (found.bind_count, found.bound_at) == (1, bound.bound_at)

    def test_a_child_does_not_tell_its_parents_pending_writes(
        self, cut: GovRedis, persistent_redis: RedisServer
    ) -> None:
        cut.sessions.bind("s", "a")
        persistent_redis.kill()
        cut.sessions.unbind("s")
        cut.sessions.bind("new", "a")
        go = Gate()

        def come_back_late() -> None:
            """After the parent has paid, and others have bound anew."""
            go.wait()
            eventually(lambda: _usable(cut))
            cut.sessions.bind("child", "a")

        child = Child(come_back_late)
        persistent_redis.restart("empty")
        back(cut)
        cut.sessions.bind("s", "b")
        cut.sessions.unbind("new")
        go.open()
        child.result()
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
    def test_redis_comes_back_while_sessions_are_being_bound(
        self, cut: GovRedis, persistent_redis: RedisServer
    ) -> None:
        """Each bind is a pending write, and must not hold up its own telling for ever."""
        persistent_redis.kill()
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
            eventually(lambda: not redis_of(cut).breaker.closed)
            persistent_redis.restart("empty")
            back(cut)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        eventually(lambda: cut.sessions.get("s0-1").backend == "redis")  # type: ignore[union-attr]

    def test_ten_thousand_sessions_of_one_agent_end_in_one_call(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        sessions = [f"s{n}" for n in range(10_000)]
        index = gov.internal.context.keys.agent_sessions("agent")
        for few in range(0, 10_000, 1000):
            some = sessions[few : few + 1000]
            redis_of(gov).pipeline(
                [("SET", gov.internal.context.keys.session(s), '{"agent_id": "agent"}') for s in some]
            )
            redis_of(gov).call("ZADD", index, *[x for s in some for x in ("9999999999", s)])
        assert gov.sessions.unbind_agent("agent") == 10_000


def test_rejected_credentials_at_recovery_leave_writes_pending(
    make_gov: Callable[..., GovRedis], persistent_redis: RedisServer
) -> None:
    gov = make_gov(redis_url=persistent_redis.url)
    gov.sessions.bind("s", "alice")
    gov.metadata.set("x", "old")
    persistent_redis.pause()
    gov.sessions.unbind("s")
    gov.metadata.invalidate_committed("x")
    persistent_redis.resume()
    # Nobody knows whether it has been told by now; the next writes are pending anew, while Redis wants a password.
    back(gov)
    persistent_redis.command("CONFIG", "SET", "requirepass", "secret")
    redis_of(gov)._pool.drop_idle()  # type: ignore[union-attr]
    gov.sessions._memory.unbind("t")
    gov.metadata._pending.tokens["y"] = object()
    redis_of(gov).replay_soon("a test")  # type: ignore[union-attr]
    eventually(lambda: "credentials" in redis_of(gov).breaker.reason)  # type: ignore[union-attr]
    assert not redis_of(gov).breaker.closed  # type: ignore[union-attr]
    assert list(gov.sessions._memory._to_unbind) == ["t"]
    assert list(gov.metadata._pending.tokens) == ["y"]


def test_a_touch_never_shortens(make_gov: Callable[..., GovRedis], persistent_redis: RedisServer) -> None:
    gov = make_gov(redis_url=persistent_redis.url, session_ttl=60)
    bound = gov.sessions.bind("long", "agent", ttl=3600)
    persistent_redis.pause()
    touched = gov.sessions.get("long", touch=True)
    assert touched is not None
    assert touched.expires_at == bound.expires_at


def test_a_binding_read_before_a_revocation_here_is_not_remembered(
    cut: GovRedis, persistent_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut.sessions.bind("s", "agent")
    pipeline = redis_of(cut).pipeline

    def read_then_revoke(*args: Any) -> Any:
        replies = pipeline(*args)
        monkeypatch.undo()
        worker = threading.Thread(target=cut.sessions.unbind, args=("s",))
        worker.start()
        worker.join()
        return replies

    monkeypatch.setattr(redis_of(cut), "pipeline", read_then_revoke)
    assert cut.sessions.get("s") is not None, "it was read before"
    persistent_redis.kill()
    with pytest.raises(SessionStoreUnavailable):
        cut.sessions.get("s")
