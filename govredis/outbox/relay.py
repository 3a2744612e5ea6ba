"""The outbox relay tells Redis of everything that was committed before, or finds that Redis has lost data.

The *freshness lease* is one key in Redis: (epoch, run, confirmed, at). It is valid until `at` + X, by Redis's clock.
A value that is cached in the lease's epoch knows of every write that was committed before `at`. So while the lease is
valid, that value is at most X behind.

A run of the relay has four steps. Any process may die, stop or be cut off between and within them.

1. Read Redis's TIME t, and the lease. Then PostgreSQL notes the changes that no trigger has seen; see
   schema/0013_partitions.sql.
2. In a PostgreSQL transaction, one relay at a time, read how far this epoch was told (`seen`, a snapshot) and by which
   run. Read every entry of the outbox, too, that this statement's own snapshot sees and `seen` does not. The statement
   comes after t, so an entry that it misses was committed after t. Long transactions that commit late are no special
   case.
3. In Redis, if the lease is still as it was, it gets a new run number, and all of these entries are invalidated. Then,
   if the lease still has that number, it gets another. PostgreSQL is told the latter and its snapshot, and commits.
4. If the lease is still as step 3 left it, it gets `at` = t.

Data loss. The last run number in Redis is written after its invalidations, and PostgreSQL's commit confirms it. Redis
may then restart with older data, or a lagging replica may take its place. The number in Redis is then not PostgreSQL's,
and a new epoch begins, in which nothing is cached yet.

If Redis does so in the middle of step 3, what is left may be the first number and a part of the invalidations. But such
a server is reached over new connections only. So if the client has connected anew since before the first number,
nothing is acknowledged, and the next run tells all once more. Hence step 3 needs no MULTI, which some proxies do not
take, nor one exchange for everything.

After a relay that died before its commit, the lease's `confirmed` is the number that PostgreSQL still has: nothing was
acknowledged since, nor lost. A Redis without the lease begins a new epoch as well. Until the next run, a lease that
came back with old data is valid until its own `at` + X, and nothing cached beside it is older than `at`.

PostgreSQL knows an epoch (step 3's commit) before its lease is valid (step 4). So an entry that another relay or the
cleaning of the table deletes before that commit was committed before anything is cached in the epoch.

A new epoch stands for invalidations that cannot be made one by one: more than a thousand entries, all of a namespace
(TRUNCATE), or a key on which the invalidation fails.

A Redis whose clock is set back by d during a failure adds at most min(d, X), if the relay runs before the
clock is where it was.

On a Cluster each node has a lease of its own, in an epoch of its own: a key that the node's slots decide. Its relay
tells it of the ids in its slots only. A slot may move between the nodes, and the key of the lease with it. Hence:

- The lease names the slots that the node had when it was told, by the node's own view, without those that are on their
  way. Values in others are neither used nor stored: entries of theirs are acknowledged untold. If a slot has left
  meanwhile, the invalidation is redirected: nothing is acknowledged, and the run begins again.
- A slot that left is noted. If it comes back in the same epoch, its values may have missed what was acknowledged while
  it was away: a new epoch begins. (If no run came in between, nothing was acknowledged, and the next run tells all.)
- The lease names the history that the node's data belongs to: its replication id, and how long the history was after
  step 3. It is valid on a server with this history, and no run goes on with it on another, except one that had as much
  of it: a replica that was promoted, say. The run number alone would not do. It moves with the key, away from a node
  that then loses data, and may come back to that node.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

from .._context import Context
from .._migrations import PINNED
from ..breaker import ReadOnly
from ..client import Arg, Command, RedisNode, Script
from ..client.redirects import NotServedHere
from ..errors import BackendError, BackendUnavailable
from .invalidator import Invalidator
from .record import FreshnessRecord
from .shard import LINEAGE, Lineage, ShardRecord, Slots, of_slots, own_slots

if TYPE_CHECKING:
    from ..postgres import Postgres, Transaction

_LOOK = Script(__package__, "look.lua")
_WRITE = Script(__package__, "write.lua")
#: More ids than these are invalidated by a new epoch; likewise if there are more entries than so many.
_ONE_BY_ONE = 1000
_ENTRIES = 20_000
#: Entries that one run deletes, at most: those of a large transaction take several runs.
_CLEANED_AT_ONCE = 20_000

# In a transaction of its own: the next one's snapshot sees what it has noted.
_RESHAPED = "SELECT @schema@.govredis_outbox_reshaped()"
_LOCK = f"""{PINNED}
SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0)),
       set_config('idle_in_transaction_session_timeout', %s, true)
