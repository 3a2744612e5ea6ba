"""acquire_for: whoever died on this host while it held a lock for a run is succeeded at once by the same run, and by it
alone; nobody succeeds one that lives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from govredis import BackendUnavailable, GovRedis, HeldLock, LockLost, LockTimeout, LockUnavailable
from govredis.keys import sibling
from govredis.locks import DistributedLock
from govredis.locks.guard import HostGuard, clock
from govredis.locks.renewal import renewer
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

KEY = "lock:x"
FENCE, QUEUE = sibling(KEY, "fence"), sibling(KEY, "queue")


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def others(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    """Of another process on this host."""
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def far(make_gov: Callable[..., GovRedis], redis_server: RedisServer, tmp_path: Path) -> DistributedLock:
    """On another host: with lock files of its own."""
    return make_gov(redis_url=redis_server.url, socket_timeout=5, lock_folder=str(tmp_path / "far")).locks


@pytest.fixture
def holder(make_worker: Callable[..., Any], redis_server: RedisServer) -> Any:
    """A process that holds it for task-1, for long."""
    worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
    worker.run("held = locks.acquire_for('task-1', 'x', ttl=1000)")
    return worker


def die(held: HeldLock) -> None:
    """What a kill -9 leaves of it: the key, and a file that nobody has locked."""
    renewer.discard(held._lease)
    held._lease.over = True
    held._lease.guard.leave()


# -- succeeding ------------------------------------------------------------------------------------------------------


def test_a_killed_run_is_succeeded_at_once_by_itself_alone(
    locks: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    token, before = holder.eval("held.token"), plain_redis.get(KEY)
    holder.kill()
    for call in (
        lambda: locks.acquire("x", timeout=0),
        lambda: locks.acquire_for("task-2", "x"),
        lambda: locks.acquire_for("task-1 ", "x"),
        lambda: locks.acquire_for("", "x"),
    ):
        with pytest.raises(LockTimeout):
            call()
        assert plain_redis.get(KEY) == before
    with locks.acquire_for("task-1", "x", ttl=500) as held:
        assert held.token > token
        assert held.degraded is False
        assert plain_redis.get(KEY) == held._lease.owner
        assert int(plain_redis.get(FENCE)) == held.token
        assert 400_000 < plain_redis.pttl(KEY) <= 500_001
        held.extend(600)
        record = held._lease.guard._read()  # type: ignore[attr-defined]
        assert (record.token, record.owner) == (held.token, held._lease.owner)
        assert locks.try_acquire("x") is None
    assert not plain_redis.exists(KEY)
    assert locks.acquire("x", timeout=0).release()


def test_again_and_again(locks: DistributedLock, holder: Any) -> None:
    tokens = [holder.eval("held.token")]
    holder.kill()
    for _ in range(5):
        held = locks.acquire_for("task-1", "x", ttl=1000)
        tokens.append(held.token)
        die(held)
    assert tokens == sorted(set(tokens))
    locks.acquire_for("task-1", "x").release()


def test_its_name_and_its_run_are_both_its(locks: DistributedLock, holder: Any) -> None:
    holder.run("more = [locks.acquire_for('task-1', 'y', ttl=1000), locks.acquire_for('task-2', 'z', ttl=1000)]")
    holder.kill()
    with pytest.raises(LockTimeout):
        locks.acquire_for("task-1", "z")
    with pytest.raises(LockTimeout):
        locks.acquire_for("task-2", "y")
    with locks.acquire_for("task-1", "x"), locks.acquire_for("task-1", "y"), locks.acquire_for("task-2", "z"):
        pass


def test_one_that_was_killed_while_it_held_it_for_no_run_is_not_succeeded(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer
) -> None:
    worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
    worker.run("held = locks.acquire('x', ttl=1000)")
    worker.kill()
    with pytest.raises(LockTimeout):
        locks.acquire_for("task-1", "x")


def test_before_those_that_wait(
    locks: DistributedLock, others: DistributedLock, holder: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    holder.kill()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(others.acquire, "x", timeout=60)
        eventually(lambda: plain_redis.zcard(QUEUE) == 1)
        with locks.acquire_for("task-1", "x") as held:
            assert plain_redis.get(KEY) == held._lease.owner
            assert not waiting.done()
        assert waiting.result(20).release()


def test_a_normal_end_leaves_nothing_to_succeed_to(locks: DistributedLock, holder: Any, plain_redis: Any) -> None:
    assert holder.eval("held.release()") is True
    token = holder.eval("held.token")
    with locks.acquire("x", timeout=0) as held:
        assert held.token > token
        with pytest.raises(LockTimeout):
            locks.acquire_for("task-1", "x")
    for _ in range(3):
        with locks.acquire_for("task-1", "x") as held:
            assert held.token > token
            token = held.token
    assert locks.acquire_for("task-2", "x").release()
    assert not plain_redis.exists(KEY)


def test_its_end_is_known_without_redis_too(make_gov: Callable[..., GovRedis], make_worker: Callable[..., Any]) -> None:
    worker = make_worker(redis_enabled=False)
    worker.run("held = locks.acquire_for('task-1', 'x')")
    locks = make_gov(redis_enabled=False).locks
    with pytest.raises(LockTimeout):
        locks.acquire_for("task-1", "x")
    token = worker.eval("held.token")
    worker.kill()
    with locks.acquire_for("task-1", "x") as held:
        assert held.degraded
        assert held.token > token


# -- not succeeding --------------------------------------------------------------------------------------------------


def test_one_that_lives_or_stands_still_is_not_succeeded(
    locks: DistributedLock, others: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    before = plain_redis.get(KEY)
    for change in lambda: None, holder.stop:
        change()
        for _ in range(3):
            with pytest.raises(LockTimeout):
                locks.acquire_for("task-1", "x")
        assert plain_redis.get(KEY) == before
    holder.resume()
    assert holder.eval("held.raise_if_lost()") is None
    assert holder.eval("held.release()") is True
    with locks.acquire_for("task-1", "x"), pytest.raises(LockTimeout):
        others.acquire_for("task-1", "x")
    with locks.acquire_for("task-1", "x"), pytest.raises(LockTimeout):
        locks.acquire_for("task-1", "x")  # not even within a process


def test_on_another_host_nobody_can_tell(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    before = plain_redis.get(KEY)
    holder.kill()
    with pytest.raises(LockTimeout):
        far.acquire_for("task-1", "x")
    assert plain_redis.get(KEY) == before
    assert locks.acquire_for("task-1", "x").release()


def test_where_somebody_else_holds_it_in_redis_the_successor_gives_up_and_releases_nothing(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    holder.kill()
    assert far.force_release("x")
    with far.acquire("x", timeout=0) as held:
        for _ in range(3):
            with pytest.raises(LockTimeout):
                locks.acquire_for("task-1", "x")
        held.extend()
        held.raise_if_lost()
        assert plain_redis.get(KEY) == held._lease.owner
    plain_redis.set(KEY, "an outsider")
    with pytest.raises(LockTimeout):
        locks.acquire_for("task-1", "x")
    assert plain_redis.get(KEY) == "an outsider"
    plain_redis.delete(KEY)
    assert locks.acquire_for("task-1", "x").release()
    assert not renewer._leases


@pytest.mark.parametrize("run", ["task-1", "task-2", None])
def test_a_passers_fresh_record_is_honoured(locks: DistributedLock, plain_redis: Any, run: str | None) -> None:
    """Whoever went in past a holder that stood still has no flock when that one dies; he has vouched for himself."""
    stopped = locks.acquire_for("task-1", "x", ttl=0.05)
    renewer.discard(stopped._lease)  # from now on it stands still
    passer = locks._folder.guard(KEY)
    owner = stopped._lease.owner
    mine = "passer" if run is None else locks._arbiter.owner("lock") + owner[-13:] if run == "task-1" else owner + "2"
    deadline = clock() + 20
    while not passer.enter(stopped.token + 1, mine, clock() + 1000, may_pass=True):
        assert clock() < deadline
        time.sleep(0.02)
    plain_redis.set(KEY, mine, px=60_000)
    die(stopped)
    for _ in range(2):
        with pytest.raises(LockTimeout):
            locks.acquire_for("task-1", "x")
        assert passer.refresh(stopped.token + 1, clock() + 1001), "undisturbed"
        assert plain_redis.get(KEY) == mine
    passer.leave()
    plain_redis.delete(KEY)
    assert locks.acquire_for("task-1", "x").release()


def test_what_is_claimed_is_read_once_nobody_else_can_go_in(
    locks: DistributedLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, other = locks._folder.guard(KEY), locks._folder.guard(KEY)
    assert other.enter(1, "first~run", clock() + 1000, may_pass=False)
    other.leave()
    between = [lambda: enter_and_leave(2, "second~another"), lambda: enter_and_leave(3, "third~run")]

    def enter_and_leave(token: int, owner: str) -> None:
        went = locks._folder.guard(KEY)
        assert went.enter(token, owner, clock() + 1000, may_pass=False)
        went.leave()

    really = HostGuard._try_flock

    def flocked(self: HostGuard, *args: Any) -> bool:
        if self is guard and between:
            between.pop(0)()
        return really(self, *args)

    monkeypatch.setattr(HostGuard, "_try_flock", flocked)
    assert guard.claim("~run") is None
    assert between, "that was the second's; and it is free for the third"
    assert guard.claim("~run") is None, "by the record"
    between.pop()()
    assert guard.claim("~run") == "third~run"
    late = locks._folder.guard(KEY)
    assert late.claim("~run") is None
    assert not late.enter(4, "late", clock() + 1000, may_pass=False)
    guard.leave()
    assert late.claim("~run") == "third~run"
    late.leave()


def test_the_script_grants_a_higher_token_to_a_successor_and_the_same_when_it_arrives_again(
    locks: DistributedLock, plain_redis: Any
) -> None:
    resource, arbiter = locks._resource("x"), locks._arbiter
    _, token = arbiter.acquire(resource, "dead", 1000, 0, False)
    assert arbiter.acquire(resource, "new", 1000, 0, False, "another")[0] == 0
    assert arbiter.acquire(resource, "new", 1000, 0, False)[0] == 0
    granted, higher = arbiter.acquire(resource, "new", 1000, 0, False, "dead")
    assert (granted, higher > token) == (1, True)
    assert arbiter.acquire(resource, "new", 1000, 0, False, "dead") == (1, higher)
    assert arbiter.extend(resource, "dead", token, 1000) is False
    assert arbiter.release(resource, "dead", token) is False
    assert plain_redis.get(KEY) == "new"
    assert arbiter.release(resource, "new", higher) is True
    assert arbiter.acquire(resource, "newer", 1000, 0, False, "dead")[0] == 1, "nobody's: nobody is succeeded"
    plain_redis.set(KEY, "")
    assert arbiter.acquire(resource, "newest", 1000, 0, False)[0] == 0, "an outsider with an odd value"


# -- several -----------------------------------------------------------------------------------------------------------


def test_of_two_successors_one_gets_it_and_is_not_disturbed_by_the_other(
    locks: DistributedLock, others: DistributedLock, plain_redis: Any
) -> None:
    start = threading.Barrier(2)

    def succeed(mine: DistributedLock) -> HeldLock | None:
        start.wait(20)
        try:
            return mine.acquire_for("task-1", "x", ttl=1000)
        except LockTimeout:
            return None

    with ThreadPoolExecutor(2) as pool:
        for _ in range(150):
            dead = locks.acquire_for("task-1", "x", ttl=1000)
            die(dead)
            won = [held for held in pool.map(succeed, [locks, others]) if held is not None]
            (held,) = won
            assert held.token > dead.token
            assert plain_redis.get(KEY) == held._lease.owner
            held.extend()
            assert held.release() is True
            assert not plain_redis.exists(KEY)


@pytest.mark.parametrize("evicted", [False, True])
def test_from_the_first_look_on_nobody_else_succeeds(
    locks: DistributedLock,
    others: DistributedLock,
    plain_redis: Any,
    monkeypatch: pytest.MonkeyPatch,
    evicted: bool,
) -> None:
    """The same once more, with the other one between each two steps of the first."""
    plain_redis.set(FENCE, time.time_ns() // 1000 + 10**12)
    dead = locks.acquire_for("task-1", "x", ttl=1000)
    die(dead)
    if evicted:
        plain_redis.delete(FENCE)
    tried: list[str] = []

    def meanwhile(what: str) -> None:
        tried.append(what)
        with pytest.raises(LockTimeout):
            others.acquire_for("task-1", "x")

    acquire, enter = locks._arbiter.acquire, HostGuard.enter

    def asked(*args: Any) -> Any:
        meanwhile("before Redis")
        answer = acquire(*args)
        meanwhile("after Redis")
        return answer

    def entering(self: HostGuard, *args: Any, **options: Any) -> bool:
        patched.undo()
        entered = enter(self, *args, **options)
        meanwhile("inside" if entered else "refused")
        patched.setattr(HostGuard, "enter", entering)
        return entered

    monkeypatch.setattr(locks._arbiter, "acquire", asked)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HostGuard, "enter", entering)
        held = locks.acquire_for("task-1", "x", ttl=1000)
    monkeypatch.undo()
    assert tried[:2] == ["before Redis", "after Redis"]
    assert tried[-1] == "inside"
    assert "refused" not in tried, "the file was free for an instant, in which both could have been refused"
    assert held.token > dead.token
    assert plain_redis.get(KEY) == held._lease.owner
    held.extend()
    assert held.release() is True


def test_what_one_owed_redis_does_not_end_the_next_ones(
    locks: DistributedLock, others: DistributedLock, plain_redis: Any
) -> None:
    """A release that Redis has not answered is carried out when it is back, maybe after the same run began again."""
    assert locks._redis
    held = locks.acquire_for("task-1", "x", ttl=1000)
    locks._redis.breaker.trip("for this test")
    assert held.release() is True, "it is owed"
    (owed,) = locks._arbiter.owed
    with others.acquire_for("task-1", "x", ttl=1000) as again:
        assert others._redis
        others._redis.run(locks._arbiter.release_script, owed[0], *owed[1])
        assert plain_redis.get(KEY) == again._lease.owner
        again.extend()


def test_a_try_that_redis_did_not_answer_leaves_the_next_one_alone(
    locks: DistributedLock, others: DistributedLock, holder: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply was lost: it may have been granted, and is released when Redis is back, when others may be inside."""
    holder.kill()
    acquire = locks._arbiter.acquire

    def unanswered(*args: Any) -> Any:
        acquire(*args)
        assert locks._redis
        locks._redis.breaker.trip("for this test")
        raise BackendUnavailable("timed out") from OSError("timed out")

    monkeypatch.setattr(locks._arbiter, "acquire", unanswered)
    with pytest.raises((LockUnavailable, LockTimeout)):
        locks.acquire_for("task-1", "x", ttl=1000)
    (owed,) = locks._arbiter.owed
    assert others._redis
    others._redis.run(locks._arbiter.release_script, owed[0], *owed[1])
    with others.acquire_for("task-1", "x", ttl=1000) as held:
        others._redis.run(locks._arbiter.release_script, owed[0], *owed[1])
        assert plain_redis.get(KEY) == held._lease.owner
        held.extend()


def test_an_exception_that_strikes_a_successor_leaves_it_to_the_next(
    locks: DistributedLock, others: DistributedLock, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.kill()

    class Struck(BaseException):
        pass

    def struck(*args: Any) -> Any:
        raise Struck

    for name in "acquire", "owner":
        with monkeypatch.context() as patched:
            patched.setattr(locks._arbiter, name, struck)
            with pytest.raises(Struck):
                locks.acquire_for("task-1", "x")
    with pytest.raises(ValueError, match="ttl"):
        locks.acquire_for("task-1", "x", ttl=-1)
    with others.acquire_for("task-1", "x", ttl=1000) as held:
        held.extend()


def test_one_that_was_lost_and_lives_is_not_succeeded_in_its_own_name(
    locks: DistributedLock, others: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire_for("task-1", "x", ttl=1)
    lost = threading.Event()
    held.on_lost(lost.set)
    plain_redis.set(KEY, "another")
    assert lost.wait(20)
    plain_redis.delete(KEY)
    with pytest.raises(LockTimeout):
        others.acquire_for("task-1", "x")
    with pytest.raises(LockLost):
        held.__exit__(None, None, None)
    assert others.acquire_for("task-1", "x").release()
