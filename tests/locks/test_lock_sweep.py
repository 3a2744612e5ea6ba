"""The number of lock files and of fence keys is bounded: both go an hour after the last lease, and tokens rise on."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from govredis import GovRedis
from govredis._boottime import clock
from govredis.keys import sibling
from govredis.locks.backends.file_backend import FileLockBackend
from govredis.locks.host_lock import sweep as sweep_module
from govredis.locks.host_lock.exclusive import ExclusiveHostLock
from govredis.locks.host_lock.record import FENCE_KEPT, PASSERS, LockRecord, format_record
from govredis.locks.host_lock.sweep import Sweep, remove_if_over
from govredis.testing.servers import RedisServer

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.fixture
def folder(tmp_path: Path) -> FileLockBackend:
    return FileLockBackend(str(tmp_path / "locks"))


STARTS = Sweep.start_if_due


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sweep of this process's own comes between."""
    monkeypatch.setattr(Sweep, "start_if_due", lambda sweep: None)


def files_of(folder: FileLockBackend | Path) -> list[Path]:
    path = folder if isinstance(folder, Path) else Path(folder.path)
    return sorted(file for file in path.iterdir() if file.name != "living")


def sweep_of(folder: FileLockBackend) -> Sweep:
    assert folder._sweep
    return folder._sweep


def micros_ago(seconds: float) -> int:
    return int((time.time() - seconds) * 1_000_000)


def age(path: Path, seconds: float = FENCE_KEPT + 60) -> None:
    """As if nobody had touched it for so long."""
    os.utime(path, (time.time() - seconds,) * 2)


def leave_behind(folder: FileLockBackend, key: str = "lock:x", ago: float = FENCE_KEPT + 60, **of_record: Any) -> Path:
    """The file of one who was inside, whose lease ended so many seconds ago."""
    folder.open_exclusive(key).leave()
    path = Path(folder._file(key))
    record = LockRecord(micros_ago(ago), "owner", clock() - ago, BOOT, "")._replace(**of_record)
    path.write_bytes(format_record(record))
    age(path, ago)
    return path


def swept(folder: FileLockBackend, ago: float) -> None:
    """As if the last sweep had ended so many seconds ago."""
    Path(folder.path, "living").write_text(f"{time.time() - ago:.0f}")


# -- which are removed -----------------------------------------------------------------------------------------------


def test_a_file_whose_fence_has_ended_is_removed_and_not_a_moment_before(folder: FileLockBackend) -> None:
    over = leave_behind(folder, "over")
    not_over = leave_behind(folder, "not over", FENCE_KEPT - 60)
    sweep_of(folder).run()
    assert files_of(folder) == [not_over]
    assert not over.exists()


NOT_OVER: dict[str, Callable[[], dict[str, Any]]] = {
    "its lease runs yet": lambda: {"deadline": clock() + 1000},
    "its lease ended less than an hour ago": lambda: {"deadline": clock() - FENCE_KEPT + 100},
    "its token is of a clock that was ahead": lambda: {"token": micros_ago(FENCE_KEPT - 100)},
    "its token is of the future": lambda: {"token": micros_ago(-1e6)},
}


@pytest.mark.parametrize("why", NOT_OVER)
@pytest.mark.parametrize("place", [0, PASSERS])
def test_by_either_record(folder: FileLockBackend, why: str, place: int) -> None:
    path = leave_behind(folder)
    old = LockRecord(micros_ago(2 * FENCE_KEPT), "owner", clock() - 2 * FENCE_KEPT, BOOT, "")
    kept = format_record(old._replace(**NOT_OVER[why]()))
    path.write_bytes(kept + format_record(old) if place == 0 else format_record(old) + kept)
    age(path)
    assert remove_if_over(str(path), BOOT) is False, why
    path.write_bytes(format_record(old) + format_record(old))
    assert remove_if_over(str(path), BOOT) is True


def test_a_lease_of_another_boot_runs_no_more(folder: FileLockBackend) -> None:
    path = leave_behind(folder, boot="another", deadline=clock() + 1000)
    assert remove_if_over(str(path), BOOT)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\0" * 320])
def test_a_file_without_a_record_goes_by_its_time_of_change(folder: FileLockBackend, content: bytes) -> None:
    path = leave_behind(folder)
    path.write_bytes(content)
    sweep_of(folder).run()
    assert path.exists()
    age(path)
    swept(folder, 700)
    sweep_of(folder).run()
    assert not path.exists()


def test_a_file_with_a_holder_inside_stays(folder: FileLockBackend) -> None:
    """Whatever it says: by the flock, shared or alone, and by the passers' turn."""
    path = leave_behind(folder)
    for how in fcntl.LOCK_EX, fcntl.LOCK_SH:
        with path.open("r+b") as file:
            fcntl.flock(file, how)
            assert remove_if_over(str(path), BOOT) is False
    passer = folder.open_exclusive("lock:x")
    assert passer._lock_passers()
    assert remove_if_over(str(path), BOOT) is False
    passer._unlock_passers()
    assert remove_if_over(str(path), BOOT) is True
    passer.leave()


