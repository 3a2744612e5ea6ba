"""Databases of a test's own, and those who come to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from schema_world import PASSWORD, Connect, Migrate, Sql

from govredis import Config, _migrations
from govredis.postgres import Postgres
from govredis.testing.servers import PostgresServer

_numbers = itertools.count()


@pytest.fixture
def make_database(shared_postgres: PostgresServer) -> Iterator[Callable[..., str]]:
    """Makes empty databases; returns their urls, the superuser's."""
    owner = psycopg2.connect(shared_postgres.url)
    owner.autocommit = True
    made: list[str] = []

    def make(options: str = "") -> str:
        name = f"schema_test_{next(_numbers)}"
        with owner.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} {options}")
        made.append(name)
        return shared_postgres.url.removesuffix("/postgres") + f"/{name}"

    yield make
    with owner.cursor() as cursor:
        for name in made:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    owner.close()


@pytest.fixture
def database(make_database: Callable[..., str]) -> str:
    return make_database()


@pytest.fixture
def connect(database: str) -> Iterator[Connect]:
    """Connections to `database`: of its superuser, or of another role. Each statement is committed."""
    made: list[Any] = []

    def make(role: str | None = None) -> Sql:
        user = {} if role is None else {"user": role, "password": PASSWORD}
        connection = psycopg2.connect(database, **user)
        connection.autocommit = True
        made.append(connection)

        def run(text: str, *params: Any) -> list[Any]:
            with connection.cursor() as cursor:
                cursor.execute(text, params or None)
                return cursor.fetchall() if cursor.description else []

        return run

    yield make
    for connection in made:
        connection.close()


@pytest.fixture
def sql(connect: Connect) -> Sql:
    return connect()


@pytest.fixture
def migrate(database: str, monkeypatch: pytest.MonkeyPatch) -> Migrate:
    """Runs `migrate` on `database`, as a process with these settings. `only`: the first so many migrations, as an
    earlier version of govredis had them."""

    def run(only: int | None = None, **settings: Any) -> list[str]:
        every = _migrations.read_files()
        postgres = Postgres(Config(**{"database_url": database, "postgres_timeout": 20, **settings}))
        try:
            with monkeypatch.context() as patch:
                patch.setattr(_migrations, "read_files", lambda: every[:only])
                return postgres.migrate()
        finally:
            postgres.close()

    return run


@pytest.fixture
def make_role(connect: Connect) -> Iterator[Callable[[str], str]]:
    """Makes roles that may connect, and nothing else. They end with the test."""
    made: list[str] = []

    def make(kind: str) -> str:
        name = f"{kind}_{next(_numbers)}"
        connect()(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
        made.append(name)
        return name

    yield make
    sql = connect()
    for name in made:
        sql(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = '{name}'")
        sql(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
