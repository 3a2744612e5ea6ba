"""A lock folder that a group shares: several Unix users of one host exclude each other, with Redis and without.

Each user is a child process. Where these tests do not run as root, all are this user.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis import ConfigurationError, LockUnavailable
from govredis._boottime import clock
from govredis.locks.backends.file_backend import FileLockBackend
from govredis.locks.host_lock.exclusive import ExclusiveHostLock
from govredis.locks.host_lock.sweep import remove_if_over
from govredis.testing.servers import RedisServer

IS_ROOT = os.geteuid() == 0
GROUP = 23456 if IS_ROOT else os.getegid()
WWW_DATA, CELERY = (12345, 12346) if IS_ROOT else (os.geteuid(),) * 2
OUTSIDER = 12347

#: As another user, whose umask leaves the group nothing. Reads an expression a line, and writes what it is.
USER = """
import json, os, sys, warnings
# Before it is another user, who may not read all that this one may.
from govredis import Config, GovRedis
from govredis._boottime import clock
from govredis.locks.backends.file_backend import FileLockBackend
from govredis.locks.host_lock.sweep import Sweep
Sweep.start_if_due = lambda sweep: None  # by hand
uid, groups, path, settings = json.loads(sys.argv[1])
with GovRedis(Config(lock_folder=path + "-warm", redis_enabled=False)) as warm:
    warm.locks.acquire("x").release()
if os.geteuid() == 0:
    os.setgroups(groups)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
os.umask(0o077)
warnings.simplefilter("ignore")
gov = GovRedis(Config(lock_folder=path, **settings))
folder = FileLockBackend(path)
kept = {}

def keep(name, value):
    kept[name] = value
    return True

print("ready", flush=True)
for line in sys.stdin:
    try:
        answer = eval(line)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer if isinstance(answer, (bool, int, float, str)) else repr(answer)), flush=True)
"""


class User:
    def __init__(self, uid: int, groups: list[int], path: Path, settings: dict[str, Any]) -> None:
        arguments = json.dumps([uid, groups, str(path), settings])
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def eval(self, expression: str) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def path() -> Iterator[Path]:
    """A folder of root's that a group shares, where other users can reach it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as above:
        os.chmod(above, 0o755)
        made = Path(above) / "locks"
        made.mkdir()
        os.chown(made, -1, GROUP)
        made.chmod(0o2770)
        yield made


@pytest.fixture
def user(path: Path) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def login(uid: int, groups: tuple[int, ...] = (GROUP,), **settings: Any) -> User:
        users.append(User(uid, list(groups), path, {"redis_enabled": False, **settings}))
        return users[-1]

    yield login
    for each in users:
        each.close()


KINDS = {
    "lock": "gov.locks.acquire('x', timeout=0)",
    "write": "gov.locks.rwlock('x').write(timeout=0)",
    "semaphore": "gov.locks.semaphore('x', slots=1).acquire(timeout=0)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_user_keeps_another_out_without_redis(path: Path, user: Callable[..., User], kind: str) -> None:
    www, celery = user(WWW_DATA), user(CELERY)
    for first, second in (www, celery), (celery, www):
        assert first.eval(f"keep('held', {KINDS[kind]})") is True
        assert second.eval(KINDS[kind]).startswith("LockTimeout")
        assert first.eval("kept['held'].extend() or kept['held'].release()") is True
        assert second.eval(f"keep('held', {KINDS[kind]})") is True
        assert second.eval("kept['held'].extend() or kept['held'].release()") is True
    for file in path.iterdir():
        found = file.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, GROUP), file


