"""A rolling deploy: the version before and this one work on the same keys, tables and lock files, at the same time.

The version before is the archive that BEFORE names. Make a new one when a version is released, from its commit:

    git archive -o tests/data/govredis-COMMIT.tar.gz COMMIT govredis ':!govredis/demo' ':!govredis/testing'

It is in the repository since a checkout need not have the history.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2
import pytest
from support import PATIENCE, eventually

from govredis.testing.servers import PostgresServer, RedisServer

HERE = Path(__file__).parent
BEFORE = HERE / "data/govredis-a81318d.tar.gz"
NOW = HERE.parent

pytestmark = [pytest.mark.one_redis, pytest.mark.once]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the version before."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(BEFORE) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    return folder


def environment(version: Path, **variables: str) -> dict[str, str]:
    ours = ("REDIS_", "GOVREDIS_", "CELERY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONPATH": str(version), **variables}


class Process:
    """rolling_worker.py on one version. `call` sends a call and returns its answer."""

    def __init__(self, version: Path, variables: dict[str, str]) -> None:
        self.version = version
        self._popen = subprocess.Popen(
            [sys.executable, str(HERE / "rolling_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(version, **variables),
        )
        assert self.call("where") == str(version)

    def send(self, name: str, *args: Any) -> None:
        assert self._popen.stdin is not None
        print(json.dumps([name, *args]), file=self._popen.stdin, flush=True)

    def answer(self) -> Any:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, f"the process on {self.version} ended: its error is on stderr"
        return json.loads(line)

    def call(self, name: str, *args: Any) -> Any:
        self.send(name, *args)
        return self.answer()

    def close(self) -> None:
        self._popen.communicate(timeout=PATIENCE)
        assert self._popen.returncode == 0


@pytest.fixture(scope="module")
def database(shared_postgres: PostgresServer, before: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that the version before has made, and this one has migrated."""
    connection = psycopg2.connect(shared_postgres.url)
    connection.autocommit = True  # as CREATE DATABASE wants it
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE rolling")
    connection.close()
    url = shared_postgres.url.rsplit("/", 1)[0] + "/rolling"
    for version in (before, NOW):
        process = Process(version, {"REDIS_ENABLED": "0", "GOVREDIS_DATABASE_URL": url})
        process.call("migrate")
        process.close()
    return url


@pytest.fixture
def variables(tmp_path: Path, database: str) -> dict[str, str]:
    return {
        "GOVREDIS_DATABASE_URL": database,
        "GOVREDIS_LOCK_FOLDER": str(tmp_path / "locks"),
        # A busy machine is no outage.
        "GOVREDIS_SOCKET_TIMEOUT": "10",
        "GOVREDIS_CONNECT_TIMEOUT": "10",
        "GOVREDIS_POSTGRES_TIMEOUT": "20",
        "GOVREDIS_METADATA_STALENESS": "60",
    }


#: The version whose process acts first.
ORDERS = ["the version before first", "this version first"]


@pytest.fixture
def start(variables: dict[str, str], before: Path) -> Iterator[Callable[..., list[Process]]]:
    """Starts a process on each version, in an order of ORDERS, with more variables."""
    started: list[Process] = []

    def start(order: str, **more: str) -> list[Process]:
        versions = [before, NOW] if order == ORDERS[0] else [NOW, before]
        for version in versions:
            started.append(Process(version, {**variables, **more}))
        return started

    yield start
    for process in started:
        process.close()


@pytest.fixture(params=ORDERS)
def two(
    request: pytest.FixtureRequest, start: Callable[..., list[Process]], redis_server: RedisServer
) -> tuple[Process, Process]:
    """A process on each version, on Redis and PostgreSQL."""
    first, second = start(request.param, REDIS_URL=redis_server.url)
    return first, second


@pytest.fixture(params=ORDERS)
def two_on_redis(
    request: pytest.FixtureRequest, start: Callable[..., list[Process]], redis_server: RedisServer
) -> tuple[Process, Process]:
    """A process on each version, without PostgreSQL."""
    first, second = start(request.param, REDIS_URL=redis_server.url, GOVREDIS_DATABASE_URL="")
    return first, second