def test_a_sweep_that_removes_nothing_leaves_no_lock_behind(
    folder: FileLockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a child forked in C has the descriptor too."""
    path = leave_behind(folder, ago=10)
    kept: list[int] = []
    really = os.open
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *args: (kept.append(os.dup(fd := really(*args))), fd)[1])
        assert remove_if_over(str(path), BOOT) is False
    (fd,) = kept
    host_lock = folder.open_exclusive("lock:x")
    assert host_lock._try_flock()
    assert host_lock._lock_passers()
    host_lock.leave()
    os.close(fd)


def test_a_new_file_under_a_removed_files_name_stays(folder: FileLockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sweep came first, and somebody has locked the name anew."""
    path = leave_behind(folder)
    really, others = sweep_module._flock, list[ExclusiveHostLock]()

    def later(fd: int) -> bool:
        if not others:
            others.append(folder.open_exclusive("lock:y"))  # of the other sweep this is not asked
            assert remove_if_over(str(path), BOOT)
            others.append(folder.open_exclusive("lock:x"))
            assert others[-1].enter(micros_ago(0), "new", clock() + 10, may_pass=False)
        return really(fd)

    monkeypatch.setattr(sweep_module, "_flock", later)
    assert remove_if_over(str(path), BOOT) is False
    assert others[-1].refresh(micros_ago(0), clock() + 20), "its file is in place"
    for host_lock in others:
        host_lock.leave()


def test_files_of_semaphores_and_read_write_locks_go_too_and_what_is_not_ours_stays(
    make_gov: Callable[..., GovRedis], tmp_path: Path
) -> None:
    gov = make_gov(redis_enabled=False)
    for _ in range(6):
        gov.locks.semaphore("x", slots=3).acquire().release()
    gov.locks.rwlock("x").read().release()
    path = tmp_path / "locks"
    for name in "new-1-ab12", "check-1-2", "check-1-2-link", "mine", "a" * 39, "a" * 41, "b" * 40 + ".":
        (path / name).touch()
    (path / ("c" * 40)).symlink_to(path / "mine")
    before = files_of(path)
    assert len(before) >= 3 + 8
    for file in before:
        os.utime(file, (time.time() - FENCE_KEPT - 60,) * 2, follow_symlinks=False)
    sweep_of(gov.locks._file_backend).run()
    assert [file.name for file in files_of(path)] == sorted(["mine", "a" * 39, "a" * 41, "b" * 40 + ".", "c" * 40])
    assert gov.counters.get("locks.files_removed") == len(before) - 5


# -- who has it open meanwhile ---------------------------------------------------------------------------------------


def test_a_holder_of_a_removed_file_goes_in_by_the_new_one_with_a_later_token(folder: FileLockBackend) -> None:
    path = leave_behind(folder)
    before, passer = folder.open_exclusive("lock:x"), folder.open_exclusive("lock:x")
    assert remove_if_over(str(path), BOOT)
    token = micros_ago(0)
    after = folder.open_exclusive("lock:x")
    assert after.enter(token, "after", clock() + 10, may_pass=True)
    assert not before.enter(token - 1, "before", clock() + 10, may_pass=True)
    assert not passer.enter(token + 1, "passer", clock() + 10, may_pass=True)
    after.leave()
    assert not before.enter(token - 1, "before", clock() + 10, may_pass=True)
    assert before.last_token() >= token - 1
    assert before.enter(token + 1, "before", clock() + 10, may_pass=True)
    before.leave()
    assert not passer.enter(token + 1, "passer", clock() + 10, may_pass=True)
    assert passer.enter(token + 2, "passer", clock() + 10, may_pass=True)
    passer.leave()


@pytest.mark.parametrize("kind", ["lock", "read", "write", "semaphore"])
def test_a_waiter_whose_file_is_removed_keeps_its_turn(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    plain_redis: Any,
    tmp_path: Path,
    kind: str,
    eventually: Callable[..., Any],
) -> None:
    """It waits for one on another host; here nobody has locked for an hour."""
    take: dict[str, Callable[[GovRedis, float], Any]] = {
        "lock": lambda gov, timeout: gov.locks.acquire("x", timeout=timeout),
        "read": lambda gov, timeout: gov.locks.rwlock("x").read(timeout=timeout),
        "write": lambda gov, timeout: gov.locks.rwlock("x").write(timeout=timeout),
        "semaphore": lambda gov, timeout: gov.locks.semaphore("x", slots=1).acquire(timeout=timeout),
    }
    here = make_gov(redis_url=redis_server.url, socket_timeout=5)
    there = make_gov(redis_url=redis_server.url, socket_timeout=5, lock_folder=str(tmp_path / "far"))
    holder = there.locks.rwlock("x").write() if kind in ("read", "write") else take[kind](there, 1)
    won: list[Any] = []
    thread = threading.Thread(target=lambda: won.append(take[kind](here, 30)))
    thread.start()
    base = "lock:x" if kind == "lock" else sibling("lock:x", "semaphore" if kind == "semaphore" else "rwlock")
    queue = sibling(base, "queue") if kind == "lock" else f"{base}:queue"
    eventually(lambda: plain_redis.zcard(queue) == 1)
    removed = files_of(tmp_path / "locks")
    assert removed
    for path in removed:
        assert remove_if_over(str(path), BOOT)
    holder.release()
    thread.join(30)
    (held,) = won
    assert held.token > holder.token
    held.extend()
    assert files_of(tmp_path / "locks")
    assert here.counters.get("locks.waits") == 1
    held.release()


def test_without_redis_tokens_rise_over_a_removal(make_gov: Callable[..., GovRedis], tmp_path: Path) -> None:
    locks = make_gov(redis_enabled=False).locks
    first = locks.acquire("x")
    first.release()
    (path,) = files_of(tmp_path / "locks")
    path.unlink()
    with locks.acquire("x") as second:
        assert second.token > first.token


# -- when, and by which process ---------------------------------------------------------------------------------------


def test_a_process_that_holds_a_lock_sweeps_by_itself(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    tmp_path: Path,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sweep, "start_if_due", STARTS)
    (tmp_path / "locks").mkdir(mode=0o700)
    old = [tmp_path / "locks" / f"{n:040}" for n in range(3)]
    for path in old:
        path.touch()
        age(path)
    gov = make_gov(redis_url=redis_server.url)
    gov.locks.acquire("x").release()
    eventually(lambda: not any(path.exists() for path in old))
    assert len(files_of(tmp_path / "locks")) == 1


def test_a_folder_is_swept_once_in_ten_minutes_by_one_process_at_a_time(
    folder: FileLockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave_behind(folder)
    with open(f"{folder.path}/living", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep_of(folder).run()
        assert path.exists(), "another process is at it"
    sweep_of(folder).run()
    assert not path.exists()
    path = leave_behind(folder)
    sweep_of(folder).run()
    assert path.exists()
    swept(folder, 500)
    sweep_of(folder).run()
    assert path.exists()
    swept(folder, 700)
    sweep_of(folder).run()
    assert not path.exists()
    path = leave_behind(folder)
    swept(folder, -1e6)  # of a clock that was ahead
    sweep_of(folder).run()
    assert not path.exists()


def test_a_sweep_that_dies_in_the_middle_is_followed_at_once(
    folder: FileLockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [leave_behind(folder, f"{n}") for n in range(5)]

    def dies(path: str, boot: str) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sweep_module, "remove_if_over", dies)
        sweep_of(folder).run()
    sweep_of(folder).run()
    assert not any(path.exists() for path in paths)


def test_a_sweep_starts_no_more_than_one_thread_in_ten_minutes(
    folder: FileLockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.open_exclusive("lock:x").leave()
    now, ran = clock(), []
    started: list[threading.Thread] = []
    start_daemon = sweep_module.start_daemon

    def start(name: str, run: Callable[[], None]) -> threading.Thread | None:
        thread = start_daemon(name, run)
        assert thread is not None
        started.append(thread)
        return thread

    monkeypatch.setattr(sweep_module, "start_daemon", start)
    monkeypatch.setattr(sweep_module, "clock", lambda: now)
    sweep = sweep_of(folder)
    monkeypatch.setattr(Sweep, "start_if_due", STARTS)
    monkeypatch.setattr(sweep, "run", lambda: ran.append(threading.current_thread()), raising=False)
    for _ in range(3):
        sweep.start_if_due()
    now += 599
    sweep.start_if_due()
    now += 2
    sweep.start_if_due()
    for thread in started:
        thread.join()
    assert len(ran) == 2
    assert threading.current_thread() not in ran


def test_twelve_thousand_names_leave_few_files_and_no_fence_for_longer_than_an_hour(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    plain_redis: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gov = make_gov(redis_url=redis_server.url, socket_timeout=5)
    names = [f"order-{n}" for n in range(12_000)]
    for name in names[:200]:
        gov.locks.acquire(name, ttl=30).release()
    assert all(plain_redis.pttl(key) <= (FENCE_KEPT + 30) * 1000 + 1 for key in plain_redis.keys("*fence"))
    folder = gov.locks._file_backend
    for name in names[200:]:  # as their host locks do
        folder.open_exclusive(f"lock:{name}").leave()
    assert len(files_of(folder)) == 12_000
    later = FENCE_KEPT + 60
    monkeypatch.setattr(sweep_module, "clock", lambda: clock() + later)
    monkeypatch.setattr(sweep_module, "time", SimpleNamespace(time=lambda: time.time() + later, sleep=lambda _: None))
    with gov.locks.acquire("in use"):
        sweep_of(folder).run()
        assert len(files_of(folder)) == 1
        assert gov.counters.get("locks.files_removed") == 12_000
