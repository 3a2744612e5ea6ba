"""The faults: each befalls one part of the world, for a bounded time, and is undone at its end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psycopg2

from govredis.testing.servers import PostgresServer, RedisServer

from .history import Recorder, now


class World(ABC):
    """The servers and processes that faults befall; a subclass for each topology of Redis.

    Args:
        folder: of the history.
        workers: gives the processes that run now, by name.
        replace: kills one and starts another.
        celery: gives the pid of the Celery worker.
        children: gives those of its pool.

    Attributes:
        cache: the Redis that a fault befalls now.
    """

    #: The faults by what they befall: two faults at once are never of the same part.
    parts: ClassVar[dict[str, tuple[str, ...]]]
    cache: RedisServer

    def __init__(
        self,
        folder: Path,
        postgres: PostgresServer,
        workers: Callable[[], dict[str, int]],
        replace: Callable[[str], None],
        celery: Callable[[], int],
        children: Callable[[], list[int]],
    ) -> None:
        self.folder, self.postgres = folder, postgres
        self.workers, self.replace, self.celery, self.children = workers, replace, celery, children
        self.recorder = Recorder(folder, "faults")

    @abstractmethod
    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the servers of Redis, and have the stack end them."""

    @abstractmethod
    def url(self, worker: int) -> str:
        """Where a worker reaches Redis."""

    @abstractmethod
    def aim(self, dice: random.Random) -> None:
        """Draw the Redis that the next fault befalls."""

    def slots(self) -> Sequence[tuple[int, int]] | None:
        """The slots that a fault of `cache` concerns, as first and last ones; None for all keys."""
        return None

    # -- drawing them --------------------------------------------------------------------------------------------

    def storm(self, seconds: float, dice: random.Random, only: set[str]) -> None:
        """Faults of each part one after the other, of all parts at once; it is over when the last one is."""
        ends = now() + seconds
        with ThreadPoolExecutor(len(self.parts)) as threads:
            befalling = [
                threads.submit(self._befall, part, [n for n in names if n in only], ends, random.Random(dice.random()))
                for part, names in self.parts.items()
            ]
        for one in befalling:
            one.result()

    def _befall(self, part: str, names: list[str], ends: float, dice: random.Random) -> None:
        while names and now() < ends:
            time.sleep(dice.expovariate(1.5))
            name = dice.choice(names)
            args = {"name": name, "part": part, "loses": LOSING.get(name, 0), "evicts": int(name == "redis evicting")}
            if part == "redis":
                self.aim(dice)
                if (slots := self.slots()) is not None and name not in OF_ALL_NODES:
                    args["slots"] = slots
            n, line = self.recorder.number(), {"began": now(), "args": args}
            self.recorder.write(n, "fault", **line)
            getattr(self, name.replace(" ", "_"))(dice)
            self.recorder.write(n, "fault", **line, ended=now(), outcome="ok")

    # -- a server of Redis ---------------------------------------------------------------------------------------

    def redis_flushed(self, dice: random.Random) -> None:
        for _ in range(LOSING["redis flushed"]):
            self.cache.command("FLUSHALL")
            time.sleep(dice.uniform(0, 0.1))

    def scripts_flushed(self, dice: random.Random) -> None:
        self.cache.command("SCRIPT", "FLUSH")

    def clients_killed(self, dice: random.Random) -> None:
        for _ in range(5):
            for kind in ("normal", "pubsub"):
                self.cache.command("CLIENT", "KILL", "TYPE", kind)
            time.sleep(dice.uniform(0, 0.2))

    def clients_paused(self, dice: random.Random) -> None:
        seconds = dice.choice([0.1, dice.uniform(0.5, 3)])
        self.cache.command("CLIENT", "PAUSE", round(seconds * 1000), dice.choice(["ALL", "WRITE"]))
        time.sleep(seconds)

    def redis_unreplicated(self, dice: random.Random) -> None:
        """It has fewer replicas than it wants, and refuses writes."""
        with self._set("min-replicas-to-write", 9, 0):
            time.sleep(dice.uniform(0.5, 3))

    def redis_full(self, dice: random.Random) -> None:
        with self._set("maxmemory", 1, 0):
            time.sleep(dice.uniform(0.5, 3))

    def redis_evicting(self, dice: random.Random) -> None:
        used = int(self.cache.command("INFO", "memory")["used_memory"])
        with self._set("maxmemory-policy", dice.choice(["allkeys-lru", "volatile-lru"]), "noeviction"):
            for _ in range(5):
                with self._set("maxmemory", round(used * dice.uniform(0.9, 1)), 0):
                    time.sleep(dice.uniform(0.1, 0.5))

    @contextlib.contextmanager
    def _set(self, setting: str, value: Any, back: Any) -> Iterator[None]:
        self.cache.command("CONFIG", "SET", setting, value)
        try:
            yield
        finally:
            self.cache.command("CONFIG", "SET", setting, back)

    # -- PostgreSQL ----------------------------------------------------------------------------------------------

    def postgres_stopped(self, dice: random.Random) -> None:
        self.postgres.pause()
        time.sleep(dice.choice([0.3, dice.uniform(1, 3), dice.uniform(3, 8)]))
        self.postgres.resume()

    def backends_terminated(self, dice: random.Random) -> None:
        with contextlib.closing(psycopg2.connect(self.postgres.url)) as connection, connection.cursor() as cursor:
            for _ in range(3):
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
                time.sleep(dice.uniform(0, 0.3))

    # -- the processes -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stopped(self, *pids: int) -> Iterator[None]:
        _signal(signal.SIGSTOP, *pids)
        try:
            yield
        finally:
            _signal(signal.SIGCONT, *pids)

    def worker_stopped(self, dice: random.Random) -> None:
        """Some for as long as it takes, past many a lease; meanwhile the others, again and again, for a moment."""
        pids = sorted(self.workers().values())
        long = dice.sample(pids, dice.choice([0, 1, 1, 3]))
        others, ends = [pid for pid in pids if pid not in long], now() + dice.uniform(0.5, 4)
        with self._stopped(*long):
            while now() < ends:
                with self._stopped(dice.choice(others)):
                    time.sleep(dice.uniform(0.02, 0.06))
                time.sleep(dice.uniform(0, 0.05))

    def worker_killed(self, dice: random.Random) -> None:
        self.replace(dice.choice(sorted(self.workers())))

    def worker_struck(self, dice: random.Random) -> None:
        """The signal handler of a worker raises."""
        for _ in range(100):
            _signal(signal.SIGUSR1, dice.choice(sorted(self.workers().values())))
            time.sleep(dice.uniform(0, 0.03))

    def celery_stopped(self, dice: random.Random) -> None:
        with self._stopped(dice.choice([self.celery(), *self.children()])):
            time.sleep(dice.uniform(0.05, 3))

    def celery_killed(self, dice: random.Random) -> None:
        """A process of its pool is killed."""
        _signal(signal.SIGKILL, *self.children()[:1])


def _signal(number: int, *pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


#: The faults of the parts that all topologies have.
OF_OTHERS = {
    "postgres": ("postgres stopped", "backends terminated"),
    "workers": ("worker stopped", "worker killed", "worker struck"),
    "celery": ("celery stopped", "celery killed"),
}
#: Those that each Redis may meet, whatever it is a part of.
OF_A_SERVER = (
    "redis flushed", "scripts flushed", "clients killed", "clients paused", "redis unreplicated", "redis full",
    "redis evicting",
)  # fmt: skip
#: How often Redis loses what it has counted.
LOSING = {"redis emptied": 1, "redis set back": 1, "redis flushed": 3, "all emptied": 1}
#: Those of all nodes of a Cluster at once.
OF_ALL_NODES = ("all killed", "all emptied")
