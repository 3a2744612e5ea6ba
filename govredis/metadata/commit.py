"""AfterCommit: invalidations that belong to a transaction of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._uncopied import Uncopied
from ..errors import BackendError
from ..keys import Id, Keys, id_text
from ..outbox import NotingFunction, check_transaction

# libpq's PQtransactionStatus, as psycopg2 has it in connection.info.transaction_status.
_IDLE = 0
_LOST = 4

_ADD = NotingFunction(
    "govredis_outbox_add",
    "text, text, bigint",
    "%s::pg_catalog.text, %s::pg_catalog.text, NULL::pg_catalog.int8",
)


class AfterCommit(Uncopied):
    """One transaction: see `MetadataCache.after_commit`. For one thread, once."""

    def __init__(
        self, connection: Any, namespace: str, keys: Keys, schema: str, invalidate: Callable[[str], None]
    ) -> None:
        check_transaction(connection)
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
        # Each time anew: the entry of an earlier call may have been rolled back, with a savepoint.
        _ADD.call(self._connection, self._schema, self._namespace, self._keys.row(identity))
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
        """Invalidate them all, and then raise the first BackendError."""
        refused: BackendError | None = None
        for identity in self._ids:
            try:
                self._invalidate(identity)
            except BackendError as error:
                refused = refused or error
        if refused is not None:
            raise refused
