"""Postgres on a real server: statements, transactions, deadlines, outages, forks, migrations."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from support import PATIENCE, Child, eventually, in_threads

from govredis import BackendError, BackendUnavailable, Config, ConfigurationError, _migrations
from govredis import _pool as pool_module
from govredis.breaker import Rejected
from govredis.postgres import Json, Postgres, Transaction
from govredis.postgres import postgres as postgres_module
from govredis.testing.servers import PostgresServer

MakePostgres = Callable[..., Postgres]


@pytest.fixture
def make_postgres() -> Iterator[MakePostgres]:
    made: list[Postgres] = []

    def make(server: PostgresServer, **settings: Any) -> Postgres:
        postgres = Postgres(Config(**{"database_url": server.url, "postgres_timeout": 20, **settings}))
        made.append(postgres)
        return postgres

    yield make
    for postgres in made:
        postgres.close()


@pytest.fixture
def postgres(postgres_server: PostgresServer, make_postgres: MakePostgres) -> Postgres:
    """With a table `things (n integer primary key)` of the test's own."""
    made = make_postgres(postgres_server)
    # Statements that outlived a test's connections may hold the table.
    made.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'govredis' AND pid <> pg_backend_pid()"
    )
    made.fetch("DROP TABLE IF EXISTS things")
    made.fetch("CREATE TABLE things (n integer PRIMARY KEY)")
    return made


@pytest.fixture
def empty_database(postgres_server: PostgresServer) -> Iterator[str]:
    """The url of a database without our tables."""
    owner = psycopg2.connect(postgres_server.url)
    owner.autocommit = True
    with owner.cursor() as cursor:
        cursor.execute("CREATE DATABASE empty_one")
        yield postgres_server.url.removesuffix("/postgres") + "/empty_one"
        cursor.execute("DROP DATABASE empty_one WITH (FORCE)")
    owner.close()


def works(postgres: Postgres) -> bool:
    try:
        return postgres.fetch("SELECT 1") == [(1,)]
    except BackendUnavailable:
        return False


def things(postgres: Postgres) -> list[int]:
    return [n for (n,) in postgres.fetch("SELECT n FROM things ORDER BY n")]


def backend(postgres: Postgres) -> int:
    pid = postgres.fetch("SELECT pg_backend_pid()")[0][0]
    assert isinstance(pid, int)
    return pid


def clean(postgres: Postgres) -> None:
    """All that is pooled is out of any transaction."""
    for connection in postgres._pool.idle:
        assert not connection.closed
        assert not connection.isexecuting()
        assert connection.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE


# -- statements


def test_fetch(postgres: Postgres) -> None:
    assert postgres.fetch("SELECT 1, 'a', NULL, %s::jsonb", (Json({"a": [1]}),)) == [(1, "a", None, {"a": [1]})]
    assert postgres.fetch("SELECT n FROM things") == []
    assert postgres.fetch("INSERT INTO things VALUES (1), (2)") == []
    assert postgres.fetch("DELETE FROM things WHERE n = %s RETURNING n", (1,)) == [(1,)]
    assert postgres.fetch("SELECT '100%'") == [("100%",)]  # no parameters, no placeholders
    assert things(postgres) == [2]


def test_one_connection_serves_one_caller_after_another(postgres: Postgres) -> None:
    assert len({backend(postgres) for _ in range(5)}) == 1


def test_statements_are_counted(postgres: Postgres) -> None:
    before = postgres.statements
    postgres.fetch("SELECT 1")
    with postgres.transaction() as tx:
        tx.fetch("SELECT 1")
        tx.fetch("SELECT 2")
    assert postgres.statements == before + 3


def test_an_error_answer_is_a_backend_error_and_the_connection_goes_on(postgres: Postgres) -> None:
    pid = backend(postgres)
    for _ in range(3):
        with pytest.raises(
            BackendError, match=r"^PostgreSQL at 127.0.0.1:\d+/postgres answered: division by"
        ) as caught:
            postgres.fetch("SELECT 1/0")
        assert not isinstance(caught.value, BackendUnavailable)
        assert caught.value.__cause__ is not None
    assert backend(postgres) == pid
    assert postgres.breaker.closed
    clean(postgres)


