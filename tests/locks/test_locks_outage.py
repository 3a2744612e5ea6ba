"""Locks while Redis is killed, hung, restarted, or switched off: the grace, the fallbacks, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, redis_of

from govredis import BackendUnavailable, GovRedis, LockLost, LockTimeout, LockUnavailable
from govredis.keys import sibling
from govredis.locks import DistributedLock, acquisition
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

KEY = "lock:x"


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> DistributedLock:
    return make_gov(redis_url=mortal_redis.url).locks


@pytest.fixture
def away(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> DistributedLock:
    """On a Redis that is killed, which refuses connections at once: no timeout is waited for."""
    return make_gov(redis_url=mortal_redis.url, socket_timeout=10).locks


@pytest.fixture
def long_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has to be done within it, however long the machine stands still."""
    assert acquisition.GRACE == 1
    monkeypatch.setattr(acquisition, "GRACE", 600.0)


def grace_is_over(locks: DistributedLock) -> bool:
    return locks._redis is not None and locks._redis.breaker.away_for() > acquisition.GRACE


def test_no_fallback_before_redis_has_been_away_for_its_grace(
    away: DistributedLock, mortal_redis: RedisServer, long_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = away
    locks.acquire("x").release()
    mortal_redis.kill()
    for timeout in 0, 0.2:
        with pytest.raises(LockUnavailable) as caught:
            locks.acquire("x", timeout=timeout)
        assert isinstance(caught.value, BackendUnavailable)
        assert not isinstance(caught.value, TimeoutError)
    with pytest.raises(LockUnavailable):
        locks.try_acquire("x")
    assert locks._redis
    breaker = locks._redis.breaker
    monkeypatch.setattr(acquisition, "GRACE", breaker.away_for() + 1)
    with locks.acquire("x", timeout=PATIENCE) as held:
        assert breaker.away_for() >= acquisition.GRACE
        assert held.degraded
        assert "degraded" in repr(held)
        # From now on at once.
        with locks.acquire("y", timeout=0) as other:
            assert other.degraded
        assert locks.try_acquire("x") is None
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0.1)
    assert locks.counters.get("locks.degraded_grants") == 2


def vouched_until(worker: Any) -> float:
    return float(worker.eval("held._lease.host_lock._vouched_until"))


@pytest.mark.usefixtures("renewed_soon")
def test_a_degraded_holder_is_alone_on_its_host_also_when_redis_is_back(
    away: DistributedLock, mortal_redis: RedisServer, make_worker: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    locks = away
    worker = make_worker(redis_url=mortal_redis.url, socket_timeout=10)
    worker.run("held = locks.acquire('x', ttl=60)")
    first = worker.eval("(held.token, held.degraded)")
    assert first[1] is False
    assert worker.eval("held.release()") is True
    mortal_redis.kill()
    worker.run(f"held = locks.acquire('x', ttl=60, timeout={PATIENCE})")
    second = worker.eval("(held.token, held.degraded)")
    assert second[1] is True
    with pytest.raises((LockTimeout, LockUnavailable)):
        locks.acquire("x", timeout=0.1)
    eventually(lambda: grace_is_over(locks))
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.5)
    mortal_redis.restart("empty")
    eventually(lambda: locks._redis and locks._redis.breaker.closed)
    with locks.acquire("y") as other:
        assert not other.degraded
    # Redis grants, and the file does not: the degraded one is renewed as well.
    before = vouched_until(worker)
    eventually(lambda: vouched_until(worker) > before)
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.5)
    assert mortal_redis.command("GET", KEY) is None
    assert worker.eval("held.raise_if_lost()") is None
    assert worker.eval("held.degraded") is True, "the mode of a held lock does not change"
    assert worker.eval("held.release()") is True
    third = locks.acquire("x")
    assert not third.degraded
    assert first[0] < second[0] < third.token
    third.release()


