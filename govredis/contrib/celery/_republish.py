"""The running task's message, published anew: a retry that its retry budget does not know of."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable
from typing import Any, NoReturn

from celery import Task
from celery.canvas import Signature
from celery.exceptions import Reject, Retry
from celery.signals import task_received
from celery.worker.request import Request
from kombu.exceptions import EncodeError
from kombu.serialization import registry

#: Seconds. A message that waits is one that its broker has not got back: RabbitMQ closes the channel after 30 minutes,
#: the Redis transport delivers it a second time after its visibility_timeout. Half of that at most, and never more
#: than this; whoever comes too early for its limit waits again.
_LONGEST = 600.0
_VISIBLE = 3600.0  # the transport's own visibility_timeout

#: Seconds before a message that could not be published anew is handed back.
_LONGEST_REFUSAL = 1.0

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


def jittered(seconds: float) -> float:
    """Up to a quarter later, so that those who were refused together do not come back together; never earlier."""
    return seconds * _random.uniform(1.0, 1.25)


def can_republish(task: Task) -> bool:
    """Whether there is a message to publish anew: not in a direct call, nor in an eager one."""
    return bool(task) and not task.request.called_directly and not task.request.is_eager


def runs(task: Task, function: Callable[..., Any]) -> bool:
    """Whether `function` is what the task runs, and not one that it calls: then to run it all again would be wrong."""
    kinds = task.__class__.__mro__  # not type(task): it may be Celery's proxy
    mine = (inspect.unwrap(vars(kind)["run"]) for kind in kinds if "run" in vars(kind))
    wanted = inspect.unwrap(function)
    return wanted is inspect.unwrap(task.run) or any(getattr(run, "__func__", run) is wanted for run in mine)


def signature_of(task: Task, headers: dict[str, object] | None = None, **options: Any) -> Signature:
    """What publishes the running task's message anew, as it was, its serializer included.

    Args:
        headers: put over those of the message.
        options: of `apply_async`.
    """
    request = task.request
    if headers:
        options["headers"] = {**(request.headers or {}), **headers}
    if getattr(request, "ignore_result", None) is not None:  # which Celery before 5.7 forgets
        options["ignore_result"] = request.ignore_result
    serializer = registry.type_to_name.get((request.properties or {}).get("content_type"))
    if serializer is not None:
        options["serializer"] = serializer
    return task.signature_from_request(request, **options)


def _keep_content_type(request: Request, **_: Any) -> None:
    """Tell the process that runs a task how its message was encoded. AMQP has it among the properties, and so we do."""
    kept = request.request_dict
    if request.content_type:  # of messages of Celery 3's protocol it is not known any more
        kept["properties"] = {**(kept["properties"] or {}), "content_type": request.content_type}


task_received.connect(_keep_content_type)


def republish(task: Task, why: Exception, countdown: float, headers: dict[str, object] | None = None) -> NoReturn:
    """End the running task, to be run again by any worker in `countdown` seconds. Its `retries` stay as they are.

    Args:
        task: that is running. Where it was called directly or eagerly, `why` is raised.
        headers: put over those of the message.

    What cannot be published (the broker is away)
    is not lost: a task with acks_late is handed back to the broker, after a second at most; any other raises what the
    broker raised, and fails. What cannot be encoded fails.
    """
    if not can_republish(task):
        raise why
    visible = (task.app.conf.broker_transport_options or {}).get("visibility_timeout")
    if not isinstance(visible, int | float) or visible <= 0:  # of other transports than Redis's it may be anything
        visible = _VISIBLE
    countdown = min(countdown, _LONGEST, visible / 2)
    message = signature_of(task, headers, countdown=countdown)
    try:
        message.apply_async()
    except EncodeError:
        raise  # it would not be encoded the next time either
    except Exception as error:
        if task.acks_late:
            # It comes back at once: a broker that refuses is not to be asked as fast as it can answer.
            time.sleep(min(countdown, _LONGEST_REFUSAL))
            raise Reject(error, requeue=True) from error
        raise
    raise Retry(exc=why, when=countdown, sig=message)
