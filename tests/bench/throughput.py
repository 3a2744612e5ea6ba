"""Calls a second of 1, 4 and 8 processes, and of 1, 8 and 50 threads of one process, on one Redis; all in turns."""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from .costs import ServerCost
from .operations import JSON, OURS, RAW, REDIS_PY, contestants
from .samples import Figure, figure, ratio
from .sites import Call, Site

PROCESSES = (1, 4, 8)
THREADS = (1, 8, 50)
#: The number of processes at which we are compared with the best peer.
COMPARED = 4
#: The operations of processes, which have identities of their own each; and of threads, which share a client.
OF_PROCESSES = ("limits.hit", "locks.acquire + release", "sessions.get", "metadata.get")
OF_THREADS = ("limits.hit", "metadata.get")


class _Board:
    """Memory that processes share: who is ready, when to begin, and how many calls each made, and its CPU."""

    def __init__(self, processes: int) -> None:
        self._memory = mmap.mmap(-1, 8 + 32 * processes)
        self._processes = processes

    def ready(self, n: int) -> None:
        struct.pack_into("d", self._memory, 8 + 32 * n, 1.0)

    def all_ready(self) -> bool:
        return all(struct.unpack_from("d", self._memory, 8 + 32 * n)[0] for n in range(self._processes))

    def begin(self) -> None:
        struct.pack_into("d", self._memory, 0, 1.0)

    def begun(self) -> bool:
        return bool(struct.unpack_from("d", self._memory, 0)[0])

    def note(self, n: int, calls: float, seconds: float, cpu: float) -> None:
        struct.pack_into("ddd", self._memory, 16 + 32 * n, calls, seconds, cpu)

    def noted(self) -> list[tuple[float, float, float]]:
        """Calls, seconds and seconds of CPU of each; nothing where a process failed."""
        found = [struct.unpack_from("ddd", self._memory, 16 + 32 * n) for n in range(self._processes)]
        return found if all(calls > 0 for calls, *_ in found) else []


def _calls_within(call: Call, seconds: float) -> tuple[int, float]:
    count, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        for _ in range(10):
            call()
        count += 10
    return count, took


def _by_threads(call: Call, threads: int, seconds: float) -> tuple[float, float]:
    """Calls, and the seconds that they took."""
    made: list[tuple[int, float]] = []
    barrier = threading.Barrier(threads)

    def run() -> None:
        barrier.wait()
        made.append(_calls_within(call, seconds))

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if len(made) != threads:
        raise RuntimeError("a thread of the bench failed")
    # Each by its own time: the last of many threads begins late.
    rate = sum(count / took for count, took in made)
    return rate * seconds, seconds


def once(
    url: str,
    folder: str,
    make: Callable[[Site], Call],
    processes: int,
    threads: int,
    seconds: float,
    tries: int = 5,
) -> dict[str, float]:
    """Calls a second, and microseconds of CPU a call: of the clients, and of Redis."""
    board = _Board(processes)
    children = []
    for n in range(processes):
        pid = os.fork()
        if not pid:
            try:
                site = Site(url, folder, f"p{n}")
                call = make(site)
                _calls_within(call, 0.001)
                board.ready(n)
                while not board.begun():
                    time.sleep(0.001)
                cpu = time.process_time()
                calls, took = _calls_within(call, seconds) if threads == 1 else _by_threads(call, threads, seconds)
                if site.client.breaker.closed:  # else the machine stood still, and fallbacks answered
                    board.note(n, calls, took, time.process_time() - cpu)
            except BaseException:  # noqa: BLE001 - the sample is taken again
                traceback.print_exc()
            finally:
                os._exit(0)
        children.append(pid)
    deadline = time.monotonic() + 60
    while not board.all_ready() and time.monotonic() < deadline:
        time.sleep(0.001)
    server = ServerCost(url)
    before = server.cpu()
    board.begin()
    for pid in children:
        os.waitpid(pid, 0)
    used = server.cpu() - before
    noted = board.noted()
    if not noted:
        if tries == 1:
            raise RuntimeError("a process of the bench failed")
        return once(url, folder, make, processes, threads, seconds, tries - 1)
    calls = sum(made for made, *_ in noted)
    return {
        "per_second": sum(made / took for made, took, _ in noted),
        "client_us": sum(cpu for *_, cpu in noted) * 1e6 / calls,
        "server_us": used / calls,
    }


def measure(
    url: str,
    folder: str,
    rounds: int,
    seconds: float,
    sizes: tuple[Sequence[int], Sequence[int]] = (PROCESSES, THREADS),
) -> dict[str, Any]:
    """By kind of company ("processes", "threads"), operation, its size and contestant."""
    races = [("processes", operation, n, 1) for operation in OF_PROCESSES for n in sizes[0]]
    races += [("threads", operation, 1, n) for operation in OF_THREADS for n in sizes[1]]
    found: dict[tuple[str, str, int, str], dict[str, list[float]]] = {}
    for _ in range(rounds):
        for kind, operation, processes, threads in races:
            for who, make in contestants(operation).items():
                if who in (RAW, JSON) or (operation, who) == ("limits.hit", REDIS_PY):
                    continue  # no peers
                for name, sample in once(url, folder, make, processes, threads, seconds).items():
                    of = found.setdefault((kind, operation, max(processes, threads), who), {})
                    of.setdefault(name, []).append(sample)
    report: dict[str, Any] = {}
    for (kind, operation, size, who), of in found.items():
        by = report.setdefault(kind, {}).setdefault(operation, {}).setdefault(str(size), {})
        by[who] = {name: figure(samples) for name, samples in of.items()}
    compared = COMPARED if COMPARED in sizes[0] else sizes[0][-1]
    report["to_the_best_peer"] = {}
    for operation in OF_PROCESSES:
        rates = {key[3]: of["per_second"] for key, of in found.items() if key[:3] == ("processes", operation, compared)}
        report["to_the_best_peer"][operation] = _to_the_best_peer(rates)
    return report


def _to_the_best_peer(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Our calls a second to those of the peer with the most, round by round."""
    peers = {who: statistics.median(rates) for who, rates in samples.items() if not who.startswith(OURS)}
    best = max(peers, key=lambda who: peers[who])
    found: Figure = ratio(samples[OURS], samples[best])
    return {"peer": best, **found}
