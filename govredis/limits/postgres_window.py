"""The window in PostgreSQL: one function call; see schema/0001_limits.sql."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .rates import Limit
from .windows import Mode, Outcome

if TYPE_CHECKING:
    from ..postgres import Postgres

_PURGED_AT_ONCE = 1000


class PostgresWindow:
    """See windows.Window. Exact among all processes that use this database."""

    backend = "postgres"

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        ((admitted, deciding, remaining, retry_after, reset_after, entry),) = self._postgres.fetch(
            "SELECT * FROM govredis_limit_admit(%s, %s, %s, %s::bigint[], %s::bigint[])",
            (key, cost, mode, [limit.count for limit in limits], [limit.window_us for limit in limits]),
        )
        return Outcome(admitted, deciding - 1, remaining, retry_after, reset_after, entry)

    def refund(self, key: str, entries: int, cost: int) -> bool:
        # They follow those that are older: as many as width_bucket finds up to the microsecond before.
        rows = self._postgres.fetch(
            "UPDATE govredis_limit_windows SET entries = entries[: width_bucket(%s::bigint, entries)]"
            " || entries[least(width_bucket(%s::bigint, entries) + %s, width_bucket(%s::bigint, entries)) + 1 :]"
            " WHERE key = %s AND %s = ANY (entries) RETURNING 1",
            (entries - 1, entries - 1, cost, entries, key, entries),
        )
        return bool(rows)

    def count(self, key: str, window_us: int) -> int:
        rows = self._postgres.fetch(
            "SELECT cardinality(entries)"
            " - width_bucket((extract(epoch FROM clock_timestamp()) * 1000000)::bigint - %s, entries)"
            " FROM govredis_limit_windows WHERE key = %s AND entries <> '{}'",
            (window_us, key),
        )
        return int(rows[0][0]) if rows else 0

    def reset(self, key: str) -> None:
        self._postgres.fetch("DELETE FROM govredis_limit_windows WHERE key = %s", (key,))

    def purge(self) -> int:
        """Delete every window that has ended, a few at a time: none is held up. Returns how many."""
        deleted = 0
        while True:
            rows = self._postgres.fetch(
                "WITH ended AS (DELETE FROM govredis_limit_windows WHERE key IN ("
                " SELECT key FROM govredis_limit_windows"
                " WHERE expires < (extract(epoch FROM clock_timestamp()) / 600)::bigint"
                " LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING 1) SELECT count(*) FROM ended",
                (_PURGED_AT_ONCE,),
            )
            deleted += int(rows[0][0])
            if rows[0][0] < _PURGED_AT_ONCE:
                return deleted
