"""The thread of a worker that publishes what is parked when it is due."""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
import threading

from celery import Celery

from ...api import GovRedis
from ...config import redact
from ...errors import BackendError
from ...limits.parked import ParkingLot
from ._parking import decode, still_to_wait, to_publish

log = logging.getLogger("govredis")

#: Seconds after which it looks whether something is due: what others have parked since, it does not know.
_POLL = 0.1
#: Seconds before it tries again where Redis or the broker is away.
_RETRY = 1.0

#: AMQP is to confirm what was published, before it is removed here. A broker that is away is said so, and tried again
#: here; kombu would try up to every 30 s, and say nothing.
_TRANSPORT_OPTIONS = {"confirm_publish": True, "max_retries": 0}


class Publisher(threading.Thread):
    """Publishes what is due, until it is stopped, over a connection of its own. Any number of them may run.

    Redis or the broker may go away meanwhile: what is parked stays so. What was taken when a broker went away is due
    again after 5 s. Of one that is killed, others take over what it had taken after 5 s.
    """

    def __init__(self, app: Celery, gov: GovRedis, lot: ParkingLot) -> None:
        super().__init__(name="govredis-publisher", daemon=True)
        self._app, self._gov, self._lot = app, gov, lot
        self._stopped = threading.Event()
        self._away = False

    def run(self) -> None:
        """Work until `stop` is called."""
        wait = 0.0
        while not self._stopped.wait(wait):
            try:
                self._until_away()
            except BackendError:
                wait = _RETRY  # Redis is: its breaker says so
            except Exception as error:  # noqa: BLE001 - each transport has its own
                if not self._away:
                    log.warning("parked tasks cannot be published, and stay parked: %s", redact(str(error)))
                self._away, wait = True, _RETRY

    def stop(self) -> None:
        """Publish no more than what it is at."""
        self._stopped.set()
        self.join(_RETRY)

    def _until_away(self) -> None:
        """Over one connection, made when something is due first. Returns when it is stopped."""
        with self._app.connection_for_write(transport_options=_TRANSPORT_OPTIONS) as connection:
            producer = self._app.amqp.Producer(connection, auto_declare=False)
            while True:
                due, next_in = self._lot.take()
                for taken in due:
                    if self._stopped.is_set():
                        return
                    parked = decode(taken.message)
                    wait = 0.0 if taken.flushed else still_to_wait(self._gov, parked, _POLL)
                    if wait:
                        self._lot.postpone(taken.entry, wait)
                        continue
                    try:
                        body, options = to_publish(self._app, parked)
                    except KeyError as error:
                        # It stays where it is, to be seen: another worker may know the queue.
                        log.error("%s[%s] is parked, and its queue unknown: %s", parked["task"], parked["id"], error)
                        continue
                    producer.publish(body, **options)
                    self._lot.remove(taken.entry)
                    self._gov.counters.add("celery.published")
                    if self._away:
                        log.info("parked tasks are published again")
                        self._away = False
                if self._stopped.wait(_POLL if next_in is None else min(_POLL, next_in)):
                    return
