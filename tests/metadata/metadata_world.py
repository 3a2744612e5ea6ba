"""Processes that read, write and run the relay, each stopped before everything it sends and let go on one at a time.

All that they do is real: the package, its Lua on a Redis, its SQL on a PostgreSQL. The schedule says which goes on
next, and X seconds pass by moving a clock. Every read is held against the history of the writes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2
from clocked_pair import Clock, X
from support import lease_of, redis_of

from govredis import GovRedis
from govredis.keys import sibling
from govredis.metadata import entry_keys
from govredis.testing.servers import PostgresServer, RedisServer

#: One step of a schedule: what, and a number that chooses among those that it may be done to.
Step = tuple[str, int]


#: By step, a part of the command that it must stop before.
MARKS = {"to fill": entry_keys.FILL.sha, "to confirm": "govredis_outbox_told"}


class Killed(BaseException):
    """The process of an actor is gone."""


class Violation(AssertionError):
    pass


class Actor:
    """One call of one process, on a thread that runs only between `step` and the next thing that it sends."""

    def __init__(self, gov: GovRedis, kind: str, call: Callable[[GovRedis], Any]) -> None:
        self.gov = gov
        self.kind = kind
        self.began_at = 0.0
        self.began = -1
        self.committed: list[tuple[str, int, float]] = []
        self.epochs = 0
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.before = ""
        self.killed = False
        self._call = call
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        current.actor = self
        try:
            self.result = self._call(self.gov)
        except BaseException as error:  # noqa: BLE001
            self.error = error
        self.ended = True
        self._stopped.release()

    def stop(self, before: str) -> None:
        """Called by the actor itself, before it sends something."""
        if not self.killed:
            self.before = before
            self._stopped.release()
            self._go.acquire()
            if self.killed:
                raise Killed

    def step(self) -> None:
        self._go.release()
        assert self._stopped.acquire(timeout=60)


current = threading.local()


def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        actor = getattr(current, "actor", None)
        if actor is not None:
            actor.stop(repr(args[:2]))
        return method(*args, **kwargs)

    return stopped


class World:
    """A Redis, a PostgreSQL, and four processes that each do one thing at a time."""

    def __init__(self, redis: RedisServer, postgres: PostgresServer, make: Callable[..., GovRedis]) -> None:
        self.redis = redis
        self.clock = Clock()
        self.govs = [
            self.clock.adopt(make(redis_url=redis.url, database_url=postgres.url, metadata_staleness=X))
            for _ in range(4)
        ]
        for gov in self.govs:
            gov.metadata._loads.patience = 0.0  # the caller that it would wait for goes on when the schedule says so
            redis_of(gov)._round_trip = stopping(redis_of(gov)._round_trip)  # type: ignore[method-assign]
            gov.postgres._execute = stopping(gov.postgres._execute)  # type: ignore[method-assign]
        self._sql = psycopg2.connect(postgres.url)
        self._sql.autocommit = True
        self._late = psycopg2.connect(postgres.url)

    def close(self) -> None:
        self._sql.close()
        self._late.close()

    def sql(self, text: str) -> Any:
        with self._sql.cursor() as cursor:
            cursor.execute(text)
            return cursor.fetchall() if cursor.description else None

    # -- a run ---------------------------------------------------------------------------------------------------

    def run(self, steps: list[Step]) -> None:
        """Raises Violation."""
        self._begin()
        try:
            for what, number in steps:
                self._do(what, number)
                self._note_commits()
            while self.actors:
                self._step(self.actors[0])
        finally:
            self._late.rollback()
            for actor in self.actors:
                actor.killed = True
                while not actor.ended:
                    actor.step()

    def _begin(self) -> None:
        self.redis.command("FLUSHALL")
        self.sql("DELETE FROM govredis_epochs; DELETE FROM govredis_agents; DELETE FROM govredis_outbox")
        self.sql("INSERT INTO govredis_agents (agent_id, metadata) VALUES ('a', '{}'), ('b', '{}')")
        for gov in self.govs:
            lease_of(gov).renew_after_fork()
            gov.counters.renew_after_fork()
        self.actors: list[Actor] = []
        self.now = 0
        #: (agent, version, when it was committed), as of when it was seen.
        self.commits: list[tuple[str, int, float]] = []
        #: (agent, version, the step by which everybody was told)
        self.told: list[tuple[str, int, int]] = []
        self.healthy = True
        self.snapshot: list[tuple[bytes, bytes, int]] | None = None
        self.late_is_open = False
        self._note_commits()
        self.commits = [(agent, version, float("-inf")) for agent, version, _ in self.commits]

    def time(self) -> float:
        return time.monotonic() + self.clock.slept

    def _note_commits(self) -> None:
        known = {(agent, version) for agent, version, _ in self.commits}
        for agent, version in self.sql("SELECT agent_id, version FROM govredis_agents"):
            if (agent, version) not in known:
                self.commits.append((agent, version, self.time()))

    def _do(self, what: str, number: int) -> None:
        self.now += 1
        agent = "ab"[number % 2]
        if what == "step":
            if self.actors:
                self._step(self.actors[number % len(self.actors)])
        elif what == "run":
            if self.actors:
                actor = self.actors[number % len(self.actors)]
                while not actor.ended:
                    self._step(actor)
        elif what.startswith("to "):
            actor = self.actors[number % len(self.actors)]
            while MARKS[what] not in actor.before:
                assert not actor.ended, f"it did not come {what[3:]}"
                self._step(actor)
        elif what == "kill":
            if self.actors:
                actor = self.actors[number % len(self.actors)]
                if actor.kind != "write":  # see "lose"
                    actor.killed = True
                    self._step(actor)
        elif what in ("read", "write", "lose", "drain"):
            self._start(what, agent)
        else:
            getattr(self, f"_{what}")(number, agent)

    def _start(self, what: str, agent: str) -> None:
        free = [gov for gov in self.govs if all(actor.gov is not gov for actor in self.actors)]
        if not free or (what in ("write", "lose") and agent == "b" and self.late_is_open):  # it would wait for the row
            return
        calls: dict[str, Callable[[GovRedis], Any]] = {
            "read": lambda gov: gov.metadata.get_or_load(agent, gov.agents.get),
            "write": lambda gov: gov.agents.update_metadata(agent, x=1),
            # Its process dies between commit and invalidation; and Redis is still told of by nobody.
            "lose": lambda gov: gov.postgres.fetch("UPDATE govredis_agents SET metadata = '{}' WHERE agent_id = %s",
                                                   (agent,)),
            "drain": lambda gov: gov.internal.freshness.drain(),  # type: ignore[union-attr]
        }  # fmt: skip
        self.actors.append(Actor(free[0], f"{what} {agent}", calls[what]))

    def _step(self, actor: Actor) -> None:
        if actor.began < 0:
            actor.began, actor.began_at = self.now, self.time()
            actor.committed, actor.epochs = list(self.commits), actor.gov.counters.get("guard.epochs")
        actor.step()
        self._note_commits()
        if actor.ended:
            self.actors.remove(actor)
            self._ended(actor)

    def _ended(self, actor: Actor) -> None:
        if isinstance(actor.error, Killed):
            return
        if actor.error is not None:
            raise actor.error
        what, agent = actor.kind.split()
        if what == "write":
            self.told.append((agent, actor.result["version"], self.now))
        elif what == "drain" and actor.result is not None:
            # A new epoch reaches those who know the old one's freshness lease when that ends.
            if actor.gov.counters.get("guard.epochs") == actor.epochs:
                self.told += [(agent, version, self.now) for agent, version, _ in actor.committed]
        elif what == "read":
            self._check(actor, agent, actor.result["version"])

    def _check(self, actor: Actor, agent: str, found: int) -> None:
        for other, version, at in self.commits:
            if other == agent and version > found and at < actor.began_at - X:
                raise Violation(f"read {agent} of {found} {actor.began_at - at:.3f} s after {version} was committed")
        for other, version, told in self.told:
            if self.healthy and other == agent and version > found and told < actor.began:
                raise Violation(f"read {agent} of {found} after {version} was told")

    # -- what happens --------------------------------------------------------------------------------------------

    def _psql(self, number: int, agent: str) -> None:
        self.sql("UPDATE govredis_agents SET metadata = '{\"by\": \"psql\"}' WHERE agent_id = 'a'")

    def _rollback(self, number: int, agent: str) -> None:
        self.sql("BEGIN; UPDATE govredis_agents SET metadata = '{\"by\": \"nobody\"}' WHERE agent_id = 'a'; ROLLBACK")

    def _late_begins(self, number: int, agent: str) -> None:
        if not self.late_is_open and not any(actor.kind in ("write b", "lose b") for actor in self.actors):
            self._late.cursor().execute("UPDATE govredis_agents SET metadata = '{}' WHERE agent_id = 'b'")
            self.late_is_open = True

    def _late_commits(self, number: int, agent: str) -> None:
        if self.late_is_open:
            self._late.commit()
            self.late_is_open = False

    def _sleep(self, number: int, agent: str) -> None:
        self.clock.sleep((X / 10, X / 5, X / 2, X)[number % 4])

    def _evict(self, number: int, agent: str) -> None:
        keys = [key for key in self.redis.command("KEYS", "*") if key != "govredis:guard"]
        if keys:
            self.redis.command("DEL", sorted(keys)[number % len(keys)])

    def _evict_value(self, number: int, agent: str) -> None:
        self.redis.command("DEL", f"agent_meta:{agent}")

    def _evict_stone(self, number: int, agent: str) -> None:
        assert self.redis.command("DEL", sibling(f"agent_meta:{agent}", "tombstone")) == 1

    def _evict_freshness(self, number: int, agent: str) -> None:
        self.redis.command("DEL", "govredis:guard")

    def _flush(self, number: int, agent: str) -> None:
        self.redis.command("FLUSHALL")

    def _snap(self, number: int, agent: str) -> None:
        import redis

        with redis.Redis.from_url(self.redis.url) as client:
            now = client.time()
            self.snapshot = []
            for key in client.keys("*"):
                left = client.pttl(key)
                ends = 0 if left < 0 else now[0] * 1000 + now[1] // 1000 + left
                self.snapshot.append((key, client.dump(key), ends))

    def _fail_over(self, number: int, agent: str) -> None:
        """To the data of the last snapshot, and over new connections."""
        import redis

        if self.snapshot is None:
            return
        self.healthy = False
        with redis.Redis.from_url(self.redis.url) as client, client.pipeline(transaction=True) as at_once:
            at_once.client_kill_filter(_type="normal", skipme=True)
            at_once.flushall()
            for key, value, ends in self.snapshot:
                if not ends or ends > time.time() * 1000:
                    at_once.restore(key, ends, value, absttl=bool(ends))
            at_once.execute()
