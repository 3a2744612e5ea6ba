"""Where the story plays: Redis, a broker, PostgreSQL, a Celery worker with beat and a site, all started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import GovRedis
from ..config import Config
from ..testing.servers import PostgresServer, RedisServer
from . import background, traffic
from .board import STARTING, Board
from .processes import Processes
from .topologies import TOPOLOGIES, DemoRedis


@dataclass
class Stage:
    """`redis` may be taken away; `broker` is another one. `config`: the settings of a GovRedis on it."""

    redis: DemoRedis
    broker: RedisServer
    board: Board
    folder: Path
    config: dict[str, Any]
    url: str
    versions: str
    processes: Processes


@contextlib.contextmanager
def stage(topology: str) -> Iterator[Stage]:
    """All of it, until the end of the `with`: with one of TOPOLOGIES. Raises ServerError, ProcessError."""
    with contextlib.ExitStack() as ends:
        redis = ends.enter_context(TOPOLOGIES[topology]())
        # Messages are not a cache: a broker keeps what it was given.
        broker = ends.enter_context(RedisServer(persistent=True))
        postgres = ends.enter_context(PostgresServer())
        # Inside the broker's temporary folder, which its keeper removes even if this process is killed.
        folder = broker.folder / "demo"
        folder.mkdir()
        board = Board(folder / "board")
        board.phase, board.epoch = STARTING, 1
        config: dict[str, Any] = {
            "redis_url": redis.url,
            "parking_url": broker.url,  # nor are those that wait for their limits
            "database_url": postgres.url,
            "postgres_timeout": 30.0,  # it is never taken away, and a machine that stalls for a while is no outage
            "lock_folder": str(folder / "locks"),
        }
        with GovRedis(Config(**config)) as gov:
            gov.postgres.migrate()
            gov.postgres.fetch(traffic.TABLE)
            gov.postgres.fetch(background.TABLE)
            versions = f"Redis {redis.primary.command('INFO', 'server')['redis_version']}, PostgreSQL " + str(
                gov.postgres.fetch("SHOW server_version")[0][0]
            )
        processes = ends.enter_context(Processes(folder))
        order = {"config": config, "broker": broker.url, "folder": str(folder)}
        processes.start("worker", "background", **order)
        processes.start("site", "site", **order)
        site = folder / "site"
        processes.until(site.exists, "the site's start")
        yield Stage(redis, broker, board, folder, config, site.read_text(), versions, processes)
