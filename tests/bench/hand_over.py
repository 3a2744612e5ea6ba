"""How long a lock takes from a release to the next of eight waiting processes, beside a bare wake of one process."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import redis as redis_py

from govredis import Config, GovRedis

from .operations import OURS, REDIS_PY
from .samples import Figure, figure
from .sites import PATIENT

HERE, AFAR = "on this host", "0.5 ms away, either way"
BARE = "a bare wake"
WAITING = 8
#: Seconds that a lock is held, so that all the others wait again; and before the process that let go comes back.
HELD, AWAY = 0.003, 0.0015
#: Seconds to a Redis on another host.
DISTANCE = 0.0005


class Board:
    """Memory that the processes share: when the last let go, and how long each hand-over took, in nanoseconds."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._memory = mmap.mmap(-1, 16 + 8 * rounds)

    def let_go(self) -> None:
        struct.pack_into("q", self._memory, 8, time.monotonic_ns())

    def got_it(self, at: int) -> bool:
        """Note it. False when there were enough."""
        done, let_go_at = struct.unpack_from("qq", self._memory, 0)
        if done == self._rounds:
            return False
        struct.pack_into("q", self._memory, 16 + 8 * done, at - let_go_at)
        struct.pack_into("q", self._memory, 0, done + 1)
        return True

    def median(self) -> float:
        """In microseconds, without the first, which begin with starting up."""
        found = struct.unpack_from(f"{self._rounds}q", self._memory, 16)
        return statistics.median(found[self._rounds // 10 :]) / 1000


@contextmanager
def processes(count: int, work: Callable[[int], None]) -> Iterator[None]:
    children = []
    for n in range(count):
        pid = os.fork()
        if not pid:
            try:
                work(n)
            finally:
                os._exit(0)
        children.append(pid)
    yield
    for pid in children:
        os.waitpid(pid, 0)


def locks(take: Callable[[], Callable[[], Any]], rounds: int) -> float:
    """Median microseconds from the call of `release` to the first line of the next.

    Args:
        take: called in each process: returns what waits for the lock and returns its release.
    """
    board = Board(rounds)

    def work(_: int) -> None:
        acquire = take()
        while True:
            release = acquire()
            go_on = board.got_it(time.monotonic_ns())
            if go_on:
                time.sleep(HELD)
            board.let_go()
            release()
            if not go_on:
                return
            time.sleep(AWAY)

    with processes(WAITING + 1, work):
        pass
    return board.median()


def bare_wake(url: str, rounds: int) -> float:
    """Median microseconds from RPUSH to the return of another process's BLPOP, both by redis-py."""
    board = Board(rounds)

    def work(n: int) -> None:
        client = redis_py.Redis.from_url(url)
        mine, other = f"bare:{n}", f"bare:{1 - n}"
        if n == 0:
            board.let_go()
            client.rpush(mine, "1")
        go_on = True
        while go_on:
            client.blpop([mine], 0)
            go_on = board.got_it(time.monotonic_ns())
            time.sleep(HELD)
            board.let_go()
            client.rpush(other, "1")
            time.sleep(AWAY)

    redis_py.Redis.from_url(url).delete("bare:0", "bare:1")
    with processes(2, work):
        pass
    return board.median()


@contextmanager
def half_a_millisecond_away(url: str) -> Iterator[str]:
    """The URL of a proxy in a process of its own that takes that long with what it passes on, either way."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # one side has gone
            while data := source.recv(65536):
                time.sleep(DISTANCE)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            client, _ = listening.accept()
            server = socket.create_connection((parts.hostname, parts.port))
            for one, other in (client, server), (server, client):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=pump, args=(one, other), daemon=True).start()

    parts = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pid = os.fork()
        if not pid:
            serve()
        try:
            yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def measure(url: str, folder: str, rounds: int, turns: int) -> dict[str, dict[str, Figure]]:
    """Microseconds, by where Redis is and contestant: medians of the medians of `turns`, all in turn."""

    def ours(at: str) -> Callable[[], Any]:
        gov = GovRedis(Config(redis_url=at, lock_folder=folder, **PATIENT))
        return lambda: gov.locks.acquire("hand-over", timeout=None).release

    def redis_pys(at: str) -> Callable[[], Any]:
        lock = redis_py.Redis.from_url(at).lock("redis-py-hand-over", timeout=30)

        def acquire() -> Callable[[], Any]:
            lock.acquire()
            return lock.release

        return acquire

    found: dict[tuple[str, str], list[float]] = {}
    with half_a_millisecond_away(url) as distant:
        for _ in range(turns):
            for where, at in (HERE, url), (AFAR, distant):
                found.setdefault((where, BARE), []).append(bare_wake(at, rounds))
                found.setdefault((where, OURS), []).append(locks(lambda at=at: ours(at), rounds))
                polled = locks(lambda at=at: redis_pys(at), max(10, rounds // 5))
                found.setdefault((where, REDIS_PY), []).append(polled)
    report: dict[str, dict[str, Figure]] = {}
    for (where, who), medians in found.items():
        report.setdefault(where, {})[who] = figure(medians)
    return report
