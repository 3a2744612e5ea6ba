"""Our tasks and their schedule in a user's own Celery app, and the GovRedis that belongs to it."""

from __future__ import annotations

from typing import Any

from celery import Celery, bootsteps
from celery.local import Proxy

from ...api import GovRedis
from ._broker import warn_if_unbounded
from ._events import EventForwarder, forwarders
from ._gov import INTERVALS, gov_of, govs, intervals, liveness_file_of, queue_of
from ._parking import lot_of
from ._publisher import Publisher
from ._pulse import Pulse
from ._scheduled import scheduled_by
from ._tasks import TASKS


def init_celery(app: Celery, gov: GovRedis | None = None) -> None:
    """Put our tasks and their beat entries into `app`, when it is finalized, or now if it has been.

    Tasks: `govredis.invalidate_metadata(agent_id)`, `govredis.drain_outbox()`, `govredis.health_snapshot()`,
    `govredis.census()`, `govredis.purge()`, `govredis.heartbeat()`; all but the first are scheduled, `drain_outbox`
    where there is an outbox, that is, with PostgreSQL. Nothing in the app is replaced: a task of the same name stays,
    and a task that its `beat_schedule` has already, by its own name or the entry's, is not scheduled again.

    They go to the app's default queue, or to the queue that `govredis_queue` names. Some worker must read it: where
    workers are started with -Q, and beat is alive, health warns of a queue that nobody reads. A scheduled message
    expires when the next is due. RabbitMQ removes it then; a Redis broker keeps it until a worker reads the queue, and
    drops it. Once two heartbeats in a row were not run, beat publishes only heartbeats of ours until a worker runs
    one.

    Where nothing bounds how long a publisher waits for a Redis broker that hangs, a warning names the settings that do.
    While the broker is away, messages that beat cannot publish are counted as celery.unpublished, and logged once.

    A worker of the app publishes the messages that `rate_limited` has parked, in a thread that looks ten times a
    second. With the heartbeat's interval it tells health that it lives, which queues it reads, and how many messages
    are in these and in those that the app's configuration names.

    Settings, in the app's configuration: `govredis_` and the name of a field of Config, put over the environment's;
    `govredis_drain_interval` (1), `govredis_census_interval` (10), `govredis_heartbeat_interval` (15),
    `govredis_snapshot_interval` (60) and `govredis_purge_interval` (3600): seconds, or None for not at all;
    `govredis_queue`: a queue's name; `govredis_liveness_file`: a file that a worker, and beat, touch with each
    heartbeat.

    Args:
        app: the Celery app.
        gov: the GovRedis of its tasks and the decorators; None: a new GovRedis with the app's settings if it has any of
            Config's, else the process-wide GovRedis.

    Wrong settings are a ConfigurationError where the app is finalized already; else no worker starts with them, and our
    tasks raise it.
    """
    if isinstance(app, Proxy):  # celery.current_app
        app = app._get_current_object()
    govs[app] = gov or govs.get(app) or ""
    app.steps["worker"].add(_WorkerStep)
    if app.finalized:
        _install(app)
    else:
        app.on_after_finalize.connect(_when_finalized, weak=False)


def _when_finalized(sender: Celery, **_: Any) -> None:
    # Celery logs the error of a signal's receiver, and goes on: the worker's step raises it again, and stops.
    _install(sender)


def _install(app: Celery) -> None:
    scheduled_task, made = scheduled_by(app), []
    for name, (function, options) in TASKS.items():
        if name not in app.tasks:
            base = scheduled_task if name in INTERVALS else app.Task
            made.append(app.task(function, name=name, shared=False, base=base, **options))
    warn_if_unbounded(app)
    gov, queue = gov_of(app), queue_of(app)
    liveness_file_of(app)
    if queue is not None:
        for task in made:
            task.queue = queue
    schedule = dict(app.conf.beat_schedule)
    scheduled = {*schedule, *(_task_of(entry) for entry in schedule.values())}
    for name, interval in intervals(app).items():
        if name not in scheduled and (name != "govredis.drain_outbox" or gov.internal.freshness is not None):
            # A message that no worker took before the next is due is not worth running: workers obey the first option,
            # RabbitMQ the second.
            expiry = {"expires": interval, "expiration": interval}
            schedule[name] = {"task": name, "schedule": interval, "options": expiry}
            if name == "govredis.heartbeat":
                schedule[name]["kwargs"] = {"every": interval}
    app.conf.beat_schedule = schedule


def _task_of(entry: Any) -> Any:
    return entry.get("task") if isinstance(entry, dict) else getattr(entry, "task", None)


class _WorkerStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Keeps a worker with wrong settings from starting, and says why; has a worker publish parked messages
    and the tasks of events."""

    # After the processes of the pool and of an embedded beat are forked. kombu's cached properties have mutexes: where
    # a thread of ours has one in the instant of the fork, the child waits for it for ever.
    requires = ("celery.worker.components:Pool", "celery.worker.components:Beat")

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._gov = gov_of(parent.app)
        self._threads: list[Publisher | EventForwarder | Pulse] = []
        intervals(parent.app), queue_of(parent.app), liveness_file_of(parent.app)

    def create(self, parent: Any) -> _WorkerStep:
        return self

    def start(self, parent: Any) -> None:
        lot = lot_of(parent.app, self._gov)
        if lot is not None:
            self._threads.append(Publisher(parent.app, self._gov, lot))
        self._threads += forwarders(parent.app, self._gov, parent.hostname)
        every = intervals(parent.app).get("govredis.heartbeat")
        if every is not None:
            self._threads.append(Pulse(parent.app, self._gov, parent.hostname, every))
        for thread in self._threads:
            thread.start()

    def stop(self, parent: Any) -> None:
        for thread in self._threads:
            thread.stop()

    terminate = stop
