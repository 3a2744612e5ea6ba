"""AfterCommit: invalidations that belong to a transaction of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import refuse
from ..keys import Keys

# libpq's PQtransactionStatus, as psycopg2 has it in connection.info.transaction_status.
_IDLE = 0
_LOST = 4

_HAS_OUTBOX = "SELECT to_regprocedure('govredis_outbox_add(text, text, bigint)') IS NOT NULL"
_NOTE = "SELECT govredis_outbox_add(%s, %s, NULL)"


class AfterCommit:
    """One transaction: see `MetadataCache.after_commit`. For one thread, once."""

    def __init__(self, connection: Any, namespace: str, keys: Keys, invalidate: Callable[[str], None]) -> None:
        if connection.autocommit:
            raise refuse("connection", connection, "one that is not in autocommit mode: there is no transaction")
        self._connection = connection
        self._namespace = namespace
        self._keys = keys
        self._invalidate = invalidate
        self._ids: dict[str, None] = {}

    def invalidate(self, identity: str) -> None:
        """Have the value of an id invalidated once this transaction is committed.

        Sends a statement or two, which say so to the outbox if there is one. Raises ValueError for a bad id, and what
        the connection raises.
        """
        self._keys.cached(self._namespace, identity)
        if identity in self._ids:
            return
        with self._connection.cursor() as cursor:
            cursor.execute(_HAS_OUTBOX)
            if cursor.fetchone()[0]:
                cursor.execute(_NOTE, (self._namespace, identity))
        self._ids[identity] = None

    def __enter__(self) -> AfterCommit:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        connection = self._connection
        if error is not None:
            if connection.closed or connection.info.transaction_status in (_IDLE, _LOST):
                # It was ended in the body, or nobody knows: an invalidation too many is harmless, one too few is not.
                self._carry_out()
            else:
                connection.rollback()
            return
        try:
            connection.commit()
        except BaseException:
            # Without an answer it may have been committed.
            if connection.closed or connection.info.transaction_status != _IDLE:
                self._carry_out()
            raise
        self._carry_out()

    def _carry_out(self) -> None:
        for identity in self._ids:
            self._invalidate(identity)
