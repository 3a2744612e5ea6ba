"""The tick: Redis is told of everything that was committed before it, or is found to have lost data.

A tick is four steps. Any process may die, stop or be cut off between and within them.

1. Redis's TIME t, and the guard as it stands: (epoch, tick, confirmed, at).
2. In a PostgreSQL transaction, one ticker at a time: how far this epoch was told (`seen`, a snapshot) by which tick,
   and every entry of the outbox that this statement's own snapshot sees and `seen` does not. The statement comes after
   t, so an entry that it does not see was committed after t. Long transactions that commit late are no special case.
3. In one Redis transaction, if the guard is still as it was: it gets a tick of its own, and all of these entries are
   invalidated. Then PostgreSQL is told the tick and its snapshot, and commits.
4. If the guard is still as left in step 3: it gets `at` = t.

A guard is valid until `at` + X, by Redis's clock. So whatever is cached then, under its epoch, knows of every write
that was committed before `at`, and is at most X behind.

Data loss. The tick in Redis is written in one step with its invalidations, and confirmed by PostgreSQL's commit. If
Redis then restarts with older data, or a lagging replica takes its place, the tick that it has is not the one that
PostgreSQL has: a new epoch begins, under which nothing is cached yet. (Of a ticker that died before its commit, the
guard's `confirmed` is what PostgreSQL had then: where it still has that, nothing was acknowledged since, nor lost.) A
Redis without the guard begins a new epoch as well. Until somebody ticks, the guard that came with the old data is valid
until its own `at` + X, and nothing cached beside it is older than `at`.

An epoch is known to PostgreSQL (step 3's commit) before its guard is valid (step 4): what another ticker or the
cleaning of the table deletes before that commit was committed before anything is cached under the epoch.

What cannot be invalidated one by one is by a new epoch: more than a thousand entries, all of a namespace (TRUNCATE), or
a key on which the invalidation fails.

A Redis whose clock is set back by d in the middle of a failure adds at most min(d, X), unless nobody ticks until the
clock is where it was.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .._counters import Counters
from ..client import Command, RedisClient, Script
from ..errors import BackendError, BackendUnavailable
from ..keys import Keys, check_namespace
from .cells import INVALIDATE, invalidation

if TYPE_CHECKING:
    from ..postgres import Postgres, Transaction

#: Of a namespace's entries, (id, version) each, the commands that invalidate them.
Invalidations = Callable[[Sequence[tuple[str, int]]], Sequence[Command]]

_GUARD = Script(__package__, "guard.lua")
#: More ids than these are invalidated by a new epoch; likewise if there are more entries than so many.
_ONE_BY_ONE = 1000
_ENTRIES = 20_000
#: Entries deleted by one tick, at most: what a large transaction has left goes over several.
_CLEANED_AT_ONCE = 20_000

_LOCK = """
SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0)),
       set_config('idle_in_transaction_session_timeout', %s, true)
"""
# Snapshots of another database (a restored dump) count other transactions: they are not compared.
_READ = f"""
SELECT pg_current_snapshot()::text, e.tick, few.entries, few.ids
FROM (VALUES (1)) one
LEFT JOIN govredis_epochs e ON e.epoch = %s AND pg_snapshot_xmax(e.seen) <= pg_snapshot_xmax(pg_current_snapshot())
LEFT JOIN LATERAL (
    SELECT sum(n) AS entries, json_agg(json_build_array(namespace, id, version)) AS ids FROM (
        SELECT namespace, id, max(version) AS version, count(*) AS n FROM (
            SELECT namespace, id, version FROM govredis_outbox
            WHERE xid >= pg_snapshot_xmin(e.seen) AND NOT pg_visible_in_snapshot(xid, e.seen)
            LIMIT {_ENTRIES + 1}) entry
        GROUP BY namespace, id LIMIT {_ONE_BY_ONE + 1}) id) few ON true
"""
_CONFIRM = "SELECT govredis_outbox_told(%s, %s, %s, %s::bigint[], %s, %s)"


class PostgresAway(BackendUnavailable):
    """It is PostgreSQL that cannot be asked: a tick is not possible from here."""


class GuardRecord(NamedTuple):
    """What the guard's key holds. Numbers of microseconds are of Redis's clock."""

    epoch: int
    tick: int
    confirmed: int
    #: 0: not valid yet.
    at: int

    @classmethod
    def parse(cls, raw: bytes | None) -> GuardRecord | None:
        """None for what is none."""
        try:
            return cls(*map(int, (raw or b"").split()))
        except (TypeError, ValueError):
            return None

    def __str__(self) -> str:
        return " ".join(map(str, self))


def microseconds(time: list[bytes]) -> int:
    """Redis's TIME."""
    return int(time[0]) * 1_000_000 + int(time[1])


