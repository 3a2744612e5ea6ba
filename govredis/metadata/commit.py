"""AfterCommit: invalidations that belong to a transaction of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._uncopied import Uncopied
from ..errors import ConfigurationError, refuse
from ..keys import Id, Keys, id_text

# libpq's PQtransactionStatus, as psycopg2 has it in connection.info.transaction_status.
_IDLE = 0
_LOST = 4

# It runs as the application's role, with its search_path: every name is qualified. It asks the catalog, since naming a
# function of a schema that the role may not use fails the transaction.
_OUTBOX = """
SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = %s AND p.proname = 'govredis_outbox_add'
    AND pg_catalog.oidvectortypes(p.proargtypes) = 'text, text, bigint'
"""
# The types say which function: ours, whatever others have put there.
_ARGUMENTS = "%s::pg_catalog.text, %s::pg_catalog.text, NULL::pg_catalog.int8"


class AfterCommit(Uncopied):
    """One transaction: see `MetadataCache.after_commit`. For one thread, once."""

    def __init__(
        self, connection: Any, namespace: str, keys: Keys, schema: str, invalidate: Callable[[str], None]
    ) -> None:
        if not callable(getattr(connection, "cursor", None)) or not hasattr(connection, "autocommit"):
            raise refuse("connection", connection, "a psycopg2 connection")
        if connection.autocommit:
            raise refuse("connection", connection, "one that is not in autocommit mode: there is no transaction")
        self._connection = connection
        self._namespace = namespace
        self._keys = keys
        self._schema = schema
        self._invalidate = invalidate
        self._ids: dict[str, None] = {}

    def invalidate(self, identity: Id) -> None:
        """Have the value of an id invalidated once this transaction is committed.

        Sends a statement or two, which say so to the outbox if there is one. Raises ValueError for a bad id,
        ConfigurationError where the connection's role may not write to the outbox, and the connection's own errors.
        """
        identity = id_text(identity)
        self._keys.cached(self._namespace, identity)
        if identity in self._ids:
            return
        with self._connection.cursor() as cursor:
            cursor.execute(_OUTBOX, (self._schema,))
            outbox = cursor.fetchone()
            if outbox is not None:
                if not outbox[0]:
                    raise ConfigurationError(
                        f"the connection's role may not write to the outbox in schema {self._schema}: GRANT USAGE ON"
                        f' SCHEMA "{self._schema}", and EXECUTE ON FUNCTION'
                        f' "{self._schema}".govredis_outbox_add, to it'
                    )
                note = f'SELECT "{self._schema}".govredis_outbox_add({_ARGUMENTS})'
                cursor.execute(note, (self._namespace, self._keys.row(identity)))
        self._ids[identity] = None

    def __enter__(self) -> AfterCommit:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        connection = self._connection
        if error is not None:
            if connection.closed or connection.info.transaction_status in (_IDLE, _LOST):
                # It was ended in the body, or its end is unknown: an invalidation too many is harmless, one too few is
                # not.
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
