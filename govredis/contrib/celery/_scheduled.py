"""Our periodic tasks as beat publishes them: quietly, while the broker is away."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any

from celery import Celery, Task
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from ...errors import printable
from ...health.heartbeat import MISSED
from ._broker import broker_secrets
from ._gov import gov_of
from ._liveness import touch

log = logging.getLogger("govredis")


def scheduled_by(app: Celery) -> type[Task]:
    """The base class of the app's periodic tasks. They share one _BeatState."""
    return type("Scheduled", (_Scheduled, app.Task), {"abstract": True, "beat": _BeatState()})


class _BeatState:
    """Beat's knowledge of the broker and the workers.

    Attributes:
        away_said: the log says that the broker is away.
        unread: heartbeats in a row that no worker has run.
        published_at: when the last heartbeat was published, by the monotonic clock.
    """

    away_said = False
    unread = 0
    published_at: float | None = None

    def lag(self, every: float) -> float:
        """Seconds by which the heartbeat that is published now comes late."""
        last, self.published_at = self.published_at, time.monotonic()
        return 0.0 if last is None else max(0.0, self.published_at - last - every)


class _Scheduled:
    """A periodic task. A message that beat cannot publish is no error: the next message makes up for it.

    While no worker runs the heartbeats, only heartbeats are published: a Redis broker keeps messages that nobody reads.

    Beat logs each error with two stacks, a hundred lines a second for the outbox. A caller that passes no producer is
    not beat: it gets the broker's error as usual.
    """

    app: Celery
    name: str
    beat: _BeatState

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *more: Any, producer: Any = None, **options: Any
    ) -> AsyncResult | None:
        if producer is None:
            return super().apply_async(args, kwargs, *more, **options)  # type: ignore[misc]
        gov, beats = gov_of(self.app), self.name == "govredis.heartbeat"
        if self.beat.unread >= MISSED and not beats:
            gov.counters.add("celery.unpublished")
            return None
        if beats:
            touch(self.app)
        try:
            result = super().apply_async(args, kwargs, producer=producer, **options)  # type: ignore[misc]
        except OperationalError as error:
            gov.counters.add("celery.unpublished")
            if not self.beat.away_said:
                self.beat.away_said = True
                why = printable(broker_secrets(self.app).hide(str(error)))
                log.warning("beat cannot publish our tasks until the broker is back: %s", why)
            return None
        if self.beat.away_said:
            self.beat.away_said = False
            log.info("beat publishes our tasks again")
        if beats:
            every = (kwargs or {}).get("every", 15.0)
            told = {"lag": round(self.beat.lag(every), 3)}
            gov.internal.fleet.note("beat", f"{socket.gethostname()}:{os.getpid()}", every, told)
            self.beat.unread = gov.internal.heartbeat.note_published(every, self._queue(options))
        return result

    def _queue(self, options: dict[str, Any]) -> str:
        """Where the app's routes send it."""
        given = options.get("queue") or getattr(self, "queue", None)
        queue = self.app.amqp.router.route({"queue": given} if given else {}, self.name).get("queue")
        return str(getattr(queue, "name", queue or ""))
