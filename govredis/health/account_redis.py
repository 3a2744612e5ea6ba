"""The account in Redis: totals, minutes and hours of counts, and outages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..client import Command, RedisClient, Script
from ..errors import BackendError
from ..keys import Keys

#: Names in the totals; counts of any others are left out.
ROOM = 1000
#: Seconds for which minutes and hours are kept, beyond their end, and the records of processes.
KEPT = 26 * 3600
#: Seconds for the record of a process that has ended: Redis may execute its last call late.
_KEPT_OF_ENDED = 900
#: Names in one call of the script, which keeps Redis from everything else meanwhile.
_AT_ONCE = 200
#: Outages that are kept, and the days for which they are.
_OUTAGES = 1000
OUTAGE_DAYS = 30

#: Between the server "redis" and the address of a Cluster's primary, in records of its outages.
AT = "@"
#: Among the totals: the microsecond in which they began. They begin anew when Redis has lost its data.
SINCE = "since"
#: Each name's count that Redis has been told, and its count now.
Counted = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class OutageRecord:
    """An outage as a process saw it; instants are microseconds since 1970.

    Attributes:
        server: "postgres", "redis", or "redis", AT and the address of a Cluster's primary.
        changed: when the process said so: one that is killed does not say that the outage has ended.
    """

    process: str
    server: str
    began: int
    ended: int | None
    kind: str
    noticed_by: str
    served: int
    slowest: float
    changed: int

    @property
    def identity(self) -> tuple[str, str, int]:
        return self.process, self.server, self.began


class RedisAccountBackend:
    """Commands for the teller, and reads. Those raise BackendUnavailable, BackendError."""

    def __init__(self, keys: Keys, redis: RedisClient) -> None:
        self._tag = f"{{{keys.account()}}}"
        self._totals = f"{self._tag}:totals"
        self._outages = f"{self._tag}:outages"
        self._redis = redis
        self._add = Script(__package__, "account.lua")
        self._outage = Script(__package__, "outage.lua")
        self.scripts: Sequence[Script] = (self._add, self._outage)

    def add(self, process: str, minute: int | None, counted: Counted, *, ended: bool = False) -> list[Command]:
        """The commands that add what a process has counted. They are harmless the second time.

        Args:
            minute: since 1970; None: the present one, by Redis's clock.
            ended: the process tells nothing more.
        """
        names = list(counted.items())
        kept = _KEPT_OF_ENDED if ended else KEPT
        return [
            self._add.call(
                (self._tag, self._totals, f"{self._tag}:process:{process}"),
                (
                    *("", "" if minute is None else str(minute), str(ROOM), str(kept * 1000)),
                    *(arg for name, (told, now) in names[i : i + _AT_ONCE] for arg in (name, str(told), str(now))),
                ),
            )
            for i in range(0, len(names), _AT_ONCE)
        ]

    def note_outage(self, record: OutageRecord, instead_of: OutageRecord | None) -> list[Command]:
        """The commands that note an outage, in the place of an earlier record of it."""
        ended = "" if record.ended is None else str(record.ended)
        earlier = "" if instead_of is None else _text(instead_of)
        oldest = str(record.changed - OUTAGE_DAYS * 86_400_000_000)
        arguments = _text(record), earlier, record.server, str(record.began), ended, oldest, str(_OUTAGES)
        return [self._outage.call((self._outages, self._totals), arguments)]

    def totals(self) -> dict[str, int]:
        """SINCE among them, from the first call of `add` on."""
        return _values(self._redis.call("HGETALL", self._totals))

    def minutes(self, numbers: Sequence[int]) -> list[dict[str, int]]:
        return self._read([f"{self._tag}:minute:{n}" for n in numbers])

    def minutes_and_hours(
        self, minutes: Sequence[int], hours: Sequence[int]
    ) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
        found = self._read([f"{self._tag}:minute:{n}" for n in minutes] + [f"{self._tag}:hour:{n}" for n in hours])
        return found[: len(minutes)], found[len(minutes) :]

    def _read(self, keys: Sequence[str]) -> list[dict[str, int]]:
        return [_values(flat) for flat in self._redis.pipeline([("HGETALL", key) for key in keys])]

    def outages(self, since: int) -> list[OutageRecord]:
        """Those that began at this moment or later, in microseconds."""
        texts = self._redis.call("ZRANGEBYSCORE", self._outages, str(since), "+inf")
        return [record for record in map(_record, texts) if record is not None]


def _values(flat: list[bytes]) -> dict[str, int]:
    """Without what another client has written there."""
    values = {}
    for name, count in zip(flat[::2], flat[1::2], strict=True):
        try:
            values[name.decode()] = int(count)
        except ValueError:
            continue
    return values


def _text(record: OutageRecord) -> str:
    return json.dumps(asdict(record))


def _record(text: bytes) -> OutageRecord | None:
    """None for what another client has written there."""
    try:
        record = OutageRecord(**json.loads(text))
    except (ValueError, TypeError):
        return None
    good = isinstance(record.began, int) and isinstance(record.ended, int | None) and isinstance(record.changed, int)
    is_known = isinstance(record.server, str) and record.server.partition(AT)[0] in {"redis", "postgres"}
    return record if good and is_known else None


def refused(replies: Iterable[Any]) -> BackendError | None:
    return next((reply for reply in replies if isinstance(reply, BackendError)), None)
