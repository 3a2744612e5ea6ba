"""EventListener: reads a stream from a position on."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from .._context import Context
from .._fork import notice_fork, renew_in_child
from .._latch import Latch
from .._uncopied import Uncopied
from ..client import LONGEST_BLOCK, RedisClient
from ..errors import BackendUnavailable, check_timeout
from .event import Event, TopicPattern, decode_event, number_of

log: logging.Logger = logging.getLogger("govredis")

#: Seconds between two tries while Redis is away.
_RETRY = 0.1
_AT_ONCE = 100

R = TypeVar("R", bound="EventReader")


class EventReader(Uncopied, ABC):
    """The part that listeners and consumers share: they wait, bear outages, and can be ended."""

    def __init__(self, context: Context, redis: RedisClient, topic: TopicPattern, timeout: float | None) -> None:
        self._redis = redis
        self._key = context.keys.events(topic.topic)
        self._topic = topic
        self._timeout = None if timeout is None else check_timeout(timeout)
        self._counters = context.counters
        self._closed = Latch()
        self._missed = 0
        #: Called before each look that waits.
        self.before_waiting: Callable[[], object] | None = None
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        """A reader belongs to its process: in a child it is closed."""
        self._closed = Latch()
        self._closed.set()

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event, as soon as there is one. None after `timeout` seconds without any, or once it is closed.

        Without `timeout` it waits for ever, whatever `listen` or `consume` was given.

        While Redis is away it waits for its return. Raises BackendError where Redis answers with an error.
        """
        notice_fork()
        deadline = None if timeout is None else time.monotonic() + check_timeout(timeout)
        while not self._closed.is_set():
            left = LONGEST_BLOCK if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = self._look(min(left, LONGEST_BLOCK))
            except BackendUnavailable:
                event = None
                self._closed.wait(min(left, _RETRY))
            if event is not None:
                return event
            if deadline is not None and time.monotonic() >= deadline:
                break
        return None

    def close(self) -> None:
        """End the iteration, from any thread: a thread that waits returns within a second."""
        notice_fork()
        self._closed.set()

    @abstractmethod
    def _look(self, seconds: float) -> Event | None:
        """The next event, if one comes within so many seconds; 0: if one is there. Events of other topics add no time.

        Raises BackendUnavailable, BackendError.
        """

    def _wait(self) -> None:
        if self.before_waiting is not None:
            self.before_waiting()

    def _take_note(self, missed: int) -> None:
        """Some events were missed: the next event that is read will say so."""
        if missed:
            self._missed = -1 if missed < 0 or self._missed < 0 else self._missed + missed
            self._counters.add("events.missed", max(1, missed))
            how_many = "an unknown number of" if missed < 0 else str(missed)
            log.warning("%s events at %s were gone before they were read", how_many, self._key)

    def _read(self, position: str, flat: Sequence[bytes], deliveries: int = 1) -> Event | None:
        """The event of an entry, if its topic was asked for."""
        event = decode_event(position, flat, deliveries)
        if event is None:
            self._counters.add("events.unreadable")
            return None
        self._take_note(self._gap(position))
        if not self._topic.matches(event.topic):
            return None
        missed, self._missed = self._missed, 0
        return replace(event, missed=missed) if missed else event

    def _gap(self, position: str) -> int:
        """How many events were missed before the one at this position; -1: nobody knows."""
        return 0

    def __iter__(self: R) -> R:
        return self

    def __next__(self) -> Event:
        event = self.get(self._timeout)
        if event is None:
            raise StopIteration
        return event

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventListener(EventReader):
    """The events of a topic, one after the other: see `EventBus.listen`. For one thread; `close` is for all.

    A context manager, which closes it.

    Attributes:
        position: where it is: that of the last event that was read, whether its topic was asked for or not.
    """

    def __init__(
        self, context: Context, redis: RedisClient, topic: TopicPattern, position: str, timeout: float | None
    ) -> None:
        super().__init__(context, redis, topic, timeout)
        is_event = True
        if position == "$":
            found = redis.call("XREVRANGE", self._key, "+", "-", "COUNT", "1")
            position = found[0][0].decode() if found else "0-0"
            is_event = bool(found) and decode_event(position, found[0][1]) is not None
        self.position: str = position
        #: Where the last event was, asked for or not. Number 0: unknown, as behind another client's entry.
        self._last = position if is_event else "0-0"
        self._entries: deque[Any] = deque()

    def _look(self, seconds: float) -> Event | None:
        until, may_be_more = time.monotonic() + seconds, True
        while True:
            if not self._entries:
                left = max(0.0, until - time.monotonic())
                if not left and not may_be_more:
                    return None
                self._entries.extend(self._more(left))
                may_be_more = len(self._entries) >= _AT_ONCE
            if not self._entries:
                return None
            position, flat = self._entries[0]
            position = position.decode()
            event = self._read(position, flat)
            self.position = position
            self._entries.popleft()
            if event is not None:
                return event
            if self._closed.is_set():
                return None

    def _gap(self, position: str) -> int:
        before, self._last = self._last, position
        last, number = number_of(before), number_of(position)
        if not last or position == before:  # an exception struck before the position was noted
            return 0
        return number - last - 1 if number > last else -1

    def _more(self, seconds: float) -> Any:
        self._wait()
        command = ("XREAD", "COUNT", str(_AT_ONCE), "STREAMS", self._key, self.position)
        found = self._redis.block(command, seconds) if seconds > 0 else self._redis.call(*command)
        return found[0][1] if found else ()