def test_a_parameter_that_cannot_be_sent_is_no_outage(postgres: Postgres) -> None:
    pid = backend(postgres)
    for params, kind in (((object(),), BackendError), ((1, 2), TypeError), ((), IndexError), (("\0",), ValueError)):
        for _ in range(2):
            with pytest.raises(kind) as caught:
                postgres.fetch("SELECT %s" if params else "SELECT %s, %s", params or (1,))
            assert not isinstance(caught.value, BackendUnavailable)
    assert postgres.breaker.closed
    assert backend(postgres) == pid


def test_a_missing_table_names_the_command_that_makes_it(postgres: Postgres) -> None:
    for sql in ("SELECT * FROM no_such_table", "SELECT no_such_function()", "SELECT n, no_such_column FROM things"):
        with pytest.raises(ConfigurationError, match=r"does not exist.*Run `govredis migrate`"):
            postgres.fetch(sql)
        with pytest.raises(ConfigurationError, match=r"govredis migrate"), postgres.transaction() as tx:
            tx.fetch(sql)
    clean(postgres)
    assert postgres.breaker.closed


# -- transactions


def test_a_transaction_commits(postgres: Postgres) -> None:
    with postgres.transaction() as tx:
        assert isinstance(tx, Transaction)
        tx.fetch("INSERT INTO things VALUES (1)")
        assert tx.fetch("INSERT INTO things VALUES (%s) RETURNING n", (2,)) == [(2,)]
        assert things(postgres) == []
    assert things(postgres) == [1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, BackendUnavailable, GeneratorExit])
def test_an_exception_in_the_body_rolls_back_and_the_connection_is_used_again(
    postgres: Postgres, error: type[BaseException]
) -> None:
    pid = backend(postgres)
    with pytest.raises(error, match=r"^the body's own$"), postgres.transaction() as tx:
        tx.fetch("INSERT INTO things VALUES (1)")
        raise error("the body's own")
    clean(postgres)
    assert backend(postgres) == pid
    assert things(postgres) == []
    assert postgres.breaker.closed


def test_a_failed_statement_rolls_back(postgres: Postgres) -> None:
    pid = backend(postgres)
    with pytest.raises(BackendError, match=r"division by zero"), postgres.transaction() as tx:
        tx.fetch("INSERT INTO things VALUES (1)")
        tx.fetch("SELECT 1/0")
    clean(postgres)
    assert things(postgres) == []
    assert backend(postgres) == pid


def test_a_swallowed_error_does_not_look_like_a_commit(postgres: Postgres) -> None:
    with pytest.raises(BackendError, match=r"nothing was committed"), postgres.transaction() as tx:
        tx.fetch("INSERT INTO things VALUES (1)")
        with pytest.raises(BackendError, match=r"division by zero"):
            tx.fetch("SELECT 1/0")
    assert things(postgres) == []
    clean(postgres)


def test_a_swallowed_timeout_does_not_look_like_a_commit(postgres: Postgres) -> None:
    wait = postgres._connector.wait
    with pytest.raises(BackendError, match=r"nothing was committed"), postgres.transaction() as tx:
        tx.fetch("INSERT INTO things VALUES (1)")
        # It begins with the statement, so that a stall before that is no matter.
        postgres._connector.wait = lambda asked, _: wait(asked, time.monotonic() + 1)  # type: ignore[method-assign]
        with pytest.raises(BackendUnavailable, match="no answer within the deadline"):
            tx.fetch("SELECT pg_sleep(20)")
        postgres._connector.wait = wait  # type: ignore[method-assign]
    eventually(lambda: works(postgres))
    assert things(postgres) == []


def test_a_deferred_constraint_fails_at_the_commit(postgres: Postgres) -> None:
    postgres.fetch("ALTER TABLE things ADD other integer REFERENCES things (n) DEFERRABLE INITIALLY DEFERRED")
    with pytest.raises(BackendError, match=r"foreign key"), postgres.transaction() as tx:
        tx.fetch("INSERT INTO things VALUES (1, 7)")
    clean(postgres)
    assert things(postgres) == []


