"""The holders of locks: holder, is_locked, held; and force_release, which takes a lock from its holder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE

from govredis import BackendError, BackendUnavailable, GovRedis, HeldLock, LockLost, LockTimeout, LockUnavailable
from govredis._boottime import clock
from govredis.keys import sibling
from govredis.locks import DistributedLock, LockHolder
from govredis.locks import lease as lease_module
from govredis.locks.backends.redis_backend import Renewal
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

KEY = "lock:x"
FENCE, QUEUE = sibling(KEY, "fence"), sibling(KEY, "queue")
LIST = "govredis:locks"


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def far(make_gov: Callable[..., GovRedis], redis_server: RedisServer, tmp_path: Path) -> DistributedLock:
    """On another host: with lock files of its own."""
    return make_gov(redis_url=redis_server.url, socket_timeout=5, lock_folder=str(tmp_path / "far")).locks


@pytest.fixture
def worker(make_worker: Callable[..., Any], redis_server: RedisServer) -> Any:
    return make_worker(redis_url=redis_server.url, socket_timeout=5)


def names(locks: DistributedLock) -> list[str]:
    return [holder.name for holder in locks.held()]


def kinds(locks: DistributedLock) -> list[tuple[str, str, int | None]]:
    return [(holder.name, holder.kind, holder.token) for holder in locks.held()]


def round_trips(locks: DistributedLock, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets longer by one with each round trip of theirs."""
    assert locks._redis
    made: list[int] = []
    really = locks._redis._round_trip

    def seen(*args: Any, **options: Any) -> Any:
        made.append(1)
        return really(*args, **options)

    monkeypatch.setattr(locks._redis, "_round_trip", seen)
    return made


#: Left in commandstats by the test's own connection.
OF_OTHERS = {"config", "config|resetstat", "client", "client|setinfo"}


def commands_since_reset(server: RedisServer) -> set[str]:
    return {name.removeprefix("cmdstat_") for name in server.command("INFO", "commandstats")}


# -- holder, is_locked -----------------------------------------------------------------------------------------------


def test_nobody(locks: DistributedLock, plain_redis: Any) -> None:
    assert locks.holder("x") is None
    assert locks.is_locked("x") is False
    assert plain_redis.keys("*") == []
    assert not os.path.exists(locks._file_backend.path)


def test_ours(locks: DistributedLock, far: DistributedLock) -> None:
    for name in "x", "y:z ä":
        with locks.acquire(name, ttl=60) as held:
            for asked in locks, far:
                holder = asked.holder(name)
                assert isinstance(holder, LockHolder)
                assert (holder.name, holder.kind, holder.owner) == (name, "lock", held._lease.owner)
                assert (holder.token, holder.degraded) == (held.token, False)
                assert holder.remaining is not None
                assert 30 < holder.remaining <= 60.001
                assert asked.is_locked(name) is True
                assert asked.holder("another") is None
        assert locks.holder(name) is None, "released"
        assert locks.is_locked(name) is False


def test_another_process(locks: DistributedLock, worker: Any) -> None:
    worker.run("held = locks.acquire('x', ttl=60)")
    holder = locks.holder("x")
    assert holder
    assert f":{worker.pid}:" in holder.owner
    assert holder.token == worker.eval("held.token")


@pytest.mark.parametrize("value", [b"async", b"", b"\xff\x00{\r\n", b"a:1:0-1", b"x" * 100_000])
@pytest.mark.parametrize("ttl", [None, 600])
def test_an_outsider(locks: DistributedLock, redis_server: RedisServer, value: bytes, ttl: int | None) -> None:
    locks.acquire("x").release()  # leaves a fence, unknown to the outsider
    assert redis_server.command("SET", KEY, value, "NX", *(("EX", ttl) if ttl else ()))
    holder = locks.holder("x")
    assert holder
    assert holder.owner == value.decode(errors="backslashreplace")
    assert (holder.kind, holder.token, holder.degraded) == ("lock", None, False)
    if ttl is None:
        assert holder.remaining is None
    else:
        assert holder.remaining is not None
        assert 500 < holder.remaining <= 600
    assert locks.is_locked("x")
    assert [(h.name, h.kind, h.owner, h.token) for h in locks.held()] == [("x", "lock", holder.owner, None)]


