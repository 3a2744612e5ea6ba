"""MetadataCache on a living Redis: hits, misses, leases, invalidation, and the reader that is too late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import redis_of

from govredis import GovRedis
from govredis.keys import sibling
from govredis.metadata import renewals
from govredis.testing.servers import RedisServer

KEY = "agent_meta:a"
STAMP, LEASE, TOMBSTONE = (sibling(KEY, name) for name in ("stamp", "lease", "tombstone"))


def sent(plain_redis: Any) -> dict[str, int]:
    """The commands that reached the server since CONFIG RESETSTAT, the asking excepted, and how often."""
    stats = {name.removeprefix("cmdstat_"): found["calls"] for name, found in plain_redis.info("commandstats").items()}
    return {name: n for name, n in stats.items() if not name.startswith(("config", "info", "client", "select"))}


def never(_: Any) -> Any:
    raise AssertionError("not a miss")


VALUES = [
    ({"a": 1, "n": None, "l": [1, [], {}]}, {"a": 1, "n": None, "l": [1, [], {}]}),
    ({}, {}),
    ([], []),
    ((1, (2,)), [1, [2]]),
    ({"t": (1,)}, {"t": [1]}),
    ({1: "x"}, {"1": "x"}),
    ("", ""),
    ("text ü🎉\x00", "text ü🎉\x00"),
    (0, 0),
    (10**30, 10**30),
    (2.5, 2.5),
    (False, False),
    ({"value": 5}, {"value": 5}),
    ({"__govredis__": {"at": 1.0}}, {"__govredis__": {"at": 1.0}}),
]


class TestValues:
    @pytest.mark.parametrize(("value", "back"), VALUES, ids=lambda v: repr(v)[:20])
    def test_hits_and_misses_return_equal_values(self, gov: GovRedis, value: Any, back: Any) -> None:
        cache = gov.metadata
        for found in (
            cache.get_or_load("a", lambda _: value),
            cache.get_or_load("a", never),
            cache.get("a"),
            cache.get_many(["a"], never)["a"],
            cache.get_many(["b"], lambda ids: {"b": value})["b"],
            cache.get("b"),
        ):
            assert found == back
            assert type(found) is type(back)
        assert cache.set("c", value) is True
        assert cache.get("c") == back

    @pytest.mark.parametrize(
        "value",
        [float("nan"), {"a": float("inf")}, {1, 2}, object(), ..., {(1, 2): 3}],
        ids=lambda value: type(value).__name__,
    )
    def test_a_value_that_cannot_be_stored_is_refused(self, gov: GovRedis, plain_redis: Any, value: Any) -> None:
        plain_redis.config_resetstat()
        with pytest.raises(ValueError, match="value"):
            gov.metadata.set("a", value)
        assert sent(plain_redis) == {}
        for call in (
            lambda: gov.metadata.get_or_load("a", lambda _: value),
            lambda: gov.metadata.get_many(["a"], lambda _: {"a": value}),
        ):
            with pytest.raises(ValueError, match="value"):
                call()
        assert not plain_redis.exists(KEY)

    def test_the_result_none_is_refused_by_set_and_never_stored(self, gov: GovRedis, plain_redis: Any) -> None:
        with pytest.raises(ValueError, match="None"):
            gov.metadata.set("a", None)
        assert gov.metadata.get_or_load("a", lambda _: None) is None
        assert gov.metadata.get_many(["a", "b"], lambda _: {"a": None}) == {}
        assert not plain_redis.exists(KEY)
        assert gov.metadata.get_or_load("a", lambda _: 5) == 5, "loaded again"

    def test_the_value_is_its_plain_json_and_nothing_else(self, gov: GovRedis, plain_redis: Any) -> None:
        cache = gov.cache("agent_meta", negative_ttl=60)
        for value, back in VALUES:
            cache.get_or_load("a", lambda _: value)  # noqa: B023
            assert plain_redis.get(KEY) == json.dumps(value)
            assert json.loads(plain_redis.get(KEY)) == back
            with plain_redis.pipeline() as both:
                beside, left = both.pttl(STAMP).pttl(KEY).execute()
            assert 0 < left <= 300_000
            assert abs(beside - left) <= 5
            cache.invalidate("a")
        cache.get_or_load("a", lambda _: None)
        assert not plain_redis.exists(KEY)
        assert 0 < plain_redis.pttl(STAMP) <= 60_000


class TestReading:
    def test_a_hit_is_one_mget(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: 1)
        plain_redis.config_resetstat()
        gov.metadata.get_or_load("a", never)
        assert sent(plain_redis) == {"mget": 1}
        gov.metadata.get("a")
        assert sent(plain_redis) == {"mget": 2}

    def test_the_loader_gets_the_id_and_its_errors_pass(self, gov: GovRedis, plain_redis: Any) -> None:
        seen = []

        def fails(identity: Any) -> Any:
            seen.append(identity)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            gov.metadata.get_or_load("a", fails)
        with pytest.raises(KeyError, match="mine"):
            gov.metadata.get_many(["a", "b"], fails)
        assert seen == ["a", ["a", "b"]]
        assert not plain_redis.exists(KEY)

    def test_get_many_is_one_pipeline_and_one_load(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.set("b", 2)
        calls = []

        def load(ids: list[str]) -> dict[str, int]:
            calls.append(ids)
            return {"a": 1, "d": 4, "unasked": 9}

        trips = []
        round_trip = redis_of(gov)._round_trip
        redis_of(gov)._round_trip = lambda *a, **k: trips.append(a) or round_trip(*a, **k)  # type: ignore[union-attr, method-assign]
        found = gov.metadata.get_many(["d", "b", "a", "c", "a"], load)
        assert found == {"d": 4, "b": 2, "a": 1}
        assert list(found) == ["d", "b", "a"]
        assert calls == [["d", "a", "c"]]
        assert len(trips) <= 4 + 3, "read, leases, fills, leases given back; and three more to load the scripts"
        trips.clear()
        assert gov.metadata.get_many(["a", "b"], never) == {"a": 1, "b": 2}
        assert len(trips) == 1
        assert gov.metadata.get_many([], never) == {}
        assert gov.metadata.get_many(["c", "a"]) == {"a": 1}
        assert not plain_redis.exists("agent_meta:unasked")

    def test_ttls(self, gov: GovRedis, plain_redis: Any) -> None:
        report = gov.cache("report", ttl=60)
        began = time.monotonic()
        report.set("x", 1)
        report.set("y", 1, ttl=50)
        report.get_or_load("z", lambda _: 1, ttl=70)
        report.get_or_load("u", lambda _: 1)
        report.get_many(["v"], lambda _: {"v": 1})
        gov.metadata.set("a", 1)
        report.invalidate("gone")
        found = {
            key: plain_redis.pttl(key) / 1000 for key in plain_redis.keys("*") if not key.startswith("govredis:guard")
        }
        took = time.monotonic() - began + 0.01
        assert all(ttl > 0 for ttl in found.values())
        expected = {"report:x": 60, "report:y": 50, KEY: 300}
        assert all(ttl - took <= found[key] <= ttl for key, ttl in expected.items())
        loaded = {"report:z": 70, "report:u": 60, "report:v": 60}
        assert all(0.9 * ttl - took <= found[key] <= ttl for key, ttl in loaded.items()), "a little shorter"
        assert sibling("report:z", "lease") not in found
        assert found[sibling("report:gone", "tombstone")] <= 10

    def test_namespaces_do_not_meet(self, gov: GovRedis) -> None:
        gov.metadata.set("a", 1)
        assert gov.cache("report").get("a") is None
        for bad in ("session", "lock", "a:b", "", "govredis"):
            with pytest.raises(ValueError, match="namespace"):
                gov.cache(bad)

    def test_stats(self, gov: GovRedis) -> None:
        cache = gov.metadata
        cache.get_or_load("a", lambda _: 1)
        cache.get("a")
        cache.get_many(["a", "b"], lambda _: {"b": 1})
        cache.invalidate("a")
        cache.set("a", 2)
        assert cache.stats() == {
            "hits": 2, "misses": 2, "loads": 2, "fills": 2, "fills_refused": 1, "invalidated": 1,
        }  # fmt: skip

    @pytest.mark.parametrize("bad", ["", "{a}", "a\n", "a" * 513, b"a", None, 5.5], ids=repr)
    def test_bad_ids_are_refused_before_anything_is_sent(self, gov: GovRedis, plain_redis: Any, bad: Any) -> None:
        plain_redis.config_resetstat()
        cache = gov.metadata
        for refused in (
            lambda: cache.get(bad),
            lambda: cache.set(bad, 1),
            lambda: cache.get_or_load(bad, never),
            lambda: cache.get_many(["a", bad], never),
            lambda: cache.invalidate(bad),
        ):
            with pytest.raises(ValueError, match=r"is .*it must be"):
                refused()
        for ttl in (0, -1, "5", float("nan")):
            with pytest.raises(ValueError, match="ttl is"):
                cache.set("a", 1, ttl=ttl)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="ttl is"):
                cache.get_or_load("a", never, ttl=ttl)  # type: ignore[arg-type]
        for version in ("1", 1.0, True):
            with pytest.raises(ValueError, match="version is"):
                cache.invalidate("a", version=version)  # type: ignore[arg-type]
        assert sent(plain_redis) == {}


class TestInvalidation:
    def test_drops_the_value_and_leaves_a_tombstone(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.get_or_load("a", lambda _: 1)
        gov.metadata.invalidate("a", version=7)
        assert gov.metadata.get("a") is None
        assert plain_redis.exists(KEY, STAMP, LEASE) == 0
        assert plain_redis.get(TOMBSTONE) == "7"

    def test_set_is_refused_while_the_tombstone_stands(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.invalidate("a")
        assert gov.metadata.set("a", 1) is False
        assert gov.metadata.get("a") is None
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        assert gov.metadata.get("a") == 2, "a load with a lease taken since is welcome"
        assert 0 < plain_redis.pttl(TOMBSTONE) <= 10_000
        plain_redis.delete(TOMBSTONE)
        assert gov.metadata.set("a", 3) is True

    def test_a_reader_paused_between_loading_and_filling(
        self, gov: GovRedis, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        """A thread per way of reading, each stopped with the old value in its hands."""
        source = {"a": "old"}
        loaded, entered, written = threading.Barrier(3), threading.Event(), threading.Event()

        def load(_: Any) -> str:
            value = source["a"]
            entered.set()
            loaded.wait(20)
            assert written.wait(20)
            return value

        seen: list[Any] = []
        threads = [
            threading.Thread(target=lambda: seen.append(gov.metadata.get_or_load("a", load))),
            threading.Thread(target=lambda: seen.append(gov.metadata.get_many(["a"], lambda _: {"a": load("a")})["a"])),
        ]
        threads[0].start()
        assert entered.wait(20)
        threads[1].start()  # it waits for nobody; the first would wait for it
        loaded.wait(20)
        source["a"] = "new"
        make_gov(redis_url=redis_server.url).metadata.invalidate("a")
        written.set()
        for thread in threads:
            thread.join()
        assert seen == ["old", "old"], "they read before the write"
        assert gov.metadata.get("a") is None, "and stored nothing"
        assert gov.metadata.get_or_load("a", source.get) == "new"
        assert gov.metadata.get("a") == "new"
        assert gov.metadata.stats()["fills_refused"] == 2

    def test_a_process_stopped_between_loading_and_filling(
        self, gov: GovRedis, redis_server: RedisServer, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.write_text("old")
        code = """