class Ticker:
    """Ticks for one Redis and one key prefix.

    Args:
        staleness: X, in seconds.
        patience: seconds after which PostgreSQL ends the transaction of a ticker that stopped within it.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient,
        postgres: Postgres,
        *,
        staleness: float,
        patience: float,
        counters: Counters,
    ) -> None:
        self.key = keys.guard()
        self._keys = keys
        self._redis = redis
        self._postgres = postgres
        self._patience_ms = str(int(patience * 1000) + 1)
        #: An epoch without a tick for so long is forgotten, and what was kept for it: if it returns, a new one begins.
        self._forgotten_after = max(600.0, 2 * staleness)
        self._counters = counters
        self._last: int | None = None
        self._scripts: list[Script] = [_GUARD, INVALIDATE]
        self._invalidations: dict[str, Invalidations] = {}

    def register(self, namespace: str, invalidations: Invalidations, scripts: Sequence[Script]) -> None:
        self._invalidations[namespace] = invalidations
        self._scripts += scripts

    def read(self) -> tuple[int, bytes | None]:
        """Redis's clock in microseconds, and the guard. Raises BackendUnavailable, BackendError."""
        time, raw = self._redis.pipeline((("TIME",), ("GET", self.key)))
        return microseconds(time), raw

    def tick(self) -> int | None:
        """Tell Redis. Returns of how many entries; None where somebody else is at it.

        Raises PostgresAway, BackendUnavailable where Redis is, BackendError, and ConfigurationError naming `govredis
        migrate`.
        """
        now, raw = self.read()
        text = (raw or b"").decode()
        held = GuardRecord.parse(raw)
        failed: BackendError | None = None
        try:
            with self._postgres.transaction() as tx:
                if not tx.fetch(_LOCK, (f"govredis {self.key}", self._patience_ms))[0][0]:
                    self._counters.add("guard.busy")
                    return None
                ((snapshot, tick, count, ids),) = tx.fetch(_READ, (None if held is None else held.epoch,))
                entries = (ids or []) if (count or 0) <= _ENTRIES else [("", None, 0)]
                try:
                    told = self._tell(text, held, tick, entries)
                except BackendError as error:
                    failed = error
                    raise
                if told is None:
                    self._counters.add("guard.busy")
                    return None
                self._confirm(tx, held, told, snapshot)
        except BackendUnavailable as error:
            if failed is None:
                raise PostgresAway(str(error)) from error
            raise
        self._set(str(told), told._replace(at=now))
        self._last = told.epoch
        self._counters.add("guard.ticks")
        self._counters.add("guard.told", len(entries))
        return len(entries)

    def _tell(
        self, text: str, held: GuardRecord | None, tick: int | None, entries: list[tuple[str, str | None, int]]
    ) -> GuardRecord | None:
        """Step 3's half of Redis. Returns the guard as it is then; None where somebody else has changed it."""
        if held is not None and tick in (held.tick, held.confirmed):
            one_by_one = self._commands(entries)
            if one_by_one is not None:
                told = held._replace(tick=_unique(), confirmed=tick)
                try:
                    is_ours, *_ = self._redis.transaction(
                        [_GUARD.call((self.key,), (text, str(told))), *one_by_one], self._scripts
                    )
                    return told if is_ours else None
                except BackendUnavailable:
                    raise
                except BackendError:
                    self._counters.add("guard.failed")
                    text = str(told)  # all but what failed has been carried out
        begun = GuardRecord(_unique(), _unique(), 0, at=0)
        if not self._set(text, begun):
            return None
        self._counters.add("guard.epochs")
        return begun

    def _commands(self, entries: list[tuple[str, str | None, int]]) -> list[Command] | None:
        """What invalidates these; None where only a new epoch does."""
        if len(entries) > _ONE_BY_ONE:
            return None
        by_namespace: dict[str, list[tuple[str, int]]] = {}
        for namespace, identity, version in entries:
            if identity is None:
                return None
            # The rows of our own tables have the prefix before their id, those of others have not. Of both readings,
            # one is an invalidation too many at most.
            ids = {identity, identity.removeprefix(self._keys.prefix)}
            by_namespace.setdefault(namespace, []).extend((i, version) for i in ids)
        return [
            command
            for namespace, some in by_namespace.items()
            for command in self._invalidations.get(namespace, _Cached(self._keys, namespace))(some)
        ]

    def _confirm(self, tx: Transaction, held: GuardRecord | None, told: GuardRecord, snapshot: str) -> None:
        # A Redis that has lost its guard does not know its last epoch; who has ticked before does.
        ended = [epoch for epoch in (self._last, held and held.epoch) if epoch is not None]
        tx.fetch(_CONFIRM, (told.epoch, told.tick, snapshot, ended, self._forgotten_after, _CLEANED_AT_ONCE))

    def _set(self, expected: str, new: GuardRecord) -> bool:
        return bool(self._redis.run(_GUARD, (self.key,), expected, str(new)))


class _Cached:
    """The invalidations of a namespace of cached values, also of one that this process has no cache of."""

    def __init__(self, keys: Keys, namespace: str) -> None:
        self._keys = keys
        self._namespace = namespace

    def __call__(self, entries: Sequence[tuple[str, int]]) -> list[Command]:
        commands = []
        for identity, version in entries:
            try:
                key = self._keys.cached(check_namespace(self._namespace), identity)
            except ValueError:  # under such an id, or namespace, nothing can be cached
                continue
            commands.append(invalidation(key, version))
        return commands


def _unique() -> int:
    """A number never used before, of 53 bits: what reads the cached JSON may know no longer ones."""
    return secrets.randbits(53)