@pytest.fixture(params=ORDERS)
def two_in_an_outage(
    request: pytest.FixtureRequest, start: Callable[..., list[Process]], persistent_redis: RedisServer
) -> tuple[Process, Process]:
    first, second = start(request.param, REDIS_URL=persistent_redis.url)
    return first, second


@pytest.fixture
def agent() -> str:
    """The database lives on: an id of the test's own."""
    return f"agent-{uuid4()}"


def check_sessions(first: Process, second: Process, agent: str) -> None:
    sid = first.call("session_start", agent, ["one"])
    assert second.call("session_get", sid) == [agent, ["one"], 1, "redis"]
    assert second.call("session_add", sid, "two") == ["one", "two"]
    assert first.call("session_add", sid, "three") == ["one", "two", "three"]
    assert first.call("session_list", agent) == second.call("session_list", agent) == [sid]

    rotated = second.call("session_rotate", sid)
    assert first.call("session_get", sid) is None
    assert first.call("session_get", rotated)[:2] == [agent, ["one", "two", "three"]]
    assert first.call("session_unbind", rotated) is True
    assert second.call("session_get", rotated) is None

    mine, theirs = first.call("session_start", agent, None), second.call("session_start", agent, None)
    assert second.call("session_unbind_agent", agent) == 2
    assert [first.call("session_get", sid) for sid in (mine, theirs)] == [None, None]


def test_sessions_of_either_version_are_both_versions_sessions(two: tuple[Process, Process], agent: str) -> None:
    check_sessions(*two, agent)


def test_sessions_without_postgres_are_both_versions_sessions(
    two_on_redis: tuple[Process, Process], agent: str
) -> None:
    check_sessions(*two_on_redis, agent)


def test_a_lock_excludes_the_other_version_and_is_handed_to_its_waiter(
    two: tuple[Process, Process], plain_redis: Any
) -> None:
    first, second = two
    token, degraded = first.call("acquire", "report", 5)
    assert not degraded
    assert second.call("holder", "report") == token
    assert second.call("acquire", "report", 0.05) is None

    second.send("acquire", "report", PATIENCE)
    eventually(lambda: plain_redis.exists("{lock:report}:queue"), what="the other version waits in the queue")
    first.call("release", "report")
    theirs, degraded = second.answer()
    assert theirs > token
    assert not degraded
    assert first.call("acquire", "report", 0.05) is None
    second.call("release", "report")
    assert first.call("acquire", "report", 5)[0] > theirs


@pytest.mark.parametrize(("held", "wanted"), [("read", "write"), ("write", "read"), ("slot", "slot")])
def test_shared_locks_exclude_the_other_version(two: tuple[Process, Process], held: str, wanted: str) -> None:
    first, second = two
    assert first.call("acquire", "shared", 5, held)
    assert second.call("acquire", "shared", 0.05, wanted) is None
    first.call("release", "shared")
    assert second.call("acquire", "shared", PATIENCE, wanted)


def test_a_limit_counts_the_hits_of_both_versions(two: tuple[Process, Process], agent: str) -> None:
    first, second = two
    assert first.call("hit", agent, "3/hour") == [True, 2, "redis"]
    assert second.call("hit", agent, "3/hour") == [True, 1, "redis"]
    assert first.call("hit", agent, "3/hour") == [True, 0, "redis"]
    assert second.call("hit", agent, "3/hour") == [False, 0, "redis"]
    assert first.call("hit", agent, "3/hour") == [False, 0, "redis"]

    assert first.call("hit_counter", agent, 2) == [True, 1, "redis"]
    assert second.call("hit_counter", agent, 2) == [True, 0, "redis"]
    assert first.call("hit_counter", agent, 2) == [False, 0, "redis"]


def test_a_cached_value_is_both_versions_and_so_is_its_invalidation(two: tuple[Process, Process], agent: str) -> None:
    first, second = two
    assert first.call("load", agent, "old") == "old"
    assert second.call("load", agent, "its own") == "old"  # the other version's, without a load
    second.call("invalidate", agent)
    assert first.call("peek", agent) is None
    assert first.call("load", agent, "new") == "new"
    assert second.call("load", agent, "its own") == "new"
    first.call("invalidate_all")
    assert second.call("peek", agent) is None

    first.call("agent_create", agent, {"team": "search"})
    assert first.call("agent_get", agent) == second.call("agent_get", agent) == {"team": "search"}
    second.call("agent_update", agent, {"team": "ads"})
    assert first.call("agent_get", agent) == second.call("agent_get", agent) == {"team": "ads"}


