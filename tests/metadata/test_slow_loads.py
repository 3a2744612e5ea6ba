"""Slow loads: one caller loads for as long as it takes, the others wait, and nobody waits for one that is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stalls import undisturbed
from support import eventually, in_child, in_threads

from govredis import GovRedis
from govredis.keys import sibling
from govredis.metadata import entry_keys, loading, renewals, single_flight
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

KEY = "agent_meta:a"
LEASE = sibling(KEY, "lease")


@pytest.fixture
def other(make_gov: Callable[..., GovRedis], gov: GovRedis) -> GovRedis:
    """Another process, as it were."""
    return make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed twenty times as often."""
    monkeypatch.setattr(renewals, "EVERY", 0.05)


def waits(*govs: GovRedis) -> int:
    return sum(gov.metadata.stats().get("waits", 0) for gov in govs)


class Readers:
    """Threads that read, and what they got."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self._threads: list[threading.Thread] = []

    def read(self, gov: GovRedis, loader: Callable[[str], Any], *, times: int = 1, key: str = "a") -> None:
        def run() -> None:
            try:
                self.got.append(gov.metadata.get_or_load(key, loader))
            except Exception as error:  # noqa: BLE001
                self.got.append(error)

        threads = [threading.Thread(target=run) for _ in range(times)]
        self._threads += threads
        for thread in threads:
            thread.start()

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.got


class Loader:
    """Loads as told; the first call ends when it may. Counts its calls, and how many there were at once."""

    def __init__(self, outcome: Callable[[], Any], first_ends: Callable[[], Any]) -> None:
        self._outcome, self._first_ends = outcome, first_ends
        self._lock = threading.Lock()
        self._at_once = 0
        self.calls = 0
        self.most_at_once = 0

    def __call__(self, _: str) -> Any:
        with self._lock:
            self.calls += 1
            self._at_once += 1
            first, self.most_at_once = self.calls == 1, max(self.most_at_once, self._at_once)
        try:
            if first:
                eventually(self._first_ends)
            time.sleep(0.001)  # another, if it may, comes in
            return self._outcome()
        finally:
            with self._lock:
                self._at_once -= 1


WORKER = """
import sys, threading, time, redis
from govredis import Config, GovRedis
url, database, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
gov = GovRedis(Config(redis_url=url, database_url=database, socket_timeout=10, connect_timeout=10,
                      postgres_timeout=20, metadata_staleness=60))
plain = redis.Redis.from_url(url)
if not seconds:
    from govredis.metadata import entry_keys, renewals
    renewals.EVERY = 0.1
    entry_keys.LEASE_MS = entry_keys._LONGEST_LEASE_MS
def load(_):
    plain.incr("loads")
    if seconds:
        time.sleep(seconds)
    else:  # until all others wait, and the lease was renewed
        while sum(map(int, plain.hvals("waits"))) < 199 or gov.counters.get("leases.renewed") < 9: time.sleep(0.005)
    return {"n": 1}
def read():
    assert gov.metadata.get_or_load("a", load) == {"n": 1}
    plain.incr("read")
gov.metadata.get("warm")
threads = [threading.Thread(target=read) for _ in range(25)]
plain.incr("ready")
while int(plain.get("ready")) < 8: time.sleep(0.005)
for t in threads: t.start()
while any(t.is_alive() for t in threads):
    plain.hset("waits", id(gov) ^ __import__("os").getpid(), gov.metadata.stats().get("waits", 0))
    time.sleep(0.01)
