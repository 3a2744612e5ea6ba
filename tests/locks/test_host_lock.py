"""The host lock by itself: flock, the record, and passing."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE

from govredis._boottime import clock
from govredis.locks.backends.file_backend import FileLockBackend
from govredis.locks.host_lock import exclusive as host_lock_module
from govredis.locks.host_lock.exclusive import ExclusiveHostLock
from govredis.locks.host_lock.record import LockRecord, format_record, parse_record, read_records


@pytest.fixture
def folder(tmp_path: Path) -> FileLockBackend:
    return FileLockBackend(str(tmp_path / "locks"))


@pytest.fixture
def opened(folder: FileLockBackend) -> Iterator[Callable[[], ExclusiveHostLock]]:
    """Opens the file of one resource, as often as asked."""
    made: list[ExclusiveHostLock] = []

    def open_one() -> ExclusiveHostLock:
        made.append(folder.open_exclusive("lock:x"))
        return made[-1]

    yield open_one
    for host_lock in made:
        host_lock.leave()


def file_of(folder: FileLockBackend) -> Path:
    (path,) = (path for path in Path(folder.path).iterdir() if path.name != "living")
    return path


def record_of(host_lock: ExclusiveHostLock) -> LockRecord:
    record = read_records(host_lock._files[0]).holder
    assert record is not None
    return record


def enter(host_lock: ExclusiveHostLock, token: int, ttl: float = 10.0, *, may_pass: bool = False) -> bool:
    return host_lock.enter(token, f"owner-{token}", clock() + ttl, may_pass=may_pass)


# -- flock -----------------------------------------------------------------------------------------------------------


def test_one_host_lock_is_inside_at_a_time(opened: Callable[[], ExclusiveHostLock]) -> None:
    first, second = opened(), opened()
    assert enter(first, 1)
    assert first.inside
    assert not enter(second, 2)
    assert not second.inside
    first.leave()
    assert not first.inside
    first.leave()
    assert enter(second, 2)


def test_nobody_enters_with_a_token_that_is_not_the_highest(opened: Callable[[], ExclusiveHostLock]) -> None:
    # Two who are granted tokens in one order may come here in the other.
    first, second, third = opened(), opened(), opened()
    assert enter(second, 2)
    second.leave()
    assert not enter(first, 1)
    assert not enter(first, 2)
    assert enter(third, 3)


def test_an_unlinked_file_is_noticed(opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend) -> None:
    before = opened()
    file_of(folder).unlink()
    after = opened()
    assert enter(after, 1)
    assert not enter(before, 2), "it locked an inode that nobody else will"
    after.leave()
    assert not enter(before, 2), "it may have been granted before one that the removed file knew of"
    assert before.last_token() == 2, "so a later one is asked for"
    assert enter(before, 3)


def test_a_crash_frees_it_at_once(
    make_worker: Callable[..., Any], opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend
) -> None:
    worker = make_worker(redis_enabled=False, lock_folder=folder.path)
    worker.run(
        "from govredis.locks.backends.file_backend import FileLockBackend\n"
        "from govredis._boottime import clock\n"
        f"host_lock = FileLockBackend({folder.path!r}).open_exclusive('lock:x')\n"
        "assert host_lock.enter(1, 'owner-1', clock() + 1000, may_pass=False)"
    )
    mine = opened()
    assert not enter(mine, 2, may_pass=True)
    worker.kill()
    assert enter(mine, 2)


def test_a_child_closes_and_never_unlocks(
    make_worker: Callable[..., Any], opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend
) -> None:
    worker = make_worker(redis_enabled=False, lock_folder=folder.path)
    worker.run(
        "from govredis.locks.backends.file_backend import FileLockBackend\n"
        "from govredis._boottime import clock\n"
        f"folder = FileLockBackend({folder.path!r})\n"
        "host_lock, waiting = folder.open_exclusive('lock:x'), folder.open_exclusive('lock:x')\n"
        "assert host_lock.enter(1, 'owner-1', clock() + 1000, may_pass=False)\n"
        "def child():\n"
        "    host_lock.leave()\n"
        "    return host_lock.inside, waiting.inside, len(files_in(folder.path))\n"
    )
    assert worker.eval("len(files_in(folder.path))") == 3, "and its life"
    assert worker.eval("in_child(child)") == "(False, False, 0)"
    mine = opened()
    assert not enter(mine, 2)


def test_a_child_does_not_keep_what_a_dead_parent_had(
    make_worker: Callable[..., Any], opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend
) -> None:
    worker = make_worker(redis_enabled=False, lock_folder=folder.path)
    worker.run(
        "from govredis.locks.backends.file_backend import FileLockBackend\n"
        "from govredis._boottime import clock\n"
        "import time\n"
        "warnings.simplefilter('ignore')\n"
        # A thread that still waits, say.
        f"host_lock = FileLockBackend({folder.path!r}).open_exclusive('lock:x')\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    [os.close(fd) for fd in (0, 1, 2)]\n"
        "    os.write(write, b'.')\n"  # past its at-fork hooks, which a killed parent does not wait for
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.close(write)\n"
        "assert os.read(read, 1) == b'.'\n"
        "assert host_lock.enter(1, 'owner-1', clock() + 1000, may_pass=False)"
    )
    child = worker.eval("child")
    try:
        worker.kill()
        mine = opened()
        assert enter(mine, 2)
    finally:
        os.kill(child, 9)


def test_a_collected_host_lock_closes_its_file(folder: FileLockBackend) -> None:
    host_lock = folder.open_exclusive("lock:x")
    (fd,) = host_lock._files
    del host_lock
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# -- the record ------------------------------------------------------------------------------------------------------


def test_the_record_names_the_owner_and_the_deadline(opened: Callable[[], ExclusiveHostLock]) -> None:
    host_lock = opened()
    assert host_lock.last_token() == 0
    until = clock() + 10
    assert host_lock.enter(7, "somebody", until, may_pass=False)
    record = record_of(host_lock)
    assert (record.token, record.owner) == (7, "somebody")
    assert read_records(host_lock._files[0]).passer is None
    assert record.deadline == pytest.approx(until, abs=1e-5)
    assert record.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host_lock.leave()
    assert opened().last_token() == 7


@pytest.mark.parametrize("content", [b"", b"\0" * 128, b"7 a 9.0 0 - 00000000", b"nonsense\n", b"\xff" * 300])
def test_a_file_with_anything_else_in_it_is_as_good_as_new(
    opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend, content: bytes
) -> None:
    opened()
    file_of(folder).write_bytes(content)
    host_lock, other = opened(), opened()
    assert host_lock.last_token() == 0
    assert enter(host_lock, 3)
    assert opened().last_token() == 3
    # It may come to be so while somebody is inside: nobody passes, and the next refresh mends it.
    file_of(folder).write_bytes(content)
    assert not enter(other, 4, may_pass=True)
    assert host_lock.refresh(3, clock() + 10)
    assert opened().last_token() == 3


def test_every_torn_record_is_told_from_a_whole_one(
    opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend
) -> None:
    first, second = opened(), opened()
    assert enter(first, 11111111)
    old = file_of(folder).read_bytes()
    first.leave()
    assert enter(second, 22222222, ttl=77.0)
    new = file_of(folder).read_bytes()
    assert len(old) == len(new) == 160
    for cut in range(1, 160):
        record = parse_record(new[:cut] + old[cut:])
        assert record is None or record in (parse_record(old), parse_record(new)), cut


def test_a_record_of_another_boot_vouches_for_nobody_but_its_token_stands(
    opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend
) -> None:
    opened()
    old = format_record(LockRecord(9, "somebody", clock() + 1000, "another-boot", ""))
    file_of(folder).write_bytes(old + old)
    host_lock = opened()
    assert host_lock.last_token() == 9
    assert enter(host_lock, 10)


def test_refresh_lengthens_and_never_shortens_and_is_refused_too_late(
    opened: Callable[[], ExclusiveHostLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock()
    monkeypatch.setattr(host_lock_module, "clock", lambda: now)
    host_lock = opened()
    assert not host_lock.refresh(1, now + 10), "it is not inside"
    assert host_lock.enter(1, "owner-1", now + 0.2, may_pass=False)
    assert host_lock.refresh(1, now + 0.4)
    longer = record_of(host_lock).deadline
    assert host_lock.refresh(1, now + 0.1)
    assert record_of(host_lock).deadline == longer
    now = longer
    assert not host_lock.refresh(1, now + 10)
    assert record_of(host_lock).deadline == longer, "it was written all the same"


# -- passing ---------------------------------------------------------------------------------------------------------


def pass_by(host_lock: ExclusiveHostLock, token: int, ttl: float = 10.0, within: float = PATIENCE) -> bool:
    deadline = clock() + within
    while not enter(host_lock, token, ttl, may_pass=True):
        if clock() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_only_a_holder_whose_record_ran_out_is_passed_and_only_by_a_grantee_of_redis(
    opened: Callable[[], ExclusiveHostLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, other, passer = opened(), opened(), opened()
    assert enter(stopped, 1, ttl=1000)
    assert not pass_by(passer, 2, within=0.3)
    monkeypatch.setattr(host_lock_module, "clock", lambda: clock() + 1000)
    assert pass_by(passer, 2, ttl=2000)
    assert passer.inside
    passing = read_records(other._files[0]).passer
    assert passing is not None
    assert (passing.token, passing.owner) == (2, "owner-2")
    # The stopped one wakes up. It disturbs nobody, neither by going on nor by leaving.
    assert not stopped.refresh(1, clock() + 3000)
    assert read_records(other._files[0]).passer == passing
    assert not enter(other, 3)
    stopped.leave()
    assert read_records(other._files[0]).passer == passing
    assert not enter(other, 3), "a fresh passer is honoured by who gets the flock"
    until = clock() + 3000
    assert passer.refresh(2, until) == until
    assert not enter(other, 3)
    passer.leave()
    assert enter(other, 3)


def test_a_record_that_ran_out_is_not_passed_at_first_sight(
    opened: Callable[[], ExclusiveHostLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A holder that has just taken the flock has not written yet.
    now = clock()
    monkeypatch.setattr(host_lock_module, "clock", lambda: now)
    stopped, passer = opened(), opened()
    assert stopped.enter(1, "owner-1", now, may_pass=False)
    now += 1000
    assert not passer.enter(2, "owner-2", now + 10, may_pass=True)
    now += 0.09
    assert not passer.enter(2, "owner-2", now + 10, may_pass=True)
    now += 0.02
    assert passer.enter(2, "owner-2", now + 10, may_pass=True)


def test_without_a_grant_of_redis_nobody_passes(opened: Callable[[], ExclusiveHostLock]) -> None:
    stopped, degraded = opened(), opened()
    assert enter(stopped, 1, ttl=0.001)
    deadline = clock() + 0.4
    while clock() < deadline:
        assert not enter(degraded, 2, may_pass=False)
        time.sleep(0.02)


def test_an_exception_in_the_middle_of_passing_leaves_no_fresh_record(
    opened: Callable[[], ExclusiveHostLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, passer, other = opened(), opened(), opened()
    assert enter(stopped, 1, ttl=0.001)
    written = []

    def strike(fd: int, raw: bytes, place: int) -> int:
        written.append(pwrite(fd, raw, place))
        raise KeyboardInterrupt

    pwrite = os.pwrite
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "pwrite", strike)
        pass_by(passer, 2)
    assert written
    assert not passer.inside
    passer.leave()
    stopped.leave()
    assert enter(other, 3)


def test_flock_not_posix_locks(opened: Callable[[], ExclusiveHostLock], folder: FileLockBackend) -> None:
    # A POSIX lock would go with any other descriptor of this process that closes.
    host_lock = opened()
    assert enter(host_lock, 1)
    with file_of(folder).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not enter(opened(), 2)
