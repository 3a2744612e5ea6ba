"""Functions of ours that are called in a transaction of the user's own, over the user's connection."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import ConfigurationError, refuse

# It runs as the application's role, with its search_path: every name is qualified. It asks the catalog, since naming a
# function of a schema that the role may not use fails the transaction.
_MAY_CALL = """
SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = %s AND p.proname = %s AND pg_catalog.oidvectortypes(p.proargtypes) = %s
"""


def check_transaction(connection: Any) -> None:
    """Raise ValueError for a connection that is no psycopg2 connection, or has no transactions."""
    if not callable(getattr(connection, "cursor", None)) or not hasattr(connection, "autocommit"):
        raise refuse("connection", connection, "a psycopg2 connection")
    if connection.autocommit:
        raise refuse("connection", connection, "one that is not in autocommit mode: there is no transaction")


class NotingFunction(NamedTuple):
    """A function that notes something in the transaction that calls it.

    Attributes:
        types: those of its parameters, as `oidvectortypes` shows them.
        arguments: a placeholder for each. The types say which function: ours, whatever others have put there.
    """

    name: str
    types: str
    arguments: str

    def call(self, connection: Any, schema: str, *values: Any) -> Any:
        """Its result, in a tuple. None: there is no such function.

        Raises ConfigurationError where the connection's role may not call it, and the connection's own errors.
        """
        with connection.cursor() as cursor:
            cursor.execute(_MAY_CALL, (schema, self.name, self.types))
            found = cursor.fetchone()
            if found is None:
                return None
            if not found[0]:
                raise ConfigurationError(
                    f"the connection's role may not write to the outbox in schema {schema}: GRANT USAGE ON"
                    f' SCHEMA "{schema}", and EXECUTE ON FUNCTION "{schema}".{self.name}, to it'
                )
            cursor.execute(f'SELECT "{schema}".{self.name}({self.arguments})', values)
            return cursor.fetchone()
