"""GOVREDIS_CONFIRM: a lock is granted once a replica has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE

from govredis import Config, ConfigurationError, GovRedis, HeldLock, LockTimeout, LockUnavailable
from govredis._acl import rights
from govredis.locks import DistributedLock, acquisition
from govredis.testing.servers import RedisCluster, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]

KINDS: dict[str, Callable[..., HeldLock]] = {
    "lock": lambda locks, **options: locks.acquire("x", **options),
    "write": lambda locks, **options: locks.rwlock("x").write(**options),
    "semaphore": lambda locks, **options: locks.semaphore("x", slots=1).acquire(**options),
}


@pytest.fixture(scope="module")
def pair(redis_binary: str) -> Iterator[tuple[RedisServer, RedisServer]]:
    with RedisServer(binary=redis_binary) as primary, RedisServer(binary=redis_binary) as replica:
        replica.command("REPLICAOF", "127.0.0.1", primary.port)
        yield primary, replica


@pytest.fixture
def primary(pair: tuple[RedisServer, RedisServer], replica: RedisServer) -> RedisServer:
    pair[0].command("FLUSHALL")
    return pair[0]


@pytest.fixture
def replica(pair: tuple[RedisServer, RedisServer], eventually: Callable[..., Any]) -> Iterator[RedisServer]:
    """It is in step."""
    primary, replica = pair

    def is_in_step() -> bool:
        primary.command("SET", "in step", "1")
        return bool(primary.command("INFO", "replication").get("connected_slaves")) and "in step" in set(
            replica.command("KEYS", "in step")
        )

    eventually(is_in_step)
    yield replica
    replica.resume()


@pytest.fixture
def locks(make_gov: MakeGov, primary: RedisServer, monkeypatch: pytest.MonkeyPatch) -> DistributedLock:
    """However long the machine stands still, that is no outage."""
    monkeypatch.setattr(acquisition, "GRACE", 600.0)
    return make_gov(redis_url=primary.url, confirm=True, socket_timeout=2).locks


@pytest.fixture
def far(make_gov: MakeGov, primary: RedisServer, tmp_path: Path) -> DistributedLock:
    """On another host, and without confirmations."""
    return make_gov(redis_url=primary.url, socket_timeout=2, lock_folder=str(tmp_path / "far")).locks


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_has_each_lock_that_is_granted(locks: DistributedLock, replica: RedisServer, kind: str) -> None:
    for _ in range(20):
        with KINDS[kind](locks) as held:
            assert replica.command("EXISTS", *held._lease._resource.keys[:2]) == 2
    assert locks.counters.get("locks.unconfirmed") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_grant_that_no_replica_has_is_taken_back(
    locks: DistributedLock, far: DistributedLock, replica: RedisServer, monkeypatch: pytest.MonkeyPatch, kind: str,
    eventually: Callable[..., Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(acquisition, "GRACE", 0.0)
    replica.pause()
    with pytest.raises(LockUnavailable, match="no replica has confirmed the grant in time"):
        KINDS[kind](locks, timeout=0)
    assert locks.counters.get("locks.unconfirmed") == 1
    assert locks._redis is not None
    assert locks._redis.away_for("lock:x") == 0, "that is no outage"
    with KINDS[kind](far, timeout=0) as held:
        assert not held.degraded, "it is free"
        with pytest.raises(LockTimeout):
            KINDS[kind](locks, timeout=0)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(KINDS[kind], locks, timeout=PATIENCE)
        eventually(lambda: locks.counters.get("locks.unconfirmed") > 1)
        with KINDS[kind](far, timeout=PATIENCE):
            assert not waits.done()
        replica.resume()
        assert waits.result(PATIENCE).release() is True


@pytest.mark.parametrize("kind", KINDS)
def test_so_is_a_lock_that_was_handed_over(
    locks: DistributedLock, far: DistributedLock, primary: RedisServer, replica: RedisServer, kind: str,
    eventually: Callable[..., Any],
) -> None:  # fmt: skip
    held = KINDS[kind](far)
    queue = held._lease._resource.keys[2]
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(KINDS[kind], locks, timeout=PATIENCE)
        eventually(lambda: primary.command("ZCARD", queue))
        replica.pause()
        assert held.release() is True
        eventually(lambda: locks.counters.get("locks.unconfirmed"))
        assert not waits.done()
        replica.resume()
        assert waits.result(PATIENCE).release() is True


def test_without_any_replica_no_lock_is_granted(make_gov: MakeGov, mortal_redis: RedisServer) -> None:
    locks = make_gov(redis_url=mortal_redis.url, confirm=True, socket_timeout=2).locks
    with pytest.raises(LockUnavailable, match="no replica"):
        locks.acquire("x", timeout=0)


def test_it_takes_one_round_trip_and_another_after_a_script_flush(
    locks: DistributedLock, primary: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary.command("SCRIPT", "FLUSH")
    locks.acquire("x").release()
    made: list[int] = []
    redis: Any = locks._redis
    really = redis._round_trip
    monkeypatch.setattr(redis, "_round_trip", lambda *args, **options: made.append(1) or really(*args, **options))
    with locks.acquire("x"):
        assert len(made) == 1


def test_on_a_cluster(make_gov: MakeGov, redis_binary: str) -> None:
    with RedisCluster(binary=redis_binary, config=["cluster-node-timeout 60000"]) as cluster:
        locks = make_gov(redis_url=cluster.url, confirm=True, socket_timeout=2).locks
        for name in "a", "b", "c", "d":
            with locks.acquire(name, timeout=PATIENCE):
                (replica,) = cluster.replicas_of(cluster.master_of(f"lock:{name}"))
                assert replica.command("KEYS", f"lock:{name}") == [f"lock:{name}"]
        (replica,) = cluster.replicas_of(cluster.master_of("lock:a"))
        replica.pause()
        with pytest.raises(LockUnavailable, match="no replica"):
            locks.acquire("a", timeout=0)
        other = next(name for name in "bcd" if cluster.master_of(f"lock:{name}") is not cluster.master_of("lock:a"))
        assert locks.acquire(other, timeout=PATIENCE).release() is True
        replica.resume()


def test_a_redis_in_memory_has_nothing_to_lose() -> None:
    pytest.importorskip("fakeredis")
    with GovRedis.in_memory(Config(confirm=True)) as gov:
        assert gov.locks.acquire("x", timeout=0).release() is True


def test_a_timeout_in_which_redis_may_not_have_answered_is_refused() -> None:
    said = "GOVREDIS_SOCKET_TIMEOUT is 0.1 and GOVREDIS_CONFIRM is 1; the timeout must be 0.15 at least"
    for settings in {"socket_timeout": 0.1}, {"redis_url": "redis://h?socket_timeout=0.1"}:
        with pytest.raises(ConfigurationError, match=said):
            Config(confirm=True, **settings)  # type: ignore[arg-type]
        Config(**settings)  # type: ignore[arg-type]


def test_the_acl_has_the_command_where_it_is_sent() -> None:
    assert "wait" in rights(Config(confirm=True), ["locks"]).commands
    assert "wait" not in rights(Config(), ["locks"]).commands