"""
# Snapshots of another database (a restored dump) count other transactions: they are not compared.
_READ = f"""
SELECT pg_current_snapshot()::text, e.tick, few.entries, few.ids
FROM (VALUES (1)) one
LEFT JOIN @schema@.govredis_epochs e
    ON e.epoch = %s AND pg_snapshot_xmax(e.seen) <= pg_snapshot_xmax(pg_current_snapshot())
LEFT JOIN LATERAL (
    SELECT sum(n) AS entries, json_agg(json_build_array(namespace, id, version)) AS ids FROM (
        SELECT namespace, id, max(version) AS version, count(*) AS n FROM (
            SELECT namespace, id, version FROM @schema@.govredis_outbox
            WHERE xid >= pg_snapshot_xmin(e.seen) AND NOT pg_visible_in_snapshot(xid, e.seen)
            LIMIT {_ENTRIES + 1}) entry
        GROUP BY namespace, id LIMIT {_ONE_BY_ONE + 1}) id) few ON true
"""
_CONFIRM = """
SELECT @schema@.govredis_outbox_told(
    %s::bigint, %s::bigint, %s::pg_snapshot, %s::bigint[], %s::double precision, %s::integer
)
"""


class PostgresAway(BackendUnavailable):
    """PostgreSQL cannot be asked: the relay cannot run from here, and values cannot be loaded."""


class Found(NamedTuple):
    """A node's answer to the question for its lease."""

    #: Redis's clock, in microseconds.
    now: int
    #: The value at the lease's key; b"" for another type than a string.
    raw: bytes | None
    #: Outside a Cluster it has neither.
    server: Lineage | None = None
    slots: Slots = 0

    @property
    def held(self) -> FreshnessRecord | None:
        """The lease; None where it is none, or is not of the data that this server has."""
        held = FreshnessRecord.parse(self.raw)
        if held is None or (held.shard is None) != (self.server is None):
            return None
        if held.shard is not None and self.server is not None and not held.shard.is_of(self.server):
            return None
        return held

    @property
    def foreign(self) -> bool:
        """Has somebody else written to the key?"""
        return self.raw is not None and FreshnessRecord.parse(self.raw) is None


def _microseconds(time: list[bytes]) -> int:
    """Redis's TIME."""
    return int(time[0]) * 1_000_000 + int(time[1])


