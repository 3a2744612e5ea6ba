"""StatusChanges: an event for each change of a status that several processes look at now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._context import Context
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .bus import EventBus
from .event import decode_event, encode_payload

#: Unless the last of those that wait says the same: another process may have been first.
_ADD = """
SELECT @schema@.govredis_event_add(%s::text, %s::text, ''::text, %s::text)
WHERE %s::text IS DISTINCT FROM (
    SELECT e.payload::json->>'to' FROM @schema@.govredis_events e
    WHERE e.stream = %s AND e.topic = %s ORDER BY e.number DESC LIMIT 1)
"""


class StatusChanges:
    """Publishes a status where it differs from the last that was published, whichever process did so.

    While Redis is away a change waits in PostgreSQL, and comes on the return. Two processes that look at the same
    moment may both publish it.

    Args:
        topic: no other topic begins with its first word.
        usual: the status that needs no event at first.
    """

    def __init__(self, context: Context, bus: EventBus, topic: str, usual: str) -> None:
        self._context = context
        self._bus = bus
        self._topic = topic
        self._usual = usual

    def note(self, status: str, more: Mapping[str, Any]) -> None:
        """Publish the status if it has changed, as {"from", "to"} and `more`. Raises nothing for a server's sake."""
        redis = self._context.redis
        if redis is None:
            return
        try:
            if self._bus.relay is not None:
                self._bus.relay.run_quietly()  # changes that were noted in an outage come first
            entries = redis.call("XREVRANGE", self._context.keys.events(self._topic), "+", "-", "COUNT", "1")
            last = decode_event("", entries[0][1]) if entries else None
            was = self._usual if last is None else last.payload["to"]
            if was != status:
                self._bus.publish(self._topic, {"from": was, "to": status, **more})
        except BackendUnavailable:
            if not self._wait(status, more):
                self._context.counters.add("events.unpublished")
        except (BackendError, KeyError, TypeError):  # no right to; or another client's event
            self._context.counters.add("events.unpublished")

    def _wait(self, status: str, more: Mapping[str, Any]) -> bool:
        """Have PostgreSQL keep the change for Redis's return. Returns whether it does, if it was a change."""
        postgres, keys = self._context.postgres, self._context.keys
        if postgres is None:
            return False
        text, stream = encode_payload({"from": None, "to": status, **more}), keys.row(self._topic.partition(".")[0])
        prefix = stream[: -len(keys.id_of(stream))]
        try:
            postgres.fetch(_ADD, (prefix, self._topic, text, status, stream, self._topic))
        except (BackendError, ConfigurationError):
            return False
        return True
