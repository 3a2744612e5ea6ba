"""The holders of locks, read from Redis: by name, by the list that renewal threads keep, and by a scan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..client import Command, RedisClient
from ..errors import BackendError

#: Keys that Redis looks at for one step of a scan: a fraction of a millisecond of its time.
_SCANNED_AT_ONCE = "1000"

#: The owner tokens of RedisLockBackend.owner. About other holders the fence says nothing.
_OURS = re.compile(r"[^:]{1,20}:\d+:[0-9a-f]{12}-\d+(~[0-9a-f]+)?$")


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The holder of a lock, at the instant when Redis was asked.

    Attributes:
        name: the lock's.
        kind: "lock", "read", "write" or "semaphore".
        owner: the holder's token: host, process id and more. A holder from outside sets its own.
        token: the fencing token; None for a holder from outside.
        remaining: seconds until the lease ends if it is not renewed; None: it has no end, or nobody knows it.
        degraded: True if Redis was away: this host's lock file tells, for this host.
    """

    name: str
    kind: str
    owner: str
    token: int | None
    remaining: float | None
    degraded: bool = False


class ListedLock(NamedTuple):
    """An entry on the list of held locks."""

    kind: str
    name: str
    owner: str
    token: int


def read_holder(redis: RedisClient, name: str, keys: tuple[str, ...]) -> LockHolder | None:
    """The holder of the lock of that name, or None. Raises BackendUnavailable, BackendError."""
    return _holder(name, *redis.pipeline((("GET", keys[0]), ("PTTL", keys[0]), ("GET", keys[1]))))


def _holder(name: str, owner: bytes | None, left_ms: int, fence: bytes | None) -> LockHolder | None:
    if owner is None or left_ms == -2:
        return None
    shown = owner.decode(errors="backslashreplace")
    token = int(fence) if fence is not None and _OURS.match(shown) else None
    return LockHolder(name, "lock", shown, token, left_ms / 1000 if left_ms >= 0 else None)


class LockScan:
    """Looks for the keys of locks among all keys of the database, 1,000 of them in a step.

    A lock that is held from the first step to the last is found, once or more often.

    Args:
        begin: the beginning of the keys of locks.
    """

    def __init__(self, begin: str) -> None:
        self._begin = len(begin.encode())
        self._pattern = re.sub(r"([\\*?\[\]^])", r"\\\1", begin) + "*"
        self._cursor: bytes | str = "0"

    def step(self, redis: RedisClient) -> list[bytes]:
        """Returns the keys found in this step; it may be `done` then. Raises BackendUnavailable, BackendError."""
        self._cursor, found = redis.call(
            "SCAN", self._cursor, "MATCH", self._pattern, "COUNT", _SCANNED_AT_ONCE, "TYPE", "string"
        )
        return list(found)

    @property
    def done(self) -> bool:
        """Whether all keys have been looked at. The next step begins anew."""
        return self._cursor == b"0"

    def read(self, redis: RedisClient, keys: Sequence[bytes]) -> dict[bytes, LockHolder]:
        """The holders of these locks, by key; no free ones. Raises BackendUnavailable, BackendError."""
        commands: list[Command] = []
        for key in keys:
            commands += (("GET", key), ("PTTL", key), ("GET", b"{%b}:fence" % key))
        replies = redis.pipeline(commands, each=True)
        held = {}
        for n, key in enumerate(keys):
            of_key = replies[3 * n : 3 * n + 3]
            if any(isinstance(reply, BackendError) for reply in of_key):
                continue  # a value of another type is there by now
            holder = _holder(key[self._begin :].decode(errors="backslashreplace"), *of_key)
            if holder is not None:
                held[key] = holder
        return held


def count_listed(redis: RedisClient, index: str) -> int:
    """How many locks on the list have a lease that has not ended. Raises BackendUnavailable, BackendError."""
    seconds, micros = redis.call("TIME")
    return int(redis.call("ZCOUNT", index, f"({int(seconds) * 1000 + int(micros) // 1000}", "+inf"))


def read_list(redis: RedisClient, index: str) -> list[ListedLock]:
    """The entries on the list; their locks may have ended since. Raises BackendUnavailable, BackendError."""
    return [ListedLock(*json.loads(entry)) for entry in redis.call("ZRANGE", index, "0", "-1")]


def still_held(redis: RedisClient, entries: Iterable[tuple[ListedLock, tuple[str, ...]]]) -> list[LockHolder]:
    """The holders of the locks that their owners still hold. Raises BackendUnavailable, BackendError.

    Args:
        entries: each with the keys of its lock.
    """
    asked = list(entries)
    commands: list[Command] = [("TIME",)]
    for entry, keys in asked:
        if entry.kind == "lock":
            commands += [("GET", keys[0]), ("PTTL", keys[0])]
        else:
            commands.append(("ZSCORE", keys[0], entry.owner))
    answers = iter(redis.pipeline(commands))
    seconds, micros = next(answers)
    now = int(seconds) + int(micros) / 1_000_000
    held = []
    for entry, _ in asked:
        found = next(answers)
        if entry.kind == "lock":
            left_ms = next(answers)
            left = left_ms / 1000 if found == entry.owner.encode() else 0
        else:
            left = float(found) / 1_000_000 - now if found is not None else 0
        if left > 0:
            held.append(LockHolder(entry.name, entry.kind, entry.owner, entry.token, left))
    return sorted(held, key=lambda h: (h.name, h.kind, h.token or 0))
