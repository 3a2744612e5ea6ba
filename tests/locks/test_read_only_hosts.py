"""Containers: a root file system that is read-only, no shell, a user id without a name or a home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from govredis import GovRedis, LockUnavailable
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

IS_ROOT = os.geteuid() == 0
UID = 54321

#: The questions asked there. Everything but lock files works through sockets.
ASKED = """
import json, os, pwd, sys, tempfile
from govredis import Config, GovRedis
volume, redis_url = sys.argv[1:]
with GovRedis(Config(redis_url=redis_url, socket_timeout=5)) as warm:  # some modules are imported on first use
    warm.health.check()
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)

def named(uid):
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None

def tried(**settings):
    with GovRedis(Config(redis_url=redis_url, socket_timeout=5, **settings)) as gov:
        found = [(gov.locks.check_folder() or [None])[0]]
        try:
            with gov.locks.acquire("x", timeout=0) as held, gov.locks.semaphore("x", slots=1).acquire(timeout=0):
                found.append(gov.locks.try_acquire("x") is None)
                held.extend()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        found.append(gov.counters.get("locks.unguarded"))
        return found

def writable(path):
    try:
        tempfile.TemporaryFile(dir=path).close()
        return True
    except OSError:
        return False

print(json.dumps({
    "name": named(os.geteuid()),
    "writable": [writable("/tmp"), writable(volume)],
    "default": tried(),
    "fail": tried(lock_fallback="fail"),
    "volume": tried(lock_folder=volume + "/locks"),
    "volume alone": tried(lock_folder=volume + "/locks", redis_enabled=False),
}))
"""

#: In a mount namespace of its own: all is read-only but a volume.
READ_ONLY = (
    'mount --make-rprivate / && mount -t tmpfs -o mode=1777 tmpfs "$0" && mount -o remount,bind,ro / && exec "$@"'
)


@pytest.fixture
def volume() -> Iterator[Path]:
    """Where other users can reach it, as they cannot reach pytest's folders."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.mark.skipif(not IS_ROOT, reason="needs a mount namespace")
def test_a_read_only_root_and_a_user_without_a_name(redis_server: RedisServer, volume: Path) -> None:
    here = [sys.executable, "-c", ASKED, str(volume), redis_server.url]
    ran = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, str(volume), *here],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = json.loads(ran.stdout)
    assert (found["name"], found["writable"]) == (None, [False, True])
    said, raised, _ = found["default"]
    assert raised.startswith(f"LockUnavailable: lock file /tmp/govredis-locks-{UID}/")
    for text in said, raised:
        assert "Read-only file system" in text
        assert "GOVREDIS_LOCK_FOLDER must name another" in text
        assert "with GOVREDIS_LOCK_FALLBACK=fail, locks do without" in text
    said, excludes, unguarded = found["fail"]
    assert "locks work by Redis alone" in said
    assert (excludes, unguarded) == (True, 3)
    assert found["volume"] == [None, True, 0]
    assert found["volume alone"] == [None, True, 0]


def test_the_first_acquire_and_the_doctor_say_what_to_set(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, tmp_path: Path
) -> None:
    """Whatever the reason: here something that is no folder is above it."""
    (tmp_path / "file").touch()
    folder = f"{tmp_path}/file/locks"
    locks = make_gov(redis_url=redis_server.url, lock_folder=folder).locks
    with pytest.raises(LockUnavailable, match=r"GOVREDIS_LOCK_FOLDER.*GOVREDIS_LOCK_FALLBACK=fail"):
        locks.acquire("x")

    def doctor(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("govredis"), "doctor"],
            env={**os.environ, "REDIS_URL": redis_server.url, "GOVREDIS_LOCK_FOLDER": folder, **variables},
            stdout=subprocess.PIPE,
            text=True,
        )

    ill = doctor()
    assert ill.returncode == 1
    assert "GOVREDIS_LOCK_FALLBACK=fail" in ill.stdout
    cured = doctor(GOVREDIS_LOCK_FALLBACK="fail")
    assert cured.returncode == 0
    assert cured.stdout.endswith("\nnothing is wrong\n")
