"""An app's broker: its secrets, and the settings that bound how long a publisher waits for it."""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
from weakref import WeakSet

from celery import Celery

from ..._secrets import Secrets

log = logging.getLogger("govredis")

_REDIS = {"redis", "rediss", "sentinel", "redis+socket"}
_BOUNDED = {"socket_timeout": 1, "socket_connect_timeout": 1, "max_retries": 0}
_warned: WeakSet[Celery] = WeakSet()


def broker_secrets(app: Celery) -> Secrets:
    return Secrets(_urls(app))


def warn_if_unbounded(app: Celery) -> None:
    """Warn once for an app that nothing bounds its publishers' waits for a Redis broker that hangs.

    We do not make these settings for the user, for they hold for the workers' connections too. There a hang of a second
    would end the connection, and running tasks with acks_late would be delivered again.
    """
    options = app.conf.broker_transport_options or {}
    over_redis = any(str(url).partition("://")[0] in _REDIS for url in _urls(app))
    if over_redis and options.get("socket_timeout") is None and app not in _warned:
        _warned.add(app)
        log.warning(
            "`delay` blocks for as long as the broker hangs: broker_transport_options has no socket_timeout. With"
            " broker_transport_options=%r and task_publish_retry=False it raises OperationalError after a second",
            {**options, **_BOUNDED},
        )


def _urls(app: Celery) -> list[str]:
    urls = app.conf.broker_write_url or app.conf.broker_url
    return urls.split(";") if isinstance(urls, str) else [*(urls or ())]