class Clock:
    """In place of the module `time`. Moved on, it makes a body slow, and nothing else too late."""

    offset = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.offset


def test_a_slow_body_is_told_so_and_the_server_is_not_blamed(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in postgres_module, pool_module:  # the one hands its deadlines to the other
        monkeypatch.setattr(module, "time", clock)
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match=r"no time was left"), postgres.transaction(timeout=20) as tx:
            tx.fetch("INSERT INTO things VALUES (1)")
            clock.offset += 21
        with pytest.raises(RuntimeError, match=r"mine"), postgres.transaction(timeout=20) as tx:
            tx.fetch("INSERT INTO things VALUES (1)")
            clock.offset += 21
            raise RuntimeError("mine")
    assert postgres.breaker.closed
    assert things(postgres) == []
    clean(postgres)


# -- deadlines


def test_a_slow_statement_ends_at_the_callers_timeout(
    postgres_server: PostgresServer, make_postgres: MakePostgres
) -> None:
    postgres = make_postgres(postgres_server, postgres_timeout=10 * PATIENCE)
    pid = backend(postgres)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"^PostgreSQL at .* is away: no answer within the deadline$"):
        postgres.fetch(f"SELECT pg_sleep({5 * PATIENCE})", timeout=1)
    assert time.monotonic() - began < PATIENCE
    eventually(lambda: works(postgres))
    assert backend(postgres) != pid


def test_a_longer_timeout_than_the_settings_is_kept_too(
    postgres_server: PostgresServer, make_postgres: MakePostgres
) -> None:
    postgres = make_postgres(postgres_server, postgres_timeout=1.5)
    assert postgres.fetch("SELECT 1, pg_sleep(1.8)::text", timeout=20) == [(1, "")]
    with postgres.transaction(timeout=20) as tx:
        tx.fetch("SELECT pg_sleep(1.8)")
    # And nobody else inherits it.
    postgres._timeout = 20  # the setting that is asked for was made of the other; a stall must not be an outage
    assert postgres.fetch("SHOW statement_timeout") == [("1350ms",)]


def test_a_statement_does_not_outlive_its_caller_for_long(
    postgres_server: PostgresServer, make_postgres: MakePostgres, postgres: Postgres
) -> None:
    hasty = make_postgres(postgres_server, postgres_timeout=0.2)
    with postgres.transaction() as tx:
        tx.fetch("INSERT INTO things VALUES (1)")
        with pytest.raises(BackendUnavailable):
            hasty.fetch("INSERT INTO things VALUES (1)")  # waits for our lock
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'INSERT%%'"
        eventually(lambda: postgres.fetch(waiting) == [(0,)])
        tx.fetch("DELETE FROM things")
    assert things(postgres) == []


def test_hung(mortal_postgres: PostgresServer, make_postgres: MakePostgres) -> None:
    pooled, fresh = (make_postgres(mortal_postgres, postgres_timeout=10 * PATIENCE) for _ in range(2))
    assert works(pooled)
    mortal_postgres.pause()
    for each in (pooled, fresh):  # with a connection, and with one to make
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"no answer within the deadline"):
            each.fetch("SELECT 1", timeout=1)
        assert 1 <= time.monotonic() - began < PATIENCE
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(BackendUnavailable):
                each.fetch("SELECT 1")
        assert time.monotonic() - began < PATIENCE
    mortal_postgres.resume()
    for each in (pooled, fresh):
        eventually(lambda: works(each))  # noqa: B023
        assert each.breaker.times_opened == 1


def test_hung_in_the_middle_of_a_transaction(mortal_postgres: PostgresServer, make_postgres: MakePostgres) -> None:
    postgres = make_postgres(mortal_postgres)
    postgres.fetch("CREATE TABLE things (n integer)")
    with pytest.raises(BackendUnavailable), postgres.transaction(timeout=1.5) as tx:
        tx.fetch("INSERT INTO things VALUES (1)")
        mortal_postgres.pause()
        tx.fetch("INSERT INTO things VALUES (2)")
    mortal_postgres.resume()
    eventually(lambda: works(postgres))
    assert things(postgres) == []


