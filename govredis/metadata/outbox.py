"""Outbox: which tables it watches, and how much of it Redis has not been told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import refuse
from ..keys import check_namespace

if TYPE_CHECKING:
    from ..postgres import Postgres

__all__ = ["Outbox", "OutboxLag", "Watched"]

#: Triggers wait for whoever is writing to the table.
_DDL_TIMEOUT = 60.0

_LAG = """
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(o.at)), 0)
FROM govredis_outbox o WHERE EXISTS (SELECT FROM govredis_epochs e WHERE NOT pg_visible_in_snapshot(o.xid, e.seen))
"""


class Watched(NamedTuple):
    """A table whose changes the outbox is told of, the namespace they are of, and the column that has the id."""

    table: str
    namespace: str
    column: str


class OutboxLag(NamedTuple):
    """How many entries some Redis has not been told of, and the age of the oldest in seconds; 0 without any."""

    entries: int
    oldest: float


class Outbox:
    """What `govredis outbox` works on. Every method raises BackendUnavailable, BackendError, and ConfigurationError
    where `govredis migrate` has not been run."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    def watch(self, table: str, column: str, namespace: str) -> None:
        """Have every change of a table, by whomever, invalidate the cached value of its id.

        Twice is harmless. Waits for writers of the table, up to a minute. In migrations of your own:
        `SELECT govredis_outbox_watch('public.agents', 'agent_id', 'agent_meta')`.

        Args:
            table: as SQL names it.
            column: whose text is the id; before and after an update, if it changes.
            namespace: of the cache.
        """
        check_namespace(namespace)
        with self._postgres.transaction(timeout=_DDL_TIMEOUT) as tx:
            tx.fetch("SELECT govredis_outbox_watch(%s::regclass, %s, %s)", (table, column, namespace))

    def unwatch(self, table: str) -> None:
        """Watch a table no more. Raises ValueError if it is not watched."""
        with self._postgres.transaction(timeout=_DDL_TIMEOUT) as tx:
            removed = tx.fetch("SELECT govredis_outbox_unwatch(%s::regclass)", (table,))[0][0]
        if not removed:
            raise refuse("table", table, "one that is watched")

    def watched(self) -> list[Watched]:
        """What is watched, by name; our own table of agents among them."""
        rows = self._postgres.fetch(
            "SELECT DISTINCT watched::text, namespace, id_column FROM govredis_outbox_watched ORDER BY 1, 2"
        )
        return [Watched(*row) for row in rows]

    def lag(self, *, timeout: float | None = None) -> OutboxLag:
        """What has not been told yet."""
        ((entries, oldest),) = self._postgres.fetch(_LAG, timeout=timeout)
        return OutboxLag(entries, float(oldest))
