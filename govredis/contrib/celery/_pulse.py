"""Pulse: the thread in which a worker tells health that it lives, which queues it reads, and how long queues are."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from celery import Celery
from kombu.exceptions import ChannelError

from ..._latch import Latch
from ...api import GovRedis
from ...errors import printable
from ._broker import broker_of, broker_secrets, is_redis
from ._gov import queue_of
from ._liveness import touch

#: Queues that are looked at.
_MOST_QUEUES = 100
#: A broker that another worker has looked at within this part of an interval is not looked at again.
_RECENT = 0.8
#: Seconds that the worker's end waits for a look that is under way.
_PATIENCE = 1.0
#: A Redis broker that hangs must not silence this thread.
_BOUNDED = {"socket_timeout": 5, "socket_connect_timeout": 5, "max_retries": 0}


class Pulse(threading.Thread):
    """Tells at once, and then once in each interval, until it is stopped.

    Args:
        name: the worker's.
        every: seconds.
    """

    def __init__(self, app: Celery, gov: GovRedis, name: str, every: float) -> None:
        super().__init__(name="govredis-pulse", daemon=True)
        self._app = app
        self._fleet = gov.internal.fleet
        self._worker = name
        self._every = every
        self._stopped = Latch()
        self._connection: Any = None

    def run(self) -> None:
        while not self._stopped.is_set():
            self.beat()
            self._stopped.wait(self._every)

    def stop(self) -> None:
        """The worker ends by itself: it is not missed."""
        self._stopped.set()
        if self.is_alive():
            self.join(_PATIENCE)
        self._fleet.leave("worker", self._worker)

    def beat(self) -> None:
        touch(self._app)
        broker = broker_of(self._app)
        told = {"broker": broker, "queues": sorted(map(str, self._app.amqp.queues.consume_from))}
        since = self._fleet.note("worker", self._worker, self._every, told, broker)
        if since is None or since >= _RECENT * self._every:
            self._fleet.note("queues", broker, self._every, self._look())

    def _look(self) -> dict[str, Any]:
        """How many messages are in each queue; {"unknown": why} where the broker does not tell."""
        try:
            return self._ask()
        except Exception as error:  # noqa: BLE001 - of any transport
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(Exception):  # it may be broken
                    connection.release()
            return {"unknown": printable(broker_secrets(self._app).hide(f"{type(error).__name__}: {error}"))}

    def _ask(self) -> dict[str, Any]:
        if self._connection is None:
            options = _BOUNDED if is_redis(self._app) else {}
            self._connection = self._app.connection_for_read(transport_options=options)
        depths = {}
        for name in [*dict.fromkeys(_queues_of(self._app))][:_MOST_QUEUES]:
            with self._connection.channel() as channel:  # AMQP closes the channel of a question that it refuses
                try:
                    depths[name] = int(channel.queue_declare(queue=name, passive=True).message_count)
                except ChannelError:
                    depths[name] = 0  # there is no such queue: for Redis, an empty one
        told: dict[str, Any] = {"depths": depths}
        if is_redis(self._app):
            channel = self._connection.default_channel
            told["unacked"] = int(channel.client.hlen(channel.unacked_key))
            for _, delivered in channel.client.zrange(channel.unacked_index_key, 0, 0, withscores=True):
                told["oldest_unacked"] = round(max(0.0, time.time() - delivered), 3)
        return told


def _queues_of(app: Celery) -> Iterator[str]:
    """The queues that the app's configuration names, and those that this worker reads."""
    yield from map(str, app.amqp.queues.consume_from)
    yield from map(str, app.amqp.queues)
    ours = queue_of(app)
    if ours is not None:
        yield ours
    routes = app.conf.task_routes
    for route in routes if isinstance(routes, list | tuple) else [routes]:
        for target in route.values() if isinstance(route, dict) else ():
            queue = target.get("queue") if isinstance(target, dict) else target
            if queue:
                yield str(getattr(queue, "name", queue))
