"""The broker of a Celery app, its settings, and the queues that nobody reads."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..._secrets import Secrets, passwords_in
from ...errors import printable
from ._diagnosis import Diagnosis, Fact

if TYPE_CHECKING:
    from celery import Celery

#: The Redis transport's own visibility_timeout.
_VISIBLE = 3600.0
#: Seconds for the broker, and for the workers' answers.
_PATIENCE = 3.0
_REDIS = {"redis", "rediss", "sentinel"}
#: Tasks that are not the user's.
_OTHERS = "celery.", "govredis."


def find_celery_app(name: str) -> Celery:
    """The app of `module:app`, as `celery -A` finds it. Raises click.BadParameter."""
    try:
        from celery.app.utils import find_app
    except ImportError as error:
        raise click.BadParameter(f"{error}: pip install 'govredis[celery]'", param_hint="--app") from error
    try:
        found = find_app(name)
    except Exception as error:  # of the user's module, too
        said = f"{name!r} cannot be loaded: {type(error).__name__}: {error}"
        raise click.BadParameter(printable(said), param_hint="--app") from error
    if not hasattr(found, "tasks"):
        raise click.BadParameter(f"{name!r} is no Celery app: {type(found).__name__}", param_hint="--app")
    app: Celery = found
    return app


def of_celery(app: Celery) -> Iterator[Fact | Diagnosis]:
    """The faults of an app and its broker, which has a few seconds for all that is asked of it."""
    if "govredis.heartbeat" not in app.tasks:
        yield Diagnosis(
            "celery",
            "the app has no tasks of govredis",
            "nobody watches beat, drains the outbox, stores snapshots or purges",
            "call init_celery(app) where the app is made",
            is_fault=False,
        )
    urls = app.conf.broker_read_url or app.conf.broker_url
    of_options = passwords_in(app.conf.broker_transport_options or {})
    secrets = Secrets([urls] if isinstance(urls, str) else urls or (), of_options)
    connection = app.connection_for_read(connect_timeout=_PATIENCE)
    options: dict[str, Any] = {"socket_timeout": _PATIENCE, "socket_connect_timeout": _PATIENCE}
    connection.transport_options = {**options, **(connection.transport_options or {})}
    try:
        with connection:
            where = secrets.hide(connection.as_uri())
            connection.ensure_connection(max_retries=0, timeout=_PATIENCE)
            yield Fact("broker", where)
            if connection.transport_cls in _REDIS:
                yield from _of_settings(app)
            yield from _of_queues(app, connection)
    except Exception as error:  # noqa: BLE001 - each transport has its own
        yield Diagnosis(
            "broker",
            f"the broker does not answer: {secrets.hide(f'{type(error).__name__}: {error}')}",
            "no task is sent, and none comes",
            "bring it back, or change broker_url",
        )


def _of_settings(app: Celery) -> Iterator[Diagnosis]:
    options = app.conf.broker_transport_options or {}
    visible = options.get("visibility_timeout", _VISIBLE)
    if options.get("socket_timeout") is None:
        yield Diagnosis(
            "broker",
            "broker_transport_options has no socket_timeout",
            "`delay` blocks for as long as the broker hangs",
            'set broker_transport_options = {"socket_timeout": 1, "socket_connect_timeout": 1, "max_retries": 0}'
            " in processes that send tasks, and task_publish_retry = False",
        )
    late = {name: task for name, task in app.tasks.items() if task.acks_late and not name.startswith(_OTHERS)}
    longer = {name: limit for name, task in late.items() if (limit := _longest(app, task)) and limit > visible}
    if longer:
        named = ", ".join(f"{name} ({limit:g} s)" for name, limit in sorted(longer.items()))
        yield Diagnosis(
            "broker",
            f"visibility_timeout is {visible:g} s, and tasks with acks_late may run longer: {named}",
            "the broker then delivers such a task a second time, while it still runs",
            f'set broker_transport_options["visibility_timeout"] to {max(longer.values()) + 60:g} or more',
        )
    unbounded = sorted(name for name, task in late.items() if not _longest(app, task))
    if unbounded:
        yield Diagnosis(
            "broker",
            f"tasks with acks_late have no time limit: {', '.join(unbounded)}",
            f"a task that runs longer than visibility_timeout ({visible:g} s) is delivered a second time",
            "give them a time_limit below that",
            is_fault=False,
        )


def _longest(app: Celery, task: Any) -> float:
    """Seconds that a task may run; 0: nothing bounds that."""
    limits = task.time_limit or app.conf.task_time_limit, task.soft_time_limit or app.conf.task_soft_time_limit
    return float(limits[0] or limits[1] or 0)


def _of_queues(app: Celery, connection: Any) -> Iterator[Fact | Diagnosis]:
    answers = app.control.inspect(timeout=_PATIENCE / 2, connection=connection).active_queues() or {}
    read = {queue["name"] for queues in answers.values() for queue in queues}
    if answers:
        yield Fact("workers", f"{', '.join(sorted(answers))} read {', '.join(sorted(read))}")
    else:
        yield Diagnosis("workers", "no worker answers", "no task runs", "start one: `celery -A ... worker`")
    written = set(app.amqp.queues)
    for entry in (app.conf.beat_schedule or {}).values():
        queue = (entry.get("options") or {}).get("queue")
        if isinstance(queue, str):
            written.add(queue)
    for queue in sorted(written - read):
        yield Diagnosis(
            "queues",
            f"nobody reads the queue {queue}, which has {_depth(connection, queue)} messages",
            "tasks that are sent there do not run",
            f"start a worker with -Q {queue}, or send them elsewhere",
        )


def _depth(connection: Any, queue: str) -> str:
    try:
        with connection.channel() as channel:
            return str(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:  # nobody has made it yet
        return "0"
