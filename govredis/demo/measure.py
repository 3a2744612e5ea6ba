"""The numbers: from what the workers brought back to what the report says, and whether everything held."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..limits import Limit
from .background import LIMIT as TASK_LIMIT
from .site import LIMIT as REQUEST_LIMIT
from .traffic import COLUMNS, FALLBACK, OPERATIONS, POSTGRES, RATE, REDIS, REFUSED

#: Counts beside the async service, each by one side: all must be there.
BESIDE = (
    "guests resolved", "sessions resolved by them", "records read by them", "increments beside", "increments of theirs",
    "refused by us, filled by them", "refused by them, filled by us",
)  # fmt: skip
#: Each of these would be one statement if there were no govredis, and is one where it falls back on PostgreSQL.
READS = ("resolve a session", "read metadata", "read metadata of 8", "store a discovery")


class Call(NamedTuple):
    operation: str
    by: int  # REDIS, FALLBACK, POSTGRES (alone), or REFUSED
    began: float
    ended: float
    statements: int


class AdmittedCall(NamedTuple):
    """A limit let a call through, at some time between `began` and `ended`."""

    agent: str
    store: str
    began: float
    ended: float


class Discovery(NamedTuple):
    """One that a task has stored: how often, and where and when its limit let the first run through."""

    number: int
    runs: int
    agent: str
    store: str
    began: float
    ended: float


@dataclass
class Findings:
    """The findings of one worker."""

    calls: list[Call]
    tally: Counter[str]
    errors: dict[str, str]
    admissions: list[AdmittedCall]
    #: The numbers of the tasks that the site has acknowledged.
    published: list[int]
    #: The agents, by number, that the site has changed, and their new versions.
    updates: list[tuple[int, int]]
    #: The requests that the site's own limit has let through.
    admitted: list[AdmittedCall]

    @classmethod
    def read(cls, path: Path) -> Findings:
        found: dict[str, Any] = json.loads(path.read_text())
        rows, names = zip(*[iter(found["log"])] * COLUMNS, strict=True), list(OPERATIONS)
        calls = [Call(names[int(n)], int(by), began, ended, int(sent)) for n, by, began, ended, sent in rows]
        admissions = [AdmittedCall(*row) for row in found.get("admissions", ())]
        published = found.get("published", [])
        updates = [(int(agent), int(version)) for agent, version in found.get("updates", ())]
        admitted = [AdmittedCall(*row) for row in found.get("admitted", ())]
        return cls(calls, Counter(found["tally"]), found["errors"], admissions, published, updates, admitted)


@dataclass
class Phase:
    """A part of the story. In an outage Redis is away from `began` to `ended`; else it answers in all of it."""

    name: str
    outage: bool
    began: float
    ended: float


@dataclass
class Run:
    """The whole story, as it went.

    Attributes:
        workers: the processes of govredis.
        service: the async service beside them.
        counter: what the files say that was counted up under locks.
        discoveries: those that their tasks have stored.
        invalidated: by number of the agent, the last version whose invalidation was published, and has run.
        snapshots: of the health, kept in PostgreSQL while Redis was away; None where replicas took over.
    """

    phases: list[Phase]
    workers: list[Findings]
    service: Findings
    counter: int
    discoveries: list[Discovery]
    invalidated: list[int]
    snapshots: int | None
    servers: str = ""

    def __post_init__(self) -> None:
        self.tally: Counter[str] = Counter()
        for findings in (*self.workers, self.service):
            self.tally.update(findings.tally)
        self.calls: list[Call] = [call for worker in self.workers for call in worker.calls]
        self.admissions: list[AdmittedCall] = [admission for worker in self.workers for admission in worker.admissions]
        self.published: int = sum(len(worker.published) for worker in self.workers)
        self.updates: list[tuple[int, int]] = [update for worker in self.workers for update in worker.updates]
        self.admitted: list[AdmittedCall] = [admission for worker in self.workers for admission in worker.admitted]
        self.errors: dict[str, str] = {
            name: text for one in (*self.workers, self.service) for name, text in one.errors.items()
        }

    def latencies(self, operation: str, by: int) -> list[float]:
        return sorted(call.ended - call.began for call in self.calls if call.operation == operation and call.by == by)

    def calls_in(self, number: int) -> list[Call]:
        """The calls of a phase. One that an outage fell into, or that fell into it, is the outage's."""
        starts = [phase.began for phase in self.phases]

        def home(call: Call) -> int:
            first, last = (max(0, bisect_right(starts, at) - 1) for at in (call.began, call.ended))
            return next((n for n in range(first, last + 1) if self.phases[n].outage), first)

        return [call for call in self.calls if call.by != POSTGRES and home(call) == number]

    def in_use_after(self, number: int) -> list[float]:
        """Per worker that had one, seconds from Redis's return to the end of its first call served there."""
        began, end = self.phases[number].began, self.phases[number].ended
        ends = [[c.ended for c in w.calls if c.by == REDIS and began < c.ended <= end] for w in self.workers]
        return [min(ended) - began for ended in ends if ended]

    def statements(self) -> tuple[int, int]:
        """How many reads, each a PostgreSQL statement if there were no cache, and how many statements they were."""
        reads = [call.statements for call in self.calls if call.operation in READS and call.by in (REDIS, FALLBACK)]
        return len(reads), sum(reads)

    # -- what must hold ------------------------------------------------------------------------------------------

    def broken(self) -> dict[str, int]:
        """How often each thing happened that must never happen."""
        return {
            "limits exceeded": overfull(self.admissions, [Limit(*limit) for limit in RATE]),
            "limits of tasks exceeded": overfull([AdmittedCall(*row[2:]) for row in self.discoveries], [TASK_LIMIT]),
            "limits of requests exceeded": overfull(self.admitted, [REQUEST_LIMIT]),
            "lock overlaps": self.tally["!lock overlaps"],
            "increments lost": abs(self.tally["increments"] - self.counter),
            "stale reads after invalidation": self.tally["!stale reads"],
            "sessions resolved wrongly": self.tally["!sessions resolved wrongly"],
            "tasks lost": self.published - len(self.discoveries),
            "tasks run twice": sum(found.runs - 1 for found in self.discoveries),
            "invalidations lost": sum(self.invalidated[agent] < version for agent, version in self.updates),
            "disagreements with the async service": self.tally["!disagreements"],
            "HTTP errors": self.tally["!HTTP errors"],
            "unexpected errors": self.tally["!unexpected errors"],
        }

    def stalled(self) -> list[str]:
        """Where work did not go on: an operation that nobody was served in a phase, a worker that did not use Redis."""
        found = []
        for number, phase in enumerate(self.phases):
            served = {call.operation for call in self.calls_in(number) if call.by != REFUSED}
            found += [f'{phase.name}: nobody could "{name}"' for name in OPERATIONS if name not in served]
            if not phase.outage and (missing := len(self.workers) - len(self.in_use_after(number))):
                found.append(f"{phase.name}: {missing} workers did not use Redis")
        if any(phase.outage for phase in self.phases) and self.snapshots == 0:
            found.append("no health snapshot was taken while Redis was away")
        if not self.published or not self.updates or not self.tally["requests refused"]:
            found.append("the site accepted no discovery, or no update, or its limit was never met")
        found += [f"beside the async service: {name}: 0" for name in BESIDE if not self.tally[name]]
        return found


def overfull(admissions: Iterable[AdmittedCall], limits: Sequence[Limit]) -> int:
    """How many windows surely held more admissions of one store than a limit allows.

    Each took place between send and receive, by a server's clock that runs as ours does. So those that were all sent
    and received within less than a window surely fell into one.
    """
    stores: defaultdict[tuple[str, str], list[AdmittedCall]] = defaultdict(list)
    for admission in admissions:
        stores[admission.agent, admission.store].append(admission)
    found = 0
    for mine in stores.values():
        for first in mine:
            for limit in limits:
                end = first.began + limit.window
                found += sum(first.began <= other.began and other.ended < end for other in mine) > limit.count
    return found


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank quantile of sorted numbers; None of none."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None
