"""Who holds what: read from Redis, by name or by the list that the renewal threads keep."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..client import Command, RedisClient

#: Arbiter.owner's: of anybody else's holder the fence says nothing.
_OURS = re.compile(r"[^:]{1,20}:\d+:[0-9a-f]{12}-\d+(~[0-9a-f]+)?$")


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who holds a lock, as it was when Redis was asked.

    Attributes:
        name: of what is locked.
        kind: "lock", "read", "write" or "semaphore".
        owner: the holder's token: host, process id and more; of a holder from outside, whatever it has set.
        token: the fencing token; None for a holder from outside.
        remaining: seconds until the lease ends if it is not renewed; None: it has no end, or is not known.
        degraded: True if Redis was away, and this host's lock file says so, for this host.
    """

    name: str
    kind: str
    owner: str
    token: int | None
    remaining: float | None
    degraded: bool = False


class Entry(NamedTuple):
    """What stands on the list of held locks."""

    kind: str
    name: str
    owner: str
    token: int


def read_holder(redis: RedisClient, name: str, cells: tuple[str, ...]) -> LockHolder | None:
    """Who holds the lock of that name. Raises BackendUnavailable, BackendError."""
    owner, left_ms, fence = redis.pipeline((("GET", cells[0]), ("PTTL", cells[0]), ("GET", cells[1])))
    if owner is None:
        return None
    shown = owner.decode(errors="backslashreplace")
    token = int(fence) if fence is not None and _OURS.match(shown) else None
    return LockHolder(name, "lock", shown, token, left_ms / 1000 if left_ms >= 0 else None)


def read_list(redis: RedisClient, index: str) -> list[Entry]:
    """What stands on the list, of locks that may have ended since. Raises BackendUnavailable, BackendError."""
    return [Entry(*json.loads(entry)) for entry in redis.call("ZRANGE", index, "0", "-1")]


def still_held(redis: RedisClient, entries: Iterable[tuple[Entry, tuple[str, ...]]]) -> list[LockHolder]:
    """Those of them that their owners still hold. Raises BackendUnavailable, BackendError.

    Args:
        entries: each with the keys of its lock.
    """
    asked = list(entries)
    commands: list[Command] = [("TIME",)]
    for entry, cells in asked:
        if entry.kind == "lock":
            commands += [("GET", cells[0]), ("PTTL", cells[0])]
        else:
            commands.append(("ZSCORE", cells[0], entry.owner))
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
