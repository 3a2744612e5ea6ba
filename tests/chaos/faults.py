"""The faults: each befalls one part of the world, for a bounded time, and is undone at its end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2

from govredis.testing.servers import PostgresServer, RedisServer
from tests.cutting_proxy import CuttingProxy

from .history import Recorder, now


class UnreliableProxy(CuttingProxy):
    """Cuts a connection when a reply comes, sends the reply twice, or is late with it.

    Attributes:
        trouble: which of "cut", "double", "late"; "" for none.
        chance: with which a reply meets it.
    """

    trouble, chance = "", 0.02

    def _deliver(self, receiver: Any, found: bytes, *, is_reply: bool) -> bool:
        if is_reply and self.trouble and random.random() < self.chance:
            if self.trouble == "cut":
                return False
            if self.trouble == "late":
                time.sleep(random.uniform(0, 0.3))
            elif self.trouble == "double":
                found *= 2
        return super()._deliver(receiver, found, is_reply=is_reply)


class World:
    """The servers and processes that faults befall.

    Args:
        workers: gives the processes that run now, by name.
        replace: kills one and starts another.
        celery: the pid of the Celery worker.
        children: gives those of its pool.
    """

    def __init__(
        self,
        cache: RedisServer,
        postgres: PostgresServer,
        proxy: UnreliableProxy,
        folder: Path,
        workers: Callable[[], dict[str, int]],
        replace: Callable[[str], None],
        celery: int,
        children: Callable[[], list[int]],
    ) -> None:
        self.cache, self.postgres, self.proxy = cache, postgres, proxy
        self.workers, self.replace, self.celery, self.children = workers, replace, celery, children
        self.recorder = Recorder(folder, "faults")

    # -- drawing them --------------------------------------------------------------------------------------------

    def storm(self, seconds: float, dice: random.Random, only: set[str]) -> None:
        """Faults of each part one after the other, of all parts at once; it is over when the last one is."""
        ends = now() + seconds
        with ThreadPoolExecutor(len(PARTS)) as threads:
            befalling = [
                threads.submit(self._befall, part, [n for n in names if n in only], ends, random.Random(dice.random()))
                for part, names in PARTS.items()
            ]
        for one in befalling:
            one.result()

    def _befall(self, part: str, names: list[str], ends: float, dice: random.Random) -> None:
        while names and now() < ends:
            time.sleep(dice.expovariate(1.5))
            name = dice.choice(names)
            n, line = self.recorder.number(), {"began": now(), "args": {"name": name, "part": part}}
            line["args"].update(loses=LOSING.get(name, 0), evicts=int(name == "redis evicting"))
            self.recorder.write(n, "fault", **line)
            FAULTS[name](self, dice)
            self.recorder.write(n, "fault", **line, ended=now(), outcome="ok")

    # -- Redis ---------------------------------------------------------------------------------------------------

    def redis_stopped(self, dice: random.Random) -> None:
        self.cache.pause()
        time.sleep(dice.choice([0.05, 0.3, dice.uniform(1, 4)]))
        self.cache.resume()

    def _restart(self, dice: random.Random, data: Any) -> None:
        self.cache.kill()
        time.sleep(dice.uniform(0, 3))
        self.cache.restart(data)

    def redis_killed(self, dice: random.Random) -> None:
        self._restart(dice, "keep")

    def redis_emptied(self, dice: random.Random) -> None:
        self._restart(dice, "empty")

    def redis_set_back(self, dice: random.Random) -> None:
        self.cache.snapshot_data()
        time.sleep(dice.uniform(0.5, 4))
        self._restart(dice, "old")

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

    def redis_read_only(self, dice: random.Random) -> None:
        if dice.random() < 0.5:
            self.cache.command("REPLICAOF", "127.0.0.1", "1")
            time.sleep(dice.uniform(0.5, 3))
            self.cache.command("REPLICAOF", "NO", "ONE")
        else:
            with self._set("min-replicas-to-write", 1, 0):
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

    # -- the proxy -----------------------------------------------------------------------------------------------

    def _trouble(self, dice: random.Random, kind: str) -> None:
        self.proxy.chance, self.proxy.trouble = dice.choice([0.005, 0.05]), kind
        time.sleep(dice.uniform(0.5, 3))
        self.proxy.trouble = ""

    def replies_cut(self, dice: random.Random) -> None:
        self._trouble(dice, "cut")

    def replies_doubled(self, dice: random.Random) -> None:
        self._trouble(dice, "double")

    def replies_late(self, dice: random.Random) -> None:
        self._trouble(dice, "late")

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
        with self._stopped(dice.choice([self.celery, *self.children()])):
            time.sleep(dice.uniform(0.05, 3))

    def celery_killed(self, dice: random.Random) -> None:
        """A process of its pool is killed."""
        _signal(signal.SIGKILL, *self.children()[:1])


def _signal(number: int, *pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


#: By what they befall: two faults at once are never of the same part.
PARTS = {
    "redis": (
        "redis stopped", "redis killed", "redis emptied", "redis set back", "redis flushed", "scripts flushed",
        "clients killed", "clients paused", "redis read only", "redis full", "redis evicting",
    ),
    "proxy": ("replies cut", "replies doubled", "replies late"),
    "postgres": ("postgres stopped", "backends terminated"),
    "workers": ("worker stopped", "worker killed", "worker struck"),
    "celery": ("celery stopped", "celery killed"),
}  # fmt: skip
FAULTS: dict[str, Callable[[World, random.Random], None]] = {
    name: getattr(World, name.replace(" ", "_")) for names in PARTS.values() for name in names
}
#: How often Redis loses what it has counted.
LOSING = {"redis emptied": 1, "redis set back": 1, "redis flushed": 3}
