"""The in-process tier: true to Redis over processes and failures, bounded, and gone by itself when nobody can tell."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from support import PATIENT, Child, Gate, eventually, lease_of, redis_of

from govredis import GovRedis
from govredis.keys import sibling
from govredis.metadata import local
from govredis.metadata.local import MISS
from govredis.outbox import FreshnessSnapshot
from govredis.testing.servers import PostgresServer, RedisServer

PATIENCE = 30.0


def held(gov: GovRedis, identity: str = "a", namespace: str = "") -> Any:
    """The value that the process itself has, MISS where it has no valid one."""
    cache = gov.cache(namespace) if namespace else gov.metadata
    assert cache._local is not None
    return cache._local.get(identity)


def span(gov: GovRedis) -> local.TrackedSpan:
    """The time in which the process hears of all changes; one that is never, where it does not."""
    assert gov.internal.caches.local is not None
    return gov.internal.caches.local.spans.get(redis_of(gov), local._NEVER)


def place(gov: GovRedis, identity: str = "a", namespace: str = "agent_meta") -> Any:
    """Where the process has it, valid or not: a busy machine may make it invalid for a moment."""
    values = gov.cache(namespace)._local
    assert values is not None
    return values.places.get(identity)


def keep(gov: GovRedis, identity: str = "a") -> Any:
    """Read a value until the process has it."""
    found = None

    def is_kept() -> bool:
        nonlocal found
        found = gov.metadata.get(identity)
        return held(gov, identity) is not MISS

    eventually(is_kept, what="the value is kept")
    return found


@pytest.fixture(params=["freshness lease", "no freshness lease"])
def make(
    request: pytest.FixtureRequest, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
) -> Callable[..., GovRedis]:
    """Makes GovRedis objects with the tier; processes, as it were. With PostgreSQL, and without."""
    where = {"database_url": postgres_server.url} if request.param == "freshness lease" else {}
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

        def hits_are_local() -> bool:
            assert keep(one) == {"n": 1}
            plain_redis.config_resetstat()
            hits = one.metadata.stats()["local_hits"]
            read = [one.metadata.get("a"), one.metadata.get_or_load("a", pytest.fail)]
            assert [*read, one.metadata.get_many(["a"])["a"]] == [{"n": 1}] * 3
            stats = plain_redis.info("commandstats")
            asked = stats.get("cmdstat_get", {"calls": 0})["calls"] > stats.get("cmdstat_time", {"calls": 0})["calls"]
            return not asked and one.metadata.stats()["local_hits"] >= hits + 3

        # In a machine that stalls, values are not valid for a moment.
        assert any(hits_are_local() for _ in range(5))
        assert one.metadata.stats()["local_hits"] == one.metadata.stats()["local_hits"]

    def test_off_by_default(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url)
        gov.metadata.get_or_load("a", lambda _: {"n": 1})["n"] = 2
        assert gov.internal.caches.local is None
        assert "local_hits" not in gov.metadata.stats()

    def test_a_value_ends_with_its_ttl(self, one: GovRedis) -> None:
        eventually(lambda: one.metadata.set("a", 1, ttl=0.5) and one.metadata.get("a") == 1 and held(one) is not MISS)
        eventually(lambda: held(one) is MISS)
        eventually(lambda: one.metadata.get("a") is None)

    def test_an_impossible_id_is_refused(self, one: GovRedis) -> None:
        for bad in ("", "{", 5.5, None, [], {}):
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
        eventually(lambda: keep(gov, "a") and all(held(gov, i) is not MISS for i in "bca"))
        keep(gov, "d")
        assert held(gov, "b") is MISS
        assert len(gov.metadata._local.places) == 3  # type: ignore[union-attr]
        gov.metadata.get_many([f"x{n}" for n in range(100)])
        assert len(gov.metadata._local.places) == 3  # type: ignore[union-attr]


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
            eventually(lambda: not plain_redis.exists("agent_meta:a"))

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
            eventually(lambda: two.metadata.set("a", 1))
            keep(one)
            before = place(one)
            change()
            eventually(lambda: place(one) is not before)  # noqa: B023
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

    def test_a_value_that_changes_between_asking_and_answering_is_not_kept(
        self, one: GovRedis, two: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two.metadata.set("a", 1)
        keep(one)
        two.metadata.set("a", 2)
        eventually(lambda: held(one) is MISS)
        records = one.metadata._backend
        usable = records._usable
        places = one.metadata._local.places  # type: ignore[union-attr]

        def change_meanwhile(*args: Any) -> Any:
            found = usable(*args)
            place = places["a"]
            two.metadata.set("a", 3)
            eventually(lambda: places.get("a") is not place)
            return found

        monkeypatch.setattr(records, "_usable", change_meanwhile)
        assert one.metadata.get("a") == 2
        monkeypatch.undo()
        assert held(one) is MISS
        assert keep(one) == 3

    def test_a_negative_result_is_kept_until_it_is_invalidated(
        self, make: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        """It stands in the stamp alone: of the value's own key nothing is told."""
        one, two = (make(redis_url=redis_server.url).cache("agent_meta", negative_ttl=60) for _ in range(2))
        assert two.get_or_load("a", lambda _: None) is None
        values = one._local
        assert values is not None
        eventually(lambda: one.get("a") is None and values.get("a") is None)
        before = values.places["a"]
        two.invalidate("a")
        eventually(lambda: values.places.get("a") is not before)
        assert one.get_or_load("a", lambda _: 1) == 1

    def test_a_lease_of_another_ends_nothing(self, one: GovRedis, two: GovRedis, plain_redis: Any) -> None:
        two.metadata.set("a", 1)
        two.metadata.set("b", 1)
        keep(one)
        before = place(one)
        plain_redis.set(sibling("agent_meta:a", "lease"), "x", px=1000)
        keep(one, "b")
        plain_redis.set("agent_meta:b", 2)
        eventually(lambda: held(one, "b") is MISS, what="the earlier invalidation has come")
        assert place(one) is before

    def test_all_of_a_namespace_are_invalidated_at_once(self, one: GovRedis, two: GovRedis) -> None:
        two.metadata.set("a", 1)
        other = two.cache("other")
        other.set("a", 5)
        eventually(lambda: one.cache("other").get("a") == 5 and held(one, "a", "other") == 5)
        keep(one)
        here, there = place(one), place(one, "a", "other")
        two.metadata.invalidate_all()
        eventually(lambda: place(one) is not here)
        assert one.metadata.get("a") is None, "its generation is asked for at once"
        assert place(one, "a", "other") is there

    def test_another_namespace_is_tracked_too(self, one: GovRedis, two: GovRedis) -> None:
        two.metadata.set("a", 1)
        keep(one)
        late = one.cache("late")
        two.cache("late").set("a", 1)
        eventually(lambda: late.get("a") == 1 and held(one, "a", "late") == 1)
        two.cache("late").set("a", 2)
        eventually(lambda: held(one, "a", "late") is MISS)
        assert late.get("a") == 2

    def test_a_key_prefix_is_part_of_what_is_tracked(
        self, make: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        one, two = (make(redis_url=redis_server.url, key_prefix="p:") for _ in range(2))
        two.metadata.set("a", 1)
        keep(one)
        two.metadata.set("a", 2)
        eventually(lambda: held(one) is MISS)
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
        two.internal.freshness.drain()  # type: ignore[union-attr]
        eventually(lambda: held(one) is MISS)
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

    def test_no_value_is_valid_a_second_after_its_connection_is_half_open(
        self, make: Callable[..., GovRedis], proxy: Proxy, two: GovRedis
    ) -> None:
        one = make(redis_url=proxy.url)
        two.metadata.set("a", 1)
        keep(one)
        proxy.open.clear()
        at, valid_until = local.clock(), span(one).until
        assert valid_until <= at + 1.0
        two.metadata.set("a", 2)
        eventually(lambda: held(one) is MISS)
        eventually(lambda: not one.metadata._local.places)  # type: ignore[union-attr]
        proxy.open.set()
        assert keep(one) == 2

    def test_a_thread_that_stands_still_makes_nothing_valid(
        self, one: GovRedis, two: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two.metadata.set("a", 1)
        keep(one)
        assert one.internal.caches.local is not None
        standing, goes_on = threading.Event(), threading.Event()
        is_current = one.internal.caches.local.is_current

        def stand(node: Any) -> bool:
            standing.set()
            goes_on.wait()
            return is_current(node)

        monkeypatch.setattr(one.internal.caches.local, "is_current", stand)
        assert standing.wait(PATIENCE)
        two.metadata.set("a", 2)
        eventually(lambda: held(one) is MISS)
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
        place = values.places["a"]
        plain_redis.client_kill_filter(_type="normal", skipme=True)
        eventually(lambda: values.places.get("a") is not place)
        assert keep(one) == 1
        two.metadata.set("a", 2)
        eventually(lambda: held(one) is MISS)
        assert one.metadata.get("a") == 2

    def test_with_redis_away_all_ends_within_a_second(
        self, make: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        gov = make(redis_url=mortal_redis.url, **PATIENT)
        eventually(lambda: gov.metadata.set("a", 1))
        keep(gov)
        mortal_redis.kill()
        assert span(gov).until <= local.clock() + 1.0
        eventually(lambda: held(gov) is MISS)
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        mortal_redis.start()
        eventually(lambda: gov.metadata.set("a", 3))
        assert keep(gov) == 3

    def test_no_value_outlives_its_freshness_lease(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, local_cache=True)
        assert gov.internal.caches.local is not None
        assert gov.internal.freshness is not None
        gov.metadata.get_or_load("a", lambda _: 1)
        keep(gov)
        lease_of(gov)._threads = False
        lease_of(gov)._again_at = float("inf")  # no relay runs
        redis = redis_of(gov)
        assert redis is not None
        raw = redis.call("GET", lease_of(gov).relay.key)
        epoch, run, confirmed, at = map(int, raw.split())
        redis.call("SET", lease_of(gov).relay.key, f"{epoch} {run} {confirmed} {at - 60_000_000}")
        eventually(lambda: span(gov).until <= local.clock())
        assert held(gov) is MISS
        lease_of(gov)._again_at = 0.0
        lease_of(gov)._snapshot = None
        keep(gov)
        redis.call("SET", lease_of(gov).relay.key, f"{epoch + 1} {run} {confirmed} {at}")
        eventually(lambda: not gov.metadata._local.places or held(gov) is MISS)  # type: ignore[union-attr]

    def test_a_server_that_forbids_it_is_warned_of_once_and_all_else_works(
        self, make: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, caplog: Any
    ) -> None:
        plain_redis.acl_setuser("plain", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-client"])
        try:
            gov = make(redis_url=redis_server.url.replace("redis://", "redis://plain:secret@"))
            eventually(lambda: gov.metadata.set("a", 1) and gov.metadata.get("a") == 1)
            eventually(lambda: "no values are cached in this process" in caplog.text)
            assert gov.metadata.get("a") == 1
            assert held(gov) is MISS
        finally:
            plain_redis.acl_deluser("plain")

    def test_closed_it_keeps_nothing_and_used_again_it_starts_again(self, one: GovRedis) -> None:
        one.metadata.set("a", 1)
        keep(one)
        one.close()
        assert held(one) is MISS
        assert not [
            t for t in threading.enumerate() if t.name == "govredis-local" and t is one.internal.caches.local._thread
        ]  # type: ignore[union-attr]
        assert keep(one) == 1

    def test_a_forgotten_govredis_ends_its_thread(
        self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It tells the account what it has counted, a second later, and ends."""
        from govredis import Config, _teller

        monkeypatch.setattr(_teller, "INTERVAL", 0.01)
        gov = GovRedis(Config(redis_url=redis_server.url, local_cache=True, **PATIENT))
        gov.metadata.set("a", 1)
        keep(gov)
        thread = gov.internal.caches.local._thread  # type: ignore[union-attr]
        assert thread is not None
        redis_of(gov).close()
        del gov
        import gc

        eventually(lambda: gc.collect() is not None and not thread.is_alive())


class TestFork:
    def test_a_child_starts_with_nothing_and_its_own_connection(self, one: GovRedis, two: GovRedis) -> None:
        two.metadata.set("a", 1)
        keep(one)
        kept = Gate()

        def work() -> object:
            assert held(one) is MISS
            assert not one.metadata._local.places  # type: ignore[union-attr]
            assert keep(one) == 1
            kept.open()
            eventually(lambda: held(one) is MISS)
            return one.metadata.get("a")

        child = Child(work)
        kept.wait()
        # After a stall no value is valid until the thread has asked again. Nobody reads it from Redis here.
        eventually(lambda: held(one) == 1, what="the parent's connection is as it was")
        two.metadata.set("a", 2)
        assert child.result() == 2
        eventually(lambda: held(one) is MISS)
        assert keep(one) == 2


class TestRules:
    """Rules for events that no test can bring about when it wants to."""

    def test_a_value_is_kept_only_from_the_server_that_is_tracked_under_the_same_lease_and_for_its_ttl(
        self, one: GovRedis
    ) -> None:
        tier, kept = one.internal.caches.local, one.metadata._local
        assert tier is not None
        assert kept is not None
        one.metadata.set("a", 1)
        keep(one)
        node, spanned = redis_of(one), span(one)
        epoch = -1 if spanned.epoch is None else spanned.epoch
        under = FreshnessSnapshot(None, epoch, local.clock() + 60, local.clock() + 60, spanned.connects)
        later = FreshnessSnapshot(None, epoch + 1, under.until, under.until, 0)
        for connects, seen in (
            (spanned.connects + 1, under),
            *([(spanned.connects, later)] if tier.freshness else []),
        ):
            place = kept.reserve("x")
            kept.fill(place, 5, node, seen, connects, 60)
            assert place.until == 0.0
        place = kept.reserve("x")
        kept.fill(place, 5, node, under, spanned.connects, 60)
        assert local.clock() + 50 < place.until <= local.clock() + 60

    def test_a_value_whose_node_was_not_tracked_yet_when_its_place_was_made_is_not_kept(self, one: GovRedis) -> None:
        tier, kept, node = one.internal.caches.local, one.metadata._local, redis_of(one)
        assert tier is not None
        assert kept is not None
        one.metadata.set("a", 1)
        keep(one)
        epoch = -1 if span(one).epoch is None else span(one).epoch
        under = FreshnessSnapshot(None, epoch, local.clock() + 60, local.clock() + 60, span(one).connects)
        place = kept.reserve("x")
        tier.spans = {node: local.TrackedSpan(frozenset({kept}), span(one).connects, span(one).epoch)}
        tier.spans[node].until = local.clock() + 60
        kept.fill(place, 5, node, under, span(one).connects, 60)
        assert place.span is not tier.spans[node]

    def test_all_is_valid_for_a_second_from_the_question_and_no_longer_than_the_lease(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, local_cache=True)
        without_lease, node = gov.internal.caches.local, redis_of(gov)
        with_lease = make_gov(
            redis_url=redis_server.url, database_url=postgres_server.url, local_cache=True
        ).internal.caches.local
        assert without_lease is not None
        assert with_lease is not None
        for tier in (without_lease, with_lease):
            tier.spans = {node: local.TrackedSpan(frozenset(), 0)}
        without_lease.extend(node, without_lease.spans[node], 100.0, None)
        assert without_lease.spans[node].until == 101.0
        for until_, valid in ((200.0, 101.0), (100.5, 100.5)):
            with_lease.extend(node, with_lease.spans[node], 100.0, FreshnessSnapshot(None, 7, until_, until_, -1))
            assert (with_lease.spans[node].until, with_lease.spans[node].epoch) == (valid, 7)
        with_lease.extend(node, with_lease.spans[node], 100.0, None)
        assert with_lease.spans[node].until == 0.0


class TestThreads:
    def test_readers_see_no_value_twice_gone(self, one: GovRedis, two: GovRedis) -> None:
        """Eight readers, a writer that counts up, and as few places as make them push each other out."""
        one.internal.caches.local._entries = 4  # type: ignore[union-attr]
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
                    # A thread's own reads never go back, but over a read from Redis that is under way.
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
        assert len(one.metadata._local.places) <= 4 + 8  # type: ignore[union-attr]
        eventually(lambda: all(one.metadata.get(i) == 149 for i in ids))
        assert one.metadata.stats()["local_hits"] > 0

    def test_a_write_in_another_process_reaches_the_readers(self, one: GovRedis, redis_server: RedisServer) -> None:
        one.metadata.set("a", 0)
        keep(one)
        code = (
            "import sys; from govredis import Config, GovRedis\n"
            f"where = dict(redis_url={redis_server.url!r}, database_url={one.config.database_url!r}, **{PATIENT})\n"
            "g = GovRedis(Config(**where))\n"
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
