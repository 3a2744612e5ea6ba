"""Events as they are given to readers, and as they stand in a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import accumulate
from typing import Any

from ..errors import refuse
from ..keys import check_topic

#: An event is small: large data belongs elsewhere, and its id here.
PAYLOAD_BYTES = 65_536
#: Lists and dicts within each other: Python's JSON gives up where its caller's stack is deep, too.
PAYLOAD_DEPTH = 100

#: A string, or a bracket, of JSON.
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{\]}]', re.DOTALL)
_POSITION = re.compile(r"\d{1,20}-\d{1,20}")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_AFTER = "'$' for new events, '0' for all that are kept, an event's position, or an aware datetime"


@dataclass(frozen=True, slots=True)
class Event:
    """An event, as a reader gets it.

    Attributes:
        topic: words joined by dots.
        payload: as it was published, by way of JSON.
        entity: the id of the thing that it is about; None: it names none.
        id: the same each time this event is delivered, and no other event's.
        at: when it was published, by the clock of the server that took it; aware, UTC.
        position: its place in the stream: `listen(topic, after=position)` goes on behind it.
        missed: events of the stream that were trimmed before this reader could have them, right before this event. -1:
            Redis has lost the stream, and nobody knows.
        deliveries: how often it was delivered to its group, this time included; 1 for a listener.
    """

    topic: str
    payload: Any
    entity: str | None
    id: str
    at: datetime
    position: str
    missed: int = 0
    deliveries: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The event as a dict for JSON: all but `deliveries`; `at` in ISO 8601."""
        return {
            "topic": self.topic,
            "entity": self.entity,
            "payload": self.payload,
            "at": self.at.isoformat(),
            "id": self.id,
            "position": self.position,
            "missed": self.missed,
        }


@dataclass(frozen=True, slots=True)
class DeadEvent:
    """An event that a group gave up, as it was delivered too often without being done.

    Attributes:
        event: as it was delivered last.
        group: the group that gave it up.
    """

    event: Event
    group: str


def encode_payload(payload: Any) -> str:
    """The JSON of a payload. Raises ValueError."""
    try:
        text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise refuse(
            "payload", payload, f"JSON: dicts with str keys, lists, str, numbers, bool, None ({error})"
        ) from None
    if len(text) > PAYLOAD_BYTES:
        raise ValueError(f"payload has {len(text)} bytes of JSON; it must have {PAYLOAD_BYTES} at most")
    if _is_deep(text):
        raise ValueError(f"payload has more than {PAYLOAD_DEPTH} lists and dicts within each other; it must be flatter")
    return text


def _is_deep(text: str) -> bool:
    """Has this JSON more than PAYLOAD_DEPTH lists and dicts within each other?"""
    if text.count("[") + text.count("{") <= PAYLOAD_DEPTH:
        return False
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(accumulate(steps.get(found, 0) for found in _NESTING.findall(text))) > PAYLOAD_DEPTH


def decode_event(position: str, flat: Sequence[bytes], deliveries: int = 1) -> Event | None:
    """The event of an entry; None for an entry that govredis has not written."""
    try:
        fields = {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
        if _is_deep(fields["payload"]):
            return None
        return Event(
            check_topic(fields["topic"]),
            json.loads(fields["payload"]),
            fields["entity"] or None,
            fields["id"],
            _EPOCH + timedelta(microseconds=int(fields["at"])),
            position,
            deliveries=deliveries,
        )
    except (KeyError, IndexError, ValueError, OverflowError, RecursionError):
        return None


def number_of(position: str) -> int:
    """The number of the event at a position, counted from the stream's first; 0 at a position without an event."""
    return int(position.partition("-")[2] or 0)


def position_after(after: str | datetime) -> str:
    """The position behind which to begin, "$" included. Raises ValueError."""
    if isinstance(after, datetime):
        if after.tzinfo is None:
            raise refuse("after", after, _AFTER)
        return f"{max(0, (after - _EPOCH) // timedelta(milliseconds=1))}-0"
    if after == "$":
        return after
    if after == "0":
        return "0-0"
    if not isinstance(after, str) or not _POSITION.fullmatch(after) or any(int(n) >= 2**64 for n in after.split("-")):
        raise refuse("after", after, _AFTER)
    return after


class TopicPattern:
    """A topic and those below it: "agent" has "agent.updated" too. A `*` stands for one word, and never for the first.

    Raises ValueError for a text that is no such pattern.
    """

    __slots__ = ("_words", "text", "topic")

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or text.startswith("*"):
            raise refuse("topic", text, "a topic, in which '*' may stand for any word but the first")
        self.text: str = text
        #: A topic of the same stream.
        self.topic: str = check_topic(re.sub(r"(?<=\.)\*(?=\.|$)", "x", text))
        self._words = text.split(".")

    def matches(self, topic: str) -> bool:
        words = topic.split(".")
        pairs = zip(self._words, words, strict=False)
        return len(words) >= len(self._words) and all(asked in ("*", word) for asked, word in pairs)
