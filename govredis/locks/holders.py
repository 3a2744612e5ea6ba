"""The holders of locks, read from Redis: by name, by the list that renewal threads keep, and by a scan."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

from ..client import Command, RedisClient, RedisNode
from ..errors import BackendError, BackendUnavailable
from ..keys import check_id
from .held_list import HeldLockList
from .node_by_node import NodeByNode

#: Seconds that the server's clock may be ahead of this host's.
_CLOCKS_APART = 60.0
#: Keys that Redis looks at for one step of a scan: a fraction of a millisecond of its time.
_SCANNED_AT_ONCE = "1000"
_LISTED_AT_ONCE = 1000

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

    @property
    def since(self) -> datetime | None:
        """When it was granted (aware UTC). None where that is unknown, as of a holder from outside."""
        return self.since_at(time.time())

    def since_at(self, now: float) -> datetime | None:
        """`since`, at that time in seconds since 1970."""
        # A token is the server's time of the grant, in microseconds. It is later only where that clock went back.
        if self.token is None or not 0 < self.token / 1e6 <= now + _CLOCKS_APART:
            return None
        return datetime.fromtimestamp(min(self.token / 1e6, now), timezone.utc)


class ListedLock(NamedTuple):
    """An entry on the list of held locks."""

    kind: str
    name: str
    owner: str
    token: int


class FoundHolders(list[LockHolder]):
    """The holders that were found.

    Attributes:
        unanswered: the names of the nodes of a Cluster that did not answer: the holders of their locks are missing.
    """

    def __init__(self, holders: Iterable[LockHolder], unanswered: Iterable[str]) -> None:
        super().__init__(holders)
        self.unanswered: tuple[str, ...] = tuple(sorted(unanswered))


class HeldCounts(NamedTuple):
    """How many locks are held, through govredis and from outside; and the lock held longest, with its seconds.

    Attributes:
        unanswered: as of FoundHolders.
    """

    held: int
    outside: int
    longest: ListedLock | None = None
    seconds: float = 0.0
    unanswered: tuple[str, ...] = ()


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
    """Looks for the keys of locks among all keys of the database, 1,000 of them in a step, on one node after the other.

    A lock that is held from the first step to the last is found, once or more often. If its slot moves meanwhile, to a
    node that has been looked at, it is not found.

    Args:
        begin: the beginning of the keys of locks.

    Attributes:
        done: whether all keys have been looked at. The next step begins anew.
    """

    def __init__(self, begin: str) -> None:
        self._begin = len(begin.encode())
        self._pattern = re.sub(r"([\\*?\[\]^])", r"\\\1", begin) + "*"
        self._cursor: bytes | str = "0"
        self._node: RedisNode | None = None
        self._scanned: set[RedisNode] = set()
        self.done: bool = True

    def step(self, nodes: NodeByNode) -> list[bytes]:
        """Returns the keys found in this step; it may be `done` then. Raises BackendUnavailable, BackendError."""
        if self.done:
            self._scanned.clear()
        node = self._node or next(node for node in nodes.redis.nodes() if node not in self._scanned)
        self._cursor, found = nodes.ask(node, self._scan) or (b"0", ())
        if self._cursor == b"0":
            self._scanned.add(node)
        self._node = None if self._cursor == b"0" else node
        self.done = self._node is None and self._scanned.issuperset(nodes.redis.nodes())
        return list(found)

    def _scan(self, node: RedisNode) -> Any:
        return node.call("SCAN", self._cursor, "MATCH", self._pattern, "COUNT", _SCANNED_AT_ONCE, "TYPE", "string")

    def read(self, nodes: NodeByNode, keys: Iterable[bytes]) -> dict[bytes, LockHolder]:
        """The holders of these locks, by key; no free ones. Raises BackendUnavailable, BackendError."""
        held = {}
        for key, found in nodes.ask_about(keys, bytes, _replies_for):
            name = key[self._begin :].decode(errors="backslashreplace")
            holder = None if found is None else _holder(name, *found)
            if holder is not None:
                held[key] = holder
        return held


def _replies_for(node: RedisNode, keys: list[bytes]) -> list[Any]:
    """For each key of a lock the arguments of `_holder`; None where a value of another type is there by now."""
    commands: list[Command] = []
    for key in keys:
        commands += (("GET", key), ("PTTL", key), ("GET", b"{%b}:fence" % key))
    replies = node.pipeline(commands, each=True)
    found: list[Any] = []
    for n in range(0, len(replies), 3):
        of_key = replies[n : n + 3]
        errors = [reply for reply in of_key if isinstance(reply, BackendError)]
        unavailable = next((error for error in errors if isinstance(error, BackendUnavailable)), None)
        found.append(unavailable if errors else of_key)
    return found


def count_listed(nodes: NodeByNode, held_list: HeldLockList) -> tuple[int, ListedLock | None, float]:
    """How many locks on the list have a lease that has not ended; the one that is held longest, and its seconds.

    A token is the time of its grant, in microseconds, or a little more. The oldest is looked for among 1,000 at most.
    Raises BackendUnavailable, BackendError.
    """
    most = str(max(1, _LISTED_AT_ONCE // len(held_list.keys)))

    def question(node: RedisNode, keys: list[str]) -> list[Any]:
        seconds, micros = node.call("TIME")
        now_us = int(seconds) * 1_000_000 + int(micros)
        alive = f"({now_us // 1000}"
        commands: list[Command] = []
        for key in keys:
            commands.append(("ZCOUNT", key, alive, "+inf"))
            commands.append(("ZRANGEBYSCORE", key, alive, "+inf", "LIMIT", "0", most))
        replies = node.pipeline(commands, each=True)
        return [
            next((reply for reply in pair if isinstance(reply, BackendError)), (*pair, now_us))
            for pair in zip(replies[::2], replies[1::2], strict=True)
        ]

    total, oldest, held_us = 0, None, 0
    for _, (count, entries, now_us) in nodes.ask_about(held_list.keys, str, question):
        total += int(count)
        for lock in filter(None, map(_listed, entries)):
            its_us = now_us - lock.token
            if oldest is None or its_us > held_us:
                oldest, held_us = lock, its_us
    return total, oldest, max(0.0, held_us / 1_000_000)


def read_list(nodes: NodeByNode, held_list: HeldLockList, most: int = 0) -> list[ListedLock]:
    """The entries on the list; their locks may have ended since. Raises BackendUnavailable, BackendError.

    Args:
        most: so many of them, or a few more: of each list those whose leases end last; 0: all.
    """
    first = str(-math.ceil(most / len(held_list.keys)))

    def question(node: RedisNode, keys: list[str]) -> list[Any]:
        return node.pipeline([("ZRANGE", key, first, "-1") for key in keys], each=True)

    answers = nodes.ask_about(held_list.keys, str, question)
    return [lock for _, entries in answers for lock in map(_listed, entries) if lock is not None]


def _listed(entry: bytes) -> ListedLock | None:
    """An entry of the list; None for another client's."""
    try:
        kind, name, owner, token = json.loads(entry)
        return ListedLock(str(kind), check_id(name), str(owner), int(token))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def still_held(nodes: NodeByNode, entries: Iterable[tuple[ListedLock, tuple[str, ...]]]) -> list[LockHolder]:
    """The holders of the locks that their owners still hold. Raises BackendUnavailable, BackendError.

    Args:
        entries: each with the keys of its lock.
    """
    held = [
        LockHolder(entry.name, entry.kind, entry.owner, entry.token, left)
        for (entry, _), left in nodes.ask_about(entries, lambda asked: asked[1][0], _seconds_left)
        if left > 0
    ]
    return sorted(held, key=lambda h: (h.name, h.kind, h.token or 0))


def _seconds_left(node: RedisNode, entries: list[tuple[ListedLock, tuple[str, ...]]]) -> list[Any]:
    """The rest of each lease, in seconds; 0 where its lock has another holder, or nobody has it."""
    commands: list[Command] = [("TIME",)]
    for entry, keys in entries:
        if entry.kind == "lock":
            commands += [("GET", keys[0]), ("PTTL", keys[0])]
        else:
            commands.append(("ZSCORE", keys[0], entry.owner))
    answers = iter(node.pipeline(commands, each=True))
    seconds, micros = next(answers)
    now = int(seconds) + int(micros) / 1_000_000
    left: list[Any] = []
    for entry, _ in entries:
        found = next(answers)
        left_ms = next(answers) if entry.kind == "lock" else 0
        if isinstance(found, BackendError):
            left.append(found)
        elif entry.kind != "lock":
            left.append(float(found) / 1_000_000 - now if found is not None else 0)
        elif isinstance(left_ms, BackendError):
            left.append(left_ms)
        else:
            left.append(left_ms / 1000 if found == entry.owner.encode() else 0)
    return left
