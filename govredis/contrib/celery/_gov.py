"""The GovRedis and the settings that belong to a Celery app."""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

from celery import Celery, current_app, current_task

from ...api import GovRedis, get_gov
from ...errors import ConfigurationError, check_ttl
from .._settings import gov_of_settings

#: Of each periodic task, the setting that says how often, and its default, in seconds.
INTERVALS = {
    "govredis.drain_outbox": ("drain_interval", 1.0),
    "govredis.heartbeat": ("heartbeat_interval", 15.0),
    "govredis.health_snapshot": ("snapshot_interval", 60.0),
    "govredis.purge": ("purge_interval", 3600.0),
}

#: Of each app that init_celery has seen: its GovRedis, None for the process-wide one, "" while its settings are unread.
govs: WeakKeyDictionary[Celery, GovRedis | Literal[""] | None] = WeakKeyDictionary()


def gov_of(app: Celery) -> GovRedis:
    """What `init_celery` gave the app, else the process-wide one. Raises ConfigurationError."""
    gov = govs.get(app)
    if gov == "":
        # Of two threads that make one each, one of the two, which has not connected yet, is forgotten.
        also = [setting for setting, _ in INTERVALS.values()]
        made = gov_of_settings(_settings(app), "govredis_", also)
        gov = govs[app] = govs[app] or made
    return gov or get_gov()


def current_gov() -> GovRedis:
    """Of the app whose task is running here, else of Celery's current app."""
    return gov_of(current_task.app if current_task else current_app._get_current_object())


def _settings(app: Celery) -> dict[str, Any]:
    """The app's settings by their lower-case names, without its namespace. What is not in that is somebody else's."""
    namespace = f"{app.namespace}_".lower() if app.namespace else ""
    found = {}
    for name in map(str, app.conf):
        if name.lower().startswith(namespace) or name.startswith("govredis_"):
            found[name.lower().removeprefix(namespace)] = app.conf[name]
    return found


def intervals(app: Celery) -> dict[str, float]:
    """How often each periodic task is to run, in seconds; those that are not scheduled are not in it."""
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
