"""The board: a file in memory that all processes of the demo see, so that each can check what the others promised.

Whole numbers of 8 bytes, each written by one process only (`inside` excepted: seeing two writers is its purpose), so
nothing is locked, and looking costs no more than an index.
"""

from __future__ import annotations

import mmap
from pathlib import Path

WEB, JOBS, CLIENTS = 4, 3, 1  # processes
WORKERS = WEB + JOBS + CLIENTS
SERVICE = WORKERS  # the number of the async service, beside them
POOL = 2  # processes of the Celery worker
AGENTS = 32
SESSIONS = 250  # of each web worker
GUESTS = 50  # sessions of the async service

#: Phases: before the story, its first one, and after it.
STARTING, HEALTHY, STOP = -1, 0, 99
_MANY = 1_000_000


class Board:
    """The story writes `phase`, `dead`, `epoch` and `has_replicas`; a worker, and a
    process of the Celery worker, writes the cells that carry its number."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            cells = 6 + 2 * (WORKERS + 1) + 2 * WORKERS + WEB * (1 + AGENTS) + (WEB + POOL) * AGENTS + GUESTS + WEB + 1
            file.truncate(8 * cells)
            self._cells = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self._used = 6
        self.ready: memoryview[int] = self._take(WORKERS + 1)
        #: Calls made so far, for the progress bar.
        self.calls: memoryview[int] = self._take(WORKERS + 1)
        #: Per worker, the last phase in which it has done each of its operations, and the last one in which Redis has
        #: served it; plus one: 0 means no phase.
        self.done_in: memoryview[int] = self._take(WORKERS)
        self.served_in: memoryview[int] = self._take(WORKERS)
        #: How many sessions a web worker has bound; they are numbered from 0.
        self.bound: memoryview[int] = self._take(WEB)
        #: Per agent, the last version that a worker's update returned.
        self.updated: list[memoryview[int]] = [self._take(AGENTS) for _ in range(WEB)]
        #: The same, but only of updates after which no reader may see less: see `promise`.
        self.promised: list[memoryview[int]] = [self._take(AGENTS) for _ in range(WEB + POOL)]
        #: Per session of the async service, as `marked`: how often it has been bound, and in which Redis last.
        self.guests: memoryview[int] = self._take(GUESTS)
        #: Per web worker, and of the async service: the number of the last limit that it has filled, as `marked`.
        self.filled: memoryview[int] = self._take(WEB + 1)

    def _take(self, count: int) -> memoryview[int]:
        self._used += count
        return self._cells[self._used - count : self._used]

    @property
    def phase(self) -> int:
        return self._cells[0]

    @phase.setter
    def phase(self, number: int) -> None:
        self._cells[0] = number

    @property
    def dead(self) -> bool:
        """Redis is dead for certain: killed, and its restart has not begun."""
        return bool(self._cells[1])

    @dead.setter
    def dead(self, dead: bool) -> None:
        self._cells[1] = dead

    @property
    def epoch(self) -> int:
        """Which Redis it is, counted by losses of its data. Raised while it is dead."""
        return self._cells[2]

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._cells[2] = number

    @property
    def has_replicas(self) -> bool:
        """A replica takes over, and may lack the last moments of its primary."""
        return bool(self._cells[5])

    @has_replicas.setter
    def has_replicas(self, has: bool) -> None:
        self._cells[5] = has

    def enter(self, worker: int, section: int = 0) -> bool:
        """Go into a critical section, of two. False if somebody is in it."""
        alone = self._cells[3 + section] == 0
        self._cells[3 + section] = worker + 1
        return alone

    def leave(self, worker: int, section: int = 0) -> bool:
        """Go out of it. False if somebody came in meanwhile."""
        alone = self._cells[3 + section] == worker + 1
        self._cells[3 + section] = 0
        return alone

    def promise(self, row: int, agent: int, version: int) -> None:
        """From now on no reader may see less. `row`: a web worker's number, or WEB + that of a process of Celery's."""
        mine = self.promised[row]
        mine[agent] = max(mine[agent], version)

    def all_worked(self, phase: int, outage: bool) -> bool:
        """Have all workers done all their operations in a phase, and used Redis in it where that was not away?"""
        marks = self.done_in if outage else [*self.done_in, *self.served_in]
        return all(mark == phase + 1 for mark in marks)

    @staticmethod
    def marked(epoch: int, number: int) -> int:
        """Both in one cell: a number, and the Redis it comes from. 0: no number."""
        return epoch * _MANY + number

    @staticmethod
    def unmarked(cell: int) -> tuple[int, int]:
        """The epoch and the number."""
        return divmod(cell, _MANY)

    def floors(self, agent: int) -> tuple[int, int]:
        """The least version that a read beginning now may return, and the last that an update returned.

        A failover may lose an invalidation that a task has just made: its promise is for the end, not for a read.
        """
        promised = self.promised[:WEB] if self.has_replicas else self.promised
        return max(row[agent] for row in promised), max(row[agent] for row in self.updated)
