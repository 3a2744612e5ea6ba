"""Postgres: statements and transactions with real deadlines, over a pool of its own connections.

A hung server (a stopped process, a dead network) ignores statement_timeout, so connections are asynchronous and each
wait is a poll with our own deadline. psycopg2's wait callback is for the whole process, and belongs to the application
(to gevent, say).

A pooler in transaction mode, as PgBouncer, lends one session of the server to others between two transactions of ours.
So no setting of ours outlives a transaction: SET LOCAL goes in one message with the statement, and PostgreSQL makes one
transaction of such a message. There is no prepared statement, LISTEN, temporary table or session lock. There is no
startup parameter either, except those that PgBouncer keeps apart for each of its clients.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg2
from psycopg2 import extensions

from .._fork import notice_fork, renew_in_child
from .._histogram import Histogram
from .._migrations import PINNED, Migrations
from .._pool import Pool
from .._recovery import Recoverable
from .._redact import shown_dsn
from .._secrets import Secrets
from .._uncopied import Uncopied
from ..breaker import CircuitBreaker, ReadOnly
from ..config import Config
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .connecting import Connector, has_input, name_of
from .mapping import NoAnswer, PostgresErrorMapping

Row = tuple[Any, ...]

# A living server gives up a slow statement a little before we do: so it has answered, and is not "away".
_SERVER_SHARE = 0.9
# Our functions count on seeing the newest row version after they have waited for its lock.
_ISOLATION = "ISOLATION LEVEL READ COMMITTED"
_MIGRATION_TIMEOUT = 60.0


class Postgres(Recoverable):
    """PostgreSQL for the features: one statement, or one transaction, within a deadline.

    Safe to share between threads and across fork. It has a breaker of its own: after one call has timed out, the others
    fail at once until a probe has succeeded.

    Args:
        config: database_url, postgres_timeout, postgres_connections.
    """

    def __init__(self, config: Config) -> None:
        assert config.database_url is not None
        self._timeout = config.postgres_timeout
        #: Sent before a statement, for its transaction.
        self._settings = f"SET TRANSACTION {_ISOLATION}; {_set_statement_timeout(self._timeout)}"
        self._schema = f'"{config.schema}"'
        self._prefix = config.key_prefix
        parameters = _parse(config.database_url)
        if parameters is None:
            raise ConfigurationError(
                f"GOVREDIS_DATABASE_URL is {shown_dsn(config.database_url)!r}; it must be a URL, or keywords and"
                " values, that libpq takes: only parameters that it knows, and % in a URL only before two hex digits"
            )
        super().__init__(f"PostgreSQL at {name_of(parameters)}")
        self._errors = PostgresErrorMapping(self.name, Secrets.of(config))
        self._connector = Connector(config.database_url, parameters, self._errors)
        self._pool: Pool[extensions.connection] = Pool(
            self._connector.connect,
            _disconnect,
            config.postgres_connections,
            self.name,
            self._check,
        )
        #: Open while writes are pending for a read-only server: this process reads meanwhile, and its replays must be
        #: the first to write.
        self._writing = CircuitBreaker(f"writing to {self.name}", self._probe_writing)
        self._read_only = False
        #: Statements sent by this process, without the BEGIN and COMMIT of transactions.
        self.statements: int = 0
        #: How long those took that were answered, or timed out.
        self.latency: Histogram = Histogram()
        renew_in_child(self)

    # -- calls ---------------------------------------------------------------------------------------------------

    def fetch(self, sql: str, params: Sequence[Any] = (), *, timeout: float | None = None) -> list[Row]:
        """Run one statement in a transaction of its own. Returns its rows ([] where it returns none).

        Args:
            sql: with %s placeholders; @schema@ stands for the schema of our tables. A statement that has it finds only
                the built-ins by their bare names. A statement that cannot run in a transaction (VACUUM) cannot be used.
            params: their values.
            timeout: seconds for all of it, connecting included; None: postgres_timeout.

        Raises BackendUnavailable when no answer came in time: the statement may have been applied. Raises PoolExhausted
        when all connections stayed in use for half of that time: nothing was sent. Raises ConfigurationError when our
        tables are missing, BackendError for any other error in answer.
        """
        if "@schema@" in sql:  # ours: a caller's own has the search_path as it is
            sql = PINNED + sql
        if self._only_reads():
            with self.transaction(timeout=timeout) as tx:
                return tx.fetch(sql, params)
        settings = self._settings
        if timeout is not None and timeout > self._timeout:
            settings = f"SET TRANSACTION {_ISOLATION}; {_set_statement_timeout(timeout)}"
        with self._borrowed(timeout) as (connection, deadline):
            return self._execute(connection, settings + sql, params, deadline)

    @contextlib.contextmanager
    def transaction(self, *, timeout: float | None = None) -> Iterator[Transaction]:
        """`with postgres.transaction() as tx: tx.fetch(...)`: commits where the body succeeds, rolls back otherwise.

        Raises as `fetch`, from each statement and from the commit. If the commit's answer is lost, nobody knows whether
        it took place. Where the body swallows a statement's error, the exit raises BackendError: nothing was committed.

        Args:
            timeout: seconds for all of it, the body included; None: postgres_timeout.
        """
        with self._borrowed(timeout) as (connection, deadline):
            begin = f"BEGIN {_ISOLATION}{', READ ONLY' if self._only_reads() else ''}; "
            begin += _set_statement_timeout(max(self._timeout, timeout or 0))
            self._execute(connection, begin, (), deadline, counted=False)
            try:
                yield Transaction(self, connection, deadline)
            except BaseException:
                with contextlib.suppress(BackendError):  # if so the connection is dropped, which rolls back as well
                    self._execute(connection, "ROLLBACK", (), deadline, counted=False)
                raise
            if connection.info.transaction_status != extensions.TRANSACTION_STATUS_INTRANS:
                raise BackendError(f"{self.name}: a statement of the transaction failed, so nothing was committed")
            self._execute(connection, "COMMIT", (), deadline, counted=False)

    @contextlib.contextmanager
    def _borrowed(self, timeout: float | None) -> Iterator[tuple[extensions.connection, float]]:
        notice_fork()
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        self._check()
        period = self.breaker.period
        connection: extensions.connection | None = None
        try:
            # Half of the time to wait for a connection: with less left for its statement, a server that is there would
            # be taken for away.
            connection = self._pool.take(timeout / 2, timeout / 2)
            if has_input(connection):  # the server's good-bye: nothing was asked
                self._pool.drop(connection)
                connection = None
                self._pool.drop_idle()
                connection = self._pool.take(deadline - time.monotonic())
            yield connection, deadline
        except ReadOnly:
            # After a failover or a changed setting a new connection may well write.
            if connection is not None and (self._writing.closed or self._is_replaying):
                self._pool.drop(connection)
                connection = None
                self._pool.drop_idle()
            raise
        except NoAnswer as error:
            if connection is not None:
                self._pool.drop(connection)
                connection = None
            self._pool.drop_idle()
            self.breaker.failed(period, error.reason, timed_out=error.timed_out)
            took = time.monotonic() - (deadline - timeout)
            self.latency.add(took)
            self.breaker.note_slow(took)
            raise BackendUnavailable(str(error)) from error.__cause__
        else:
            self.breaker.succeeded()
        finally:
            if connection is not None:
                self._put_back(connection)

    def _put_back(self, connection: extensions.connection) -> None:
        if connection not in self._pool.live:
            return  # this process was forked meanwhile, and the connection is the parent's
        # A signal or a soft time limit may have struck between statement and answer.
        in_step = (
            not connection.closed
            and not connection.isexecuting()
            and connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
        )
        if in_step:
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
        notice_fork()
        if connection not in self._pool.live:
            raise BackendUnavailable(f"this connection to {self.name} is the parent process's: its transaction is too")
        if time.monotonic() >= deadline:  # our own slowness, no matter for the breaker
            raise BackendUnavailable(f"no time was left to ask {self.name}")
        if counted:
            self.statements += 1
        began = time.monotonic()
        try:
            # Anything that came since the last reply does not answer this statement: libpq reads it now, and drops it.
            connection.poll()
            cursor = connection.cursor()
            cursor.execute(sql.replace("@schema@", self._schema), params or None)
            self._connector.wait(connection, deadline)
            if counted:
                self.latency.add(time.monotonic() - began)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg2.Error as error:
            raise self._mapped(error, connection) from error

    def _mapped(self, error: psycopg2.Error, connection: extensions.connection) -> Exception:
        mapped = self._errors.of_statement(error, connection)
        if isinstance(mapped, ReadOnly):
            self._read_only = True
            self.breaker.cannot_serve("cannot write")
        return mapped

    # -- migrations ----------------------------------------------------------------------------------------------

    def migrate(self) -> list[str]:
        """Bring our tables up to date. Returns the names of the migrations that were applied.

        The role that runs it first owns our tables and functions, and must run it from then on. The schema is made if
        it does not exist. Rows of our key prefix that an earlier version wrote are brought into today's form, once. So
        run it under each prefix; if a prefix begins another, under the longer of the two first. Several processes may
        run it at once: they take turns under an advisory lock. All migrations are applied in one transaction, so a
        failure leaves nothing behind.

        Raises ConfigurationError for a database whose encoding is not UTF8, and for a schema in which others have put
        stand-ins for built-ins or for our tables. Raises it too where the search_path has our tables in another schema
        than the setting. Raises BackendUnavailable, BackendError.
        """
        with self.transaction(timeout=_MIGRATION_TIMEOUT) as tx:
            return Migrations(self.name, self._schema, self._prefix).apply(tx.fetch)

    def missing_migrations(self, *, timeout: float | None = None) -> list[str]:
        """The names of the migrations that `migrate` would apply. Reads only."""

        def fetch(sql: str) -> list[Row]:
            return self.fetch(sql, timeout=timeout)

        return Migrations(self.name, self._schema, self._prefix).missing(fetch)

    # -- life ----------------------------------------------------------------------------------------------------

    def replay_soon(self, why: str) -> None:
        """Something for a replay was noted: use PostgreSQL no more until the replays have run.

        A read-only server is still read meanwhile, and written to only after the replays.
        """
        notice_fork()
        (self._writing if self._read_only else self.breaker).trip(why)

    @property
    def is_owed(self) -> bool:
        """Is the server read-only, and do replays wait until it takes writes?"""
        return not self._writing.closed

    def _only_reads(self) -> bool:
        """Do replays wait, so that nothing else may be written?"""
        if self._writing.closed or self._is_replaying:
            return False
        notice_fork()
        with contextlib.suppress(BackendUnavailable):
            self._writing.check()  # which probes, where no thread can
        return not self._writing.closed

    def _probe(self) -> None:
        try:
            self._ask("SELECT 1")
        except NoAnswer as error:
            raise BackendUnavailable(error.reason) from error
        except BackendError:
            pass  # the server is back, and callers must see the error
        self._pool.drop_idle()
        try:
            self._replay()
        except ReadOnly as error:
            self._writing.trip(str(error))

    def _probe_writing(self) -> None:
        if self._ask("SHOW transaction_read_only") != ("off",):
            raise ReadOnly("it is read-only")
        self._read_only = False
        self._pool.drop_idle()
        self._replay()

    def _ask(self, sql: str) -> Any:
        """The first row of the answer, over a new connection, which shows the server as it is now.

        A pooler may accept the connection without a server, so connecting alone tells nothing. The timeout is that of
        every call: a shorter one would never let a distant server back in.
        """
        deadline = time.monotonic() + self._timeout
        connection = self._connector.connect(deadline)
        try:
            cursor = connection.cursor()
            cursor.execute(sql)
            self._connector.wait(connection, deadline)
            return cursor.fetchone()
        except psycopg2.Error as error:
            raise self._errors.of_connecting(error) from error
        finally:
            connection.close()

    def renew_after_fork(self) -> None:
        inherited = list(self._pool.live)
        self._pool.renew()
        self._renew_replays()
        self.latency = Histogram()
        for connection in inherited:
            # libpq would close it by Terminate on the socket that the parent still uses. psycopg2 leaves a connection
            # of another process alone; only the child's descriptor must go.
            try:
                os.close(connection.fileno())
            except (OSError, psycopg2.Error):
                pass

    def close(self) -> None:
        """Close the idle connections and end the probe."""
        notice_fork()
        self.breaker.close()
        self._writing.close()
        self._pool.drop_idle()


class Transaction(Uncopied):
    """An open transaction: see `Postgres.transaction`."""

    def __init__(self, postgres: Postgres, connection: extensions.connection, deadline: float) -> None:
        self._postgres = postgres
        self._connection = connection
        self._deadline = deadline

    def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """Run one statement in this transaction. Returns its rows. Raises as `Postgres.fetch`."""
        return self._postgres._execute(self._connection, sql, params, self._deadline)


def _set_statement_timeout(seconds: float) -> str:
    """The setting by which a living server ends a statement, and its wait for locks, before its caller gives up."""
    return f"SET LOCAL statement_timeout = {max(1, int(seconds * _SERVER_SHARE * 1000))}; "


def _disconnect(connection: extensions.connection) -> None:
    with contextlib.suppress(psycopg2.Error):
        connection.close()


def _parse(dsn: str) -> dict[str, str] | None:
    """The parameters; None where libpq does not take the DSN. Its error may quote the DSN, and ends here."""
    try:
        return dict(extensions.parse_dsn(dsn))
    except psycopg2.Error:
        return None
