"""The Celery application that this repository runs: `make worker`, or `celery -A tasks worker --beat`.

The environment says where everything is: REDIS_URL and GOVREDIS_DATABASE_URL (and the rest of govredis's settings),
CELERY_BROKER_URL (without: REDIS_URL), CELERY_RESULT_BACKEND (without: no results are kept).
"""

from __future__ import annotations

import os

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES

from govredis.contrib.celery import init_celery

# By its name here, so that URLs are what they always are.
TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "tasks.broker:Transport"))

app: Celery = Celery(
    "tasks",
    broker=os.environ.get("CELERY_BROKER_URL") or os.environ.get("REDIS_URL") or "redis://",
    task_cls="tasks.broker:Task",
)

app.conf.update(
    # A broker that hangs blocks a publisher for about a second, one that refuses not at all; then it gets kombu's
    # OperationalError. (Where threads have all of a process's ten connections in use, it waits for one: three seconds
    # in all.) No retries: what was not answered may be in the queue all the same, and would be there twice.
    task_publish_retry=False,
    broker_connection_timeout=1,
    broker_pool_acquire_timeout=1,
    broker_transport_options={
        "socket_connect_timeout": 1,
        "socket_timeout": 1,
        "socket_keepalive": True,
        # A connection that was idle is tried with a PING first: no message is left with a server that hangs, to be
        # found in the queue when its publisher has been told that it failed.
        "health_check_interval": 1,
        "max_retries": 0,
        # A worker that dies takes its messages with it for so long. Above the longest task, and twice the longest wait
        # of a limited one.
        "visibility_timeout": 1200,
        # A worker says every second what a broker that was away has not been told; and looks every ten for messages of
        # workers that died. One that dies while it looks keeps the others from it for so long (two at once are
        # harmless).
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 10,
        "unacked_mutex_expire": 10,
    },
    # A worker waits for its broker for as long as it takes, and for one that answers with errors (it loads its data, or
    # its memory is full) too.
    worker_consumer="tasks.broker:Consumer",
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_channel_error_retry=True,
    # A message is gone when its task has ended, not when it began: a killed worker's runs again. So tasks must bear to
    # run twice, and none is reserved by a worker that is busy.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    # Tasks that run when the connection breaks run on.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    # The schedule is in memory: there is nothing to catch up with, and no file to be left behind or broken.
    beat_scheduler="celery.beat:Scheduler",
)

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
