"""The host guard by itself: flock, the record, who passes whom, and the folder."""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis import ConfigurationError, LockUnavailable
from govredis.locks import guard as guard_module
from govredis.locks.guard import HostGuard, LockFolder, Record, clock


@pytest.fixture
def folder(tmp_path: Path) -> LockFolder:
    return LockFolder(str(tmp_path / "locks"))


@pytest.fixture
def opened(folder: LockFolder) -> Iterator[Callable[[], HostGuard]]:
    """Opens the file of one resource, as often as asked."""
    guards: list[HostGuard] = []

    def open_one() -> HostGuard:
        guards.append(folder.guard("lock:x"))
        return guards[-1]

    yield open_one
    for guard in guards:
        guard.leave()


def file_of(folder: LockFolder) -> Path:
    (path,) = Path(folder.path).iterdir()
    return path


def record_of(guard: HostGuard) -> Record:
    record = guard._read()
    assert record is not None
    return record


def enter(guard: HostGuard, token: int, ttl: float = 10.0, *, may_pass: bool = False) -> bool:
    return guard.enter(token, f"owner-{token}", clock() + ttl, may_pass=may_pass)


# -- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_made_for_this_user_alone(folder: LockFolder) -> None:
    folder.guard("lock:x").leave()
    assert Path(folder.path).stat().st_mode & 0o7777 == 0o700
    assert file_of(folder).stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(folder: LockFolder, mode: int) -> None:
    Path(folder.path).mkdir()
    Path(folder.path).chmod(mode)
    with pytest.raises(ConfigurationError, match="GOVREDIS_LOCK_FOLDER"):
        folder.guard("lock:x")


def test_a_folder_of_another_user_is_refused(folder: LockFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(folder.path).mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder.path, 12345, 12345)
    else:  # who is not root cannot give a folder away; but can be somebody else than its owner
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigurationError, match="owns"):
        folder.guard("lock:x")


