"""Our tasks and their schedule in a user's own Celery app, and the GovRedis that belongs to it."""

from __future__ import annotations

from typing import Any

from celery import Celery, bootsteps
from celery.local import Proxy

from ...api import GovRedis
from ._gov import gov_of, govs, intervals
from ._parking import lot_of
from ._publisher import Publisher
from ._tasks import TASKS


def init_celery(app: Celery, gov: GovRedis | None = None) -> None:
    """Put our tasks and their beat entries into `app`, when it is finalized, or now if it has been.

    Tasks: `govredis.invalidate_metadata(agent_id)`, `govredis.drain_outbox()`, `govredis.health_snapshot()`,
    `govredis.purge()`, `govredis.heartbeat()`; all but the first are scheduled, `drain_outbox` where there is an
    outbox, that is, with PostgreSQL. Nothing of the app's own is replaced: a task of the same name stays, and what its
    `beat_schedule` has already, by name or by task, is not scheduled again.

    A worker of the app publishes what `rate_limited` has parked, in a thread that looks ten times a second.

    Settings, in the app's configuration: `govredis_` and the name of a field of Config, put over the environment's;
    `govredis_drain_interval` (1), `govredis_heartbeat_interval` (15), `govredis_snapshot_interval` (60) and
    `govredis_purge_interval` (3600): seconds, or None, which schedules it not at all.

    Args:
        app: the Celery app.
        gov: what its tasks and the decorators use; None: one made of the app's settings if it has any of Config's, else
            the process-wide one.

    Wrong settings are a ConfigurationError where the app is finalized already; else a worker does not start for them,
    and our tasks raise it.
    """
    if isinstance(app, Proxy):  # celery.current_app
        app = app._get_current_object()
    govs[app] = gov or govs.get(app) or ""
    app.steps["worker"].add(_Worker)
    if app.finalized:
        _install(app)
    else:
        app.on_after_finalize.connect(_when_finalized, weak=False)


def _when_finalized(sender: Celery, **_: Any) -> None:
    # What a signal's receiver raises Celery logs, and goes on: the worker's step says it again, and stops.
    _install(sender)


def _install(app: Celery) -> None:
    for name, (function, options) in TASKS.items():
        if name not in app.tasks:
            app.task(function, name=name, shared=False, **options)
    gov = gov_of(app)
    schedule = dict(app.conf.beat_schedule)
    scheduled = {*schedule, *(_task_of(entry) for entry in schedule.values())}
    for name, interval in intervals(app).items():
        if name not in scheduled and (name != "govredis.drain_outbox" or gov._guard is not None):
            # What no worker took before the next one is due is not worth running.
            schedule[name] = {"task": name, "schedule": interval, "options": {"expires": interval}}
            if name == "govredis.heartbeat":
                schedule[name]["kwargs"] = {"every": interval}
    app.conf.beat_schedule = schedule


def _task_of(entry: Any) -> Any:
    return entry.get("task") if isinstance(entry, dict) else getattr(entry, "task", None)


class _Worker(bootsteps.StartStopStep):  # type: ignore[misc]
    """Has a worker whose settings are wrong not start, and say why; and has it publish what is parked."""

    # A thread that runs while the processes of the pool are forked is one more to go wrong.
    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._gov = gov_of(parent.app)
        self._publisher: Publisher | None = None
        intervals(parent.app)

    def create(self, parent: Any) -> _Worker:
        return self

    def start(self, parent: Any) -> None:
        lot = lot_of(parent.app, self._gov)
        if lot is not None:
            self._publisher = Publisher(parent.app, self._gov, lot)
            self._publisher.start()

    def stop(self, parent: Any) -> None:
        if self._publisher is not None:
            self._publisher.stop()

    terminate = stop
