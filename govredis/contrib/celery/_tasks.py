"""Our tasks, each made into one of the app's own by `init_celery`. Bound: `self.app` says whose GovRedis it is."""

from __future__ import annotations

from typing import Any

from celery import Task

from ...errors import BackendUnavailable
from ._gov import gov_of
from ._republish import jittered, republish

_SECONDS_BETWEEN_TRIES = 2.0


def invalidate_metadata(self: Task, agent_id: str) -> None:
    """Invalidate the cached metadata of an agent: once this has run, no later hit is older.

    While Redis is away it is published anew every few seconds, until it could be done.
    """
    try:
        gov_of(self.app).metadata.invalidate(agent_id)
    except BackendUnavailable as error:
        republish(self, error, jittered(_SECONDS_BETWEEN_TRIES))


def drain_outbox(self: Task) -> int | None:
    """Tell Redis which cached values were changed, by whomever, as the outbox has it.

    Returns how many; None where it could not be done, or somebody else is at it.
    """
    guard = gov_of(self.app)._guard
    return None if guard is None else guard.drain()


def health_snapshot(self: Task) -> dict[str, Any]:
    """Look at the health and keep the report. Returns its status, and where it is kept: None if it could not be."""
    report = gov_of(self.app).health.snapshot()
    return {"status": report.status, "stored": report.stored}


def purge(self: Task) -> int:
    """Delete what is over from our tables. Returns the number of rows."""
    gov = gov_of(self.app)
    return gov.limits.purge() + gov.sessions.purge() + gov.health.purge()


def heartbeat(self: Task, every: float = 15.0) -> bool:
    """Show in the health that beat publishes and a worker works. Returns False where Redis is away.

    Args:
        every: seconds between two heartbeats, as scheduled.
    """
    return gov_of(self.app).health.beat(every)


TASKS = {
    # Whatever happens to the worker that took it, it is carried out; twice is harmless.
    "govredis.invalidate_metadata": (invalidate_metadata, {"bind": True, "acks_late": True}),
    # Nobody asks for these results: they would only fill the result backend.
    "govredis.health_snapshot": (health_snapshot, {"bind": True, "ignore_result": True}),
    "govredis.drain_outbox": (drain_outbox, {"bind": True, "ignore_result": True}),
    "govredis.purge": (purge, {"bind": True, "ignore_result": True}),
    "govredis.heartbeat": (heartbeat, {"bind": True, "ignore_result": True}),
}
