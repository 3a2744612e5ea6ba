"""Parked messages: they wait in Redis until they are due, a publisher takes them, and they are known on arrival."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..client import RedisClient, Script
from ..keys import Keys, sibling

#: Seconds for which a publisher has a message to itself that it took.
LEASE = 5.0
#: Seconds after which no broker delivers a message a second time, and its ticket may go.
_REMEMBERED = 86_400.0
_AT_ONCE = "100"
_FLUSHED_AT_ONCE = 500
#: Seconds for which a message is set aside, after the first try and at most. Up to a quarter more, at random.
_ASIDE, _LONGEST_ASIDE = 5.0, 60.0
_WHY_CHARACTERS = 200
#: Flushed entries have odd scores below this microsecond, in 1970, until a publisher takes them.
_FLUSHED = 10**12


_random = random.SystemRandom()  # leaves the application's alone, and differs in forked children


@dataclass(frozen=True, slots=True)
class Arrival:
    """The identity of a message that has arrived, which tells it from others of the same run.

    Attributes:
        run: the run that the message starts, the same each time it is parked.
        times: how often it had been parked when it was published. 0: this is the message as it was sent at first.
        publication: which publication of the parked message it is; "" where `times` is 0.
        again: the broker says that it delivers it again.
    """

    run: str
    times: int = 0
    publication: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """The messages that wait for a broker.

    Attributes:
        count: how many.
        due: seconds until the first is due; less than 0: it is overdue.
        set_aside: how many of them could not be published when they were due.
    """

    broker: str
    count: int
    due: float
    set_aside: int


@dataclass(frozen=True, slots=True)
class SetAside:
    """A message that could not be published.

    Attributes:
        entry: its name.
        message: the bytes that were parked.
        due: seconds until it is tried again.
        tries: how often it was tried.
        why: the reason of the last failure.
    """

    entry: bytes
    message: bytes
    due: float
    tries: int
    why: str


@dataclass(frozen=True, slots=True)
class Taken:
    """A message to publish.

    Attributes:
        entry: its name, for `postpone` and `remove`.
        flushed: publish it, whether it is due or not.
    """

    entry: bytes
    message: bytes
    flushed: bool


class Parked:
    """The messages that wait in a Redis, by broker.

    Args:
        redis: where they wait. Messages that it loses are lost.
    """

    def __init__(self, keys: Keys, redis: RedisClient) -> None:
        self._redis = redis
        self._key = keys.parked()

    def lot(self, broker: str) -> ParkingLot:
        """The lot of a broker, under any name that all who publish to it share."""
        return ParkingLot(self._redis, self._key, broker)

    def lots(self) -> list[ParkingLot]:
        """A lot for each broker for which something was ever parked. Raises BackendUnavailable, BackendError."""
        # Another client may have added a name that is no text: the lot is empty.
        return [self.lot(broker.decode(errors="replace")) for broker in sorted(self._redis.call("SMEMBERS", self._key))]

    def waiting(self) -> list[Waiting]:
        """The brokers for which messages wait, and how many. Raises BackendUnavailable, BackendError."""
        found = []
        for lot in self.lots():
            count, first = lot.count(), lot.first(1)
            if count and first:
                found.append(Waiting(lot.broker, count, first[0][0], len(lot.set_aside())))
        return found


class ParkingLot:
    """The messages that wait for a broker: any bytes.

    A message is published at least once: taken with a lease of 5 s, published, removed, in this order. A message that
    cannot be published is set aside: kept, but not due for 5 s, twice as long each time up to a minute.

    `arrived` finds out whether a message was published twice. Workers run only the publication that arrives first, and
    run it again if the broker delivers it again. This is remembered for a day.

    Every method raises BackendUnavailable while that Redis is away, BackendError.
    """

    _park = Script(__package__, "clock.lua", "park.lua")
    _arrive = Script(__package__, "arrive.lua")
    _due = Script(__package__, "clock.lua", "due.lua")
    _set_aside = Script(__package__, "clock.lua", "set_aside.lua")

    def __init__(self, redis: RedisClient, key: str, broker: str) -> None:
        self.broker = broker
        self._redis = redis
        self._key = key
        self._entries = sibling(key, f"due:{broker}")
        self._messages = sibling(key, f"messages:{broker}")
        self._aside = sibling(key, f"aside:{broker}")

    def park(self, arrival: Arrival, seconds: float, message: bytes) -> bool:
        """Keep a message, in place of the one that has arrived, until it is due in `seconds`.

        Returns False where it was parked before: nothing changes then.
        """
        keys = (self._key, self._entries, self._messages, self._ticket(arrival.run), self._aside)
        times, wait_us, kept_ms = str(arrival.times + 1), f"{seconds * 1_000_000:.0f}", f"{_REMEMBERED * 1000:.0f}"
        return bool(self._redis.run(self._park, keys, self.broker, arrival.run, times, wait_us, message, kept_ms, ""))

    def arrived(self, arrival: Arrival) -> bool:
        """Whether a worker runs a message; False: it is a duplicate. Ask before the message has any effect."""
        again, kept_ms = str(int(arrival.again)), f"{_REMEMBERED * 1000:.0f}"
        args = (str(arrival.times), arrival.publication, again, kept_ms)
        return bool(self._redis.run(self._arrive, (self._ticket(arrival.run),), *args))

    def take(self) -> tuple[list[Taken], float | None]:
        """Take the due messages, or a part of them: no other publisher gets them for 5 s.

        Returns them, and the seconds until the next is due, None where nothing is parked.
        """
        lease_us = f"{LEASE * 1_000_000:.0f}"
        wait_us, *found = self._redis.run(
            self._due, (self._entries, self._messages, self._aside), lease_us, _AT_ONCE, ""
        )
        threes = zip(found[::3], found[1::3], found[2::3], strict=True)
        taken = [Taken(entry, message, bool(flushed)) for entry, message, flushed in threes]
        return taken, None if wait_us < 0 else wait_us / 1_000_000

    def postpone(self, entry: bytes, seconds: float) -> None:
        """Make a taken message due in so many seconds."""
        due_us = self._now() + round(seconds * 1_000_000)
        self._redis.call("ZADD", self._entries, "XX", str(due_us + due_us % 2), entry)

    def remove(self, entry: bytes) -> None:
        """Remove a taken message that was published."""
        self._redis.pipeline(
            (("HDEL", self._messages, entry), ("ZREM", self._entries, entry), ("HDEL", self._aside, entry))
        )

    def put_aside(self, entry: bytes, why: str) -> int:
        """Set aside a taken message that cannot be published. Returns how often it was tried; 0: it is gone.

        Args:
            why: without secrets; it is shown.
        """
        shortest_us, longest_us = f"{_ASIDE * 1_000_000:.0f}", f"{_LONGEST_ASIDE * 1_000_000:.0f}"
        more = f"{_random.uniform(0.0, 0.25):.6f}"
        args = (entry, why[:_WHY_CHARACTERS], shortest_us, longest_us, more, "")
        return int(self._redis.run(self._set_aside, (self._entries, self._aside), *args))

    def set_aside(self) -> list[SetAside]:
        """The messages that are set aside, in the order in which they are tried again."""
        found, now = self._redis.call("HGETALL", self._aside), self._now()
        held = dict(zip(found[::2], found[1::2], strict=True))
        if not held:
            return []
        scores, messages = self._redis.pipeline(
            (("ZMSCORE", self._entries, *held), ("HMGET", self._messages, *held)),
        )
        aside = []
        for (entry, text), score, message in zip(held.items(), scores, messages, strict=True):
            if score is not None and message is not None:
                tries, _, why = text.decode(errors="replace").partition(" ")
                due = _seconds_until(score, now)
                aside.append(SetAside(entry, message, due, int(tries) if tries.isdecimal() else 0, why))
        return sorted(aside, key=lambda message: message.due)

    def count(self) -> int:
        """How many are parked."""
        return int(self._redis.call("ZCARD", self._entries))

    def first(self, count: int) -> list[tuple[float, bytes]]:
        """The messages that are due first, each after the seconds until then: less than 0 if overdue, 0 if flushed."""
        found = self._redis.call("ZRANGE", self._entries, "0", str(count - 1), "WITHSCORES")
        if not found:
            return []
        now = self._now()
        messages = self._redis.call("HMGET", self._messages, *found[::2])
        dues = [_seconds_until(score, now) for score in found[1::2]]
        return [(due, message) for due, message in zip(dues, messages, strict=True) if message is not None]

    def flush(self) -> int:
        """Have all of them published now, in their order, whether they are due or not. Returns how many."""
        flushed = 0
        while True:
            found = self._redis.call(
                "ZRANGEBYSCORE", self._entries, str(_FLUSHED), "+inf", "LIMIT", "0", str(_FLUSHED_AT_ONCE)
            )
            if not found:
                return flushed
            # XX: a publisher may have removed an entry meanwhile.
            commands = [
                ("ZADD", self._entries, "XX", str(2 * (flushed + n) + 1), entry) for n, entry in enumerate(found)
            ]
            self._redis.pipeline(commands)
            flushed += len(found)

    def _now(self) -> int:
        """Microseconds, by the clock of the node that has the lot: entries are due by that one."""
        seconds, microseconds = self._redis.at(self._entries).call("TIME")
        return int(seconds) * 1_000_000 + int(microseconds)

    def _ticket(self, run: str) -> str:
        return sibling(self._key, f"ticket:{self.broker}:{run}")


def _seconds_until(score: bytes, now: int) -> float:
    """0 for a flushed message. Another client's score may be infinite."""
    due = float(score)
    return (due - now) / 1_000_000 if due >= _FLUSHED else 0.0