class OutboxRelay:
    """The relay of one node and one key prefix.

    Args:
        invalidator: makes the commands for the entries.
    """

    def __init__(self, context: Context, node: RedisNode, invalidator: Invalidator) -> None:
        assert context.postgres is not None
        self.redis: RedisNode = node
        self.postgres: Postgres = context.postgres
        self._keys = context.keys
        self._invalidator = invalidator
        #: After this time PostgreSQL ends the transaction of a relay that stopped within it.
        self._patience_ms = str(int(context.config.postgres_timeout * 1000) + 1)
        #: An epoch without a run for so long is forgotten, with its snapshot: if it returns, a new epoch begins.
        self._forgotten_after = max(600.0, 2 * context.config.metadata_staleness)
        self._counters = context.counters
        self._last: int | None = None

    @property
    def key(self) -> str:
        """The lease's. Raises BackendUnavailable for a node of a Cluster that has no slots any more."""
        return self._keys.guard(self.redis.tag())

    def questions(self) -> list[tuple[str, ...]]:
        """The commands that ask for the lease, without a script."""
        asked: list[tuple[str, ...]] = [("TIME",), ("MGET", self.key)]  # MGET: a key of another type is no error
        return [*asked, LINEAGE] if self.redis.has_slots else asked

    @staticmethod
    def answered(replies: list[Any]) -> Found:
        """The answer in their replies."""
        time, (raw,), *info = replies
        return Found(_microseconds(time), raw, Lineage.parse(info[0]) if info else None)

    def read(self) -> Found:
        """Ask for the lease. Raises BackendUnavailable, BackendError."""
        if self.redis.has_slots:
            (*time, raw), info = self.redis.pipeline([_LOOK.call((self.key,), ()), LINEAGE], (_LOOK,))
            return Found(_microseconds(time), raw, Lineage.parse(info))
        *time, raw = self.redis.run(_LOOK, (self.key,))
        return Found(_microseconds(time), raw)

    def run(self) -> int | None:
        """Tell Redis of new entries. Returns how many there were; None where another relay is running.

        Raises PostgresAway; ReadOnly where PostgreSQL can be read, and so loaded from, and not written;
        BackendUnavailable where Redis is away; BackendError; and ConfigurationError naming `govredis migrate`.
        """
        try:
            return self._run()
        except NotServedHere:  # a slot has just left, or is about to: the node knows, and says so now
            return self._run()

    def _run(self) -> int | None:
        found = self.read()
        held = found.held
        if found.foreign:
            self._counters.add("guard.foreign")  # and it is written over
        if found.server is not None:
            found = found._replace(slots=own_slots(self.redis))
        failed: BackendError | None = None
        try:
            self.postgres.fetch(_RESHAPED)
            with self.postgres.transaction() as tx:
                if not tx.fetch(_LOCK, (f"govredis {self.key}", self._patience_ms))[0][0]:
                    self._counters.add("guard.busy")
                    return None
                ((snapshot, last_run, count, ids),) = tx.fetch(_READ, (None if held is None else held.epoch,))
                entries = (ids or []) if (count or 0) <= _ENTRIES else [("", None, 0)]
                try:
                    told = self._tell(found, last_run, entries)
                    valid = None if told is None else self._valid(told, found.now)
                except BackendError as error:
                    failed = error
                    raise
                if told is None or valid is None:
                    self._counters.add("guard.busy")
                    return None
                self._confirm(tx, held, told, snapshot)
        except BackendUnavailable as error:
            if failed is None and not isinstance(error, ReadOnly):
                raise PostgresAway(str(error)) from error
            raise
        self._set(str(told), valid)
        self._last = told.epoch
        self._counters.add("guard.ticks")
        self._counters.add("guard.told", len(entries))
        return len(entries)

    def _tell(
        self, found: Found, last_run: int | None, entries: list[tuple[str, str | None, int]]
    ) -> FreshnessRecord | None:
        """Step 3's half in Redis. Returns the lease as it is then; None where another relay has changed it."""
        expected: Arg = found.raw or b""
        telling = self._telling(found, last_run)
        commands = None if telling is None else self._commands(entries, found)
        if telling is not None and commands is not None:
            connects = self.redis.connects
            is_ours, *replies = self.redis.pipeline(
                [_WRITE.call((self.key,), (expected, str(telling))), *commands],
                [_WRITE, *self._invalidator.scripts],
                each=True,
            )
            if isinstance(is_ours, BackendError):
                raise is_ours
            if not is_ours:
                return None
            if not replies:
                return telling
            failed = [reply for reply in replies if isinstance(reply, BackendError)]
            for error in failed:
                if isinstance(error, NotServedHere):
                    raise error
            expected = str(telling)
            if not failed:
                told = telling._replace(run=_unique())
                # Over a new connection it may be another server, which has a part of what the first was told.
                return told if self._set(expected, told) and self.redis.connects == connects else None
            self._counters.add("guard.failed")
        begun = FreshnessRecord(_unique(), _unique(), 0, at=0)
        if found.server is not None:
            begun = begun._replace(shard=ShardRecord.begun(found.server, found.slots))
        if not self._set(expected, begun):
            return None
        self._counters.add("guard.epochs")
        return begun

    @staticmethod
    def _telling(found: Found, last_run: int | None) -> FreshnessRecord | None:
        """The lease while this run tells Redis; None where a new epoch must begin."""
        held = found.held
        if held is None or last_run not in (held.run, held.confirmed):
            return None
        telling = held._replace(run=_unique(), confirmed=last_run)
        if held.shard is None or found.server is None:
            return telling
        shard = held.shard.told(found.server, found.slots)
        return None if shard is None else telling._replace(shard=shard)

    def _valid(self, told: FreshnessRecord, now: int) -> FreshnessRecord:
        """The lease once it is valid."""
        if told.shard is None:
            return told._replace(at=now)
        server = Lineage.parse(self.redis.call(*LINEAGE))
        if server.replication != told.shard.replication:
            raise BackendUnavailable(f"{self.redis.name} has other data than when it was asked for its lease")
        return told._replace(at=now, shard=told.shard._replace(offset=server.offset))

    def _commands(self, entries: list[tuple[str, str | None, int]], found: Found) -> list[Command] | None:
        """The commands that invalidate these entries; None where only a new epoch does."""
        commands = None if len(entries) > _ONE_BY_ONE else self._invalidator.commands(entries)
        return commands if commands is None or found.server is None else of_slots(commands, found.slots)

    def _confirm(self, tx: Transaction, held: FreshnessRecord | None, told: FreshnessRecord, snapshot: str) -> None:
        # A Redis that has lost its lease does not know its last epoch; a process that has run the relay before does.
        ended = [epoch for epoch in (self._last, held and held.epoch) if epoch is not None]
        tx.fetch(_CONFIRM, (told.epoch, told.run, snapshot, ended, self._forgotten_after, _CLEANED_AT_ONCE))

    def _set(self, expected: Arg, new: FreshnessRecord) -> bool:
        return bool(self.redis.run(_WRITE, (self.key,), expected, str(new)))


def _unique() -> int:
    """A number never used before, of 53 bits: readers of the cached JSON may know no longer ones."""
    return secrets.randbits(53)
