"""The base of all servers for tests: a keeper each, ports, waiting, and being paused, killed and restarted in place."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ._binaries import ServerError

Data = Literal["keep", "empty", "old"]
StrPath = str | os.PathLike[str]
ManagedT = TypeVar("ManagedT", bound="Managed")
ServerT = TypeVar("ServerT", bound="Server")

#: Seconds a server may take until it answers, or a group until it is one. After a stall of the machine Sentinels do
#: nothing for 30 s.
START_TIMEOUT = 90.0
STOP_TIMEOUT = 10.0  # seconds a server may take to shut down before it is killed


def free_port() -> int:
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


def until(what: str, ready: Callable[[], bool], servers: Sequence[Server], timeout: float = START_TIMEOUT) -> None:
    """Poll `ready` until it says yes. ServerError with the servers' logs after `timeout` seconds, or when one ended."""
    deadline = time.monotonic() + timeout
    while not ready():
        dead = [server for server in servers if not server.running]
        if dead or time.monotonic() > deadline:
            state = f"pid {dead[0].pid} has ended" if dead else f"not within {timeout:g} s"
            raise ServerError("\n".join([f"{what}: {state}", *(server.log_tail() for server in dead or servers)]))
        time.sleep(0.005)


class Keeper:
    """This side of the keeper process: sends it orders and returns its answers. Closing it ends the server."""

    def __init__(self, log: Path, temporary: Path | None) -> None:
        keeper = Path(__file__).with_name("_keeper_process.py")
        program = [sys.executable, "-I", "-S", "-B", str(keeper), str(os.getpid())]
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
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()


class Managed(ABC):
    """One server or a group of them, to be started and closed, also as a context manager."""

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


class Server(Managed):
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
        self.port: int = port or 0
        self._pid, self._paused = 0, False
        self._temporary = folder is None
        self.folder: Path = self._make_temporary() if folder is None else Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._data, self._old, self._log = self.folder / "data", self.folder / "old", self.folder / "server.log"
        self._log_from = 0
        self._keeper = Keeper(self._log, self.folder if self._temporary else None)

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

    @property
    def answers(self) -> bool:
        """Whether it runs, and is not paused."""
        return not self._paused and self.running

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
        Raises ServerError, with the end of the server's log, when it ends or does not answer within 90 s.
        """
        self._keeper.ask("status")  # raises once it is closed
        if self.running:
            return self
        for attempts_left in reversed(range(10)):
            if not self._fixed:
                self.port = free_port()
            self._prepare()
            self._spawn(self._argv())
            try:
                until(f"{self._name} did not start", self._ready, [self])
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
            replace_tree(self._data, self._old)
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
            replace_tree(self._old, self._data)
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


def replace_tree(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)  # keeps the owner, which copytree does not