@pytest.mark.parametrize("name", ["", "a{b", "a\nb", "a" * 600, b"bytes", None, 7.0, ["a"]])
def test_bad_names_are_refused_before_anything_is_sent(
    locks: DistributedLock, redis_server: RedisServer, name: Any
) -> None:
    redis_server.command("CONFIG", "RESETSTAT")
    for call in locks.holder, locks.is_locked, locks.force_release:
        with pytest.raises(ValueError, match="lock name"):
            call(name)
    assert commands_since_reset(redis_server) <= OF_OTHERS
    assert not os.path.exists(locks._file_backend.path)


def test_a_lock_has_no_holder_for_other_kinds_of_its_name(locks: DistributedLock) -> None:
    with locks.rwlock("x").write(), locks.semaphore("x", slots=2).acquire():
        assert locks.holder("x") is None
        assert locks.force_release("x") is False
        assert {kind for _, kind, _ in kinds(locks)} == {"write", "semaphore"}


def test_an_error_that_redis_answers_is_raised(locks: DistributedLock, plain_redis: Any) -> None:
    plain_redis.hset(KEY, "a", "b")
    for call in locks.holder, locks.is_locked, locks.force_release:
        with pytest.raises(BackendError, match="WRONGTYPE"):
            call("x")


def test_a_look_is_one_round_trip(locks: DistributedLock, monkeypatch: pytest.MonkeyPatch, not_listed: None) -> None:
    with locks.acquire("x"):
        made = round_trips(locks, monkeypatch)
        locks.holder("x")
        assert len(made) == 1


# -- held ------------------------------------------------------------------------------------------------------------


def test_a_processs_own_locks_are_listed_at_once(locks: DistributedLock, plain_redis: Any, not_listed: None) -> None:
    rwlock, semaphore = locks.rwlock("x"), locks.semaphore("x", slots=2)
    assert locks.held() == []
    with (
        locks.acquire("y", ttl=100) as y,
        locks.acquire("x", ttl=300) as x,
        rwlock.read() as one,
        rwlock.read() as two,
        semaphore.acquire() as first,
        semaphore.acquire() as second,
    ):
        assert not plain_redis.exists(LIST)
        assert kinds(locks) == [
            ("x", "lock", x.token),
            ("x", "read", one.token),
            ("x", "read", two.token),
            ("x", "semaphore", first.token),
            ("x", "semaphore", second.token),
            ("y", "lock", y.token),
        ]
        held = locks.held()
        assert [holder.owner for holder in held][::5] == [x._lease.owner, y._lease.owner]
        assert all(0 < (holder.remaining or 0) <= 300.01 and not holder.degraded for holder in held)
        assert 50 < (held[-1].remaining or 0) <= 100.01
        assert (held[0].remaining or 0) > 100
    assert locks.held() == []
    with rwlock.write() as held_alone:
        assert kinds(locks) == [("x", "write", held_alone.token)]


def test_other_processes_locks_are_listed_after_a_moment(
    locks: DistributedLock, far: DistributedLock, worker: Any, eventually: Callable[..., Any]
) -> None:
    worker.run(
        "x, w = locks.acquire('x', ttl=400), locks.rwlock('w').write(ttl=400)\n"
        "r, s = locks.rwlock('r').read(ttl=400), locks.semaphore('s', slots=1).acquire(ttl=400)\n"
    )
    eventually(lambda: names(locks) == ["r", "s", "w", "x"])
    tokens = worker.eval("[r.token, s.token, w.token, x.token]")
    assert kinds(locks) == list(zip("rswx", ["read", "semaphore", "write", "lock"], tokens, strict=True))
    for holder in locks.held():
        assert f":{worker.pid}:" in holder.owner
        assert holder.remaining is not None
        assert 200 < holder.remaining <= 400.01
    assert far.held() and kinds(far) == kinds(locks)
    worker.run("[held.release() for held in (x, w, r, s)]")
    assert locks.held() == []


