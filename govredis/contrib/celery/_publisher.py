"""Publisher: the thread of a worker that publishes parked messages when they are due."""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
import threading

from celery import Celery
from kombu.exceptions import OperationalError

from ..._latch import Latch
from ...api import GovRedis
from ...errors import BackendUnavailable, printable
from ...limits.parked import ParkingLot, Taken
from ._parking import decode, still_to_wait, to_publish
from ._producer import BrokerProducer

log = logging.getLogger("govredis")

#: Seconds between two looks for due messages: other processes may have parked some since.
_POLL = 0.1
#: Seconds before the next try where Redis or the broker is away.
_RETRY = 1.0


class Publisher(threading.Thread):
    """Publishes due messages until it is stopped, over a connection of its own. Any number of publishers may run.

    Redis or the broker may go away meanwhile: messages stay parked. A message that was taken when the broker went away,
    or when the publisher was killed, is due again after 5 s, for any publisher.

    A task that cannot be published is set aside, counted as celery.set_aside, and delays no other. Its message may be
    damaged, its queue unknown, its limit unreadable, or the broker refuses it.
    """

    def __init__(self, app: Celery, gov: GovRedis, lot: ParkingLot) -> None:
        super().__init__(name="govredis-publisher", daemon=True)
        self._app, self._gov, self._lot = app, gov, lot
        self._stopped = Latch()
        self._away = False
        self._producer = BrokerProducer(app)

    def run(self) -> None:
        """Work until `stop` is called."""
        wait = 0.0
        while not self._stopped.wait(wait):
            try:
                next_in = self._publish_due()
                wait = _POLL if next_in is None else min(_POLL, next_in)
            except BackendUnavailable:
                wait = _RETRY  # Redis is away: its breaker logs that
            except Exception as error:  # noqa: BLE001 - each transport has errors of its own
                self._producer.disconnect()
                if not self._away:
                    log.warning("parked tasks cannot be published, and stay parked: %s", self._producer.said(error))
                self._away, wait = True, _RETRY
        self._producer.disconnect()

    def stop(self) -> None:
        """Stop after the message that is being published."""
        self._stopped.set()
        self.join(_RETRY)

    def _publish_due(self) -> float | None:
        """Publish some of the due messages. Returns seconds until the next is due; None: nothing is parked.

        Raises BackendUnavailable where Redis is away, and the broker's error where it accepts nothing.
        """
        due, next_in = self._lot.take()
        published = 0
        refused: list[tuple[Taken, Exception]] = []
        for taken in due:
            if self._stopped.is_set():
                break
            try:
                parked = decode(taken.message)
                wait = 0.0 if taken.flushed else still_to_wait(self._gov, parked, _POLL)
                body, options = to_publish(self._app, parked) if not wait else (b"", {})
            except BackendUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 - anything may be parked there; only this message is at fault
                self._put_aside(taken, error)
                continue
            if wait:
                self._lot.postpone(taken.entry, wait)
                continue
            producer = self._producer.connected()
            try:
                producer.publish(body, **options)
            except Exception as error:
                if isinstance(error, (OperationalError, *self._producer.connection_errors)):
                    raise
                self._producer.disconnect()  # AMQP closes the channel
                refused.append((taken, error))
                continue
            published += 1
            self._lot.remove(taken.entry)
            self._gov.counters.add("celery.published")
            if self._away:
                log.info("parked tasks are published again")
                self._away = False
        if len(refused) > 1 and not published and len({type(reason) for _, reason in refused}) == 1:
            raise refused[0][1]  # the broker refuses all alike (it is full, or read-only): no message is at fault
        for taken, reason in refused:
            self._put_aside(taken, reason)
        return next_in

    def _put_aside(self, taken: Taken, error: Exception) -> None:
        why = f"{type(error).__name__}: {self._producer.said(error)}"
        tries = self._lot.put_aside(taken.entry, why)
        if tries:
            self._gov.counters.add("celery.set_aside")
            entry = taken.entry.decode(errors="backslashreplace")
            log.error(
                "parked task %s is set aside, as it cannot be published (try %d): %s", printable(entry), tries, why
            )
