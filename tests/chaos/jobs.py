"""The Celery application of a run: the repository's own, and tasks that note when they ran."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_init

from govredis import BackendUnavailable, LockLost
from govredis.contrib import celery as decorators
from tasks import app

from .history import Recorder, now
from .mutants import mutate
from .parts import die_with_parent

die_with_parent()
worker_process_init.connect(die_with_parent)
mutate(os.environ.get("CHAOS_MUTANTS", ""))

#: A killed process's messages are delivered again after this.
app.conf.broker_transport_options["visibility_timeout"] = 20
app.conf.broker_transport_options["unacked_restore_throttle"] = 1
app.conf.task_soft_time_limit = 1
_PATIENT: dict[str, Any] = {
    "autoretry_for": (BackendUnavailable, LockLost, SoftTimeLimitExceeded),
    "max_retries": None,
    "default_retry_delay": 1,
}
_recorders: dict[int, Recorder] = {}


def run(task: str, of: int, key: str) -> None:
    """Note that it runs. Some runs take longer than the soft time limit, whose exception strikes them."""
    recorder = _recorders.get(os.getpid())
    if recorder is None:
        recorder = _recorders[os.getpid()] = Recorder(os.environ["CHAOS_FOLDER"], f"celery-{os.getpid()}")
    n, line = recorder.number(), {"began": now(), "args": {"task": task, "of": of, "key": key}}
    recorder.write(n, "run", **line)
    outcome = "unknown"
    try:
        time.sleep(random.choice([0, 0, 0.05, 0.1]) if random.random() < 0.97 else 1.5)
        outcome = "ok"
    finally:
        recorder.write(n, "run", **line, ended=now(), outcome=outcome)


@app.task(name="limited", **_PATIENT)
@decorators.rate_limited("6/2 seconds", key="{key}", operation="chaos")
def limited(of: int, key: str) -> None:
    run("limited", of, key)


@app.task(name="alone", **_PATIENT)
@decorators.exclusive("alone:{key}", ttl=60)
def alone(of: int, key: str) -> None:
    run("alone", of, key)
