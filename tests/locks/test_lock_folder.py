"""The lock folder: one per user whatever the environment says; refused where somebody else controls it, said in words
where it is full, read-only or not to be written to.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis import ConfigurationError, GovRedis, LockTimeout, LockUnavailable
from govredis.locks import DistributedLock
from govredis.locks.backends.file_backend import FileLockBackend
from govredis.testing.servers import RedisServer

KINDS: dict[str, Callable[[DistributedLock], Any]] = {
    "lock": lambda locks: locks.acquire("x", timeout=0),
    "read": lambda locks: locks.rwlock("x").read(timeout=0),
    "write": lambda locks: locks.rwlock("x").write(timeout=0),
    "semaphore": lambda locks: locks.semaphore("x", slots=2).acquire(timeout=0),
}


@pytest.fixture
def folder(tmp_path: Path) -> FileLockBackend:
    return FileLockBackend(str(tmp_path / "locks"))


def file_of(folder: FileLockBackend) -> Path:
    (path,) = (path for path in Path(folder.path).iterdir() if path.name != "living")
    return path


def in_child(check: Callable[[], Any], uid: int | None = None) -> Any:
    """Run `check` in a child process, as another user if this one is root: returns its result."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if uid is not None and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            answer = check()
        except BaseException as error:  # noqa: BLE001
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    return answer


# -- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_made_for_this_user_alone(folder: FileLockBackend) -> None:
    folder.open_exclusive("lock:x").leave()
    assert Path(folder.path).stat().st_mode & 0o7777 == 0o700
    assert file_of(folder).stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(folder: FileLockBackend, mode: int) -> None:
    Path(folder.path).mkdir()
    Path(folder.path).chmod(mode)
    with pytest.raises(
        ConfigurationError, match=rf"mode is {mode:04o}\..*chmod it to 0700, or set GOVREDIS_LOCK_FOLDER"
    ):
        folder.open_exclusive("lock:x")


def test_a_folder_of_another_user_is_refused(folder: FileLockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(folder.path).mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder.path, 12345, 12345)
    else:  # who is not root cannot give a folder away; but can be somebody else than its owner
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigurationError, match=r"belongs to user .* by its owner, or set GOVREDIS_LOCK_FOLDER"):
        folder.open_exclusive("lock:x")
    assert "GOVREDIS_LOCK_FOLDER" in str(folder.check())


def test_a_link_and_a_file_in_its_place_are_refused(folder: FileLockBackend, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    Path(folder.path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"is a symbolic link.*GOVREDIS_LOCK_FOLDER"):
        folder.open_exclusive("lock:x")
    Path(folder.path).unlink()
    Path(folder.path).touch()
    with pytest.raises(ConfigurationError, match=r"is not a directory.*GOVREDIS_LOCK_FOLDER"):
        folder.open_exclusive("lock:x")
    Path(folder.path).unlink()
    Path(folder.path).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="is a symbolic link"):
        folder.open_exclusive("lock:x")


