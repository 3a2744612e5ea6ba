"""The story: servers and workers started, Redis taken away twice, everything ended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Protocol

from ..api import GovRedis
from ..config import Config
from ..testing.servers import PostgresServer, RedisServer
from .board import JOBS, STARTING, STOP, WEB, WORKERS, Board
from .measure import Findings, Phase, Run
from .traffic import TABLE

#: Name, share of the time, whether Redis is away.
PHASES = (
    ("healthy", 5.0, False),
    ("killed (-9)", 6.5, True),
    ("back, empty", 4.5, False),
    ("hung (SIGSTOP)", 4.5, True),
    ("awake again", 3.5, False),
)
_PATIENCE = 20.0  # seconds for workers to start, and to finish what they are at


class WorkerError(RuntimeError):
    """A worker ended early, or did not start or finish in time."""


class Listener(Protocol):
    """Who wants to know how far it is."""

    def begins(self, phase: str) -> None: ...

    def goes_on(self, done: float, calls: int) -> None: ...


def tell(seconds: float, listener: Listener) -> Run:
    """Have it all happen, with `seconds` of traffic. Raises ServerError, WorkerError."""
    total = sum(share for _, share, _ in PHASES)
    with contextlib.ExitStack() as ends:
        listener.begins("starting Redis, PostgreSQL and workers")
        redis = ends.enter_context(RedisServer())
        postgres = ends.enter_context(PostgresServer())
        # Inside Redis's temporary folder, which its keeper removes even if this process is killed.
        folder = redis.folder / "demo"
        folder.mkdir()
        for name in ("counter", "counter-alone"):
            (folder / name).write_text("0")
        board = Board(folder / "board")
        board.phase, board.epoch = STARTING, 1
        with GovRedis(Config(redis_url=redis.url, database_url=postgres.url)) as gov:
            gov.postgres.migrate()
            gov.postgres.fetch(TABLE)
            versions = f"Redis {redis.command('INFO', 'server')['redis_version']}, PostgreSQL " + str(
                gov.postgres.fetch("SHOW server_version")[0][0]
            )
        config = {"redis_url": redis.url, "database_url": postgres.url, "lock_folder": str(folder / "locks")}
        workers = ends.enter_context(_workers(folder, config))
        _until(lambda: all(board.ready), workers, folder, "start")

        phases: list[Phase] = []
        done = 0.0
        for number, (name, share, outage) in enumerate(PHASES):
            listener.begins(f"Redis is {name}")
            began = perf_counter()
            if number == 1:
                redis.kill()
                board.dead, board.epoch = True, 2
            elif number == 2:
                board.dead = False
                redis.restart("empty")
                began = perf_counter()
            elif number == 3:
                redis.pause()
            elif number == 4:
                redis.resume()
                began = perf_counter()
            if phases:
                phases[-1].ended = began
            phases.append(Phase(name, outage, began, began))
            board.phase = number
            while (spent := perf_counter() - began) < seconds * share / total:
                _check(workers, folder)
                listener.goes_on((done + spent * total / seconds) / total, sum(board.calls))
                time.sleep(0.1)
            done += share
        phases[-1].ended = perf_counter()
        board.phase = STOP
        _until(lambda: all(worker.poll() == 0 for worker in workers), workers, folder, "finish")
        found = [Findings.read(folder / f"found-{number}.json") for number in range(WORKERS)]
        return Run(phases, found, int((folder / "counter").read_text()), versions)


@contextlib.contextmanager
def _workers(folder: Path, config: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The worker processes. Each ends itself when its stdin does: when this process is gone, however it went."""
    workers: list[subprocess.Popen[str]] = []
    try:
        for number in range(WORKERS):
            with (folder / f"stderr-{number}").open("w") as stderr:
                worker = subprocess.Popen(
                    # In a session of its own: Ctrl-C is for this process, which then ends them all.
                    [sys.executable, "-c", "from govredis.demo.traffic import main; main()"],
                    stdin=subprocess.PIPE, stderr=stderr, cwd=folder, text=True, start_new_session=True,
                )  # fmt: skip
            workers.append(worker)
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already, which _check will say
                worker.stdin.write(json.dumps({"number": number, "config": config, "folder": str(folder)}) + "\n")
                worker.stdin.flush()
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()


def _check(workers: list[subprocess.Popen[str]], folder: Path) -> None:
    """Raises WorkerError if a worker has ended with an error."""
    for number, worker in enumerate(workers):
        if worker.poll():
            tail = (folder / f"stderr-{number}").read_text().strip()[-500:]
            raise WorkerError(f"worker {number} of {WEB} + {JOBS} ended with {worker.returncode}: {tail}")


def _until(ready: Callable[[], bool], workers: list[subprocess.Popen[str]], folder: Path, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not ready():
        _check(workers, folder)
        if time.monotonic() > deadline:
            raise WorkerError(f"the workers did not {what} within {_PATIENCE:g} s")
        time.sleep(0.02)
