"""DistributedLock and HeldLock on a living Redis: what their docstrings promise."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout  # not the built-in one before Python 3.11
from typing import Any

import pytest
import redis as redis_py
from cluster_service import ClusterService
from support import OF_SENTINELS, PATIENCE

from govredis import BackendError, GovRedis, HeldLock, LockLost, LockTimeout, LockUnavailable
from govredis.keys import sibling
from govredis.locks import DistributedLock, renewal
from govredis.testing.servers import RedisServer

KEY = "lock:x"
FENCE = sibling(KEY, "fence")


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url).locks


def threads() -> list[threading.Thread]:
    # A thread that is listed and not alive was struck while it started, in another file's tests: it never runs.
    return [t for t in threading.enumerate() if t.name == "govredis-renewal" and t.is_alive()]


# -- acquire, release ------------------------------------------------------------------------------------------------


def test_one_holder_at_a_time(locks: DistributedLock, plain_redis: Any) -> None:
    held = locks.acquire("x")
    assert plain_redis.get(KEY) == held._lease.owner
    assert locks.try_acquire("x") is None
    other = locks.try_acquire("y")
    assert other
    assert held.release() is True
    again = locks.try_acquire("x")
    assert again
    assert (again.name, again.degraded, again.token > held.token) == ("x", False, True)
    assert again.release()
    assert other.release()
    assert not plain_redis.exists(KEY)


def test_release_is_idempotent_and_the_owners_only(locks: DistributedLock, plain_redis: Any) -> None:
    held = locks.acquire("x")
    assert held.release() is True
    assert held.release() is False
    later = locks.acquire("x")
    assert held.release() is False
    assert plain_redis.get(KEY) == later._lease.owner
    # Not even with the key in somebody else's hands does it delete what is not its own.
    plain_redis.set(KEY, "somebody else", px=5000)
    assert later.release() is False
    assert plain_redis.get(KEY) == "somebody else"


def test_every_key_has_a_ttl(locks: DistributedLock, plain_redis: Any, not_listed: None) -> None:
    def ttls() -> dict[str, int]:
        return {key: plain_redis.pttl(key) for key in plain_redis.keys("*")}

    held = locks.acquire("x", ttl=20)
    assert set(ttls()) == {KEY, FENCE}
    assert 15_000 < ttls()[KEY] <= 20_001
    assert 3_600_000 < ttls()[FENCE] <= 3_620_001
    held.extend(40)
    assert 35_000 < ttls()[KEY] <= 40_001
    assert 3_620_001 < ttls()[FENCE] <= 3_640_001
    held.release()
    assert list(ttls()) == [FENCE]
    assert 0 < ttls()[FENCE] <= 3_600_000


def test_the_default_ttl_is_the_setting(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any
) -> None:
    with make_gov(redis_url=redis_server.url, lock_ttl=7).locks.acquire("x") as held:
        assert 5 < held.remaining() <= 7
        assert 5000 < plain_redis.pttl(KEY) <= 7001


def test_redis_never_forgets_before_the_holder_does(
    locks: DistributedLock, redis_server: RedisServer, plain_redis: Any
) -> None:
    if isinstance(redis_server, ClusterService):
        pytest.skip("asks one server for time and lease at the same instant")
    for _ in range(10):
        with locks.acquire("x", ttl=0.7004) as held:
            for _ in range(2):
                with plain_redis.pipeline(transaction=True) as pipe:
                    (seconds, micros), left = pipe.time().pttl(KEY).execute()
                expires = seconds * 1000 + micros // 1000 + left  # in whole ms, as Redis keeps it
                ends = time.time() * 1000 + held.remaining() * 1000
                # The two clocks of this host were read a moment apart.
                assert expires >= ends - 0.2
                held.extend()


@pytest.mark.parametrize("name", ["", "a{b", "a}b", "a\nb", "a" * 600, b"bytes", None, 7.5, True, ["a"], "\ud800"])
def test_bad_names_are_refused_before_anything_is_sent(
    locks: DistributedLock, redis_server: RedisServer, name: Any
) -> None:
    sent = redis_server.command("INFO", "commandstats")
    for call in locks.acquire, locks.try_acquire:
        with pytest.raises(ValueError, match="lock name"):
            call(name)
    assert redis_server.command("INFO", "commandstats").keys() - OF_SENTINELS == sent.keys() - OF_SENTINELS
    assert not os.path.exists(locks._file_backend.path)


@pytest.mark.parametrize(
    ("what", "value"),
    [("ttl", v) for v in (0, -1, 1e9, float("nan"), float("inf"), "5", True)]
    + [("timeout", v) for v in (-1, -0.001, 1e9, float("nan"), "5", True)]
    + [("max_hold", v) for v in (0, -1, "5")],
)
def test_bad_times_are_refused_before_anything_is_sent(
    locks: DistributedLock, redis_server: RedisServer, what: str, value: Any
) -> None:
    with pytest.raises(ValueError, match="seconds"):
        locks.acquire("x", **{what: value})
    if what == "ttl":
        with pytest.raises(ValueError, match="ttl"):
            locks.try_acquire("x", ttl=value)
    held = locks.acquire("y")
    with pytest.raises(ValueError, match="ttl"):
        held.extend(value if what == "ttl" else 0)
    assert held.release()
    assert redis_server.command("KEYS", "*x*") == []


def test_contention_is_a_timeout_within_its_bound(locks: DistributedLock) -> None:
    def waited() -> float:
        started = time.monotonic()
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0.3)
        return time.monotonic() - started

    with locks.acquire("x"):
        # On a busy machine some come late for its own reasons. By default it would be 5.
        assert any(0.3 <= waited() < 4 for _ in range(10))
        with pytest.raises(LockTimeout) as caught:
            locks.acquire("x", timeout=0.01)
        assert isinstance(caught.value, TimeoutError)
        assert not isinstance(caught.value, LockUnavailable)
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0)
    assert locks.counters.get("locks.timeouts") >= 3
    assert locks.counters.get("locks.grants") == 1


@pytest.mark.parametrize("timeout", [20, None])
def test_a_waiter_gets_it_when_it_is_released(locks: DistributedLock, timeout: float | None) -> None:
    held = locks.acquire("x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(locks.acquire, "x", timeout=timeout)
        with pytest.raises(FuturesTimeout):
            waiting.result(timeout=0.1)
        held.release()
        assert waiting.result(PATIENCE).release()


def test_many_threads_take_turns(locks: DistributedLock) -> None:
    inside, seen = [], []

    def work(_: int) -> None:
        with locks.acquire("x", timeout=30):
            inside.append(1)
            seen.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(80)))
    assert seen == [1] * 80


def test_the_prefix_is_in_the_key_and_in_the_file(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, not_listed: None
) -> None:
    one, two = (make_gov(redis_url=redis_server.url, key_prefix=prefix).locks for prefix in ("one:", "two:"))
    with one.acquire("x", timeout=0), two.acquire("x", timeout=0):
        assert {k for k in plain_redis.keys("*") if "fence" not in k and "govredis" not in k} == {
            "one:lock:x",
            "two:lock:x",
        }
    assert len(set(os.listdir(one._file_backend.path)) - {"living"}) == 2


def test_an_outsiders_set_nx_is_honoured_and_its_end_noticed(locks: DistributedLock, plain_redis: Any) -> None:
    assert plain_redis.set(KEY, "async", nx=True, px=60_000)
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.1)
    assert plain_redis.get(KEY) == "async"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(locks.acquire, "x", timeout=20)
        with pytest.raises(FuturesTimeout):
            waiting.result(timeout=0.1)
        plain_redis.delete(KEY)
        assert waiting.result(PATIENCE).release()
    plain_redis.set(KEY, "async", px=200)
    with locks.acquire("x", timeout=20):
        assert not plain_redis.set(KEY, "async", nx=True, px=60_000)


def test_an_error_that_redis_answers_is_raised_and_holds_nothing(locks: DistributedLock, plain_redis: Any) -> None:
    plain_redis.hset(KEY, "a", "b")
    with pytest.raises(BackendError, match="WRONGTYPE"):
        locks.acquire("x")
    plain_redis.delete(KEY)
    with locks.acquire("x", timeout=0):
        pass


# -- with ------------------------------------------------------------------------------------------------------------


def lose(plain_redis: Any, key: str = KEY) -> None:
    plain_redis.set(key, "somebody else", px=60_000)


def test_with_releases_and_raises_locklost_only_where_the_body_succeeded(
    locks: DistributedLock, plain_redis: Any
) -> None:
    with locks.acquire("x") as held:
        assert isinstance(held, HeldLock)
    assert held.release() is False
    with pytest.raises(LockLost), locks.acquire("x"):
        lose(plain_redis)
    plain_redis.delete(KEY)
    with pytest.raises(ZeroDivisionError) as caught, locks.acquire("x"):
        lose(plain_redis)
        1 / 0  # noqa: B018
    assert caught.value.__context__ is None
    plain_redis.delete(KEY)
    with locks.acquire("x") as held:  # released by hand: nothing was lost
        assert held.release()


def test_with_does_not_hide_the_bodys_error_behind_an_error_of_redis(
    locks: DistributedLock, plain_redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), locks.acquire("x"):
        plain_redis.delete(KEY)
        plain_redis.hset(KEY, "a", "b")
        1 / 0  # noqa: B018
    assert "could not be released" in caplog.text
    plain_redis.delete(KEY)
    with pytest.raises(BackendError, match="WRONGTYPE"), locks.acquire("x"):
        plain_redis.delete(KEY)
        plain_redis.hset(KEY, "a", "b")


def test_a_handle_works_in_any_thread(locks: DistributedLock, plain_redis: Any) -> None:
    held = locks.acquire("x")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.extend, 50).result()
        assert 40 < pool.submit(held.remaining).result() <= 50
        assert pool.submit(held.release).result() is True
    assert not plain_redis.exists(KEY)


# -- the lease -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("renewed_soon")
def test_a_lock_is_renewed_past_its_ttl(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    lost: list[int] = []
    with locks.acquire("x", ttl=60) as held:
        held.on_lost(lambda: lost.append(1))
        for _ in range(3):
            before = held._lease.deadline
            eventually(lambda: held._lease.deadline > before)  # noqa: B023
        assert plain_redis.pexpire(KEY, 30_000)
        eventually(lambda: plain_redis.pttl(KEY) > 30_000, what="Redis keeps it for another ttl")
        held.raise_if_lost()
        assert 0 < held.remaining() <= 60
        assert plain_redis.get(KEY) == held._lease.owner
        assert locks.try_acquire("x") is None
    assert not lost


def test_without_renewal_it_ends_at_its_ttl_and_says_so(locks: DistributedLock, eventually: Callable[..., Any]) -> None:
    held = locks.acquire("x", ttl=1, renew=False)
    lost = threading.Event()
    where: list[str] = []
    held.on_lost(lambda: where.append(threading.current_thread().name))
    held.on_lost(lost.set)
    held.raise_if_lost()
    assert lost.wait(PATIENCE)
    assert where == ["govredis-renewal"]
    assert held.remaining() == 0
    with pytest.raises(LockLost):
        held.raise_if_lost()
    with pytest.raises(LockLost):
        held.extend(10)
    late = threading.Event()
    held.on_lost(late.set)
    assert late.is_set(), "it is lost already: at once"
    other = locks.acquire("x")
    assert held.release() is False
    assert other.release()
    assert locks.counters.get("locks.lost") == 1


def test_the_loss_is_known_at_the_deadline_even_if_no_thread_has_declared_it(
    locks: DistributedLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("govredis.locks.lease.LockLease.start", lambda self: None)
    held = locks.acquire("x", ttl=0.05)
    while held.remaining():
        time.sleep(0.005)
    with pytest.raises(LockLost):
        held.raise_if_lost()
    with pytest.raises(LockLost):
        held.__exit__(None, None, None)
    with pytest.raises(LockLost, match="not held"):
        held.extend(5)


def test_max_hold_bounds_the_renewal(locks: DistributedLock) -> None:
    def held_for() -> float:
        started = time.monotonic()
        held = locks.acquire("x", ttl=1.2, max_hold=1.5)
        lost = threading.Event()
        held.on_lost(lost.set)
        assert lost.wait(PATIENCE)
        assert held.release() is False
        return time.monotonic() - started

    # Neither at its ttl nor much later than max_hold + ttl, but for a busy machine's own reasons.
    assert any(1.4 < held_for() < 8 for _ in range(5))


def test_extend_makes_it_end_then_and_is_refused_when_over(locks: DistributedLock, plain_redis: Any) -> None:
    held = locks.acquire("x", ttl=100, renew=False)
    held.extend(1000)
    assert 900 < held.remaining() <= 1000
    assert 900_000 < plain_redis.pttl(KEY) <= 1_000_001
    held.extend(40)
    assert 0 < held.remaining() <= 40
    held.extend()
    assert 50 < held.remaining() <= 100
    held.release()
    with pytest.raises(LockLost, match="released"):
        held.extend(5)
    assert held.remaining() == 0
    held.raise_if_lost()  # it was not lost: it was released


def test_a_loss_that_extend_finds_is_told_to_all(locks: DistributedLock, plain_redis: Any) -> None:
    held = locks.acquire("x", ttl=60)
    lost = threading.Event()
    held.on_lost(lost.set)
    lose(plain_redis)
    with pytest.raises(LockLost):
        held.extend(60)
    assert lost.wait(PATIENCE)
    with pytest.raises(LockLost):
        held.raise_if_lost()
    assert held.release() is False
    assert plain_redis.get(KEY) == "somebody else"


@pytest.mark.usefixtures("renewed_soon")
def test_a_loss_that_renewal_finds_is_told(
    locks: DistributedLock, plain_redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    held = locks.acquire("x", ttl=60)
    lost = threading.Event()

    def fail() -> None:
        raise RuntimeError("of the callback's own")

    held.on_lost(fail)
    held.on_lost(lost.set)
    lose(plain_redis)
    assert lost.wait(PATIENCE)
    assert "callback of lock:x failed" in caplog.text
    with pytest.raises(LockLost, match="somebody else"):
        held.raise_if_lost()
    assert held.release() is False


@pytest.mark.usefixtures("renewed_soon")
def test_a_renewal_that_redis_answers_with_an_error_is_tried_again(
    locks: DistributedLock, plain_redis: Any, caplog: pytest.LogCaptureFixture, eventually: Callable[..., Any]
) -> None:
    with locks.acquire("x", ttl=60) as held:
        with plain_redis.pipeline(transaction=True) as pipe:
            pipe.delete(KEY)
            pipe.hset(KEY, "a", "b")
            pipe.execute()
        eventually(lambda: "could not be renewed" in caplog.text)
        first = held._lease.deadline
        plain_redis.delete(KEY, FENCE)
        eventually(lambda: held._lease.deadline > first)


@pytest.mark.usefixtures("renewed_soon")
def test_a_lost_holder_still_keeps_others_out_on_its_host(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire("x", ttl=60)
    lost = threading.Event()
    held.on_lost(lost.set)
    lose(plain_redis)
    assert lost.wait(PATIENCE)
    plain_redis.delete(KEY)
    host_lock: Any = held._lease.host_lock
    before = host_lock._vouched_until
    eventually(lambda: host_lock._vouched_until > before, what="its record is kept fresh")
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.5)
    held.release()
    assert locks.acquire("x", timeout=0).release()


# -- tokens and scripts ----------------------------------------------------------------------------------------------


def test_tokens_rise_over_release_expiry_and_flushall(locks: DistributedLock, plain_redis: Any) -> None:
    tokens = []
    for _ in range(3):
        with locks.acquire("x") as held:
            tokens.append(held.token)
    stale = locks.acquire("x", ttl=0.02, renew=False)
    with locks.acquire("x", timeout=10) as held:
        tokens += [stale.token, held.token]
    assert not stale.release()
    plain_redis.flushall()
    with locks.acquire("x") as held:
        tokens.append(held.token)
    # A clock set back, or data lost: the host's file remembers.
    plain_redis.flushall()
    far = tokens[-1] + 10**12
    plain_redis.set(FENCE, far)
    with locks.acquire("x", timeout=10) as held:
        tokens.append(held.token)
    plain_redis.flushall()
    with locks.acquire("x") as held:
        tokens.append(held.token)
    assert tokens == sorted(set(tokens))
    assert tokens[-2] == far + 1
    assert tokens[-1] == far + 2


def run(locks: DistributedLock, script: str, *args: Any) -> Any:
    assert locks._redis
    if script == "acquire" and len(args) == 4:
        args = (*args, 0)
    keys = KEY, *(sibling(KEY, name) for name in ("fence", "queue", "waiters"))
    return locks._redis.run(getattr(locks._backend, f"{script}_script"), keys, *map(str, args))


DAY = 86_400_000


def test_a_repeated_acquire_with_the_own_owner_succeeds_with_the_same_token(
    locks: DistributedLock, plain_redis: Any
) -> None:
    granted, token = run(locks, "acquire", "me", 5000, 0, DAY)
    assert granted == 1
    assert run(locks, "acquire", "me", 90_000, 0, DAY) == [1, token]
    assert plain_redis.pttl(KEY) > 80_000
    held, left = run(locks, "acquire", "other", 5000, 0, DAY)
    assert held == 0
    assert 80_000 < left <= 90_000
    plain_redis.delete(FENCE)
    granted, again = run(locks, "acquire", "me", 5000, 0, DAY)
    assert granted
    assert again > token, "the fence was evicted: no token that is not the highest"
    assert run(locks, "release", "me", again, DAY) == 1
    plain_redis.set(KEY, "for ever")
    assert run(locks, "acquire", "me", 5000, 0, DAY) == [0, -1]


def test_the_floor_raises_the_token(locks: DistributedLock) -> None:
    floor = time.time_ns() // 1000 + 10**12
    assert run(locks, "acquire", "me", 5000, floor, DAY) == [1, floor + 1]


@pytest.mark.parametrize("loss", ["none", "expired", "flushed"])
def test_an_extension_that_arrives_after_the_release_brings_no_ghost(
    locks: DistributedLock, plain_redis: Any, loss: str
) -> None:
    _, token = run(locks, "acquire", "me", 5000, 0, DAY)
    if loss == "expired":
        plain_redis.delete(KEY)
    elif loss == "flushed":
        plain_redis.flushall()
    assert run(locks, "release", "me", token, DAY) == (loss == "none")
    assert run(locks, "extend", "me", 5000, token, DAY) == 0
    assert not plain_redis.exists(KEY)


def test_a_release_that_arrives_twice_was_one(locks: DistributedLock, plain_redis: Any) -> None:
    """Its reply was lost with the connection, and it was sent again: the lock was held until then all the same."""
    _, token = run(locks, "acquire", "me", 5000, 0, DAY)
    assert run(locks, "release", "me", token, DAY) == 1
    assert run(locks, "release", "me", token, DAY) == 1
    _, later = run(locks, "acquire", "another", 5000, 0, DAY)
    assert later > token + 1
    assert run(locks, "release", "me", token, DAY) == 0
    assert run(locks, "release", "another", later, DAY) == 1
    assert run(locks, "release", "me", token, DAY) == 0


@pytest.mark.parametrize("gone", ["deleted", "all of it"])
def test_a_release_of_what_was_taken_away_is_none_however_often_and_in_whatever_order(
    locks: DistributedLock, plain_redis: Any, gone: str
) -> None:
    tokens = []
    for owner in "me", "another":
        _, token = run(locks, "acquire", owner, 5000, 0, DAY)
        tokens.append(token)
        plain_redis.delete(KEY)
    if gone == "all of it":
        plain_redis.flushall()
    for _ in range(2):
        for owner, token in zip(("me", "another"), tokens, strict=True):
            assert run(locks, "release", owner, token, DAY) == 0
            assert run(locks, "extend", owner, 5000, token, DAY) == 0


def test_extend_after_data_loss_re_establishes_unless_somebody_has_held_it_since(
    locks: DistributedLock, plain_redis: Any
) -> None:
    held = locks.acquire("x")
    plain_redis.flushall()
    held.extend(30)
    assert plain_redis.get(KEY) == held._lease.owner
    assert int(plain_redis.get(FENCE)) == held.token
    plain_redis.flushall()
    _, token = run(locks, "acquire", "on another host", 5000, 0, DAY)
    assert run(locks, "release", "on another host", token, DAY) == 1
    with pytest.raises(LockLost):
        held.extend(30)
    assert not plain_redis.exists(KEY)
    assert held.release() is False


def test_a_fence_is_raised_by_the_release_of_nobody_elses_only(locks: DistributedLock, plain_redis: Any) -> None:
    _, token = run(locks, "acquire", "me", 5000, 0, DAY)
    assert run(locks, "release", "another", 0, DAY) == 0
    assert int(plain_redis.get(FENCE)) == token
    assert run(locks, "extend", "me", 5000, token, DAY) == 1


# -- with another process ----------------------------------------------------------------------------------------------


def test_a_stopped_holder_is_passed_and_learns_of_it_and_does_not_disturb(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer, plain_redis: Any
) -> None:
    worker = make_worker(redis_url=redis_server.url)
    worker.run(
        "import threading\nlost = threading.Event()\nheld = locks.acquire('x', ttl=1.5)\n"
        "held.on_lost(lost.set)\nheld.raise_if_lost()"
    )
    first = worker.eval("held.token")
    worker.stop()
    held = locks.acquire("x", timeout=PATIENCE)
    assert held.token > first
    worker.resume()
    assert worker.eval("lost.wait(60)") is True
    assert worker.eval("held.raise_if_lost()") == "LockLost"
    assert worker.eval("held.extend(5)") == "LockLost"
    assert locks.try_acquire("x") is None
    assert worker.eval("held.__exit__(None, None, None)") == "LockLost"
    assert worker.eval("locks.try_acquire('x')") is None
    held.extend()
    assert plain_redis.get(KEY) == held._lease.owner
    assert held.release()
    assert worker.eval("locks.acquire('x').release()") is True


def test_a_killed_holder_frees_its_file_at_once_and_redis_within_the_ttl(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer
) -> None:
    worker = make_worker(redis_url=redis_server.url)
    worker.run("held = locks.acquire('x', ttl=1)")
    worker.kill()
    host_lock = locks._file_backend.open_exclusive(KEY)
    assert host_lock._try_flock()
    host_lock.leave()
    assert locks.acquire("x", timeout=25).release(), "not when it would be by default, after 30"


def test_a_flush_lets_nobody_on_this_host_in_beside_the_holder(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer, plain_redis: Any
) -> None:
    worker = make_worker(redis_url=redis_server.url)
    worker.run("held = locks.acquire('x')")
    plain_redis.flushall()
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.2)
    assert not plain_redis.exists(KEY), "what Redis granted and the file did not goes back"
    # Without the host lock both would hold it: this is the host lock's purpose.
    worker.run(
        "from govredis.locks.host_lock.exclusive import ExclusiveHostLock\n"
        "ExclusiveHostLock.enter = lambda self, *a, **k: True"
    )
    assert worker.eval("type(locks.acquire('x', timeout=0)).__name__") == "HeldLock"


@pytest.fixture
def forked(make_worker: Callable[..., Any], redis_server: RedisServer, renewed_soon: None) -> Iterator[Any]:
    worker = make_worker(redis_url=redis_server.url)
    worker.run("held = locks.acquire('x', ttl=60)")
    yield worker


def test_a_forked_childs_handle_is_inert(
    forked: Any, locks: DistributedLock, redis_server: RedisServer, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    forked.run(
        "def child():\n"
        "    import gc, threading\n"
        "    with warnings.catch_warnings():\n"
        "        warnings.simplefilter('error')\n"
        "        told = threading.Event()\n"
        "        held.on_lost(told.set)\n"
        "        try:\n"
        "            held.raise_if_lost()\n"
        "        except LockLost as error:\n"
        "            text = str(error)\n"
        "        with held:\n"
        "            pass\n"
        "        sent = sum(len(node._pool.live) for node in gov.internal.context.redis.nodes())\n"
        "        return (held.release(), held.remaining(), 'parent' in text, told.is_set(), sent,\n"
        "                threading.active_count())\n"
    )
    owner = plain_redis.get(KEY)
    assert forked.eval("in_child(child)") == "(False, 0.0, True, True, 0, 1)"
    # The parent keeps it, renews it, and keeps others out.
    assert plain_redis.get(KEY) == owner
    deadline = forked.eval("held._lease.deadline")
    eventually(lambda: forked.eval("held._lease.deadline") > deadline)
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.1)
    assert forked.eval("held.release()") is True
    assert locks.acquire("x", timeout=0).release()


def test_a_forked_child_can_contend_and_hold(forked: Any) -> None:
    assert forked.eval("in_child(lambda: locks.try_acquire('x'))") == "None"
    assert forked.eval("in_child(lambda: locks.acquire('y', timeout=0).release())") == "True"
    assert forked.eval("held.release()") is True
    assert forked.eval("in_child(lambda: locks.acquire('x', timeout=0).release())") == "True"


def test_a_lost_locks_handle_is_inert_in_a_child_too(forked: Any, locks: DistributedLock, plain_redis: Any) -> None:
    forked.run(
        "import threading\nheld.release()\n"
        "lost = threading.Event()\nheld = locks.acquire('x', ttl=0.2, renew=False)\nheld.on_lost(lost.set)\n"
        "assert lost.wait(60)\n"
    )
    # Over for the renewal thread; but its process may still be in there, and has the flock.
    assert forked.eval("in_child(held.release)") == "False"
    host_lock = locks._file_backend.open_exclusive(KEY)
    assert not host_lock._try_flock()
    host_lock.leave()


def test_fork_while_another_thread_renews_and_waits(forked: Any, plain_redis: Any) -> None:
    forked.run(
        "import threading\n"
        "more = [locks.acquire(f'more-{i}', ttl=0.03) for i in range(5)]\n"
        "done = threading.Event()\n"
        "def contend():\n"
        "    while not done.is_set():\n"
        "        try:\n"
        "            locks.acquire('x', timeout=0.01)\n"
        "        except LockError:\n"
        "            pass\n"
        "threads = [threading.Thread(target=contend, daemon=True) for _ in range(3)]\n"
        "[t.start() for t in threads]\n"
        "def child():\n"
        "    return locks.acquire('child', timeout=10).release() and held.release()\n"
    )
    for _ in range(30):
        assert forked.eval("in_child(child)") == "False"
    forked.run("done.set()\n[t.join() for t in threads]\n[m.release() for m in more]")
    assert forked.eval("held.release()") is True


# -- nothing grows ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("renewed_soon")
def test_collected_while_held_it_warns_stops_renewing_and_ends_with_its_lease(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire("x", ttl=60)
    with pytest.warns(ResourceWarning, match="'x' was collected while held"):
        del held
        gc.collect()
    assert plain_redis.exists(KEY), "it may be that its work goes on"
    plain_redis.pexpire(KEY, 2000)  # a renewal, which would come sooner, would make it a minute again
    with locks.acquire("x", timeout=40):
        pass
    assert locks.counters.get("locks.lost") == 0


def test_released_and_collected_it_does_not_warn(locks: DistributedLock) -> None:
    with warnings.catch_warnings(record=True) as caught:  # an error in a destructor would fail nobody
        warnings.simplefilter("always")
        held = locks.acquire("x")
        held.release()
        del held
        gc.collect()
    assert [str(each.message) for each in caught if "lock" in str(each.message)] == []


def test_a_destructor_run_by_a_collection_anywhere_does_not_deadlock(
    locks: DistributedLock, eventually: Callable[..., Any]
) -> None:
    released: list[int] = []

    class Owner:
        """Releases in its destructor, from within a cycle: run by whichever thread allocates next."""

        def __init__(self, n: int) -> None:
            self.held = locks.acquire(f"x{n}")
            self.me = self

        def __del__(self) -> None:
            self.held.release()
            released.append(1)

    def work(n: int) -> None:
        Owner(n)

    threshold = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(300), timeout=60))
    finally:
        gc.set_threshold(*threshold)
    # The renewal thread may be in the midst of a collection, and then nobody else's begins.
    eventually(lambda: gc.collect() >= 0 and len(released) == 300)


def test_a_thousand_cycles_leave_nothing(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any], not_listed: None
) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with locks.acquire("x"):
        assert len(threads()) == 1
    before = descriptors()
    for n in range(1000):
        with locks.acquire("x") as held:
            assert n % 20 or locks.try_acquire("x") is None
    eventually(lambda: descriptors() <= before)  # threads of other tests may have some open for a moment
    assert plain_redis.keys("*") == [FENCE]
    assert len(set(os.listdir(locks._file_backend.path)) - {"living"}) == 1
    from govredis.locks.renewal import renewer

    assert held._lease not in renewer._leases
    eventually(lambda: not threads())


@pytest.mark.usefixtures("renewed_soon")
def test_one_thread_renews_all_and_ends_when_idle_and_starts_again(
    locks: DistributedLock, eventually: Callable[..., Any]
) -> None:
    eventually(lambda: not threads())
    for _ in range(2):
        with locks.acquire("x", ttl=70) as x, locks.acquire("y", ttl=60) as y, locks.acquire("z"):
            assert len(threads()) == 1
            until = max(x._lease.deadline, y._lease.deadline)
            eventually(lambda: min(x._lease.deadline, y._lease.deadline) > until)  # noqa: B023
        eventually(lambda: not threads())


def test_short_locks_do_not_wake_the_thread_each_time(
    locks: DistributedLock, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    renewer, woken = renewal.renewer, []
    real = renewer._ring

    def ring() -> None:
        woken.append(1)
        real()

    with locks.acquire("x") as x, monkeypatch.context() as patched:
        eventually(lambda: x._lease.due > renewal.clock() + 1)  # the thread is there, and sleeps long
        patched.setattr(renewal, "_IDLE", 1000)
        patched.setattr(renewer, "_ring", ring)
        began = time.monotonic()
        for _ in range(3000):
            locks.acquire("y").release()
        ticks = (time.monotonic() - began) / renewal.FIRST_DUE
    assert len(woken) <= ticks + 2
    real()  # it is idle for a while only


def test_a_sooner_lease_wakes_the_thread_that_waits_for_a_later_one(locks: DistributedLock) -> None:
    lost = threading.Event()
    with locks.acquire("later", ttl=1000):
        sooner = locks.acquire("sooner", ttl=0.2, renew=False)
        sooner.on_lost(lost.set)
        assert lost.wait(PATIENCE)
        sooner.release()


def test_a_repr_says_what_it_is(locks: DistributedLock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with locks.acquire("x") as held:
        assert repr(held).startswith(f"<HeldLock 'x' token={held.token} ")
    assert repr(held).endswith("over>")
    assert not caplog.records


def test_a_release_whose_reply_was_lost_is_no_loss(locks: DistributedLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is cut after the script ran; the client sends it again on another."""
    assert locks._redis
    node = locks._redis.at(KEY)
    exchange = node._exchange

    def cut_after(*args: Any) -> Any:
        exchange(*args)
        monkeypatch.undo()
        raise redis_py.ConnectionError("cut")

    with locks.acquire("x"):
        monkeypatch.setattr(node, "_exchange", cut_after)
    assert locks.counters.get("locks.lost") == 0


def test_a_host_whose_last_token_is_ahead_of_rediss_clock_is_granted_a_higher_one_at_once(
    locks: DistributedLock,
) -> None:
    ahead = time.time_ns() // 1000 + 10**9
    host_lock = locks._file_backend.open_exclusive(KEY)
    assert host_lock.enter(ahead, "a degraded holder on a fast clock", 0.0, may_pass=False)
    host_lock.leave()
    held = locks.try_acquire("x")
    assert held is not None
    assert held.token > ahead
    held.release()
