"""The window in PostgreSQL: one function call; see schema/0001_limits.sql and 0007_limit_counters.sql."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .mirror import Admission
from .rates import Limit
from .windows import CounterEntries, Mode, Outcome, Standing

if TYPE_CHECKING:
    from ..postgres import Postgres

_PURGED_AT_ONCE = 1000

_ADMIT = "SELECT * FROM govredis_limit_admit(%s, %s, %s, %s::bigint[], %s::bigint[])"
_ADMIT_BY_COUNTERS = "SELECT * FROM govredis_counter_admit(%s, %s, %s, %s::bigint[], %s::bigint[])"

_CLOCK = "clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now_us)"
# In the order of the keys, as everybody must who locks several of these rows. Merged, not appended: other processes'
# copies may be younger, and a clock that was set back must not unsort the log.
_COPY = """
INSERT INTO govredis_limit_windows AS held (key, entries, longest, expires)
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


class PostgresWindow:
    """See windows.Window. Exact among all processes that use this database."""

    backend = "postgres"

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        ((admitted, deciding, remaining, retry_after, reset_after, at),) = self._postgres.fetch(
            _ADMIT_BY_COUNTERS if limits[0].counted else _ADMIT,
            (key, cost, mode, [limit.count for limit in limits], [limit.window_us for limit in limits]),
        )
        entries = CounterEntries.of(limits, at) if limits[0].counted else at
        return Outcome(admitted, deciding - 1, remaining, retry_after, reset_after, entries)

    def refund(self, key: str, entries: int | CounterEntries, cost: int) -> bool:
        if isinstance(entries, CounterEntries):
            ((given,),) = self._postgres.fetch(
                "SELECT govredis_counter_refund(%s, %s, %s::bigint[], %s)",
                (key, cost, list(entries.windows_us), entries.at),
            )
            return bool(given)
        # They follow those that are older: as many as width_bucket finds up to the microsecond before.
        rows = self._postgres.fetch(
            "UPDATE govredis_limit_windows SET entries = entries[: width_bucket(%s::bigint, entries)]"
            " || entries[least(width_bucket(%s::bigint, entries) + %s, width_bucket(%s::bigint, entries)) + 1 :]"
            " WHERE key = %s AND %s = ANY (entries) RETURNING 1",
            (entries - 1, entries - 1, cost, entries, key, entries),
        )
        return bool(rows)

    def count(self, key: str, window_us: int) -> int:
        ((count,),) = self._postgres.fetch(
            f"WITH {_CLOCK}"
            " SELECT greatest("
            "(SELECT cardinality(entries) - width_bucket(now_us - %s, entries)"
            " FROM govredis_limit_windows WHERE key = %s AND entries <> '{}'),"
            " (SELECT sum(used) FROM govredis_limit_counters WHERE key = %s AND window_us = %s"
            " AND bucket >= govredis_counter_first(window_us, now_us)), 0) FROM clock",
            (window_us, key, key, window_us),
        )
        return int(count)

    def standing(self, key: str) -> Standing:
        ((now, longest, entries, oldest, newest),) = self._postgres.fetch(
            f"WITH {_CLOCK}, held AS ("
            "SELECT longest, entries[width_bucket(now_us - longest, entries) + 1 :] AS entries"
            " FROM govredis_limit_windows, clock WHERE key = %s AND entries <> '{}')"
            " SELECT now_us, longest, cardinality(entries), entries[1], entries[cardinality(entries)]"
            " FROM clock LEFT JOIN held ON true",
            (key,),
        )
        counters = self._postgres.fetch(
            f"WITH {_CLOCK} SELECT window_us, sum(used)::bigint FROM govredis_limit_counters, clock"
            " WHERE key = %s AND bucket >= govredis_counter_first(window_us, now_us) AND used > 0 GROUP BY window_us",
            (key,),
        )
        return Standing(
            self.backend,
            entries or 0,
            longest / 1_000_000 if longest else None,
            (now - oldest) / 1_000_000 if entries else None,
            (now - newest) / 1_000_000 if entries else None,
            {window_us / 1_000_000: used for window_us, used in counters},
        )

    def reset(self, key: str) -> None:
        self._postgres.fetch(
            "WITH counters AS (DELETE FROM govredis_limit_counters WHERE key = %s)"
            " DELETE FROM govredis_limit_windows WHERE key = %s",
            (key, key),
        )

    def copy(self, admissions: Sequence[Admission], now: float) -> None:
        """See mirror.CopiedWindow. One statement; one that is told twice is written twice."""
        self._postgres.fetch(
            _COPY,
            (
                [one.key for one in admissions],
                [one.age_us(now) for one in admissions],
                [one.cost for one in admissions],
                [one.longest_us for one in admissions],
            ),
        )

    def purge(self) -> int:
        """Delete every window that has ended, a few at a time: none is held up. Returns how many."""
        return sum(self._purge(table) for table in ("govredis_limit_windows", "govredis_limit_counters"))

    def _purge(self, table: str) -> int:
        deleted = 0
        while True:
            rows = self._postgres.fetch(
                f"WITH ended AS (DELETE FROM {table} WHERE ctid = ANY(ARRAY("
                f" SELECT ctid FROM {table}"
                " WHERE expires < (extract(epoch FROM clock_timestamp()) / 600)::bigint"
                " LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING 1) SELECT count(*) FROM ended",
                (_PURGED_AT_ONCE,),
            )
            deleted += int(rows[0][0])
            if rows[0][0] < _PURGED_AT_ONCE:
                return deleted
