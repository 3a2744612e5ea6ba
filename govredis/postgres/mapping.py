"""The errors of psycopg2, in our words. This file alone decides which of them mean "PostgreSQL is away"."""

from __future__ import annotations

import re

import psycopg2
from psycopg2 import errorcodes, extensions

from .._secrets import Secrets
from ..breaker import ReadOnly, Rejected
from ..errors import BackendError, BackendUnavailable, ConfigurationError

# The server is there, but not for us now: shutting down, starting, out of connections, out of memory or disk.
_UNAVAILABLE_CLASSES = {
    errorcodes.CLASS_OPERATOR_INTERVENTION,
    errorcodes.CLASS_CONNECTION_EXCEPTION,
    errorcodes.CLASS_INSUFFICIENT_RESOURCES,
}
# The server has answered all the same: a lock or a statement took too long. It may well serve others.
_ANSWERED_UNAVAILABLE = {errorcodes.QUERY_CANCELED, errorcodes.LOCK_NOT_AVAILABLE}
#: A standby refuses tables that are not logged, those of limits, and ends a read that is in the way of its replication.
_UNLOGGED, _CONFLICT = errorcodes.FEATURE_NOT_SUPPORTED, errorcodes.SERIALIZATION_FAILURE
# A server's refusals, in English at least, of a connection that it will never accept; libpq gives no code for these.
_REJECTED = re.compile(
    r"authentication failed|(?:role|database) .* does not exist|no pg_hba.conf entry|no password supplied"
    r"|invalid \w+ value|invalid port number|could not match \d+|(?:definition of service|service file) .* not found"
    r"|no such (?:database|user)|unsupported startup parameter"  # the last three are PgBouncer's
)
#: PgBouncer's answer in its statement mode.
_NO_TRANSACTIONS = "not allowed in statement pooling mode"
_MISSING = {
    errorcodes.UNDEFINED_TABLE,
    errorcodes.UNDEFINED_FUNCTION,
    errorcodes.INVALID_SCHEMA_NAME,
    errorcodes.UNDEFINED_COLUMN,
}


class NoAnswer(BackendUnavailable):
    """No usable answer. `reason` and `timed_out` are for the breaker; callers see a BackendUnavailable."""

    def __init__(self, message: str, reason: str = "", timed_out: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.timed_out = timed_out


class PostgresErrorMapping:
    """Maps the errors of one server.

    Args:
        name: the server's, for the errors.
        secrets: the passwords that no error may show.
    """

    def __init__(self, name: str, secrets: Secrets) -> None:
        self._name = name
        self._secrets = secrets
        self._of_files = Secrets()

    def keep_secret(self, password: str) -> None:
        """Keep a password out of errors that no setting holds: that of the latest connection."""
        self._of_files = Secrets(passwords=(password,))

    def _text_of(self, error: psycopg2.Error) -> str:
        self._of_files.text_of(error, psycopg2.Error)
        return self._secrets.text_of(error, psycopg2.Error).strip()

    def of_statement(self, error: psycopg2.Error, connection: extensions.connection) -> Exception:
        """A statement's error; ReadOnly from a server that does not write now."""
        code = error.pgcode or ""
        text = self._text_of(error)
        if code in _MISSING:
            why = text.splitlines()[0]
            return ConfigurationError(f"{self._name}: {why}. Run `govredis migrate` to make our tables")
        if _NO_TRANSACTIONS in text:
            return ConfigurationError(
                f"{self._name}: {text.splitlines()[0]}; its pool_mode must be transaction or session"
            )
        # An error without a code is libpq's, which lost the server, or psycopg2's, which cannot send the statement.
        lost = not code and not isinstance(error, psycopg2.ProgrammingError)
        if not connection.closed:
            on_standby = _is_standby(connection, text)
            if code == errorcodes.READ_ONLY_SQL_TRANSACTION or (on_standby and code == _UNLOGGED):
                return ReadOnly(f"{self._name} cannot serve: {text}")
            if code in _ANSWERED_UNAVAILABLE or (on_standby and code == _CONFLICT):
                return BackendUnavailable(f"{self._name} cannot serve: {text}")
        if connection.closed or lost or code[:2] in _UNAVAILABLE_CLASSES:
            return self.no_answer(text)
        if code == errorcodes.INSUFFICIENT_PRIVILEGE:
            text = f"{text.splitlines()[0]}. The role that runs `govredis migrate` must GRANT it to this one"
        return BackendError(f"{self._name} answered: {text}")

    def of_connecting(self, error: psycopg2.Error) -> BackendError:
        """The error of connecting: Rejected where waiting does not help, else NoAnswer."""
        text = _in_one_line(self._text_of(error))
        if _REJECTED.search(text):
            return Rejected(f"{self._name} rejects us: {text}")
        return self.no_answer(text)

    def no_answer(self, reason: str, timed_out: bool = False) -> NoAnswer:
        reason = _in_one_line(reason)
        return NoAnswer(f"{self._name} is away: {reason}", reason, timed_out)


def _is_standby(connection: extensions.connection, text: str) -> bool:
    """PostgreSQL 14 and later say so in the greeting, which PgBouncer does not hand on; else the error's words do."""
    return connection.info.parameter_status("in_hot_standby") == "on" or "recovery" in text


def _in_one_line(text: str) -> str:
    """libpq's text has several lines, indented by tabs, which are spelled out here."""
    return re.sub(r"\s*\n(?:\\t|\s)*", " ", text)
