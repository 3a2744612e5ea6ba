"""EventBus: publishes events, and gives them to listeners and to groups of consumers."""

from __future__ import annotations

import secrets
from collections import deque
from datetime import datetime
from typing import Any

from .._context import Context
from .._fork import notice_fork, renew_in_child
from .._uncopied import Uncopied
from ..client import RedisClient, Script
from ..errors import BackendUnavailable, ConfigurationError, check_ttl, refuse
from ..keys import Id, check_id, check_name, sibling
from ..outbox import NotingFunction, check_transaction
from .consumer import EventConsumer
from .event import DeadEvent, TopicPattern, decode_event, encode_payload, position_after
from .listener import EventListener, R
from .relay import KEPT_MS, EventRelay

_ADD = NotingFunction("govredis_event_add", "text, text, text, text", ", ".join(["%s::pg_catalog.text"] * 4))
#: Milliseconds for which a lane is remembered: no command arrives a second time later than that.
_LANE_MS = "60000"


class EventBus(Uncopied):
    """Events on streams in Redis.

    A *topic* is a name of words joined by dots, such as `agent.updated`. Its first word names the stream, at
    `events:agent`: all topics that begin with it have one order. A stream keeps its last 100,000 events
    (`GOVREDIS_EVENTS_KEPT`), and all of them for 30 days after the last one.

    Raises ValueError for bad arguments, before anything is sent.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._keys = context.keys
        self._kept = str(context.config.events_kept)
        self.relay: EventRelay | None = None
        if context.redis is not None and context.postgres is not None:
            self.relay = EventRelay(context, context.redis, context.postgres)
        self._publish = Script(__package__, "append.lua", "publish.lua")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        #: Names, and counts of the next event. Each is used by one call at a time: events of a lane arrive in order.
        self._lanes: deque[tuple[str, int]] = deque()

    def publish(self, topic: str, payload: Any, connection: Any = None, *, entity: Id | None = None) -> str:
        """Publish an event: now, or with a transaction of yours. Returns its id.

        Without a connection it is in the stream when this returns. Raises BackendUnavailable where Redis is away: the
        event may have been published.

        With a connection it is a row in PostgreSQL, written in that transaction, which you commit or roll back. After
        the commit it is taken to the stream, within moments where this process lives on, and never after a rollback.
        While Redis is away it waits for a week at most, and a million events do. Events of one entity come in the order
        in which they were published, if its transactions exclude each other before they publish, as by a lock on its
        row. Any process with this PostgreSQL takes them along: those that publish so, that listen or consume, and
        workers where Celery's beat runs.

        Args:
            topic: words of letters, digits, "_" and "-", joined by dots.
            payload: what JSON can hold, up to 64 KiB of it, with 100 lists and dicts within each other at most.
            connection: a psycopg2 connection, not in autocommit mode, to the database of GOVREDIS_DATABASE_URL.
            entity: the id of the thing that the event is about.

        Raises BackendError. With a connection, raises its own errors, and ValueError for a connection in autocommit
        mode or of another driver. Raises ConfigurationError where no database is configured, or where tables or rights
        are missing.
        """
        notice_fork()
        key, text = self._keys.events(topic), encode_payload(payload)
        about = "" if entity is None else check_id(entity, "entity")
        if connection is not None:
            return self._publish_with(connection, topic, about, text)
        redis = self._redis()
        try:
            lane, count = self._lanes.pop()
        except IndexError:
            lane, count = secrets.token_hex(8), 1
        identity = f"{lane}-{count}"
        redis.run(
            self._publish,
            (key, sibling(key, "state"), sibling(key, f"lane:{lane}")),
            *(self._kept, KEPT_MS, str(count), topic, identity, about, text, _LANE_MS),
        )
        # After an error the lane is not used again: its event may still arrive, after a later one.
        self._lanes.append((lane, count + 1))
        return identity

    def _publish_with(self, connection: Any, topic: str, entity: str, text: str) -> str:
        check_transaction(connection)
        if self._context.postgres is None:
            raise ConfigurationError("GOVREDIS_DATABASE_URL is not set: nobody would take the event to Redis")
        schema = self._context.config.schema
        added = _ADD.call(connection, schema, self._keys.row("x")[:-1], topic, entity, text)
        if added is None:
            raise ConfigurationError(
                f"schema {schema} of the connection's database has no table of events: run `govredis migrate`"
            )
        if self.relay is not None:
            self.relay.soon()
        return str(added[0])

    def deliver(self) -> int:
        """Take the events of committed transactions to Redis now. Returns how many: 0 without Redis or PostgreSQL.

        Where another process is doing so, it returns sooner. Raises BackendUnavailable, BackendError, and
        ConfigurationError naming `govredis migrate`.
        """
        notice_fork()
        return 0 if self.relay is None else self.relay.run()

    def close(self) -> None:
        """Take the events of this process's transactions to Redis, as far as they are committed by now."""
        notice_fork()
        if self.relay is not None:
            self.relay.close()

    def listen(self, topic: str, *, after: str | datetime = "$", timeout: float | None = None) -> EventListener:
        """The events of a topic, and of those below it: an iterator that waits for the next one.

        Everyone who listens gets every event. A connection of its own waits in Redis, and asks once a second. While
        Redis is away the iterator waits for its return, and goes on behind the last event: nothing is lost that the
        stream still has. Events that were trimmed before they were read are counted in the next event's `missed`, with
        a warning in the log.

        `close`, from any thread, ends it, and so does leaving its `with`.

        Args:
            topic: "agent" has all topics that begin with this word; in "agent.*.failed" the star is any word. The first
                word is never a star.
            after: "$": events from now on; "0": all that are kept; the `position` of an event: those behind it; an
                aware datetime: those that came to the stream since.
            timeout: seconds without an event after which the iteration ends; None: never.

        Raises ValueError for a bad argument, and BackendUnavailable where Redis is disabled, or is away and `after` is
        "$": nobody knows where that is. The iterator raises BackendError where Redis answers with an error.
        """
        notice_fork()
        pattern, position = TopicPattern(topic), position_after(after)
        return self._reading(EventListener(self._context, self._redis(), pattern, position, timeout))

    def consume(
        self,
        group: str,
        name: str,
        topic: str,
        *,
        after: str | datetime = "0",
        timeout: float | None = None,
        claim_after: float = 60.0,
        deliveries: int = 5,
    ) -> EventConsumer:
        """The events of a topic that this consumer of a group gets: each event goes to one consumer of each group.

        An event is done when the loop asks for the next one, or leaves the `with` without an error. An event that is
        not done is delivered again: to a consumer of the same name at once, to another after `claim_after`. So it is
        delivered at least once, and its `id` tells that it was before.

        After `deliveries` it is given up, logged, counted as events.dead, and kept where `dead` finds it. A stream
        keeps 1,000 of these.

        Events are handed out in the stream's order, one at a time. Two consumers work side by side, so a later event
        may be done first. Where order matters, have one consumer, or compare versions.

        Args:
            group: a name. The group is made on first use, and lives as long as the stream.
            name: the consumer's, for one process and thread at a time.
            topic: as in `listen`. A group's consumers all have the same.
            after: as in `listen`, where the group begins. If Redis loses the stream, the group begins anew with "0".
            timeout: as in `listen`.
            claim_after: seconds; longer than an event ever takes. A consumer that is slower than that has its event
                delivered to another as well.
            deliveries: how often an event is delivered, at most.

        While Redis is away the iterator waits, as that of `listen`. An event that could not be told to be done is
        delivered again. Raises ValueError for a bad argument, and BackendUnavailable where Redis is disabled. The
        iterator raises BackendError where Redis answers with an error.
        """
        notice_fork()
        check_name(group, "group"), check_name(name, "name")
        pattern, position = TopicPattern(topic), position_after(after)
        if not isinstance(deliveries, int) or isinstance(deliveries, bool) or not 1 <= deliveries <= 1_000_000:
            raise refuse("deliveries", deliveries, "an int from 1 to 1000000")
        made = EventConsumer(
            *(self._context, self._redis(), group, name, pattern, position, timeout),
            *(check_ttl(claim_after, "claim_after"), deliveries, KEPT_MS),
        )
        return self._reading(made)

    def _reading(self, reader: R) -> R:
        """A reader that has events of transactions taken along while it waits."""
        if self.relay is not None:
            reader.before_waiting = self.relay.for_readers
        return reader

    def dead(self, topic: str) -> list[DeadEvent]:
        """The events of a topic and of those below it that groups gave up, the oldest first.

        Raises BackendUnavailable, BackendError.
        """
        notice_fork()
        pattern = TopicPattern(topic)
        found = []
        for _, flat in self._redis().call("XRANGE", sibling(self._keys.events(pattern.topic), "dead"), "-", "+"):
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            deliveries, position = fields.get(b"deliveries", b""), fields.get(b"entry", b"").decode(errors="replace")
            event = decode_event(position, flat, int(deliveries) if deliveries.isdigit() else 0)
            if event is not None and pattern.matches(event.topic):
                found.append(DeadEvent(event, fields.get(b"group", b"").decode(errors="replace")))
        return found

    def _redis(self) -> RedisClient:
        if self._context.redis is None:
            raise BackendUnavailable("Redis is disabled, and events are kept there")
        return self._context.redis
