"""A run: servers, processes, storms and calms, healing, and the verdict."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from celery import Celery

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer, RedisServer
from tests.locks.lock_set import Register
from tests.tasks.tasks_worker import ROOT, environment

from .checks import Violation, X, check
from .history import Op, Recorder, now, read
from .mutants import MUTANTS
from .parts import AGENTS, SLOTS
from .topologies import TOPOLOGIES, faults_of

WORKERS = 8
#: Only what is broken takes so long to end.
PATIENCE = 300.0


class Run:
    """One run from one seed, its history in `folder`."""

    def __init__(
        self, folder: Path, seed: int, seconds: float, *, topology: str, only: set[str], mutants: str, forks: str,
        patience: float,
    ) -> None:  # fmt: skip
        self.topology = topology
        self.folder, self.seed, self.seconds, self.only = folder, seed, seconds, only
        self.mutants, self.forks, self.patience = mutants, forks, patience
        self.dice = random.Random(seed)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._mutex = threading.Lock()
        # A process that dies with its parent dies with the parent's thread that started it.
        self._starter = ThreadPoolExecutor(1)
        self._number = 0

    def violations(self) -> list[Violation]:
        """Do it."""
        with contextlib.ExitStack() as stack:
            self.broker = stack.enter_context(RedisServer(persistent=True))
            self.postgres = stack.enter_context(PostgresServer(config=["max_connections=300"]))
            self.world = TOPOLOGIES[self.topology](
                self.folder, self.postgres, self._workers, self._replace, lambda: self.celery.pid, self._children
            )
            self.world.start(stack)
            self.registers = {name: Register() for name in "ab"}
            for register in self.registers.values():
                stack.callback(register.close)
            stack.callback(self._starter.shutdown)
            stack.callback(self._kill_all)
            self._prepare()
            self._run()
        return self._judge()

    # -- the processes -------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        (self.folder / "sids").write_bytes(bytes(SLOTS * 64))
        (self.folder / "locks").mkdir(mode=0o700)
        # No fault is here yet, and a stall of the machine must not be an outage.
        with GovRedis(Config(redis_enabled=False, database_url=self.postgres.url, postgres_timeout=60)) as gov:
            gov.postgres.migrate()
            for agent in AGENTS:
                gov.agents.create(agent)
        self.celery = self._start_celery()
        for slot in range(WORKERS):
            self._starter.submit(self._start_worker, f"w{slot}").result()

    def _settings(self, **more: Any) -> dict[str, Any]:
        # The timeouts are such that a busy machine is no outage, and that most of the faults are one.
        return {
            "redis_url": self.world.url(0), "database_url": self.postgres.url,
            "lock_folder": str(self.folder / "locks"),
            "metadata_staleness": X, "socket_timeout": 1, "connect_timeout": 1, "postgres_timeout": 2, **more,
        }  # fmt: skip

    def _start_worker(self, slot: str) -> None:
        self._number += 1
        which = int(slot[1:])
        spec = {
            "folder": str(self.folder), "who": f"{slot}-{self._number}", "mutants": self.mutants,
            "seed": self.seed * 1000 + self._number, "pause": 0.02,
            "forks": "python" in self.forks, "nurse": "c" in self.forks.split(",") and which == WORKERS - 1,
            "registers": {name: register.port for name, register in self.registers.items()},
            "settings": self._settings(redis_url=self.world.url(which), local_cache=which in (1, 2, 5, 6)),
        }  # fmt: skip
        with open(self.folder / "workers.log", "ab") as log:
            command = [sys.executable, "-m", "tests.chaos.worker", json.dumps(spec)]
            self.processes[slot] = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )

    def _start_celery(self) -> subprocess.Popen[bytes]:
        variables = {f"GOVREDIS_{name.upper()}": str(value) for name, value in self._settings().items()}
        variables["REDIS_URL"] = variables.pop("GOVREDIS_REDIS_URL")
        variables.update(
            GOVREDIS_PARKING_URL=self.broker.url, CELERY_BROKER_URL=self.broker.url, CHAOS_FOLDER=str(self.folder),
            CHAOS_MUTANTS=self.mutants,
        )  # fmt: skip
        alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        command = [sys.executable, "-m", "celery", "-A", "tests.chaos.jobs", "worker", "-c", "3", *alone]
        with open(self.folder / "celery.log", "ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(**variables), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _replace(self, slot: str) -> None:
        with self._mutex:
            _kill(self.processes[slot])
            self._starter.submit(self._start_worker, slot).result()

    def _workers(self) -> dict[str, int]:
        with self._mutex:
            return {slot: process.pid for slot, process in self.processes.items()}

    def _children(self) -> list[int]:
        """The processes of Celery's pool: those with its own command line."""
        mine = Path(f"/proc/{self.celery.pid}/cmdline").read_bytes()
        children = Path(f"/proc/{self.celery.pid}/task/{self.celery.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if _command_line(pid) == mine]

    def _kill_all(self) -> None:
        for process in (*self.processes.values(), self.celery):
            _kill(process)

    # -- the course of it ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._await("the processes did not begin", lambda: len([*self.folder.glob("w*.jsonl")]) >= WORKERS)
        published = threading.Event()
        publisher = threading.Thread(target=self._publish, args=(published,))
        publisher.start()
        try:
            self._await("Celery did not begin", lambda: [*self.folder.glob("celery-*.jsonl")])
            ends = now() + self.seconds
            while now() < ends:
                time.sleep(self.dice.choice([1, X + 3]))  # a calm, short or long enough for what must hold in one
                self.world.storm(min(self.dice.uniform(3, 15), max(1, ends - now())), self.dice, self.only)
        finally:
            published.set()
            publisher.join()
        (self.folder / "end").touch()
        self._end()
        self._await_tasks()
        recorder = Recorder(self.folder, "registers")
        for name, register in self.registers.items():
            line = {"began": now(), "ended": now(), "outcome": "ok", "value": register.accepted, "args": {"name": name}}
            recorder.write(recorder.number(), "register", **line)

    def _publish(self, over: threading.Event) -> None:
        recorder = Recorder(self.folder, "client")
        client = Celery("client", broker=self.broker.url, set_as_current=False)
        dice = random.Random(self.seed)
        while not over.wait(dice.expovariate(8)):
            task, of = dice.choice(["limited", "limited", "alone"]), recorder.number()
            args = {"task": task, "of": of}
            recorder.write(of, "publish", began=now(), args=args)
            client.send_task(task, (of, dice.choice("ab")))
            recorder.write(of, "publish", began=now(), ended=now(), outcome="ok", args=args)
        client.close()

    def _end(self) -> None:
        """Each process ends by itself, once it is back."""
        recorder, deadline = Recorder(self.folder, "ends"), now() + PATIENCE
        for slot, process in self.processes.items():
            try:
                process.wait(max(1.0, deadline - now()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)  # faulthandler says in workers.log where it hangs
            if process.wait():
                line = {"began": now(), "ended": now(), "outcome": "failed", "value": f"Ended: {process.returncode}"}
                recorder.write(recorder.number(), "end", **line, args={"worker": slot})

    def _await_tasks(self) -> None:
        """Until all have run, or none more has for long.

        A stall of the machine is a single look, however long it is: nothing has run meanwhile.
        """

        def missing() -> set[int]:
            ops = read(self.folder, "c*.jsonl")  # the client's, and Celery's
            ran = {op.args["of"] for op in ops if op.what == "run" and op.ok}
            return {op.args["of"] for op in ops if op.what == "publish" and op.ok} - ran

        left, looks = missing(), 0
        while left and looks < self.patience:
            time.sleep(1)
            looks += 1
            if (still := missing()) != left:
                left, looks = still, 0

    def _await(self, otherwise: str, condition: Any) -> None:
        deadline = now() + PATIENCE
        while not condition():
            if now() > deadline or self.celery.poll() is not None:
                raise RuntimeError(f"{otherwise}; see the logs in {self.folder}")
            time.sleep(0.05)

    def _judge(self) -> list[Violation]:
        ops = read(self.folder)
        found = check(ops)
        report(ops, found, f"seed {self.seed}")
        return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With whatever it has forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def report(ops: Sequence[Op], found: Sequence[Violation], title: str) -> None:
    """A few lines about the run, and the first violations of each promise."""
    features = Counter(op.what.split(".")[0] for op in ops if op.what not in ("fault", "register"))
    faults = Counter(op.args["name"] for op in ops if op.what == "fault")
    broken = Counter(violation.promise for violation in found)
    unknown = sum(op.outcome == "unknown" for op in ops)
    print(f"{title}: {len(ops)} operations ({unknown} of unknown outcome) by {len({op.who for op in ops})} processes,"
          f" {sum(faults.values())} faults, {len(found)} violations")  # fmt: skip
    print("  operations:", ", ".join(f"{what} {n}" for what, n in features.most_common()))
    print("  faults:", ", ".join(f"{name} {n}" for name, n in faults.most_common()) or "none")
    shown: Counter[str] = Counter()
    for violation in found:
        shown[violation.promise] += 1
        if shown[violation.promise] <= 3:
            print(f"  VIOLATION at {violation.at:.4f}: {violation.promise}: {violation.text}")
    for promise, n in broken.items():
        print(f"  {n} violations of: {promise}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run, and check the history")
    runs.add_argument("--seconds", type=float, default=120)
    runs.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=None)
    runs.add_argument("--topology", choices=TOPOLOGIES, default="server", help="of Redis")
    runs.add_argument("--faults", type=lambda text: set(text.split(",")), default=None, help="only these")
    runs.add_argument("--without", type=lambda text: set(text.split(",")), default=set(), help="none of these")
    runs.add_argument("--forks", default="python,c", help="how processes fork: python, c, both or none")
    runs.add_argument("--patience", type=float, default=75, help="seconds without any task, and the others are lost")
    runs.add_argument("--mutant", default="", help=f"of: {', '.join(MUTANTS)}; or several, joined by commas")
    again = commands.add_parser("check", help="check the history that a run has left")
    again.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.command == "check":
        ops = read(asked.folder)
        found = check(ops)
        report(ops, found, str(asked.folder))
        sys.exit(bool(found))
    known = faults_of(asked.topology)
    faults = known if asked.faults is None else asked.faults
    if wrong := (faults | asked.without) - known:
        parser.error(f"no such faults: {', '.join(sorted(wrong))}; there are: {', '.join(sorted(known))}")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # handed on to the processes, until they have their handlers
    failed = False
    for seed in asked.seeds or [random.SystemRandom().randrange(1_000_000)]:
        folder = Path(tempfile.mkdtemp(prefix="govredis-chaos-"))
        print(f"seed {seed}: history in {folder}", flush=True)
        run = Run(
            folder, seed, asked.seconds, topology=asked.topology, only=faults - asked.without, mutants=asked.mutant,
            forks=asked.forks, patience=asked.patience,
        )  # fmt: skip
        if run.violations():
            failed = True
        else:
            shutil.rmtree(folder)
    sys.exit(failed)
