"""The Celery application of the demo: a worker with beat, whose tasks are limited, invalidate and look at health."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from billiard import current_process
from celery import Celery
from celery.signals import task_prerun

from .._redact import redact
from ..api import GovRedis
from ..config import Config
from ..contrib.celery import init_celery, rate_limited
from ..limits import Limit
from .board import POOL, WEB, Board
from .processes import take_order

TABLE = (
    "CREATE TABLE demo_discoveries (number bigint PRIMARY KEY, runs integer NOT NULL DEFAULT 1,"
    " agent text NOT NULL, store text NOT NULL, began float8 NOT NULL, ended float8 NOT NULL)"
)
LIMIT = Limit(5, 1.0)
SECONDS_BETWEEN_SNAPSHOTS = 1.0


def make_app(gov: GovRedis, broker: str, folder: Path) -> Celery:
    """The app: for the worker that runs its tasks, and for the site that publishes them."""
    app = Celery("demo", broker=broker)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        worker_hijack_root_logger=False,
        govredis_heartbeat_interval=SECONDS_BETWEEN_SNAPSHOTS,
        govredis_snapshot_interval=SECONDS_BETWEEN_SNAPSHOTS,
    )
    if app.conf.broker_url != broker:
        raise RuntimeError(f"Celery would use {redact(app.conf.broker_url)}, which is not the demo's broker")
    init_celery(app, gov)
    board = Board(folder / "board")
    #: When the task of this process began, on which Redis, and how often PostgreSQL had decided a limit by then.
    before: list[Any] = []

    def in_postgres() -> int:
        return gov.counters.get("limits.degraded.postgres")

    @task_prerun.connect(weak=False)
    def begins(**_: Any) -> None:
        before[:] = perf_counter(), board.epoch, in_postgres()

    @app.task(name="demo.store_discovery")
    @rate_limited(LIMIT, key="{agent_id}", operation="demo_store")
    def store_discovery(agent_id: str, number: int) -> None:
        began, epoch, decided = before
        store = "postgres" if in_postgres() > decided else f"redis {epoch}"
        gov.postgres.fetch(
            "INSERT INTO demo_discoveries (number, agent, store, began, ended) VALUES (%s, %s, %s, %s, %s)"
            " ON CONFLICT (number) DO UPDATE SET runs = demo_discoveries.runs + 1",
            (number, agent_id, store, began, perf_counter()),
        )

    @app.task(name="demo.invalidated")
    def invalidated(agent: int, version: int) -> None:
        board.promise(WEB + current_process().index, agent, version)

    return app


def main() -> None:
    order: dict[str, Any] = take_order()
    with GovRedis(Config(**order["config"])) as gov:
        app = make_app(gov, order["broker"], Path(order["folder"]))
        # A schedule in memory: there is nothing to catch up with, and no file to be left behind.
        beat = ["--beat", "--scheduler", "celery.beat:Scheduler"]
        app.worker_main(["--quiet", "worker", "--concurrency", str(POOL), "--loglevel", "ERROR", *beat])
