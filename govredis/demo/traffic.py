"""The work of the workers: real calls, one after the other, each timed, and its result checked against the board.

A worker is a process of its own, started by `story.py`.
"""

from __future__ import annotations

import json
import random
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from ..api import GovRedis
from ..config import Config
from ..errors import LockLost
from ..limits import Limit
from .board import AGENTS, GUESTS, SESSIONS, STARTING, STOP, WEB, Board
from .processes import take_order

T = TypeVar("T")

REDIS, FALLBACK, POSTGRES, REFUSED = range(4)  # who served a call; REFUSED: it raised

#: Each operation, and the counters that rise when its fallback served it.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "resolve a session": ("sessions.degraded.postgres", "sessions.degraded.get"),
    "bind a session": ("sessions.degraded.postgres", "sessions.degraded.bind"),
    "read metadata": ("agent_meta.degraded.reads",),
    "read metadata of 8": ("agent_meta.degraded.reads",),
    "update an agent": ("agent_meta.invalidations_owed",),
    "store a discovery": ("limits.degraded.postgres", "limits.degraded.local"),
    "lock and release": ("locks.degraded_grants",),
    "count under a lock": ("locks.degraded_grants",),
    # The site tells, with each answer.
    "resolve over HTTP": (),
    "update over HTTP": (),
    "publish over HTTP": (),
}
OVER_HTTP = ("resolve over HTTP", "update over HTTP", "publish over HTTP")
LOCKS = ("lock and release", "count under a lock")
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
COLUMNS = 5  # of a row of the log: operation, who served it, began, ended, PostgreSQL statements sent

RATE = [(10, 1.0), (30, 5.0)]  # "10/second;30/5 seconds": what "20/hour" is in a story of half a minute
#: Filled by one side, met by the other.
BESIDE = Limit(10, 3600.0)
LIMITED = 8  # agents that store discoveries
ALONE = 0.15  # how often the same is done with PostgreSQL alone
PAUSE = 0.002  # seconds between two calls: latencies of a server in use, not of one flooded
#: Seconds that a job waits for a lock: longer than the machine stalls.
_PATIENCE = 60.0
TABLE = (
    "CREATE TABLE demo_sessions (session_id text PRIMARY KEY, agent_id text NOT NULL, expires_at timestamptz NOT NULL)"
)
BIND = (
    "INSERT INTO demo_sessions VALUES (%s, %s, now() + interval '1 hour')"
    " ON CONFLICT (session_id) DO UPDATE SET agent_id = excluded.agent_id, expires_at = excluded.expires_at"
)


class Worker:
    """The clock and the log that web and job workers share."""

    def __init__(self, number: int, config: dict[str, Any], folder: str) -> None:
        self.number = number
        self.folder: Path = Path(folder)
        self.board: Board = Board(self.folder / "board")
        self.gov: GovRedis = GovRedis(Config(**config))
        self.alone: GovRedis = GovRedis(Config(**config, redis_enabled=False))
        self.random: random.Random = random.Random(number)
        self.log: array[float] = array("d")
        #: Counts of events, by name. Names that begin with "!" must not happen.
        self.tally: Counter[str] = Counter()
        #: By the name of an unexpected exception, the traceback of the first.
        self.errors: dict[str, str] = {}
        self.findings: dict[str, Any] = {}
        #: Its operations, and how often it does each.
        self.mix: dict[Callable[[], None], int] = {}
        #: The operations that it has not done yet in this phase of the story.
        self.first: list[Callable[[], None]] = []
        self.phase: int = STARTING

    def timed(self, operation: str, call: Callable[[], T]) -> tuple[T, int]:
        """Call it and log it. Returns what it returned, and who served it."""
        postgres = self.gov.postgres
        degraded, statements, by = self.degraded(operation), postgres.statements, REFUSED
        began = perf_counter()
        try:
            result = call()
            by = FALLBACK if self.degraded(operation) > degraded else REDIS
        finally:
            self.log.extend((NUMBER[operation], by, began, perf_counter(), postgres.statements - statements))
        if by == REDIS:
            self.board.served_in[self.number] = self.phase + 1
        return result, by

    def degraded(self, operation: str) -> int:
        """How often its fallback has served an operation."""
        return sum(map(self.gov.counters.get, OPERATIONS[operation]))

    def beside(self, operation: str, call: Callable[[], object]) -> None:
        """Now and then, and in the same run, do the same with PostgreSQL alone."""
        if self.random.random() < ALONE:
            began = perf_counter()
            call()
            self.log.extend((NUMBER[operation], POSTGRES, began, perf_counter(), 0))

    def expect(self, right: bool, what: str) -> None:
        """Counts where the async service and govredis disagree on what they share."""
        self.tally["!disagreements"] += not right
        if not right:
            self.errors.setdefault(what, what)

    def prepare(self) -> None:
        """Makes all that has to be there before the story begins."""

    def step(self) -> None:
        """Everything once in each phase, in which a busy machine does little, and then at random."""
        if self.phase != self.board.phase:
            self.phase, self.first = self.board.phase, list(self.mix)
        call = self.first.pop() if self.first else self.random.choices(list(self.mix), list(self.mix.values()))[0]
        call()
        if not self.first:
            self.board.done_in[self.number] = self.phase + 1

    def run(self) -> None:
        board = self.board
        self.prepare()
        board.ready[self.number] = 1
        while board.phase == STARTING:
            time.sleep(0.01)
        while board.phase != STOP:
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - that one reached a caller is what the demo is to find out
                self.tally["!unexpected errors"] += 1
                self.errors.setdefault(type(error).__name__, traceback.format_exc(chain=False))
            board.calls[self.number] += 1
            time.sleep(PAUSE)
        found = {"log": self.log.tolist(), "tally": self.tally, "errors": self.errors, **self.findings}
        (self.folder / f"found-{self.number}.json").write_text(json.dumps(found))
        self.gov.close()
        self.alone.close()