"""


def read_by_two_hundred(gov: GovRedis, plain_redis: Any, seconds: float) -> None:
    gov.metadata.get("warm")  # there is a freshness lease
    command = [sys.executable, "-c", WORKER, gov.config.redis_url, str(gov.config.database_url), str(seconds)]
    processes = [subprocess.Popen(command) for _ in range(8)]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0] * 8
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert plain_redis.get("read") == "200"
    assert plain_redis.get("loads") == "1"


class TestOneLoads:
    def test_two_hundred_threads_in_eight_processes_share_one_load(self, gov: GovRedis, plain_redis: Any) -> None:
        """The load ends when all others wait, and its lease was renewed several times."""
        read_by_two_hundred(gov, plain_redis, 0)

    @pytest.mark.once
    def test_two_hundred_threads_in_eight_processes_share_one_load_for_ten_seconds(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        def attempt() -> None:
            plain_redis.flushall()
            read_by_two_hundred(gov, plain_redis, 10)

        undisturbed(attempt, 0.5)  # a lease stands for 3 s, and is renewed each second

    def test_while_a_load_goes_on_its_lease_does(
        self, gov: GovRedis, other: GovRedis, scaled: None, plain_redis: Any
    ) -> None:
        readers = Readers()

        def renewed() -> bool:
            if waits(gov, other) < 9:
                return False
            assert plain_redis.pexpire(LEASE, 20_000)
            eventually(lambda: plain_redis.pttl(LEASE) > 20_000)
            return True

        loader = Loader(lambda: 5, renewed)
        readers.read(gov, loader)
        eventually(lambda: loader.calls)
        readers.read(gov, loader, times=4)
        readers.read(other, loader, times=5)
        assert readers.join() == [5] * 10
        assert loader.calls == 1

    def test_a_lost_lease_is_not_renewed(self, gov: GovRedis, scaled: None, plain_redis: Any) -> None:
        def load(_: str) -> int:
            plain_redis.set(LEASE, "another's", px=20_000)
            again = gov.internal.caches.renewals.renew  # type: ignore[union-attr]
            looked: list[int] = []
            gov.internal.caches.renewals.renew = lambda: looked.append(1) or again()  # type: ignore[union-attr, method-assign, func-returns-value]
            eventually(lambda: len(looked) > 2)
            assert 0 < plain_redis.pttl(LEASE) <= 20_000
            return 1

        gov.metadata.get_or_load("a", load)
        assert plain_redis.get(LEASE) == "another's"

    def test_a_lease_ends_three_seconds_after_its_process_at_the_latest(
        self, gov: GovRedis, plain_redis: Any, shipped_lease: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(entry_keys, "LEASE_MS", shipped_lease)

        def attempt() -> None:
            found: list[int] = []
            gov.metadata.invalidate("a")
            gov.metadata.get_or_load("a", lambda _: found.append(plain_redis.pttl(LEASE)) or 1)
            gov.metadata.reload("a", lambda _: found.append(plain_redis.pttl(LEASE)) or 1)
            assert all(0 < left <= 3000 for left in found)
            assert len(found) == 2

        undisturbed(attempt, 2)

    def test_a_waiter_for_a_killed_process_loads(self, gov: GovRedis, plain_redis: Any) -> None:
        code = f"""
import time
from govredis import Config, GovRedis
from govredis.metadata import entry_keys
entry_keys.LEASE_MS = entry_keys._LONGEST_LEASE_MS
gov = GovRedis(Config(redis_url={gov.config.redis_url!r}, database_url={gov.config.database_url!r},
                      socket_timeout=10, connect_timeout=10, postgres_timeout=20, metadata_staleness=60))
def load(_):
    print("loading", flush=True)
    time.sleep(600)
