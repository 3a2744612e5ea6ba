"""Celery's Redis broker, mended so that a broker's restart under a running worker loses nothing and repeats nothing.

For redis:// and rediss:// URLs; of kombu and Celery 5.7. (Celery 5.4 has its pool forget what runs when the connection
breaks: there it runs again after the visibility_timeout.) Without:

- A worker whose late-acknowledged tasks run while one of its processes is free ends with an AttributeError when the
  broker goes: closing the channel wants to put messages back, over a connection that has been forgotten.
- Where the connection alone breaks, it puts the messages of its running tasks back: they run twice.
- An acknowledgement that fails is never repeated: the task runs again after the visibility_timeout, and until then its
  place in the prefetch count is taken.
- A message that has been popped and could not be noted as unacknowledged is forgotten.
- A worker tries to reconnect after 2, 4, 6, ... 30 seconds, and logs each try.
- A task that wants to be retried while the broker is away is gone: Celery rejects the message it could not publish
  anew.

Here a process remembers what the broker could not be told, says it as soon as the broker is there, and tries every
second. It logs the first try of an outage.

These limits remain. A message is lost where its worker is killed (-9) in the instant between the pop and the note. So
it is where the broker is killed then, or wakes up after the worker has given it up. Where a task ends while the broker
is away, and its worker ends before the broker is back, the task runs again after the visibility_timeout. A task that
begins in the instant in which the connection breaks may run twice. During an outage a worker enforces no time limits.
"""

# mypy: allow-untyped-calls
# kombu says that it has types; its transports have none.
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import celery
from celery.exceptions import Reject
from celery.utils.log import get_logger
from celery.worker import consumer, state
from kombu.transport import redis
from kombu.transport.virtual import Message

logger = get_logger(__name__)

#: By delivery tag, the acknowledgement or the return of a message that the broker does not know of yet. One table for
#: the process: a connection that breaks takes its channels with it, and any later channel may carry it.
_untold: dict[str, Callable[[QoS], object]] = {}


class QoS(redis.QoS):
    """The messages that a channel has delivered and that are not acknowledged."""

    #: Its connection broke: what it has to tell, another channel's tells.
    broken = False
    #: It was logged that the broker cannot be told. An attribute of the class, so once an outage.
    behind = False

    def append(self, message: Message, delivery_tag: str) -> None:
        try:
            super().append(message, delivery_tag)
        except Exception:
            _untold[delivery_tag] = lambda qos: qos._put_back(message)
            raise

    def ack(self, delivery_tag: str) -> None:
        self._tell(delivery_tag, lambda qos: qos._remove_from_indices(delivery_tag).execute())

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self._tell(delivery_tag, lambda qos: qos.restore_by_tag(delivery_tag, leftmost=True))
        else:
            self.ack(delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        # Called when a worker has connected, and from time to time.
        self._tell_all()
        super().restore_visible(*args, **kwargs)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        # Called when the channel closes.
        if self.broken:
            self._on_collect.cancel()
        else:
            self._tell_all()
            super().restore_unacked_once(stderr)

    def leave(self) -> None:
        """Put back what no process of the pool has begun. Running tasks run on, and are acknowledged later."""
        running = {request.message.delivery_tag for request in tuple(state.active_requests)}
        self._flush()
        for tag in self._delivered.keys() - running:
            _untold.setdefault(tag, functools.partial(QoS.restore_by_tag, tag=tag))

    def _tell(self, delivery_tag: str, what: Callable[[QoS], object]) -> None:
        _untold[delivery_tag] = what
        if not self.broken:
            self._tell_all()

    def _tell_all(self) -> None:
        try:
            for tag, tell in list(_untold.items()):
                tell(self)
                QoS.behind = False
                _untold.pop(tag, None)
                # Only now it makes room for another message: a broker that hangs is not asked for more, which it would
                # give, on waking, to a connection that has been given up.
                if tag in self._delivered:
                    self._quick_ack(tag)
        except (*Transport.connection_errors, *Transport.channel_errors) as error:
            # Not raised: Celery would not try the other acknowledgements that it has at hand.
            if not QoS.behind:
                QoS.behind = True
                logger.warning("The outcome of %d messages will be told later: %s", len(_untold), error)

    def _put_back(self, message: Message) -> None:
        where = message.delivery_info
        with self.pipe_or_acquire() as pipe:
            self._remove_from_indices(message.delivery_tag, pipe)  # it may have been noted, and the reply lost
            self.channel._do_restore_message(message._raw, where["exchange"], where["routing_key"], pipe)
            pipe.execute()


class Channel(redis.Channel):
    """A channel that forgets nothing."""

    QoS = QoS


class Transport(redis.Transport):
    """kombu's Redis transport, with the channel above."""

    Channel = Channel


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer, which reconnects sooner, and leaves alone what runs."""

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        # A publisher that asks an idle connection every second whether it is alive knows it in time. A worker that does
        # drops, in a hang, the connection that its next message is to come on.
        patient = {"health_check_interval": 10}
        return self.ensure_connected(self.app.connection_for_read(heartbeat=heartbeat, transport_options=patient))

    def ensure_connected(self, conn: Any) -> Any:
        ensure = conn.ensure_connection

        def sooner(errback: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
            said: list[Exception] = []

            def say_once(error: Exception, interval: float) -> None:
                if not said:
                    errback(error, interval)
                said.append(error)

            connection = ensure(say_once, *args, interval_start=1, interval_step=0, **kwargs)
            if said:
                logger.info("The broker is back, at try %d", len(said) + 1)
            return connection

        conn.ensure_connection = sooner
        return super().ensure_connected(conn)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        # Then Celery forgets what it was given, but for what a process of the pool has begun.
        transport = self.connection.transport
        left = [channel.qos for channel in transport.channels] if isinstance(transport, Transport) else []
        for qos in left:
            qos.broken = True
        super().on_connection_error_after_connected(exc)
        for qos in left:
            qos.leave()


class Task(celery.Task):  # type: ignore[misc]
    """A task that is not lost where it cannot be published anew: its message goes back to the queue."""

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().retry(*args, **kwargs)
        except Reject as rejected:
            raise Reject(rejected.reason, requeue=True) from rejected
