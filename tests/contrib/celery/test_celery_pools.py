"""Limits, locks and invalidation by a worker of each pool, while the Redis that they are in is killed and hangs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from celery_fleet import Fleet
from support import PATIENCE, eventually

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

NEVER = {f"{name}_interval": None for name in ("drain", "census", "heartbeat", "snapshot", "purge")}

#: The beginning of a traceback that is not ours: greenlets of Celery's meet in the connection of its result backend.
CELERYS_OWN = re.compile(r"Exception ignored in:[^\n]*(?:\n[^\n]*)?AsyncResult\.__del__[^\n]*\n[^\n]*Traceback")


class Pool:
    """A worker, and what it is asked."""

    def __init__(self, fleet: Fleet, kind: str) -> None:
        self.fleet, self.kind = fleet, kind

    def send(self, task: str, *args: Any) -> AsyncResult:
        return self.fleet.app().send_task(task, args, queue=self.kind)

    def check(self) -> None:
        """A limit of one an hour is kept, and a lock; two tasks run at once where the pool runs two."""
        agent, one, other = (uuid.uuid4().hex for _ in range(3))
        limited = [self.send("skipping", agent) for _ in range(3)]
        alone = [self.send("alone", agent, n, 0.05) for n in range(3)]
        met = [self.send("meet", one, other), self.send("meet", other, one)] if self.kind != "solo" else []
        assert sorted(str(result.get(PATIENCE)) for result in limited) == sorted([agent, "None", "None"])
        assert [result.get(PATIENCE) for result in alone] == [0, 1, 2]
        assert [result.get(PATIENCE) for result in met] == [None] * len(met)
        runs = sorted((run["began"], run["ended"]) for run in self.fleet.noted("alone") if run["key"] == agent)
        assert len(runs) == 3
        assert all(ended <= began for (_, ended), (began, _) in pairwise(runs))


@pytest.mark.parametrize("kind", ["prefork", "threads", "gevent", "solo"])
def test_an_outage_in(
    kind: str,
    celery_broker: RedisServer,
    postgres_server: PostgresServer,
    make_gov: Callable[..., GovRedis],
    tmp_path: Path,
) -> None:
    server = celery_broker.url.removesuffix("/0")
    fleet = Fleet(tmp_path, {"broker": f"{server}/3", "backend": f"{server}/1", "evidence": f"{server}/2"})
    with RedisServer(persistent=True) as cache:
        settings = {
            "redis_url": cache.url,
            "database_url": postgres_server.url,
            "lock_folder": str(tmp_path / "locks"),
            "socket_timeout": 1,
            "connect_timeout": 1,
            "postgres_timeout": 20,
        }
        gov, pool = make_gov(**settings), Pool(fleet, kind)
        conf = {f"govredis_{name}": value for name, value in {**settings, **NEVER}.items()}
        worker = fleet.worker(kind, "-P", kind, "-c", "4", conf=conf)

        def is_back() -> bool:
            return 0 < worker.text().count(" is away (") == worker.text().count(" is back after ")

        try:
            fleet.wait_ready(kind)
            pool.check()
            parked = [pool.send("queued", kind, n, "1/4 seconds") for n in range(2)]
            eventually(lambda: gov.internal.parked.waiting(), what="one waits")  # type: ignore[union-attr]
            gov.metadata.set(kind, "old")

            cache.kill()
            invalidation = pool.send("govredis.invalidate_metadata", kind)
            pool.check()
            assert not invalidation.ready()
            cache.restart()
            assert sorted(result.get(PATIENCE) for result in parked) == [0, 1]
            assert invalidation.get(PATIENCE) is None
            eventually(lambda: gov.health.check().checks[0].status == "pass", what="this process is back")
            eventually(is_back, what="so is each of the worker")
            assert gov.metadata.get(kind) is None
            pool.check()

            cache.pause()
            try:
                pool.check()
            finally:
                cache.resume()
            eventually(is_back, what="each is back")
            pool.check()
            assert {run["n"]: run["node"] for run in fleet.noted("queued")} == dict.fromkeys(range(2), kind)
            log = worker.text()
            ours = CELERYS_OWN.sub("", log)
            assert [told for told in ("Traceback", "raised unexpected") if told in ours] == [], log
            assert worker.stop() == 0
        finally:
            fleet.close()