def test_two_instances_of_one_process_see_each_others_locks_after_a_moment(
    locks: DistributedLock, far: DistributedLock, eventually: Callable[..., Any]
) -> None:
    with locks.acquire("x"):
        eventually(lambda: names(far) == ["x"])


@pytest.mark.usefixtures("renewed_soon")
def test_a_renewed_lock_stays_on_the_list(
    locks: DistributedLock, plain_redis: Any, worker: Any, eventually: Callable[..., Any]
) -> None:
    worker.run("held = locks.acquire('x', ttl=60)")
    listed = [("x", "lock", worker.eval("held.token"))]
    eventually(lambda: plain_redis.zcard(LIST) == 1)
    assert kinds(locks) == listed
    (entry,) = plain_redis.zrange(LIST, 0, -1)
    plain_redis.zadd(LIST, {entry: 1}, xx=True)  # as at the end of its first lease
    eventually(lambda: (plain_redis.zscore(LIST, entry) or 0) > 1)
    assert kinds(locks) == listed
    assert worker.eval("held.remaining()") > 0


def test_a_killed_holder_is_listed_until_its_lease_ends(
    locks: DistributedLock, worker: Any, eventually: Callable[..., Any]
) -> None:
    worker.run("short, long = locks.acquire('short', ttl=1), locks.acquire('long', ttl=1000)")
    eventually(lambda: "long" in names(locks))
    worker.kill()
    eventually(lambda: names(locks) == ["long"])


def test_a_lock_with_a_new_holder_is_not_listed_as_the_first_ones(
    locks: DistributedLock, plain_redis: Any, worker: Any, eventually: Callable[..., Any]
) -> None:
    worker.run("theirs = locks.acquire('y', ttl=1000)")
    with pytest.raises(LockLost), locks.acquire("x", ttl=1000):
        eventually(lambda: names(locks) == ["x", "y"])
        for key in KEY, "lock:y":
            plain_redis.set(key, "another", px=60_000)
        assert [(h.name, h.owner, h.token) for h in locks.held()] == [("x", "another", None), ("y", "another", None)]
        plain_redis.delete("lock:y")
        plain_redis.set(KEY, "another")
        assert [(h.owner, h.remaining) for h in locks.held()] == [("another", None)], "with no end either"


@pytest.mark.parametrize("kind", ["read", "semaphore"])
def test_a_holder_without_a_place_is_not_listed(
    locks: DistributedLock, plain_redis: Any, kind: str, eventually: Callable[..., Any]
) -> None:
    held = locks.rwlock("x").read() if kind == "read" else locks.semaphore("x", slots=1).acquire()
    eventually(lambda: plain_redis.zcard(LIST) == 1)
    assert names(locks) == ["x"]
    plain_redis.zadd(sibling(KEY, "rwlock" if kind == "read" else kind), {held._lease.owner: 1}, xx=True)
    assert locks.held() == [], "its place has run out, and nobody has come since"
    plain_redis.delete(sibling(KEY, "rwlock" if kind == "read" else kind))
    assert locks.held() == []
    held.release()


