"""A holder whose process was killed: the next caller on its host releases the lock for it, to the longest waiter.

Only where the death is certain.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE

from govredis import BackendUnavailable, GovRedis, LockTimeout, LockUnavailable
from govredis._boottime import clock
from govredis.keys import sibling
from govredis.locks import DistributedLock
from govredis.locks.host_lock import liveness as liveness_module
from govredis.locks.host_lock.exclusive import ExclusiveHostLock
from govredis.locks.host_lock.liveness import Liveness, lock_range
from govredis.locks.host_lock.record import LockRecord, format_record
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

KEY = "lock:x"
FENCE, QUEUE = sibling(KEY, "fence"), sibling(KEY, "queue")


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def others(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    """The locks of another process on this host."""
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def far(make_gov: Callable[..., GovRedis], redis_server: RedisServer, tmp_path: Path) -> DistributedLock:
    """On another host: with lock files of its own."""
    return make_gov(redis_url=redis_server.url, socket_timeout=5, lock_folder=str(tmp_path / "far")).locks


@pytest.fixture
def start(make_worker: Callable[..., Any], redis_server: RedisServer) -> Callable[[], Any]:
    """A process that holds it for long."""

    def holder() -> Any:
        worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
        worker.run("held = locks.acquire('x', ttl=600)")
        return worker

    return holder


@pytest.fixture
def holder(start: Callable[[], Any]) -> Any:
    return start()


def is_kept(locks: DistributedLock, plain_redis: Any) -> bool:
    """Whether nobody gets it, by trying."""
    before = plain_redis.get(KEY)
    assert before
    tried = [locks.try_acquire("x") for _ in range(2)]
    return tried == [None, None] and bool(plain_redis.get(KEY) == before)


# -- released ----------------------------------------------------------------------------------------------------------


def test_the_next_caller_after_a_death_gets_a_higher_token(
    locks: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    token = holder.eval("held.token")
    assert is_kept(locks, plain_redis)
    holder.kill()
    with locks.acquire("x", timeout=0, ttl=500) as held:
        assert held.token > token
        assert held.degraded is False
        assert plain_redis.get(KEY) == held._lease.owner
        assert int(plain_redis.get(FENCE)) == held.token
        held.extend()
        assert locks.try_acquire("x") is None
    assert not plain_redis.exists(KEY)


def test_again_and_again(start: Callable[[], Any]) -> None:
    tokens = []
    for _ in range(4):
        worker = start()
        tokens.append(worker.eval("held.token"))
        worker.kill()
    assert tokens == sorted(set(tokens))


def test_waiters_get_a_dead_holders_lock_in_the_order_of_their_arrival(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    """Wherever they wait, though those on the other host cannot tell; and who finds out does not go before them."""
    with ThreadPoolExecutor(4) as pool:
        waiting = []
        for n, mine in enumerate((far, locks, far, locks)):
            waiting.append(pool.submit(mine.acquire, "x", timeout=60, ttl=600))
            eventually(lambda n=n: plain_redis.zcard(QUEUE) == n + 1)
        holder.kill()
        tokens = []
        for first in waiting:
            with first.result(PATIENCE) as held:
                tokens.append(held.token)
                assert locks.try_acquire("x") is None
                assert not any(later.done() for later in waiting[len(tokens) :])
        assert tokens == sorted(set(tokens))


def test_a_caller_that_does_not_wait_hands_a_dead_holders_lock_to_a_waiter(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(far.acquire, "x", timeout=60)
        eventually(lambda: plain_redis.zcard(QUEUE) == 1)
        holder.kill()
        eventually(lambda: locks.try_acquire("x") is None and waiting.done())
        assert waiting.result(0).release()


def test_a_single_caller_of_many_that_notice_a_death_at_once_gets_the_lock(
    locks: DistributedLock, start: Callable[[], Any]
) -> None:
    for _ in range(3):
        worker = start()
        worker.kill()
        with ThreadPoolExecutor(8) as pool:
            won = [held for held in pool.map(lambda _: locks.try_acquire("x"), range(8)) if held is not None]
        assert len(won) == 1
        won[0].raise_if_lost()
        assert won[0].release()


def test_a_zombie_is_dead(locks: DistributedLock, holder: Any) -> None:
    """A zombie: its process id is there still."""
    holder.process.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    locks.acquire("x", timeout=0).release()


def test_an_unanswered_report_of_a_death_is_sent_again(
    locks: DistributedLock, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.kill()
    acquire, unanswered = locks._backend.acquire, []

    def asked(*args: Any) -> Any:
        if args[-1] is not None and not unanswered:
            unanswered.append(args)
            raise BackendUnavailable("our own pool is full")
        return acquire(*args)

    monkeypatch.setattr(locks._backend, "acquire", asked)
    locks.acquire("x", timeout=30).release()
    assert unanswered


def test_a_rwlock_and_a_semaphore_are_freed_by_their_leases(
    locks: DistributedLock, make_worker: Callable[..., Any], redis_server: RedisServer
) -> None:
    worker = make_worker(redis_url=redis_server.url, socket_timeout=5)
    worker.run("held = [locks.rwlock('x').write(ttl=600), locks.semaphore('x', slots=1).acquire(ttl=600)]")
    worker.kill()
    with pytest.raises(LockTimeout):
        locks.rwlock("x").write(timeout=0)
    with pytest.raises(LockTimeout):
        locks.semaphore("x", slots=1).acquire(timeout=0)


# -- not released ------------------------------------------------------------------------------------------------------


def test_a_holder_that_lives_or_stands_still_keeps_the_lock(
    locks: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    assert is_kept(locks, plain_redis)
    holder.stop()
    assert is_kept(locks, plain_redis)
    holder.resume()
    assert holder.eval("held.release()") is True
    locks.acquire("x", timeout=0).release()


def test_on_another_host_nobody_can_tell(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    holder.kill()
    assert is_kept(far, plain_redis)
    locks.acquire("x", timeout=0).release()


CLOSINGS = {
    "the lock's": "os.close(held._lease.host_lock._files[0])",
    "its life's": "os.close(held._lease.host_lock._process.liveness._files[0])",
    "all": "os.closerange(3, 1000)",
}


@pytest.mark.parametrize("closing", CLOSINGS)
def test_a_living_holder_whose_descriptors_were_closed_keeps_it_until_it_knows(
    locks: DistributedLock, holder: Any, plain_redis: Any, closing: str
) -> None:
    holder.run(CLOSINGS[closing])
    assert is_kept(locks, plain_redis)
    if closing == "its life's":
        assert holder.eval("held.extend()") is None
        assert holder.eval("held.release()") is True
    else:
        assert holder.eval("held.extend()") == "LockLost"
        assert holder.eval("held.raise_if_lost()") == "LockLost"
        holder.kill()  # with its sockets closed under it, it may not reach Redis any more
    locks.acquire("x", timeout=0).release()


def test_a_child_forked_in_c_keeps_it_for_as_long_as_it_lives(
    locks: DistributedLock, holder: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    """It may hold the descriptors. The parent's death is not certain then; the lease ends anyway."""
    holder.run(
        "import ctypes, time\n"
        "child = ctypes.CDLL(None).fork()\n"
        "if not child:\n"
        "    [os.close(fd) for fd in (0, 1, 2)]\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
    )
    child = holder.eval("child")
    holder.kill()
    try:
        assert is_kept(locks, plain_redis)
    finally:
        os.kill(child, 9)
    eventually(lambda: (held := locks.try_acquire("x")) is not None and held.release())


