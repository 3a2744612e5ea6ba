"""Read/write locks and semaphores on real servers: who is in, who is next, what is left, and what outlives Redis."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from support import PATIENCE

from govredis import BackendUnavailable, GovRedis, HeldLock, LockLost, LockTimeout, LockUnavailable
from govredis.client import Pending, RedisNode
from govredis.locks import DistributedLock
from govredis.locks import lease as lease_module
from govredis.locks.acquisition import GRACE
from govredis.locks.host_lock.shared import ReaderHostLock
from govredis.locks.shared_locks import shared_lock_keys
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

RW, SEM = shared_lock_keys("lock:x", "rwlock"), shared_lock_keys("lock:x", "semaphore")
KINDS = ["read", "write", "semaphore"]
Take = Callable[..., HeldLock]


def taker(locks: DistributedLock, kind: str, slots: int = 1, name: str = "x") -> Take:
    """The method that takes a lock of this kind."""
    if kind == "semaphore":
        return locks.semaphore(name, slots=slots).acquire
    return locks.rwlock(name).read if kind == "read" else locks.rwlock(name).write


def keys_of(kind: str, name: str = "x") -> tuple[str, ...]:
    return shared_lock_keys(f"lock:{name}", "semaphore" if kind == "semaphore" else "rwlock")


def rival(kind: str) -> str:
    """A kind that cannot be held beside it."""
    return "semaphore" if kind == "semaphore" else "write"


CALL = {
    "read": "locks.rwlock('x').read",
    "write": "locks.rwlock('x').write",
    "semaphore": "locks.semaphore('x', slots=1).acquire",
}


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def elsewhere(make_gov: Callable[..., GovRedis], redis_server: RedisServer, tmp_path: Path) -> DistributedLock:
    """Another host, as far as lock files go."""
    return make_gov(redis_url=redis_server.url, socket_timeout=5, lock_folder=str(tmp_path / "elsewhere")).locks


@pytest.fixture
def read(locks: DistributedLock) -> Take:
    return locks.rwlock("x").read


@pytest.fixture
def write(locks: DistributedLock) -> Take:
    return locks.rwlock("x").write


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


@pytest.fixture
def begin(
    pool: ThreadPoolExecutor, plain_redis: Any, eventually: Callable[..., Any]
) -> Callable[..., Future[HeldLock]]:
    """Another thread that waits for it, once it does."""

    def wait(take: Take, queue: str = RW[2], **options: Any) -> Future[HeldLock]:
        before = plain_redis.zcard(queue)
        future = pool.submit(lambda: take(**{"timeout": 60, **options}))
        eventually(lambda: plain_redis.zcard(queue) > before)
        return future

    return wait


def refused(take: Take) -> bool:
    """To one that does not wait."""
    try:
        take(timeout=0).release()
    except LockTimeout:
        return True
    return False


def let_go(held: list[HeldLock]) -> bool:
    """Release all. Returns whether all were held."""
    return False not in [h.release() for h in held]


def nothing_is_left(plain_redis: Any, of: tuple[str, ...]) -> bool:
    """But the fence; for seconds, who released last, and lists of those that looked just when they were there."""
    left = [key for key in plain_redis.keys("*lock:x*") if not key.startswith(of[2] + ":")]
    return set(left) <= {of[1], of[3]} and plain_redis.hkeys(of[3]) in ([], [""])


def raised(call: Callable[[], Any], error: type[Exception]) -> bool:
    try:
        call()
    except error:
        return True
    return False


# -- who is in ---------------------------------------------------------------------------------------------------------


def test_readers_share_it_and_a_writer_is_alone(read: Take, write: Take, plain_redis: Any) -> None:
    readers = [read(timeout=0) for _ in range(5)]
    assert plain_redis.zcard(RW[0]) == 5
    assert refused(write)
    for held in readers[1:]:
        assert held.release()
    assert refused(write), "one is left"
    with read(timeout=0):
        assert readers[0].release()
        assert refused(write)
    with write(timeout=0):
        assert refused(read)
        assert refused(write)
        started = time.monotonic()
        with pytest.raises(LockTimeout):
            read(timeout=0.2)
        assert time.monotonic() - started >= 0.2
    read(timeout=0).release()
    assert nothing_is_left(plain_redis, RW)


def test_a_semaphore_has_so_many_slots(locks: DistributedLock, plain_redis: Any) -> None:
    take = locks.semaphore("x", slots=3).acquire
    held = [take(timeout=0) for _ in range(3)]
    assert refused(take)
    assert held.pop(1).release()
    held.append(take(timeout=0))
    assert refused(take)
    assert len({h.token for h in held}) == 3
    for h in held:
        assert h.release()
    assert nothing_is_left(plain_redis, SEM)
    one = locks.semaphore("x", slots=1).acquire
    with one(timeout=0):
        assert refused(one)


def test_as_many_slots_as_there_may_be(locks: DistributedLock) -> None:
    take = locks.semaphore("x", slots=1000).acquire
    held = [take(timeout=0) for _ in range(20)]
    assert let_go(held)


def test_lock_rwlock_and_semaphore_of_one_name_are_independent(locks: DistributedLock) -> None:
    with (
        locks.acquire("x", timeout=0),
        locks.rwlock("x").write(timeout=0),
        locks.semaphore("x", slots=1).acquire(timeout=0),
        locks.acquire("x#rwlock", timeout=0),
        locks.acquire("x#semaphore", timeout=0),
        locks.rwlock("y").write(timeout=0),
        locks.semaphore("y", slots=1).acquire(timeout=0),
    ):
        assert refused(locks.rwlock("x").read)
        assert refused(locks.semaphore("x", slots=1).acquire)


def test_the_prefix_keeps_them_apart(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
    with (
        make_gov(redis_url=redis_server.url, key_prefix="a:").locks.rwlock("x").write(timeout=0) as one,
        make_gov(redis_url=redis_server.url, key_prefix="b:").locks.rwlock("x").write(timeout=0) as other,
    ):
        assert one.name == other.name == "x"


# -- who is next -------------------------------------------------------------------------------------------------------


def test_a_waiting_writer_lets_no_later_reader_in_and_those_behind_it_come_next_together(
    read: Take, write: Take, begin: Any, plain_redis: Any, eventually: Any
) -> None:
    first = read()
    w1 = begin(write)
    assert refused(read)
    assert raised(lambda: read(timeout=0.1), LockTimeout)
    r1, r2 = begin(read), begin(read)
    w2 = begin(write)
    r3 = begin(read)
    assert refused(read)
    assert plain_redis.zcard(RW[0]) == 1
    assert first.release()
    writer = w1.result(PATIENCE)
    assert not any(f.done() for f in (r1, r2, w2, r3))
    assert refused(read)
    assert writer.release()
    readers = [r1.result(PATIENCE), r2.result(PATIENCE)]
    assert plain_redis.zcard(RW[0]) == 2
    assert plain_redis.zcard(RW[2]) == 2
    assert refused(read), "a writer waits"
    assert readers[0].release()
    assert plain_redis.zcard(RW[0]) == 1
    assert readers[1].release()
    second = w2.result(PATIENCE)
    assert not r3.done()
    assert second.release()
    last = r3.result(PATIENCE)
    assert last.release()
    assert first.token < writer.token < min(r.token for r in readers)
    assert max(r.token for r in readers) < second.token < last.token
    eventually(lambda: nothing_is_left(plain_redis, RW))


def test_a_writer_that_gives_up_lets_those_behind_it_in(
    read: Take, write: Take, begin: Any, plain_redis: Any, pool: ThreadPoolExecutor, eventually: Any
) -> None:
    with read():
        gives_up = pool.submit(lambda: raised(lambda: write(timeout=0.8), LockTimeout))
        eventually(lambda: plain_redis.zcard(RW[2]) == 1)
        behind = [begin(read), begin(read)]
        assert gives_up.result(PATIENCE)
        held = [f.result(PATIENCE) for f in behind]
        assert plain_redis.zcard(RW[0]) == 3
        for h in held:
            h.release()


@pytest.mark.parametrize("kind", ["mixed", "semaphore"])
def test_in_the_order_of_arrival(
    locks: DistributedLock,
    begin: Any,
    kind: str,
    plain_redis: Any,
    make_worker: Any,
    redis_server: RedisServer,
    eventually: Any,
) -> None:
    semaphore = kind == "semaphore"
    of = SEM if semaphore else RW
    kinds = ["semaphore"] * 5 if semaphore else ["write", "read", "write", "write", "read"]
    worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
    first = taker(locks, kinds[0])()
    waiting: list[Any] = [begin(taker(locks, k), of[2]) for k in kinds[:3]]
    worker.begin(f"[h := {CALL[kinds[3]]}(timeout=60)] and h.token")
    eventually(lambda: plain_redis.zcard(of[2]) == 4)
    waiting += [worker, begin(taker(locks, kinds[4]), of[2])]
    order = plain_redis.zrange(of[2], 0, -1)
    tokens = [first.token]
    first.release()
    for n, turn in enumerate(waiting):
        tokens.append(turn.answer() if turn is worker else turn.result(PATIENCE).token)
        assert plain_redis.zrange(of[0], 0, -1) == [order[n]]
        assert plain_redis.zrange(of[2], 0, -1) == order[n + 1 :]
        assert worker.eval("h.release()") if turn is worker else turn.result().release()
    assert tokens == sorted(set(tokens))


def test_a_semaphore_hands_each_slot_to_the_longest_waiter(
    locks: DistributedLock, begin: Any, plain_redis: Any
) -> None:
    take = locks.semaphore("x", slots=2).acquire
    held = [take(), take()]
    waiting = [begin(take, SEM[2]) for _ in range(4)]
    assert refused(take)
    for n, turn in enumerate(waiting):
        assert held.pop(0).release()
        held.append(turn.result(PATIENCE))
        assert plain_redis.zcard(SEM[0]) == 2
        assert not any(later.done() for later in waiting[n + 1 :])
        assert refused(take)
    assert let_go(held)


@pytest.mark.parametrize("steady", ["read", "write"])
def test_nobody_starves_beside_a_steady_stream(
    read: Take, write: Take, pool: ThreadPoolExecutor, steady: str, eventually: Any
) -> None:
    over = threading.Event()
    seen: Counter[str] = Counter()

    def stream() -> None:
        while not over.is_set():
            with (read if steady == "read" else write)(timeout=60):
                seen["stream"] += 1
                time.sleep(0.005)

    streams = [pool.submit(stream) for _ in range(4)]
    try:
        eventually(lambda: seen["stream"] > 8)
        for _ in range(5):
            with (write if steady == "read" else read)(timeout=60):
                pass
    finally:
        over.set()
    for future in streams:
        future.result(60)


def test_threads_never_overlap_as_they_must_not_and_all_get_their_turns(
    locks: DistributedLock, pool: ThreadPoolExecutor
) -> None:
    inside: Counter[str] = Counter()
    most: Counter[str] = Counter()
    wrong: list[dict[str, int]] = []
    mutex = threading.Lock()

    def turn(kind: str) -> None:
        with taker(locks, kind, slots=3)(timeout=60):
            with mutex:
                inside[kind] += 1
                most[kind] = max(most[kind], inside[kind])
                if inside["write"] > 1 or (inside["write"] and inside["read"]) or inside["semaphore"] > 3:
                    wrong.append(dict(inside))
            time.sleep(0.003)
            with mutex:
                inside[kind] -= 1

    turns = [pool.submit(turn, kind) for _ in range(12) for kind in ("read", "read", "write", "semaphore", "semaphore")]
    for future in turns:
        future.result(60)
    assert not wrong
    assert most["write"] == 1
    assert inside.total() == 0


# -- those that die ----------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(make_worker: Callable[..., Any], redis_server: RedisServer) -> Callable[..., Any]:
    """Another process that holds one of each kind, by the name of its kind."""

    def hold(ttl: float, renew: bool = True) -> Any:
        worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
        calls = [CALL[kind].replace("'x'", repr(kind)) + f"(ttl={ttl}, renew={renew})" for kind in KINDS]
        worker.run(f"held = dict(zip({KINDS}, [{', '.join(calls)}]))")
        return worker

    return hold


def test_a_killed_holder_is_reclaimed_within_its_ttl(
    locks: DistributedLock, holder: Callable[..., Any], plain_redis: Any
) -> None:
    worker = holder(60, renew=False)
    theirs = worker.eval("{kind: h.token for kind, h in held.items()}")
    takes = {kind: taker(locks, rival(kind), name=kind) for kind in KINDS}
    assert all(map(refused, takes.values()))
    worker.run("for h in held.values():\n    h.extend(1)")
    worker.kill()
    for kind, take in takes.items():
        ends = [end / 1e6 for _, end in plain_redis.zrange(keys_of(kind, kind)[0], 0, -1, withscores=True)]
        assert max(ends, default=0) <= plain_redis.time()[0] + 2
        with take(timeout=30) as held:
            assert not held.degraded
            assert held.token > theirs[kind]
            assert plain_redis.zcard(keys_of(kind, kind)[0]) == 1


def test_a_killed_holder_among_several_frees_its_slot_only(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer, plain_redis: Any
) -> None:
    take = locks.semaphore("x", slots=2).acquire
    worker = make_worker(redis_url=redis_server.url)
    with take(ttl=60):
        worker.run("held = locks.semaphore('x', slots=2).acquire(ttl=1)")
        worker.kill()
        with take(timeout=30):
            assert refused(take)
            assert plain_redis.zcard(SEM[0]) == 2


@pytest.mark.parametrize("kind", ["write", "semaphore"])
def test_a_killed_waiter_is_passed_over(
    locks: DistributedLock,
    make_worker: Callable[..., Any],
    redis_server: RedisServer,
    plain_redis: Any,
    begin: Any,
    eventually: Any,
    kind: str,
) -> None:
    of = keys_of(kind)
    worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
    first = taker(locks, "read" if kind == "write" else kind)()
    worker.begin(f"{CALL[kind]}(timeout=60).token")
    eventually(lambda: plain_redis.zcard(of[2]) == 1)
    behind = begin(taker(locks, "read" if kind == "write" else kind), of[2])
    assert not behind.done()
    worker.kill()
    if kind == "semaphore":
        assert first.release()
    held = behind.result(PATIENCE)
    assert first.release() is (kind == "write")
    assert held.release()
    eventually(lambda: nothing_is_left(plain_redis, of))


def test_a_holder_stopped_past_its_lease_keeps_its_host_out_until_it_is_killed(
    locks: DistributedLock,
    elsewhere: DistributedLock,
    holder: Callable[..., Any],
    plain_redis: Any,
    eventually: Any,
) -> None:
    worker = holder(0.5)
    worker.stop()
    for kind in KINDS:
        eventually(lambda kind=kind: not plain_redis.exists(keys_of(kind, kind)[0]))
        with pytest.raises(LockTimeout):
            taker(locks, rival(kind), name=kind)(timeout=0.2)
        taker(elsewhere, rival(kind), name=kind)(timeout=10).release()
    taker(locks, "read", name="read")(timeout=0).release()
    worker.kill()
    for kind in KINDS:
        taker(locks, rival(kind), name=kind)(timeout=0).release()


def test_a_stopped_holder_that_wakes_up_knows_that_it_has_lost_it(
    locks: DistributedLock,
    elsewhere: DistributedLock,
    holder: Callable[..., Any],
    plain_redis: Any,
    eventually: Any,
) -> None:
    worker = holder(0.5)
    worker.stop()
    for kind in KINDS:
        eventually(lambda kind=kind: not plain_redis.exists(keys_of(kind, kind)[0]))
    newer = [taker(elsewhere, rival(kind), name=kind)(timeout=10) for kind in KINDS]
    worker.resume()
    for kind in KINDS:
        assert worker.eval(f"held[{kind!r}].raise_if_lost()") == "LockLost"
        assert worker.eval(f"held[{kind!r}].release()") is False
        assert plain_redis.zcard(keys_of(kind, kind)[0]) == 1
    assert let_go(newer)
    for kind in KINDS:
        taker(locks, rival(kind), name=kind)(timeout=0).release()


# -- leases ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("renewed_soon")
def test_shared_locks_are_renewed_past_their_ttl(locks: DistributedLock, plain_redis: Any, eventually: Any) -> None:
    with (
        locks.rwlock("x").read(ttl=60) as one,
        locks.rwlock("x").read(ttl=60) as two,
        locks.rwlock("y").write(ttl=60) as three,
        locks.semaphore("x", slots=1).acquire(ttl=60) as four,
    ):
        for h in one, two, three, four:
            first, until = h._lease.deadline, plain_redis.zscore(h._lease.key, h._lease.owner)
            eventually(lambda h=h, first=first: h._lease.deadline > first)
            eventually(lambda h=h, until=until: plain_redis.zscore(h._lease.key, h._lease.owner) > until)
        for h in one, two, three, four:
            h.raise_if_lost()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"ttl": 0.3, "renew": False}, {"ttl": 0.3, "max_hold": 0.1}])
def test_renewed_no_more_it_ends_and_says_so_and_is_still_inside_on_its_host(
    locks: DistributedLock, elsewhere: DistributedLock, eventually: Any, kind: str, how: Any
) -> None:
    lost = threading.Event()
    other = rival(kind)
    with pytest.raises(LockLost), taker(locks, kind)(**how) as held:
        held.on_lost(lost.set)
        assert lost.wait(PATIENCE)
        with pytest.raises(LockLost):
            held.raise_if_lost()
        with pytest.raises(LockLost):
            held.extend()
        assert held.remaining() == 0
        taker(elsewhere, other)(timeout=10).release()
        assert refused(taker(locks, other))
    assert held.release() is False
    taker(locks, other)(timeout=10).release()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_redis_tells_of_is_told(locks: DistributedLock, plain_redis: Any, kind: str) -> None:
    lost = threading.Event()
    with pytest.raises(LockLost), taker(locks, kind)(ttl=60) as held:
        held.on_lost(lost.set)
        plain_redis.delete(keys_of(kind)[0])  # not all data is lost, so a missing holder was taken off
        with pytest.raises(LockLost):
            held.extend()
        assert lost.wait(PATIENCE)
    with pytest.raises(ZeroDivisionError), taker(locks, kind)(ttl=60):
        plain_redis.delete(keys_of(kind)[0])
        raise ZeroDivisionError


def test_an_extension_is_the_holders_own(read: Take, plain_redis: Any) -> None:
    with read(ttl=500, renew=False) as one, read(ttl=500, renew=False) as other:
        one.extend(10_000)
        assert 9000 < one.remaining() <= 10_000
        assert other.remaining() <= 500
        ends = dict(plain_redis.zrange(RW[0], 0, -1, withscores=True))
        assert ends[one._lease.owner] - ends[other._lease.owner] > 9000e6
        assert plain_redis.pttl(RW[0]) > 9_000_000
        other.extend(100)
        assert other.remaining() <= 100
        assert plain_redis.pttl(RW[0]) > 8_000_000
        assert plain_redis.zscore(RW[0], other._lease.owner) < ends[other._lease.owner]


@pytest.mark.parametrize("kind", KINDS)
def test_release_is_idempotent_and_leaves_nothing(
    locks: DistributedLock, plain_redis: Any, kind: str, not_listed: None
) -> None:
    of = keys_of(kind)
    held = taker(locks, kind)(ttl=60)
    assert held.release() is True
    assert held.release() is False
    assert set(plain_redis.keys("*")) <= {of[1], of[3]}
    assert plain_redis.pttl(of[3]) <= 10_000
    again = taker(locks, kind)(timeout=0)
    assert held.release() is False
    assert plain_redis.zrange(of[0], 0, -1) == [again._lease.owner]
    assert again.release()


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_whose_reply_was_lost_is_no_loss_whatever_others_release(
    locks: DistributedLock, elsewhere: DistributedLock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    take, other = (taker(at, kind, slots=2) for at in (locks, elsewhere))
    assert locks._redis
    take().release()  # the script is known
    exchange, cut = locks._redis._exchange, []

    def cut_after(pool: Any, connection: Any, packed: bytes, *args: Any) -> Any:
        reply = exchange(pool, connection, packed, *args)
        if locks._shared_backend.release_script.sha.encode() in packed and not cut:
            cut.append(True)
            connection.disconnect()
            assert (theirs or other(timeout=0)).release()
            raise redis_py.ConnectionError("cut")
        return reply

    held = take(ttl=60)
    theirs = other(ttl=60) if kind != "write" else None
    monkeypatch.setattr(locks._redis, "_exchange", cut_after)
    assert held.release() is True
    assert cut


@pytest.mark.parametrize("kind", KINDS)
def test_a_handle_in_a_forked_child_is_inert(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer, plain_redis: Any, kind: str
) -> None:
    worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
    other = rival(kind)
    worker.run(f"held = {CALL[kind]}(ttl=60)")
    worker.run(
        "def child():\n"
        "    try:\n"
        "        held.raise_if_lost()\n"
        "    except LockLost:\n"
        "        host_lock = held._lease.host_lock\n"
        "        return held.release(), held.remaining(), host_lock.inside, len(host_lock._files)\n"
    )
    assert worker.eval("in_child(child)") == "(False, 0.0, False, 0)"
    assert worker.eval(f"in_child(lambda: {CALL[other]}(timeout=0))") == "raised LockTimeout('" + (
        worker.eval("held._lease.key") + " is held by another')"
    )
    assert worker.eval("held.raise_if_lost()") is None
    plain_redis.delete(keys_of(kind)[0])
    assert refused(taker(locks, other)), "the child has not unlocked its parent's file"
    assert worker.eval("held.release()") is False
    taker(locks, other)(timeout=10).release()


@pytest.mark.parametrize("kind", KINDS)
def test_collected_while_held_it_ends_with_its_lease(
    locks: DistributedLock, plain_redis: Any, eventually: Any, kind: str
) -> None:
    with pytest.warns(ResourceWarning, match="collected"):
        taker(locks, kind)(ttl=0.5)
    eventually(lambda: not plain_redis.exists(keys_of(kind)[0]))
    taker(locks, rival(kind))(timeout=10).release()


# -- arguments, tokens, keys -------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_is_sent(
    locks: DistributedLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(RedisNode, "_round_trip", lambda *args, **_: sent.append(args))
    names: list[Any] = ["", "a{b", "a}b", "a\nb", "x" * 513, "\ud800", 5.0, None, b"x"]
    for name in names:
        with pytest.raises(ValueError, match="lock name"):
            locks.rwlock(name)
        with pytest.raises(ValueError, match="lock name"):
            locks.semaphore(name, slots=1)
    slots: list[Any] = [0, -1, 1001, 1.0, "3", True, None, math.inf]
    for number in slots:
        with pytest.raises(ValueError, match="slots"):
            locks.semaphore("x", slots=number)
    bad: list[tuple[str, Any]] = [
        *[("timeout", value) for value in (-1, math.nan, math.inf, "5", True)],
        *[(what, value) for what in ("ttl", "max_hold") for value in (0, -1, math.nan, math.inf, "5", True)],
    ]
    for kind, (what, value) in itertools.product(KINDS, bad):
        with pytest.raises(ValueError, match=what):
            taker(locks, kind)(**{what: value})
    assert not sent


@pytest.mark.parametrize("ahead", [0, 10**12])
def test_tokens_rise_over_release_expiry_loss_of_data_and_degraded_grants(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, eventually: Any, ahead: int
) -> None:
    locks = make_gov(redis_url=mortal_redis.url, socket_timeout=5).locks
    granted: list[tuple[str, int]] = []

    def one(kind: str, degraded: bool = False) -> None:
        with taker(locks, kind)(timeout=30) as held:
            assert held.degraded is degraded
            granted.append((kind, held.token))

    for kind in "write", "read", "read", "write":
        one(kind)
    for kind in "write", "read":
        held = taker(locks, kind)(ttl=0.05, renew=False)
        granted.append((kind, held.token))
        eventually(lambda: not mortal_redis.command("EXISTS", RW[0]))
        held.release()
    if ahead:
        # A clock that was far ahead: once that data is lost, only the host's file knows.
        last = granted[-1][1] + ahead
        mortal_redis.command("SET", RW[1], f"{last} {last} {granted[0][1]}")
        one("write")
        assert granted[-1][1] > last
    for kind in "write", "read", "write":
        mortal_redis.command("FLUSHALL")
        one(kind)
    one("read")
    mortal_redis.kill()
    locks.acquire("past the grace", timeout=30).release()
    for kind in "write", "write", "read", "write":
        one(kind, degraded=True)
    mortal_redis.restart("empty")
    eventually(lambda: locks._redis and locks._redis.breaker.closed)
    for kind in "read", "write", "read", "write":
        one(kind)
    tokens = [token for _, token in granted]
    if not ahead:
        assert tokens == sorted(set(tokens))
    for n, token in enumerate(tokens):
        # The host keeps the last writer's; over readers' the clocks rise.
        assert token > max([0, *(t for kind, t in granted[:n] if kind == "write")])


def test_every_key_has_a_ttl_at_every_moment(
    locks: DistributedLock, plain_redis: Any, pool: ThreadPoolExecutor, eventually: Any
) -> None:
    over = threading.Event()
    done: Counter[str] = Counter()

    def turn(kind: str) -> None:
        while not over.is_set():
            try:
                with taker(locks, kind, slots=2)(timeout=0.05 if done[kind] % 3 == 0 else 60, ttl=60):
                    done[kind] += 1
            except LockTimeout:
                done[kind] += 1

    turns = [pool.submit(turn, kind) for kind in KINDS * 3]
    check = (
        "local without = {} for _, key in ipairs(redis.call('KEYS', '*')) do"
        " if redis.call('PTTL', key) == -1 then without[#without + 1] = key end end return without"
    )
    without: list[str] = []

    def looked() -> bool:
        without.extend(plain_redis.eval(check, 0))
        return bool(without) or min(done[kind] for kind in KINDS) > 30

    try:
        eventually(looked, 60)
    finally:
        over.set()
    for future in turns:
        future.result(60)
    assert not without
    assert 0 < plain_redis.pttl(RW[1]) <= 2 * 3_600_000
    eventually(lambda: nothing_is_left(plain_redis, RW) or plain_redis.exists(*SEM))


def test_held_locks_are_listed(locks: DistributedLock, elsewhere: DistributedLock, eventually: Any) -> None:
    with locks.rwlock("x").read() as one, locks.rwlock("x").read() as two, locks.semaphore("x", slots=1).acquire() as s:
        assert [(h.kind, h.token) for h in locks.held()] == [
            ("read", one.token),
            ("read", two.token),
            ("semaphore", s.token),
        ]
    assert locks.held() == []
    with locks.rwlock("x").write() as w:
        eventually(lambda: [(h.kind, h.token) for h in elsewhere.held()] == [("write", w.token)])


# -- loss of data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "semaphore"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_after_a_flushall_each_of_several_gets_its_place_back_in_any_order(
    locks: DistributedLock, elsewhere: DistributedLock, plain_redis: Any, kind: str, order: tuple[int, ...]
) -> None:
    hosts = [locks, locks, elsewhere]
    held = [taker(host, kind, slots=3)(ttl=60) for host in hosts]
    plain_redis.flushall()
    for n in order:
        held[n].extend()
    assert plain_redis.zcard(keys_of(kind)[0]) == 3
    assert refused(taker(elsewhere, rival(kind), slots=3))
    assert let_go(held)


@pytest.mark.usefixtures("renewed_soon")
def test_after_a_flushall_they_are_renewed_as_if_nothing_had_been(
    read: Take, locks: DistributedLock, elsewhere: DistributedLock, plain_redis: Any, eventually: Any
) -> None:
    semaphore = locks.semaphore("x", slots=2).acquire
    with read(ttl=60), elsewhere.rwlock("x").read(ttl=60), semaphore(ttl=60), semaphore(ttl=60):
        plain_redis.flushall()
        eventually(lambda: (plain_redis.zcard(RW[0]), plain_redis.zcard(SEM[0])) == (2, 2))


def test_after_a_flushall_a_reader_has_lost_it_where_a_writer_came_first(
    read: Take, elsewhere: DistributedLock, plain_redis: Any
) -> None:
    readers = [read(ttl=60), read(ttl=60)]
    plain_redis.flushall()
    readers[0].extend()
    assert refused(elsewhere.rwlock("x").write)
    plain_redis.flushall()
    with elsewhere.rwlock("x").write(timeout=0):
        for held in readers:
            with pytest.raises(LockLost):
                held.extend()
    assert [held.release() for held in readers] == [False, False]
    readers = [read(ttl=60), read(ttl=60)]
    plain_redis.flushall()
    elsewhere.rwlock("x").write(timeout=0).release()
    for held in readers:
        with pytest.raises(LockLost):
            held.extend()
        held.release()


def test_after_a_flushall_a_writer_has_lost_it_where_anybody_came_first(
    write: Take, elsewhere: DistributedLock, plain_redis: Any
) -> None:
    with write(ttl=60) as held:
        plain_redis.flushall()
        held.extend()
        assert refused(elsewhere.rwlock("x").read)
    for kind in "read", "write":
        held = write(ttl=60)
        plain_redis.flushall()
        taker(elsewhere, kind)(timeout=0).release()
        with pytest.raises(LockLost):
            held.extend()
        held.release()


def test_a_flushall_lets_nobody_on_the_host_in_beside_the_holders(
    locks: DistributedLock, read: Take, write: Take, plain_redis: Any
) -> None:
    take = locks.semaphore("x", slots=2).acquire
    held = [take(), take()]
    plain_redis.flushall()
    assert refused(take)
    assert [h.release() for h in held] == [False, False]
    reader = read()
    plain_redis.flushall()
    assert refused(write)
    with read(timeout=0):
        reader.release()
        assert refused(write)
    writer = write()
    plain_redis.flushall()
    assert refused(read)
    assert refused(write)
    writer.release()
    write(timeout=0).release()


def test_a_reader_that_a_later_writer_has_overtaken_does_not_go_in(locks: DistributedLock, write: Take) -> None:
    with write() as writer:
        pass
    host_lock = locks._file_backend.open(writer._lease.key, ReaderHostLock)
    for token in writer.token - 1, writer.token:
        assert not host_lock.enter(token, "late", math.inf, may_pass=True)
    write(timeout=0).release()  # who was refused has locked nothing
    assert not host_lock.enter(writer.token + 1, "late", math.inf, may_pass=True), "there was another writer"
    assert host_lock.enter(host_lock.last_token() + 1, "in time", math.inf, may_pass=False)
    assert refused(write)
    host_lock.leave()
    write(timeout=0).release()


# -- Redis away --------------------------------------------------------------------------------------------------------


def test_redis_away_the_hosts_files_alone_decide(
    make_gov: Callable[..., GovRedis], make_worker: Callable[..., Any], mortal_redis: RedisServer, eventually: Any
) -> None:
    locks = make_gov(redis_url=mortal_redis.url, socket_timeout=5).locks
    worker = make_worker(redis_url=mortal_redis.url, socket_timeout=5)
    read, write, two = locks.rwlock("x").read, locks.rwlock("x").write, locks.semaphore("x", slots=2).acquire
    on_redis = read(ttl=60)
    slot_on_redis = two(ttl=60)
    mortal_redis.kill()
    down = time.monotonic()
    with pytest.raises((LockUnavailable, LockTimeout)) as caught:
        write(timeout=0)
    assert isinstance(caught.value, LockUnavailable) or time.monotonic() - down >= 1, "the grace is not over"
    worker.run("read = locks.rwlock('x').read(timeout=30, ttl=60)")
    assert worker.eval("read.degraded") is True
    reader = read(timeout=30)
    assert reader.degraded
    # Where the grace was over before the breaker opened, by the second refusal, it begins again.
    eventually(lambda: locks._redis and locks._redis.breaker.away_for() > GRACE)
    eventually(lambda: worker.eval("gov.internal.context.redis.breaker.away_for()") > GRACE)
    assert refused(write), "there is one that Redis had granted, too"
    slot = two(timeout=30)
    assert slot.degraded
    assert refused(two)
    assert worker.eval("locks.semaphore('x', slots=2).acquire(timeout=0)") == "LockTimeout"
    assert slot_on_redis.release()
    worker.run("slot = locks.semaphore('x', slots=2).acquire(timeout=0)")
    assert refused(two)
    assert on_redis.release()
    assert refused(write)
    assert worker.eval("read.release()") is True
    assert refused(write)
    assert reader.release()
    writer = write(timeout=0)
    assert writer.degraded
    assert refused(read)
    assert worker.eval("locks.rwlock('x').read(timeout=0)") == "LockTimeout"
    assert worker.eval("locks.rwlock('x').write(timeout=0)") == "LockTimeout"
    # And back: Redis knows of none of them.
    mortal_redis.restart("empty")
    eventually(lambda: locks._redis and locks._redis.breaker.closed)
    locks.acquire("y", timeout=30).release()
    for take in read, write, two:
        assert refused(take)
    assert writer.release()
    with read(timeout=10) as held:
        assert not held.degraded
        assert held.token > writer.token
        assert refused(write)
    assert slot.release()
    with two(timeout=10) as held:
        assert not held.degraded
        assert refused(two)
        assert worker.eval("slot.release()") is True
        two(timeout=10).release()


def test_with_fail_nobody_gets_it_without_redis(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> None:
    locks = make_gov(redis_url=mortal_redis.url, lock_fallback="fail").locks
    disabled = make_gov(redis_enabled=False, lock_fallback="fail").locks
    held = locks.semaphore("x", slots=2).acquire()
    mortal_redis.kill()
    for kind, timeout in itertools.product(KINDS, (20, 0)):
        with pytest.raises(LockUnavailable):
            taker(locks, kind, slots=2)(timeout=timeout)
        with pytest.raises(LockUnavailable, match="disabled"):
            taker(disabled, kind)(timeout=timeout)
    assert held.release() is True


@pytest.mark.usefixtures("renewed_soon")
def test_switched_off_it_is_degraded_at_once(
    make_gov: Callable[..., GovRedis], make_worker: Callable[..., Any], eventually: Any
) -> None:
    locks = make_gov(redis_enabled=False).locks
    worker = make_worker(redis_enabled=False)
    tokens = []
    for _ in range(10):
        with locks.rwlock("x").write(timeout=0) as held:
            assert held.degraded
            tokens.append(held.token)
            assert worker.eval("locks.rwlock('x').read(timeout=0)") == "LockTimeout"
        with locks.rwlock("x").read(timeout=0) as held:
            tokens.append(held.token)
            held.extend(50)
            assert 40 < held.remaining() <= 50
            assert worker.eval("[h := locks.rwlock('x').read(timeout=0), h.release()] and h.degraded") is True
            assert worker.eval("locks.rwlock('x').write(timeout=0)") == "LockTimeout"
        tokens.append(worker.eval("[h := locks.rwlock('x').write(timeout=0), h.release()] and h.token"))
    assert tokens == sorted(set(tokens))
    take = locks.semaphore("x", slots=5).acquire
    for _ in range(5):  # whichever file each begins at
        held5 = [take(timeout=0) for _ in range(5)]
        assert refused(take)
        assert let_go(held5)
    for kind in KINDS:
        with taker(locks, kind)(ttl=60) as held:
            first = held._lease.deadline
            eventually(lambda held=held, first=first: held._lease.deadline > first)
        with pytest.raises(LockLost), taker(locks, kind)(ttl=0.1, renew=False) as held:
            eventually(lambda held=held: not held.remaining())
    worker.run("held = locks.semaphore('x', slots=1).acquire()")
    worker.kill()
    locks.semaphore("x", slots=1).acquire(timeout=0).release()


def test_no_two_that_must_not_through_everything_that_befalls_redis(
    make_worker: Callable[..., Any], mortal_redis: RedisServer, tmp_path: Path, eventually: Any
) -> None:
    inside, until = tmp_path / "inside", tmp_path / "until"
    inside.mkdir()
    workers = [make_worker(redis_url=mortal_redis.url) for _ in range(4)]
    for n, worker in enumerate(workers):
        worker.run(
            "import shared_worker\n"
            "rw, two = locks.rwlock('x'), locks.semaphore('x', slots=2)\n"
            "takes = [('read', rw.read), ('semaphore', two.acquire), ('write', rw.write), ('read', rw.read)]\n"
            f"takes = takes[{n}:] + takes[:{n}]"
        )
        worker.begin(f"shared_worker.hammer(takes, {str(inside)!r}, {str(until)!r})")

    def goes_on(turns: int = 40) -> None:
        """So many that are inside come and go."""
        seen: set[tuple[str, int]] = set()

        def more() -> bool:
            for path in inside.iterdir():
                try:
                    seen.add((path.name, path.stat().st_ctime_ns))
                except FileNotFoundError:
                    pass
            return len(seen) >= turns

        eventually(more)

    def on_redis() -> None:
        eventually(lambda: mortal_redis.command("EXISTS", RW[0], SEM[0]))

    goes_on()
    mortal_redis.kill()
    goes_on()
    mortal_redis.restart("empty")
    on_redis()
    goes_on()
    for _ in range(5):
        mortal_redis.command("FLUSHALL")
        goes_on(10)
    mortal_redis.pause()
    goes_on()
    mortal_redis.resume()
    on_redis()
    goes_on()
    mortal_redis.kill()
    mortal_redis.restart("empty")  # within the grace
    goes_on()
    until.touch()
    tallies = [worker.answer() for worker in workers]
    total = {name: sum(tally[name] for tally in tallies) for name in tallies[0]}
    assert total["overlaps"] == 0, total
    assert total["degraded"] > 0
    assert total["done"] > total["degraded"]
    assert all(tally["done"] > 0 for tally in tallies), "all get their turns"


def test_gone_on_without_redis_it_does_not_stay_in_the_queue(
    make_gov: Callable[..., GovRedis],
    mortal_redis: RedisServer,
    pool: ThreadPoolExecutor,
    tmp_path: Path,
    eventually: Any,
) -> None:
    locks = make_gov(redis_url=mortal_redis.url).locks
    elsewhere = make_gov(redis_url=mortal_redis.url, lock_folder=str(tmp_path / "elsewhere")).locks
    theirs = elsewhere.rwlock("x").read(ttl=1000)
    waiting = pool.submit(locks.rwlock("x").write, timeout=60)
    eventually(lambda: mortal_redis.command("ZCARD", RW[2]) == 1)
    mortal_redis.pause()
    with waiting.result(PATIENCE) as held:
        assert held.degraded
        mortal_redis.resume()
        eventually(lambda: not locks._shared_backend.pending_releases)
        assert mortal_redis.command("EXISTS", RW[2]) == 0
        assert mortal_redis.command("ZRANGE", RW[0], 0, -1) == [theirs._lease.owner]
    theirs.release()


# -- hand-over ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_handed_over_lock_is_entered_at_once_and_confirmed_before_anything_else_is_sent(
    locks: DistributedLock, begin: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(lease_module, "FIRST_DUE", 1000)
    of = keys_of(kind)
    held = taker(locks, rival(kind))(ttl=60)
    future = begin(taker(locks, kind), of[2], ttl=60)
    log: list[str] = []
    reply, run = Pending.reply, RedisNode.run
    monkeypatch.setattr(Pending, "reply", lambda self: [log.append("confirmed"), reply(self)][1])
    monkeypatch.setattr(RedisNode, "run", lambda self, *args: [log.append("ran"), run(self, *args)][1])
    held.release()
    mine = future.result(PATIENCE)
    seen = log.count("ran")
    assert log == ["ran"] * seen, "the release; and waiters that woke up meanwhile to show that they live"
    assert mine.token > held.token
    assert mine._lease.host_lock.inside  # type: ignore[attr-defined]
    assert mine.release()
    assert log[seen:] == ["confirmed", "ran"]
    assert not plain_redis.exists(of[0])


@pytest.mark.parametrize("renew", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_confirmed_it_has_its_own_ttl(
    locks: DistributedLock, begin: Any, plain_redis: Any, eventually: Any, renew: bool, kind: str
) -> None:
    of = keys_of(kind)
    held = taker(locks, rival(kind))()
    future = begin(taker(locks, kind), of[2], ttl=1000, renew=renew)
    held.release()
    with future.result(PATIENCE) as mine:
        eventually(lambda: plain_redis.pttl(of[0]) > 900_000)
        assert 900 < mine.remaining() <= 1000
        assert plain_redis.zscore(of[0], mine._lease.owner) / 1e6 - plain_redis.time()[0] > 900


def test_a_hand_over_that_cannot_be_confirmed_is_asked_for(
    locks: DistributedLock, write: Take, begin: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: RedisNode, packed: bytes) -> Pending:
        raise BackendUnavailable("cut")

    monkeypatch.setattr(RedisNode, "send", cut)
    held = write()
    future = begin(write, ttl=1000)
    held.release()
    with future.result(PATIENCE) as mine:
        assert plain_redis.pttl(RW[0]) > 900_000
        assert mine.remaining() > 900


def test_a_hand_over_that_redis_does_not_confirm_is_lost_within_the_second(
    locks: DistributedLock, read: Take, write: Take, begin: Any, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locks._redis
    send = locks._redis.send

    def taken_away(packed: bytes) -> Pending:
        plain_redis.zadd(RW[0], {"write:another": 9e15})
        plain_redis.zremrangebyrank(RW[0], 0, 0)
        return send(packed)

    monkeypatch.setattr(locks._redis, "send", taken_away)
    held = write()
    future = begin(read, ttl=1000)
    held.release()
    mine = future.result(PATIENCE)
    lost = threading.Event()
    mine.on_lost(lost.set)
    assert lost.wait(PATIENCE)
    assert mine.release() is False
    assert plain_redis.zrange(RW[0], 0, -1) == ["write:another"]
    assert not plain_redis.zcard(RW[2]), "it did not queue up again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_confirmation_that_comes_after_others_had_it_grants_nothing_anew(
    locks: DistributedLock,
    elsewhere: DistributedLock,
    begin: Any,
    plain_redis: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    assert locks._redis
    of, other = keys_of(kind), rival(kind)
    send, theirs = locks._redis.send, []

    def late(packed: bytes) -> Pending:
        plain_redis.delete(of[0])  # the second was over
        with taker(elsewhere, other)(timeout=0) as held:
            theirs.append(held.token)
        return send(packed)

    monkeypatch.setattr(locks._redis, "send", late)
    held = taker(locks, other)()
    future = begin(taker(locks, kind), of[2], ttl=1000)
    held.release()
    mine = future.result(PATIENCE)
    assert mine.token < theirs[0]
    lost = threading.Event()
    mine.on_lost(lost.set)
    assert lost.wait(PATIENCE)
    assert mine.release() is False
    assert not plain_redis.exists(of[0])
