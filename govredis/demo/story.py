"""The story: workers started on the stage, Redis taken away twice, everything ended."""

from __future__ import annotations

import time
from time import perf_counter
from typing import Protocol

from ..api import GovRedis
from ..config import Config
from .board import AGENTS, CLIENTS, JOBS, SERVICE, STOP, WEB, WORKERS
from .measure import Discovery, Findings, Phase, Run
from .stage import Stage, stage

_PATIENCE = 60.0  # seconds for the tasks that are left, and for work that a stall of the machine has held up


class Listener(Protocol):
    """Is told how far the story is."""

    def begins(self, phase: str) -> None: ...

    def goes_on(self, done: float, calls: int) -> None: ...


def tell(seconds: float, topology: str, listener: Listener) -> Run:
    """Have it all happen, with `seconds` of traffic and one of TOPOLOGIES. Raises ServerError, ProcessError."""
    listener.begins("starting Redis, PostgreSQL and workers")
    with stage(topology) as on:
        redis, board, processes = on.redis, on.board, on.processes
        board.has_replicas = not redis.is_alone
        for name in ("counter", "counter-alone", "counter-beside"):
            (on.folder / name).write_text("0")
        names = [*(f"worker {number} of {WORKERS}" for number in range(WORKERS)), "async service"]
        modules = ["traffic"] * (WEB + JOBS) + ["clients"] * CLIENTS + ["async_worker"]
        for number, (name, module) in enumerate(zip(names, modules, strict=True)):
            processes.start(name, module, number=number, config=on.config, folder=str(on.folder))
        processes.until(lambda: all(board.ready), "the workers' start")

        total = sum(share for _, share, _ in redis.phases)
        phases: list[Phase] = []
        done = 0.0
        for number, (name, share, outage) in enumerate(redis.phases):
            listener.begins(f"Redis: {name}")
            began = perf_counter()
            if number == 1:
                redis.kill()
                # A failover may lose the last moments: the primary acknowledges before a replica has it.
                board.dead, board.epoch = redis.is_alone, 2
            elif number == 2:
                board.dead = False
                redis.restart()
                began = perf_counter()
            elif number == 3:
                redis.hang()
                board.epoch += not redis.is_alone
            elif number == 4:
                redis.go_on()
                began = perf_counter()
            if phases:
                phases[-1].ended = began
            phases.append(Phase(name, outage, began, began))
            board.phase = number
            planned = seconds * share / total
            while (spent := perf_counter() - began) < planned or (
                spent < planned + _PATIENCE and not board.all_worked(number, outage)
            ):
                processes.check()
                listener.goes_on((done + share * min(1.0, spent / planned)) / total, sum(board.calls))
                time.sleep(0.1)
            done += share
        phases[-1].ended = perf_counter()
        board.phase = STOP
        processes.until(lambda: all(map(processes.ended, names)), "the workers' end")
        found = [Findings.read(on.folder / f"found-{number}.json") for number in range(WORKERS)]
        service = Findings.read(on.folder / f"found-{SERVICE}.json")
        _settle(on)
        with GovRedis(Config(**on.config)) as gov:
            discoveries = [Discovery(*row) for row in gov.postgres.fetch("SELECT * FROM demo_discoveries")]
            snapshots = gov.postgres.fetch("SELECT count(*) FROM @schema@.govredis_health_snapshots")[0][0]
        counter = sum(int((on.folder / name).read_text()) for name in ("counter", "counter-beside"))
        promised = [max(row[agent] for row in board.promised[WEB:]) for agent in range(AGENTS)]
        outages = snapshots if redis.is_alone else None
        return Run(phases, found, service, counter, discoveries, promised, outages, on.versions)


def _settle(on: Stage) -> None:
    """Until the broker has no task left, or for as long as can be waited. Those of beat come and go."""
    deadline = time.monotonic() + _PATIENCE
    quiet = 0
    while quiet < 3 and time.monotonic() < deadline:
        left = on.broker.command("LLEN", "celery") + on.broker.command("HLEN", "unacked")
        quiet = 0 if left else quiet + 1
        time.sleep(0.02)
