"""The Celery application that this repository runs: `make worker`, or `celery -A tasks worker --beat`.

The environment says where everything is: REDIS_URL and GOVREDIS_DATABASE_URL (and the rest of govredis's settings),
CELERY_BROKER_URL (without: REDIS_URL), CELERY_RESULT_BACKEND (without: no results are kept).
"""

from __future__ import annotations

import os

from celery import Celery

from govredis.contrib.celery import init_celery

app: Celery = Celery("tasks", broker=os.environ.get("CELERY_BROKER_URL") or os.environ.get("REDIS_URL") or "redis://")

init_celery(app)

from .agents import (  # noqa: E402 - they are tasks of the app above
    archive_agent,
    delete_agent,
    store_discovery,
    update_agent_metadata,
)

invalidate_metadata = app.tasks["govredis.invalidate_metadata"]
health_snapshot = app.tasks["govredis.health_snapshot"]
purge = app.tasks["govredis.purge"]
heartbeat = app.tasks["govredis.heartbeat"]

__all__ = [
    "app",
    "archive_agent",
    "delete_agent",
    "health_snapshot",
    "heartbeat",
    "invalidate_metadata",
    "purge",
    "store_discovery",
    "update_agent_metadata",
]