def test_killed_and_restarted(mortal_postgres: PostgresServer, make_postgres: MakePostgres) -> None:
    postgres = make_postgres(mortal_postgres)
    for connection in [postgres._pool.take(20) for _ in range(3)]:
        postgres._pool.give(connection)
    assert len(postgres._pool.idle) == 3
    mortal_postgres.restart()
    # The dead pooled connections are invisible to the caller.
    assert postgres.fetch("SELECT 1") == [(1,)]
    mortal_postgres.kill()
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=r"is away"):
            postgres.fetch("SELECT 1")
    assert not postgres.breaker.closed
    postgres._pool._connect = lambda _: pytest.fail("an open breaker does not connect")  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable) as caught:
        postgres.fetch("SELECT 1")
    assert str(caught.value).count(postgres.name) == 1
    postgres._pool._connect = postgres._connector.connect  # type: ignore[method-assign]
    mortal_postgres.start()
    eventually(lambda: works(postgres))


def test_terminated_in_the_middle_of_a_statement(postgres: Postgres, postgres_server: PostgresServer) -> None:
    pid = backend(postgres)

    def terminate() -> None:
        with psycopg2.connect(postgres_server.url) as other, other.cursor() as cursor:

            def sleeps() -> bool:
                cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'", (pid,))
                return cursor.fetchone() is not None

            eventually(sleeps)
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))
        other.close()

    def sleep() -> None:
        with pytest.raises(BackendUnavailable):
            postgres.fetch("SELECT pg_sleep(19)")

    in_threads(sleep, terminate)
    assert works(postgres)
    assert backend(postgres) != pid


# -- the pool


def test_a_full_pool(postgres_server: PostgresServer, make_postgres: MakePostgres) -> None:
    postgres = make_postgres(postgres_server, postgres_connections=2)
    with postgres.transaction(), postgres.transaction():
        with pytest.raises(BackendUnavailable, match=r"all 2 connections to PostgreSQL at .* are in use"):
            postgres.fetch("SELECT 1", timeout=0.1)
        assert postgres.breaker.closed
    assert works(postgres)


def test_sixteen_threads_never_make_more_connections_than_allowed(
    postgres_server: PostgresServer, make_postgres: MakePostgres, postgres: Postgres
) -> None:
    shared = make_postgres(postgres_server, postgres_connections=5)
    barrier = threading.Barrier(16)
    most = []

    def use(thread: int) -> None:
        barrier.wait(20)
        for n in range(15):
            key = thread * 100 + n
            assert shared.fetch("SELECT %s", (key,)) == [(key,)]
            with shared.transaction() as tx:
                tx.fetch("INSERT INTO things VALUES (%s)", (key,))
            most.append(len(shared._pool.live))

    in_threads(*[lambda t=t: use(t) for t in range(16)])  # type: ignore[misc]
    assert len(things(postgres)) == 16 * 15
    assert max(most) <= 5
    clean(shared)


# -- interruption


class Struck(BaseException):
    pass