def test_with_fail_nobody_gets_it_without_redis(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> None:
    locks = make_gov(redis_url=mortal_redis.url, lock_fallback="fail", socket_timeout=10).locks
    held = locks.acquire("x")
    mortal_redis.kill()
    with pytest.raises(LockUnavailable) as early:
        locks.acquire("y", timeout=0)
    assert "lock files" not in str(early.value), "they do not take over"
    with pytest.raises(LockUnavailable):
        locks.acquire("y", timeout=PATIENCE)
    with pytest.raises(LockUnavailable):
        locks.acquire("y", timeout=0)
    assert held.release() is True
    disabled = make_gov(redis_enabled=False, lock_fallback="fail").locks
    with pytest.raises(LockUnavailable, match="disabled"):
        disabled.acquire("x")


def test_switched_off_it_is_degraded_at_once(
    make_gov: Callable[..., GovRedis], make_worker: Callable[..., Any]
) -> None:
    locks = make_gov(redis_enabled=False).locks
    worker = make_worker(redis_enabled=False)
    tokens = []
    for _ in range(50):
        with locks.acquire("x", timeout=0) as held:
            assert held.degraded
            tokens.append(held.token)
            held.extend(50)
            assert 40 < held.remaining() <= 50
            assert worker.eval("locks.try_acquire('x')") is None
        tokens.append(worker.eval("[h := locks.acquire('x', timeout=0), h.release()] and h.token"))
    assert tokens == sorted(set(tokens))


@pytest.mark.usefixtures("renewed_soon")
def test_a_degraded_lease_is_renewed_and_ends_without(make_gov: Callable[..., GovRedis], eventually: Any) -> None:
    locks = make_gov(redis_enabled=False).locks
    with locks.acquire("x", ttl=60) as held:
        first = held._lease.deadline
        eventually(lambda: held._lease.deadline > first)
        again = held._lease.deadline
        eventually(lambda: held._lease.deadline > again)
    with pytest.raises(LockLost), locks.acquire("x", ttl=0.1, renew=False) as held:
        eventually(lambda: not held.remaining())
        # On this host it is still inside.
        assert locks.try_acquire("x") is None


def test_a_degraded_holder_that_was_stopped_past_its_record_is_lost(make_gov: Callable[..., GovRedis]) -> None:
    locks = make_gov(redis_enabled=False).locks
    held = locks.acquire("x", ttl=60)
    held._lease.host_lock._vouched_until = 0.0  # as if it had been stopped between two lines of its renewal
    with pytest.raises(LockLost):
        held.extend(60)
    held.release()


@pytest.mark.usefixtures("renewed_soon")
def test_renewal_gets_over_an_outage_shorter_than_the_ttl(
    locks: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any]
) -> None:
    with locks.acquire("x", ttl=60) as held:
        mortal_redis.pause()
        eventually(lambda: locks.counters.get("locks.renewals_missed"))
        with pytest.raises(BackendUnavailable):
            held.extend()
        held.raise_if_lost()
        mortal_redis.resume()
        until = held._lease.deadline
        eventually(lambda: held._lease.deadline > until)
    assert mortal_redis.command("GET", KEY) is None


@pytest.mark.usefixtures("renewed_soon")
def test_an_outage_longer_than_the_ttl_loses_it_but_nobody_on_the_host_gets_in(
    away: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any]
) -> None:
    locks = away

    def renews_its_record() -> bool:
        before = held._lease.host_lock._vouched_until  # type: ignore[attr-defined]
        return bool(eventually(lambda: held._lease.host_lock._vouched_until > before))  # type: ignore[attr-defined]

    with pytest.raises(LockLost), locks.acquire("x", ttl=60) as held:
        mortal_redis.kill()
        with pytest.raises(BackendUnavailable):
            held.extend(0.5)  # so that the outage need not last for a minute
        eventually(lambda: held._lease.lost)
        with pytest.raises(LockLost):
            held.raise_if_lost()
        eventually(lambda: grace_is_over(locks))
        assert renews_its_record()
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0.5)
        mortal_redis.restart("empty")
        eventually(lambda: locks._redis and locks._redis.breaker.closed)
        assert renews_its_record()
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0.5)
    assert locks.acquire("x", timeout=0).release()


