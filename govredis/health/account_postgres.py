"""The account in PostgreSQL, while Redis is away: rows that are merged into Redis on its return, and outages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..keys import Keys
from .account_redis import KEPT, OUTAGE_DAYS, Counted, OutageRecord

if TYPE_CHECKING:
    from ..postgres import Postgres

#: Rows in one transaction: Redis is told of them meanwhile.
_AT_ONCE = 200

_WRITE = """
INSERT INTO @schema@.govredis_account (key, process, minute, counts)
SELECT %s, %s, new.minute, new.counts FROM unnest(%s::bigint[], %s::jsonb[]) new (minute, counts)
ON CONFLICT (key, process, minute) DO UPDATE SET counts = excluded.counts, changed_at = clock_timestamp()
"""
_KEEP = """
INSERT INTO @schema@.govredis_account AS held (key, process, minute, counts) VALUES (%s, '', 0, %s::jsonb)
ON CONFLICT (key, process, minute) DO UPDATE SET changed_at = clock_timestamp(), counts =
    CASE WHEN held.counts -> 'since' IS DISTINCT FROM excluded.counts -> 'since' THEN excluded.counts ELSE (
        SELECT jsonb_object_agg(each.name, greatest(
            (held.counts ->> each.name)::bigint, (excluded.counts ->> each.name)::bigint))
        FROM jsonb_object_keys(held.counts || excluded.counts) each (name)
    ) END
"""
_READ = "SELECT process, minute, counts FROM @schema@.govredis_account WHERE key = %s ORDER BY process, minute"
_TAKE = """
SELECT process, minute, counts FROM @schema@.govredis_account WHERE key = %s AND process <> '' AND minute >= 0
ORDER BY process, minute LIMIT %s FOR UPDATE SKIP LOCKED
"""
# The row of minute -1 has the counts of a process that others have told Redis. It may not know, and write them again.
_MARK = """
INSERT INTO @schema@.govredis_account AS held (key, process, minute, counts)
SELECT %s, new.process, -1, new.counts FROM unnest(%s::text[], %s::jsonb[]) new (process, counts) ORDER BY new.process
ON CONFLICT (key, process, minute) DO UPDATE SET changed_at = clock_timestamp(), counts = (
    SELECT jsonb_object_agg(each.name, greatest(held.counts -> each.name, excluded.counts -> each.name))
    FROM jsonb_object_keys(held.counts || excluded.counts) each (name))
"""
_UNMARK = """
DELETE FROM @schema@.govredis_account WHERE key = %s AND minute < 0
AND changed_at < clock_timestamp() - %s * interval '1 second'
"""
_REMOVE = """
DELETE FROM @schema@.govredis_account a USING unnest(%s::text[], %s::bigint[]) old (process, minute)
WHERE a.key = %s AND a.process = old.process AND a.minute = old.minute
"""
_OUTAGE = """
WITH old AS (DELETE FROM @schema@.govredis_outages WHERE key = %s AND began < now() - %s * interval '1 day')
INSERT INTO @schema@.govredis_outages
    (key, process, server, began, ended, kind, noticed_by, served, slowest, changed_at)
VALUES (%s, %s, %s, to_timestamp(%s / 1000000.0), to_timestamp(%s / 1000000.0), %s, %s, %s, %s,
    to_timestamp(%s / 1000000.0))
ON CONFLICT (key, process, server, began) DO UPDATE SET ended = excluded.ended, served = excluded.served,
    slowest = excluded.slowest, changed_at = excluded.changed_at
"""
_FIELDS = """process, server, round(extract(epoch FROM began) * 1000000)::bigint,
    round(extract(epoch FROM ended) * 1000000)::bigint, kind, noticed_by, served, slowest,
    round(extract(epoch FROM changed_at) * 1000000)::bigint"""
_OUTAGES = f"""
SELECT {_FIELDS} FROM @schema@.govredis_outages WHERE key = %s AND began >= to_timestamp(%s / 1000000.0)
ORDER BY began DESC LIMIT %s
"""
_END = f"""
UPDATE @schema@.govredis_outages SET ended = changed_at
WHERE key = %s AND ended IS NULL AND changed_at < clock_timestamp() - %s * interval '1 second' RETURNING {_FIELDS}
"""


class AccountRow(NamedTuple):
    """The counts of a process by the end of a minute."""

    process: str
    minute: int
    counted: dict[str, tuple[int, int]]


class PostgresAccountBackend:
    """Every method raises BackendError, and ConfigurationError where `govredis migrate` has not been run."""

    def __init__(self, keys: Keys, postgres: Postgres) -> None:
        self._key = keys.account()
        self._postgres = postgres

    def write(self, process: str, minutes: Mapping[int, Counted]) -> None:
        texts = [json.dumps(dict(counted)) for counted in minutes.values()]
        self._postgres.fetch(_WRITE, (self._key, process, list(minutes), texts))

    def read(self) -> tuple[dict[str, int] | None, list[AccountRow]]:
        """The totals that any process has read in Redis last, None: nobody has; and the rows, all of one moment."""
        found = self._postgres.fetch(_READ, (self._key,))
        kept = next((dict(counts) for process, _, counts in found if not process), None)
        return kept, [_row(*each) for each in found if each[0]]

    def merge(self, tell: Callable[[list[AccountRow]], Mapping[str, int]]) -> None:
        """Have `tell` tell Redis of all rows, and remove them. Its exception leaves the rest where they are.

        The totals that `tell` returns are kept in the same transaction: a reader finds the rows, or totals with them.
        """
        while True:
            with self._postgres.transaction() as tx:
                rows = [_row(*found) for found in tx.fetch(_TAKE, (self._key, _AT_ONCE))]
                if rows:
                    totals = tell(rows)
                    marks: dict[str, dict[str, tuple[int, int]]] = {}
                    for row in rows:
                        marks.setdefault(row.process, {}).update({n: (now, now) for n, (_, now) in row.counted.items()})
                    tx.fetch(_MARK, (self._key, list(marks), [json.dumps(mark) for mark in marks.values()]))
                    if totals:
                        tx.fetch(_KEEP, (self._key, json.dumps(totals)))
                    tx.fetch(_REMOVE, ([row.process for row in rows], [row.minute for row in rows], self._key))
            if len(rows) < _AT_ONCE:
                break
        self._postgres.fetch(_UNMARK, (self._key, KEPT))

    def keep_totals(self, totals: Mapping[str, int]) -> None:
        """Keep the totals that this process has read in Redis, for the time when it is away."""
        self._postgres.fetch(_KEEP, (self._key, json.dumps(totals)))

    def note_outages(self, records: Iterable[OutageRecord]) -> None:
        for record in records:
            fields = (record.process, record.server, record.began, record.ended, record.kind, record.noticed_by)
            values = (*fields, record.served, record.slowest, record.changed)
            self._postgres.fetch(_OUTAGE, (self._key, OUTAGE_DAYS, self._key, *values))

    def outages(self, since: int, at_most: int) -> list[OutageRecord]:
        return [OutageRecord(*row) for row in self._postgres.fetch(_OUTAGES, (self._key, since, at_most))]

    def end_outages(self, silent: float) -> list[OutageRecord]:
        """End the open ones whose process has said nothing for so many seconds, as it was killed. Returns them."""
        return [OutageRecord(*row) for row in self._postgres.fetch(_END, (self._key, silent))]


def _row(process: str, minute: int, counts: dict[str, list[int]]) -> AccountRow:
    return AccountRow(process, minute, {name: (told, now) for name, (told, now) in counts.items()})
