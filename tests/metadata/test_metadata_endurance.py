"""The promise, live: 8 processes read and write while Redis and they are stopped, killed, and Redis loses its data."""

from __future__ import annotations

import bisect
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import eventually

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.once

WORKER = Path(__file__).with_name("metadata_worker.py")
SECONDS = float(os.environ.get("GOVREDIS_TEST_SECONDS", "25"))
X = 2.0
ROLES = ["read"] * 2 + ["local"] * 2 + ["write"] * 2 + ["psql", "drain"]


class Processes:
    def __init__(self, redis: RedisServer, postgres: PostgresServer, folder: Path) -> None:
        self._arguments = (redis.url, postgres.url, str(X))
        self._folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.files: list[Path] = []
        for number, role in enumerate(ROLES):
            self.start(f"{role} {number}")

    def start(self, name: str) -> None:
        file = self._folder / f"{name} {len(self.files)}"
        file.touch()
        self.files.append(file)
        command = [sys.executable, str(WORKER), name.split()[0], *self._arguments, str(file)]
        self.running[name] = subprocess.Popen(command)

    def replace(self, name: str) -> None:
        """kill -9, and another in its place."""
        self.running[name].kill()
        self.running[name].wait()
        self.start(name)

    def read_locally(self) -> int:
        """How many reads those have written that keep values in the process."""
        return sum(file.read_text().count("\n") for file in self.files if file.name.startswith("local"))

    def stop(self) -> dict[str, int]:
        """By name, how they ended."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(60) for name, process in self.running.items()}

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def persistent_redis() -> Iterator[RedisServer]:
    with RedisServer(persistent=True) as server:
        yield server


@pytest.fixture
def processes(persistent_redis: RedisServer, mortal_postgres: PostgresServer, tmp_path: Path) -> Iterator[Processes]:
    with GovRedis(Config(redis_enabled=False, database_url=mortal_postgres.url)) as gov:
        for n in range(100):
            gov.agents.create(f"agent-{n}")
    made = Processes(persistent_redis, mortal_postgres, tmp_path)
    yield made
    made.kill()


def mischief(redis: RedisServer, processes: Processes) -> dict[str, Callable[[], None]]:
    def stopped() -> None:
        redis.pause()
        time.sleep(random.uniform(0.2, X))
        redis.resume()

    def restarted(data: str) -> Callable[[], None]:
        def restart() -> None:
            redis.kill()
            time.sleep(random.uniform(0, X))
            redis.restart(data)  # type: ignore[arg-type]

        return restart

    def process_stopped() -> None:
        process = random.choice(list(processes.running.values()))
        process.send_signal(signal.SIGSTOP)
        time.sleep(random.uniform(0.2, X))
        process.send_signal(signal.SIGCONT)

    def killed(role: str) -> Callable[[], None]:
        names = [name for name in processes.running if name.startswith(role)]
        return lambda: processes.replace(random.choice(names))

    return {
        "Redis stopped": stopped,
        "Redis restarted": restarted("keep"),
        "Redis restarted empty": restarted("empty"),
        "Redis restarted with old data": restarted("old"),
        "FLUSHALL": lambda: redis.command("FLUSHALL"),
        "the drainer killed": killed("drain"),
        "a writer killed": killed("write"),
        "a reader killed": killed("read"),
        "a reader with values of its own killed": killed("local"),
        "a process stopped": process_stopped,
    }


def test_no_read_is_more_than_x_behind(persistent_redis: RedisServer, processes: Processes) -> None:
    time.sleep(2)  # they start
    done: Counter[str] = Counter()
    mischiefs = mischief(persistent_redis, processes)
    persistent_redis.snapshot_data()
    ends = time.monotonic() + SECONDS
    # Each once, then whichever.
    order = random.sample(list(mischiefs), len(mischiefs))
    while time.monotonic() < ends:
        name = order.pop() if order else random.choice(list(mischiefs))
        mischiefs[name]()
        done[name] += 1
        time.sleep(random.uniform(0, 1))
        if random.random() < 0.5:
            persistent_redis.snapshot_data()
    seen = processes.read_locally()
    eventually(lambda: processes.read_locally() > seen + 3000, what="values are kept there, the faults being over")
    assert set(processes.stop().values()) <= {0, -signal.SIGTERM}, "or it was just about to start"

    reads: list[tuple[float, str, int]] = []
    writes: dict[str, list[tuple[float, int]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for file in processes.files:
        for line in file.read_text().split("\n")[:-1]:  # the last line of a killed process is half a line
            kind, _, rest = line.partition(" ")
            if kind == "counts":
                counts.update(json.loads(rest))
                continue
            at, agent, version = rest.split()
            if kind == "read":
                reads.append((float(at), agent, int(version)))
            else:
                writes[agent].append((float(at), int(version)))
    # By agent, when there was something newer than what: the newest version that was committed by then.
    newest: dict[str, tuple[list[float], list[int]]] = {}
    for agent, some in writes.items():
        some.sort()
        top, versions = 0, []
        for _, version in some:
            top = max(top, version)
            versions.append(top)
        newest[agent] = [at for at, _ in some], versions
    worst = 0.0
    for start, agent, version in reads:
        instants, versions = newest.get(agent, ([], []))
        # The number of versions that were committed more than X before.
        before = bisect.bisect_left(instants, start - X)
        assert not before or versions[before - 1] <= version, (
            f"{agent}: read {version} at {start}, but {versions[before - 1]} was committed more than {X} s before"
        )
        newer = bisect.bisect_right(versions, version)
        if newer < len(instants):
            worst = max(worst, start - instants[newer])
    hits, loads = counts["agent_meta.hits"], counts["agent_meta.loads"]
    sys.stderr.write(
        f"{len(reads)} reads, {hits} hits, {counts['local_hits']} in the process,"
        f" {sum(map(len, writes.values()))} writes, worst {worst:.2f} s behind;"
        f" {dict(done)}; {counts['guard.epochs']} epochs, {counts['agent_meta.bypassed']} bypassed\n"
    )
    assert min(hits, loads, counts["local_hits"]) > 100, "there was something to be seen"
