"""Postgres: statements and transactions with real deadlines, over a pool of its own connections.

The only module that imports psycopg2. A hung server (a stopped process, a dead network) ignores statement_timeout, so
connections are asynchronous ones and each wait is a poll with our own deadline: per connection, never psycopg2's
process-wide wait callback, which belongs to the application (gevent's, say).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from ._fork import renew_in_child
from ._pool import Pool
from .breaker import CircuitBreaker, Rejected
from .config import Config, redact
from .errors import BackendError, BackendUnavailable, ConfigurationError

try:
    import psycopg2
    from psycopg2 import errorcodes, extensions
    from psycopg2.extras import Json
except ImportError as missing:
    raise ConfigurationError("GOVREDIS_DATABASE_URL needs psycopg2: pip install 'govredis[postgres]'") from missing

__all__ = ["Json", "Postgres", "Transaction"]

log = logging.getLogger("govredis")

Row = tuple[Any, ...]

# A living server gives up a slow statement a little before we would: it has answered then, and is not "away".
_SERVER_SHARE = 0.9
_SET_STATEMENT_TIMEOUT = "SELECT set_config('statement_timeout', %s, false)"
_MIGRATION_TIMEOUT = 60.0
#: Serialises migrations of all processes; any constant that no other program uses. ("govredis" in ASCII.)
_MIGRATION_LOCK = 0x676F767265646973

# The server is there, but not for us now: shutting down, starting, out of connections, out of memory or disk.
_UNAVAILABLE_CLASSES = {
    errorcodes.CLASS_OPERATOR_INTERVENTION,
    errorcodes.CLASS_CONNECTION_EXCEPTION,
    errorcodes.CLASS_INSUFFICIENT_RESOURCES,
}
# It has answered all the same: a lock not had or a statement not done in time, a standby. Others may well be served.
_ANSWERED_UNAVAILABLE = {errorcodes.QUERY_CANCELED, errorcodes.READ_ONLY_SQL_TRANSACTION, errorcodes.LOCK_NOT_AVAILABLE}
# What a server says, in English at least, to a connection that it will never accept; libpq gives no code for these.
_REJECTED = re.compile(
    r"authentication failed|(?:role|database) .* does not exist|no pg_hba.conf entry|no password supplied"
    r"|invalid sslmode"
)
_MISSING = {
    errorcodes.UNDEFINED_TABLE,
    errorcodes.UNDEFINED_FUNCTION,
    errorcodes.INVALID_SCHEMA_NAME,
    errorcodes.UNDEFINED_COLUMN,
}


class _NoAnswer(BackendUnavailable):
    """No usable answer; why, and whether it was for lack of time: for the breaker. Callers see a BackendUnavailable."""

    def __init__(self, message: str, reason: str = "", timed_out: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.timed_out = timed_out


class Postgres:
    """PostgreSQL for the features: one statement, or one transaction, within a deadline.

    Safe to share between threads and across fork. With a breaker of its own: after one call has timed out, the others
    fail at once until a probe has succeeded.

    Args:
        config: database_url, postgres_timeout, postgres_connections.
    """

    def __init__(self, config: Config) -> None:
        assert config.database_url is not None
        self._dsn = config.database_url
        self._timeout = config.postgres_timeout
        address = _address(self._dsn)
        if address is None:
            raise ConfigurationError(
                f"GOVREDIS_DATABASE_URL is {redact(self._dsn)!r}; it must be a URL that libpq takes: only parameters"
                " that it knows, and % only before two hex digits"
            )
        self.name = f"PostgreSQL at {address}"
        self._pool: Pool[extensions.connection] = Pool(
            self._connect, _disconnect, config.postgres_connections, self.name
        )
        self.breaker = CircuitBreaker(self.name, self._probe)
        #: Statements sent by this process, transactions' BEGIN and COMMIT not counted.
        self.statements = 0
        self._recoveries: list[Callable[[Postgres], None]] = []
        self._direct = threading.local()
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
        whether it took place. Where the body swallows a statement's error, the exit raises BackendError: nothing was
        committed.

        Args:
            timeout: seconds for all of it, the body included; None: postgres_timeout.
        """
        with self._borrowed(timeout) as (connection, deadline):
            self._execute(connection, "BEGIN", (), deadline, counted=False)
            try:
                yield Transaction(self, connection, deadline)
            except BaseException:
                with contextlib.suppress(BackendError):  # then the connection is dropped, which rolls back as well
                    self._execute(connection, "ROLLBACK", (), deadline, counted=False)
                raise
            if connection.info.transaction_status != extensions.TRANSACTION_STATUS_INTRANS:
                raise BackendError(f"{self.name}: a statement of the transaction failed, so nothing was committed")
            self._execute(connection, "COMMIT", (), deadline, counted=False)

    @contextlib.contextmanager
    def _borrowed(self, timeout: float | None) -> Iterator[tuple[extensions.connection, float]]:
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not getattr(self._direct, "open", False):  # not for a replay, which runs before it closes
            self.breaker.check()
        generation = self.breaker.generation
        connection: extensions.connection | None = None
        longer = timeout > self._timeout
        try:
            connection = self._pool.take(timeout)
            if _server_hung_up(connection):
                self._pool.drop(connection)
                connection = None
                self._pool.drop_idle()
                connection = self._pool.take(deadline - time.monotonic())
            if longer:
                self._execute(
                    connection, _SET_STATEMENT_TIMEOUT, (_statement_timeout(timeout),), deadline, counted=False
                )
            yield connection, deadline
        except _NoAnswer as error:
            if connection is not None:
                self._pool.drop(connection)
                connection = None
            self._pool.drop_idle()
            self.breaker.failed(generation, error.reason, timed_out=error.timed_out)
            raise BackendUnavailable(str(error)) from error.__cause__
        else:
            self.breaker.succeeded()
        finally:
            if connection is not None:
                self._put_back(connection, reusable=not longer)

    def _put_back(self, connection: extensions.connection, reusable: bool) -> None:
        if connection not in self._pool.live:
            return  # we are a child forked meanwhile: it is the parent's
        # Between send and answer, perhaps, where a signal or a soft time limit struck.
        in_step = (
            not connection.closed
            and not connection.isexecuting()
            and connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
        )
        if reusable and in_step:
            self._pool.give(connection)
        else:
            self._pool.drop(connection)

    def _execute(
        self,
        connection: extensions.connection,
        sql: str,
        params: Sequence[Any],
        deadline: float,
        *,
        counted: bool = True,
    ) -> list[Row]:
        if connection not in self._pool.live:
            raise BackendUnavailable(f"this connection to {self.name} is the parent process's: its transaction is too")
        if time.monotonic() >= deadline:  # our own slowness: nothing that the breaker should hear of
            raise BackendUnavailable(f"no time was left to ask {self.name}")
        if counted:
            self.statements += 1
        try:
            cursor = connection.cursor()
            cursor.execute(sql, params or None)
            self._wait(connection, deadline)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg2.Error as error:
            raise self._mapped(error, connection) from error

    def _wait(self, connection: extensions.connection, deadline: float) -> None:
        """Poll `connection` until its statement (or its connecting) is done. Raises _NoAnswer at the deadline."""
        while True:
            state = connection.poll()
            if state == extensions.POLL_OK:
                return
            poller = select.poll()  # unlike select(), it takes descriptors above 1023
            poller.register(connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise self._no_answer("no answer within the deadline", timed_out=True)

    def _mapped(self, error: psycopg2.Error, connection: extensions.connection) -> Exception:
        code = error.pgcode or ""
        text = redact(str(error).strip())
        if code in _MISSING:
            return ConfigurationError(f"{self.name}: {text.splitlines()[0]}. Run `govredis migrate` to make our tables")
        # Without a code it comes from libpq, which lost the server, or from psycopg2, which cannot send that.
        lost = not code and not isinstance(error, psycopg2.ProgrammingError)
        if not connection.closed and code in _ANSWERED_UNAVAILABLE:
            return BackendUnavailable(f"{self.name} cannot serve: {text}")
        if connection.closed or lost or code[:2] in _UNAVAILABLE_CLASSES:
            return self._no_answer(text)
        return BackendError(f"{self.name} answered: {text}")

    def _not_connected(self, error: psycopg2.Error) -> BackendError:
        text = redact(str(error).strip())
        if _REJECTED.search(text):
            return Rejected(f"{self.name} rejects us: {text}")
        return self._no_answer(text)

    def _no_answer(self, reason: str, timed_out: bool = False) -> _NoAnswer:
        return _NoAnswer(f"{self.name} is away: {reason}", reason, timed_out)

    # -- migrations ----------------------------------------------------------------------------------------------

    def migrate(self) -> list[str]:
        """Bring our tables up to date. Returns the names of the migrations applied ([] when there were none to).

        Safe to run from several processes at once: they take turns under an advisory lock. All are applied in one
        transaction, so a failed one leaves nothing behind. Raises BackendUnavailable, BackendError.
        """
        applied = []
        with self.transaction(timeout=_MIGRATION_TIMEOUT) as tx:
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

    def on_recovery(self, replay: Callable[[Postgres], None]) -> None:
        """Have `replay(postgres)` called when PostgreSQL is back: see RedisClient.on_recovery."""
        self._recoveries.append(replay)

    def replay_soon(self, why: str) -> None:
        """Something for a replay was noted: use PostgreSQL no more until the replays have run."""
        self.breaker.trip(why)

    def _replay(self) -> None:
        self._direct.open = True
        try:
            for replay in list(self._recoveries):
                try:
                    replay(self)
                except (BackendUnavailable, Rejected):
                    raise
                except Exception:
                    log.exception("a replay on %s failed", self.name)
        finally:
            self._direct.open = False

    def _connect(self, deadline: float) -> extensions.connection:
        try:
            connection = psycopg2.connect(self._dsn, async_=1, application_name="govredis")
        except psycopg2.Error as error:
            raise self._not_connected(error) from error
        try:
            self._wait(connection, deadline)
            # A statement that outlives its caller shall not go on waiting for locks on a living server; and our
            # functions count on seeing the newest row version after they have waited for its lock.
            cursor = connection.cursor()
            cursor.execute(
                _SET_STATEMENT_TIMEOUT + ", set_config('default_transaction_isolation', 'read committed', false)",
                (_statement_timeout(self._timeout),),
            )
            self._wait(connection, deadline)
        except psycopg2.Error as error:
            connection.close()
            raise self._not_connected(error) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _probe(self) -> None:
        try:
            # With the timeout of every call: a shorter one would never let a distant server back in.
            self._connect(time.monotonic() + self._timeout).close()
        except _NoAnswer as error:
            raise BackendUnavailable(error.reason) from error
        except BackendError:
            pass  # it is back, and callers shall see that mistake
        self._pool.drop_idle()
        self._replay()

    def renew_after_fork(self) -> None:
        inherited = list(self._pool.live)
        self._pool.renew()
        self._direct = threading.local()
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


def _server_hung_up(connection: extensions.connection) -> bool:
    """Has an idle connection something to read? Then it is the server's good-bye: nothing was asked."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def _statement_timeout(seconds: float) -> str:
    return str(max(1, int(seconds * _SERVER_SHARE * 1000)))


def _disconnect(connection: extensions.connection) -> None:
    with contextlib.suppress(psycopg2.Error):
        connection.close()


def _address(dsn: str) -> str | None:
    """Host, port and database; None where libpq does not take the URL: its error, which may quote it, ends here."""
    try:
        parts = extensions.parse_dsn(dsn)
    except psycopg2.Error:
        return None
    return f"{parts.get('host', 'localhost')}:{parts.get('port', '5432')}/{parts.get('dbname', '')}"


def _migrations() -> list[tuple[str, str]]:
    folder = files("govredis").joinpath("schema")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".sql"))
    return [(name, folder.joinpath(name).read_text(encoding="utf-8")) for name in names]
