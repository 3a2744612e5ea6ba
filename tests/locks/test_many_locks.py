"""acquire_many: several locks or none, in an order in which nobody waits for anybody that waits for him; HeldLocks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import PATIENCE, eventually

from govredis import BackendError, GovRedis, HeldLock, LockLost, LockTimeout
from govredis.keys import sibling
from govredis.locks import DistributedLock, HeldLocks
from govredis.locks.renewal import renewer
from govredis.testing.servers import RedisServer


class Struck(BaseException):
    pass


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def others(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


def left(plain_redis: Any) -> set[str]:
    """The locks that are held in Redis."""
    return {key for key in plain_redis.keys("lock:*") if "{" not in key}


def open_files(folder: str) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # what listed them
            pass
    # The process keeps that it lives in a file of its own.
    return [path for path in found if path.startswith(folder) and not path.endswith("/living")]


# -- taking them -----------------------------------------------------------------------------------------------------


def test_locks_are_taken_in_sorted_order_and_each_once(locks: DistributedLock, plain_redis: Any) -> None:
    names = [f"n{n:02}" for n in range(20)]
    with locks.acquire_many([*reversed(names), *names]) as held:
        assert list(held) == names
        tokens = [held[name].token for name in names]
        assert tokens == sorted(set(tokens))
        assert left(plain_redis) == {f"lock:{name}" for name in names}
    assert not left(plain_redis)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ("b", "a"),
        lambda: {"a", "b"},
        lambda: {"b": 1, "a": 2},
        lambda: iter(["b", "a", "b"]),
        lambda: (n for n in "ba"),
    ],
    ids=["tuple", "set", "dict", "iterator", "generator"],
)
def test_names_come_from_anything_that_has_some(locks: DistributedLock, make: Callable[[], Any]) -> None:
    with locks.acquire_many(make()) as held:
        assert list(held) == ["a", "b"]


def test_a_single_name_is_enough(locks: DistributedLock) -> None:
    with locks.acquire_many(["a"]) as held:
        assert list(held) == ["a"]


@pytest.mark.parametrize(
    "names",
    ["ab", "", b"ab", [], (), {}, None, 7]
    + [["a", bad] for bad in ("", "b{", "b}", "b\n", "b" * 600, "\ud800", b"b", None, 7.5, True, ["b"], {})],
    ids=lambda names: repr(names)[:20],
)
def test_bad_names_are_refused_before_anything_is_sent(
    locks: DistributedLock, redis_server: RedisServer, names: Any
) -> None:
    redis_server.command("CONFIG", "RESETSTAT")
    with pytest.raises(ValueError, match="name"):
        locks.acquire_many(names)
    assert "cmdstat_evalsha" not in redis_server.command("INFO", "commandstats")
    assert not os.path.exists(locks._file_backend.path)


@pytest.mark.parametrize(
    ("what", "value"), [("timeout", -1), ("timeout", "5"), ("ttl", 0), ("ttl", True), ("max_hold", -1)]
)
def test_bad_times_are_refused_before_anything_is_sent(
    locks: DistributedLock, redis_server: RedisServer, what: str, value: Any
) -> None:
    redis_server.command("CONFIG", "RESETSTAT")
    with pytest.raises(ValueError, match=what):
        locks.acquire_many(["a", "b"], **{what: value})
    assert "cmdstat_evalsha" not in redis_server.command("INFO", "commandstats")


def test_all_of_acquires_options_reach_each(locks: DistributedLock, plain_redis: Any) -> None:
    with locks.acquire_many(["a", "b"], ttl=700, renew=False) as held:
        for name in "ab":
            assert 600 < held[name].remaining() <= 700
            assert 600_000 < plain_redis.pttl(f"lock:{name}") <= 700_001
            assert held[name]._lease._renew_until == 0
    with locks.acquire_many(["a", "b"], max_hold=50) as held:
        assert all(0 < lock._lease._renew_until < float("inf") for lock in held.values())


# -- or none ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_no_lock_is_held_where_one_is_held_by_another(
    locks: DistributedLock, others: DistributedLock, plain_redis: Any, timeout: float
) -> None:
    with others.acquire("c"):
        with pytest.raises(LockTimeout, match="lock:c"):
            locks.acquire_many(["c", "b", "a", "d"], timeout=timeout)
        assert left(plain_redis) == {"lock:c"}
        with others.acquire_many(["a", "b", "d"], timeout=0) as held:
            assert "a" in held
    assert not renewer._leases
    eventually(lambda: not open_files(locks._file_backend.path))  # but those of a sweep, for a moment
    assert locks.acquire_many(["a", "b", "c"], timeout=0).release()


def test_an_exception_that_strikes_while_it_waits_leaves_no_lock_held(
    locks: DistributedLock, others: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    """Ctrl-C, and Celery's soft time limit."""

    def strike(*_: object) -> None:
        raise Struck

    def when_it_waits() -> None:
        eventually(lambda: plain_redis.zcard(sibling("lock:c", "queue")) == 1)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, strike)
    try:
        with others.acquire("c"):
            waiting = threading.Thread(target=when_it_waits)
            waiting.start()
            with pytest.raises(Struck):
                locks.acquire_many(["a", "b", "c"], timeout=60)
            waiting.join()
            assert left(plain_redis) == {"lock:c"}
            assert not plain_redis.exists(sibling("lock:c", "queue"))
            assert others.acquire_many(["a", "b"], timeout=0).release()
    finally:
        signal.signal(signal.SIGALRM, before)
    eventually(lambda: not open_files(locks._file_backend.path))  # but those of a sweep, for a moment