def test_under_a_prefix(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    one, two, none = (
        make_gov(redis_url=redis_server.url, key_prefix=prefix, socket_timeout=5).locks
        for prefix in ("one:", "two:", "")
    )
    with one.acquire("x") as x, one.rwlock("r").read() as r, two.acquire("y", ttl=700) as y:
        for _ in range(2):
            assert kinds(one) == [("r", "read", r.token), ("x", "lock", x.token)]
            assert kinds(two) == [("y", "lock", y.token)]
            assert none.held() == []
            eventually(lambda: (plain_redis.zcard("one:" + LIST), plain_redis.zcard("two:" + LIST)) == (2, 1))
        assert not plain_redis.exists(LIST)
        assert one.holder("y") is None
        assert one.force_release("y") is False
        assert 500_000 < plain_redis.pttl("two:" + LIST) <= 700_002


def test_held_takes_two_round_trips_and_a_scan_for_outsiders(
    locks: DistributedLock,
    redis_server: RedisServer,
    plain_redis: Any,
    worker: Any,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    worker.run("many = locks.acquire_many([f'{n}' for n in range(30)], ttl=1000)")
    with locks.acquire("x", ttl=1000), locks.semaphore("x", slots=1).acquire(ttl=1000):
        eventually(lambda: plain_redis.zcard(LIST) == 32)
        redis_server.command("CONFIG", "RESETSTAT")
        made = round_trips(locks, monkeypatch)
        assert len(locks.held()) == 32
        assert len(made) == 3
        locks.holder("x")
        assert commands_since_reset(redis_server) - OF_OTHERS == {"zrange", "time", "get", "pttl", "zscore", "scan"}


# -- the list --------------------------------------------------------------------------------------------------------


def test_short_locks_do_not_come_on_the_list(
    locks: DistributedLock, redis_server: RedisServer, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "FIRST_DUE", 1000)
    redis_server.command("CONFIG", "RESETSTAT")
    for _ in range(50):
        locks.acquire("x").release()
    assert "cmdstat_zadd" not in redis_server.command("INFO", "commandstats")


def run_list(locks: DistributedLock, entry: str, ttl_ms: int) -> int:
    assert locks._redis
    return int(locks._redis.run(locks._backend._list_script, (LIST,), entry, str(ttl_ms)))


def test_entries_go_with_their_leases_and_the_list_with_the_last(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    assert run_list(locks, "long", 100_000) == 0
    assert 90_000 < plain_redis.pttl(LIST) <= 100_000
    assert run_list(locks, "short", 80_000) == 0
    assert run_list(locks, "shorter", 70_000) == 0
    assert plain_redis.pttl(LIST) > 90_000, "the longest one's"
    assert plain_redis.zrange(LIST, 0, -1) == ["shorter", "short", "long"]
    assert run_list(locks, "over at once", 1) == 0
    eventually(lambda: run_list(locks, "another", 50_000) > 0)
    assert plain_redis.zrange(LIST, 0, -1) == ["another", "shorter", "short", "long"]
    run_list(locks, "another", 200_000)
    assert plain_redis.zrange(LIST, 0, -1) == ["shorter", "short", "long", "another"], "it is kept there"
    assert 190_000 < plain_redis.pttl(LIST) <= 200_000
    seconds, micros = plain_redis.time()
    until = plain_redis.zscore(LIST, "another")
    assert 190_000 < until - (seconds * 1000 + micros // 1000) <= 200_000
    plain_redis.delete(LIST)
    run_list(locks, "short", 20)
    eventually(lambda: not plain_redis.exists(LIST))


def test_the_list_has_a_ttl_whatever_comes_on_it(locks: DistributedLock, plain_redis: Any) -> None:
    with locks.acquire("x", ttl=1000) as held:
        lease = held._lease
        for left in -0.005, -5, 0.001:  # a renewal that met a slow Redis is over by then
            entry = Renewal(lease._resource, lease.owner, lease.token, left, False, "an entry")
            assert locks._backend.extend_each([entry]) == [(None, True)]
            assert plain_redis.pttl(LIST) != -1


def test_a_release_takes_the_entry_along_in_its_round_trip(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    locks.acquire("x").release()  # Redis knows the scripts then
    locks.rwlock("x").read().release()
    kept = locks.acquire("kept", ttl=1000)
    for take in (
        lambda: locks.acquire("x", ttl=1000),
        lambda: locks.rwlock("x").read(ttl=1000),
        lambda: locks.rwlock("x").write(ttl=1000),
        lambda: locks.semaphore("x", slots=1).acquire(ttl=1000),
    ):
        held = take()
        eventually(lambda: plain_redis.zcard(LIST) == 2)
        with monkeypatch.context() as patched:
            made = round_trips(locks, patched)
            assert held.release() is True
            assert len(made) == 1
        assert plain_redis.zrange(LIST, 0, -1) == [kept._lease._listed]
    kept.release()
    assert not plain_redis.exists(LIST)


def test_after_a_script_flush_too(locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]) -> None:
    held = locks.acquire("x", ttl=1000)
    eventually(lambda: plain_redis.zcard(LIST))
    plain_redis.script_flush()
    assert held.release() is True
    assert not plain_redis.exists(KEY, LIST)


def test_a_flushall_brings_the_entries_back_at_the_next_renewal(
    locks: DistributedLock,
    far: DistributedLock,
    plain_redis: Any,
    eventually: Callable[..., Any],
    renew_now: Callable[[list[HeldLock]], None],
) -> None:
    with locks.acquire("x", ttl=1000) as x, locks.rwlock("r").read(ttl=1000) as r:
        eventually(lambda: names(far) == ["r", "x"])
        plain_redis.flushall()
        assert far.held() == []
        renew_now([x, r])
        eventually(lambda: names(far) == ["r", "x"])
        x.raise_if_lost()


@pytest.mark.usefixtures("renewed_soon")
@pytest.mark.parametrize("kind", ["lock", "semaphore"])
@pytest.mark.parametrize("when", ["from the start", "later"])
def test_a_list_that_fails_costs_nothing_but_a_count(
    locks: DistributedLock, plain_redis: Any, kind: str, when: str, eventually: Callable[..., Any]
) -> None:
    if when == "from the start":
        plain_redis.set(LIST, "of somebody else")
    with locks.acquire("x", ttl=60) if kind == "lock" else locks.semaphore("x", slots=1).acquire(ttl=60) as held:
        first = held._lease.deadline
        if when == "later":
            eventually(lambda: plain_redis.zcard(LIST))
            plain_redis.delete(LIST)
            plain_redis.set(LIST, "of somebody else")
        eventually(lambda: locks.counters.get("locks.unlisted") > 0)
        eventually(lambda: held._lease.deadline > first)
        with pytest.raises(BackendError, match="WRONGTYPE"):
            locks.held()
        assert held.release() is True
    assert plain_redis.get(LIST) == "of somebody else"
    assert not plain_redis.exists(KEY, sibling(KEY, "semaphore"))
    assert locks.counters.get("locks.lost") == 0
    again = locks.acquire("x", timeout=0) if kind == "lock" else locks.semaphore("x", slots=1).acquire(timeout=0)
    assert again.release() is True


def test_entries_of_another_client_on_the_list_are_left_out(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    odd = ["x", "[1]", "{}", '["lock", "a", "b", "x"]', '["lock", "", "b", 1]', '["lock", null, "b", 1]', "[" * 100_000]
    odd += ['["lock", "a", "b", Infinity]', '["read", {"a": 1}, "b", 1]']
    with locks.acquire("mine", ttl=1000):
        eventually(lambda: plain_redis.zcard(LIST), what="it is listed")
        plain_redis.zadd(LIST, dict.fromkeys(odd, 10**15))
        assert [holder.name for holder in locks.held()] == [holder.name for holder in locks.glance()] == ["mine"]
        longest = locks.count_held().longest
        assert longest is not None
        assert (longest.kind, longest.name) == ("lock", "mine")


def test_the_release_of_a_lock_whose_key_is_spoilt_still_says_so(
    locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire("x", ttl=1000)
    eventually(lambda: plain_redis.zcard(LIST))
    plain_redis.delete(KEY)
    plain_redis.hset(KEY, "a", "b")
    with pytest.raises(BackendError, match="WRONGTYPE"):
        held.release()


# -- Redis away ------------------------------------------------------------------------------------------------------


@pytest.fixture
def away(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> DistributedLock:
    """On a Redis that may be killed, which is a matter of refused connections: no timeout is waited for."""
    return make_gov(redis_url=mortal_redis.url, socket_timeout=5).locks


def test_redis_away_the_hosts_lock_file_says_who(
    away: DistributedLock, mortal_redis: RedisServer, make_worker: Callable[..., Any]
) -> None:
    worker = make_worker(redis_url=mortal_redis.url, socket_timeout=5)
    worker.run("held = locks.acquire('x', ttl=1000)")
    away.acquire("was").release()
    files = sorted(os.listdir(away._file_backend.path))
    mortal_redis.kill()
    holder = away.holder("x")
    assert holder
    assert (holder.name, holder.kind, holder.degraded) == ("x", "lock", True)
    assert (holder.owner, holder.token) == (worker.eval("held._lease.owner"), worker.eval("held.token"))
    assert holder.remaining is not None
    assert 900 < holder.remaining <= 1000
    assert away.is_locked("x") is True
    for nobody in "never", "was":
        assert away.holder(nobody) is None
        assert away.is_locked(nobody) is False
    assert sorted(os.listdir(away._file_backend.path)) == files, "a look makes no file"
    assert worker.eval("held.raise_if_lost()") is None, "and disturbs nobody"
    worker.kill()
    assert away.holder("x") is None
    assert away.acquire("x", timeout=PATIENCE).release(), "a look leaves nothing locked"


def open_files(folder: Path) -> list[str]:
    """The files below it that this process has open, by their descriptors."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # of the listing itself, or closed since by another thread
            pass
    return [path for path in found if path.startswith(str(folder))]


def test_redis_away_a_look_leaves_no_file_open_and_makes_no_folder(
    make_gov: Callable[..., GovRedis], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    locks = make_gov(redis_enabled=False).locks
    assert locks.holder("x") is None
    assert not os.path.exists(locks._file_backend.path)
    with locks.acquire("x", timeout=0, ttl=50) as held:
        before = len(open_files(tmp_path))
        for _ in range(5):
            holder = locks.holder("x")
            assert holder
            assert (holder.owner, holder.token, holder.degraded) == (held._lease.owner, held.token, True)
        # A sweep of the folder has a file open for a moment.
        eventually(lambda: len(open_files(tmp_path)) <= before)
    assert locks.holder("x") is None
    assert locks.acquire("x", timeout=0).release()


def test_a_look_tells_a_passed_holder_from_its_passer(make_gov: Callable[..., GovRedis]) -> None:
    locks = make_gov(redis_enabled=False).locks
    stopped, passer = locks._file_backend.open_exclusive(KEY), locks._file_backend.open_exclusive(KEY)
    assert stopped.enter(1, "stopped", clock() + 0.01, may_pass=False)
    deadline = clock() + 20
    while not passer.enter(2, "passer", clock() + 100, may_pass=True):
        assert clock() < deadline
        time.sleep(0.02)
    for _ in range(2):
        holder = locks.holder("x")
        assert holder
        assert (holder.owner, holder.token) == ("passer", 2)
        stopped.leave()  # the passer has no flock, but a record that is honoured
    passer.leave()
    assert locks.holder("x") is None


def test_a_holder_whose_record_ran_out_is_inside_all_the_same(make_gov: Callable[..., GovRedis]) -> None:
    locks = make_gov(redis_enabled=False).locks
    stopped = locks._file_backend.open_exclusive(KEY)
    assert stopped.enter(1, "stopped", clock() - 1, may_pass=False)
    holder = locks.holder("x")
    assert holder
    assert (holder.owner, holder.remaining) == ("stopped", 0)
    stopped.leave()


def test_with_the_fallback_fail_nobody_can_say(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> None:
    failing = make_gov(redis_url=mortal_redis.url, lock_fallback="fail", socket_timeout=5).locks
    with failing.acquire("x", ttl=1000):
        assert failing.is_locked("x")
        mortal_redis.kill()
        for locks in failing, make_gov(redis_enabled=False, lock_fallback="fail").locks:
            for call in locks.holder, locks.is_locked:
                with pytest.raises(LockUnavailable, match="lock:x"):
                    call("x")


def test_methods_that_need_redis_raise_without_it(
    away: DistributedLock, mortal_redis: RedisServer, make_gov: Callable[..., GovRedis]
) -> None:
    with away.acquire("x", ttl=1000):
        mortal_redis.kill()
        for call in away.held, lambda: away.force_release("x"):
            with pytest.raises(BackendUnavailable):
                call()
    disabled = make_gov(redis_enabled=False).locks
    with disabled.acquire("y", timeout=0) as held:
        for call in disabled.held, lambda: disabled.force_release("y"):
            with pytest.raises(LockUnavailable, match="REDIS_ENABLED=0"):
                call()
        assert disabled.is_locked("y")
        held.raise_if_lost()


def test_a_lock_granted_while_redis_was_away_is_not_listed(
    away: DistributedLock, mortal_redis: RedisServer, eventually: Callable[..., Any]
) -> None:
    mortal_redis.kill()
    with away.acquire("x", timeout=20) as held:
        assert held.degraded
        mortal_redis.restart(data="empty")
        assert away._redis
        eventually(lambda: away._redis.breaker.closed)
        with away.acquire("y", timeout=20):
            eventually(lambda: mortal_redis.command("ZCARD", LIST) == 1)
            assert names(away) == ["y"]
        assert held._lease.begin() is None, "Redis is asked for nothing"
        assert mortal_redis.command("ZCARD", LIST) == 0
        assert away.held() == []


def test_a_full_pool_is_no_outage_and_no_answer(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, far: DistributedLock
) -> None:
    locks = make_gov(redis_url=redis_server.url, socket_timeout=0.05, redis_connections=1).locks
    with far.acquire("x"):
        assert locks._redis
        taken = locks._redis._pool.take(1)
        try:
            with pytest.raises(BackendUnavailable):
                locks.is_locked("x")  # it is, and this host's files do not tell
        finally:
            locks._redis._pool.drop(taken)


# -- force_release ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.fixture
def waiting(
    pool: ThreadPoolExecutor, plain_redis: Any, eventually: Callable[..., Any]
) -> Callable[[DistributedLock], Future[HeldLock]]:
    """Another thread that waits for the lock, once it does; the first that is asked for is the first in the queue."""
    asked = [0]

    def wait(locks: DistributedLock) -> Future[HeldLock]:
        future = pool.submit(lambda: locks.acquire("x", timeout=60, ttl=100))
        asked[0] += 1
        eventually(lambda: plain_redis.zcard(QUEUE) == asked[0])
        return future

    return wait


@pytest.mark.usefixtures("renewed_soon")
def test_a_forced_lock_goes_to_the_longest_waiter_and_the_holder_finds_out(
    locks: DistributedLock, far: DistributedLock, waiting: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    held = locks.acquire("x", ttl=60)
    lost = threading.Event()
    held.on_lost(lost.set)
    first, second = waiting(far), waiting(far)
    held.raise_if_lost()
    assert locks.force_release("x") is True
    with first.result(PATIENCE) as mine:
        assert mine.token > held.token
        eventually(lambda: plain_redis.pttl(KEY) > 90_000)
        assert int(plain_redis.get(FENCE)) == mine.token
        assert lost.wait(PATIENCE), "at its next renewal"
        with pytest.raises(LockLost, match="somebody else"):
            held.raise_if_lost()
        assert held.remaining() == 0
        assert held.release() is False
        holder = far.holder("x")
        assert holder
        assert (holder.owner, holder.token) == (mine._lease.owner, mine.token)
        mine.extend(100)
        assert not second.done()
    with second.result(PATIENCE) as last:
        assert last.token > mine.token
    assert locks.counters.get("locks.lost") == 1
    assert far.counters.get("locks.lost") == 0


def test_without_a_waiter_it_is_free_and_stays_lost_to_its_holder(
    locks: DistributedLock, far: DistributedLock, plain_redis: Any
) -> None:
    held = locks.acquire("x", ttl=1000)
    assert far.force_release("x") is True
    assert not plain_redis.exists(KEY)
    assert int(plain_redis.get(FENCE)) > held.token
    assert 3_500_000 < plain_redis.pttl(FENCE) <= 3_600_000
    with pytest.raises(LockLost):
        held.extend()
    assert not plain_redis.exists(KEY), "an extension does not bring it back"
    with pytest.raises(LockLost):
        held.raise_if_lost()
    with far.acquire("x", timeout=0) as next_one:
        assert next_one.token > held.token
        assert held.release() is False
    held = locks.acquire("x", ttl=1000)
    far.force_release("x")
    assert held.release() is False, "before it has found out"
    with pytest.raises(LockLost), locks.acquire("x", ttl=1000):
        far.force_release("x")
    assert not plain_redis.exists(KEY)


def test_the_token_rises_over_a_clock_that_was_set_back(
    locks: DistributedLock, far: DistributedLock, waiting: Any, plain_redis: Any
) -> None:
    ahead = time.time_ns() // 1000 + 10**12
    plain_redis.set(FENCE, ahead)
    held = locks.acquire("x", ttl=1000)
    assert held.token == ahead + 1
    future = waiting(far)
    assert locks.force_release("x") is True
    with future.result(PATIENCE) as mine:
        assert mine.token == ahead + 2
        assert far.force_release("x") is True
        assert int(plain_redis.get(FENCE)) == ahead + 3
    held.release()


@pytest.mark.parametrize("ttl", [{}, {"px": 60_000}])
def test_an_outsiders_lock_is_freed_too(
    locks: DistributedLock, waiting: Any, plain_redis: Any, ttl: dict[str, int]
) -> None:
    plain_redis.set(KEY, "async", **ttl)
    assert locks.force_release("x") is True
    assert not plain_redis.exists(KEY)
    plain_redis.set(KEY, "async", **ttl)
    future = waiting(locks)
    assert locks.force_release("x") is True
    assert future.result(PATIENCE).release() is True


def test_a_free_lock_is_not_forced(locks: DistributedLock, plain_redis: Any) -> None:
    assert locks.force_release("x") is False
    assert plain_redis.keys("*") == []
    with locks.acquire("x"):
        pass
    fence = plain_redis.get(FENCE)
    assert locks.force_release("x") is False
    assert plain_redis.get(FENCE) == fence
    held = locks.acquire("x", ttl=0.05, renew=False)
    while plain_redis.exists(KEY):
        time.sleep(0.005)
    assert locks.force_release("x") is False
    held.release()


@pytest.mark.usefixtures("renewed_soon")
def test_on_the_holders_own_host_nobody_gets_in_before_it_lets_go(
    locks: DistributedLock, worker: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    worker.run("import threading\nlost = threading.Event()\nheld = locks.acquire('x', ttl=60)\nheld.on_lost(lost.set)")
    assert locks.force_release("x") is True
    assert worker.eval("lost.wait(60)") is True
    vouched = worker.eval("held._lease.host_lock._vouched_until")
    eventually(lambda: worker.eval("held._lease.host_lock._vouched_until") > vouched, what="it vouches, though lost")
    with pytest.raises(LockTimeout):
        locks.acquire("x", timeout=0.5)
    assert locks.try_acquire("x") is None
    assert worker.eval("held.release()") is False
    assert locks.acquire("x", timeout=0).release()


def test_a_waiter_of_the_holders_own_host_leaves_it_to_the_next(
    locks: DistributedLock, far: DistributedLock, waiting: Any, worker: Any
) -> None:
    worker.run("held = locks.acquire('x', ttl=1000)")
    near, elsewhere = waiting(locks), waiting(far)
    assert locks.force_release("x") is True
    with elsewhere.result(PATIENCE):
        assert not near.done()
        worker.kill()
        assert not near.done()
    assert near.result(PATIENCE).release() is True


def test_a_killed_holders_lock_is_forced_and_acquired_at_once_on_another_host(
    locks: DistributedLock, far: DistributedLock, worker: Any
) -> None:
    worker.run("held = locks.acquire('x', ttl=1000)")
    token = worker.eval("held.token")
    worker.kill()
    assert far.try_acquire("x") is None
    assert far.force_release("x") is True
    with far.acquire("x", timeout=0) as held:
        assert held.token > token
