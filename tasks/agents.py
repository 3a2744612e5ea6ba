"""Background work on agents: limits, locks and invalidation at work."""

from __future__ import annotations

from typing import Any

from celery import Task

from govredis import BackendUnavailable, get_agent_store
from govredis.api import get_gov
from govredis.contrib.celery import exclusive, rate_limited

from . import app

DISCOVERIES = """
SELECT pg_advisory_xact_lock(hashtext('discoveries'));  -- workers that start together would all make it
CREATE TABLE IF NOT EXISTS discoveries (
    task_id text PRIMARY KEY,       -- of the message: one that is delivered twice is stored once
    agent_id text NOT NULL,
    discovery jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
)
"""

#: A server that is away is waited for, from half a second to a minute at a time, for as long as it takes.
_PATIENT: dict[str, Any] = {
    "autoretry_for": (BackendUnavailable,),
    "max_retries": None,
    "retry_backoff": True,
    "retry_backoff_max": 60,
}


@app.task(bind=True, **_PATIENT)
@rate_limited("20/hour", key="{agent_id}", operation="kg_store")
def store_discovery(self: Task, agent_id: str, discovery: Any) -> None:
    """Store what an agent has found, once for each message; 20 an hour of each agent, the others when there is room.

    Args:
        agent_id: the agent.
        discovery: what JSON can hold.
    """
    from govredis.postgres import Json

    get_gov().postgres.fetch(
        "INSERT INTO discoveries (task_id, agent_id, discovery) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        (self.request.id, agent_id, Json(discovery)),
    )


@app.task(**_PATIENT)
@exclusive("agent:{agent_id}")
def update_agent_metadata(agent_id: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    """Set fields of an agent's metadata. Returns its record; None if there is no such agent."""
    record = get_agent_store().update_metadata(agent_id, **fields)
    return None if record is None else {**record}


@app.task(**_PATIENT)
@exclusive("agent:{agent_id}")
def archive_agent(agent_id: str) -> dict[str, Any] | None:
    """Archive an agent. Returns its record; None if there is no such agent."""
    record = get_agent_store().archive(agent_id)
    return None if record is None else {**record}


@app.task(**_PATIENT)
@exclusive("agent:{agent_id}")
def delete_agent(agent_id: str) -> bool:
    """Delete an agent. True if there was one."""
    return get_agent_store().delete(agent_id)
