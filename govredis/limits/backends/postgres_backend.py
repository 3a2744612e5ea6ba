"""PostgresLimitBackend: each decision is one function call; see schema/0001_limits.sql and 0007_limit_counters.sql."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..rates import Limit
from .backend import Admission, CounterEntries, Mode, Outcome, ServerLimitBackend, WindowStats

if TYPE_CHECKING:
    from ...keys import Keys
    from ...postgres import Postgres

_PURGED_AT_ONCE = 1000

_ASKED = "%s::text, %s::bigint, %s::text, %s::bigint[], %s::bigint[]"
_ADMIT = f"SELECT * FROM @schema@.govredis_limit_admit({_ASKED})"
_ADMIT_BY_COUNTERS = f"SELECT * FROM @schema@.govredis_counter_admit({_ASKED})"

_CLOCK = "clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now_us)"
# In the order of the keys, as every statement must that locks several of these rows. Merged, not appended: other
# processes may have replicated younger entries, and a clock that was set back must not unsort the log.
_REPLICATE = """
INSERT INTO @schema@.govredis_limit_windows AS held (key, entries, longest, expires)
SELECT key, array_agg(now_us - age ORDER BY now_us - age), max(longest), (now_us + max(longest)) / 600000000 + 1
    FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now_us) AS clock,
        unnest(%s::text[], %s::bigint[], %s::integer[], %s::bigint[]) AS told (key, age, cost, longest),
        generate_series(1, cost)
    GROUP BY key, now_us ORDER BY key
ON CONFLICT (key) DO UPDATE SET
    entries = ARRAY(
        SELECT entry FROM unnest(held.entries || excluded.entries) AS entry
            WHERE entry > (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
                - greatest(held.longest, excluded.longest)
            ORDER BY entry),
    longest = greatest(held.longest, excluded.longest),
    expires = greatest(held.expires, excluded.expires)
"""


class PostgresLimitBackend(ServerLimitBackend):
    """Exact among all processes that use this database. Its keys are those of Redis."""

    name = "postgres"

    def __init__(self, postgres: Postgres, keys: Keys) -> None:
        self._postgres = postgres
        self._keys = keys

    def _row(self, key: str) -> str:
        return self._keys.row_of_key(key)

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        ((admitted, deciding, remaining, retry_after, reset_after, at),) = self._postgres.fetch(
            _ADMIT_BY_COUNTERS if limits[0].counted else _ADMIT,
            (self._row(key), cost, mode, [limit.count for limit in limits], [limit.window_us for limit in limits]),
        )
        entries = CounterEntries.of(limits, at) if limits[0].counted else at
        return Outcome(admitted, deciding - 1, remaining, retry_after, reset_after, entries)

    def refund(self, key: str, entries: int | CounterEntries, cost: int) -> bool:
        if isinstance(entries, CounterEntries):
            ((given,),) = self._postgres.fetch(
                "SELECT @schema@.govredis_counter_refund(%s::text, %s::bigint, %s::bigint[], %s::bigint)",
                (self._row(key), cost, list(entries.windows_us), entries.at),
            )
            return bool(given)
        # They follow those that are older: as many as width_bucket finds up to the microsecond before.
        rows = self._postgres.fetch(
            "UPDATE @schema@.govredis_limit_windows SET entries = entries[: width_bucket(%s::bigint, entries)]"
            " || entries[least(width_bucket(%s::bigint, entries) + %s, width_bucket(%s::bigint, entries)) + 1 :]"
            " WHERE key = %s AND %s = ANY (entries) RETURNING 1",
            (entries - 1, entries - 1, cost, entries, self._row(key), entries),
        )
        return bool(rows)

    def count(self, key: str, window_us: int) -> int:
        row = self._row(key)
        ((count,),) = self._postgres.fetch(
            f"WITH {_CLOCK}"
            " SELECT greatest("
            "(SELECT cardinality(entries) - width_bucket(now_us - %s, entries)"
            " FROM @schema@.govredis_limit_windows WHERE key = %s AND entries <> '{}'),"
            " (SELECT sum(used) FROM @schema@.govredis_limit_counters WHERE key = %s AND window_us = %s"
            " AND bucket >= @schema@.govredis_counter_first(window_us, now_us)), 0) FROM clock",
            (window_us, row, row, window_us),
        )
        return int(count)

    def stats(self, key: str) -> WindowStats:
        row = self._row(key)
        ((now, longest, entries, oldest, newest),) = self._postgres.fetch(
            f"WITH {_CLOCK}, held AS ("
            "SELECT longest, entries[width_bucket(now_us - longest, entries) + 1 :] AS entries"
            " FROM @schema@.govredis_limit_windows, clock WHERE key = %s AND entries <> '{}')"
            " SELECT now_us, longest, cardinality(entries), entries[1], entries[cardinality(entries)]"
            " FROM clock LEFT JOIN held ON true",
            (row,),
        )
        counters = self._postgres.fetch(
            f"WITH {_CLOCK} SELECT window_us, sum(used)::bigint FROM @schema@.govredis_limit_counters, clock"
            " WHERE key = %s AND bucket >= @schema@.govredis_counter_first(window_us, now_us) AND used > 0"
            " GROUP BY window_us",
            (row,),
        )
        return WindowStats(
            self.name,
            entries or 0,
            longest / 1_000_000 if longest else None,
            (now - oldest) / 1_000_000 if entries else None,
            (now - newest) / 1_000_000 if entries else None,
            {window_us / 1_000_000: used for window_us, used in counters},
        )

    def reset(self, key: str) -> None:
        self._postgres.fetch(
            "WITH counters AS (DELETE FROM @schema@.govredis_limit_counters WHERE key = %s)"
            " DELETE FROM @schema@.govredis_limit_windows WHERE key = %s",
            (self._row(key), self._row(key)),
        )

    def replicate(self, admissions: Sequence[Admission], now: float, node: object = None) -> tuple[int, None]:
        """As `ServerLimitBackend.replicate`, in one statement. An admission that arrives twice is recorded twice."""
        self._postgres.fetch(
            _REPLICATE,
            (
                [self._row(admission.key) for admission in admissions],
                [admission.age_us(now) for admission in admissions],
                [admission.cost for admission in admissions],
                [admission.longest_us for admission in admissions],
            ),
        )
        return 0, None

    def purge(self) -> int:
        """As `LimitBackend.purge`: every ended window of our prefix, a few at a time, so that no call is held up."""
        return sum(
            self._purge(table) for table in ("@schema@.govredis_limit_windows", "@schema@.govredis_limit_counters")
        )

    def _purge(self, table: str) -> int:
        deleted = 0
        while True:
            rows = self._postgres.fetch(
                f"WITH ended AS (DELETE FROM {table} WHERE ctid = ANY(ARRAY("
                f" SELECT ctid FROM {table}"
                " WHERE expires < (extract(epoch FROM clock_timestamp()) / 600)::bigint"
                " AND @schema@.govredis_is_of(key, %s::text) LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING 1)"
                " SELECT count(*) FROM ended",
                (self._keys.prefix, _PURGED_AT_ONCE),
            )
            deleted += int(rows[0][0])
            if rows[0][0] < _PURGED_AT_ONCE:
                return deleted
