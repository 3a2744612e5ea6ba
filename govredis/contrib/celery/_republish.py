"""The running task's message, published anew: a retry that costs nothing of its retry budget."""

from __future__ import annotations

import contextlib
import inspect
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from celery import Task
from celery.canvas import Signature
from celery.exceptions import Reject, Retry, SoftTimeLimitExceeded
from celery.signals import task_received
from celery.worker.request import Request
from kombu.exceptions import EncodeError
from kombu.serialization import registry

#: Seconds. The broker has not got back a message that waits in a worker: RabbitMQ closes the channel after 30 minutes,
#: and the Redis transport delivers it a second time after its visibility_timeout. So a countdown is half of that at
#: most, and never more than this; a task that comes too early for its limit waits again.
_LONGEST = 600.0
_VISIBLE = 3600.0  # the transport's own visibility_timeout

#: Seconds before a message that could not be published anew is handed back.
_LONGEST_REFUSAL = 1.0

_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


def jittered(seconds: float) -> float:
    """Up to a quarter later, so that tasks that were refused together come back apart; never earlier."""
    return seconds * _random.uniform(1.0, 1.25)


def can_republish(task: Task) -> bool:
    """Whether there is a message to publish anew: not in a direct call, nor in an eager one."""
    return bool(task) and not task.request.called_directly and not task.request.is_eager


def runs(task: Task, function: Callable[..., Any]) -> bool:
    """Whether the task runs `function` itself. Where it only calls it, running the whole task again would be wrong."""
    kinds = task.__class__.__mro__  # not type(task): it may be Celery's proxy
    mine = (inspect.unwrap(vars(kind)["run"]) for kind in kinds if "run" in vars(kind))
    wanted = inspect.unwrap(function)
    return wanted is inspect.unwrap(task.run) or any(getattr(run, "__func__", run) is wanted for run in mine)


def signature_of(task: Task, headers: dict[str, object] | None = None, **options: Any) -> Signature:
    """A signature that publishes the running task's message anew, as it was, its serializer included.

    Args:
        headers: these replace headers of the message.
        options: options of `apply_async`.
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
    """Tell the process that runs a task how its message was encoded: among the properties, where AMQP has it."""
    kept = request.request_dict
    if request.content_type:  # unknown for messages of Celery 3's protocol
        kept["properties"] = {**(kept["properties"] or {}), "content_type": request.content_type}


task_received.connect(_keep_content_type)


@contextlib.contextmanager
def encoding() -> Iterator[None]:
    """Raises a soft time limit that strikes kombu's encoder as it is.

    kombu makes an EncodeError of it, for which no task is tried again.
    """
    try:
        yield
    except EncodeError as error:
        if error.args and isinstance(error.args[0], SoftTimeLimitExceeded):
            raise error.args[0] from None
        raise


def republish(task: Task, why: Exception, countdown: float, headers: dict[str, object] | None = None) -> NoReturn:
    """End the running task; any worker runs it again in `countdown` seconds. Its `retries` stay as they are.

    Args:
        task: the running task. Where it was called directly or eagerly, `why` is raised.
        headers: these replace headers of the message.

    Where the broker is away, or the soft time limit strikes meanwhile, a task with acks_late is handed back to the
    broker, after a second at most. Any other task raises the error, and fails. A message that cannot be encoded fails.
    """
    if not can_republish(task):
        raise why
    visible = (task.app.conf.broker_transport_options or {}).get("visibility_timeout")
    if not isinstance(visible, int | float) or visible <= 0:  # for transports other than Redis it may be anything
        visible = _VISIBLE
    countdown = min(countdown, _LONGEST, visible / 2)
    message = signature_of(task, headers, countdown=countdown)
    try:
        with encoding():
            message.apply_async()
    except EncodeError:
        raise  # the next try would not encode it either
    except Exception as error:
        if task.acks_late:
            # It comes back at once: do not ask a broker that refuses as fast as it can answer.
            time.sleep(min(countdown, _LONGEST_REFUSAL))
            raise Reject(error, requeue=True) from error
        raise
    raise Retry(exc=why, when=countdown, sig=message)
