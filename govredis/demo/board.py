"""The board: a file in memory that all processes of the demo see, so that each can check what the others promised.

Whole numbers of 8 bytes, each written by one process only (`inside` excepted: seeing two writers is its purpose), so
nothing is locked, and looking costs no more than an index.
"""

from __future__ import annotations

import mmap
from pathlib import Path

WEB, JOBS, CLIENTS = 4, 3, 1  # processes
WORKERS = WEB + JOBS + CLIENTS
POOL = 2  # processes of the Celery worker
AGENTS = 32
SESSIONS = 250  # of each web worker

STARTING, STOP = -1, 99


class Board:
    """The story writes `phase`, `dead` and `epoch`; a worker, and a
    process of the Celery worker, writes the cells that carry its number."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(8 * (4 + 2 * WORKERS + WEB * (1 + AGENTS) + (WEB + POOL) * AGENTS))
            self._cells = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self._used = 4
        self.ready = self._take(WORKERS)
        #: Calls made so far, for the progress bar.
        self.calls = self._take(WORKERS)
        #: How many sessions a web worker has bound; they are numbered from 0.
        self.bound = self._take(WEB)
        #: Per agent, the last version that a worker's update returned.
        self.updated = [self._take(AGENTS) for _ in range(WEB)]
        #: The same, but only of updates after which no reader may see less: see `promise`.
        self.promised = [self._take(AGENTS) for _ in range(WEB + POOL)]

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

    def enter(self, worker: int) -> bool:
        """Go into the one critical section. False if somebody is in it."""
        alone = self._cells[3] == 0
        self._cells[3] = worker + 1
        return alone

    def leave(self, worker: int) -> bool:
        """Go out of it. False if somebody came in meanwhile."""
        alone = self._cells[3] == worker + 1
        self._cells[3] = 0
        return alone

    def promise(self, row: int, agent: int, version: int) -> None:
        """From now on no reader may see less. `row`: a web worker's number, or WEB + that of a process of Celery's."""
        mine = self.promised[row]
        mine[agent] = max(mine[agent], version)

    def floors(self, agent: int) -> tuple[int, int]:
        """The least version that a read beginning now may return, and the last that an update returned."""
        return max(row[agent] for row in self.promised), max(row[agent] for row in self.updated)
