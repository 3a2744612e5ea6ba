"""Included into the worker under test (`-I tasks_probe`): notes which message runs and ends, and has a slow task.

Beat, started by the same worker, is told to be quick.
"""

from __future__ import annotations

import os
import time
from typing import Any

import redis
from celery import signals

from tasks import app

_evidence = redis.Redis.from_url(os.environ["TASKS_TEST_EVIDENCE"])


@app.task(name="slow")
def slow(seconds: float) -> None:
    time.sleep(seconds)


@signals.task_prerun.connect
def _began(task_id: str, task: Any, **_: Any) -> None:
    _evidence.rpush("began", f"{task.name} {task_id}")


@signals.task_postrun.connect
def _ended(task_id: str, task: Any, **_: Any) -> None:
    _evidence.rpush("ended", f"{task.name} {task_id}")


app.finalize()
for _name in ("govredis.heartbeat", "govredis.health_snapshot"):
    app.conf.beat_schedule[_name]["schedule"] = 0.5
