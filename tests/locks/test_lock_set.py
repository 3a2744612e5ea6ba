"""Processes that keep taking one lock, while one thing after another befalls them, Redis, or its replies.

Each time no two were inside at once, except a process that was stopped past its ttl and those that passed it. A
register that checks fencing tokens took no stale write and lost none. A file that nothing but the lock protects lost no
update. Nobody was forgotten in the queue, and all went on working afterwards.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from cutting_proxy import CuttingProxy
from lock_set import SLOTS, Board, CountsFile, Register
from stalls import undisturbed

from govredis import GovRedis, LockTimeout
from govredis.keys import sibling
from govredis.locks import lease as lease_module
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: Not how long it takes: that it did not hang. On a machine that is busy with other things.
HUNG = 60.0


class LockSet:
    """The processes, and what they leave to be seen.

    Args:
        ttl: short only where somebody dies or is stopped: for as long as that the lock may stand still.
    """

    def __init__(
        self,
        redis: RedisServer,
        folder: Path,
        make_worker: Callable[..., Any],
        eventually: Callable[..., Any],
        *,
        url: str,
        size: int = 5,
        ttl: float = 30.0,
    ) -> None:
        self.redis, self._folder, self._eventually = redis, folder, eventually
        self.board, self.register = Board(folder), Register()
        with ThreadPoolExecutor(size) as pool:
            settings = {"redis_url": url, "lock_folder": str(folder / "locks")}
            self.workers = list(pool.map(lambda _: make_worker(**settings), range(size)))
        self.killed: set[int] = set()
        for slot, worker in enumerate(self.workers):
            worker.run("from lock_set import go_round")
            worker.begin(f"go_round(locks, {str(folder)!r}, {self.register.port}, {slot}, {ttl})")

    def wait(self, condition: Callable[[], Any]) -> Any:
        return self._eventually(condition, HUNG)

    @property
    def living(self) -> list[int]:
        return [slot for slot in range(len(self.workers)) if slot not in self.killed]

    def goes_on(self, by: int = 3) -> None:
        """Every process has been inside some more times, by Redis's leave."""
        goals = {slot: self._granted(slot) + by for slot in self.living}
        self.wait(lambda: all(self._granted(slot) >= goal for slot, goal in goals.items()))

    def _granted(self, slot: int) -> int:
        return self.board[slot, "done"] - self.board[slot, "degraded"]

    def somebody_goes_on(self, by: int = 5, without: int = -1) -> None:
        """In whatever way."""

        def done() -> int:
            return sum(self.board[slot, "done"] for slot in range(SLOTS) if slot != without)

        goal = done() + by
        self.wait(lambda: done() >= goal)

    def park(self, slot: int) -> None:
        """Have it stay inside, with what it read and has not written yet."""
        self.board[slot, "park"] = 1
        self.wait(lambda: self.board[slot, "parked"])

    def unpark(self, slot: int) -> None:
        self.board[slot, "park"] = 0

    def redis_grants_it_to_others(self) -> None:
        """Having lost its data, while somebody is inside; and they have time to come in, were they let."""
        self.wait(lambda: self.redis.command("EXISTS", sibling("lock:x", "fence")))
        time.sleep(0.7)

    def stop(self, slot: int) -> None:
        self.workers[slot].stop()
        self.board[slot, "excused"] = 1

    def resume(self, slot: int) -> None:
        self.unpark(slot)
        self.workers[slot].resume()

    def kill(self, slot: int) -> None:
        self.stop(slot)  # excused from just then
        self.workers[slot].kill()
        self.killed.add(slot)
        self.board[slot, "inside"] = 0

    def end(self) -> None:
        for slot in self.living:
            self.board[slot, "end"] = 1
        # Else it is still waiting for the lock.
        self.wait(lambda: all(self.board[slot, "ended"] for slot in self.living))
        assert [self.workers[slot].answer() for slot in self.living] == [[]] * len(self.living)

    def check(self, *, passed: bool, lossless: bool) -> None:
        """Args:
        passed: somebody was stopped past its ttl.
        lossless: nobody was stopped, and Redis kept its data: so nobody lost a lock, or was told so.
        """
        board = self.board
        assert board.total("overlaps") == 0
        tokens = [token for token, _ in self.register.accepted]
        assert tokens == sorted(set(tokens)), "a write with an old token, or two holders with the same"
        values = [value for _, value in self.register.accepted]
        assert values == [*range(1, len(values) + 1)], "an update of the register was lost"
        if passed:
            return
        assert self.register.refused == 0
        counts = CountsFile(self._folder)
        for slot, count in enumerate(counts.read()):
            # One killed between its writing the file and its saying so.
            assert count - board[slot, "wrote"] in ({0, 1} if slot in self.killed else {0}), "lost updates in the file"
        counts.close()
        if lossless:
            assert board.total("lost") == 0
            assert board.total("unreleased") == 0

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.register.close()