def test_a_cached_value_without_postgres_is_both_versions(two_on_redis: tuple[Process, Process], agent: str) -> None:
    first, second = two_on_redis
    assert first.call("load", agent, "old") == "old"
    assert second.call("load", agent, "its own") == "old"
    second.call("invalidate", agent)
    assert first.call("peek", agent) is None


def test_the_fallbacks_of_both_versions_are_the_same(
    two_in_an_outage: tuple[Process, Process], persistent_redis: RedisServer, agent: str
) -> None:
    first, second = two_in_an_outage
    sid = first.call("session_start", agent, None)
    ended = second.call("session_start", agent, None)
    persistent_redis.kill()
    for process in two_in_an_outage:
        process.call("until_redis_is", "away")

    assert first.call("hit", agent, "2/hour") == [True, 1, "postgres"]
    assert second.call("hit", agent, "2/hour") == [True, 0, "postgres"]
    assert first.call("hit", agent, "2/hour") == [False, 0, "postgres"]
    assert second.call("session_get", sid) == [agent, None, 1, "postgres"]
    assert second.call("session_unbind", ended) is True
    token, degraded = first.call("acquire", "report", PATIENCE)
    assert degraded
    assert second.call("acquire", "report", 0.05) is None

    persistent_redis.restart()
    for process in two_in_an_outage:
        process.call("until_redis_is", "back")
    first.call("release", "report")
    theirs, degraded = second.call("acquire", "report", PATIENCE)
    assert theirs > token
    assert not degraded
    assert first.call("session_get", ended) is None
    assert first.call("session_get", sid)[0] == agent


class Worker:
    """A Celery worker on one version, and its command line."""

    def __init__(self, version: Path, log: Path, variables: dict[str, str]) -> None:
        self.version, self.log = version, log
        self._environment = environment(version, **variables)
        options = ["--pool=solo", "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO"]
        with open(log, "ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "rolling_app", "worker", *options],
                cwd=HERE,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def commands(self, *words: str) -> str:
        code = "from govredis.cli import main; main()"
        return subprocess.check_output([sys.executable, "-c", code, *words], env=self._environment, text=True)

    def stop(self) -> None:
        self._popen.terminate()
        self._popen.wait(PATIENCE)


@pytest.mark.parametrize("order", ORDERS)
def test_a_task_that_either_version_parked_is_published_by_the_other(
    order: str, before: Path, variables: dict[str, str], redis_server: RedisServer, tmp_path: Path, plain_redis: Any
) -> None:
    versions = [before, NOW] if order == ORDERS[0] else [NOW, before]
    shared = {
        **variables,
        "REDIS_URL": redis_server.url,
        "CELERY_BROKER_URL": redis_server.url.removesuffix("/0") + "/1",
        "ROLLING_NOTES": redis_server.url,
    }
    shared["ROLLING_RATE"] = "1/hour"
    publish = "from rolling_app import limited; limited.delay('agent'); limited.delay('agent')"
    first = Worker(versions[0], tmp_path / "first.log", shared)
    try:
        subprocess.run([sys.executable, "-c", publish], cwd=HERE, env=environment(versions[1], **shared), check=True)
        eventually(lambda: plain_redis.llen("limited") == 1, what=f"one task has run; see {first.log}")
        eventually(lambda: "rolling_app.limited" in first.commands("limits", "parked"), what="the other is parked")
    finally:
        first.stop()

    second = Worker(versions[1], tmp_path / "second.log", {**shared, "ROLLING_RATE": "2/hour"})
    try:
        assert "rolling_app.limited" in second.commands("limits", "parked")
        second.commands("limits", "parked", "--flush")
        eventually(lambda: plain_redis.llen("limited") == 2, what=f"the parked task has run; see {second.log}")
        assert plain_redis.lrange("limited", 0, -1) == [str(version) for version in versions]
        assert "nothing is parked" in second.commands("limits", "parked")
    finally:
        second.stop()
