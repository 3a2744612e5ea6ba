"""The GovRedis and the settings that belong to a Celery app."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, Literal
from weakref import WeakKeyDictionary

from celery import Celery, current_app, current_task
from celery.signals import worker_process_shutdown

from ..._exit import write_all_pending
from ...api import GovRedis, get_gov
from ...config import Config
from ...errors import ConfigurationError, check_ttl

#: For each periodic task, the setting that says how often it runs, and its default, in seconds.
INTERVALS = {
    "govredis.census": ("census_interval", 10.0),
    "govredis.drain_outbox": ("drain_interval", 1.0),
    "govredis.heartbeat": ("heartbeat_interval", 15.0),
    "govredis.health_snapshot": ("snapshot_interval", 60.0),
    "govredis.purge": ("purge_interval", 3600.0),
}

#: The setting that names the queue of our tasks.
_QUEUE = "govredis_queue"
#: The setting that names the file that a worker and beat touch.
_LIVENESS = "govredis_liveness_file"

#: Celery's settings are in small letters, and its redis_* belong to its result backend: so ours have one form there.
_NAMES = {f.name: f"govredis_{f.name}" for f in fields(Config)}

#: The GovRedis of each app that init_celery has seen; None: the process-wide GovRedis; "": its settings are unread yet.
govs: WeakKeyDictionary[Celery, GovRedis | Literal[""] | None] = WeakKeyDictionary()


def gov_of(app: Celery) -> GovRedis:
    """The GovRedis that `init_celery` gave the app, else the process-wide GovRedis. Raises ConfigurationError."""
    gov = govs.get(app)
    if gov == "":
        also = [_QUEUE, _LIVENESS, *(f"govredis_{setting}" for setting, _ in INTERVALS.values())]
        config = Config.from_app(_settings(app), _NAMES, also)
        # Two threads may make one each; one of the two, which has not connected yet, is forgotten.
        gov = govs[app] = govs[app] or (None if config is None else GovRedis(config))
    return gov or get_gov()


def current_gov() -> GovRedis:
    """The GovRedis of the app whose task is running here, else of Celery's current app."""
    return gov_of(current_task.app if current_task else current_app._get_current_object())


def _settings(app: Celery) -> dict[str, Any]:
    """The app's settings by their lower-case names, without its namespace. Names outside of it are not settings."""
    namespace = f"{app.namespace}_".lower() if app.namespace else ""
    found = {}
    for name in map(str, app.conf):
        if name.lower().startswith(namespace) or name.startswith("govredis_"):
            found[name.lower().removeprefix(namespace)] = app.conf[name]
    return found


def intervals(app: Celery) -> dict[str, float]:
    """How often each scheduled task runs, in seconds."""
    found = {}
    settings = _settings(app)
    for name, (setting, default) in INTERVALS.items():
        interval = settings.get(f"govredis_{setting}", default)
        if interval is not None:
            try:
                found[name] = float(check_ttl(interval, f"govredis_{setting}"))
            except ValueError as error:
                raise ConfigurationError(f"{error}, or None") from None
    return found


def queue_of(app: Celery) -> str | None:
    """The queue that our tasks go to, where the app's settings name one. Raises ConfigurationError."""
    queue = _settings(app).get(_QUEUE)
    if queue is None or (isinstance(queue, str) and queue):
        return queue
    raise ConfigurationError(f"{_QUEUE} is {queue!r}; it must be the name of a queue, or None")


def liveness_file_of(app: Celery) -> str | None:
    """The file that shows that a process of the app lives, where its settings name one. Raises ConfigurationError."""
    path = _settings(app).get(_LIVENESS)
    if path is None or (isinstance(path, str | os.PathLike) and os.fspath(path)):
        return None if path is None else os.fspath(path)
    raise ConfigurationError(f"{_LIVENESS} is {path!r}; it must be the path of a file, or None")


def _write_pending(**_: Any) -> None:
    """A process of the prefork pool leaves without Python's own end."""
    write_all_pending()


worker_process_shutdown.connect(_write_pending)
