"""Shelf: a namespace's values as they stand in Redis, what may be used of them, and what is stored there."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .._counters import Counters
from .._fork import renew_in_child
from ..client import Command, RedisClient
from ..errors import BackendUnavailable
from . import cells
from .frozen import read_only
from .generation import Generation
from .guard import Guard, Seen
from .local import Cell, LocalValues
from .values import Record, decode

#: How often a read is tried whose connection turns out to be a new one.
_TRIES = 3

#: Of a cache without a guard: everything may be used, and stored.
_UNGUARDED = Seen(-1, math.inf, math.inf, 0)
#: Of one whose guard nobody can renew, since PostgreSQL is away: likewise; what is stored has no epoch, and is not used
#: when it is back.
_BLIND = Seen(-1, math.inf, math.inf, 0)


class Lease(NamedTuple):
    token: str
    #: False: somebody else took it, and is loading.
    is_ours: bool
    #: What was there when it was taken, if it may be used: it was stored since it was missed.
    record: Record | None = None
    #: Something was there, and over a connection so new that it cannot be judged: read again.
    is_unclear: bool = False


class Shelf:
    """The values of one cache in Redis. Redis being away is counted, and never raised.

    Args:
        local: where what was read is kept in this process; None: nowhere.
        strict: BackendUnavailable, where nobody can tell whether values are stale.
    """

    def __init__(
        self,
        redis: RedisClient | None,
        guard: Guard | None,
        generation: Generation,
        local: LocalValues | None,
        *,
        namespace: str,
        strict: bool,
        counters: Counters,
    ) -> None:
        self.generation = generation
        self.local = local
        self._redis = redis
        self._guard = guard
        self._namespace = namespace
        self._strict = strict
        self._counters = counters
        self._hits, self._misses = f"{namespace}.hits", f"{namespace}.misses"
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._nonce = os.urandom(8).hex()
        self._numbers = itertools.count()

    def count(self, what: str, n: int = 1) -> None:
        self._counters.add(f"{self._namespace}.{what}", n)

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self) -> Seen | None:
        """What says that values may be used; None: they may not, and nothing is to be stored."""
        if self._redis is None:
            return None
        if self._guard is None:
            return _UNGUARDED
        try:
            seen = self._guard.look()
        except BackendUnavailable:
            self.count("degraded.reads")
            return None
        if seen is None and self._guard.blind:
            if self._strict:
                raise BackendUnavailable(f"PostgreSQL is away, and cached values of {self._namespace!r} may be stale")
            self.count("degraded.unguarded")
            return _BLIND
        if seen is None:
            self.count("bypassed")
        return seen

    def stands(self, seen: Seen) -> bool:
        """Was all since `look` done under it?"""
        return seen is _UNGUARDED or seen is _BLIND or (self._guard is not None and self._guard.stands(seen))

    def read(self, keys: dict[str, str]) -> tuple[list[Record | None], Seen | None]:
        """The records of several ids, of which the keys are given: of each the one that may be used, or None. And under
        what they were looked for; None where nothing is to be stored."""
        local = self.local
        places = [] if local is None else [local.reserve(identity) for identity in keys]
        raws, seen, connects = self._raws(list(keys.values()))
        if seen is None:
            return [None] * len(keys), None
        records = [None if raw is None else self._usable(decode(raw), seen) for raw in raws]
        missed = records.count(None)
        if missed < len(keys):
            self._counters.add(self._hits, len(keys) - missed)
        if missed:
            self._counters.add(self._misses, missed)
        if local is not None:
            records = [
                None if record is None else self._kept(local, place, record, seen, connects)
                for place, record in zip(places, records, strict=True)
            ]
        return records, seen

    def _raws(self, keys: list[str]) -> tuple[list[bytes | None], Seen | None, int]:
        redis, generation = self._redis, self.generation
        for _ in range(_TRIES):
            seen = self.look()
            if seen is None or redis is None:
                return [], None, 0
            known = generation.is_known()
            try:
                if known and len(keys) == 1:
                    raws = [redis.call("GET", keys[0])]
                elif known:
                    raws = redis.pipeline([("GET", key) for key in keys])
                else:
                    asked = generation.asked()
                    *raws, reply = redis.pipeline([*(("GET", key) for key in keys), generation.question])
                    generation.answered(asked, reply)
            except BackendUnavailable:
                self.count("degraded.reads")
                return [], None, 0
            connects = redis.connects
            if self.stands(seen):
                return raws, seen, connects
        return [None] * len(keys), seen, 0

    def _usable(self, record: Record | None, seen: Seen) -> Record | None:
        if record is None or record.generation != self.generation.known.value:
            return None
        return record if record.epoch == seen.epoch or seen is _UNGUARDED or seen is _BLIND else None

    @staticmethod
    def _kept(local: LocalValues, place: Cell, record: Record, seen: Seen, connects: int) -> Record:
        record = record._replace(value=read_only(record.value))
        if record.ends_at is not None:
            local.fill(place, record.value, seen, connects, record.ends_at - time.time())
        return record

    # -- writing -------------------------------------------------------------------------------------------------

    def known_generation(self) -> str | None:
        """The generation, asked for if it is not known; None if it cannot be."""
        try:
            if self._redis is not None and not self.generation.is_known():
                asked = self.generation.asked()
                self.generation.answered(asked, self._redis.call(*self.generation.question))
        except BackendUnavailable:
            self.count("degraded.fills")
            return None
        return self.generation.known.value

    def take(self, keys: Sequence[str], seen: Seen | None) -> dict[str, Lease] | None:
        """Leases by key, or None if nothing can be stored anyway."""
        if self._redis is None or seen is None:
            return None
        try:
            replies = self._redis.pipeline([cells.take(key, self.new_lease()) for key in keys], (cells.LEASE,))
        except BackendUnavailable:
            self.count("degraded.leases")
            return None
        stands = self.stands(seen)
        return {
            key: Lease(
                token.decode(),
                bool(ours),
                self._usable(decode(raw), seen) if raw and stands else None,
                is_unclear=bool(raw) and not stands,
            )
            for key, (token, ours, raw) in zip(keys, replies, strict=True)
        }

    def take_over(self, key: str, seen: Seen | None) -> Lease | None:
        """A lease, from whoever has it: what that one loads will not be stored. None as `take`."""
        if self._redis is None or seen is None or self.known_generation() is None:
            return None
        lease = Lease(self.new_lease(), True)
        try:
            self._redis.call(*cells.take_over(key, lease.token))
        except BackendUnavailable:
            self.count("degraded.leases")
            return None
        return lease

    def give_back(self, leases: dict[str, Lease]) -> None:
        """Have nobody wait for what will not be stored."""
        commands = [cells.give_back(key, lease.token) for key, lease in leases.items() if lease.is_ours]
        if self._redis is not None and commands:
            try:
                self._redis.pipeline(commands, (cells.RELEASE,))
            except BackendUnavailable:
                self.count("degraded.leases")

    def drop(self, key: str) -> None:
        """Delete what is stored."""
        if self._redis is not None:
            try:
                cells.invalidate(self._redis, key, None)
            except BackendUnavailable:
                self.count("degraded.fills")

    def new_lease(self) -> str:
        return f"{self._nonce}{next(self._numbers)}"

    def store(self, fills: Iterable[Command]) -> int:
        """Returns how many of what `cells.fill` made were stored."""
        fills = list(fills)
        if self._redis is None or not fills:
            return 0
        try:
            replies = self._redis.pipeline(fills, (cells.FILL,))
        except BackendUnavailable:
            self.count("degraded.fills")
            return 0
        stored: int = sum(replies)
        if stored:
            self.count("fills", stored)
        if stored < len(replies):
            self.count("fills_refused", len(replies) - stored)
        return stored