class Web(Worker):
    """Serves requests: resolves their session, reads and updates the agent, stores discoveries."""

    def __init__(self, number: int, config: dict[str, Any], folder: str) -> None:
        super().__init__(number, config, folder)
        self.rate: list[Limit] = [Limit(*limit) for limit in RATE]
        self.admissions: list[tuple[str, str, float, float]] = []
        self.findings: dict[str, Any] = {"admissions": self.admissions}
        #: Updates that readers may not see yet: agent, version, and when they were made.
        self.owed_updates: list[tuple[int, int, float]] = []
        self.mix: dict[Callable[[], None], int] = {
            self.resolve: 60, self.read: 50, self.read_many: 16, self.discover: 40, self.update: 4, self.bind_one: 8,
            self.read_slowly: 3, self.resolve_guest: 12, self.fill: 2, self.meet_filled: 2,
        }  # fmt: skip

    def timed(self, operation: str, call: Callable[[], T]) -> tuple[T, int]:
        result, by = super().timed(operation, call)
        if self.owed_updates and (by == REDIS or self.board.has_replicas):
            # Pending writes are replayed before this process uses Redis again, and it just has. With replicas this
            # holds of a node, and a failover may lose an invalidation: there the bound of freshness is promised.
            made_by = perf_counter() - (self.gov.config.metadata_staleness if self.board.has_replicas else 0.0)
            for agent, version, made in self.owed_updates:
                if made <= made_by:
                    self.board.promise(self.number, agent, version)
            self.owed_updates = [owed for owed in self.owed_updates if owed[2] > made_by]
        return result, by

    def prepare(self) -> None:
        for agent in range(self.number, AGENTS, WEB):
            self.gov.agents.create(f"agent-{agent}", {"name": f"Agent {agent}", "tools": ["search", "write"]})
        self.gov.agents.create(f"alone-{self.number}")
        for _ in range(SESSIONS // 5):
            self.bind_one()
            self.alone.postgres.fetch(BIND, (f"s-{self.number}-{self.board.bound[self.number] - 1}", "agent"))

    # -- sessions ------------------------------------------------------------------------------------------------

    def bind_one(self) -> None:
        """A user logs in: a new session while there is room, else one of the old ones."""
        number = self.board.bound[self.number]
        if number == SESSIONS:
            number = self.random.randrange(SESSIONS)
        self.bind(number)
        self.board.bound[self.number] = max(self.board.bound[self.number], number + 1)

    def bind(self, number: int) -> None:
        session, agent = f"s-{self.number}-{number}", agent_of_session(self.number, number)
        self.timed("bind a session", lambda: self.gov.sessions.bind(session, agent))
        self.beside("bind a session", lambda: self.alone.postgres.fetch(BIND, (session, agent)))

    def resolve(self) -> None:
        """A request comes with a session, bound by this worker or by another."""
        owner = self.random.randrange(WEB)
        number = self.random.randrange(self.board.bound[owner])
        session = f"s-{owner}-{number}"
        binding, _ = self.timed("resolve a session", lambda: self.gov.sessions.get(session))
        self.tally["!sessions resolved wrongly"] += binding is None or binding.agent_id != agent_of_session(
            owner, number
        )
        look = "SELECT agent_id FROM demo_sessions WHERE session_id = %s AND expires_at > now()"
        self.beside("resolve a session", lambda: self.alone.postgres.fetch(look, (session,)))

    # -- agents --------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """After it has returned no reader may see less; unless Redis was away, then not after its replay.

        If Redis was still dead when it had returned, it has come back empty after that: no reader may see less at all.
        Where replicas take over, no reader may see less once the bound of freshness has passed.
        """
        agent, now = self.random.choice((0, self.random.randrange(AGENTS))), self.random.random()
        record, by = self.timed("update an agent", lambda: self.gov.agents.update_metadata(f"agent-{agent}", seen=now))
        assert record is not None
        self.board.updated[self.number][agent] = record["version"]
        if self.board.dead or (by == REDIS and not self.board.has_replicas):
            self.board.promise(self.number, agent, record["version"])
        else:
            self.owed_updates.append((agent, record["version"], perf_counter()))
        own = f"alone-{self.number}"
        self.beside("update an agent", lambda: self.alone.agents.update_metadata(own, seen=now))

    def read(self) -> None:
        agent, agents = self.random.randrange(AGENTS), self.gov.agents
        floors, name = self.board.floors(agent), f"agent-{agent}"
        record, _ = self.timed("read metadata", lambda: self.gov.metadata.get_or_load(name, agents.get))
        self.check(record, floors)
        self.beside("read metadata", lambda: self.alone.agents.get(name))

    def read_slowly(self) -> None:
        """Pause between loading and filling, where the most updates come between. It is not timed."""

        def load(name: str) -> Any:
            record = self.gov.agents.get(name)
            time.sleep(0.02)
            return record

        floors = self.board.floors(0)
        self.check(self.gov.metadata.get_or_load("agent-0", load), floors)

    def read_many(self) -> None:
        some, agents = self.random.sample(range(AGENTS), 8), self.gov.agents
        floors, names = [self.board.floors(agent) for agent in some], [f"agent-{agent}" for agent in some]
        found, _ = self.timed("read metadata of 8", lambda: self.gov.metadata.get_many(names, agents.get_many))
        for name, floor in zip(names, floors, strict=True):
            self.check(found.get(name), floor)
        self.beside("read metadata of 8", lambda: self.alone.agents.get_many(names))

    def check(self, record: Any, floors: tuple[int, int]) -> None:
        promised, updated = floors
        version = record["version"] if record else 0
        self.tally["reads"] += 1
        if version < promised:
            self.tally["!stale reads"] += 1
        elif version < updated:
            self.tally["invalidations owed"] += 1

    # -- limits --------------------------------------------------------------------------------------------------

    def discover(self) -> None:
        agent, epoch, hit = f"agent-{self.random.randrange(LIMITED)}", self.board.epoch, self.gov.limits.hit
        result, _ = self.timed("store a discovery", lambda: hit(agent, self.rate, operation="kg_store"))
        self.tally["hits"] += 1
        if result.allowed:
            # A Redis that has lost its data is another store; and so is each process, should PostgreSQL be away too.
            store = {"redis": f"redis {epoch}", "local": f"local {self.number}"}.get(result.backend, result.backend)
            self.admissions.append((agent, store, self.log[-3], self.log[-2]))
        self.beside("store a discovery", lambda: self.alone.limits.hit(agent, self.rate, operation="alone"))

    # -- beside the async service --------------------------------------------------------------------------------

    def resolve_guest(self) -> None:
        """A session that the async service has bound, and binds anew to another agent now and then."""
        number = self.random.randrange(GUESTS)
        epoch, oldest = self.board.unmarked(self.board.guests[number])
        if not oldest:
            return
        binding, by = self.timed("resolve a session", lambda: self.gov.sessions.get(f"guest-{number}"))
        newest = self.board.unmarked(self.board.guests[number])[1] + 1  # which is perhaps on its way
        if by != REDIS or epoch != self.board.epoch:
            # Its Redis is away, or was lost: what a govredis has seen of it counts, and is perhaps not the newest.
            oldest = 1
            self.tally["guests resolved without their Redis"] += binding is not None
        else:
            self.tally["guests resolved"] += 1
            self.expect(binding is not None, f"guest-{number} is not found")
        agents = {agent_of_guest(number, times) for times in range(oldest, newest + 1)}
        self.expect(binding is None or binding.agent_id in agents, f"{binding} should be one of {agents}")

    def fill(self) -> None:
        """A limit that the async service meets."""
        epoch, number = self.board.epoch, self.board.unmarked(self.board.filled[self.number])[1] + 1
        name = limit_name(self.number, epoch, number)
        if self.gov.limits.hit(name, BESIDE, operation="beside", cost=BESIDE.count).backend == "redis":
            self.board.filled[self.number] = self.board.marked(epoch, number)

    def meet_filled(self) -> None:
        """A limit that the async service has filled."""
        epoch, number = self.board.unmarked(self.board.filled[WEB])
        result = self.gov.limits.hit(limit_name(WEB, epoch, number), BESIDE, operation="beside")
        if number and result.backend == "redis" and epoch == self.board.epoch:
            self.tally["refused by us, filled by them"] += not result.allowed
            self.expect(not result.allowed, f"the limit {number}, filled by the async service, is open: {result}")


class Job(Worker):
    """Works in the background under locks."""

    def __init__(self, number: int, config: dict[str, Any], folder: str) -> None:
        super().__init__(number, config, folder)
        self.mix: dict[Callable[[], None], int] = {self.lock: 5, self.count: 5, self.count_beside: 1}

    def lock(self) -> None:
        """A lock of its own, which nobody contends."""

        def call() -> None:
            with self.gov.locks.acquire(f"job-{self.number}", timeout=_PATIENCE):
                pass

        self.timed("lock and release", call)
        self.beside("lock and release", lambda: self.advisory(self.number, lambda: None))

    def count(self) -> None:
        """Add one to a number in a file, which takes a read and a write, under a lock that all jobs contend for."""

        def call() -> None:
            with self.gov.locks.acquire("counter", timeout=_PATIENCE):
                alone = self.board.enter(self.number)
                increment(self.folder / "counter")
                alone &= self.board.leave(self.number)
                self.tally.update({"increments": 1, "!lock overlaps": not alone})

        try:
            self.timed("count under a lock", call)
        except LockLost:
            self.tally["locks lost"] += 1
        other = self.folder / "counter-alone"
        self.beside("count under a lock", lambda: self.advisory(-1, lambda: increment(other)))

    def count_beside(self) -> None:
        """The same, under a lock for which the async service contends, too. It may have to wait for that: not timed.

        Where the lock is this host's alone, the service cannot know of it: nothing is counted.
        """
        try:
            with self.gov.locks.acquire("beside", timeout=_PATIENCE) as held:
                if not held.degraded:
                    count_inside(self.board, self.number, self.folder, self.tally)
                    self.tally["increments beside"] += 1
        except LockLost:
            self.tally["locks lost"] += 1

    def advisory(self, key: int, body: Callable[[], None]) -> None:
        with self.alone.postgres.transaction() as tx:
            tx.fetch("SELECT pg_advisory_xact_lock(%s)", (key,))
            body()


def count_inside(board: Board, number: int, folder: Path, tally: Counter[str]) -> None:
    """The work of both sides under the lock that they share."""
    alone = board.enter(number, 1)
    increment(folder / "counter-beside")
    alone &= board.leave(number, 1)
    tally.update({"increments": 1, "!lock overlaps": not alone})


def agent_of_guest(number: int, times: int) -> str:
    """The agent of the async service's session, after so many binds."""
    return f"agent-{(number + times) % AGENTS}"


def limit_name(filler: int, epoch: int, number: int) -> str:
    """The identity of a limit that one side fills, and the other side meets."""
    return f"{filler}-{epoch}-{number}"


def increment(path: Path) -> None:
    """Read, dawdle, write: wrong for any two who do it at once."""
    number = int(path.read_text())
    time.sleep(0.001)
    path.write_text(str(number + 1))


def agent_of_session(owner: int, session: int) -> str:
    return f"agent-{(owner * 7 + session) % AGENTS}"


def main() -> None:
    order = take_order()
    (Web if order["number"] < WEB else Job)(**order).run()