gov.metadata.get_or_load("a", load)
"""
        gov.metadata.get("warm")
        readers = Readers()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "loading\n"
            readers.read(gov, lambda _: "mine", times=3)
            eventually(lambda: waits(gov) == 3)
            assert readers.got == []
            process.send_signal(signal.SIGKILL)
        assert plain_redis.pexpire(LEASE, 1), "it has stood until now, and nobody renews it any more"
        assert readers.join() == ["mine"] * 3
        assert gov.metadata.stats()["loads"] == 1

    def test_a_waiter_has_missed_once(self, gov: GovRedis, other: GovRedis) -> None:
        readers = Readers()

        def load(_: str) -> int:
            readers.read(other, lambda _: 0)
            eventually(lambda: waits(other))
            time.sleep(0.1)  # it looks several times
            return 5

        assert gov.metadata.get_or_load("a", load) == 5
        assert readers.join() == [5]
        assert other.metadata.stats()["misses"] == 1

    def test_a_reader_after_an_invalidation_does_not_wait_for_a_load_from_before(self, gov: GovRedis) -> None:
        readers = Readers()

        def slow(_: str) -> str:
            gov.metadata.invalidate("a")
            readers.read(gov, lambda _: "new")
            assert readers.join() == ["new"]
            return "old"

        assert gov.metadata.get_or_load("a", slow) == "old"
        assert gov.metadata.get("a") == "new"

    def test_the_thread_that_renews_ends_when_nothing_is_loaded(self, gov: GovRedis, scaled: None) -> None:
        assert gov.internal.caches.renewals is not None
        assert gov.metadata.get_or_load("a", Loader(lambda: 1, lambda: gov.counters.get("leases.renewed"))) == 1
        eventually(lambda: gov.internal.caches.renewals._thread is None)  # type: ignore[union-attr]
        renewed = gov.counters.get("leases.renewed")
        loader = Loader(lambda: 2, lambda: gov.counters.get("leases.renewed") > renewed)
        assert gov.metadata.get_or_load("b", loader) == 2, "and starts again"

    def test_in_a_forked_child_a_lease_is_renewed_too(self, gov: GovRedis, scaled: None) -> None:
        """The parent is loading meanwhile, and its thread is not the child's."""

        def child() -> object:
            slow = Loader(lambda: 1, lambda: gov.counters.get("leases.renewed"))
            in_threads(lambda: gov.metadata.get_or_load("b", slow))
            return single_flight.loads_of_thread()

        def load(_: str) -> int:
            eventually(lambda: gov.counters.get("leases.renewed"))
            # The child's thread is not loading what its parent's was.
            assert in_child(child) == []
            return 1

        assert gov.metadata.get_or_load("a", load) == 1

    def test_without_redis_away_many_threads_share_two_loads(self, gov: GovRedis) -> None:
        """Where nothing fails to be stored, one: see above. This is where none is found."""
        readers = Readers()
        loader = Loader(lambda: None, lambda: waits(gov) == 9)
        readers.read(gov, loader)
        eventually(lambda: loader.calls)
        readers.read(gov, loader, times=9)
        assert readers.join() == [None] * 10
        assert loader.calls == 2, "the first, and one for all who came meanwhile"
        assert loader.most_at_once == 1

    def test_many_threads_share_two_loads_where_nothing_can_be_stored_too(
        self, make_gov: Callable[..., GovRedis]
    ) -> None:
        gov, readers = make_gov(redis_enabled=False), Readers()
        loader = Loader(lambda: 5, lambda: waits(gov) == 9)
        readers.read(gov, loader)
        eventually(lambda: loader.calls)
        readers.read(gov, loader, times=9)
        assert readers.join() == [5] * 10
        assert (loader.calls, loader.most_at_once) == (2, 1)


class TestTurns:
    def test_after_an_error_those_who_wait_load_one_at_a_time(self, gov: GovRedis, other: GovRedis) -> None:
        """Each of its own, and each gets its own error."""
        readers = Readers()
        numbers = iter(range(100))
        loader = Loader(lambda: {}[next(numbers)], lambda: waits(gov, other) == 9)
        readers.read(gov, loader)
        eventually(lambda: loader.calls)
        readers.read(gov, loader, times=4)
        readers.read(other, loader, times=5)
        errors = readers.join()
        assert Counter(map(type, errors)) == {KeyError: 10}
        assert sorted(error.args[0] for error in errors) == list(range(10))
        assert (loader.calls, loader.most_at_once) == (10, 1)

    def test_the_first_that_succeeds_is_the_last(self, gov: GovRedis, other: GovRedis) -> None:
        readers, outcomes = Readers(), iter([KeyError("mine"), 7])

        def outcome() -> Any:
            found = next(outcomes)
            if isinstance(found, Exception):
                raise found
            return found

        loader = Loader(outcome, lambda: waits(gov, other) == 9)
        readers.read(gov, loader)
        eventually(lambda: loader.calls)
        readers.read(gov, loader, times=4)
        readers.read(other, loader, times=5)
        got = readers.join()
        assert sorted(map(repr, got)) == ["7"] * 9 + ["KeyError('mine')"]
        assert loader.calls == 2


