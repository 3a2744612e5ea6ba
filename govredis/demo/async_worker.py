"""The async service of the demo at work, beside all others: it shares sessions, records, limits and a lock with them.

It has no fallback: while Redis is away its calls fail. Each reply is checked against the board.
"""

from __future__ import annotations

import asyncio
import json
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg2
import redis

from .async_service import Agent, AsyncService
from .board import AGENTS, GUESTS, HEALTHY, STARTING, STOP, WEB, Board
from .processes import take_order
from .traffic import BESIDE, PAUSE, agent_of_guest, agent_of_session, count_inside, limit_name

_TIMEOUT = 1.0
_WINDOW = int(BESIDE.window)
#: The TTL of its lock, in seconds: longer than anything is done under it, also on a machine that stalls for a while.
_LOCK_TTL = 30.0
_OWNER = "async-service"


class AsyncWorker:
    """A process of the async service: each feature is used by a task of its own."""

    def __init__(self, number: int, config: dict[str, Any], folder: str) -> None:
        self.number = number
        self.folder: Path = Path(folder)
        self.board: Board = Board(self.folder / "board")
        self.service: AsyncService = AsyncService(config["redis_url"], timeout=_TIMEOUT)
        self.sql: psycopg2.extensions.connection = psycopg2.connect(config["database_url"])
        self.sql.autocommit = True
        self.random: random.Random = random.Random(number)
        self.tally: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        #: By agent, the versions that it has stored itself, or tried to. They may be old, since it has no leases, and
        #: a Redis that hung may carry out a call that failed.
        self.stored: defaultdict[int, set[int]] = defaultdict(set)
        #: A try to get the lock has failed, and may have got it.
        self.perhaps_locked: bool = False

    async def run(self) -> None:
        board = self.board
        for number in range(GUESTS):
            await self.bind(number)
        board.ready[self.number] = 1
        while board.phase == STARTING:
            await asyncio.sleep(0.01)
        steps = self.bind_or_resolve, self.read, self.count, self.fill_or_meet
        await asyncio.gather(*map(self.repeat, steps))
        await self.close()
        found = {"log": [], "tally": self.tally, "errors": self.errors}
        (self.folder / f"found-{self.number}.json").write_text(json.dumps(found))

    def expect(self, right: bool, what: str) -> None:
        self.tally["!disagreements"] += not right
        if not right:
            self.errors.setdefault(what, what)

    async def close(self) -> None:
        await self.service.close()
        self.sql.close()

    async def repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while self.board.phase != STOP:
            try:
                await step()
            except (redis.RedisError, redis.exceptions.RedisClusterException, OSError):
                self.tally["calls of theirs that failed"] += 1
                await asyncio.sleep(0.05)
            except Exception as error:  # noqa: BLE001 - a record that is none of its own, say
                self.tally["!disagreements"] += 1
                self.errors.setdefault(type(error).__name__, traceback.format_exc(chain=False))
            self.board.calls[self.number] += 1
            await asyncio.sleep(2 * PAUSE)

    # -- sessions ------------------------------------------------------------------------------------------------

    async def bind_or_resolve(self) -> None:
        if self.random.random() < 0.3:
            await self.bind(self.random.randrange(GUESTS))
        else:
            await self.resolve()

    async def bind(self, number: int) -> None:
        """To another agent each time."""
        epoch, times = self.board.epoch, self.board.unmarked(self.board.guests[number])[1] + 1
        await self.service.sessions.bind(f"guest-{number}", agent_of_guest(number, times), label="demo")
        self.board.guests[number] = self.board.marked(epoch, times)

    async def resolve(self) -> None:
        """A session that govredis has bound. After a loss of Redis's data, those that were looked at since are back."""
        owner = self.random.randrange(WEB)
        number = self.random.randrange(self.board.bound[owner])
        session = f"s-{owner}-{number}"
        record = await self.service.sessions.get(session)
        if record is not None:
            self.tally["sessions resolved by them"] += 1
            self.expect(record["agent_id"] == agent_of_session(owner, number), f"{session} is {record}")
            await self.service.sessions.extend(session)

    # -- records of agents -----------------------------------------------------------------------------------------

    async def read(self) -> None:
        number = self.random.randrange(AGENTS)
        name, promised = f"agent-{number}", self.board.floors(number)[0]
        agent = await self.service.metadata.get(name)
        if agent is None:
            agent = await asyncio.to_thread(self.load, name)
            self.stored[number].add(agent.version)
            await self.service.metadata.set(agent)
        elif agent.version not in self.stored[number]:
            self.tally["records read by them"] += 1
            # Later it reads what Redis holds until it is told of an outage's updates: it knows of no guard.
            if self.board.phase == HEALTHY:
                self.expect(agent.version >= promised, f"{agent} is older than version {promised}")

    def load(self, name: str) -> Agent:
        with self.sql.cursor() as cursor:
            cursor.execute(
                "SELECT agent_id, metadata, status, version FROM govredis_agents WHERE agent_id = %s", (name,)
            )
            return Agent(*cursor.fetchall()[0])

    # -- the lock --------------------------------------------------------------------------------------------------

    async def count(self) -> None:
        locks = self.service.locks
        if self.perhaps_locked:
            await locks.release("beside", _OWNER)
        self.perhaps_locked = True
        if await locks.acquire("beside", _OWNER, _LOCK_TTL):
            count_inside(self.board, self.number, self.folder, self.tally)
            self.tally["increments of theirs"] += 1
            await locks.release("beside", _OWNER)
        self.perhaps_locked = False

    # -- limits ----------------------------------------------------------------------------------------------------

    async def fill_or_meet(self) -> None:
        if self.random.random() < 0.2:
            await self.fill()
        else:
            await self.meet_filled()

    async def fill(self) -> None:
        epoch, number = self.board.epoch, self.board.unmarked(self.board.filled[WEB])[1] + 1
        name, limits = limit_name(WEB, epoch, number), self.service.limits
        while await limits.check("beside", name, BESIDE.count, _WINDOW):
            await limits.record("beside", name, _WINDOW)
        self.board.filled[WEB] = self.board.marked(epoch, number)

    async def meet_filled(self) -> None:
        filler = self.random.randrange(WEB)
        epoch, number = self.board.unmarked(self.board.filled[filler])
        if number:
            name = limit_name(filler, epoch, number)
            open_to_it = await self.service.limits.check("beside", name, BESIDE.count, _WINDOW)
            if epoch == self.board.epoch:
                self.tally["refused by them, filled by us"] += not open_to_it
                self.expect(not open_to_it, f"the limit {name}, filled by govredis, is open")


def main() -> None:
    asyncio.run(AsyncWorker(**take_order()).run())
