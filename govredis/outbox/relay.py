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
and a new epoch begins, in which nothing is cached yet. If Redis does so in the middle of step 3, the first number is
gone and the second is not written: nothing is acknowledged. So step 3 needs no MULTI, which some proxies do not take.

After a relay that died before its commit, the lease's `confirmed` is the number that PostgreSQL still has: nothing was
acknowledged since, nor lost. A Redis without the lease begins a new epoch as well. Until the next run, a lease that
came back with old data is valid until its own `at` + X, and nothing cached beside it is older than `at`.

PostgreSQL knows an epoch (step 3's commit) before its lease is valid (step 4). So an entry that another relay or the
cleaning of the table deletes before that commit was committed before anything is cached in the epoch.

A new epoch stands for invalidations that cannot be made one by one: more than a thousand entries, all of a namespace
(TRUNCATE), or a key on which the invalidation fails.

A Redis whose clock is set back by d during a failure adds at most min(d, X), if the relay runs before the
clock is where it was.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .._context import Context
from .._migrations import PINNED
from ..breaker import ReadOnly
from ..client import Arg, Command, RedisClient, Script
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from ..keys import Key

if TYPE_CHECKING:
    from ..postgres import Postgres, Transaction

#: Makes the commands that invalidate a namespace's entries, pairs of (id, version).
Invalidations = Callable[[Sequence[tuple[str, int]]], Sequence[Command]]


class Values(Protocol):
    """How values of any namespace are invalidated, with or without a cache of it in this process."""

    #: Those among the commands.
    scripts: Sequence[Script]

    def invalidations(self, namespace: str, entries: Sequence[tuple[str, int]]) -> Sequence[Command]: ...


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


class FreshnessRecord(NamedTuple):
    """The freshness lease as its key holds it. `at` is in microseconds of Redis's clock."""

    epoch: int
    #: The number of the last run that told Redis.
    run: int
    #: The number that PostgreSQL had before that run.
    confirmed: int
    #: 0: not valid yet.
    at: int

    @classmethod
    def parse(cls, raw: bytes | None) -> FreshnessRecord | None:
        """None for anything that is no lease of ours."""
        try:
            held = cls(*map(int, (raw or b"").split()))
        except (TypeError, ValueError):
            return None
        return held if min(held) >= 0 and max(held) < 2**63 else None

    def __str__(self) -> str:
        return " ".join(map(str, self))


def microseconds(time: list[bytes]) -> int:
    """Redis's TIME."""
    return int(time[0]) * 1_000_000 + int(time[1])


class OutboxRelay:
    """The relay of one Redis and one key prefix.

    Args:
        values: invalidates entries of a namespace without a `register` of its own.
    """

    def __init__(self, context: Context, values: Values) -> None:
        if context.redis is None or context.postgres is None:
            raise ConfigurationError("the outbox needs Redis and PostgreSQL")
        self.key: Key = context.keys.guard()
        self.redis: RedisClient = context.redis
        self.postgres: Postgres = context.postgres
        self._keys = context.keys
        self._values = values
        #: After this time PostgreSQL ends the transaction of a relay that stopped within it.
        self._patience_ms = str(int(context.config.postgres_timeout * 1000) + 1)
        #: An epoch without a run for so long is forgotten, with its snapshot: if it returns, a new epoch begins.
        self._forgotten_after = max(600.0, 2 * context.config.metadata_staleness)
        self._counters = context.counters
        self._last: int | None = None
        self._scripts: list[Script] = [_WRITE, *values.scripts]
        self._invalidations: dict[str, Invalidations] = {}

    def register(self, namespace: str, invalidations: Invalidations, scripts: Sequence[Script]) -> None:
        self._invalidations[namespace] = invalidations
        self._scripts += scripts

    def read(self) -> tuple[int, bytes | None]:
        """Redis's clock in microseconds, and the lease; b"" for a key of another type than a string.

        Raises BackendUnavailable, BackendError.
        """
        *time, raw = self.redis.run(_LOOK, (self.key,))
        return microseconds(time), raw

    def run(self) -> int | None:
        """Tell Redis of new entries. Returns how many there were; None where another relay is running.

        Raises PostgresAway; ReadOnly where PostgreSQL can be read, and so loaded from, and not written;
        BackendUnavailable where Redis is away; BackendError; and ConfigurationError naming `govredis migrate`.
        """
        now, raw = self.read()
        text = raw or b""
        held = FreshnessRecord.parse(raw)
        if held is None and raw is not None:
            self._counters.add("guard.foreign")  # and it is written over
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
                    told = self._tell(text, held, last_run, entries)
                except BackendError as error:
                    failed = error
                    raise
                if told is None:
                    self._counters.add("guard.busy")
                    return None
                self._confirm(tx, held, told, snapshot)
        except BackendUnavailable as error:
            if failed is None and not isinstance(error, ReadOnly):
                raise PostgresAway(str(error)) from error
            raise
        self._set(str(told), told._replace(at=now))
        self._last = told.epoch
        self._counters.add("guard.ticks")
        self._counters.add("guard.told", len(entries))
        return len(entries)

    def _tell(
        self, text: Arg, held: FreshnessRecord | None, last_run: int | None, entries: list[tuple[str, str | None, int]]
    ) -> FreshnessRecord | None:
        """Step 3's half in Redis. Returns the lease as it is then; None where another relay has changed it."""
        if held is not None and last_run in (held.run, held.confirmed):
            one_by_one = self._commands(entries)
            if one_by_one is not None:
                telling = held._replace(run=_unique(), confirmed=last_run)
                is_ours, *replies = self.redis.pipeline(
                    [_WRITE.call((self.key,), (text, str(telling))), *one_by_one], self._scripts, each=True
                )
                if isinstance(is_ours, BackendError):
                    raise is_ours
                if not is_ours:
                    return None
                if not replies:
                    return telling
                if not any(isinstance(reply, BackendError) for reply in replies):
                    told = telling._replace(run=_unique())
                    return told if self._set(str(telling), told) else None
                self._counters.add("guard.failed")
                text = str(telling)
        begun = FreshnessRecord(_unique(), _unique(), 0, at=0)
        if not self._set(text, begun):
            return None
        self._counters.add("guard.epochs")
        return begun

    def _commands(self, entries: list[tuple[str, str | None, int]]) -> list[Command] | None:
        """The commands that invalidate these entries; None where only a new epoch does."""
        if len(entries) > _ONE_BY_ONE:
            return None
        by_namespace: dict[str, list[tuple[str, int]]] = {}
        for namespace, row, version in entries:
            if row is None:
                return None
            identity = self._keys.id_if_ours(row)
            if identity is not None:
                by_namespace.setdefault(namespace, []).append((identity, version))
        return [
            command for namespace, some in by_namespace.items() for command in self._invalidations_of(namespace, some)
        ]

    def _invalidations_of(self, namespace: str, entries: Sequence[tuple[str, int]]) -> Sequence[Command]:
        registered = self._invalidations.get(namespace)
        return self._values.invalidations(namespace, entries) if registered is None else registered(entries)

    def _confirm(self, tx: Transaction, held: FreshnessRecord | None, told: FreshnessRecord, snapshot: str) -> None:
        # A Redis that has lost its lease does not know its last epoch; a process that has run the relay before does.
        ended = [epoch for epoch in (self._last, held and held.epoch) if epoch is not None]
        tx.fetch(_CONFIRM, (told.epoch, told.run, snapshot, ended, self._forgotten_after, _CLEANED_AT_ONCE))

    def _set(self, expected: Arg, new: FreshnessRecord) -> bool:
        return bool(self.redis.run(_WRITE, (self.key,), expected, str(new)))


def _unique() -> int:
    """A number never used before, of 53 bits: readers of the cached JSON may know no longer ones."""
    return secrets.randbits(53)
