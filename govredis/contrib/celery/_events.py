"""on_event: tasks that handle events, and the thread of a worker that makes tasks of events."""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from celery import Celery, Task

from ..._latch import Latch
from ...api import GovRedis
from ...errors import BackendUnavailable
from ...events import EventConsumer
from ...events.event import TopicPattern
from ._decorators import refuse_tasks
from ._producer import BrokerProducer

log = logging.getLogger("govredis")

P = ParamSpec("P")
R = TypeVar("R")

#: The attribute of a task's function that has its topic.
_TOPIC = "govredis_on_event"
#: Seconds before the next try where the broker is away.
_RETRY = 1.0
#: Seconds after which another worker publishes the task of an event that a worker has left.
_CLAIM_AFTER = 10.0
#: A broker that is away for long makes no event a dead one.
_EVER = 1_000_000


def on_event(topic: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a task handle the events of a topic. Put it between `@app.task` and the function.

    Each event becomes one message of the task, whose argument is a dict: `Event.as_dict()`. From then on it is a task
    as any other, with its queue, its retries and its limits.

    The workers of an app with `init_celery` see to that, in a thread for each such task; they are a group of consumers
    that begins with the first worker's start. The message is published at least once: its task id is the event's id,
    the same each time. While the broker or Redis is away, events wait. Tasks run side by side, so a later event may be
    handled first.

    Args:
        topic: as in `EventBus.listen`.

    Raises ValueError at decoration for a bad topic, and where it stands above `@app.task` or on an
    async function or a generator.
    """
    TopicPattern(topic)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        refuse_tasks(function, "on_event")
        setattr(function, _TOPIC, topic)
        return function

    return decorate


def forwarders(app: Celery, gov: GovRedis, worker: str) -> list[EventForwarder]:
    """A thread for each task of the app that handles events, not started."""
    if gov.internal.context.redis is None:
        return []
    return [
        EventForwarder(app, gov, task, topic, worker)
        for task in list(app.tasks.values())
        if isinstance(topic := getattr(task.run, _TOPIC, None), str)
    ]


class EventForwarder(threading.Thread):
    """Publishes a message of a task for each event, until it is stopped, over a connection of its own."""

    def __init__(self, app: Celery, gov: GovRedis, task: Task, topic: str, worker: str) -> None:
        super().__init__(name="govredis-on-event", daemon=True)
        self._gov, self._task, self._topic = gov, task, topic
        # Celery's names may have characters that ours have not.
        self._group, self._name = f"celery.{quote(task.name)}", f"{quote(worker, '@')}-{os.getpid()}"
        self._stopped = Latch()
        self._away = False
        self._reader: EventConsumer | None = None
        self._producer = BrokerProducer(app)

    def run(self) -> None:
        """Work until `stop` is called."""
        while not self._stopped.is_set():
            try:
                self._forward()
            except BackendUnavailable:
                pass  # Redis is away: its breaker logs that
            except Exception as error:  # noqa: BLE001 - each transport has errors of its own
                self._producer.disconnect()
                if not self._away:
                    log.warning(
                        "events for task %s cannot be published as tasks, and wait: %s",
                        self._task.name,
                        self._producer.said(error),
                    )
                self._away = True
            self._stopped.wait(_RETRY)
        self._producer.disconnect()

    def stop(self) -> None:
        """Stop after the message that is being published."""
        self._stopped.set()
        if self._reader is not None:
            self._reader.close()
        self.join(2 * _RETRY)

    def _forward(self) -> None:
        with self._gov.events.consume(
            self._group,
            self._name,
            self._topic,
            after="$",
            claim_after=_CLAIM_AFTER,
            deliveries=_EVER,
        ) as self._reader:
            if self._stopped.is_set():
                return
            for event in self._reader:
                # Its task_id tells a worker's log, and the task itself, of an event that comes a second time.
                producer = self._producer.connected()
                self._task.apply_async((event.as_dict(),), task_id=event.id, producer=producer, retry=False)
                self._gov.counters.add("celery.events")
                if self._away:
                    log.info("events for task %s are published as tasks again", self._task.name)
                    self._away = False
