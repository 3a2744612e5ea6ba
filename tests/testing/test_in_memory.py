"""GovRedis.in_memory(): every feature over its own Redis in the process."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import pytest
from support import Child, redis_of

from govredis import Config, GovRedis, Limit, LockTimeout
from govredis.client.in_memory import InMemoryRedisClient
from govredis.testing.fixtures import HandClock
from govredis.testing.servers import PostgresServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def memory() -> Iterator[GovRedis]:
    with GovRedis.in_memory() as gov:
        yield gov


def test_every_feature_works(memory: GovRedis) -> None:
    assert [bool(memory.limits.hit("a", "2/hour")) for _ in range(3)] == [True, True, False]
    assert memory.limits.hit("b", Limit(3, 60, algorithm="sliding_window_counter")).remaining == 2
    assert [bool(result) for result in memory.limits.hit_many([("c", "1/hour"), ("c", "1/hour")])] == [True, False]
    started = memory.sessions.start("ada", data={"seat": 1})
    rotated = memory.sessions.rotate(started.session_id)
    assert memory.sessions.for_agent("ada") == [rotated]
    assert memory.sessions.unbind_agent("ada") == 1
    assert memory.metadata.get_or_load("ada", lambda _: {"n": 1}) == memory.metadata.get("ada") == {"n": 1}
    memory.metadata.invalidate("ada")
    assert memory.metadata.get("ada") is None
    with memory.locks.acquire("x", timeout=0), memory.locks.rwlock("y").read(timeout=0):
        assert {held.name for held in memory.locks.held()} == {"x", "y"}
        assert memory.locks.try_acquire("x") is None
    with memory.locks.semaphore("z", slots=2).acquire(timeout=0):
        pass
    assert memory.health.snapshot().stored == "redis"
    assert memory.health.check().status == "pass"


def test_a_lock_is_handed_over_in_real_time(memory: GovRedis) -> None:
    held = memory.locks.acquire("x", timeout=0, ttl=0.3, renew=False)
    with memory.locks.acquire("x", timeout=60) as mine:
        assert mine.token > held.token
    assert not held.release()
    with memory.locks.acquire("x", timeout=0), pytest.raises(LockTimeout):
        memory.locks.acquire("x", timeout=0.1)


def test_nobody_else_sees_its_data(memory: GovRedis) -> None:
    memory.metadata.set("ada", {"n": 1})
    with GovRedis.in_memory() as other:
        assert other.metadata.get("ada") is None

    def in_child() -> None:
        assert memory.metadata.get("ada") == {"n": 1}  # a copy
        memory.metadata.set("ada", {"n": 2})
        memory.close()

    Child(in_child).result()
    assert memory.metadata.get("ada") == {"n": 1}
    assert memory.config.lock_folder is not None
    assert os.path.isdir(memory.config.lock_folder)


def test_its_lock_folder_goes_with_it(tmp_path: Path) -> None:
    closed, forgotten = GovRedis.in_memory(), GovRedis.in_memory()
    folders = [closed.config.lock_folder, forgotten.config.lock_folder]
    for gov in closed, forgotten:
        gov.locks.acquire("x", timeout=0).release()
    closed.close()
    assert [os.path.exists(str(folder)) for folder in folders] == [False, True]
    closed.close()
    del closed, forgotten, gov
    gc.collect()
    assert [os.path.exists(str(folder)) for folder in folders] == [False, False]
    named = str(tmp_path / "locks")
    with GovRedis.in_memory(Config(lock_folder=named)) as gov:
        gov.locks.acquire("x", timeout=0).release()
    assert os.path.isdir(named)


def test_the_settings_hold_and_those_of_redis_do_not_matter() -> None:
    config = Config(
        redis_url="redis://127.0.0.1:1/0",
        redis_enabled=False,
        parking_url="redis://127.0.0.1:1/1",
        local_cache=True,
        key_prefix="app:",
        session_ttl=7,
    )
    with GovRedis.in_memory(config) as gov:
        assert gov.limits.hit("a", "1/hour").backend == "redis"
        assert gov.metadata.get_or_load("a", lambda _: 1) == 1
        assert gov.sessions.start("ada").expires_at is not None
        assert gov.config.session_ttl == 7 and gov.config.redis_enabled and not gov.config.limit_deny_cache
        keys = redis_of(gov).call("KEYS", "*")
        assert keys and all(b"app:" in key for key in keys)
        assert gov.health.check().status == "pass"


def test_postgres_is_used_if_it_is_configured(postgres_server: PostgresServer) -> None:
    with GovRedis.in_memory(Config(database_url=postgres_server.url, postgres_timeout=20)) as gov:
        gov.agents.create("ada", {"n": 1})
        client = redis_of(gov)
        assert isinstance(client, InMemoryRedisClient)
        client.go_away()
        assert gov.limits.hit("a", "1/hour").backend == "postgres"
        client.come_back()
        assert gov.limits.hit("a", "1/hour").backend == "redis"


def test_other_users_of_fakeredis_keep_real_time() -> None:
    with HandClock() as clock, GovRedis.in_memory(clock=clock) as gov:
        clock.tick(1_000_000)
        assert int(redis_of(gov).call("TIME")[0]) == int(clock.time())
        before = time.time()
        seconds, micros = fakeredis.FakeRedis(server=fakeredis.FakeServer()).time()
        assert before - 1 <= seconds + micros / 1e6 <= time.time() + 1
        with GovRedis.in_memory() as real:
            assert int(redis_of(real).call("TIME")[0]) < clock.time() - 900_000


def test_the_clock_leaves_everything_as_it_was() -> None:
    from govredis.locks import acquisition, lease, renewal
    from govredis.metadata import loading, values

    def found() -> list[object]:
        clocks = [lease.clock, renewal.clock, acquisition.clock, lease.renewer, renewal.renewer]  # type: ignore[attr-defined]
        return [*clocks, acquisition.time, loading.time, values.time, loading._random]  # type: ignore[attr-defined]

    before = found()
    with HandClock():
        assert all(now is not then for now, then in zip(found(), before, strict=True))
    assert all(now is then for now, then in zip(found(), before, strict=True))


def test_what_lasts_for_a_tick_is_over_after_it_at_any_fraction_of_a_second() -> None:
    with HandClock() as clock, GovRedis.in_memory(clock=clock) as gov:
        client = redis_of(gov)
        assert isinstance(client, InMemoryRedisClient)
        for n in range(100):
            clock.tick(0.001237 * n)
            lost: list[int] = []
            held = gov.locks.acquire("x", timeout=0, ttl=30, renew=False)
            held.on_lost(lambda lost=lost: lost.append(1))
            session = gov.sessions.start("ada", ttl=30).session_id
            assert gov.limits.hit("ada", "1/30 seconds")
            clock.tick(30)
            assert (held.remaining(), lost, held.release()) == (0, [1], False), n
            assert gov.sessions.get(session) is None, n
            client.go_away()
            assert gov.limits.hit("eve", "1/30 seconds").backend == "local"
            clock.tick(30)
            assert gov.limits.hit("eve", "1/30 seconds"), n
            client.come_back()
            clock.tick(30)


def test_a_tick_is_never_less_than_its_seconds_however_floats_are_rounded() -> None:
    clock = HandClock()
    for n in range(20_000):
        clock.tick(0.001237 * (n % 97))
        before = clock.monotonic()
        clock.tick(0.1 * (n % 300))
        assert clock.monotonic() >= before + 0.1 * (n % 300)


def test_waiting_for_an_element_is_a_sleep_on_the_clock() -> None:
    with HandClock() as clock, GovRedis.in_memory(clock=clock) as gov:
        client, before = redis_of(gov), clock.time()
        client.call("RPUSH", "list", "element")
        assert (client.pop("list", 0.25), clock.time()) == (b"element", before)
        assert client.pop("list", 0.25) is None
        assert clock.time() - before == pytest.approx(0.25)
