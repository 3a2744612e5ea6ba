"""Locks of an async service on the same keys: seen by all that looks, and freed by force; and ours that it frees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from async_service.blocking import BlockingService
from support import PATIENCE

from govredis import BackendError, GovRedis, LockLost
from govredis.keys import sibling
from govredis.locks import DistributedLock, LockHolder
from govredis.locks import survey as survey_module
from govredis.testing.servers import RedisServer


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url, socket_timeout=5)


@pytest.fixture
def locks(gov: GovRedis) -> DistributedLock:
    return gov.locks


@pytest.fixture
def theirs(async_service: BlockingService) -> Any:
    return async_service.locks


# -- theirs ----------------------------------------------------------------------------------------------------------


def test_theirs_are_seen_and_excluded(locks: DistributedLock, theirs: Any) -> None:
    assert theirs.acquire("x", "worker-1")
    assert locks.is_locked("x")
    assert locks.try_acquire("x") is None
    with locks.acquire("y") as y, locks.semaphore("x", slots=1).acquire() as place:
        holder, semaphore, mine = locks.held()
        assert locks.holder("x") == LockHolder("x", "lock", "worker-1", None, pytest.approx(holder.remaining, abs=5))
        assert (holder.name, holder.kind, holder.owner, holder.token) == ("x", "lock", "worker-1", None)
        assert holder.remaining is not None
        assert 0 < holder.remaining <= 30
        assert (semaphore.kind, semaphore.token) == ("semaphore", place.token)
        assert (mine.name, mine.token) == ("y", y.token)
    assert theirs.release("x", "worker-1")
    assert locks.held() == []
    assert not locks.is_locked("x")


@pytest.mark.parametrize("waited", [False, True])
def test_theirs_are_freed_by_force_for_them_and_for_us(
    locks: DistributedLock, theirs: Any, plain_redis: Any, waited: bool, eventually: Callable[..., Any]
) -> None:
    assert theirs.acquire("x", "worker-1")
    won: list[bool] = []
    thread = threading.Thread(target=lambda: won.append(locks.acquire("x", timeout=20).release()))
    if waited:
        thread.start()
        eventually(lambda: plain_redis.zcard(sibling("lock:x", "queue")) == 1)
    assert locks.force_release("x") is True
    assert theirs.release("x", "worker-1") is False
    if waited:
        thread.join(20)
        assert won == [True]
    assert theirs.acquire("x", "worker-2")
    assert locks.force_release("x") is True
    assert locks.force_release("x") is False


def test_all_of_theirs_are_found_among_many_keys(locks: DistributedLock, theirs: Any, plain_redis: Any) -> None:
    plain_redis.mset({f"other:{n}": n for n in range(5000)})
    for n in range(200):
        theirs.acquire(f"{n:03}", "worker")
    plain_redis.rpush("lock:of another type", "x")
    plain_redis.set(b"lock:\xff\x1b{}", "worker")
    found = locks.held()
    assert [holder.name for holder in found] == [*(f"{n:03}" for n in range(200)), "\\xff\x1b{}"]
    assert found[-1].remaining is None


def test_under_a_prefix_only_its_own(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any
) -> None:
    plain_redis.mset({"lock:x": "no", "a*b:lock:y": "theirs", "aXb:lock:z": "no", "a*b:lock": "no"})
    gov = make_gov(redis_url=redis_server.url, key_prefix="a*b:", socket_timeout=5)
    assert [(holder.name, holder.owner) for holder in gov.locks.held()] == [("y", "theirs")]


# -- health ----------------------------------------------------------------------------------------------------------


def held_by(gov: GovRedis) -> dict[str, Any] | None:
    """As health says. Not what it has said within the last second."""
    gov.health.renew_after_fork()
    return next((dict(check.data) for check in gov.health.check().checks if check.name == "locks"), None)


def test_health_counts_both(gov: GovRedis, theirs: Any, plain_redis: Any, eventually: Callable[..., Any]) -> None:
    assert held_by(gov) is None
    theirs.acquire("x", "worker-1")
    with gov.locks.acquire("y", ttl=60):
        counts = {"held": 1, "outside": 1}
        eventually(lambda: counts.items() <= (held_by(gov) or {}).items())
        plain_redis.zadd("govredis:locks", {"of a lease that has ended": 1})
        assert counts.items() <= (held_by(gov) or {}).items()
    assert held_by(gov) == {"held": 0, "outside": 1}
    theirs.release("x", "worker-1")
    assert held_by(gov) is None


def test_health_looks_at_a_bounded_number_of_keys_and_goes_on_there(
    gov: GovRedis, theirs: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey_module, "_STEPS", 2)
    monkeypatch.setattr(survey_module, "_STEPS_FOR", 60)
    plain_redis.mset({f"other:{n}": n for n in range(9000)})
    for n in range(50):
        theirs.acquire(f"{n}", "worker")
    plain_redis.config_resetstat()
    counts = [gov.locks.count_held()[1] for _ in range(6)]
    assert plain_redis.info("commandstats")["cmdstat_scan"]["calls"] <= 12
    assert counts == sorted(counts), "what was found is counted for as long as it is held"
    assert counts[0] < counts[-1] == 50
    monkeypatch.setattr(survey_module, "_MOST_OUTSIDE", 20)
    assert gov.locks.count_held()[1] == 20


def test_a_glance_shows_what_a_count_has_found_without_a_scan(
    gov: GovRedis, theirs: Any, plain_redis: Any, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.acquire("x", "worker-1")
    with gov.locks.acquire("y", ttl=60) as held, gov.locks.semaphore("z", slots=2).acquire(ttl=60):
        counts = {"held": 2, "outside": 1}
        eventually(lambda: counts.items() <= (held_by(gov) or {}).items())
        plain_redis.config_resetstat()
        x, y, z = gov.locks.glance()
        assert "cmdstat_scan" not in plain_redis.info("commandstats")
        assert [(each.name, each.kind, each.token) for each in (x, y)] == [
            ("x", "lock", None),
            ("y", "lock", held.token),
        ]
        assert (x.owner, z.kind) == ("worker-1", "semaphore")
        monkeypatch.setattr(survey_module, "_MOST_LISTED", 1)
        monkeypatch.setattr(survey_module.renewer, "leases", list)  # as another process has it
        assert len(gov.locks.glance()) == 2
    theirs.release("x", "worker-1")
    assert gov.locks.glance() == []


def test_a_refused_scan_is_reported_and_no_fault(
    gov: GovRedis, make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any
) -> None:
    plain_redis.execute_command("ACL", "SETUSER", "noscan", "on", ">secret", "~*", "+@all", "-scan")
    try:
        url = redis_server.url.replace("redis://", "redis://noscan:secret@")
        refused = make_gov(redis_url=url, socket_timeout=5)
        (check,) = (check for check in refused.health.check().checks if check.name == "locks")
        assert check.status == "pass"
        assert "unknown" in check.output
        assert "scan" in check.output
        with pytest.raises(BackendError, match="scan"):
            refused.locks.held()
        assert refused.locks.is_locked("x") is False
    finally:
        plain_redis.execute_command("ACL", "DELUSER", "noscan")


# -- ours, taken by them ---------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, Callable[[DistributedLock], Any]]] = {
    "lock": ("x", lambda locks: locks.acquire("x", ttl=60)),
    "read": ("{lock:x}:rwlock", lambda locks: locks.rwlock("x").read(ttl=60)),
    "write": ("{lock:x}:rwlock", lambda locks: locks.rwlock("x").write(ttl=60)),
    "semaphore": ("{lock:x}:semaphore", lambda locks: locks.semaphore("x", slots=2).acquire(ttl=60)),
}


@pytest.mark.usefixtures("renewed_soon")
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_an_outsider_deletes_is_lost_by_its_renewal_and_not_restored(
    locks: DistributedLock, theirs: Any, plain_redis: Any, kind: str
) -> None:
    key, take = KINDS[kind]
    held, lost = take(locks), threading.Event()
    held.on_lost(lost.set)
    assert plain_redis.delete(key) if kind != "lock" else theirs.force_release(key)
    assert lost.wait(PATIENCE)
    with pytest.raises(LockLost, match="taken"):
        held.raise_if_lost()
    assert not plain_redis.exists("lock:x" if kind == "lock" else key)
    with pytest.raises(LockLost):
        held.__exit__(None, None, None)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("renewed", [False, True])
def test_before_the_renewal_too_the_release_and_an_extension_say_so(
    locks: DistributedLock, theirs: Any, plain_redis: Any, taken: bool, renewed: bool
) -> None:
    held = locks.acquire("x", ttl=60)
    if renewed:
        held.extend()
    assert theirs.force_release("x")
    if taken:
        assert theirs.acquire("x", "worker-1")
    with pytest.raises(LockLost):
        held.__exit__(None, None, None)
    assert theirs.holder("x") == ("worker-1" if taken else None)
    if not taken:
        held = locks.acquire("x", ttl=60)
        assert theirs.force_release("x")
        with pytest.raises(LockLost):
            held.extend()
        assert not plain_redis.exists("lock:x")
        assert held.release() is False