def test_a_forked_child_does_not_keep_it(
    locks: DistributedLock, holder: Any, plain_redis: Any, eventually: Callable[..., Any]
) -> None:
    holder.run(
        "import time\n"
        "warnings.simplefilter('ignore')\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    [os.close(fd) for fd in (0, 1, 2)]\n"
        "    os.write(write, b'.')\n"  # past its at-fork hooks, which a killed parent does not wait for
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.close(write)\n"
        "assert os.read(read, 1) == b'.'\n"
    )
    child = holder.eval("child")
    holder.kill()
    try:
        locks.acquire("x", timeout=0).release()
    finally:
        os.kill(child, 9)


def test_a_death_counts_only_where_redis_and_the_file_agree(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    owner, token = plain_redis.get(KEY), int(plain_redis.get(FENCE))
    holder.kill()
    for changed in {KEY: "another"}, {FENCE: token + 1}, {FENCE: token - 1}, {FENCE: ""}, {KEY: owner + "0"}:
        plain_redis.mset({KEY: owner, FENCE: token, **changed})
        assert is_kept(locks, plain_redis), changed
    plain_redis.mset({KEY: owner, FENCE: token})
    plain_redis.delete(FENCE)
    assert is_kept(locks, plain_redis)
    plain_redis.mset({KEY: owner, FENCE: token})
    with locks.acquire("x", timeout=0) as held:
        assert held.token > token


def test_a_later_holder_elsewhere_keeps_the_lock(
    locks: DistributedLock, far: DistributedLock, holder: Any, plain_redis: Any
) -> None:
    holder.kill()
    assert far.force_release("x")
    with far.acquire("x", timeout=0) as held:
        assert is_kept(locks, plain_redis)
        held.extend()
    locks.acquire("x", timeout=0).release()


class Found:
    """A lock file as a dead process left it, and a host lock that looks at it. Any difference saves the lock."""

    def __init__(self, locks: DistributedLock) -> None:
        self.host_lock: ExclusiveHostLock = locks._file_backend.open_exclusive(KEY)
        here = self.host_lock._process
        child = subprocess.Popen(["true"])
        child.wait()
        namespace = here.liveness.name.split(".")[0]
        self.byte = 12345
        self.liveness = f"{namespace}.{child.pid:x}.1.{self.byte:x}"
        self.record = LockRecord(5, "dead", clock() + 100, here.boot, self.liveness)
        self.write(self.record)

    def write(self, holder: LockRecord, passer: LockRecord | None = None) -> None:
        raw = format_record(holder) + (format_record(passer) if passer else b"")
        os.ftruncate(self.host_lock._files[0], 0)
        os.pwrite(self.host_lock._files[0], raw, 0)


@pytest.fixture
def found(locks: DistributedLock) -> Any:
    found = Found(locks)
    assert found.host_lock.dead_holder() == found.record
    yield found
    assert not found.host_lock._flocked
    found.host_lock.leave()


def test_a_record_of_another_or_an_unknown_boot_proves_no_death(found: Found) -> None:
    for boot in "another", "":
        found.write(found.record._replace(boot=boot))
        assert found.host_lock.dead_holder() is None
    found.host_lock._process = found.host_lock._process._replace(boot="")
    assert found.host_lock.dead_holder() is None


def test_a_process_whose_liveness_is_locked_lives(found: Found) -> None:
    """By a child forked in C, or in another container: of its process id nothing can be seen."""
    fd = os.open(Path(found.host_lock._path).with_name("living"), os.O_RDWR)
    lock_range(fd, fcntl.F_WRLCK, found.byte, 1)
    assert found.host_lock.dead_holder() is None
    elsewhere = found.record._replace(liveness="1" + found.liveness)
    found.write(elsewhere)
    assert found.host_lock.dead_holder() is None
    os.close(fd)
    assert found.host_lock.dead_holder() == elsewhere


def test_a_process_that_is_there_lives(found: Found, locks: DistributedLock) -> None:
    """It may have closed all its descriptors. A process that came later under its process id is not it."""
    namespace, _, started, _ = found.host_lock._process.liveness.name.split(".")
    for life, lives in {
        f"{namespace}.{os.getpid():x}.{started}.{found.byte:x}": True,
        f"{namespace}.{os.getpid():x}.1.{found.byte:x}": False,
        f"1{namespace}.{os.getpid():x}.{started}.{found.byte:x}": False,
    }.items():
        found.write(found.record._replace(liveness=life))
        assert (found.host_lock.dead_holder() is None) == lives, life


def test_a_process_whose_file_is_locked_may_live(found: Found, locks: DistributedLock) -> None:
    with Path(found.host_lock._path).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert found.host_lock.dead_holder() is None
    assert found.host_lock.dead_holder() == found.record


def test_a_passed_holder_is_not_the_last_one(found: Found) -> None:
    passer = found.record._replace(token=6, owner="passer")
    for until in clock() + 100, 0.0:
        found.write(found.record, passer._replace(deadline=until))
        assert found.host_lock.dead_holder() is None
    found.write(found.record, passer._replace(token=4))
    assert found.host_lock.dead_holder() == found.record


def test_a_process_without_a_known_liveness_may_live(found: Found) -> None:
    found.write(found.record._replace(liveness=""))
    assert found.host_lock.dead_holder() is None


def test_this_process_lives_whatever_its_files_say(found: Found, others: DistributedLock) -> None:
    for life in found.host_lock._process.liveness, others._file_backend.open_exclusive("other")._process.liveness:
        found.write(found.record._replace(liveness=life.name))
        assert found.host_lock.dead_holder() is None


def test_the_record_is_read_again_once_nobody_can_go_in(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    really = ExclusiveHostLock._try_flock

    def another_first(self: ExclusiveHostLock, *args: Any) -> bool:
        found.write(found.record._replace(token=6, owner="another"))
        return really(self, *args)

    monkeypatch.setattr(ExclusiveHostLock, "_try_flock", another_first)
    assert found.host_lock.dead_holder() is None


def test_without_locks_of_open_file_descriptions_no_death_is_known(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(liveness_module, "SETLK", None)
    assert Liveness(str(tmp_path / "living")).name == ""
    found.host_lock._process = found.host_lock._process._replace(liveness=Liveness(str(tmp_path / "living")))
    assert found.host_lock.dead_holder() is None
    assert not (tmp_path / "living").exists()


# -- lives -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["removed", "closed", "reused"])
def test_a_life_whose_file_is_gone_goes_on_in_another(locks: DistributedLock, tmp_path: Path, what: str) -> None:
    with locks.acquire("x", ttl=60) as held:
        life = held._lease.host_lock._process.liveness  # type: ignore[attr-defined]
        fd = life._files[0]
        if what == "removed":
            os.unlink(life._path)
        elif what == "closed":
            os.close(fd)
        else:
            with (tmp_path / "other").open("wb") as other:
                os.dup2(other.fileno(), fd)  # at once: no other thread gets it in between
        life._next_look = 0.0
        held.extend()
        looker = Liveness(life._path)
        asked = liveness_module._FLOCK.pack(fcntl.F_WRLCK, 0, life._byte, 1, 0)
        answer = fcntl.fcntl(looker._files[0], liveness_module._GETLK, asked)  # type: ignore[arg-type]
        assert liveness_module._FLOCK.unpack(answer[:28])[0] == fcntl.F_WRLCK
        if what == "reused":
            os.write(fd, b"unharmed")
            os.close(fd)
            assert (tmp_path / "other").read_bytes() == b"unharmed"


def test_a_life_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(liveness_module, "clock", lambda: now[0])
    life = Liveness(str(tmp_path / "living"))
    os.unlink(life._path)
    for now[0] in 100.0, 100.9:
        life.keep()
        assert not os.path.exists(life._path)
    now[0] = 101.0
    life.keep()
    assert os.path.exists(life._path)


def test_a_death_is_not_known_while_the_file_is_opened_anew(
    locks: DistributedLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.acquire("x", ttl=60) as held:
        life = held._lease.host_lock._process.liveness  # type: ignore[attr-defined]
        dead = subprocess.run([sys.executable, "-c", DIED.format(path=life._path)], capture_output=True, text=True)
        name = dead.stdout.strip()
        assert life.has_ended(name)

        def lives(pid: int, started: int) -> bool:
            kept.extend(life._files)
            life._files.clear()
            return False

        kept: list[int] = []
        monkeypatch.setattr(liveness_module, "_lives", lives)
        assert not life.has_ended(name)
        life._files[:] = kept


DIED = """
from govredis.locks.host_lock.liveness import Liveness
print(Liveness({path!r}).name)
"""


def test_a_life_is_kept_fresh(locks: DistributedLock) -> None:
    with locks.acquire("x", ttl=60) as held:
        path = held._lease.host_lock._process.liveness._path  # type: ignore[attr-defined]
        os.utime(path, (1_000_000, 1_000_000))
        held._lease.host_lock._process.liveness._next_look = 0.0  # type: ignore[attr-defined]
        held.extend()
        assert os.stat(path).st_mtime > 1_000_000_000


def test_a_folder_that_does_without_files_finds_nobody_dead(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = make_gov(redis_url=redis_server.url, lock_fallback="fail").locks
    holder.kill()

    def broken(self: ExclusiveHostLock) -> None:
        raise LockUnavailable("for this test") from OSError(5, "I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(ExclusiveHostLock, "dead_holder", broken)
        assert locks.try_acquire("x") is None
    locks.acquire("x", timeout=0).release()
