"""PostgreSQL: whether it answers and takes transactions, and its connections and oldest transaction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..._context import Context
from ..._pool import PoolExhausted
from ...errors import BackendError, BackendUnavailable, ConfigurationError
from .. import deadlines, verdict
from ..report import Check

#: Other roles' transactions are hidden from ours, unless it is a member of pg_read_all_stats.
_ACTIVITY = """
SELECT count(*), current_setting('max_connections')::integer,
    coalesce(extract(epoch FROM max(clock_timestamp() - xact_start) FILTER (WHERE pid <> pg_backend_pid())), 0)::float8
FROM pg_stat_activity WHERE backend_type = 'client backend'
"""


class PostgresProbe:
    """Its checks: "postgres", always; "transactions" and "connections", if there is something to warn of."""

    def __init__(self, context: Context) -> None:
        self._postgres = context.postgres
        self._prefix = context.keys.prefix
        #: Asked once: each time would cost two round trips.
        self._has_transactions = False

    def look(self) -> Iterator[Check]:
        if self._postgres is None:
            yield Check("postgres", "pass", "not configured", {"configured": False})
            return
        breaker = self._postgres.breaker
        data = self._data()
        try:
            began = time.perf_counter()
            missing = self._postgres.missing_migrations(timeout=deadlines.POSTGRES)
            data["seconds"] = round(time.perf_counter() - began, 6)
            if not self._has_transactions:
                with self._postgres.transaction(timeout=deadlines.POSTGRES):
                    pass  # a pooler in statement mode refuses it
                self._has_transactions = True
            activity = self._activity()
        except (BackendError, ConfigurationError) as error:
            if isinstance(error, BackendUnavailable) and not isinstance(error, PoolExhausted):
                data["away_for"] = round(breaker.away_for(), 3)
            yield Check("postgres", verdict.of_error(error), str(error), data)
            return
        data.update(activity)
        if missing:
            data["missing_migrations"] = missing
            under = f" with GOVREDIS_KEY_PREFIX={self._prefix}" if self._prefix else ""
            output = f"our tables are not up to date: run `govredis migrate`{under}"
            yield Check("postgres", verdict.OLD_TABLES, output, data)
        elif self._postgres.is_owed:
            yield Check("postgres", "warn", "it is read-only: changes of this process wait, and reads go on", data)
        else:
            yield Check("postgres", "pass", "", data)
        yield from verdict.of_activity(activity)

    def hung(self, seconds: float) -> list[Check]:
        data = {**self._data(), "away_for": round(seconds, 3)}
        return [Check("postgres", "warn", f"it has not answered for {seconds:.1f} s", data)]

    def _data(self) -> dict[str, Any]:
        if self._postgres is None:
            return {"configured": False}
        return {
            "configured": True,
            "times_away": self._postgres.breaker.times_opened,
            "statements": self._postgres.statements,
        }

    def _activity(self) -> dict[str, Any]:
        """The numbers that our role may see; none where it may not look."""
        assert self._postgres is not None
        try:
            ((connections, most, oldest),) = self._postgres.fetch(_ACTIVITY, timeout=deadlines.POSTGRES)
        except BackendUnavailable:
            raise
        except (BackendError, ConfigurationError):
            return {}
        return {"connections": connections, "max_connections": most, "oldest_transaction": round(max(0.0, oldest), 3)}
