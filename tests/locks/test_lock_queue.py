"""Waiting for a lock: the order of waiters, their waking, and the traces of those that die, give up or are struck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_py
from support import PATIENCE, eventually, redis_of

from govredis import BackendUnavailable, GovRedis, HeldLock, LockTimeout
from govredis.client import pack_command
from govredis.keys import sibling
from govredis.locks import DistributedLock, acquisition
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

KEY = "lock:x"
FENCE, QUEUE, WAITERS = (sibling(KEY, name) for name in ("fence", "queue", "waiters"))
CELLS = KEY, FENCE, QUEUE, WAITERS
DAY = 86_400_000


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url).locks


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


class Script:
    """Commands of processes on other hosts: `me` waits and holds, and does nothing else."""

    def __init__(self, locks: DistributedLock, plain_redis: Any) -> None:
        assert locks._redis
        self._locks, self._redis, self.plain = locks, locks._redis, plain_redis

    def acquire(self, me: str, ttl: int = 60_000, floor: int = 0, waits: int = 1) -> Any:
        return self._run(self._locks._backend.acquire_script, me, ttl, floor, DAY, waits)

    def release(self, me: str, token: int = 0) -> Any:
        return self._run(self._locks._backend.release_script, me, token, DAY)

    def _run(self, script: Any, *args: Any) -> Any:
        return self._redis.run(script, (*CELLS, f"{QUEUE}:{args[0]}"), *map(str, args))

    @property
    def holder(self) -> Any:
        return self.plain.get(KEY)

    @property
    def queue(self) -> Any:
        return self.plain.zrange(QUEUE, 0, -1)

    @property
    def woken(self) -> list[str]:
        """The waiters whose list is there; nobody pops from it here."""
        return sorted(key.removeprefix(QUEUE + ":") for key in self.plain.keys(QUEUE + ":*"))

    def age(self, who: str, by: int = 1_100_000) -> None:
        """As if it had not been seen for longer than it may."""
        self.plain.hset(WAITERS, who, int(self.plain.hget(WAITERS, who)) - by)


@pytest.fixture
def script(locks: DistributedLock, plain_redis: Any) -> Script:
    return Script(locks, plain_redis)


@pytest.fixture
def queued(plain_redis: Any, eventually: Callable[..., Any]) -> Callable[[int], list[str]]:
    """Waits until so many queue; returns them in order."""

    def wait(count: int) -> list[str]:
        eventually(lambda: plain_redis.zcard(QUEUE) == count)
        found: list[str] = plain_redis.zrange(QUEUE, 0, -1)
        return found

    return wait


def nothing_is_left(plain_redis: Any) -> bool:
    """But the fence; and for seconds who handed over last, and the list of one that looked just when it was there."""
    left = [key for key in plain_redis.keys("*lock:x*") if not key.startswith(QUEUE + ":")]
    assert plain_redis.hkeys(WAITERS) in ([], [""])
    return set(left) <= {FENCE, WAITERS}


# -- the scripts: who is next ------------------------------------------------------------------------------------------


def test_the_lock_goes_to_the_longest_waiter_and_wakes_nobody_else(script: Script) -> None:
    _, token = script.acquire("me")
    for name in "b", "a", "c":  # in no alphabetical order
        assert script.acquire(name)[0] == 0
    assert script.acquire("b")[0] == 0, "seen alive once more: it keeps its place"
    assert script.queue == ["b", "a", "c"]
    holder, tokens = "me", [token]
    for then in "b", "a", "c":
        assert script.release(holder, tokens[-1]) == 1
        assert script.holder == then
        assert script.woken == [then]
        script.plain.delete(f"{QUEUE}:{then}")
        granted, token = script.acquire(then)
        assert granted
        assert int(script.plain.get(FENCE)) == token
        holder, tokens = then, [*tokens, token]
    assert script.release(holder, token) == 1
    assert script.holder is None
    assert tokens == sorted(set(tokens))
    assert not script.queue


def test_arrivals_within_one_microsecond_or_on_a_clock_set_back_keep_their_order(script: Script) -> None:
    script.acquire("me")
    script.acquire("z")
    script.plain.zadd(QUEUE, {"z": 2e15 + 1e14})  # it came while the clock was ahead
    for name in "y", "x":
        script.acquire(name)
    assert script.queue == ["z", "y", "x"]


@pytest.mark.parametrize("waits", [0, 1])
def test_a_caller_that_notices_a_free_lock_does_not_get_it_before_a_waiter(script: Script, waits: int) -> None:
    script.plain.set(KEY, "an outsider")
    script.acquire("first")
    script.acquire("second")
    script.plain.delete(KEY)
    assert script.acquire("new", waits=waits)[0] == 0
    assert script.holder == "first"
    assert script.woken == ["first"]
    assert script.queue == ["second"] + ["new"] * waits
    script.plain.delete(KEY)  # "first" did not make it
    assert script.acquire("second") == [1, int(script.plain.get(FENCE))]
    assert script.queue == ["new"] * waits
    assert script.release("second", int(script.plain.get(FENCE))) == 1
    assert script.holder == ("new" if waits else None)


def test_without_waiting_nobody_queues(script: Script) -> None:
    script.acquire("me")
    assert script.acquire("try", waits=0)[0] == 0
    assert set(script.plain.keys("*")) == {KEY, FENCE}


def test_a_waiter_not_seen_for_a_second_is_passed_over(script: Script) -> None:
    _, token = script.acquire("me")
    for name in "dead", "alive", "dead too":
        script.acquire(name)
    script.age("alive", 300_000)
    for name in "dead", "dead too":
        script.age(name)
    script.release("me", token)
    assert script.holder == "alive"
    _, token = script.acquire("alive")
    assert script.release("alive", token) == 1
    assert script.holder is None
    assert script.woken == ["alive"]
    assert not script.queue
    assert script.plain.hkeys(WAITERS) == [""]
    assert script.acquire("dead")[0] == 1, "when it wakes up it asks anew"


def test_a_handed_over_lock_is_held_for_a_second_until_confirmed_with_the_whole_ttl(script: Script) -> None:
    _, token = script.acquire("me")
    script.acquire("next", ttl=60_000)
    script.release("me", token)
    assert 0 < script.plain.pttl(KEY) <= 1000
    fence = int(script.plain.get(FENCE))
    assert fence > token
    assert script.acquire("next", ttl=60_000) == [1, fence]
    assert script.plain.pttl(KEY) > 55_000
    assert script.acquire("next", ttl=60_000) == [1, fence], "the reply was lost"


def test_a_release_that_arrives_twice_counts_also_where_it_handed_over(script: Script) -> None:
    _, token = script.acquire("me")
    script.acquire("next")
    script.acquire("after next")
    assert script.release("me", token) == 1
    assert script.release("me", token) == 1
    assert script.holder == "next", "not handed on"
    script.acquire("next")
    assert script.release("me", token) == 1
    script.plain.delete(KEY)
    assert script.release("me", token) == 1
    # But not for another grant to the same owner.
    assert script.release("me", token + 5) == 0
    assert script.release("another", token) == 0


def test_a_waiter_that_gives_up_leaves_the_queue_or_hands_the_lock_on(script: Script) -> None:
    _, token = script.acquire("me")
    for name in "a", "b", "c":
        script.acquire(name)
    assert script.release("b") == 0
    assert script.queue == ["a", "c"]
    assert int(script.plain.get(FENCE)) == token
    script.release("me", token)
    assert script.release("a") == 1, "it was its, though it did not know"
    assert script.holder == "c"
    assert int(script.plain.get(FENCE)) > token + 1
    assert script.release("c") == 1
    assert script.holder is None
    assert not script.queue
    script.plain.set(KEY, "an outsider")
    script.acquire("d")
    script.acquire("e")
    script.plain.delete(KEY)
    assert script.release("d") == 0, "it was nobody's"
    assert script.holder == "e", "who notices sees to it"


def test_the_former_holders_extension_fails_after_a_hand_over(script: Script) -> None:
    _, token = script.acquire("me")
    script.acquire("next")
    script.release("me", token)
    arguments = ("me", "60000", str(token), str(DAY))
    extend = script._locks._backend.extend_script
    assert script._redis.run(extend, (KEY, FENCE), *arguments) == 0
    script.plain.delete(KEY)
    assert script._redis.run(extend, (KEY, FENCE), *arguments) == 0


def test_the_floor_of_the_new_holders_host_holds_after_a_hand_over_too(script: Script) -> None:
    _, token = script.acquire("me")
    script.acquire("next")
    script.release("me", token)
    fence = int(script.plain.get(FENCE))
    assert script.acquire("next", floor=fence - 1) == [1, fence]
    assert script.acquire("next", floor=fence + 10**10) == [1, fence + 10**10 + 1]


def test_every_key_has_a_ttl_at_every_moment(script: Script) -> None:
    def check(*names: str) -> None:
        ttls = {key: script.plain.pttl(key) for key in script.plain.keys("*")}
        assert set(ttls) == set(names)
        assert all(0 < ttl <= (10_000 if key not in (KEY, FENCE) else 2 * DAY) for key, ttl in ttls.items()), ttls

    _, token = script.acquire("me")
    script.acquire("a")
    script.acquire("b")
    check(KEY, FENCE, QUEUE, WAITERS)
    script.release("me", token)
    wake = f"{QUEUE}:a"
    check(KEY, FENCE, QUEUE, WAITERS, wake)
    assert script.plain.pttl(wake) <= 1000
    script.plain.delete(wake)
    _, token = script.acquire("a")
    script.release("b")
    script.plain.delete(WAITERS)
    script.acquire("c")
    script.release("a", token)
    check(KEY, FENCE, WAITERS, f"{QUEUE}:c")
    script.release("c")
    script.plain.delete(f"{QUEUE}:c")
    check(FENCE, WAITERS)


# -- waiting -----------------------------------------------------------------------------------------------------------


def begin(pool: ThreadPoolExecutor, locks: DistributedLock, **options: Any) -> Future[HeldLock]:
    return pool.submit(locks.acquire, "x", **{"timeout": PATIENCE, **options})


def test_processes_and_threads_get_it_in_the_order_of_their_arrival(
    locks: DistributedLock,
    make_worker: Callable[..., Any],
    redis_server: RedisServer,
    plain_redis: Any,
    pool: ThreadPoolExecutor,
    queued: Callable[[int], list[str]],
) -> None:
    workers = [make_worker(redis_url=redis_server.url) for _ in range(3)]
    held = locks.acquire("x")

    def take_turn() -> int:
        with locks.acquire("x", timeout=120) as mine:
            plain_redis.rpush("order", mine._lease.owner)
            return mine.token

    turns = []
    for n, worker in enumerate(workers):
        worker.begin(
            "[h := locks.acquire('x', timeout=None),"
            " gov.internal.context.redis.call('RPUSH', 'order', h._lease.owner), h.release()] and h.token"
        )
        queued(2 * n + 1)
        turns.append(pool.submit(take_turn))
        arrived = queued(2 * n + 2)
    assert held.release()
    tokens = [t for pair in zip(workers, turns, strict=True) for t in (pair[0].answer(), pair[1].result(PATIENCE))]
    assert plain_redis.lrange("order", 0, -1) == arrived
    assert [held.token, *tokens] == sorted({held.token, *tokens})
    plain_redis.delete("order")
    assert nothing_is_left(plain_redis)


def test_no_command_within_a_slice_and_a_release_wakes_only_one(
    locks: DistributedLock,
    plain_redis: Any,
    pool: ThreadPoolExecutor,
    queued: Callable[[int], list[str]],
) -> None:
    def sent() -> int:
        stats = plain_redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "blpop"))

    held = locks.acquire("x")
    waiting = [begin(pool, locks) for _ in range(5)]
    queued(5)
    started, before = time.monotonic(), sent()
    threading.Event().wait(0.7)
    commands, slices = sent() - before, (time.monotonic() - started) / 0.15 + 1
    assert 0 < commands <= 5 * 2 * slices
    rest = set(waiting)
    for left in range(4, -1, -1):
        before, started = sent(), time.monotonic()
        held.release()
        done = {f for f in rest if f.exception(0.0 if f.done() else None) is None} if left == 0 else _first_done(rest)
        assert len(done) == 1
        rest -= done
        held = done.pop().result(0)
        # A release, a confirmation; and what the others' slices bring.
        assert sent() - before <= 4 + left * 2 * ((time.monotonic() - started) / 0.15 + 1)
        queued(left)
    assert held.release()


def _first_done(futures: set[Future[HeldLock]]) -> set[Future[HeldLock]]:
    from concurrent.futures import FIRST_COMPLETED, wait

    return wait(futures, PATIENCE, FIRST_COMPLETED).done


def test_the_new_holders_lease_is_its_own(
    locks: DistributedLock, plain_redis: Any, pool: ThreadPoolExecutor, queued: Callable[[int], list[str]]
) -> None:
    lost = threading.Event()
    with locks.acquire("x", ttl=60) as held:
        waiting = begin(pool, locks, ttl=900)
        queued(1)
    with waiting.result(PATIENCE) as later:
        later.on_lost(lost.set)
        assert later.token > held.token
        assert 800 < later.remaining() <= 900
        assert 800_000 < plain_redis.pttl(KEY) <= 900_001
        assert plain_redis.get(KEY) == later._lease.owner
        plain_redis.set(KEY, "somebody else")
        with pytest.raises(Exception, match="lost"):
            later.extend()
        assert lost.wait(PATIENCE)
        plain_redis.delete(KEY)
        later._lease.lost = None  # for the end of this block
        plain_redis.set(KEY, later._lease.owner, px=60_000)
    assert locks.counters.get("locks.lost") == 1


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_the_end_of_an_outsider_is_noticed_and_the_first_gets_it(
    locks: DistributedLock,
    plain_redis: Any,
    pool: ThreadPoolExecutor,
    queued: Callable[[int], list[str]],
    how: str,
) -> None:
    plain_redis.set(KEY, "an outsider")
    got: list[int] = []

    def take_turn(n: int) -> None:
        with locks.acquire("x", timeout=PATIENCE):
            got.append(n)

    turns = []
    for n in range(4):
        turns.append(pool.submit(take_turn, n))
        queued(n + 1)
    if how == "deleted":
        plain_redis.delete(KEY)
    else:
        plain_redis.pexpire(KEY, 1)
    for turn in turns:
        turn.result(PATIENCE)
    assert got == [0, 1, 2, 3]
    assert nothing_is_left(plain_redis)


def test_the_end_of_an_outsider_is_noticed_within_a_slice(
    locks: DistributedLock, plain_redis: Any, pool: ThreadPoolExecutor, queued: Callable[[int], list[str]]
) -> None:
    def noticed_after() -> float:
        plain_redis.set(KEY, "an outsider")
        waiting = begin(pool, locks, timeout=PATIENCE)
        queued(1)
        plain_redis.delete(KEY)
        ended = time.monotonic()
        held = waiting.result(PATIENCE)
        took = time.monotonic() - ended
        held.release()
        return took

    # A slice is a quarter of a second. On a busy machine some come late for its own reasons.
    assert any(noticed_after() < 0.5 for _ in range(10))


def test_a_waiter_that_dies_with_the_lock_costs_its_successor_a_second(
    locks: DistributedLock, script: Script, pool: ThreadPoolExecutor, queued: Callable[[int], list[str]]
) -> None:
    def cost() -> float:
        held = locks.acquire("x")
        script.acquire("killed -9 right now")
        waiting = begin(pool, locks, timeout=PATIENCE)
        queued(2)
        started = time.monotonic()
        held.release()
        assert script.holder == "killed -9 right now"
        assert waiting.result(PATIENCE).release()
        assert not script.queue
        return time.monotonic() - started

    # On a busy machine some come late for its own reasons.
    assert any(0.9 < cost() < 3 for _ in range(10))


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_dead_waiter_is_passed_over_and_a_stopped_one_queues_anew(
    locks: DistributedLock,
    make_worker: Callable[..., Any],
    redis_server: RedisServer,
    plain_redis: Any,
    pool: ThreadPoolExecutor,
    queued: Callable[[int], list[str]],
    eventually: Callable[..., Any],
    how: str,
) -> None:
    worker = make_worker(redis_url=redis_server.url)
    held = locks.acquire("x")
    worker.begin("[h := locks.acquire('x', timeout=120)] and h.token")
    (theirs,) = queued(1)
    waiting = begin(pool, locks)
    queued(2)
    if how == "killed":
        worker.kill()
    else:
        worker.stop()

    def unseen() -> bool:
        seconds, micros = plain_redis.time()
        return seconds * 1_000_000 + micros - int(plain_redis.hget(WAITERS, theirs)) > 1_050_000

    eventually(unseen)
    held.release()
    mine = waiting.result(PATIENCE)
    assert plain_redis.get(KEY) == mine._lease.owner
    assert not plain_redis.zcard(QUEUE)
    if how == "stopped":
        worker.resume()
        assert queued(1) == [theirs]
        assert plain_redis.get(KEY) == mine._lease.owner
        assert mine.release()
        assert worker.answer() > mine.token
        assert worker.eval("h.release()") is True
    else:
        assert mine.release()
    assert nothing_is_left(plain_redis)


def test_a_waiter_stopped_when_it_was_handed_the_lock_does_not_believe_that_it_has_it(
    locks: DistributedLock,
    make_worker: Callable[..., Any],
    redis_server: RedisServer,
    plain_redis: Any,
    queued: Callable[[int], list[str]],
    eventually: Callable[..., Any],
) -> None:
    worker = make_worker(redis_url=redis_server.url)
    held = locks.acquire("x")
    worker.begin("[h := locks.acquire('x', timeout=120)] and h.token")
    (theirs,) = queued(1)
    worker.stop()
    held.release()  # at once: it counts as alive
    assert plain_redis.get(KEY) == theirs
    with locks.acquire("x", timeout=PATIENCE) as mine:
        worker.resume()
        assert queued(1) == [theirs]
        assert plain_redis.get(KEY) == mine._lease.owner
    assert worker.answer() > mine.token
    assert worker.eval("h.release()") is True


# -- giving up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.01, 0.06, 0.3, 0.5])
def test_the_wait_ends_with_its_timeout_however_late_redis_is(
    make_gov: Callable[..., GovRedis], redis_binary: str, timeout: float
) -> None:
    with RedisServer(binary=redis_binary, config=["hz 1"]) as server:
        locks = make_gov(redis_url=server.url).locks
        with locks.acquire("x"):
            over: list[float] = []
            # On a busy machine some come late for its own reasons.
            while len(over) < 3 or (min(over) >= 0.05 and len(over) < 20):
                started = time.monotonic()
                with pytest.raises(LockTimeout):
                    locks.acquire("x", timeout=timeout)
                over.append(time.monotonic() - started - timeout)
                assert over[-1] >= 0
            assert min(over) < 0.05
            assert locks._redis
            assert locks._redis.breaker.times_opened == 0
            assert server.command("EXISTS", QUEUE) == 0
            assert server.command("HLEN", WAITERS) == 0
            assert server.command("KEYS", QUEUE + ":*") == []


def test_a_single_try_never_queues(locks: DistributedLock, plain_redis: Any, not_listed: None) -> None:
    plain_redis.config_resetstat()
    with locks.acquire("x"):
        assert locks.try_acquire("x") is None
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0)
        assert set(plain_redis.keys("*")) == {KEY, FENCE}
        assert "cmdstat_blpop" not in plain_redis.info("commandstats")


class Struck(BaseException):
    pass


@pytest.mark.parametrize("handed", [False, True])
def test_struck_by_an_exception_while_waiting_it_leaves_nothing_and_hands_on_what_it_was_handed(
    locks: DistributedLock, script: Script, monkeypatch: pytest.MonkeyPatch, handed: bool
) -> None:
    assert locks._redis
    held = locks.acquire("x")

    def pop(key: str, seconds: float) -> None:
        script.acquire("next")
        if handed:
            held.release()
            assert script.holder == key.removeprefix(QUEUE + ":")
        raise Struck

    monkeypatch.setattr(locks._redis, "pop", pop)
    with pytest.raises(Struck):
        locks.acquire("x", timeout=120)
    assert script.holder == ("next" if handed else held._lease.owner)
    assert script.queue == ([] if handed else ["next"])
    assert set(script.plain.hkeys(WAITERS)) == ({""} if handed else {"next"})
    held.release()


def test_handed_the_lock_in_the_instant_of_its_timeout_it_has_it(
    locks: DistributedLock, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locks._redis
    held = locks.acquire("x")

    def pop(key: str, seconds: float) -> None:
        time.sleep(seconds + 0.01)
        held.release()

    monkeypatch.setattr(locks._redis, "pop", pop)
    with locks.acquire("x", timeout=0.2) as mine:
        assert script.holder == mine._lease.owner


# -- lost replies, lost data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [redis_py.ConnectionError, redis_py.TimeoutError])
@pytest.mark.parametrize("cut", ["queueing", "waking", "granting", "confirming", "releasing", "giving up"])
def test_a_reply_lost_after_the_execution_hangs_nobody_and_leaves_no_ghost(
    make_gov: Callable[..., GovRedis],
    locks: DistributedLock,
    plain_redis: Any,
    redis_server: RedisServer,
    pool: ThreadPoolExecutor,
    queued: Callable[[int], list[str]],
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
    error: type[Exception],
) -> None:
    theirs = make_gov(redis_url=redis_server.url).locks  # whose replies are lost
    assert theirs._redis
    theirs.acquire("warm").release()
    exchange = theirs._redis._exchange
    cuts: list[str] = []

    def cut_after(pool: Any, connection: Any, packed: bytes, *args: Any) -> Any:
        reply = exchange(pool, connection, packed, *args)
        now = ""
        if not packed:
            now = "confirming"
        elif b"BLPOP" in packed:
            now = "waking" if reply else ""
            if cut == "granting":
                return None  # the element is lost too: it finds out by asking
        elif theirs._backend.acquire_script.sha.encode() in packed:
            now = "granting" if reply[0] else "queueing"
        elif theirs._backend.release_script.sha.encode() in packed:
            now = "giving up" if cut == "giving up" else "releasing"
        if now == cut and not cuts:
            cuts.append(now)
            connection.disconnect()
            raise error("cut")
        return reply

    held = locks.acquire("x")
    monkeypatch.setattr(acquisition, "GRACE", 600)  # however long the machine stands still once it is cut
    monkeypatch.setattr(theirs._redis, "_exchange", cut_after)
    waiting = begin(pool, theirs, timeout=0.3 if cut == "giving up" else PATIENCE, ttl=1000)
    if cut == "giving up":
        with pytest.raises(LockTimeout):
            waiting.result(PATIENCE)
        assert held.release()
    else:
        queued(1)
        assert held.release()
        later = waiting.result(PATIENCE)
        assert not later.degraded
        assert later.token > held.token
        assert later.release()
    assert cuts == [cut]
    eventually(lambda: not theirs._backend.pending_releases)
    assert locks.acquire("x", timeout=PATIENCE).release()
    eventually(lambda: nothing_is_left(plain_redis))
    assert theirs.counters.get("locks.lost") == 0


@pytest.mark.parametrize("event", ["FLUSHALL", "SCRIPT FLUSH", "restart", "stop for 2 s"])
def test_all_waiters_get_the_lock_one_at_a_time_whatever_befell_redis(
    make_gov: Callable[..., GovRedis],
    mortal_redis: RedisServer,
    pool: ThreadPoolExecutor,
    eventually: Callable[..., Any],
    event: str,
) -> None:
    govs = [make_gov(redis_url=mortal_redis.url).locks for _ in range(2)]
    held = govs[0].acquire("x")
    tokens, inside = [held.token], ["the first"]

    def take_turn(n: int) -> None:
        with govs[n % 2].acquire("x", timeout=60) as mine:
            inside.append(str(n))
            assert len(inside) == 1, inside
            tokens.append(mine.token)
            inside.remove(str(n))

    turns = [pool.submit(take_turn, n) for n in range(6)]
    eventually(lambda: mortal_redis.command("ZCARD", QUEUE) == 6)
    if event == "restart":
        mortal_redis.restart("empty")
    elif event == "stop for 2 s":
        mortal_redis.pause()
        time.sleep(2)
        mortal_redis.resume()
    else:
        mortal_redis.command(*event.split())
    inside.clear()
    held.release()
    for turn in turns:
        turn.result(60)
    assert len(tokens) == 7
    assert tokens == sorted(set(tokens))
    eventually(lambda: not any(locks._backend.pending_releases for locks in govs))
    assert mortal_redis.command("EXISTS", KEY, QUEUE) == 0


def test_gone_on_without_redis_it_does_not_stay_in_the_queue(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, pool: ThreadPoolExecutor, eventually: Any
) -> None:
    locks = make_gov(redis_url=mortal_redis.url).locks
    mortal_redis.command("SET", KEY, "on another host")
    waiting = begin(pool, locks)
    eventually(lambda: mortal_redis.command("ZCARD", QUEUE) == 1)
    mortal_redis.pause()
    with waiting.result(PATIENCE) as held:
        assert held.degraded
        mortal_redis.resume()
        eventually(lambda: not locks._backend.pending_releases)
        assert mortal_redis.command("EXISTS", QUEUE) == 0
        assert mortal_redis.command("HLEN", WAITERS) == 0
        assert mortal_redis.command("GET", KEY) == "on another host"


def test_a_master_that_becomes_a_replica_is_an_outage_to_waiters(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, pool: ThreadPoolExecutor, eventually: Any
) -> None:
    locks = make_gov(redis_url=mortal_redis.url).locks
    held = locks.acquire("x")
    waiting = begin(pool, locks)
    assert locks._redis
    for _ in range(3):
        # A client that is blocked just then is told UNBLOCKED.
        eventually(lambda: int(mortal_redis.command("INFO", "clients")["blocked_clients"]))
        mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
        mortal_redis.command("REPLICAOF", "NO", "ONE")
        assert not waiting.done()
    held.release()
    assert waiting.result(PATIENCE).release()


# -- the host lock, the connections ---------------------------------------------------------------------------------


def test_a_caller_that_the_host_lock_refuses_does_not_spin(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer, plain_redis: Any, pool: Any
) -> None:
    worker = make_worker(redis_url=redis_server.url)
    worker.run("held = locks.acquire('x')")
    plain_redis.flushall()
    before = plain_redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
    started = time.monotonic()
    for waiting in [begin(pool, locks, timeout=1) for _ in range(4)]:
        with pytest.raises(LockTimeout):
            waiting.result(PATIENCE)
    commands = plain_redis.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    # Each sleeps 25 ms at least between one acquire and release, and the next, but for the first few times.
    assert commands < 4 * 2 * ((time.monotonic() - started) / 0.025 + 10)
    assert worker.eval("held.release()") in (True, False)
    assert locks.acquire("x", timeout=PATIENCE).release()


def test_a_host_whose_last_token_is_ahead_does_not_lose_its_turn(
    locks: DistributedLock, script: Script, pool: ThreadPoolExecutor, queued: Callable[[int], list[str]]
) -> None:
    ahead = time.time_ns() // 1000 + 10**9
    host_lock = locks._file_backend.open_exclusive(KEY)
    assert host_lock.enter(ahead, "a degraded holder on a fast clock", 0.0, may_pass=False)
    host_lock.leave()
    _, token = script.acquire("on another host")
    waiting = begin(pool, locks)
    queued(1)
    script.acquire("on a third host")
    script.release("on another host", token)
    with waiting.result(PATIENCE) as mine:
        assert script.queue == ["on a third host"], "it has not been its turn"
        script.acquire("on a third host")
        assert script.holder == mine._lease.owner
        assert mine.token > ahead
        assert int(script.plain.get(FENCE)) == mine.token
    assert script.holder == "on a third host"


def test_waiters_without_a_connection_are_all_seen_alive(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    plain_redis: Any,
    pool: ThreadPoolExecutor,
    queued: Callable[[int], list[str]],
) -> None:
    # They wait for a connection as long as for the lock, however patient the settings are otherwise.
    gov = make_gov(redis_url=redis_server.url, redis_connections=2, socket_timeout=10 * PATIENCE)
    pending = [redis_of(gov).send(pack_command(("BLPOP", f"never{n}", "0"))) for n in range(2)]  # on all that they have
    held = gov.locks.acquire("x")
    waiting = [begin(pool, gov.locks, timeout=PATIENCE) for _ in range(6)]
    arrived = queued(6)
    for _ in range(3):
        before = plain_redis.hmget(WAITERS, arrived)
        for n, seen in enumerate(before):
            eventually(lambda n=n, seen=seen: plain_redis.hget(WAITERS, arrived[n]) != seen, what="it is seen again")
    held.release()
    for _ in arrived:
        (done,) = list(_first_done(set(waiting)))[:1]
        waiting.remove(done)
        assert done.result(0).release()
    for n in range(len(pending)):
        plain_redis.rpush(f"never{n}", "came")
    assert [sent.reply()[1] for sent in pending] == [b"came", b"came"]


def test_redis_is_asked_at_the_pace_of_an_outage_where_nobody_can_wait(
    locks: DistributedLock, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy that cuts connections that send BLPOP, say."""
    assert locks._redis
    tries = []

    def pop(key: str, seconds: float) -> None:
        tries.append(key)
        raise BackendUnavailable("cut")

    def tried() -> int:
        tries.clear()
        with pytest.raises(LockTimeout):
            locks.acquire("x", timeout=0.5)
        assert len(tries) < 40
        return len(tries)

    monkeypatch.setattr(locks._redis, "pop", pop)
    with locks.acquire("x"):
        # Where the machine stands still, it is time that passes without a try.
        assert any(tried() > 5 for _ in range(10))