def test_readers_of_two_users_share_it_and_tokens_rise_over_both(user: Callable[..., User]) -> None:
    www, celery = user(WWW_DATA), user(CELERY)
    for each in www, celery:
        assert each.eval("keep('read', gov.locks.rwlock('x').read(timeout=0))") is True
    assert www.eval("gov.locks.rwlock('x').write(timeout=0)").startswith("LockTimeout")
    assert celery.eval("kept['read'].extend() or kept['read'].release()") is True
    assert www.eval("kept['read'].extend() or kept['read'].release()") is True
    tokens = [
        each.eval("(lambda held: held.release() and held.token)(gov.locks.acquire('y'))") for each in (www, celery, www)
    ]
    assert tokens == sorted(set(tokens))


def test_with_redis_too_where_its_data_is_lost(
    user: Callable[..., User], redis_server: RedisServer, plain_redis: Any
) -> None:
    settings = {"redis_enabled": True, "redis_url": redis_server.url, "socket_timeout": 5}
    www, celery = user(WWW_DATA, **settings), user(CELERY, **settings)
    assert www.eval("keep('held', gov.locks.acquire('x', timeout=0, ttl=60))") is True
    plain_redis.flushall()
    assert celery.eval("gov.locks.acquire('x', timeout=0)").startswith("LockTimeout")
    # Redis had granted it to the other for an instant: it is lost, and keeps its host's others out until it lets go.
    assert www.eval("kept['held'].release()") is False
    assert celery.eval("gov.locks.acquire('x', timeout=0).release()") is True


def test_a_holder_that_stands_still_is_passed_by_another_user(path: Path, user: Callable[..., User]) -> None:
    www, celery = user(WWW_DATA), user(CELERY)
    assert www.eval(
        "keep('lock', folder.open_exclusive('k')) and kept['lock'].enter(1, 'www', clock() + 0.2, may_pass=True)"
    )
    assert celery.eval("keep('lock', folder.open_exclusive('k'))")
    deadline = clock() + 30
    while not celery.eval("kept['lock'].enter(2, 'celery', clock() + 1000, may_pass=True)"):
        assert clock() < deadline
        time.sleep(0.02)
    assert www.eval("kept['lock'].refresh(1, clock() + 10)") == 0.0
    assert celery.eval("kept['lock'].refresh(2, clock() + 2000)") > 0


def test_a_dead_users_lock_is_known_to_be_a_dead_ones(path: Path, user: Callable[..., User]) -> None:
    www, celery = user(WWW_DATA), user(CELERY)
    assert www.eval(
        "keep('lock', folder.open_exclusive('k')) and kept['lock'].enter(1, 'www', clock() + 1000, may_pass=True)"
    )
    assert celery.eval("keep('lock', folder.open_exclusive('k')) and kept['lock'].dead_holder()") == "None"
    www.close()
    assert "owner='www'" in celery.eval("kept['lock'].dead_holder()")


