"""The tasks of agents through the worker: rows, caches, locks, limits, and PostgreSQL away."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest
from support import eventually
from tasks_worker import Worker, stored

from govredis import GovRedis

STORE = "tasks.agents.store_discovery"


@pytest.fixture
def agent(gov: GovRedis) -> str:
    """An agent whose metadata is in the cache."""
    agent_id = uuid4().hex
    gov.agents.create(agent_id, {"model": "a", "tools": 1})
    assert cached(gov, agent_id)["status"] == "active"
    return agent_id


def cached(gov: GovRedis, agent_id: str) -> dict[str, object]:
    return gov.metadata.get_or_load(agent_id, gov.agents.get)


def test_update_archive_delete_change_the_row_and_invalidate_the_cache(
    worker: Worker, gov: GovRedis, agent: str
) -> None:
    worker.wait_done(worker.send("tasks.agents.update_agent_metadata", agent, {"model": "b"}))
    assert cached(gov, agent)["metadata"] == {"model": "b", "tools": 1}
    worker.wait_done(worker.send("tasks.agents.archive_agent", agent))
    assert cached(gov, agent)["status"] == "archived"
    worker.wait_done(worker.send("tasks.agents.delete_agent", agent))
    assert cached(gov, agent) is None
    assert gov.agents.get(agent) is None


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("tasks.agents.update_agent_metadata", ({"model": "b"},)),
        ("tasks.agents.archive_agent", ()),
        ("tasks.agents.delete_agent", ()),
    ],
)
def test_tasks_of_an_agent_run_one_at_a_time(
    worker: Worker, gov: GovRedis, agent: str, task: str, more: tuple[object, ...]
) -> None:
    before = gov.agents.get(agent)
    with gov.locks.acquire(f"agent:{agent}"):
        waiting = worker.send(task, agent, *more)
        worker.wait_ended(waiting, times=2)  # it comes, goes, and comes again
        assert gov.agents.get(agent) == before
    eventually(lambda: gov.agents.get(agent) != before, what="it has run")


def test_the_21st_discovery_in_an_hour_waits(worker: Worker, gov: GovRedis) -> None:
    agent = uuid4().hex
    ids = [worker.send(STORE, agent, number) for number in range(20)]
    worker.wait_done(*ids)
    late = worker.send(STORE, agent, 20)
    worker.wait_done(late)
    assert sorted(stored(gov, agent)) == [*range(20)]
    assert gov.internal.parked is not None
    (lot,) = gov.internal.parked.lots()
    ((due, message),) = lot.first(9)
    headers = json.loads(message)["options"]["headers"]
    assert 3000 < due <= 3600
    assert (headers["id"], headers["eta"], headers["retries"]) == (late, None, 0)


def test_a_message_delivered_twice_is_stored_once(worker: Worker, gov: GovRedis) -> None:
    agent = uuid4().hex
    task_id = worker.send(STORE, agent, "found")
    worker.send(STORE, agent, "found", task_id=task_id)
    worker.wait_done(task_id, times=2)
    assert stored(gov, agent) == ["found"]


def test_postgres_away_is_waited_for(worker: Worker, gov: GovRedis, agent: str) -> None:
    other = uuid4().hex
    worker.servers.postgres.pause()
    try:
        store = worker.send(STORE, other, "found")
        update = worker.send("tasks.agents.update_agent_metadata", agent, {"model": "c"})
        worker.wait_ended(store, update, times=2)
    finally:
        worker.servers.postgres.resume()
    eventually(lambda: stored(gov, other) == ["found"], what="it is stored")
    eventually(lambda: gov.agents.get(agent)["metadata"] == {"model": "c", "tools": 1}, what="it is updated")


def test_postgres_and_the_broker_away_at_once(worker: Worker, gov: GovRedis) -> None:
    agent = uuid4().hex
    worker.servers.postgres.pause()
    try:
        store = worker.send(STORE, agent, "found")
        worker.wait_began(store)
        worker.servers.broker.kill()
        worker.wait_ended(store)  # it could not be published anew
    finally:
        worker.servers.postgres.resume()
        worker.servers.broker.restart()
    eventually(lambda: stored(gov, agent) == ["found"], what="it is stored")


def test_beat_notes_the_health(worker: Worker, gov: GovRedis) -> None:
    eventually(
        lambda: [c for c in gov.health.check().checks if c.name == "beat" and c.status == "pass"], what="a heartbeat"
    )
    eventually(lambda: worker.servers.cache.command("XLEN", "govredis:health") >= 2, what="two snapshots")
