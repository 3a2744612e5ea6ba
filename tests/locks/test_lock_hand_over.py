"""A handed-over lock is entered at once; Redis makes it a lease meanwhile, and its reply is taken in later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stalls import undisturbed
from support import PATIENCE

from govredis import BackendUnavailable, GovRedis, HeldLock, LockLost
from govredis.client import Pending, RedisNode, pack_command
from govredis.keys import sibling
from govredis.locks import DistributedLock, acquisition
from govredis.locks import lease as lease_module
from govredis.testing.servers import RedisServer

KEY = "lock:x"
FENCE, QUEUE = sibling(KEY, "fence"), sibling(KEY, "queue")


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.fixture
def waiting(
    locks: DistributedLock, pool: ThreadPoolExecutor, plain_redis: Any, eventually: Callable[..., Any]
) -> Callable[..., Future[HeldLock]]:
    """Another thread that waits for the lock, once it does."""

    def wait(**options: Any) -> Future[HeldLock]:
        future = pool.submit(lambda: locks.acquire("x", **{"timeout": PATIENCE, **options}))
        eventually(lambda: plain_redis.zcard(QUEUE) == 1)
        return future

    return wait


def replies(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """Has it logged when the reply to a confirmation is taken, and when a script is run."""
    reply, run = Pending.reply, RedisNode.run

    def replied(self: Pending) -> Any:
        log.append("confirmed")
        return reply(self)

    def ran(self: RedisNode, *args: Any) -> Any:
        log.append("ran")
        return run(self, *args)

    monkeypatch.setattr(Pending, "reply", replied)
    monkeypatch.setattr(RedisNode, "run", ran)


def test_a_handed_over_lock_is_entered_without_redis_and_its_reply_is_taken_in_first(
    locks: DistributedLock, waiting: Any, monkeypatch: pytest.MonkeyPatch, plain_redis: Any
) -> None:
    monkeypatch.setattr(lease_module, "FIRST_DUE", 1000)
    held = locks.acquire("x")
    future = waiting(ttl=60)
    log: list[str] = []
    replies(monkeypatch, log)
    held.release()
    mine = future.result(PATIENCE)
    seen = log.count("ran")
    assert log == ["ran"] * seen, "the release; and waiters that woke up meanwhile to show that they live"
    assert mine.token == int(plain_redis.get(FENCE))
    assert mine.token > held.token
    assert mine.release()
    assert log[seen:] == ["confirmed", "ran"]
    assert not plain_redis.exists(KEY)


@pytest.mark.parametrize("renew", [True, False])
def test_confirmed_it_has_its_own_ttl(
    locks: DistributedLock, waiting: Any, plain_redis: Any, renew: bool, eventually: Any
) -> None:
    held = locks.acquire("x")
    future = waiting(ttl=1000, renew=renew)
    held.release()
    with future.result(PATIENCE) as mine:
        eventually(lambda: plain_redis.pttl(KEY) > 900_000)
        assert 900 < mine.remaining() <= 1000
        mine.raise_if_lost()


def test_a_script_flush_between_costs_a_renewal(locks: DistributedLock, waiting: Any, plain_redis: Any) -> None:
    def attempt() -> None:
        held = locks.acquire("x")
        future = waiting(ttl=1000)
        release = locks._backend.release_script
        plain_redis.script_flush()
        plain_redis.script_load(release.source)
        held.release()
        with future.result(PATIENCE) as mine:
            lost = threading.Event()
            mine.on_lost(lost.set)
            assert not lost.wait(1.2), "the hand-over alone is good for a second"
            assert plain_redis.get(KEY) == mine._lease.owner
            assert mine.remaining() > 900

    undisturbed(attempt, 0.3)


def test_a_hand_over_that_redis_does_not_confirm_is_lost_within_the_second(
    locks: DistributedLock, waiting: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locks._redis
    send = locks._redis.send

    def taken_away(packed: bytes) -> Pending:
        plain_redis.set(KEY, "forced")
        return send(packed)

    monkeypatch.setattr(locks._redis, "send", taken_away)
    held = locks.acquire("x")
    future = waiting(ttl=1000)
    held.release()
    mine = future.result(PATIENCE)
    lost = threading.Event()
    mine.on_lost(lost.set)
    assert mine.remaining() <= 1
    assert lost.wait(PATIENCE)
    with pytest.raises(LockLost):
        mine.raise_if_lost()
    assert mine.release() is False
    assert plain_redis.get(KEY) == "forced"
    assert not plain_redis.zcard(QUEUE), "it did not queue up again"


def test_a_confirmation_that_comes_after_somebody_else_had_it_grants_nothing_anew(
    locks: DistributedLock,
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    tmp_path: Path,
    waiting: Any,
    plain_redis: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = make_gov(redis_url=redis_server.url, socket_timeout=5, lock_folder=str(tmp_path / "elsewhere")).locks
    assert locks._redis
    send, theirs = locks._redis.send, []

    def late(packed: bytes) -> Pending:
        plain_redis.delete(KEY)  # the second was over
        with elsewhere.acquire("x", timeout=0) as held:
            theirs.append(held.token)
        return send(packed)

    monkeypatch.setattr(locks._redis, "send", late)
    held = locks.acquire("x")
    future = waiting(ttl=1000)
    held.release()
    mine = future.result(PATIENCE)
    assert mine.token < theirs[0]
    lost = threading.Event()
    mine.on_lost(lost.set)
    assert lost.wait(PATIENCE)
    assert mine.release() is False
    assert not plain_redis.exists(KEY)


def test_a_hand_over_that_cannot_be_confirmed_is_asked_for(
    locks: DistributedLock, waiting: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locks._redis

    def cut(packed: bytes) -> Pending:
        raise BackendUnavailable("cut")

    monkeypatch.setattr(locks._redis, "send", cut)
    held = locks.acquire("x")
    future = waiting(ttl=1000)
    held.release()
    with future.result(PATIENCE) as mine:
        assert plain_redis.pttl(KEY) > 900_000
        assert mine.remaining() > 900


def test_a_waiter_that_wakes_up_late_asks_whether_the_lock_is_still_its(
    locks: DistributedLock, waiting: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locks._redis
    late, sent = 0.0, []
    real, pop, send = acquisition.clock, locks._redis.pop, locks._redis.send

    def popped(key: str, seconds: float) -> Any:
        nonlocal late
        token = pop(key, seconds)
        late = 0.6 if token is not None else 0.0
        return token

    def sending(packed: bytes) -> Pending:
        sent.append(packed)
        return send(packed)

    monkeypatch.setattr(acquisition, "clock", lambda: real() + late)
    monkeypatch.setattr(locks._redis, "pop", popped)
    monkeypatch.setattr(locks._redis, "send", sending)
    held = locks.acquire("x")
    future = waiting(ttl=1000)
    held.release()
    with future.result(PATIENCE) as mine:
        assert sent == []
        assert plain_redis.get(KEY) == mine._lease.owner
        assert plain_redis.pttl(KEY) > 900_000


def test_a_reply_is_taken_once(locks: DistributedLock) -> None:
    assert locks._redis
    locks._redis.pop("nothing", 0.01)  # its connection is there
    pending = locks._redis.send(pack_command(("PING",)))
    assert pending.reply() == b"PONG"
    with pytest.raises(BackendUnavailable, match="taken before"):
        pending.reply()
    assert len(locks._redis._waiting.idle) == 1


def test_a_token_left_from_an_earlier_turn_wakes_nobody(locks: DistributedLock, plain_redis: Any) -> None:
    assert locks._redis
    keys = KEY, FENCE, QUEUE, sibling(KEY, "waiters"), f"{QUEUE}:me"
    plain_redis.set(KEY, "another")
    plain_redis.rpush(f"{QUEUE}:me", 1)
    locks._redis.run(locks._backend.acquire_script, keys, "me", "1000", "0", "1000", "1")
    assert plain_redis.zrange(QUEUE, 0, -1) == ["me"]
    assert not plain_redis.exists(f"{QUEUE}:me")
