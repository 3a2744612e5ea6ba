"""Postgres: statements and transactions with real deadlines, over a pool of its own connections.

The only module that imports psycopg2. A hung server (a stopped process, a dead network) ignores statement_timeout, so
connections are asynchronous ones and each wait is a poll with our own deadline: per connection, never psycopg2's
process-wide wait callback, which belongs to the application (gevent's, say).
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from ._fork import renew_in_child
from ._pool import Pool
from .breaker import CircuitBreaker
from .config import Config, redact
from .errors import BackendError, BackendUnavailable, ConfigurationError

try:
    import psycopg2
    from psycopg2 import errorcodes, extensions
    from psycopg2.extras import Json
except ImportError as missing:
    raise ConfigurationError("GOVREDIS_DATABASE_URL needs psycopg2: pip install 'govredis[postgres]'") from missing

__all__ = ["Json", "Postgres", "Transaction"]

Row = tuple[Any, ...]

_PROBE_TIMEOUT = 0.5
_MIGRATION_TIMEOUT = 60.0
#: Serialises migrations of all processes; any constant that no other program uses. ("govredis" in ASCII.)
_MIGRATION_LOCK = 0x676F767265646973

# The server is there, but not for us now: shutting down, starting, out of connections, out of memory or disk.
_UNAVAILABLE_CLASSES = {
    errorcodes.CLASS_OPERATOR_INTERVENTION,
    errorcodes.CLASS_CONNECTION_EXCEPTION,
    errorcodes.CLASS_INSUFFICIENT_RESOURCES,
}
_MISSING = {
    errorcodes.UNDEFINED_TABLE,
    errorcodes.UNDEFINED_FUNCTION,
    errorcodes.INVALID_SCHEMA_NAME,
    errorcodes.UNDEFINED_COLUMN,
}


class _NoAnswer(BackendUnavailable):
    """No usable answer, and whether it was for lack of time: for the breaker. Callers see a BackendUnavailable."""

    def __init__(self, reason: str, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class Postgres:
    """PostgreSQL for the features: one statement, or one transaction, within a deadline.

    Safe to share between threads and across fork. With a breaker of its own: after one call has timed out, the others
    fail at once until a probe has succeeded.

    Args:
        config: database_url, postgres_timeout, postgres_connections.
    """

    def __init__(self, config: Config) -> None:
        if config.database_url is None:
            raise ConfigurationError("GOVREDIS_DATABASE_URL is not set; it must be postgresql://...")
        self._dsn = config.database_url
        self._timeout = config.postgres_timeout
        try:
            self.name = f"PostgreSQL at {_address(self._dsn)}"
        except psycopg2.Error as error:
            raise ConfigurationError(f"database_url {redact(self._dsn)!r}: {redact(str(error).strip())}") from None
        self._pool: Pool[extensions.connection] = Pool(
            self._connect_in_time, _disconnect, config.postgres_connections, self.name
        )
        self.breaker = CircuitBreaker(self.name, self._probe)
        #: Statements sent by this process, transactions' BEGIN and COMMIT not counted.
        self.statements = 0
        renew_in_child(self)

    # -- calls ---------------------------------------------------------------------------------------------------

    def fetch(self, sql: str, params: Sequence[Any] = (), *, timeout: float | None = None) -> list[Row]:
        """Run one statement in a transaction of its own. Returns its rows ([] where it returns none).

        Args:
            sql: with %s placeholders.
            params: their values.
            timeout: seconds for all of it, connecting included; None: postgres_timeout.

        Raises BackendUnavailable when there was no answer in time (it may have been applied), ConfigurationError when
        our tables are missing, BackendError for any other answer that is an error.
        """
        with self._borrowed(timeout) as (connection, deadline):
            return self._execute(connection, sql, params, deadline)

    @contextlib.contextmanager
    def transaction(self, *, timeout: float | None = None) -> Iterator[Transaction]:
        """`with postgres.transaction() as tx: tx.fetch(...)`: commits where the body succeeds, rolls back otherwise.

        Raises as `fetch`, from each statement and from the commit; if the commit's answer was lost, nobody knows
        whether it took place.

        Args:
            timeout: seconds for all of it, the body included; None: postgres_timeout.
        """
        with self._borrowed(timeout) as (connection, deadline):
            self._execute(connection, "BEGIN", (), deadline, counted=False)
            try:
                yield Transaction(self, connection, deadline)
            except BaseException:
                if not connection.closed and not connection.isexecuting():
                    self._execute(connection, "ROLLBACK", (), deadline, counted=False)
                raise
            self._execute(connection, "COMMIT", (), deadline, counted=False)

    @contextlib.contextmanager
    def _borrowed(self, timeout: float | None) -> Iterator[tuple[extensions.connection, float]]:
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        self.breaker.check()
        generation = self.breaker.generation
        connection: extensions.connection | None = None
        try:
            connection = self._pool.take(timeout)
            if _server_hung_up(connection):
                self._pool.drop(connection)
                self._pool.drop_idle()
                connection = self._pool.take(timeout)
            yield connection, deadline
        except _NoAnswer as error:
            if connection is not None:
                self._pool.drop(connection)
            self._pool.drop_idle()
            self.breaker.failed(generation, str(error), timed_out=error.timed_out)
            raise BackendUnavailable(str(error)) from error.__cause__
        except BackendError:
            # An answer: the connection is in step, and outside of a transaction.
            if connection is not None:
                self._pool.give(connection)
            raise
        except BaseException:
            # Between send and answer, perhaps: a signal, a soft time limit, an error of the caller's body.
            if connection is not None:
                if connection.closed or connection.isexecuting() or _in_transaction(connection):
                    self._pool.drop(connection)
                else:
                    self._pool.give(connection)
            raise
        else:
            self._pool.give(connection)
            self.breaker.succeeded()

    def _execute(
        self,
        connection: extensions.connection,
        sql: str,
        params: Sequence[Any],
        deadline: float,
        *,
        counted: bool = True,
    ) -> list[Row]:
        if counted:
            self.statements += 1
        cursor = connection.cursor()
        try:
            cursor.execute(sql, params or None)
            _wait(connection, deadline)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg2.Error as error:
            raise self._mapped(error, connection) from error

    def _mapped(self, error: psycopg2.Error, connection: extensions.connection) -> Exception:
        code = error.pgcode or ""
        text = redact(str(error).strip())
        if code in _MISSING:
            return ConfigurationError(f"{self.name}: {text.splitlines()[0]}. Run `govredis migrate` to make our tables")
        if connection.closed or code[:2] in _UNAVAILABLE_CLASSES or not code:
            return _NoAnswer(f"{self.name} is away: {text}", timed_out=code == errorcodes.QUERY_CANCELED)
        return BackendError(f"{self.name} answered: {text}")

    # -- migrations ----------------------------------------------------------------------------------------------

    def migrate(self) -> list[str]:
        """Bring our tables up to date. Returns the names of the migrations applied ([] when there were none to).

        Safe to run from several processes at once: they take turns under an advisory lock. Each migration is one
        transaction, so a failed one leaves nothing behind. Raises BackendUnavailable, BackendError.
        """
        applied = []
        with self.transaction(timeout=_MIGRATION_TIMEOUT) as tx:
            tx.fetch("SELECT set_config('statement_timeout', %s, true)", (str(int(_MIGRATION_TIMEOUT * 1000)),))
            tx.fetch("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
            tx.fetch(
                "CREATE TABLE IF NOT EXISTS govredis_migrations"
                " (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            done = {name for (name,) in tx.fetch("SELECT name FROM govredis_migrations")}
            for name, sql in _migrations():
                if name not in done:
                    tx.fetch(sql)
                    tx.fetch("INSERT INTO govredis_migrations (name) VALUES (%s)", (name,))
                    applied.append(name)
        return applied

    def missing_migrations(self, *, timeout: float | None = None) -> list[str]:
        """The names of the migrations that `migrate` would apply. Reads only."""
        done: set[str] = set()
        if self.fetch("SELECT to_regclass('govredis_migrations')", timeout=timeout)[0][0] is not None:
            done = {name for (name,) in self.fetch("SELECT name FROM govredis_migrations", timeout=timeout)}
        return [name for name, _ in _migrations() if name not in done]

    # -- life ----------------------------------------------------------------------------------------------------

    def _connect_in_time(self) -> extensions.connection:
        return self._connect(time.monotonic() + self._timeout)

    def _connect(self, deadline: float) -> extensions.connection:
        try:
            connection = psycopg2.connect(self._dsn, async_=1, application_name="govredis")
        except psycopg2.Error as error:
            raise self._no_connection(error) from error
        try:
            _wait(connection, deadline)
            # A statement that outlives its caller shall not go on waiting for locks on a living server; and our
            # functions count on seeing the newest row version after they have waited for its lock.
            cursor = connection.cursor()
            cursor.execute(
                "SELECT set_config('statement_timeout', %s, false),"
                " set_config('default_transaction_isolation', 'read committed', false)",
                (str(int(self._timeout * 1000)),),
            )
            _wait(connection, deadline)
        except psycopg2.Error as error:
            connection.close()
            raise self._no_connection(error) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _no_connection(self, error: psycopg2.Error) -> _NoAnswer:
        return _NoAnswer(f"{self.name} is away: {redact(str(error).strip())}")

    def _probe(self) -> None:
        self._connect(time.monotonic() + _PROBE_TIMEOUT).close()
        self._pool.drop_idle()

    def renew_after_fork(self) -> None:
        inherited = list(self._pool.live)
        self._pool.renew()
        for connection in inherited:
            # Closing through libpq would send Terminate on the socket that the parent still uses. psycopg2 leaves a
            # connection of another process alone; only the child's descriptor has to go.
            try:
                os.close(connection.fileno())
            except (OSError, psycopg2.Error):
                pass

    def close(self) -> None:
        """Close the idle connections and end the probe."""
        self.breaker.close()
        self._pool.drop_idle()


class Transaction:
    """One open transaction: see `Postgres.transaction`."""

    def __init__(self, postgres: Postgres, connection: extensions.connection, deadline: float) -> None:
        self._postgres = postgres
        self._connection = connection
        self._deadline = deadline

    def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """Run one statement in this transaction. Returns its rows. Raises as `Postgres.fetch`."""
        return self._postgres._execute(self._connection, sql, params, self._deadline)


def _wait(connection: extensions.connection, deadline: float) -> None:
    """Poll `connection` until its statement (or its connecting) is done. Raises _NoAnswer at the deadline."""
    while True:
        state = connection.poll()
        if state == extensions.POLL_OK:
            return
        poller = select.poll()  # unlike select(), it takes descriptors above 1023
        poller.register(connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise _NoAnswer("PostgreSQL gave no answer within the deadline", timed_out=True)


def _server_hung_up(connection: extensions.connection) -> bool:
    """Has an idle connection something to read? Then it is the server's good-bye: nothing was asked."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def _in_transaction(connection: extensions.connection) -> bool:
    return connection.info.transaction_status != extensions.TRANSACTION_STATUS_IDLE


def _disconnect(connection: extensions.connection) -> None:
    try:
        connection.close()
    except psycopg2.Error:
        pass


def _address(dsn: str) -> str:
    parts = extensions.parse_dsn(dsn)
    return f"{parts.get('host', 'localhost')}:{parts.get('port', '5432')}/{parts.get('dbname', '')}"


def _migrations() -> list[tuple[str, str]]:
    folder = files("govredis").joinpath("schema")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".sql"))
    return [(name, folder.joinpath(name).read_text(encoding="utf-8")) for name in names]
