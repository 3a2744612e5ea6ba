"""`update`: compare-and-set of a living session's data, over every store; `exists`."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import POSTGRES_AWAY, REDIS_AWAY, redis_of

from govredis import BackendError, GovRedis, SessionChanged, SessionStoreUnavailable
from govredis._sole import SoleMark, nobody
from govredis.sessions import SessionCache, updates
from govredis.sessions.backends.postgres_backend import PostgresSessionBackend
from govredis.sessions.backends.redis_backend import RedisSessionBackend
from govredis.sessions.backends.row_cache import RowCache
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]

#: By the servers that are there: which settings, and who answers an update then.
STORES: dict[str, tuple[str, dict[str, Any], str]] = {
    "redis": ("r", {}, "redis"),
    "durable": ("rp", {}, "redis"),
    "durable, hashed": ("rp", {"session_hash_ids": True}, "redis"),
    "durable, redis away": ("p", {"redis_url": REDIS_AWAY}, "postgres"),
    "durable, redis disabled": ("p", {"redis_enabled": False}, "postgres"),
    "disabled": ("", {"redis_enabled": False}, "local"),
    "redis away": ("", {"redis_url": REDIS_AWAY}, "local"),
    "both away": ("", {"redis_url": REDIS_AWAY, "database_url": POSTGRES_AWAY}, "local"),
    "postgres away": ("r", {"database_url": POSTGRES_AWAY}, "local"),
}
SHARED = [name for name, (servers, _, _) in STORES.items() if servers]


class Store:
    """Processes, as far as sessions go, on the same servers."""

    def __init__(self, make: Callable[[], GovRedis], backend: str) -> None:
        self.make = make
        self.backend = backend
        self.gov = make()
        self.sessions = self.gov.sessions


@pytest.fixture
def store(
    request: pytest.FixtureRequest, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
) -> Store:
    servers, settings, backend = STORES[request.param]
    here = {"redis_url": redis_server.url} if "r" in servers else {}
    there = {"database_url": postgres_server.url} if "p" in servers else {}
    return Store(lambda: make_gov(**{"session_ttl": 100, **here, **there, **settings}), backend)


everywhere = pytest.mark.parametrize("store", STORES, indirect=True)
where_shared = pytest.mark.parametrize("store", ["redis", "durable", "durable, redis away"], indirect=True)


def data_of(sessions: SessionCache, sid: str) -> Any:
    found = sessions.get(sid)
    assert found is not None
    return found.data


class TestContract:
    @everywhere
    def test_a_value_takes_the_place_of_the_data(self, store: Store) -> None:
        sessions = store.sessions
        bound = sessions.bind("s", "a", ttl=60, data={"old": 1})
        for data in ({"x": []}, [1, (2,)], None, "ü", {"old": 1}):
            updated = sessions.update("s", data)
            expected = json.loads(json.dumps(data))
            assert (updated.session_id, updated.agent_id, updated.bound_at) == ("s", "a", bound.bound_at)
            assert (updated.bind_count, updated.data, updated.backend) == (1, expected, store.backend)
            found = sessions.get("s")
            assert found is not None
            assert (found.agent_id, found.bound_at, found.bind_count) == ("a", bound.bound_at, 1)
            assert found.data == expected
            for binding in (updated, found):
                assert binding.expires_at is not None
                assert bound.expires_at is not None
                assert abs((binding.expires_at - bound.expires_at).total_seconds()) < 5, "the TTL stays"
        assert store.gov.counters.get("sessions.updated") == 5

    @everywhere
    def test_a_function_gets_a_copy_of_the_data(self, store: Store) -> None:
        sessions = store.sessions
        given = {"n": 1, "list": []}
        sessions.bind("s", "a", data=given)

        def change(data: Any) -> Any:
            data["n"] += 1
            data["list"].append(1)
            return data

        assert sessions.update("s", change).data == {"n": 2, "list": [1]}
        assert sessions.update("s", change).data == data_of(sessions, "s") == {"n": 3, "list": [1, 1]}
        assert given == {"n": 1, "list": []}
        assert sessions.update("s", lambda data: None).data is None
        assert sessions.update("s", lambda data: [data]).data == [None]

        def spoil(data: Any) -> Any:
            data.append(1)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            sessions.update("s", spoil)
        assert data_of(sessions, "s") == [None]

    @everywhere
    def test_only_of_a_living_session(self, store: Store) -> None:
        sessions = store.sessions
        sessions.bind("s", "a", data=1)
        sessions.unbind("s")
        for data in (2, lambda data: 2):
            with pytest.raises(SessionChanged, match=r"^the session has ended, or was never bound$") as refused:
                sessions.update("s", data)
            assert refused.value.existing is None
            assert sessions.get("s") is None
            assert sessions.exists("s") is False

    @pytest.mark.parametrize(
        "store", [name for name, (_, _, backend) in STORES.items() if "away" not in name or "durable" in name],
        indirect=True,
    )  # fmt: skip
    def test_an_unknown_session_is_not_updated(self, store: Store) -> None:
        called: list[Any] = []
        with pytest.raises(SessionChanged):
            store.sessions.update("unknown", called.append)
        assert called == []
        assert store.sessions.exists("unknown") is False

    @everywhere
    def test_a_session_bound_anew_meanwhile_is_not_changed(self, store: Store) -> None:
        sessions = store.sessions
        sessions.bind("s", "a", data=1)

        def change(data: Any) -> Any:
            sessions.bind("s", "b", data="of b")
            return data

        with pytest.raises(SessionChanged, match="agent 'b' was bound anew or changed") as refused:
            sessions.update("s", change)
        assert refused.value.existing is not None
        assert (refused.value.existing.session_id, refused.value.existing.agent_id) == ("s", "b")
        assert data_of(sessions, "s") == "of b"

    @everywhere
    def test_a_session_ended_meanwhile_stays_ended(self, store: Store) -> None:
        sessions = store.sessions
        for end in (lambda: sessions.unbind("s"), lambda: sessions.unbind_agent("a"), lambda: sessions.rotate("s")):
            sessions.bind("s", "a", data=1)

            def change(data: Any, end: Callable[[], Any] = end) -> Any:
                end()
                return data

            with pytest.raises(SessionChanged) as refused:
                sessions.update("s", change)
            assert refused.value.existing is None
            assert sessions.get("s") is None

    @everywhere
    def test_it_tries_again_and_not_for_ever(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(updates.time, "sleep", lambda seconds: None)
        sessions = store.sessions
        sessions.bind("s", "a", data=0)
        calls: list[int] = []

        def change(data: int, losses: int) -> int:
            calls.append(data)
            if len(calls) <= losses:
                sessions.update("s", data + 1)
            return data + 100

        assert sessions.update("s", lambda data: change(data, 5)).data == 105
        assert calls == [0, 1, 2, 3, 4, 5]
        calls.clear()
        with pytest.raises(SessionChanged) as refused:
            sessions.update("s", lambda data: change(data, 1000))
        assert len(calls) == 100
        assert refused.value.existing is not None
        assert (refused.value.existing.agent_id, data_of(sessions, "s")) == ("a", 205)

    @pytest.mark.parametrize("store", ["redis", "durable", "disabled"], indirect=True)
    def test_bad_arguments_are_refused_before_anything_is_sent(self, store: Store, plain_redis: Any) -> None:
        plain_redis.config_resetstat()
        for data in (float("nan"), {1}, "x" * 65535, object()):
            with pytest.raises(ValueError, match=r"data cannot be stored|data is"):
                store.sessions.update("s", data)
        for call in (lambda: store.sessions.update("{", 1), lambda: store.sessions.exists("")):
            with pytest.raises(ValueError, match="session_id is"):
                call()
        assert not {"cmdstat_mget", "cmdstat_evalsha"} & set(plain_redis.info("commandstats"))
        store.sessions.bind("s", "a", data=1)
        with pytest.raises(ValueError, match="data cannot be stored"):
            store.sessions.update("s", lambda data: {data})
        assert data_of(store.sessions, "s") == 1

    @everywhere
    def test_exists(self, store: Store) -> None:
        store.sessions.bind("s", "a")
        assert store.sessions.exists("s") is True

    def test_exists_is_one_round_trip_and_lengthens_nothing(self, make_gov: MakeGov, redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url)
        gov.sessions.bind("s", "a", ttl=50)
        redis_server.command("CONFIG", "RESETSTAT")
        assert gov.sessions.exists("s")
        stats = redis_server.command("INFO", "commandstats")
        assert "cmdstat_eval" not in stats
        assert 0 < int(redis_server.command("PTTL", "session:s")) <= 50_000

    @pytest.mark.parametrize("store", ["redis away", "both away"], indirect=True)
    def test_an_unknown_session_without_any_server_is_an_error(self, store: Store) -> None:
        for call in (lambda: store.sessions.update("unknown", 1), lambda: store.sessions.exists("unknown")):
            with pytest.raises(SessionStoreUnavailable, match="does not know the session"):
                call()
        assert store.gov.counters.get("sessions.degraded.update") == 1


class TestAtOneTime:
    @everywhere
    def test_updates_of_four_threads_all_count(self, store: Store) -> None:
        store.sessions.bind("s", "a", data={"n": 0})

        def add(data: Any) -> Any:
            return {"n": data["n"] + 1}

        # Where there is a store, each thread is a process of its own.
        shared = store.backend != "local"
        owners = [store.make().sessions if shared else store.sessions for _ in range(4)]

        def work(sessions: SessionCache) -> None:
            for _ in range(100):
                sessions.update("s", add)

        threads = [threading.Thread(target=work, args=(sessions,)) for sessions in owners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert data_of(store.sessions, "s") == {"n": 400}

    @where_shared
    def test_between_look_and_write_anything_may_happen(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other processes act there, in each order: an ended session stays ended, and a new binding is not changed."""
        other = store.make().sessions
        chance = random.Random(5)
        expected: list[tuple[Any, ...] | None] = []
        acts: dict[str, Callable[[], Any]] = {
            "unbind": lambda: other.unbind("s"),
            "unbind_agent": lambda: other.unbind_agent("a"),
            "bind": lambda: other.bind("s", "b", data="b's"),
            "update": lambda: other.update("s", "other's"),
            "get": lambda: other.get("s", touch=True),
        }
        for _ in range(150):
            store.sessions.bind("s", "a", data="mine")
            plan = [chance.choice([*acts]) for _ in range(chance.randint(0, 3))]

            def change(data: Any, plan: list[str] = plan) -> Any:
                while plan:
                    try:
                        acts[plan.pop(0)]()
                    except SessionChanged:
                        pass
                expected[:] = [(b := other.get("s")) and (b.agent_id, b.bound_at)]
                return [data]

            bound = store.sessions.get("s")
            assert bound is not None
            alive = False
            try:
                updated = store.sessions.update("s", change)
                alive = True
            except SessionChanged:
                pass
            found = other.get("s")
            assert (found and (found.agent_id, found.bound_at)) == expected[0]
            assert alive is (expected[0] == ("a", bound.bound_at))
            if alive:
                assert found is not None
                assert found.data == updated.data
                assert found.data in (["mine"], ["other's"])
            store.sessions.unbind("s")

    @pytest.mark.once
    @where_shared
    def test_a_revocation_at_any_time_is_final(self, store: Store) -> None:
        other = store.make().sessions
        for n in range(300):
            sid = f"s{n}"
            store.sessions.bind(sid, "a", data=0)
            started = threading.Barrier(2)

            def update(sid: str = sid, started: threading.Barrier = started) -> None:
                started.wait()
                try:
                    for _ in range(10):
                        store.sessions.update(sid, lambda data: data + 1)
                except SessionChanged:
                    pass

            thread = threading.Thread(target=update)
            thread.start()
            started.wait()
            assert (other.unbind_agent("a") == 1) if n % 2 else other.unbind(sid)
            assert other.get(sid) is None
            thread.join()
            assert [process.get(sid) for process in (store.sessions, other)] == [None, None]