import os, signal, sys
from pathlib import Path
from govredis import Config, GovRedis
def load(_):
    value = Path(sys.argv[2]).read_text()
    os.kill(os.getpid(), signal.SIGSTOP)
    return value
print(GovRedis(Config(redis_url=sys.argv[1])).metadata.get_or_load("a", load))
"""
        reader = subprocess.Popen(
            [sys.executable, "-c", code, redis_server.url, str(source)], stdout=subprocess.PIPE, text=True
        )
        try:
            _, status = os.waitpid(reader.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            source.write_text("new")
            gov.metadata.invalidate("a")
            reader.send_signal(signal.SIGCONT)
            assert reader.communicate(timeout=180)[0] == "old\n"
        finally:
            reader.kill()
            reader.communicate()
        assert gov.metadata.get("a") is None
        assert gov.metadata.get_or_load("a", lambda _: source.read_text()) == "new"

    def test_a_fill_after_the_next_readers_is_refused_too(self, gov: GovRedis) -> None:
        """The slow reader's lease is not the one that stands now, though one does."""

        def slow(_: Any) -> str:
            gov.metadata.invalidate("a")
            with ThreadPoolExecutor(1) as next_reader:
                assert next_reader.submit(gov.metadata.get_or_load, "a", lambda _: "new").result() == "new"
            return "old"

        assert gov.metadata.get_or_load("a", slow) == "old"
        assert gov.metadata.get("a") == "new"

    @pytest.mark.parametrize("how", ["expired", "evicted"])
    def test_a_lost_lease_refuses_the_fill(self, gov: GovRedis, plain_redis: Any, how: str) -> None:
        def load(_: Any) -> int:
            if how == "evicted":
                assert plain_redis.delete(LEASE) == 1
            else:
                plain_redis.pexpire(LEASE, 1)
                while plain_redis.exists(LEASE):
                    pass
            return 1

        assert gov.metadata.get_or_load("a", load) == 1
        assert gov.metadata.get("a") is None
        assert gov.metadata.stats()["fills_refused"] == 1

    def test_a_waiter_in_vain_loads_under_the_lease_that_stands(
        self,
        gov: GovRedis,
        make_gov: Callable[..., GovRedis],
        redis_server: RedisServer,
        plain_redis: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(renewals, "EVERY", 1000.0)
        other = make_gov(redis_url=redis_server.url, database_url=gov.config.database_url)
        other.metadata._loads.patience = 0.0

        def load(_: Any) -> int:
            lease = plain_redis.get(LEASE)
            plain_redis.pexpire(LEASE, 20_000)

            def load_too(_: Any) -> int:
                assert plain_redis.get(LEASE) == lease
                assert 0 < plain_redis.pttl(LEASE) <= 20_000, "who waits does not have it stand for longer"
                return 1

            with ThreadPoolExecutor(1) as next_reader:
                assert next_reader.submit(other.metadata.get_or_load, "a", load_too).result() == 1
            assert not plain_redis.exists(LEASE), "nobody is to wait any more"
            return 2

        assert gov.metadata.get_or_load("a", load) == 2
        assert other.metadata.get("a") == 1, "what was loaded last"
        assert [g.metadata.stats().get("fills", 0) for g in (gov, other)] == [0, 1]

    def test_leases_of_parent_and_child_differ(self, gov: GovRedis) -> None:
        before = gov.metadata._backend.new_lease()
        gov.metadata._backend.renew_after_fork()
        assert gov.metadata._backend.new_lease()[:16] != before[:16]

    def test_works_where_redis_has_no_memory_left(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.metadata.set("a", 1)
        plain_redis.config_set("maxmemory", 1)
        try:
            assert gov.metadata.get_or_load("b", lambda _: 2) == 2
            gov.metadata.invalidate("a")
            assert gov.metadata.get("a") is None
        finally:
            plain_redis.config_set("maxmemory", 0)


class TestVersions:
    """Those of AgentRecords: they are of the row itself."""

    @pytest.fixture
    def gov(self, gov: GovRedis) -> GovRedis:
        gov.agents.create("a", {"n": 1})
        return gov

    def test_an_invalidation_keeps_a_value_that_is_as_new(self, gov: GovRedis) -> None:
        record = gov.metadata.get_or_load("a", gov.agents.get)
        gov.metadata.invalidate("a", version=record["version"])
        assert gov.metadata.get("a") == record
        gov.metadata.invalidate("a", version=record["version"] - 1)
        assert gov.metadata.get("a") == record
        gov.metadata.invalidate("a", version=record["version"] + 1)
        assert gov.metadata.get("a") is None

    def test_an_invalidation_without_a_version_keeps_none(self, gov: GovRedis) -> None:
        gov.metadata.get_or_load("a", gov.agents.get)
        gov.metadata.invalidate("a")
        assert gov.metadata.get("a") is None

    def test_the_drain_after_a_write_costs_no_value_that_was_read_since(self, gov: GovRedis) -> None:
        assert gov.internal.freshness is not None
        gov.internal.freshness.drain()
        gov.agents.update_metadata("a", n=2)
        record = gov.metadata.get_or_load("a", gov.agents.get)
        assert gov.internal.freshness.drain() == 1
        assert gov.metadata.get("a") == record

    def test_a_fill_that_is_older_than_the_invalidation_is_refused(self, gov: GovRedis) -> None:
        """It was read from a replica of PostgreSQL that lags, say."""
        lagging = gov.agents.get("a")
        updated = gov.agents.update_metadata("a", n=2)
        assert updated is not None
        assert gov.metadata.get_or_load("a", lambda _: lagging) == lagging
        assert gov.metadata.get("a") is None
        assert gov.metadata.set("a", lagging) is False
        assert gov.metadata.set("a", updated) is True
        assert gov.metadata.get("a") == updated

    def test_the_newest_invalidation_counts_in_whatever_order_they_arrive(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        plain_redis.delete(TOMBSTONE)
        for version in (7, 9, 8):
            gov.metadata.invalidate("a", version=version)
        assert plain_redis.get(TOMBSTONE) == "9"
        gov.metadata.invalidate("a")
        gov.metadata.invalidate("a", version=10**15)
        assert plain_redis.get(TOMBSTONE) == "", "one is not known: nothing may be set for 10 s"
        assert gov.metadata.set("a", gov.agents.get("a")) is False

    @pytest.mark.parametrize(
        "raw",
        [
            '{"version": 999}',
            '{"a": {"__govredis__": {"version": 999}}}',
            '{"a": 1, "__govredis__": {"at": 1.0, "version": 999}}',
        ],
    )
    def test_values_and_versions_of_others_are_no_versions(self, gov: GovRedis, plain_redis: Any, raw: str) -> None:
        gov.metadata.get_or_load("a", gov.agents.get)  # its stamp has a version
        plain_redis.set(KEY, raw)
        gov.metadata.invalidate("a", version=1)
        assert not plain_redis.exists(KEY)
        gov.metadata.get_or_load("a", lambda _: {"agent_id": "a", "metadata": {}, "status": "active", "version": 999})
        gov.metadata.invalidate("a", version=1)
        assert gov.metadata.get("a") is None

    def test_a_delete_invalidates_what_it_deleted(self, gov: GovRedis) -> None:
        gov.metadata.get_or_load("a", gov.agents.get)
        assert gov.agents.delete("a")
        assert gov.metadata.get("a") is None
