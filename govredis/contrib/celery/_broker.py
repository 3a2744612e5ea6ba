"""An app's broker: its secrets, and the settings that bound how long a publisher waits for it."""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
from weakref import WeakKeyDictionary, WeakSet

from celery import Celery

from ..._redact import redact
from ..._secrets import Secrets, passwords_in

log = logging.getLogger("govredis")

_REDIS = {"redis", "rediss", "sentinel", "redis+socket"}
_BOUNDED = {"socket_timeout": 1, "socket_connect_timeout": 1, "max_retries": 0}
_warned: WeakSet[Celery] = WeakSet()
_names: WeakKeyDictionary[Celery, str] = WeakKeyDictionary()


def broker_secrets(app: Celery) -> Secrets:
    return Secrets(_urls(app), passwords_in(app.conf.broker_transport_options or {}))


def warn_if_unbounded(app: Celery) -> None:
    """Warn once for an app that nothing bounds its publishers' waits for a Redis broker that hangs.

    We do not make these settings for the user, for they hold for the workers' connections too. There a hang of a second
    would end the connection, and running tasks with acks_late would be delivered again.
    """
    options = app.conf.broker_transport_options or {}
    if is_redis(app) and options.get("socket_timeout") is None and app not in _warned:
        _warned.add(app)
        log.warning(
            "`delay` blocks for as long as the broker hangs: broker_transport_options has no socket_timeout. With"
            " broker_transport_options=%s and task_publish_retry=False it raises OperationalError after a second",
            redact(repr({**options, **_BOUNDED})),  # sentinel_kwargs may have a password
        )


def is_redis(app: Celery) -> bool:
    return any(str(url).partition("://")[0] in _REDIS for url in _urls(app))


def broker_of(app: Celery) -> str:
    """The broker that an app publishes to, without credentials."""
    broker = _names.get(app)
    if broker is None:
        with app.connection_for_write() as connection:
            info = connection.info()
        host = str(info["hostname"])
        if "://" in host:  # a transport that reads its URL itself, MongoDB's say
            broker = _names[app] = _without_credentials(host)
        else:
            path = str(info["virtual_host"]).strip("/") or ("0" if info["transport"] == "redis" else "")
            broker = _names[app] = f"{info['transport']}://{host}:{info['port']}/{path}"
    return broker


def _without_credentials(url: str) -> str:
    """Without user, password and parameters. By hand, as keys of Azure have slashes."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _urls(app: Celery) -> list[str]:
    urls = app.conf.broker_write_url or app.conf.broker_url
    return urls.split(";") if isinstance(urls, str) else [*(urls or ())]