def test_a_link_in_place_of_a_lock_file_is_not_followed(folder: FileLockBackend, tmp_path: Path) -> None:
    folder.open_exclusive("lock:x").leave()
    file_of(folder).rename(tmp_path / "elsewhere")
    (Path(folder.path) / hashlib.sha256(b"lock:x").hexdigest()[:40]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LockUnavailable, match="symbolic links"):
        folder.open_exclusive("lock:x")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TMPDIR": "/var/tmp", "TMP": "/var/tmp", "TEMP": "/var/tmp"},
        {"XDG_RUNTIME_DIR": "/run/user/0", "HOME": "/nonexistent", "XDG_STATE_HOME": "/var/tmp"},
        {"USER": "somebody", "LOGNAME": "somebody", "XDG_RUNTIME_DIR": ""},
    ],
)
def test_two_processes_of_a_user_find_the_same_folder_whatever_the_environment_says(
    environment: dict[str, str],
) -> None:
    path = subprocess.run(
        [
            sys.executable,
            "-c",
            "from govredis.locks.backends.file_backend import FileLockBackend; print(FileLockBackend(None).path)",
        ],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    assert path == f"/tmp/govredis-locks-{os.geteuid()}"


def test_another_user_has_another_one() -> None:
    uid = 54321 if os.geteuid() == 0 else os.geteuid()
    assert in_child(lambda: FileLockBackend(None).path, uid) == f"/tmp/govredis-locks-{uid}"


def test_keys_become_hashed_names(folder: FileLockBackend) -> None:
    for key in "lock:../../etc/passwd", "lock:" + "ä" * 250, "lock:a", "lock:b":
        folder.open_exclusive(key).leave()
    names = [path.name for path in Path(folder.path).iterdir() if path.name != "living"]
    assert len(names) == 4
    assert all(len(name) == 40 and set(name) <= set("0123456789abcdef") for name in names)


def test_a_removed_folder_is_made_again(folder: FileLockBackend) -> None:
    folder.open_exclusive("lock:x").leave()
    shutil.rmtree(folder.path)
    folder.open_exclusive("lock:x").leave()
    assert file_of(folder).exists()


# -- where it cannot be used -------------------------------------------------------------------------------------------


@pytest.fixture(params=["limit", "tmpfs"] if os.geteuid() == 0 else ["limit"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in which files can be made, and nothing can be written to them: for root, a disk that is full."""
    path = tmp_path / "full"
    path.mkdir(mode=0o700)
    if request.param == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=0700", "tmpfs", path], check=True)
        (path / "filler").write_bytes(bytes(4096))
        yield path
        subprocess.run(["umount", "--lazy", path], check=True)  # a life is open in it
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    yield path
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


#: Those that write a record.
@pytest.mark.parametrize("kind", ["lock", "write"])
def test_a_full_folder_is_unavailability(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, full: Path, kind: str
) -> None:
    locks = make_gov(redis_url=redis_server.url, lock_folder=str(full)).locks
    assert "GOVREDIS_LOCK_FOLDER" in str(locks.check_folder())
    assert "locks raise LockUnavailable" in str(locks.check_folder())
    with pytest.raises(LockUnavailable, match=r"(No space left|too large).*GOVREDIS_LOCK_FOLDER"):
        KINDS[kind](locks)
    assert not plain_redis.exists("lock:x"), "what Redis granted was given back"
    assert [name for name in os.listdir(full) if name.startswith("check")] == []
    without_redis = make_gov(redis_enabled=False, lock_folder=str(full)).locks
    with pytest.raises(LockUnavailable, match="GOVREDIS_LOCK_FOLDER"):
        KINDS[kind](without_redis)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_folder_is_done_without_and_logged_where_the_fallback_is_fail(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    full: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gov = make_gov(redis_url=redis_server.url, lock_folder=str(full), lock_fallback="fail")
    assert "locks work by Redis alone" in str(gov.locks.check_folder())
    for _ in range(2):
        with KINDS[kind](gov.locks) as held:
            held.extend()
            held.raise_if_lost()
            if kind == "lock":
                assert gov.locks.try_acquire("x") is None
    if kind in ("lock", "write"):
        assert gov.counters.read()["locks.unguarded"] >= 2
        assert caplog.text.count("by Redis alone") == 1


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.mark.parametrize("fallback", ["file", "fail"])
def test_a_folder_that_cannot_be_written_to(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, open_folder: Path, fallback: str
) -> None:
    settings = {"redis_url": redis_server.url, "lock_folder": f"{open_folder}/locks", "lock_fallback": fallback}

    def tried() -> list[str]:
        locks = make_gov(**settings).locks
        found = [str(locks.check_folder())]
        for take in KINDS.values():
            try:
                found.append(str(take(locks).release()))
            except LockUnavailable as error:
                found.append(str(error))
        return found

    open_folder.chmod(0o555)
    said, *taken = in_child(tried, 12345)
    assert "Permission denied" in said
    assert "GOVREDIS_LOCK_FOLDER" in said
    if fallback == "fail":
        assert taken == ["True"] * len(KINDS)
    else:
        assert all("Permission denied" in why and "GOVREDIS_LOCK_FOLDER" in why for why in taken)


#: Errors of the system, and the calls that meet them.
ERRORS = ["ENOSPC", "EROFS", "EACCES", "EPERM", "EMFILE", "ENAMETOOLONG", "ESTALE", "EDQUOT", "EIO", "ENOLCK", "EBADF"]
CALLS = [(os, "open"), (fcntl, "flock"), (os, "fstat"), (os, "pread"), (os, "pwrite")]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_error_of_the_system_is_unavailability_with_the_remedy(
    make_gov: Callable[..., GovRedis], monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    locks = make_gov(redis_enabled=False).locks
    KINDS[kind](locks).release()
    refused = 0
    for module, call in CALLS:

        def fails(*args: Any, **options: Any) -> Any:
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

        with monkeypatch.context() as patched:
            patched.setattr(module, call, fails)
            try:
                taken = KINDS[kind](locks)
            except LockUnavailable as error:
                assert "GOVREDIS_LOCK_FOLDER" in str(error)
                refused += 1
                continue
            except LockTimeout:
                assert (call, name) == ("flock", "EACCES")
                continue
        taken.release()
    assert refused >= 2
    KINDS[kind](locks).release()


def test_no_descriptor_left_is_unavailability_whatever_the_fallback(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer
) -> None:
    for fallback in "file", "fail":
        locks = make_gov(redis_url=redis_server.url, lock_fallback=fallback).locks
        locks.acquire("x").release()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(LockUnavailable, match="Too many open files"):
                locks.acquire("x")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        locks.acquire("x").release()


def test_a_file_that_cannot_be_kept_fresh_is_vouched_for_as_before(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks

    def fails(*args: Any) -> Any:
        raise OSError(errno.EIO, "I/O error")

    with locks.acquire("x", ttl=60) as held:
        before = held._lease.host_lock._vouched_until  # type: ignore[attr-defined]
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fails)
            held.extend(600)
        assert held._lease.deadline == before
        held.extend(600)
        assert held._lease.deadline > before + 100


def test_nothing_is_said_of_a_folder_that_works(folder: FileLockBackend) -> None:
    assert folder.check() is None
    assert folder.check() is None
    assert list(Path(folder.path).iterdir()) == []
