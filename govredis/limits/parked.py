"""Messages that wait in Redis until they are due: parked, taken by whoever publishes them, known when they arrive."""

from __future__ import annotations

from dataclasses import dataclass

from ..client import RedisClient, Script
from ..keys import Keys, sibling

#: Seconds for which who took a message has it to himself.
LEASE = 5.0
#: Seconds after which nobody delivers a message a second time any more, and its ticket may go.
_REMEMBERED = 86_400.0
_AT_ONCE = "100"
_FLUSHED_AT_ONCE = 500
#: What was flushed is scored below this microsecond, in 1970, until somebody takes it; and with odd ones.
_FLUSHED = 10**12


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message as it has arrived, by what tells it from others of the same run.

    Attributes:
        run: what the message is to run, the same each time it is parked.
        times: how often it had been parked when it was published. 0: this is the message as it was sent at first.
        publication: which publication of what was parked it is; "" where `times` is 0.
        again: the broker says that it delivers it again.
    """

    run: str
    times: int = 0
    publication: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a broker: how many, and seconds until the first is due; less than 0: it is overdue."""

    broker: str
    count: int
    due: float


@dataclass(frozen=True, slots=True)
class Taken:
    """A message to publish.

    Attributes:
        entry: what `postpone` and `remove` want.
        flushed: it is to be published, whether its time has come or not.
    """

    entry: bytes
    message: bytes
    flushed: bool


class Parked:
    """The messages that wait in one Redis, by the broker that they are for.

    Args:
        redis: where they wait. What it loses, is lost.
    """

    def __init__(self, keys: Keys, redis: RedisClient) -> None:
        self._redis = redis
        self._key = keys.parked()

    def lot(self, broker: str) -> ParkingLot:
        """What is for one broker: whatever names it, the same for all that publish to it."""
        return ParkingLot(self._redis, self._key, broker)

    def lots(self) -> list[ParkingLot]:
        """Of each broker for which something was ever parked. Raises BackendUnavailable, BackendError."""
        return [self.lot(broker.decode()) for broker in sorted(self._redis.call("SMEMBERS", self._key))]

    def waiting(self) -> list[Waiting]:
        """How many wait for each broker, where any do. Raises BackendUnavailable, BackendError."""
        found = []
        for lot in self.lots():
            count, first = lot.count(), lot.first(1)
            if count and first:
                found.append(Waiting(lot.broker, count, first[0][0]))
        return found


class ParkingLot:
    """The messages that wait for one broker: any bytes.

    A message is published at least once: taken with a lease of 5 s, published, removed, in this order. What was
    published twice, `arrived` finds out: of all publications only that which arrives first is to be worked on; and that
    one again, if the broker delivers it again. It remembers for a day.

    Every method raises BackendUnavailable while that Redis is away, BackendError.
    """

    _park = Script(__package__, "clock.lua", "park.lua")
    _arrive = Script(__package__, "arrive.lua")
    _due = Script(__package__, "clock.lua", "due.lua")

    def __init__(self, redis: RedisClient, key: str, broker: str) -> None:
        self.broker = broker
        self._redis = redis
        self._key = key
        self._entries = sibling(key, f"due:{broker}")
        self._messages = sibling(key, f"messages:{broker}")

    def park(self, arrival: Arrival, seconds: float, message: bytes) -> bool:
        """Keep a message, in place of one that has arrived, until it is due in `seconds`.

        Returns False where that has been done before: nothing is changed then.
        """
        keys = (self._key, self._entries, self._messages, self._ticket(arrival.run))
        times, wait_us, kept_ms = str(arrival.times + 1), f"{seconds * 1_000_000:.0f}", f"{_REMEMBERED * 1000:.0f}"
        return bool(self._redis.run(self._park, keys, self.broker, arrival.run, times, wait_us, message, kept_ms, ""))

    def arrived(self, arrival: Arrival) -> bool:
        """Whether a message is to be worked on; False: it is one too many. To be asked before anything is done."""
        again, kept_ms = str(int(arrival.again)), f"{_REMEMBERED * 1000:.0f}"
        args = (str(arrival.times), arrival.publication, again, kept_ms)
        return bool(self._redis.run(self._arrive, (self._ticket(arrival.run),), *args))

    def take(self) -> tuple[list[Taken], float | None]:
        """Take what is due now, or a part of it: nobody else gets it for 5 s.

        Returns it, and seconds until the next one is due, None where nothing is parked.
        """
        lease_us = f"{LEASE * 1_000_000:.0f}"
        wait_us, *found = self._redis.run(self._due, (self._entries, self._messages), lease_us, _AT_ONCE, "")
        threes = zip(found[::3], found[1::3], found[2::3], strict=True)
        taken = [Taken(entry, message, bool(flushed)) for entry, message, flushed in threes]
        return taken, None if wait_us < 0 else wait_us / 1_000_000

    def postpone(self, entry: bytes, seconds: float) -> None:
        """What was taken is due in so many seconds."""
        due_us = _microseconds(self._redis.call("TIME")) + round(seconds * 1_000_000)
        self._redis.call("ZADD", self._entries, "XX", str(due_us + due_us % 2), entry)

    def remove(self, entry: bytes) -> None:
        """What was taken has been published."""
        self._redis.pipeline((("HDEL", self._messages, entry), ("ZREM", self._entries, entry)))

    def count(self) -> int:
        """How many are parked."""
        return int(self._redis.call("ZCARD", self._entries))

    def first(self, count: int) -> list[tuple[float, bytes]]:
        """Those that are due first, of each the seconds until then, and the message. Overdue ones have less than 0.

        Those that were flushed have 0.
        """
        found, time = self._redis.pipeline((("ZRANGE", self._entries, "0", str(count - 1), "WITHSCORES"), ("TIME",)))
        if not found:
            return []
        now = _microseconds(time)
        messages = self._redis.call("HMGET", self._messages, *found[::2])
        dues = [(int(due) - now) / 1_000_000 if int(due) >= _FLUSHED else 0.0 for due in found[1::2]]
        return [(due, message) for due, message in zip(dues, messages, strict=True) if message is not None]

    def flush(self) -> int:
        """Have all of them published now, in the order they have, whether their time has come or not.

        Returns how many.
        """
        flushed = 0
        while True:
            found = self._redis.call(
                "ZRANGEBYSCORE", self._entries, str(_FLUSHED), "+inf", "LIMIT", "0", str(_FLUSHED_AT_ONCE)
            )
            if not found:
                return flushed
            # XX: who has published one meanwhile has removed it.
            commands = [
                ("ZADD", self._entries, "XX", str(2 * (flushed + n) + 1), entry) for n, entry in enumerate(found)
            ]
            self._redis.pipeline(commands)
            flushed += len(found)

    def _ticket(self, run: str) -> str:
        return sibling(self._key, f"ticket:{self.broker}:{run}")


def _microseconds(time: list[bytes]) -> int:
    return int(time[0]) * 1_000_000 + int(time[1])