def test_the_exception_that_struck_is_raised(
    locks: DistributedLock, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = locks.acquire

    def struck(name: str, **options: Any) -> HeldLock:
        if name == "c":
            plain_redis.delete("lock:b")
            plain_redis.hset("lock:b", "a", "b")  # its release will fail
            raise Struck
        return acquire(name, **options)

    monkeypatch.setattr(locks, "acquire", struck)
    with pytest.raises(Struck):
        locks.acquire_many(["a", "b", "c"])
    assert left(plain_redis) == {"lock:b"}
    plain_redis.delete("lock:b")
    monkeypatch.undo()
    assert locks.acquire_many(["a", "b", "c"], timeout=0).release()


def test_the_timeout_is_for_all_of_them(locks: DistributedLock, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [1000.0], []
    acquire = locks.acquire

    def slowly(name: str, *, timeout: float | None, **options: Any) -> HeldLock:
        asked.append(timeout)
        now[0] += 2
        return acquire(name, timeout=timeout, **options)

    monkeypatch.setattr("govredis.locks.lock.clock", lambda: now[0])
    monkeypatch.setattr(locks, "acquire", slowly)
    for timeout, expected in (5, [5, 3, 1, 0]), (0, [0] * 4), (None, [None] * 4):
        locks.acquire_many(["d", "c", "b", "a"], timeout=timeout).release()
        assert asked == expected
        asked.clear()


def test_acquire_many_waits_for_each(locks: DistributedLock, others: DistributedLock) -> None:
    held = others.acquire_many(["a", "c"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(locks.acquire_many, ["a", "b", "c"], timeout=30)
        held["a"].release()
        held["c"].release()
        assert waiting.result(PATIENCE).release()


def test_callers_of_the_same_locks_in_different_orders_do_not_wait_for_each_other(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer, plain_redis: Any
) -> None:
    names = ["a", "b", "c"]

    def take_turns(order: list[str]) -> int:
        for _ in range(25):
            with locks.acquire_many(order, timeout=30):
                assert plain_redis.incr("inside") == 1
                plain_redis.decr("inside")
        return 25

    workers = [make_worker(redis_url=redis_server.url, socket_timeout=5) for _ in range(2)]
    for worker, order in zip(workers, (names, names[::-1]), strict=True):
        worker.run(
            "def inside():\n"
            "    n = int(gov.internal.context.redis.call('INCR', 'inside'))\n"
            "    gov.internal.context.redis.call('DECR', 'inside')\n"
            "    return n\n"
            "def take_turns(order):\n"
            "    seen = []\n"
            "    for _ in range(25):\n"
            "        with locks.acquire_many(order, timeout=30):\n"
            "            seen.append(inside())\n"
            "    return seen\n"
        )
        worker.begin(f"take_turns({order})")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(take_turns, [["b", "c", "a"], ["c", "a", "b"]])) == [25, 25]
    for worker in workers:
        assert worker.answer() == [1] * 25


# -- with ------------------------------------------------------------------------------------------------------------


def lose(plain_redis: Any, key: str) -> None:
    plain_redis.set(key, "somebody else", px=60_000)


def break_type(plain_redis: Any, key: str) -> None:
    """Its release will be answered with an error."""
    plain_redis.delete(key)
    plain_redis.hset(key, "a", "b")


@pytest.mark.parametrize("which", ["a", "b", "c"])
def test_with_raises_locklost_where_one_was_lost_and_releases_the_others(
    locks: DistributedLock, plain_redis: Any, which: str
) -> None:
    with pytest.raises(LockLost, match=f"'{which}'"), locks.acquire_many(["a", "b", "c"]) as held:
        assert isinstance(held, HeldLocks)
        lose(plain_redis, f"lock:{which}")
    assert left(plain_redis) == {f"lock:{which}"}
    assert plain_redis.get(f"lock:{which}") == "somebody else"


@pytest.mark.parametrize("spoil", [lose, break_type])
def test_with_never_hides_the_bodys_error(
    locks: DistributedLock, plain_redis: Any, spoil: Callable[[Any, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError) as caught, locks.acquire_many(["a", "b", "c"]):
        spoil(plain_redis, "lock:b")
        1 / 0  # noqa: B018
    assert caught.value.__context__ is None
    assert left(plain_redis) == {"lock:b"}
    assert ("could not be released" in caplog.text) == (spoil is break_type)


def test_all_the_others_are_released_where_one_cannot_be(locks: DistributedLock, plain_redis: Any) -> None:
    for release in (HeldLocks.release, lambda held: held.__exit__(None, None, None)):
        held = locks.acquire_many(["a", "b", "c"])
        break_type(plain_redis, "lock:b")
        with pytest.raises(BackendError, match="WRONGTYPE"):
            release(held)
        assert left(plain_redis) == {"lock:b"}
        plain_redis.delete("lock:b")
    assert not renewer._leases
    eventually(lambda: not open_files(locks._file_backend.path))  # but those of a sweep, for a moment


@pytest.mark.parametrize("how", ["release", "with"])
def test_all_the_others_are_released_where_an_exception_strikes_the_release_of_one(
    locks: DistributedLock, plain_redis: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    held = locks.acquire_many(["a", "b", "c"])
    real, strikes = renewer.discard, [Struck]

    def discard(lease: Any) -> None:
        if lease is held["b"]._lease and strikes:
            raise strikes.pop()
        real(lease)

    monkeypatch.setattr(renewer, "discard", discard)
    break_type(plain_redis, "lock:c")  # released first: its error must not hide the exception that struck
    with pytest.raises(Struck):
        if how == "release":
            held.release()
        else:
            with held:
                pass
    assert left(plain_redis) == {"lock:c"}
    assert not renewer._leases


def test_a_lock_released_by_hand_is_not_lost(locks: DistributedLock, plain_redis: Any) -> None:
    with locks.acquire_many(["a", "b"]) as held:
        assert held["a"].release()
    with locks.acquire_many(["a", "b"]) as held:
        assert held.release()
    assert not left(plain_redis)


# -- the handle ------------------------------------------------------------------------------------------------------


def test_held_locks_are_a_mapping(locks: DistributedLock) -> None:
    with locks.acquire_many(["b", "a"]) as held:
        assert isinstance(held["a"], HeldLock)
        assert {name: lock.name for name, lock in held.items()} == {"a": "a", "b": "b"}
        assert (len(held), list(held), "a" in held, "c" in held) == (2, ["a", "b"], True, False)
        assert held.get("c") is None
        with pytest.raises(KeyError):
            held["c"]
        assert repr(held).startswith("<HeldLocks [<HeldLock 'a' token=")
        assert held["a"].token != held["b"].token


def test_release_is_idempotent_and_says_whether_all_were_held(locks: DistributedLock, plain_redis: Any) -> None:
    held = locks.acquire_many(["a", "b"])
    assert held.release() is True
    assert held.release() is False
    for lost in "ab":
        held = locks.acquire_many(["a", "b"])
        lose(plain_redis, f"lock:{lost}")
        assert held.release() is False
        assert left(plain_redis) == {f"lock:{lost}"}
        plain_redis.delete(f"lock:{lost}")
    held = locks.acquire_many(["a", "b"])
    assert held["b"].release()
    assert held.release() is False, "not all of them were held until now"
    assert not left(plain_redis)


def test_remaining_is_that_of_the_first_to_end(locks: DistributedLock) -> None:
    held = locks.acquire_many(["a", "b", "c"], ttl=1000, renew=False)
    held["b"].extend(200)
    assert 0 < held.remaining() <= 200
    held["b"].extend(2000)
    assert 800 < held.remaining() <= 1000
    held["c"].release()
    assert held.remaining() == 0
    held.release()


@pytest.mark.parametrize("which", ["a", "b", "c"])
def test_held_locks_are_lost_where_one_is(locks: DistributedLock, plain_redis: Any, which: str) -> None:
    held = locks.acquire_many(["a", "b", "c"])
    held.raise_if_lost()
    lose(plain_redis, f"lock:{which}")
    with pytest.raises(LockLost):
        held[which].extend()
    with pytest.raises(LockLost, match=f"'{which}'"):
        held.raise_if_lost()
    assert held.remaining() == 0
    assert held.release() is False


@pytest.mark.usefixtures("renewed_soon")
def test_each_is_renewed(locks: DistributedLock, eventually: Callable[..., Any]) -> None:
    with locks.acquire_many(["a", "b"], ttl=60) as held:
        ends = max(lock._lease.deadline for lock in held.values())
        eventually(lambda: all(lock._lease.deadline > ends for lock in held.values()))
        held.raise_if_lost()


@pytest.fixture
def degraded(make_gov: Callable[..., GovRedis]) -> Iterator[HeldLock]:
    with make_gov(redis_enabled=False).locks.acquire("z") as held:
        yield held


def test_held_locks_are_degraded_where_one_is(
    locks: DistributedLock, make_gov: Callable[..., GovRedis], degraded: HeldLock
) -> None:
    with locks.acquire_many(["a", "b"]) as held:
        assert held.degraded is False
        assert HeldLocks({**held, "z": degraded}).degraded is True
    away = make_gov(redis_enabled=False).locks
    with away.acquire_many(["a", "b"], timeout=0) as held:
        assert held.degraded is True
        with pytest.raises(LockTimeout):
            away.acquire_many(["b", "c"], timeout=0)
        assert away.acquire("c", timeout=0).release(), "none was kept"