class TestOnRedis:
    @pytest.fixture
    def alone(self, make_gov: MakeGov, redis_server: RedisServer) -> GovRedis:
        return make_gov(redis_url=redis_server.url)

    def test_foreign_members_stay(self, alone: GovRedis, gov: GovRedis, plain_redis: Any) -> None:
        record = {
            "agent_id": "a",
            "bound_at": "2026-01-02T03:04:05",
            "api_key_hash": "x",
            "more": {"big": 2**70, "é": []},
        }

        def stored(govredis: GovRedis) -> Any:
            found = json.loads(plain_redis.get("session:s"))
            if govredis is gov:  # a copy of the row that has adopted it
                assert found.pop("__govredis__")["version"] > 0
                assert found.pop("bind_count") == 1
                assert found.pop("bound_at") == "2026-01-02T03:04:05.000000+00:00"
                found["bound_at"] = record["bound_at"]
            return found

        for govredis in (alone, gov):
            plain_redis.set("session:s", json.dumps(record), px=50_000)
            assert govredis.sessions.update("s", {"n": 1}).data == {"n": 1}
            assert stored(govredis) == {**record, "data": {"n": 1}}
            assert 0 < plain_redis.pttl("session:s") <= 50_000
            assert govredis.sessions.update("s", lambda data: {"n": data["n"] + 1}).data == {"n": 2}
            assert govredis.sessions.update("s", None).data is None
            assert stored(govredis) == record
            assert govredis.sessions.get_agent_id("s") == "a"
            plain_redis.set("session:s", json.dumps(record))
            govredis.sessions.update("s", 1)
            assert plain_redis.pttl("session:s") == -1

    def test_an_update_that_arrives_twice_is_carried_out_once(
        self, alone: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = redis_of(alone)
        assert client is not None
        alone.sessions.bind("s", "a", data=0)
        pipeline = type(client).pipeline
        meanwhile: list[Callable[[], Any]] = [lambda: None, lambda: alone.sessions.update("s", lambda data: data + 100)]

        def twice(self: Any, commands: Any, *args: Any, **options: Any) -> Any:
            if not any(":update:" in argument for argument in commands[0]):
                return pipeline(self, commands, *args, **options)
            monkeypatch.setattr(type(client), "pipeline", pipeline)
            assert pipeline(self, commands, *args, **options) == [1]
            meanwhile.pop(0)()
            return pipeline(self, commands, *args, **options)

        for expected in (1, 102):
            monkeypatch.setattr(type(client), "pipeline", twice)
            calls: list[int] = []
            alone.sessions.update("s", lambda data, calls=calls: calls.append(data) or data + 1)
            assert len(calls) == 1
            assert data_of(alone.sessions, "s") == expected
        assert all(0 < plain_redis.pttl(key) <= 10_000 for key in plain_redis.keys("*:update:*"))

    def test_a_planted_record_is_an_error(self, alone: GovRedis, plain_redis: Any) -> None:
        plain_redis.lpush("session:s", "x")
        for call in (lambda: alone.sessions.update("s", 1), lambda: alone.sessions.exists("s")):
            with pytest.raises(BackendError, match="record of session 's'"):
                call()

    def test_a_copy_that_is_changed_without_its_row_is_no_copy(
        self, alone: GovRedis, gov: GovRedis, plain_redis: Any
    ) -> None:
        gov.sessions.bind("s", "a", data=1)
        assert alone.sessions.update("s", 2).data == 2
        assert "__govredis__" not in json.loads(plain_redis.get("session:s"))
        assert data_of(gov.sessions, "s") == 2, "newer than the row, which adopts it"
        plain_redis.flushall()
        assert data_of(gov.sessions, "s") == 2


class TestWithRows:
    @pytest.fixture
    def other(self, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
        return make_gov(redis_url=redis_server.url, database_url=postgres_server.url)

    def test_its_cost(self, gov: GovRedis) -> None:
        gov.sessions.bind("s", "a", data=0)
        gov.sessions.get("s")
        before = gov.postgres.statements
        gov.sessions.update("s", 1)
        assert gov.postgres.statements - before == 2

    def test_other_processes_see_it_at_once_and_after_a_loss(
        self, gov: GovRedis, other: GovRedis, plain_redis: Any
    ) -> None:
        gov.sessions.bind("s", "a", data=0)
        assert data_of(other.sessions, "s") == 0
        gov.sessions.update("s", 1)
        assert data_of(other.sessions, "s") == 1
        assert gov.sessions.verify().copied == 1
        plain_redis.flushall()
        assert data_of(other.sessions, "s") == 1

    def test_a_copy_that_was_not_told_ends_with_the_relay(
        self, gov: GovRedis, other: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where the process ends between the two."""
        gov.sessions.bind("s", "a", data=0)
        with monkeypatch.context() as patched:
            patched.setattr(RowCache, "fill", lambda *args: False)
            gov.sessions.update("s", 1)
        assert data_of(other.sessions, "s") == 0
        assert other.internal.freshness is not None
        assert other.internal.freshness.drain() is not None
        assert data_of(other.sessions, "s") == 1

    def test_a_session_that_slid_while_postgresql_was_away_ends_no_sooner(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        gov.sessions.bind("s", "a", data=0)
        gov.postgres.fetch("UPDATE @schema@.govredis_sessions SET expires_at = clock_timestamp() - interval '1 second'")
        assert gov.sessions.update("s", 1).data == 1
        assert data_of(gov.sessions, "s") == 1
        assert plain_redis.pttl("session:s") > 3_000_000


def trip(gov: GovRedis) -> Callable[[], None]:
    """Take the primary's server from it. Returns a function that gives it back."""
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


class TestAway:
    @pytest.fixture(params=["redis", "durable"])
    def processes(
        self,
        request: pytest.FixtureRequest,
        make_gov: MakeGov,
        redis_server: RedisServer,
        postgres_server: PostgresServer,
    ) -> Iterator[tuple[GovRedis, GovRedis]]:
        options = {"database_url": postgres_server.url} if request.param == "durable" else {}
        yield make_gov(redis_url=redis_server.url, **options), make_gov(redis_url=redis_server.url, **options)

    def test_a_change_here_is_seen_here_and_told(self, processes: tuple[GovRedis, GovRedis]) -> None:
        gov, other = processes
        gov.sessions.bind("s", "a", data={"n": 0})
        other.sessions.bind("seen", "b", data=5)
        gov.sessions.get("seen")
        back = trip(gov)
        gov.sessions.bind("here", "c", data=1)
        for n in (1, 2, 3):
            updated = gov.sessions.update("s", lambda data: {"n": data["n"] + 1})
            assert (updated.backend, updated.data) == ("local", {"n": n})
            assert data_of(gov.sessions, "s") == {"n": n}
        gov.sessions.update("seen", 6)
        gov.sessions.update("here", 2)
        assert gov.counters.get("sessions.degraded.update") == 5
        assert data_of(other.sessions, "s") == {"n": 0}
        back()
        for process in processes:
            assert [data_of(process.sessions, sid) for sid in ("s", "seen", "here")] == [{"n": 3}, 6, 2]
        assert gov.sessions._memory.pending_updates() == []
        assert gov.counters.get("sessions.replays_refused") == 0

    @pytest.mark.parametrize(
        ("meanwhile", "stands"),
        [
            (lambda other: other.update("s", "newer"), "newer"),
            (lambda other: other.bind("s", "a", data="anew"), "anew"),
            (lambda other: other.bind("s", "b", data=0), 0),
            (lambda other: other.unbind("s"), None),
            (lambda other: other.unbind_agent("a"), None),
        ],
        ids=["changed", "bound anew", "bound to another", "ended", "its agent's ended"],
    )
    def test_changes_of_other_processes_stand(
        self, processes: tuple[GovRedis, GovRedis], meanwhile: Callable[[SessionCache], Any], stands: Any
    ) -> None:
        gov, other = processes
        gov.sessions.bind("s", "a", data=0)
        back = trip(gov)
        gov.sessions.update("s", "older")
        meanwhile(other.sessions)
        back()
        for process in processes:
            found = process.sessions.get("s")
            assert (found and found.data) == stands
        assert gov.counters.get("sessions.replays_refused") == 1
        assert gov.sessions._memory.pending_updates() == []

    def test_an_update_of_a_session_that_ended_here_is_not_told(self, processes: tuple[GovRedis, GovRedis]) -> None:
        gov, _ = processes
        for end in (lambda: gov.sessions.unbind("s"), lambda: gov.sessions.unbind_agent("a")):
            gov.sessions.bind("s", "a", data=0)
            back = trip(gov)
            gov.sessions.update("s", 1)
            end()
            with pytest.raises(SessionChanged):
                gov.sessions.update("s", 2)
            back()
            assert [process.sessions.get("s") for process in processes] == [None, None]

    def test_an_update_during_the_telling_is_told_too(
        self, processes: tuple[GovRedis, GovRedis], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov, _ = processes
        gov.sessions.bind("s", "a", data=0)
        back = trip(gov)
        gov.sessions.update("s", 1)
        store = gov.sessions._backends.primary
        assert isinstance(store, RedisSessionBackend | PostgresSessionBackend)
        change, changed = type(store).compare_and_set, []

        def late(self: Any, *args: Any) -> Any:
            found = change(self, *args)
            if not changed:
                held = gov.sessions._memory.read_for_update("s")
                assert held is not None
                changed.append(gov.sessions._memory.compare_and_set(held, "2"))
            return found

        monkeypatch.setattr(type(store), "compare_and_set", late)
        back()
        assert changed[0] is not None
        assert gov.sessions._memory.pending_updates() != []
        for replay in gov.sessions._backends.server._replays:  # type: ignore[union-attr]
            replay(gov.sessions._backends.server)  # type: ignore[arg-type]
        assert gov.sessions._memory.pending_updates() == []
        assert data_of(gov.sessions, "s") == 2
        assert gov.counters.get("sessions.replays_refused") == 0

    def test_a_full_memory_refuses_rather_than_loses(self, make_gov: MakeGov, redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url, local_entries=2)
        for sid in ("s", "t"):
            gov.sessions.bind(sid, "a", data=0)
        back = trip(gov)
        for sid in ("s", "t"):
            gov.sessions.update(sid, 1)
        gov.sessions.bind("u", "a", data=0)
        with pytest.raises(SessionStoreUnavailable, match="2 changes of this process wait"):
            gov.sessions.update("u", 1)
        assert [data_of(gov.sessions, sid) for sid in ("s", "t", "u")] == [1, 1, 0]
        back()
        assert [data_of(gov.sessions, sid) for sid in ("s", "t", "u")] == [1, 1, 0]
