"""The Celery application of test_rolling_deploy.py: a limited task that notes which version of govredis ran it."""

from __future__ import annotations

import os
from pathlib import Path

import redis
from celery import Celery

import govredis
from govredis.contrib.celery import init_celery, rate_limited

app: Celery = Celery("rolling_app", broker=os.environ["CELERY_BROKER_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    **{f"govredis_{name}_interval": None for name in ("drain", "heartbeat", "snapshot", "purge")},
)
init_celery(app)
notes = redis.Redis.from_url(os.environ["ROLLING_NOTES"], decode_responses=True)


@app.task
@rate_limited(lambda agent: os.environ["ROLLING_RATE"], key="{agent}", operation="rolling")
def limited(agent: str) -> None:
    notes.rpush("limited", str(Path(govredis.__file__).parent.parent))
