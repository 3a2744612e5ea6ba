"""One fleet of real workers for all tests of this folder, on Redises and a PostgreSQL of their own.

Not for each redis-server found: these tests ask what Celery does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from celery_fleet import NEVER, Fleet, in_app

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer, RedisServer


@pytest.fixture(scope="session")
def celery_redis() -> Iterator[RedisServer]:
    """The Redis of the limits and locks of the fleet's tasks. Lives as long as the fleet."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def celery_postgres(shared_postgres: PostgresServer) -> str:
    """A database of the fleet's own, with our tables: its URL. Other tests empty those of the shared one."""
    connection = psycopg2.connect(shared_postgres.url)
    connection.autocommit = True  # as CREATE DATABASE wants it
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE fleet")
    connection.close()
    url = shared_postgres.url.rsplit("/", 1)[0] + "/fleet"
    with GovRedis(Config(redis_enabled=False, database_url=url)) as gov:
        gov.postgres.migrate()
    return url


@pytest.fixture(scope="session")
def celery_settings(
    celery_redis: RedisServer, celery_postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Those of Config that everybody shares: nothing is taken for away because the machine is busy."""
    return {
        "redis_url": celery_redis.url,
        "database_url": celery_postgres,
        "lock_folder": str(tmp_path_factory.mktemp("locks")),
        "socket_timeout": 10,
        "connect_timeout": 10,
        "postgres_timeout": 10,
    }


@pytest.fixture(scope="session")
def celery_broker() -> Iterator[RedisServer]:
    with RedisServer(persistent=True) as server:
        yield server


@pytest.fixture(scope="session")
def short_broker() -> Iterator[RedisServer]:
    """The broker of the worker `short`, which publishes as the user "writer", and is refused."""
    with RedisServer(persistent=True) as server:
        server.command("ACL", "SETUSER", "writer", "on", ">writer", "~*", "&*", "+@all")
        yield server


@pytest.fixture(scope="session")
def mortal_cache() -> Iterator[RedisServer]:
    """The broker of the worker `mortal`, which tests kill and restart."""
    with RedisServer(persistent=True) as server:
        yield server


@pytest.fixture(scope="session")
def fleet(
    celery_broker: RedisServer,
    short_broker: RedisServer,
    mortal_cache: RedisServer,
    celery_settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    """The workers of these tests.

    - `first` and `second` are on the queues "pair" and "other", with four processes each.
    - `mortal`, with beat, has a Redis that may be killed.
    - `short` looks twice a second for messages whose visibility timeout is over, on a broker of its own.
    - `warm` has used everything before its children were forked, and replaces each after five tasks.
    """
    server = celery_broker.url.removesuffix("/0")
    fleet = Fleet(
        tmp_path_factory.mktemp("fleet"),
        {"broker": celery_broker.url, "backend": f"{server}/1", "evidence": f"{server}/2"},
    )
    try:
        for name in ("first", "second"):
            fleet.worker(name, "-c", "4", "-Q", "pair,other", queue="pair", conf=in_app(celery_settings, **NEVER))
        fleet.worker(
            "mortal",
            "-c",
            "2",
            beat=True,
            conf={
                **in_app(
                    celery_settings,
                    redis_url=mortal_cache.url,
                    lock_fallback="fail",
                    heartbeat_interval=0.5,
                    snapshot_interval=0.5,
                ),
                "beat_max_loop_interval": 0.1,
            },
        )
        fleet.worker(
            "short",
            "-c",
            "4",
            broker=short_broker.url,
            conf={
                **in_app(celery_settings, **NEVER),
                "worker_prefetch_multiplier": 0,
                "broker_write_url": short_broker.url.replace("//", "//writer:writer@"),
                "broker_transport_options": {
                    "unacked_restore_interval": 0.5,
                    "unacked_restore_throttle": 1,
                },
            },
        )
        fleet.worker("warm", "-c", "4", "--max-tasks-per-child", "5", warm=celery_settings, conf=in_app({}, **NEVER))
        fleet.wait_ready(*fleet.processes)
        fleet.needed = [*fleet.processes]
        yield fleet
    finally:
        fleet.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and fleet is not None:
        for name, log in fleet.logs():
            report.sections.append((f"log of {name}", log))
    return report
