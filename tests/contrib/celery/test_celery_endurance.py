"""600 tasks that one limit lets through bit by bit, over two workers of four processes each; and one of them killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery_fleet import NEVER, Fleet, in_app
from support import eventually, redis_of
from test_celery_workers import most_within

from govredis import Config, GovRedis
from govredis.keys import sibling
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

PATIENCE = 240.0


@pytest.fixture
def cache() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def gov(cache: RedisServer) -> Iterator[GovRedis]:
    with GovRedis(Config(redis_url=cache.url, socket_timeout=10)) as gov:
        yield gov


@pytest.fixture
def workers(cache: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    with RedisServer(persistent=True) as broker:
        server = broker.url.removesuffix("/0")
        fleet = Fleet(tmp_path, {"broker": broker.url, "backend": f"{server}/1", "evidence": f"{server}/2"})
        try:
            for name in ("first", "second"):
                fleet.worker(
                    name,
                    "-c",
                    "4",
                    "-Q",
                    "both",
                    queue="both",
                    conf={
                        **in_app({"redis_url": cache.url, "socket_timeout": 10, "connect_timeout": 10}, **NEVER),
                        "worker_prefetch_multiplier": 1,
                        "broker_transport_options": {
                            "visibility_timeout": 20,
                            "unacked_restore_interval": 0.5,
                            "unacked_restore_throttle": 1,
                        },
                    },
                )
            fleet.wait_ready("first", "second")
            yield fleet
        finally:
            fleet.close()


def publish(fleet: Fleet, gov: GovRedis, tasks: int, rate: str) -> list[Any]:
    # The log keeps its entries then: it tells at what server time each was admitted.
    gov.limits.record("swarm", 3600, operation="queued")
    redis_of(gov).call("DEL", "rate_limit:queued:swarm")
    app = fleet.app()
    return [app.send_task("queued", ("swarm", n, rate), queue="both") for n in range(tasks)]


def admissions(gov: GovRedis) -> list[int]:
    """The server times, without reservations that nobody called for: those of runs that a killed worker had begun."""
    key = "rate_limit:queued:swarm"
    logs = key, sibling(key, "booked"), sibling(key, "moved")
    scores = redis_of(gov).call("ZDIFF", "3", *logs, "WITHSCORES")[1::2]
    return [round(float(score) * 1_000_000) for score in scores]


def delivered(fleet: Fleet, results: list[Any]) -> int:
    return sum(int(count) for count in fleet.evidence.mget([f"deliveries:{result.id}" for result in results]))


def test_no_faster_than_the_limit_allows_with_two_deliveries_each(workers: Fleet, gov: GovRedis) -> None:
    results = publish(workers, gov, 600, "150/13 seconds")
    assert [result.get(PATIENCE) for result in results] == list(range(600))
    assert sorted(run["n"] for run in workers.noted("queued")) == list(range(600)), "each once"
    assert {run["node"] for run in workers.noted("queued")} == {"first", "second"}
    times = admissions(gov)
    assert len(times) == 600, "no place of the limit went to anything but a run"
    assert most_within(13_000_000, times) <= 150
    assert (max(times) - min(times)) / 1e6 >= 3 * 13
    assert delivered(workers, results) <= 2.1 * 600
    assert parked(gov) == 0


def test_a_killed_worker_loses_no_task_and_no_task_runs_twice_that_had_not_begun(workers: Fleet, gov: GovRedis) -> None:
    results = publish(workers, gov, 120, "20/4 seconds")
    eventually(lambda: parked(gov) > 0 and len(workers.noted("queued")) >= 40, what="some ran, others wait")
    workers.processes["first"].kill()
    eventually(
        lambda: {run["n"] for run in workers.noted("queued")} == set(range(120)), within=PATIENCE, what="all have run"
    )
    assert [result.get(PATIENCE) for result in results] == list(range(120))
    runs = workers.noted("queued")
    for n in range(120):
        mine = [run for run in runs if run["n"] == n]
        assert [run["node"] for run in mine[:-1]] in ([], ["first"]), "the killed one had begun it"
    times = admissions(gov)
    assert most_within(4_000_000, times) <= 20
    assert len(runs) - 120 <= 4, "what its four processes had begun"
    assert 0 <= len(times) - len(runs) <= 4, "they may have been admitted, and killed before they ran"
    assert parked(gov) == 0


def parked(gov: GovRedis) -> int:
    assert gov.internal.parked is not None
    return sum(lot.count() for lot in gov.internal.parked.lots())
