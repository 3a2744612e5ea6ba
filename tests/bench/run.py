"""Runs the parts one after the other, each with its contestants in turns, and writes the report."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from govredis.testing.servers import PostgresServer, RedisServer

from . import (
    background,
    cluster,
    costs,
    curve,
    first_call,
    hand_over,
    in_process,
    many,
    memory,
    outage,
    targets,
    throughput,
)
from .machine import awake_cores, conditions, load
from .operations import missing
from .sites import Site

REPORT = Path(__file__).parents[2] / "docs" / "bench" / "report.json"


@dataclass(frozen=True)
class Size:
    """How much of everything: enough for figures, or just enough to see that each part works."""

    name: str
    rounds: int = 40
    turn: int = 200
    few_rounds: int = 5
    seconds: float = 0.3
    sizes: tuple[tuple[int, ...], tuple[int, ...]] = (throughput.PROCESSES, throughput.THREADS)
    counts: tuple[int, ...] = curve.COUNTS
    identities: int = 20_000
    keys: int = 10_000
    watched: float = 15.0
    hand_overs: int = 200
    agents: int = 1_000
    wait_for_redis_py: bool = True
    awake: bool = True


FULL = Size("full")
QUICK = Size("quick", 2, 5, 1, 0.01, ((2,), (2,)), (20, 40), 40, 20, 0.2, 10, 20, False, False)


class Bench:
    """One run: its servers, and the parts that have been measured."""

    def __init__(self, size: Size, folder: str, server: RedisServer, postgres: Callable[[], PostgresServer]) -> None:
        self.size, self.folder, self.server, self.postgres = size, folder, server, postgres
        self.site = Site(server.url, folder)
        self.samples: costs.Samples = {}

    def costs(self) -> Any:
        self.samples = costs.samples(self.site, self.size.rounds, self.size.turn)
        return costs.measure(self.samples)

    def throughput(self) -> Any:
        size = self.size
        return throughput.measure(self.server.url, self.folder, size.few_rounds, size.seconds, size.sizes)

    def curve(self) -> Any:
        return curve.measure(
            self.site, self.size.rounds // 2, self.size.turn // 2, self.size.counts, self.size.identities
        )

    def many(self) -> Any:
        return many.measure(self.site, self.size.rounds)

    def cluster(self) -> Any:
        return cluster.measure(self.size.rounds // 2, max(1, self.size.turn // 4))

    def cold(self) -> Any:
        return many.from_cold(self.site, self.postgres(), max(1, self.size.few_rounds // 2), self.size.agents)

    def in_process(self) -> Any:
        return in_process.measure(self.server.url, self.folder, self.size.few_rounds, self.size.turn)

    def hand_over(self) -> Any:
        return hand_over.measure(self.server.url, self.folder, self.size.hand_overs, max(1, self.size.few_rounds // 2))

    def first_call(self) -> Any:
        return first_call.measure(self.server.url, self.folder, self.size.few_rounds, self.size is QUICK)

    def memory(self) -> Any:
        return memory.measure(self.folder, self.postgres(), self.size.keys, self.size.counts, self.size.watched)

    def background(self) -> Any:
        return background.measure(self.folder, self.postgres(), self.size.watched)

    def outage(self) -> Any:
        return outage.measure(self.folder, max(20, self.size.turn * 5), self.size.wait_for_redis_py)


PARTS = (
    "costs", "throughput", "curve", "many", "in_process", "hand_over", "first_call", "cold", "memory", "background",
    "outage", "cluster",
)  # fmt: skip


def run(size: Size, parts: tuple[str, ...] = PARTS, say: Callable[[str], object] = print) -> dict[str, Any]:
    """The report: the conditions, a member for each part, and the targets."""
    with ExitStack() as kept:
        folder = kept.enter_context(tempfile.TemporaryDirectory())
        server = kept.enter_context(RedisServer())
        started: list[PostgresServer] = []

        def postgres() -> PostgresServer:
            if not started:
                started.append(kept.enter_context(PostgresServer()))
            return started[0]

        if size.awake:
            kept.enter_context(awake_cores())
        bench = Bench(size, folder, server, postgres)
        kept.callback(bench.site.close)
        report: dict[str, Any] = {
            "conditions": {
                **conditions(server.command("INFO", "server")["redis_version"]),
                "form": size.name,
                "missing": missing(),
            },
            "load": {},
            "seconds": {},
        }
        for part in parts:
            before, began = load(), time.monotonic()
            report[part] = getattr(bench, part)()
            report["load"][part] = [before[0], load()[0]]
            report["seconds"][part] = round(time.monotonic() - began, 1)
            say(f"{part}: {report['seconds'][part]:.0f} s, load {before[0]} to {load()[0]}")
        if bench.samples:
            report["targets"] = targets.judge(bench.samples, report.get("throughput"))
    return report


def main() -> None:
    from .pages import draw, show, write_tables

    options = argparse.ArgumentParser(prog="make bench", description=__doc__)
    options.add_argument("--quick", action="store_true", help="a few calls of everything: only shows that it works")
    options.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    options.add_argument("--report", type=Path, default=Path("bench.json"), help="the file to write (bench.json)")
    options.add_argument("--docs", action="store_true", help="write the report, charts and tables of docs/")
    options.add_argument("--draw", action="store_true", help="measure nothing: charts and tables of the docs, anew")
    chosen = options.parse_args()
    if not chosen.draw:
        report = run(QUICK if chosen.quick else FULL, tuple(chosen.parts.split(",")))
        where = REPORT if chosen.docs else chosen.report
        where.parent.mkdir(exist_ok=True)
        if chosen.docs and where.exists():
            # Some parts may be measured anew, when the machine is quieter.
            held = json.loads(where.read_text())
            for part in "load", "seconds":
                report[part] = {**held[part], **report[part]}
            report = {**held, **report}
        where.write_text(json.dumps(report, indent=1) + "\n")
        show(report)
    if chosen.docs or chosen.draw:
        report = json.loads(REPORT.read_text())
        draw(report, REPORT.parent)
        write_tables(report, REPORT.parents[1])