@pytest.fixture
def redis(one_redis_binary: str) -> Iterator[RedisServer]:
    with RedisServer(binary=one_redis_binary, persistent=True) as server:
        yield server


@pytest.fixture
def proxy(redis: RedisServer) -> Iterator[CuttingProxy]:
    with CuttingProxy(redis.port) as made:
        yield made


@pytest.fixture
def lock_set(
    redis: RedisServer, tmp_path: Path, make_worker: Callable[..., Any], eventually: Callable[..., Any]
) -> Iterator[Callable[..., LockSet]]:
    """Starts one; it is ended and closed by `through` or here."""
    made: list[LockSet] = []

    def make(**options: Any) -> LockSet:
        folder = tmp_path / f"set-{len(made)}"
        folder.mkdir()
        for one in made:  # of an attempt that a stall has ended
            one.close()
            redis.command("FLUSHALL")
        made.append(LockSet(redis, folder, make_worker, eventually, **{"url": redis.url, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def beside_stalls_of(longest: float) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """A test of locks so short that a longer stall of the machine ends them. It makes its lock set in each attempt."""

    def decorate(test: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(test)
        def run(lock_set: Callable[..., LockSet]) -> None:
            undisturbed(lambda: test(lock_set), longest)

        return run

    return decorate


# -- what befalls the processes ----------------------------------------------------------------------------------------


@beside_stalls_of(0.5)
def test_the_register_refuses_a_holder_that_was_stopped_past_its_ttl_inside(lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set(ttl=1.5)
    processes.goes_on()
    for slot in 0, 3:
        refused, lost = processes.register.refused, processes.board[slot, "lost"]
        processes.park(slot)
        processes.stop(slot)
        processes.somebody_goes_on(3, without=slot)  # past it, which takes its time
        processes.resume(slot)
        processes.wait(lambda refused=refused: processes.register.refused > refused)
        processes.goes_on()
        assert processes.board[slot, "lost"] > lost, "it was told as well"
    processes.end()
    processes.check(passed=True, lossless=False)


@beside_stalls_of(0.6)
def test_a_passer_of_a_stopped_holder_is_alone_also_when_that_has_left(lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set(ttl=2.0)
    processes.park(0)
    processes.stop(0)
    processes.somebody_goes_on(1, without=0)
    processes.park(1)
    done = processes.board[0, "done"]
    processes.resume(0)
    processes.wait(lambda: processes.board[0, "done"] > done)
    processes.redis.command("FLUSHALL")
    processes.redis_grants_it_to_others()
    processes.unpark(1)
    processes.goes_on()
    processes.end()
    processes.check(passed=True, lossless=False)


@beside_stalls_of(0.5)
def test_a_process_stopped_wherever_it_was_past_the_ttl(lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set(ttl=1.5)
    for slot in random.choices(range(5), k=4):
        processes.somebody_goes_on(random.randrange(1, 20))
        processes.stop(slot)
        processes.somebody_goes_on(3, without=slot)  # past it, which takes its time
        processes.resume(slot)
    processes.goes_on()
    processes.end()
    processes.check(passed=True, lossless=False)


def test_a_killed_holder(lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set()
    processes.goes_on()
    for slot in 0, 1:
        processes.park(slot)
        processes.kill(slot)
        processes.goes_on()
    processes.end()
    processes.check(passed=False, lossless=True)


def test_processes_killed_wherever_they_were(lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set()
    processes.goes_on()
    for slot in 0, 1, 2:
        processes.somebody_goes_on(random.randrange(1, 20))
        processes.kill(slot)
        processes.somebody_goes_on()
    processes.goes_on()
    processes.end()
    processes.check(passed=False, lossless=True)


# -- what befalls Redis ------------------------------------------------------------------------------------------------


def stalls(processes: LockSet) -> None:
    for _ in range(3):
        processes.redis.pause()
        time.sleep(0.3)  # the stall, well below the grace
        processes.redis.resume()
        processes.goes_on()


def hangs_for_longer_than_the_grace(processes: LockSet) -> None:
    for _ in range(2):
        before = processes.board.total("degraded")
        processes.redis.pause()
        processes.wait(lambda before=before: processes.board.total("degraded") > before + 20)
        processes.redis.resume()
        processes.goes_on()


def is_killed_and_restarted_with_its_data(processes: LockSet) -> None:
    for _ in range(3):
        processes.redis.kill()
        processes.redis.restart()
        processes.goes_on()


def is_killed_and_restarted_without_data(processes: LockSet) -> None:
    for slot in 0, 1:
        processes.park(slot)
        processes.redis.kill()
        processes.redis.restart("empty")
        processes.redis_grants_it_to_others()
        processes.unpark(slot)


def is_away_for_longer_than_the_grace_and_loses_its_data(processes: LockSet) -> None:
    for _ in range(2):
        before = processes.board.total("degraded")
        processes.redis.kill()
        processes.wait(lambda before=before: processes.board.total("degraded") > before + 20)
        processes.redis.restart("empty")
        processes.goes_on()


def is_flushed(processes: LockSet) -> None:
    for _ in range(30):
        processes.redis.command("FLUSHALL")
        processes.somebody_goes_on()
    for slot in 0, 1:
        processes.park(slot)
        processes.redis.command("FLUSHALL")
        processes.redis_grants_it_to_others()
        processes.unpark(slot)


def forgets_its_scripts(processes: LockSet) -> None:
    for _ in range(50):
        processes.redis.command("SCRIPT", "FLUSH")
        processes.somebody_goes_on()


def drops_all_connections(processes: LockSet) -> None:
    for _ in range(30):
        processes.redis.command("CLIENT", "KILL", "TYPE", "normal")
        processes.somebody_goes_on()


@beside_stalls_of(0.6)
def test_a_holder_that_outlasts_its_ttl_without_redis_is_alone_on_its_host(lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set(ttl=2.0)
    processes.goes_on()
    processes.park(0)
    processes.redis.kill()
    time.sleep(2.5)  # the outage, longer than the ttl
    processes.redis.restart("empty")
    processes.redis_grants_it_to_others()
    processes.unpark(0)
    processes.goes_on()
    processes.end()
    processes.check(passed=False, lossless=False)


@pytest.mark.parametrize(
    ("befalls", "lossless"),
    [
        (stalls, True),
        (hangs_for_longer_than_the_grace, False),
        (is_killed_and_restarted_with_its_data, False),
        (is_killed_and_restarted_without_data, False),
        (is_away_for_longer_than_the_grace_and_loses_its_data, False),
        (is_flushed, False),
        (forgets_its_scripts, True),
        (drops_all_connections, True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_redis(befalls: Callable[[LockSet], None], lossless: bool, lock_set: Callable[..., LockSet]) -> None:
    processes = lock_set()
    processes.goes_on()
    befalls(processes)
    processes.goes_on()
    processes.end()
    processes.check(passed=False, lossless=lossless)


# -- what befalls a reply ----------------------------------------------------------------------------------------------

ANSWERS = ["queued", "granted", "handed over", "extended", "released"]


def test_a_reply_is_cut_after_its_command_was_executed(proxy: CuttingProxy, redis: RedisServer) -> None:
    with redis_py.Redis.from_url(proxy.url, retry=None) as client:
        assert client.incr("n") == 1
        proxy.cut_next(b"\r\nn\r\n", reply=b":2", times=1)
        proxy.cut_next(b"\r\nn\r\n", reply=b"$")
        with pytest.raises(redis_py.ConnectionError):
            client.incr("n")
        assert client.incr("n") == 3
        with pytest.raises(redis_py.ConnectionError):
            client.get("n")
        assert client.get("n") == b"3"
    assert proxy.cuts == 2


def exchanges_of(locks: Any, other_locks: Any, proxy: CuttingProxy, eventually: Callable[..., Any]) -> dict[str, Any]:
    """Which request and beginning of a reply is which, learned from watching: of no interest are their contents."""

    def watch(call: Callable[[], Any]) -> list[tuple[bytes, bytes]]:
        proxy.exchanges.clear()
        call()
        return list(proxy.exchanges)

    def script(exchanges: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """The SHA of the first that ran, and its reply."""
        request, reply = next(found for found in exchanges if b"EVALSHA" in found[0])
        return request.split(b"\r\n")[4], reply

    def acquire_in_vain() -> None:
        with pytest.raises(LockTimeout):
            other_locks.acquire("learn", timeout=0.05)

    def have_handed_over() -> None:
        held = other_locks.acquire("learn")
        asked = len(proxy.exchanges)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(locks.acquire, "learn", timeout=HUNG)
            eventually(lambda: len(proxy.exchanges) > asked, HUNG)  # it queues
            held.release()
            waiting.result().release()

    def wakings(exchanges: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """By what is no script, with something in its reply."""
        return [found for found in exchanges if b"EVAL" not in found[0] and found[1][1:3] != b"-1"]

    for again in True, False:  # the first time the scripts are loaded
        held = locks.acquire("learn")
        if again:
            acquire_in_vain()
            held.extend(10)
            held.release()
    acquire, queued = script(watch(acquire_in_vain))
    extend, _ = script(watch(lambda: held.extend(10)))
    release, _ = script(watch(held.release))
    same, granted = script(watch(lambda: locks.acquire("learn").release()))
    assert same == acquire
    differ = next(i for i in range(len(queued)) if queued[i] != granted[i]) + 1
    # It may also find out by asking once more, just then.
    wake, woken = eventually(lambda: wakings(watch(have_handed_over)), HUNG)[0]
    return {
        "queued": (acquire, queued[:differ]),
        "granted": (acquire, granted[:differ]),
        "handed over": (wake.split(b"\r\n")[2], woken[:2]),
        "extended": (extend, b""),
        "released": (release, b""),
    }


@pytest.mark.parametrize("which", ANSWERS)
def test_replies_cut_after_execution(
    which: str,
    lock_set: Callable[..., LockSet],
    proxy: CuttingProxy,
    make_gov: Callable[..., GovRedis],
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The renewal thread lists held locks: its exchange must not be taken for one of those learned here.
    monkeypatch.setattr(lease_module, "FIRST_DUE", 1000)
    locks, other_locks = (make_gov(redis_url=proxy.url).locks for _ in range(2))
    request, reply = exchanges_of(locks, other_locks, proxy, eventually)[which]
    processes = lock_set(url=proxy.url)
    processes.goes_on()
    for times in [1, 2, 3] * 2:  # with that to its repetition, and to the one after
        goal = proxy.cuts + times
        proxy.cut_next(request, reply=reply, times=times)
        processes.wait(lambda goal=goal: proxy.cuts == goal)
        processes.somebody_goes_on(5)
    processes.goes_on()
    processes.end()
    processes.check(passed=False, lossless=True)


def test_a_release_whose_reply_was_lost_counts_whatever_happened_since(
    proxy: CuttingProxy, redis: RedisServer, make_gov: Callable[..., GovRedis], eventually: Callable[..., Any]
) -> None:
    ours = make_gov(redis_url=proxy.url, socket_timeout=HUNG).locks
    ours.acquire("x").release()
    proxy.exchanges.clear()
    ours.acquire("x").release()
    release = proxy.exchanges[-1][0].split(b"\r\n")[4]
    held = ours.acquire("x", ttl=HUNG)
    first, second = (make_gov(redis_url=redis.url).locks for _ in range(2))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(locks.acquire, "x", timeout=HUNG) for locks in (first, second)]
        eventually(lambda: redis.command("ZCARD", sibling("lock:x", "queue")) == 2, HUNG)
        proxy.cut_next(release)
        proxy.accepting.clear()  # the repetition, on a new connection
        releasing = pool.submit(held.release)
        try:
            for one in as_completed(waiting):
                assert one.result().release()
        finally:
            proxy.accepting.set()
        assert releasing.result()
