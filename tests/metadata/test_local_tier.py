"""The in-process tier: true to Redis over processes and failures, bounded, and gone by itself when nobody can tell."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest

from govredis import GovRedis
from govredis.metadata import local
from govredis.metadata.guard import Seen
from govredis.metadata.local import MISS
from govredis.testing.servers import PostgresServer, RedisServer

PATIENCE = 30.0


def until(condition: Callable[[], Any], what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what or "it never came to that"
        time.sleep(0.002)


def held(gov: GovRedis, identity: str = "a", namespace: str = "") -> Any:
    """What the process itself has, MISS for nothing that is valid."""
    cache = gov.cache(namespace) if namespace else gov.metadata
    assert cache._local is not None
    return cache._local.get(identity)


def place(gov: GovRedis, identity: str = "a", namespace: str = "agent_meta") -> Any:
    """Where the process has it, valid or not: a busy machine may make it invalid for a moment."""
    values = gov.cache(namespace)._local
    assert values is not None
    return values.cells.get(identity)


def keep(gov: GovRedis, identity: str = "a") -> Any:
    """Read a value until the process has it."""
    found = None

    def is_kept() -> bool:
        nonlocal found
        found = gov.metadata.get(identity)
        return held(gov, identity) is not MISS

    until(is_kept, "it is not kept")
    return found


@pytest.fixture(params=["guard", "no guard"])
def make(
    request: pytest.FixtureRequest, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
) -> Callable[..., GovRedis]:
    """Makes GovRedis objects with the tier; processes, as it were. With PostgreSQL, and without."""
    where = {"database_url": postgres_server.url} if request.param == "guard" else {}
    return lambda **settings: make_gov(**{"local_cache": True, **where, **settings})


@pytest.fixture
def one(make: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make(redis_url=redis_server.url)


@pytest.fixture
def two(make: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make(redis_url=redis_server.url)


class TestHits:
    def test_a_hit_asks_nobody(self, one: GovRedis, plain_redis: Any) -> None:
        one.metadata.set("a", {"n": 1})
        assert keep(one) == {"n": 1}
        plain_redis.config_resetstat()
        hits = one.metadata.stats()["local_hits"]
        loads = [one.metadata.get("a"), one.metadata.get_or_load("a", pytest.fail), one.metadata.get_many(["a"])["a"]]
        assert loads == [{"n": 1}] * 3
        stats = plain_redis.info("commandstats")
        assert stats.get("cmdstat_get", {"calls": 0})["calls"] <= stats.get("cmdstat_time", {"calls": 0})["calls"]
        assert one.metadata.stats()["local_hits"] >= hits + 3
        assert one.metadata.stats()["local_hits"] == one.metadata.stats()["local_hits"]

    def test_off_by_default(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url)
        gov.metadata.get_or_load("a", lambda _: {"n": 1})["n"] = 2
        assert gov._local is None
        assert "local_hits" not in gov.metadata.stats()

    def test_a_value_ends_with_its_ttl(self, one: GovRedis) -> None:
        one.metadata.set("a", 1, ttl=0.5)
        keep(one)
        until(lambda: held(one) is MISS)
        until(lambda: one.metadata.get("a") is None)

    def test_what_ids_cannot_be_is_refused(self, one: GovRedis) -> None:
        for bad in ("", "{", 5, None, [], {}):
            with pytest.raises(ValueError, match="id is"):
                one.metadata.get(bad)  # type: ignore[arg-type]

    def test_no_more_entries_than_allowed_and_the_least_recently_used_goes(
        self, make: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        gov = make(redis_url=redis_server.url, local_entries=3)
        for identity in "abcd":
            gov.metadata.set(identity, identity)
        for identity in "abc":
            keep(gov, identity)
        until(lambda: keep(gov, "a") and all(held(gov, i) is not MISS for i in "bca"))
        keep(gov, "d")
        assert held(gov, "b") is MISS
        assert len(gov.metadata._local.cells) == 3  # type: ignore[union-attr]
        gov.metadata.get_many([f"x{n}" for n in range(100)])
        assert len(gov.metadata._local.cells) == 3  # type: ignore[union-attr]


class TestSharedValues:
    VALUE = {"tags": ["a", {"b": [1]}], "n": None}

    def test_nobody_can_change_them_be_they_hits_or_not(self, one: GovRedis) -> None:
        loaded = one.metadata.get_or_load("a", lambda _: self.VALUE)
        read = keep(one)
        kept = one.metadata.get("a")
        many = one.metadata.get_many(["b"], lambda _: {"b": self.VALUE})["b"]
        for value in (loaded, read, kept, many):
            assert value == self.VALUE
            for change in (
                lambda v: v.update(n=1), lambda v: v.pop("n"), lambda v: v.__setitem__("n", 1), lambda v: v.clear(),
                lambda v: v.__delitem__("n"), lambda v: v.setdefault("x", 1), lambda v: v.popitem(),
                lambda v: v.__ior__({}), lambda v: v["tags"].append(1), lambda v: v["tags"].sort(),
                lambda v: v["tags"].__setitem__(0, 1), lambda v: v["tags"].__delitem__(0),
                lambda v: v["tags"].__iadd__([1]), lambda v: v["tags"].__imul__(2), lambda v: v["tags"].extend([1]),
                lambda v: v["tags"].insert(0, 1), lambda v: v["tags"].pop(), lambda v: v["tags"].remove("a"),
                lambda v: v["tags"].reverse(), lambda v: v["tags"].clear(),
                lambda v: v["tags"][1]["b"].append(2),
            ):  # fmt: skip
                with pytest.raises(TypeError, match="change a copy"):
                    change(value)
            assert value == self.VALUE

    def test_their_copies_can_be_changed(self, one: GovRedis) -> None:
        value = one.metadata.get_or_load("a", lambda _: self.VALUE)
        for copied in (copy.deepcopy(value), pickle.loads(pickle.dumps(value)), json.loads(json.dumps(value))):
            assert copied == self.VALUE
            assert type(copied) is dict
            copied["tags"][1]["b"].append(2)
            copied["n"] = 5
        for shallow in (copy.copy(value), dict(value), value.copy(), {**value}, value | {}):
            assert type(shallow) is dict
        assert type(copy.copy(value["tags"])) is list
        assert value == self.VALUE


class TestCoherence:
    def test_a_change_in_another_process_is_seen(self, one: GovRedis, two: GovRedis, plain_redis: Any) -> None:
        def expire() -> None:
            plain_redis.pexpire("agent_meta:a", 1)
            until(lambda: not plain_redis.exists("agent_meta:a"))

        for change in (
            lambda: two.metadata.invalidate("a"),
            lambda: two.metadata.set("a", 2),
            lambda: plain_redis.delete("agent_meta:a"),
            expire,
            lambda: plain_redis.rename("agent_meta:a", "agent_meta:b"),
            plain_redis.flushall,
            plain_redis.flushdb,
        ):
            plain_redis.flushall()
            until(lambda: two.metadata.set("a", 1))
            keep(one)
            before = place(one)
            change()
            until(lambda: place(one) is not before)  # noqa: B023
            assert one.metadata.get("a") in (None, 2)

    def test_a_change_of_ones_own_is_seen_at_once(self, one: GovRedis) -> None:
        one.metadata.set("a", 1)
        keep(one)
        one.metadata.invalidate("a")
        assert one.metadata.get("a") is None
        one.metadata.set("b", 1)
        keep(one, "b")
        one.metadata.set("b", 2)
        assert one.metadata.get("b") == 2

    def test_what_is_changed_between_asking_and_answering_is_not_kept(
        self, one: GovRedis, two: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two.metadata.set("a", 1)
        keep(one)
        two.metadata.set("a", 2)
        until(lambda: held(one) is MISS)
        records = one.metadata._shelf
        usable = records._usable
        cells = one.metadata._local.cells  # type: ignore[union-attr]

        def change_meanwhile(*args: Any) -> Any:
            found = usable(*args)
            place = cells["a"]
            two.metadata.set("a", 3)
            until(lambda: cells.get("a") is not place)
            return found

        monkeypatch.setattr(records, "_usable", change_meanwhile)
        assert one.metadata.get("a") == 2
        monkeypatch.undo()
        assert held(one) is MISS
        assert keep(one) == 3

    def test_all_of_a_namespace_are_invalidated_at_once(self, one: GovRedis, two: GovRedis) -> None:
        two.metadata.set("a", 1)
        other = two.cache("other")
        other.set("a", 5)
        until(lambda: one.cache("other").get("a") == 5 and held(one, "a", "other") == 5)
        keep(one)
        here, there = place(one), place(one, "a", "other")
        two.metadata.invalidate_all()
        until(lambda: place(one) is not here)
        assert one.metadata.get("a") is None, "its generation is asked for at once"
        assert place(one, "a", "other") is there

    def test_another_namespace_is_tracked_too(self, one: GovRedis, two: GovRedis) -> None:
        two.metadata.set("a", 1)
        keep(one)
        late = one.cache("late")
        two.cache("late").set("a", 1)
        until(lambda: late.get("a") == 1 and held(one, "a", "late") == 1)
        two.cache("late").set("a", 2)
        until(lambda: held(one, "a", "late") is MISS)
        assert late.get("a") == 2

    def test_a_key_prefix_is_part_of_what_is_tracked(
        self, make: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        one, two = (make(redis_url=redis_server.url, key_prefix="p:") for _ in range(2))
        two.metadata.set("a", 1)
        keep(one)
        two.metadata.set("a", 2)
        until(lambda: held(one) is MISS)
        assert one.metadata.get("a") == 2

    def test_sql_of_others_is_seen(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        one, two = (
            make_gov(redis_url=redis_server.url, database_url=postgres_server.url, local_cache=True) for _ in range(2)
        )
        one.agents.create("a", {"name": "old"})
        one.metadata.get_or_load("a", one.agents.get)
        assert keep(one)["metadata"] == {"name": "old"}
        connection = psycopg2.connect(postgres_server.url)
        with connection, connection.cursor() as cursor:
            cursor.execute("""UPDATE govredis_agents SET metadata = '{"name": "new"}'""")
        connection.close()
        two._guard.drain()  # type: ignore[union-attr]
        until(lambda: held(one) is MISS)
        assert one.metadata.get_or_load("a", one.agents.get)["metadata"] == {"name": "new"}


class Proxy:
    """Stands between the tracking connections and Redis: `stop` lets no byte through, and closes nothing."""

    def __init__(self, port: int) -> None:
        import socket

        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.open = threading.Event()
        self.open.set()
        self._ends: list[Any] = []
        self._socket = socket
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = self._socket.create_connection(("127.0.0.1", self._port))
            for end, other in ((client, server), (server, client)):
                self._ends.append(end)
                threading.Thread(target=self._forward, args=(end, other), daemon=True).start()

    def _forward(self, end: Any, other: Any) -> None:
        try:
            while came := end.recv(65536):
                self.open.wait()
                other.sendall(came)
        except OSError:
            pass
        finally:
            other.close()

    def close(self) -> None:
        self.open.set()
        self._listener.close()
        for end in self._ends:
            end.close()


class TestFailures:
    @pytest.fixture
    def proxy(self, redis_server: RedisServer) -> Iterator[Proxy]:
        proxy = Proxy(redis_server.port)
        yield proxy
        proxy.close()

    def test_of_a_half_open_connection_nothing_is_valid_after_a_second(
        self, make: Callable[..., GovRedis], proxy: Proxy, two: GovRedis
    ) -> None:
        one = make(redis_url=proxy.url)
        two.metadata.set("a", 1)
        keep(one)
        proxy.open.clear()
        at, valid_until = local.clock(), one._local.until  # type: ignore[union-attr]
        assert valid_until <= at + 1.0
        two.metadata.set("a", 2)
        until(lambda: held(one) is MISS)
        until(lambda: not one.metadata._local.cells)  # type: ignore[union-attr]
        proxy.open.set()
        assert keep(one) == 2

    def test_a_thread_that_stands_still_makes_nothing_valid(
        self, one: GovRedis, two: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two.metadata.set("a", 1)
        keep(one)
        assert one._local is not None
        standing, goes_on = threading.Event(), threading.Event()
        is_current = one._local.is_current

        def stand(tracking: Any) -> bool:
            standing.set()
            goes_on.wait()
            return is_current(tracking)

        monkeypatch.setattr(one._local, "is_current", stand)
        assert standing.wait(PATIENCE)
        two.metadata.set("a", 2)
        until(lambda: held(one) is MISS)
        assert one.metadata.get("a") == 2
        assert held(one) is MISS
        goes_on.set()
        monkeypatch.undo()
        assert keep(one) == 2

    def test_after_a_reconnect_nothing_of_before_is_there(self, one: GovRedis, two: GovRedis, plain_redis: Any) -> None:
        two.metadata.set("a", 1)
        keep(one)
        values = one.metadata._local
        assert values is not None
        place = values.cells["a"]
        plain_redis.client_kill_filter(_type="normal", skipme=True)
        until(lambda: values.cells.get("a") is not place)
        assert keep(one) == 1
        two.metadata.set("a", 2)
        until(lambda: held(one) is MISS)
        assert one.metadata.get("a") == 2

    def test_with_redis_away_all_ends_within_a_second(
        self, make: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        gov = make(redis_url=mortal_redis.url)
        until(lambda: gov.metadata.set("a", 1))
        keep(gov)
        mortal_redis.kill()
        assert gov._local is not None
        assert gov._local.until <= local.clock() + 1.0
        until(lambda: held(gov) is MISS)
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        mortal_redis.start()
        until(lambda: gov.metadata.set("a", 3))
        assert keep(gov) == 3

    def test_under_a_guard_nothing_outlives_it(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, local_cache=True)
        assert gov._local is not None
        assert gov._guard is not None
        gov.metadata.get_or_load("a", lambda _: 1)
        keep(gov)
        gov._guard._threads = False
        gov._guard._again_at = float("inf")  # nobody ticks
        redis = gov._redis
        assert redis is not None
        raw = redis.call("GET", gov._guard.ticker.key)
        epoch, tick, confirmed, at = map(int, raw.split())
        redis.call("SET", gov._guard.ticker.key, f"{epoch} {tick} {confirmed} {at - 60_000_000}")
        until(lambda: gov._local is not None and gov._local.until <= local.clock())
        assert held(gov) is MISS
        gov._guard._again_at = 0.0
        gov._guard._seen = None
        keep(gov)
        redis.call("SET", gov._guard.ticker.key, f"{epoch + 1} {tick} {confirmed} {at}")
        until(lambda: not gov.metadata._local.cells or held(gov) is MISS)  # type: ignore[union-attr]

    def test_a_server_that_forbids_it_is_warned_of_once_and_all_else_works(
        self, make: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, caplog: Any
    ) -> None:
        plain_redis.acl_setuser("plain", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-client"])
        try:
            gov = make(redis_url=redis_server.url.replace("redis://", "redis://plain:secret@"))
            until(lambda: gov.metadata.set("a", 1) and gov.metadata.get("a") == 1)
            until(lambda: "no values are cached in this process" in caplog.text)
            assert gov.metadata.get("a") == 1
            assert held(gov) is MISS
        finally:
            plain_redis.acl_deluser("plain")

    def test_closed_it_keeps_nothing_and_used_again_it_starts_again(self, one: GovRedis) -> None:
        one.metadata.set("a", 1)
        keep(one)
        one.close()
        assert held(one) is MISS
        assert not [t for t in threading.enumerate() if t.name == "govredis-local" and t is one._local._thread]  # type: ignore[union-attr]
        assert keep(one) == 1

    def test_one_forgotten_ends_its_thread(self, redis_server: RedisServer) -> None:
        from govredis import Config

        gov = GovRedis(Config(redis_url=redis_server.url, local_cache=True))
        gov.metadata.set("a", 1)
        keep(gov)
        thread = gov._local._thread  # type: ignore[union-attr]
        assert thread is not None
        gov._redis.close()  # type: ignore[union-attr]
        del gov
        import gc

        gc.collect()
        thread.join(PATIENCE)
        assert not thread.is_alive()


class TestFork:
    def test_a_child_starts_with_nothing_and_its_own_connection(self, one: GovRedis, two: GovRedis) -> None:
        two.metadata.set("a", 1)
        keep(one)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                empty = held(one) is MISS and not one.metadata._local.cells  # type: ignore[union-attr]
                kept = keep(one) == 1
                os.write(writing, b"ok" if empty and kept else b"no")
                until(lambda: held(one) is MISS)
                os.write(writing, b"%d" % one.metadata.get("a"))
            finally:
                os._exit(0)
        assert os.read(reading, 2) == b"ok"
        assert held(one) == 1, "the parent's connection is as it was"
        two.metadata.set("a", 2)
        assert os.read(reading, 1) == b"2"
        os.waitpid(child, 0)
        until(lambda: held(one) is MISS)
        assert keep(one) == 2


class TestRules:
    """What no test can bring about when it wants to."""

    def test_a_value_is_kept_only_from_the_server_that_is_tracked_under_the_same_guard_and_for_its_ttl(
        self, one: GovRedis
    ) -> None:
        tier, kept = one._local, one.metadata._local
        assert tier is not None
        assert kept is not None
        one.metadata.set("a", 1)
        keep(one)
        epoch = -1 if tier.epoch is None else tier.epoch
        under = Seen(epoch, local.clock() + 60, local.clock() + 60, kept.connects)
        for connects, seen in (
            (kept.connects + 1, under),
            *([(kept.connects, Seen(epoch + 1, under.until, under.until, 0))] if tier.guard else []),
        ):
            cell = kept.reserve("x")
            kept.fill(cell, 5, seen, connects, 60)
            assert cell.until == 0.0
        cell = kept.reserve("x")
        kept.fill(cell, 5, under, kept.connects, 60)
        assert local.clock() + 50 < cell.until <= local.clock() + 60

    def test_all_is_valid_for_a_second_from_the_question_and_no_longer_than_the_guard(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        unguarded = make_gov(redis_url=redis_server.url, local_cache=True)._local
        guarded = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, local_cache=True)._local
        assert unguarded is not None
        assert guarded is not None
        unguarded.extend(100.0, None)
        assert unguarded.until == 101.0
        for until_, valid in ((200.0, 101.0), (100.5, 100.5)):
            guarded.extend(100.0, Seen(7, until_, until_, -1))
            assert (guarded.until, guarded.epoch) == (valid, 7)
        guarded.extend(100.0, None)
        assert guarded.until == 0.0


class TestThreads:
    def test_readers_see_no_value_twice_gone(self, one: GovRedis, two: GovRedis) -> None:
        """Eight readers, a writer that counts up, and as few places as make them push each other out."""
        one._local._entries = 4  # type: ignore[union-attr]
        one.metadata._local._entries = 4  # type: ignore[union-attr]
        ids = [f"i{n}" for n in range(6)]
        for identity in ids:
            two.metadata.set(identity, 0)
        ended = threading.Event()
        written = dict.fromkeys(ids, 0)
        errors: list[str] = []

        def read(number: int) -> None:
            last = dict.fromkeys(ids, -1)
            while not ended.is_set():
                for identity in ids[number % 3 :]:
                    # Of a thread's own reads none goes back, but over a read from Redis that is under way.
                    found = one.metadata.get_or_load(identity, lambda i: written[i])
                    if found is None or found < last[identity] - 1:
                        errors.append(f"{identity}: {found} after {last[identity]}")
                    last[identity] = max(found or 0, last[identity])

        threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for count in range(1, 150):
            for identity in ids:
                written[identity] = count
                two.metadata.set(identity, count)
        ended.set()
        for thread in threads:
            thread.join()
        assert not errors, errors[:5]
        assert len(one.metadata._local.cells) <= 4 + 8  # type: ignore[union-attr]
        until(lambda: all(one.metadata.get(i) == 149 for i in ids))
        assert one.metadata.stats()["local_hits"] > 0

    def test_a_write_in_another_process_reaches_the_readers(self, one: GovRedis, redis_server: RedisServer) -> None:
        one.metadata.set("a", 0)
        keep(one)
        code = (
            "import sys; from govredis import Config, GovRedis\n"
            f"g = GovRedis(Config(redis_url={redis_server.url!r}, database_url={one.config.database_url!r}))\n"
            "g.metadata.get_or_load('b', lambda _: 1)\n"
            "for n in range(1, 101): assert g.metadata.set('a', n)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code]) as writer:
            last = 0
            while last < 100:
                found = one.metadata.get("a")
                assert found is not None
                assert found >= last
                last = found
                assert writer.poll() in (None, 0)
