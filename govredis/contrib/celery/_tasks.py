"""Our tasks, which `init_celery` makes into tasks of the app. They are bound: `self.app` leads to the GovRedis."""

from __future__ import annotations

from typing import Any

from celery import Task

from ...errors import BackendError, BackendUnavailable
from ...keys import Id
from ._gov import gov_of
from ._republish import jittered, republish

_SECONDS_BETWEEN_TRIES = 2.0


def invalidate_metadata(self: Task, agent_id: Id) -> None:
    """Invalidate the cached metadata of an agent: once this has run, no later hit is older.

    While Redis is away the task is published anew every few seconds, until it has succeeded.
    """
    try:
        gov_of(self.app).metadata.invalidate(agent_id)
    except BackendUnavailable as error:
        republish(self, error, jittered(_SECONDS_BETWEEN_TRIES))


def drain_outbox(self: Task) -> int | None:
    """Tell Redis which cached values were changed, by any writer, as the outbox has it; and of transactions' events.

    Returns how many values; None where it could not be done, or another process is doing it.
    """
    gov = gov_of(self.app)
    told = None if gov.internal.freshness is None else gov.internal.freshness.drain()
    if gov.events.relay is not None:
        gov.events.relay.run_quietly()
    return told


def health_snapshot(self: Task) -> dict[str, Any]:
    """Check the health and store the report. Returns its status, and where it is stored; None if it could not be."""
    report = gov_of(self.app).health.snapshot()
    return {"status": report.status, "stored": report.stored}


def census(self: Task) -> bool | None:
    """Go on with the census of Redis's keys, for half a second.

    Returns whether all keys have been counted; None where Redis is away, or refuses.
    """
    gov = gov_of(self.app)
    try:
        return gov.health.count_keys()
    except BackendError:
        gov.counters.add("health.degraded.census")
        return None


def purge(self: Task) -> int:
    """Delete ended windows, sessions and reports from our tables. Returns the number of rows."""
    gov = gov_of(self.app)
    return gov.limits.purge() + gov.sessions.purge() + gov.health.purge()


def heartbeat(self: Task, every: float = 15.0) -> bool:
    """Show in the health that beat publishes and a worker works. Returns False where no server noted it.

    Args:
        every: seconds between two heartbeats, as scheduled.
    """
    return gov_of(self.app).health.beat(every)


TASKS = {
    # It is carried out even if the worker that took it is killed; twice is harmless.
    "govredis.invalidate_metadata": (invalidate_metadata, {"bind": True, "acks_late": True}),
    # Nobody asks for these results: they would only fill the result backend.
    "govredis.health_snapshot": (health_snapshot, {"bind": True, "ignore_result": True}),
    "govredis.drain_outbox": (drain_outbox, {"bind": True, "ignore_result": True}),
    "govredis.census": (census, {"bind": True, "ignore_result": True}),
    "govredis.purge": (purge, {"bind": True, "ignore_result": True}),
    "govredis.heartbeat": (heartbeat, {"bind": True, "ignore_result": True}),
}