@pytest.mark.parametrize("mode", [0o2770, 0o3770])
def test_files_of_all_users_are_removed_but_where_the_folder_says_that_only_their_own(
    path: Path, user: Callable[..., User], mode: int
) -> None:
    path.chmod(mode)
    www, celery = user(WWW_DATA), user(CELERY)
    assert www.eval("folder.open_exclusive('k').leave()") == "None"
    assert celery.eval("folder.open_exclusive('k').leave()") == "None", "in a folder with the sticky bit too"
    (file,) = (each for each in path.iterdir() if each.name != "living")
    os.utime(file, (1e9, 1e9))
    celery.eval("(folder._sweep.run(), 0)[1]")
    assert file.exists() is (mode == 0o3770 and CELERY != WWW_DATA)
    (path / "living").write_text("0")
    assert www.eval("(folder._sweep.run(), 0)[1]") == 0
    assert not file.exists()


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_file_is_never_seen_with_less_than_its_mode(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = FileLockBackend(str(path))
        folder.open_exclusive("k").leave()
    finally:
        os.umask(before)
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o660
    assert folder.check() is None
    assert sorted(file.name for file in path.iterdir()) == sorted([Path(folder._file("k")).name, "living"])


def test_two_processes_that_make_a_file_at_once_have_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FileLockBackend(str(path))
    folder.open_exclusive("other").leave()
    link, others = os.link, list[ExclusiveHostLock]()

    def link_after_another(source: str, target: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "link", link)
            others.append(folder.open_exclusive("k"))
        link(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", link_after_another)
        host_lock = folder.open_exclusive("k")
    (other,) = others
    assert os.path.samestat(os.fstat(host_lock._files[0]), os.fstat(other._files[0]))
    assert host_lock.enter(1, "a", clock() + 10, may_pass=False)
    assert not other.enter(2, "b", clock() + 10, may_pass=False)
    assert len(list(path.iterdir())) == 3, "nothing is left of the second one"
    host_lock.leave()
    other.leave()


def test_a_file_that_is_removed_is_made_again(path: Path) -> None:
    folder = FileLockBackend(str(path))
    before = folder.open_exclusive("k")
    os.utime(before._path, (1e9, 1e9))
    assert remove_if_over(before._path, "")
    assert not before.enter(1, "a", clock() + 10, may_pass=False)
    assert before.enter(2, "a", clock() + 10, may_pass=False)
    assert stat.S_IMODE(os.stat(before._path).st_mode) == 0o660
    before.leave()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        (0o770, r"its mode is 0770.*chmod it to 0700"),  # files in it were of their makers' groups
        (0o720, r"its mode is 0720"),
        (0o2772, r"its mode is 2772"),
        (0o2777, r"its mode is 2777"),
        (0o3777, r"its mode is 3777"),
        (0o1777, r"its mode is 1777"),
    ],
)
def test_a_folder_that_more_than_a_group_or_not_only_for_its_group_can_write_to(
    path: Path, mode: int, why: str
) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=why + r".*install -d -m 2770 -o root -g GROUP"):
        FileLockBackend(str(path)).open_exclusive("k")


@pytest.mark.skipif(not IS_ROOT, reason="needs several users")
@pytest.mark.parametrize("uid", [WWW_DATA, CELERY])
def test_a_folder_that_another_user_has_made_is_refused(path: Path, user: Callable[..., User], uid: int) -> None:
    """Though it is a member of the group: its owner may open it to anybody."""
    os.chown(path, uid, GROUP)
    other = user(CELERY if uid == WWW_DATA else WWW_DATA)
    assert f"belongs to user {uid}" in other.eval("gov.locks.acquire('x')")
    assert user(uid).eval("gov.locks.acquire('x').release()") is True


@pytest.mark.skipif(not IS_ROOT, reason="needs several users")
def test_a_process_outside_the_group_is_refused_and_told_why(path: Path, user: Callable[..., User]) -> None:
    said = user(OUTSIDER, groups=()).eval("gov.locks.acquire('x')")
    assert said.startswith("ConfigurationError")
    assert f"is shared by group {GROUP}, and this process is not a member of it" in said
    assert "add its user to the group" in said


@pytest.mark.skipif(not IS_ROOT, reason="needs several users")
def test_a_file_of_an_earlier_private_folder_is_named_in_the_error(path: Path, user: Callable[..., User]) -> None:
    path.chmod(0o700)
    FileLockBackend(str(path)).open_exclusive("lock:x").leave()
    path.chmod(0o2770)
    said = user(WWW_DATA).eval("gov.locks.acquire('x')")
    assert said.startswith("LockUnavailable")
    assert "Permission denied" in said


@pytest.mark.parametrize("place", ["folder", "file"])
def test_links_are_refused(path: Path, place: str) -> None:
    folder = FileLockBackend(str(path))
    if place == "folder":
        elsewhere = path.with_name("elsewhere")
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(ConfigurationError, match="symbolic link"):
            folder.open_exclusive("k")
    else:
        (path / "elsewhere").touch()
        Path(folder._file("k")).symlink_to(path / "elsewhere")
        with pytest.raises(LockUnavailable, match="symbolic links"):
            folder.open_exclusive("k")