@pytest.mark.usefixtures("renewed_soon")
def test_an_extension_that_may_yet_shorten_the_lease_shortens_it(
    locks: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire("x", ttl=600)
    mortal_redis.pause()
    with pytest.raises(BackendUnavailable):
        held.extend(60)  # the hung server carries it out when it wakes
    assert held.remaining() <= 60
    mortal_redis.resume()
    eventually(lambda: held.remaining() > 300 or held._lease.lost)
    assert held._lease.lost is None, "and renewal goes on"
    held.release()


def test_a_release_without_redis_is_true_and_carried_out_later(
    locks: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire("x", ttl=1000)
    mortal_redis.pause()
    assert held.release() is True
    assert held.release() is False
    mortal_redis.resume()
    eventually(lambda: mortal_redis.command("GET", KEY) is None)
    eventually(lambda: not locks._backend.pending_releases)
    assert locks.acquire("x", timeout=PATIENCE).release()


@pytest.mark.parametrize("timeout", [0, 0.3])
def test_an_acquire_whose_reply_was_lost_leaves_no_ghost(
    locks: DistributedLock,
    mortal_redis: RedisServer,
    eventually: Callable[..., Any],
    long_grace: None,
    timeout: float,
) -> None:
    locks.acquire("warm").release()
    mortal_redis.pause()
    with pytest.raises(LockUnavailable):
        locks.acquire("x", timeout=timeout, ttl=1000)
    assert locks._backend.pending_releases
    mortal_redis.resume()
    eventually(lambda: not locks._backend.pending_releases)
    # It was carried out, on waking: the fence tells. And undone.
    assert mortal_redis.command("GET", sibling(KEY, "fence"))
    assert mortal_redis.command("GET", KEY) is None
    assert locks.acquire("x", timeout=PATIENCE).release()


def test_a_stalled_acquire_that_fell_back_leaves_no_grant(
    locks: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any]
) -> None:
    locks.acquire("warm").release()
    mortal_redis.pause()
    with locks.acquire("x", timeout=PATIENCE, ttl=1000) as held:
        assert held.degraded
        mortal_redis.resume()
        eventually(lambda: not locks._backend.pending_releases)
        assert mortal_redis.command("GET", sibling(KEY, "fence"))
        assert mortal_redis.command("GET", KEY) is None


def test_a_waiter_gets_over_a_stall_shorter_than_the_grace(
    locks: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any], long_grace: None
) -> None:
    locks.acquire("warm").release()
    mortal_redis.pause()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(locks.acquire, "x", timeout=PATIENCE)
        eventually(lambda: locks._redis and not locks._redis.breaker.closed)
        mortal_redis.resume()
        held = waiting.result(PATIENCE)
    assert not held.degraded
    assert mortal_redis.command("GET", KEY) == held._lease.owner
    assert held.release()
    assert mortal_redis.command("GET", KEY) is None


def test_tokens_rise_over_a_restart_without_data(away: DistributedLock, mortal_redis: RedisServer) -> None:
    locks, tokens = away, []
    for _ in range(3):
        with locks.acquire("x", timeout=PATIENCE) as held:
            tokens.append(held.token)
        mortal_redis.command("SET", sibling(KEY, "fence"), held.token + 10**12)  # no clock will save the next one
        with locks.acquire("x", timeout=PATIENCE) as held:
            tokens.append(held.token)
        mortal_redis.kill()
        with locks.acquire("x", timeout=PATIENCE) as held:
            assert held.degraded
            tokens.append(held.token)
        mortal_redis.restart("empty")
    assert tokens == sorted(set(tokens))


def test_no_two_on_this_host_through_everything_that_befalls_redis(
    make_worker: Callable[..., Any], mortal_redis: RedisServer, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    counter, until = tmp_path / "counter", tmp_path / "until"
    counter.write_text("0 0")
    workers = [make_worker(redis_url=mortal_redis.url) for _ in range(6)]
    for worker in workers:
        worker.begin(f"hammer(locks, {str(counter)!r}, 'x', {str(until)!r})")

    def count() -> int:
        return int(counter.read_text().split()[0])

    def work_goes_on(by: int = 60) -> None:
        goal = count() + by
        eventually(lambda: count() >= goal, 120)

    def on_redis() -> None:
        eventually(lambda: mortal_redis.command("GET", KEY), 120)

    work_goes_on()
    mortal_redis.kill()
    work_goes_on()
    mortal_redis.restart("empty")
    on_redis()
    work_goes_on()
    for _ in range(10):
        mortal_redis.command("FLUSHALL")
        work_goes_on(10)
    for _ in range(2):
        mortal_redis.pause()
        work_goes_on()
        mortal_redis.resume()
        on_redis()
        work_goes_on()
    mortal_redis.kill()
    mortal_redis.restart("empty")  # within the grace
    work_goes_on()
    until.touch()
    tallies = [worker.answer() for worker in workers]
    total = {name: sum(tally[name] for tally in tallies) for name in tallies[0]}
    assert (total["overlaps"], total["stale"]) == (0, 0)
    assert total["done"] == count()


def test_a_full_pool_is_no_outage(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
    gov = make_gov(redis_url=redis_server.url, redis_connections=1, socket_timeout=0.5)
    redis_of(gov).call("PING")
    taken = redis_of(gov)._pool.take(1)
    with pytest.raises(LockUnavailable, match="all 1 connections"):
        gov.locks.acquire("full", timeout=acquisition.GRACE + 0.5)
    redis_of(gov)._pool.give(taken)
    with gov.locks.acquire("full") as held:
        assert not held.degraded