def test_a_link_and_a_file_in_its_place_are_refused(folder: LockFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    Path(folder.path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="must be a directory"):
        folder.guard("lock:x")
    Path(folder.path).unlink()
    Path(folder.path).touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        folder.guard("lock:x")


def test_a_link_in_place_of_a_lock_file_is_not_followed(folder: LockFolder, tmp_path: Path) -> None:
    folder.guard("lock:x").leave()
    file_of(folder).rename(tmp_path / "elsewhere")
    (Path(folder.path) / guard_module.hashlib.sha256(b"lock:x").hexdigest()[:40]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LockUnavailable, match="symbolic links"):
        folder.guard("lock:x")


def test_without_a_setting_the_folder_is_the_users_own_in_tmp_whatever_tmpdir_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert LockFolder(None).path == f"/tmp/govredis-locks-{os.geteuid()}"


def test_keys_become_hashed_names(folder: LockFolder) -> None:
    for key in "lock:../../etc/passwd", "lock:" + "ä" * 250, "lock:a", "lock:b":
        folder.guard(key).leave()
    names = [path.name for path in Path(folder.path).iterdir()]
    assert len(names) == 4
    assert all(len(name) == 40 and set(name) <= set("0123456789abcdef") for name in names)


def test_a_removed_folder_is_made_again(folder: LockFolder) -> None:
    folder.guard("lock:x").leave()
    file_of(folder).unlink()
    Path(folder.path).rmdir()
    folder.guard("lock:x").leave()
    assert file_of(folder).exists()


# -- flock -----------------------------------------------------------------------------------------------------------


def test_one_is_inside_at_a_time(opened: Callable[[], HostGuard]) -> None:
    first, second = opened(), opened()
    assert enter(first, 1)
    assert first.inside
    assert not enter(second, 2)
    assert not second.inside
    first.leave()
    assert not first.inside
    first.leave()
    assert enter(second, 2)


def test_nobody_enters_with_a_token_that_is_not_the_highest(opened: Callable[[], HostGuard]) -> None:
    # Two who are granted tokens in one order may come here in the other.
    first, second, third = opened(), opened(), opened()
    assert enter(second, 2)
    second.leave()
    assert not enter(first, 1)
    assert not enter(first, 2)
    assert enter(third, 3)


def test_an_unlinked_file_is_noticed(opened: Callable[[], HostGuard], folder: LockFolder) -> None:
    before = opened()
    file_of(folder).unlink()
    after = opened()
    assert enter(after, 1)
    assert not enter(before, 2), "it locked an inode that nobody else will"
    after.leave()
    assert enter(before, 2)


def test_a_crash_frees_it_at_once(
    make_worker: Callable[..., Any], opened: Callable[[], HostGuard], folder: LockFolder
) -> None:
    worker = make_worker(redis_enabled=False, lock_folder=folder.path)
    worker.run(
        "from govredis.locks.guard import LockFolder, clock\n"
        f"guard = LockFolder({folder.path!r}).guard('lock:x')\n"
        "assert guard.enter(1, 'owner-1', clock() + 1000, may_pass=False)"
    )
    mine = opened()
    assert not enter(mine, 2, may_pass=True)
    worker.kill()
    assert enter(mine, 2)


def test_a_child_closes_and_never_unlocks(
    make_worker: Callable[..., Any], opened: Callable[[], HostGuard], folder: LockFolder
) -> None:
    worker = make_worker(redis_enabled=False, lock_folder=folder.path)
    worker.run(
        "from govredis.locks.guard import LockFolder, clock\n"
        f"folder = LockFolder({folder.path!r})\n"
        "guard, waiting = folder.guard('lock:x'), folder.guard('lock:x')\n"
        "assert guard.enter(1, 'owner-1', clock() + 1000, may_pass=False)\n"
        "def child():\n"
        "    guard.leave()\n"
        "    return guard.inside, waiting.inside, len(files_in(folder.path))\n"
    )
    assert worker.eval("len(files_in(folder.path))") == 2
    assert worker.eval("in_child(child)") == "(False, False, 0)"
    mine = opened()
    assert not enter(mine, 2)


def test_a_child_does_not_keep_what_a_dead_parent_had(
    make_worker: Callable[..., Any], opened: Callable[[], HostGuard], folder: LockFolder
) -> None:
    worker = make_worker(redis_enabled=False, lock_folder=folder.path)
    worker.run(
        "from govredis.locks.guard import LockFolder, clock\n"
        "import time\n"
        "warnings.simplefilter('ignore')\n"
        f"guard = LockFolder({folder.path!r}).guard('lock:x')\n"  # a thread that is still waiting, say
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    [os.close(fd) for fd in (0, 1, 2)]\n"
        "    os.write(write, b'.')\n"  # past its at-fork hooks, which a killed parent does not wait for
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.close(write)\n"
        "assert os.read(read, 1) == b'.'\n"
        "assert guard.enter(1, 'owner-1', clock() + 1000, may_pass=False)"
    )
    child = worker.eval("child")
    try:
        worker.kill()
        mine = opened()
        assert enter(mine, 2)
    finally:
        os.kill(child, 9)


def test_a_collected_guard_closes_its_file(folder: LockFolder) -> None:
    guard = folder.guard("lock:x")
    (fd,) = guard._files
    del guard
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# -- the record ------------------------------------------------------------------------------------------------------


def test_the_record_says_who_and_until_when(opened: Callable[[], HostGuard]) -> None:
    guard = opened()
    assert guard.last_token() == 0
    until = clock() + 10
    assert guard.enter(7, "somebody", until, may_pass=False)
    record = record_of(guard)
    assert (record.token, record.owner, record.passer) == (7, "somebody", False)
    assert record.deadline == pytest.approx(until, abs=1e-5)
    assert record.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    guard.leave()
    assert opened().last_token() == 7


@pytest.mark.parametrize("content", [b"", b"\0" * 128, b"7 a 9.0 0 - 00000000", b"nonsense\n", b"\xff" * 300])
def test_a_file_with_anything_else_in_it_is_as_good_as_new(
    opened: Callable[[], HostGuard], folder: LockFolder, content: bytes
) -> None:
    opened()
    file_of(folder).write_bytes(content)
    guard, other = opened(), opened()
    assert guard.last_token() == 0
    assert enter(guard, 3)
    assert opened().last_token() == 3
    # It may come to be so while somebody is inside: nobody passes, and the next refresh mends it.
    file_of(folder).write_bytes(content)
    assert not enter(other, 4, may_pass=True)
    assert guard.refresh(3, clock() + 10)
    assert opened().last_token() == 3


def test_every_torn_record_is_told_from_a_whole_one(opened: Callable[[], HostGuard], folder: LockFolder) -> None:
    first, second = opened(), opened()
    assert enter(first, 11111111)
    old = file_of(folder).read_bytes()
    first.leave()
    assert enter(second, 22222222, ttl=77.0)
    new = file_of(folder).read_bytes()
    assert len(old) == len(new) == 128
    for cut in range(1, 128):
        record = guard_module._parse(new[:cut] + old[cut:])
        assert record is None or record in (guard_module._parse(old), guard_module._parse(new)), cut


def test_a_record_of_another_boot_vouches_for_nobody_but_its_token_stands(
    opened: Callable[[], HostGuard], folder: LockFolder
) -> None:
    opened()
    old = Record(9, "passer", clock() + 1000, True, "another-boot")
    file_of(folder).write_bytes(guard_module._format(old))
    guard = opened()
    assert guard.last_token() == 9
    assert enter(guard, 10)


def test_refresh_lengthens_and_never_shortens_and_is_refused_too_late(
    opened: Callable[[], HostGuard], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock()
    monkeypatch.setattr(guard_module, "clock", lambda: now)
    guard = opened()
    assert not guard.refresh(1, now + 10), "it is not inside"
    assert guard.enter(1, "owner-1", now + 0.2, may_pass=False)
    assert guard.refresh(1, now + 0.4)
    longer = record_of(guard).deadline
    assert guard.refresh(1, now + 0.1)
    assert record_of(guard).deadline == longer
    now = longer
    assert not guard.refresh(1, now + 10)
    assert record_of(guard).deadline == longer, "it was written all the same"


# -- passing ---------------------------------------------------------------------------------------------------------


def pass_by(guard: HostGuard, token: int, ttl: float = 10.0, within: float = 5.0) -> bool:
    deadline = clock() + within
    while not enter(guard, token, ttl, may_pass=True):
        if clock() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_only_one_whose_record_ran_out_is_passed_and_only_by_whom_redis_has_granted_it(
    opened: Callable[[], HostGuard],
) -> None:
    stopped, other, passer = opened(), opened(), opened()
    assert enter(stopped, 1, ttl=1.5)
    assert not pass_by(passer, 2, within=0.1)
    assert pass_by(passer, 2)
    assert passer.inside
    assert record_of(other).passer
    # The stopped one wakes up. It disturbs nobody, neither by going on nor by leaving.
    assert not stopped.refresh(1, clock() + 10)
    assert record_of(other).token == 2
    assert not enter(other, 3)
    stopped.leave()
    assert record_of(other).token == 2
    assert not enter(other, 3), "a fresh passer is honoured by who gets the flock"
    assert passer.refresh(2, clock() + 20)
    assert record_of(other).passer
    passer.leave()
    assert enter(other, 3)


def test_a_record_that_ran_out_is_not_passed_at_first_sight(
    opened: Callable[[], HostGuard], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who has just taken the flock has not written yet.
    now = clock()
    monkeypatch.setattr(guard_module, "clock", lambda: now)
    stopped, passer = opened(), opened()
    assert stopped.enter(1, "owner-1", now, may_pass=False)
    now += 1000
    assert not passer.enter(2, "owner-2", now + 10, may_pass=True)
    now += 0.09
    assert not passer.enter(2, "owner-2", now + 10, may_pass=True)
    now += 0.02
    assert passer.enter(2, "owner-2", now + 10, may_pass=True)


def test_without_a_grant_of_redis_nobody_passes(opened: Callable[[], HostGuard]) -> None:
    stopped, degraded = opened(), opened()
    assert enter(stopped, 1, ttl=0.001)
    deadline = clock() + 0.4
    while clock() < deadline:
        assert not enter(degraded, 2, may_pass=False)
        time.sleep(0.02)


def test_of_two_who_pass_at_once_the_last_to_write_gets_in(
    opened: Callable[[], HostGuard], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, first, second = opened(), opened(), opened()
    assert enter(stopped, 1, ttl=0.001)
    real_sleep = time.sleep

    def second_writes(seconds: float) -> None:
        if seconds == 0.02 and record_of(second).owner == "owner-2":
            second._write(Record(3, "owner-3", clock() + 10, True, second._boot))
        real_sleep(seconds)

    monkeypatch.setattr(time, "sleep", second_writes)
    assert not pass_by(first, 2, within=0.5)
    assert not first.inside
    assert record_of(first).token == 3


def test_one_that_stopped_just_before_writing_is_overwritten_by_its_passer(
    opened: Callable[[], HostGuard], folder: LockFolder
) -> None:
    stopped, passer, other = opened(), opened(), opened()
    assert enter(stopped, 1, ttl=0.001)
    late = file_of(folder).read_bytes()
    assert pass_by(passer, 2)
    file_of(folder).write_bytes(late)
    assert passer.refresh(2, clock() + 10)
    stopped.leave()
    assert not enter(other, 3)


def test_an_exception_in_the_middle_of_passing_leaves_no_fresh_record(
    opened: Callable[[], HostGuard], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, passer, other = opened(), opened(), opened()
    assert enter(stopped, 1, ttl=0.001)
    real_sleep = time.sleep

    def strike(seconds: float) -> None:
        if seconds == 0.02 and record_of(other).owner == "owner-2":
            raise KeyboardInterrupt
        real_sleep(seconds)

    monkeypatch.setattr(time, "sleep", strike)
    with pytest.raises(KeyboardInterrupt):
        pass_by(passer, 2)
    passer.leave()
    stopped.leave()
    assert enter(other, 3)


def test_flock_not_posix_locks(opened: Callable[[], HostGuard], folder: LockFolder) -> None:
    # A POSIX lock would go with any other descriptor of this process that closes.
    guard = opened()
    assert enter(guard, 1)
    with file_of(folder).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not enter(opened(), 2)


def test_no_descriptor_left_is_unavailability(folder: LockFolder) -> None:
    folder.guard("k").leave()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(LockUnavailable, match="Too many open files"):
            folder.guard("k")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
