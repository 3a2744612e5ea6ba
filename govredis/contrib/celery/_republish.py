"""The running task's message, published anew: a retry that its retry budget does not know of."""

from __future__ import annotations

import random
from typing import NoReturn

from celery import Task
from celery.exceptions import Reject, Retry

#: Seconds. A message that waits is one that its broker has not got back: RabbitMQ closes the channel after 30 minutes,
#: the Redis transport delivers it a second time after its visibility_timeout. Half of that at most, and never more
#: than this; whoever comes too early for its limit waits again.
_LONGEST = 600.0

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


def jittered(seconds: float) -> float:
    """Up to a quarter later, so that those who were refused together do not come back together; never earlier."""
    return seconds * _random.uniform(1.0, 1.25)


def can_republish(task: Task) -> bool:
    """Whether there is a message to publish anew: not in a direct call, nor in an eager one."""
    return bool(task) and not task.request.called_directly and not task.request.is_eager


def republish(task: Task, why: Exception, countdown: float, headers: dict[str, object] | None = None) -> NoReturn:
    """End the running task, to be run again by any worker in `countdown` seconds. Its `retries` stay as they are.

    Args:
        task: that is running. Where it was called directly or eagerly, `why` is raised.
        headers: put over those of the message.

    What can not be published (the broker is away) is not lost: a task with acks_late is handed back to the broker; any
    other raises what the broker raised, and fails.
    """
    request = task.request
    if not can_republish(task):
        raise why
    visible = (task.app.conf.broker_transport_options or {}).get("visibility_timeout", 3600)
    countdown = min(countdown, _LONGEST, visible / 2)
    options = {"headers": {**(request.headers or {}), **headers}} if headers else {}
    message = task.signature_from_request(request, countdown=countdown, **options)
    try:
        message.apply_async()
    except Exception as error:
        if task.acks_late:
            raise Reject(error, requeue=True) from error
        raise
    raise Retry(exc=why, when=countdown, sig=message)