class TestOwn:
    """A loader that asks for what it is to load."""

    @pytest.fixture(params=["stored", "not stored"])
    def own(self, request: pytest.FixtureRequest, gov: GovRedis, make_gov: Callable[..., GovRedis]) -> GovRedis:
        return gov if request.param == "stored" else make_gov(redis_enabled=False)

    def test_directly_is_refused(self, own: GovRedis) -> None:
        with pytest.raises(RecursionError, match=r"^the loader of agent_meta:a asks for what it loads"):
            own.metadata.get_or_load("a", lambda _: own.metadata.get_or_load("a", lambda _: 1))
        assert own.metadata.get_or_load("a", lambda _: 2) == 2, "of this thread nothing is left"

    def test_through_another_is_refused(self, own: GovRedis) -> None:
        def load(identity: str) -> Any:
            return own.metadata.get_or_load({"a": "b", "b": "a"}[identity], load)

        with pytest.raises(RecursionError, match="agent_meta:a -> agent_meta:b -> agent_meta:a"):
            own.metadata.get_or_load("a", load)
        assert own.metadata.get_or_load("b", lambda _: 2) == 2

    def test_in_get_many_is_refused(self, own: GovRedis) -> None:
        with pytest.raises(RecursionError, match="asks for what it loads"):
            own.metadata.get_many(["b", "a"], lambda _: {"a": own.metadata.get_or_load("a", lambda _: 1)})

    def test_through_another_cache_of_the_namespace_is_refused(self, gov: GovRedis, other: GovRedis) -> None:
        for another in (gov.cache("agent_meta", ttl=7), other.metadata):
            with pytest.raises(RecursionError, match="asks for what it loads"):
                gov.metadata.get_or_load("a", lambda _: another.get_or_load("a", lambda _: 1))  # noqa: B023

    def test_the_same_id_of_another_redis_is_another(
        self, gov: GovRedis, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        behind = make_gov(redis_url=mortal_redis.url)
        assert gov.metadata.get_or_load("a", lambda _: behind.metadata.get_or_load("a", lambda _: 3)) == 3

    def test_two_that_need_each_others_do_not_wait_for_ever(
        self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "_NESTED_PATIENCE", 0.05)
        readers, both = Readers(), threading.Barrier(2)

        def load(identity: str) -> Any:
            needed = {"a": "b", "b": "a"}[identity]
            both.wait(60)
            return [identity, gov.metadata.get_or_load(needed, lambda _: f"{needed} for {identity}")]

        readers.read(gov, load, key="a")
        readers.read(gov, load, key="b")
        got = readers.join()
        assert sorted(str(found[0]) for found in got) == ["a", "b"]


class Struck(Exception):
    pass


@pytest.fixture
def strike() -> Iterator[Callable[[int], list[str]]]:
    """Have an exception strike at the nth place where one of a signal could, in the modules that loads go through.

    CPython looks for signals where a function begins and after each call of a C function, `with` on a C lock excepted.
    """
    files = {module.__file__ for module in (single_flight, loading, renewals)}

    def strike(nth: int) -> list[str]:
        left, places = nth, []

        def look(frame: Any, event: str, _: Any) -> None:
            nonlocal left
            if event in ("call", "c_return") and frame.f_code.co_filename in files:
                left -= 1
                if left == 0:
                    sys.setprofile(None)
                    places.append(f"{event} in {frame.f_code.co_name}")
                    raise Struck

        sys.setprofile(look)
        return places

    yield strike
    sys.setprofile(None)


def test_an_exception_anywhere_leaves_nothing_that_keeps_others_from_loading(
    gov: GovRedis, strike: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a signal or a soft time limit leaves a lease, at most, which ends by itself."""
    monkeypatch.setattr(entry_keys, "LEASE_MS", "20")
    assert gov.internal.caches.renewals is not None
    assert gov.metadata.get_or_load("a", lambda _: 1) == 1
    struck, kept = 0, []
    for nth in range(1, 5000):
        gov.metadata.invalidate("a")
        del kept[:-3]
        places = strike(nth)
        try:
            gov.metadata.get_or_load("a", lambda _: 1)
        except Struck as error:
            kept.append(error)  # with its frames: nobody waits for these to go
            struck += 1
        finally:
            sys.setprofile(None)
        if not places:
            break
        assert single_flight.loads_of_thread() == []
        assert not [load for load in gov.internal.caches.renewals._loads if load.is_running()]
        if nth % 10 == 0:
            readers = Readers()
            readers.read(gov, lambda _: 2)
            assert readers.join() in ([1], [2])
    assert struck > 30
