"""Shelf: the values of one namespace in Redis, used and stored under the guard."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

from .._counters import Counters
from .._fork import renew_in_child
from ..client import Command, RedisClient
from ..errors import BackendUnavailable
from . import cells
from .guard import Guard, Seen
from .values import Record, decode, encode, version_of

#: How often a read is tried whose connection turns out to be a new one.
_TRIES = 3

#: Of a cache without a guard: everything may be used, and stored.
_UNGUARDED = Seen(-1, math.inf, math.inf, 0)
#: Of one whose guard nobody can renew, since PostgreSQL is away: likewise; what is stored has no epoch, and is not used
#: when it is back.
_BLIND = Seen(-1, math.inf, math.inf, 0)


class Shelf:
    """Reads and stores, each in one round trip; counts what it does. Redis away is a miss, or nothing stored."""

    def __init__(
        self, namespace: str, redis: RedisClient | None, guard: Guard | None, *, strict: bool, counters: Counters
    ) -> None:
        self._namespace = namespace
        self._redis = redis
        self._guard = guard
        self._strict = strict
        self._counters = counters
        self._hits, self._misses = f"{namespace}.hits", f"{namespace}.misses"
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._nonce = os.urandom(8).hex()
        self._leases = itertools.count()

    def _count(self, what: str, n: int = 1) -> None:
        self._counters.add(f"{self._namespace}.{what}", n)

    def look(self) -> Seen | None:
        """What says that values may be used; None: they may not, and nothing is to be stored."""
        if self._redis is None:
            return None
        if self._guard is None:
            return _UNGUARDED
        try:
            seen = self._guard.look()
        except BackendUnavailable:
            self._count("degraded.reads")
            return None
        if seen is None and self._guard.blind:
            if self._strict:
                raise BackendUnavailable(f"PostgreSQL is away, and cached values of {self._namespace!r} may be stale")
            self._count("degraded.unguarded")
            return _BLIND
        if seen is None:
            self._count("bypassed")
        return seen

    def _stands(self, seen: Seen) -> bool:
        return seen is _UNGUARDED or seen is _BLIND or (self._guard is not None and self._guard.stands(seen))

    def read(self, keys: list[str]) -> tuple[list[Record | None], Seen | None]:
        """The records that may be used, None for each other; and what they were looked for under, for `lease`."""
        redis = self._redis
        raws: list[bytes | None] = [None] * len(keys)
        for _ in range(_TRIES):
            seen = self.look()
            if seen is None or redis is None:
                break
            try:
                raws = [redis.call("GET", keys[0])] if len(keys) == 1 else redis.pipeline([("GET", k) for k in keys])
            except BackendUnavailable:
                self._count("degraded.reads")
                seen = None
                break
            if self._stands(seen):
                break
            raws = [None] * len(keys)
        if seen is None:
            return [None] * len(keys), None
        records = [None if raw is None else self._usable(decode(raw), seen) for raw in raws]
        missed = records.count(None)
        if missed < len(keys):
            self._counters.add(self._hits, len(keys) - missed)
        if missed:
            self._counters.add(self._misses, missed)
        return records, seen

    @staticmethod
    def _usable(record: Record | None, seen: Seen) -> Record | None:
        if record is None or seen is _UNGUARDED or seen is _BLIND or record.epoch == seen.epoch:
            return record
        return None

    def lease(self, keys: list[str], seen: Seen | None) -> list[str] | None:
        """A lease for each, to be had before loading; None if nothing can be stored anyway."""
        if self._redis is None or seen is None:
            return None
        try:
            replies = self._redis.pipeline([cells.take(key, self.new_lease()) for key in keys], (cells.LEASE,))
        except BackendUnavailable:
            self._count("degraded.leases")
            return None
        return [lease.decode() for lease in replies]

    def new_lease(self) -> str:
        return f"{self._nonce}{next(self._leases)}"

    def store(self, items: list[tuple[str, Any, str]], seen: Seen | None, ttl_ms: str) -> int:
        """Store (key, value, lease) items, "" for no lease. Returns how many were stored."""
        if self._redis is None or seen is None or not items:
            return 0
        epoch = None if seen is _UNGUARDED or seen is _BLIND else seen.epoch
        fills: list[Command] = [
            cells.fill(key, encode(value, epoch), ttl_ms, lease, version_of(value)) for key, value, lease in items
        ]
        try:
            replies = self._redis.pipeline(fills, (cells.FILL,))
        except BackendUnavailable:
            self._count("degraded.fills")
            return 0
        stored: int = sum(replies)
        if stored:
            self._count("fills", stored)
        if stored < len(replies):
            self._count("fills_refused", len(replies) - stored)
        return stored
