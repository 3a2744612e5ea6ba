"""Outbox: which tables it watches, and how much of it Redis has not been told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import refuse
from ..keys import check_namespace

if TYPE_CHECKING:
    from ..postgres import Postgres, Transaction

__all__ = ["Outbox", "OutboxLag", "Watched"]

#: Seconds: creating a trigger waits for all writers of the table.
_DDL_TIMEOUT = 60.0

_LAG = """
SELECT count(o.entry), coalesce(extract(epoch FROM clock_timestamp() - min(o.at)), 0)
FROM @schema@.govredis_epochs e LEFT JOIN @schema@.govredis_outbox o
    ON o.xid >= pg_snapshot_xmin(e.seen) AND NOT pg_visible_in_snapshot(o.xid, e.seen)
WHERE e.epoch = %s GROUP BY e.epoch
"""


class Watched(NamedTuple):
    """A table whose changes the outbox is told of, the namespace they are of, and the column that has the id."""

    table: str
    namespace: str
    column: str


class OutboxLag(NamedTuple):
    """How many entries a Redis has not been told of, and the age of the oldest in seconds; 0 without any."""

    entries: int
    oldest: float

    @property
    def changes(self) -> str:
        """Their number in words."""
        return "1 change" if self.entries == 1 else f"{self.entries} changes"


class Outbox:
    """The tables that are watched, and how far a Redis is behind: `govredis outbox`. Every method raises
    BackendUnavailable, BackendError, and ConfigurationError where `govredis migrate` has not been run."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    def watch(self, table: str, column: str, namespace: str) -> None:
        """Have every change of a table, by any client, invalidate the cached value of its id.

        Partitions are watched with their table, those attached later too. TRUNCATE of a partition, ATTACH, DETACH, and
        writes while the triggers were switched off invalidate all of the namespace at the next run of the relay. Tables
        that inherit without being partitions are not watched with it: watch each.

        Not where PostgreSQL fires no triggers: with session_replication_role = replica, and for rows that logical
        replication brings. Twice is harmless. Waits for writers of the table, up to a minute. In your own migrations:
        `SELECT public.govredis_outbox_watch('public.agents'::regclass, 'agent_id'::text, 'agent_meta'::text)`, or in
        whichever schema it is: without the types, a function that another role has put there could be taken for ours.

        Args:
            table: as SQL names it.
            column: whose text is the id; before and after an update, if it changes.
            namespace: of the cache.

        Raises ValueError for a table that there is not.
        """
        check_namespace(namespace)
        with self._postgres.transaction(timeout=_DDL_TIMEOUT) as tx:
            tx.fetch(
                "SELECT @schema@.govredis_outbox_watch(%s::regclass, %s::text, %s::text)",
                (_known(tx, table), column, namespace),
            )

    def unwatch(self, table: str) -> None:
        """Watch a table no more. Raises ValueError if it is not watched."""
        with self._postgres.transaction(timeout=_DDL_TIMEOUT) as tx:
            removed = tx.fetch("SELECT @schema@.govredis_outbox_unwatch(%s::regclass)", (_known(tx, table),))[0][0]
        if not removed:
            raise refuse("table", table, "one that is watched")

    def watched(self) -> list[Watched]:
        """The watched tables, by name, with the schema; our own table of agents among them."""
        rows = self._postgres.fetch(
            "SELECT DISTINCT watched::text, namespace, id_column FROM @schema@.govredis_outbox_watched ORDER BY 1, 2"
        )
        return [Watched(*row) for row in rows]

    def lag(self, epoch: int, *, timeout: float | None = None) -> OutboxLag | None:
        """The entries that the Redis of this epoch has not been told of; None for an epoch that is over."""
        rows = self._postgres.fetch(_LAG, (epoch,), timeout=timeout)
        return OutboxLag(rows[0][0], float(rows[0][1])) if rows else None


def _known(tx: Transaction, table: str) -> str:
    if tx.fetch("SELECT to_regclass(%s)", (table,))[0][0] is None:
        raise refuse("table", table, "the name of one in the database, as SQL has it")
    return table
