"""EventConsumer: takes events of a group. Each event goes to one consumer of the group."""

from __future__ import annotations

import time
from types import TracebackType

from .._context import Context
from ..client import RedisClient, Script
from ..errors import BackendError, BackendUnavailable
from ..keys import sibling
from .event import Event, TopicPattern
from .listener import EventReader, log

#: Events that are given up, kept of each stream.
DEAD_KEPT = 1000
#: Milliseconds after which a consumer without events is forgotten: its process has ended.
_FORGOTTEN_MS = 86_400_000


class EventConsumer(EventReader):
    """A consumer of a group: see `EventBus.consume`. For one thread; `close` is for all.

    A context manager. Where its body ends without an error, the event before is done too.
    """

    _take = Script(__package__, "take.lua")
    _leave = Script(__package__, "leave.lua")

    def __init__(
        self,
        context: Context,
        redis: RedisClient,
        group: str,
        name: str,
        topic: TopicPattern,
        position: str,
        timeout: float | None,
        claim_after: float,
        deliveries: int,
        kept_ms: str,
    ) -> None:
        super().__init__(context, redis, topic, timeout)
        self._dead = sibling(self._key, "dead")
        self._group, self._name = group, name
        self._begin = position
        self._claim_ms, self._deliveries = f"{claim_after * 1000:.0f}", str(deliveries)
        self._kept_ms = kept_ms
        self._claim_every = claim_after / 4
        self._claim_at = 0.0
        #: The position of the event that was given out; "": none, or it is done.
        self._given = ""
        self._is_member = False

    def renew_after_fork(self) -> None:
        super().renew_after_fork()
        self._given, self._is_member = "", False

    def _look(self, seconds: float) -> Event | None:
        until = time.monotonic() + seconds
        while True:
            if not self._closed.is_set():
                event = self._next()
                if event is not None:
                    return event
            left = until - time.monotonic()
            if self._closed.is_set() or (seconds > 0 and left <= 0):
                return None
            if self._given:
                continue  # an event that was not asked for
            if seconds <= 0:
                return None
            self._wait()
            command = ("XREADGROUP", "GROUP", self._group, self._name, "COUNT", "1", "STREAMS", self._key, ">")
            try:
                found = self._redis.block(command, min(left, self._claim_every))
            except BackendUnavailable:
                raise
            except BackendError as error:
                if "NOGROUP" not in str(error):
                    raise
                return None  # the next look makes the group anew
            if not found:
                return None
            position, flat = found[0][1][0]
            self._given = position.decode()
            event = self._read(self._given, flat)
            if event is not None:
                return event

    def _next(self) -> Event | None:
        """Say that the event before is done, and take the next one that there is."""
        now = time.monotonic()
        claims = now >= self._claim_at
        reply = self._redis.run(
            self._take,
            (self._key, self._dead),
            *(self._group, self._name, self._given, self._begin, "1" if claims else ""),
            *(self._claim_ms, self._deliveries, str(DEAD_KEPT), self._kept_ms, str(_FORGOTTEN_MS)),
        )
        is_new, dead, missed, *taken = reply
        if claims and (not taken or taken[1] == 1):  # else there may be more to claim
            self._claim_at = now + self._claim_every
        self._given = taken[0].decode() if taken else ""
        self._take_note(-1 if is_new and self._is_member else missed)
        # From now on a group that is not there was lost with its stream: all that is there is new.
        self._is_member, self._begin = True, "0-0"
        if dead:
            self._counters.add("events.dead", dead)
            log.error("%d events at %s were given up by group %s, as they were not done", dead, self._key, self._group)
        return self._read(self._given, taken[2], taken[1]) if taken else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if not self._is_member:
            return
        given, self._given = self._given if kind is None else "", ""
        try:
            self._redis.run(self._leave, (self._key,), self._group, self._name, given)
        except BackendUnavailable:
            self._counters.add("events.undone")  # another consumer gets the event, once more