def test_an_interrupt_in_the_middle_of_a_statement_propagates_and_costs_the_connection(postgres: Postgres) -> None:
    """As Ctrl-C does: a real signal, during the wait for the answer."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    pid = backend(postgres)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for use in ("fetch", "transaction"):
            signal.setitimer(signal.ITIMER_REAL, 1)
            with pytest.raises(KeyboardInterrupt):
                if use == "fetch":
                    postgres.fetch("SELECT pg_sleep(19)")
                else:
                    with postgres.transaction() as tx:
                        tx.fetch("INSERT INTO things VALUES (1)")
                        tx.fetch("SELECT pg_sleep(19)")
            assert not postgres._pool.idle
            assert postgres.breaker.closed
            assert backend(postgres) != pid
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert things(postgres) == []


@pytest.mark.usefixtures("destructors_struck")
def test_a_signal_at_any_point_gives_nobody_anothers_rows(
    postgres_server: PostgresServer, make_postgres: MakePostgres
) -> None:
    postgres = make_postgres(postgres_server, postgres_connections=3)
    armed = False

    def strike(*_: Any) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Struck

    previous = signal.signal(signal.SIGALRM, strike)
    struck = 0
    try:
        for n in itertools.count():
            if struck >= 300:
                break
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 2e-5 + (n % 97) * 5e-6)
                if n % 2:
                    assert postgres.fetch("SELECT %s", (n,)) == [(n,)]
                else:
                    with postgres.transaction() as tx:
                        assert tx.fetch("SELECT %s", (n,)) == [(n,)]
                armed = False
            except Struck:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    clean(postgres)
    assert sum(1 for _ in postgres._pool.live) <= 3
    with postgres.transaction(), postgres.transaction(), postgres.transaction() as tx:  # every place is there
        assert tx.fetch("SELECT 1") == [(1,)]
    assert postgres.breaker.closed


# -- fork


def test_parent_and_children_work_on_after_a_fork(postgres: Postgres) -> None:
    pid = backend(postgres)

    def hammer(who: int) -> None:
        for n in range(50):
            key = who * 1000 + n
            assert postgres.fetch("SELECT %s", (key,)) == [(key,)]
            with postgres.transaction() as tx:
                tx.fetch("INSERT INTO things VALUES (%s)", (key,))

    children = [Child(lambda n=n: (hammer(n), postgres.close())) for n in range(1, 4)]  # type: ignore[misc]
    hammer(0)
    for child in children:
        child.result()
    assert len(things(postgres)) == 200
    assert backend(postgres) == pid


def test_a_child_forked_inside_a_transaction_leaves_it_to_its_parent(postgres: Postgres) -> None:
    refused, pid, own_backend = False, -1, 0
    try:
        with postgres.transaction() as tx:
            tx.fetch("INSERT INTO things VALUES (1)")
            pid = os.fork()
            if pid:
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                assert tx.fetch("SELECT n FROM things ORDER BY n") == [(1,), (3,)]
            else:
                with pytest.raises(BackendUnavailable, match="is the parent process's"):
                    tx.fetch("INSERT INTO things VALUES (2)")
                with postgres.transaction() as own:
                    own.fetch("INSERT INTO things VALUES (3)")
                own_backend = backend(postgres)
    except BackendUnavailable:
        refused = True  # the child cannot commit
    finally:
        if not pid:
            # Leaving the block, it closed no descriptor of a number that it has given to its own connection meanwhile.
            os._exit(7 if refused and backend(postgres) == own_backend else 1)
    assert not refused
    assert things(postgres) == [1, 3]


def test_close_gives_everything_back(postgres_server: PostgresServer) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    threads_before, before = set(threading.enumerate()), descriptors()
    for _ in range(5):
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=20))
        in_threads(*[lambda p=postgres: p.fetch("SELECT 1")] * 3)  # type: ignore[misc]
        postgres.breaker.trip("a test")
        postgres.close()
        postgres.close()
    assert descriptors() == before
    assert set(threading.enumerate()) <= threads_before


# -- migrations


def test_missing_tables_and_migrate(empty_database: str, make_postgres: MakePostgres) -> None:
    postgres = Postgres(Config(database_url=empty_database, postgres_timeout=20))
    try:
        names = postgres.missing_migrations()
        assert names == sorted(names)
        assert names[0].startswith("0001_")
        with pytest.raises(ConfigurationError, match=r"govredis migrate"):
            postgres.fetch("SELECT * FROM govredis_agents")
        assert postgres.migrate() == names
        assert postgres.missing_migrations() == []
        assert postgres.fetch("SELECT * FROM govredis_agents") == []
        assert postgres.migrate() == []
        assert postgres.fetch("SELECT name FROM govredis_migrations ORDER BY name") == [(n,) for n in names]
    finally:
        postgres.close()


def test_migrate_where_a_backslash_in_a_string_escapes(empty_database: str) -> None:
    postgres = Postgres(Config(database_url=empty_database, postgres_timeout=20))
    postgres.fetch("ALTER DATABASE empty_one SET standard_conforming_strings = off")
    postgres.close()
    assert postgres.migrate()
    postgres.fetch("SELECT @schema@.govredis_outbox_watch('public.govredis_agents', 'agent_id', 'mine')")
    (watched,) = postgres.fetch(
        "SELECT DISTINCT id_column FROM @schema@.govredis_outbox_watched WHERE namespace = 'mine'"
    )
    assert watched == ("agent_id",)
    postgres.close()


def test_four_processes_migrate_at_once(empty_database: str, tmp_path: Path) -> None:
    postgres = Postgres(Config(database_url=empty_database, postgres_timeout=20))
    names = postgres.missing_migrations()

    def migrate(n: int) -> None:
        (tmp_path / str(n)).write_text(" ".join(postgres.migrate()))

    for child in [Child(lambda n=n: migrate(n)) for n in range(4)]:  # type: ignore[misc]
        child.result()
    assert sorted((tmp_path / str(n)).read_text() for n in range(4)) == ["", "", "", " ".join(names)]
    assert postgres.missing_migrations() == []
    postgres.close()


def test_a_failed_migration_leaves_nothing(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _migrations.read_files()
    broken = [
        ("0001_good.sql", "CREATE TABLE good (n integer)"),
        ("0002_bad.sql", "CREATE TABLE bad (n integer); oops"),
    ]
    postgres = Postgres(Config(database_url=empty_database, postgres_timeout=20))
    monkeypatch.setattr(_migrations, "read_files", lambda: broken)
    with pytest.raises(BackendError, match=r"syntax error"):
        postgres.migrate()
    assert postgres.fetch("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    assert postgres.missing_migrations() == ["0001_good.sql", "0002_bad.sql"]
    monkeypatch.setattr(_migrations, "read_files", lambda: real)
    assert postgres.migrate() == [name for name, _ in real]
    postgres.close()


def test_a_migration_may_take_longer_than_the_timeout(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [("0001_slow.sql", "SELECT pg_sleep(1)")]
    monkeypatch.setattr(_migrations, "read_files", lambda: slow)
    postgres = Postgres(Config(database_url=empty_database, postgres_timeout=0.5))
    assert postgres.migrate() == ["0001_slow.sql"]
    postgres.close()


# -- settings


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:hunter2@h/d?foo=1",
        "postgresql://u:hunter2%zz@h/d",
        "postgresql://u:%00hunter2@h/d",
        "postgresql://h/d?password=hunter2%zz",
    ],
)
def test_a_url_that_libpq_does_not_take_is_refused_without_its_password(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^GOVREDIS_DATABASE_URL is .*; it must be a URL") as caught:
        Postgres(Config(database_url=dsn))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None  # a traceback shows suppressed ones to anybody who looks


def test_no_password_in_any_error(postgres_server: PostgresServer, make_postgres: MakePostgres) -> None:
    right = postgres_server.url.split(":")[2].split("@")[0]
    wrong = make_postgres(postgres_server, database_url=postgres_server.url.replace(right, "hunter2"))
    for _ in range(3):
        with pytest.raises(BackendError) as caught:
            wrong.fetch("SELECT 1")
        assert "hunter2" not in str(caught.value)
    assert "hunter2" not in wrong.name
    assert right not in make_postgres(postgres_server).name


def test_a_contended_row_is_no_outage(
    postgres_server: PostgresServer, make_postgres: MakePostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server says so a tenth of it sooner than we would give up. After a stall of the machine both would be late.
    assert postgres_module._SERVER_SHARE == 0.9
    monkeypatch.setattr(postgres_module, "_SERVER_SHARE", 1 / PATIENCE)
    hasty, other = make_postgres(postgres_server, postgres_timeout=PATIENCE), make_postgres(postgres_server)
    other.fetch("INSERT INTO govredis_agents (agent_id, metadata) VALUES ('a', '{}')")
    with other.transaction() as tx:
        tx.fetch("UPDATE govredis_agents SET status = 'archived'")
        with pytest.raises(BackendUnavailable, match="statement timeout"):
            hasty.fetch("UPDATE govredis_agents SET status = 'active'")
        assert hasty.breaker.closed
        assert hasty.fetch("SELECT 1") == [(1,)]


def test_a_standby_is_unavailable_for_writes_and_no_outage(
    postgres_server: PostgresServer, make_postgres: MakePostgres
) -> None:
    postgres = make_postgres(postgres_server)
    with pytest.raises(BackendUnavailable, match="read-only"), postgres.transaction() as tx:
        tx.fetch("SET TRANSACTION READ ONLY")
        tx.fetch("DELETE FROM govredis_agents")
    assert postgres.breaker.closed


def test_rejected_credentials_are_a_mistake_and_no_outage(
    postgres_server: PostgresServer, make_postgres: MakePostgres
) -> None:
    for url in (
        postgres_server.url.replace("/postgres", "/nosuch"),
        postgres_server.url.replace("//postgres", "//nobody_here"),
    ):
        postgres = make_postgres(postgres_server, database_url=url)
        for _ in range(3):
            with pytest.raises(BackendError, match="rejects us") as caught:
                postgres.fetch("SELECT 1")
            assert not isinstance(caught.value, BackendUnavailable)
        assert postgres.breaker.closed


def test_a_server_lost_inside_a_transaction_is_said_so(postgres: Postgres) -> None:
    with pytest.raises(BackendUnavailable), postgres.transaction() as tx:
        (pid,) = tx.fetch("SELECT pg_backend_pid()")[0]
        postgres.fetch("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        tx.fetch("SELECT 1")
    assert postgres.fetch("SELECT 1") == [(1,)]


# -- recovery


def test_replays_run_before_anybody_else_uses_it_again(postgres: Postgres) -> None:
    entered, go = threading.Event(), threading.Event()

    def replay(server: Postgres) -> None:
        server.fetch("INSERT INTO things VALUES (1)")
        entered.set()
        go.wait(20)
        with server.transaction() as tx:
            tx.fetch("INSERT INTO things VALUES (2)")

    postgres.on_recovery(replay)
    postgres.replay_soon("writes are pending")
    assert entered.wait(20)
    with pytest.raises(BackendUnavailable, match="writes are pending"):
        postgres.fetch("SELECT 1")
    go.set()
    eventually(lambda: works(postgres))
    assert things(postgres) == [1, 2]
    assert postgres.breaker.times_opened == 1


@pytest.mark.parametrize("error", [BackendUnavailable("gone again"), Rejected("gone again")], ids=repr)
def test_a_replay_that_gets_no_answer_keeps_it_closed_to_all(postgres: Postgres, error: Exception) -> None:
    runs: list[bool] = []

    def replay(server: Postgres) -> None:
        runs.append(server.breaker.closed)
        if len(runs) < 3:
            raise error

    postgres.on_recovery(replay)
    postgres.breaker.trip("a test")
    eventually(lambda: postgres.breaker.reason == "gone again")
    eventually(lambda: works(postgres))
    assert runs == [False] * 3


def test_another_error_of_a_replay_is_logged_and_harms_nobody(
    postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []
    postgres.on_recovery(lambda server: server.fetch("SELECT 1 / 0") and None)
    postgres.on_recovery(ran.append)
    postgres.breaker.trip("a test")
    eventually(lambda: works(postgres))
    assert ran == [postgres]
    assert sum("a replay on PostgreSQL at" in record.getMessage() for record in caplog.records) == 1


def test_rejected_credentials_in_a_replay_are_no_answer(
    postgres_server: PostgresServer, make_postgres: MakePostgres
) -> None:
    postgres = make_postgres(postgres_server, database_url=postgres_server.url.replace("/postgres", "/nosuch"))
    pending = ["a write"]

    def replay(server: Postgres) -> None:
        if pending:
            server.fetch("SELECT 1")

    postgres.on_recovery(replay)
    postgres.replay_soon("writes are pending")
    eventually(lambda: "rejects us" in postgres.breaker.reason)
    assert not postgres.breaker.closed
    pending.clear()
    eventually(lambda: postgres.breaker.closed)
