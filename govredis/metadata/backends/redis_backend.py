"""RedisMetadataBackend: a namespace's values in Redis, which of them may be used, and how they are stored."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..._context import Context
from ..._fork import renew_in_child
from ...client import Command
from ...errors import BackendUnavailable
from ...outbox import FreshnessSnapshot
from .. import entry_keys
from ..generation import Generation
from ..immutable import immutable
from ..local import LocalValues, Place
from ..options import CacheOptions, SharedParts
from ..values import Codec, MetadataEntry

#: How often a read is tried whose connection turns out to be a new one.
_TRIES = 3

#: For a cache without a freshness lease: all values may be used, and stored.
_ALWAYS = FreshnessSnapshot(-1, math.inf, math.inf, 0)
#: While PostgreSQL is away and the lease cannot be renewed: likewise. Values that are stored then have no epoch, and
#: are not used when it is back.
_BLIND = FreshnessSnapshot(-1, math.inf, math.inf, 0)


class LoadLease(NamedTuple):
    token: str
    #: False: another took it, and is loading.
    is_ours: bool
    #: The value's SHA-1 when the lease was taken, or shared, as lease.lua says it.
    stood: bytes
    #: The same, if it may be used: it was stored since it was missed.
    entry: MetadataEntry | None = None
    #: Something was there, and over a connection so new that it cannot be judged: read again.
    is_unclear: bool = False


class RedisMetadataBackend:
    """The values of one cache in Redis. Redis being away is counted, and never raised."""

    def __init__(self, context: Context, options: CacheOptions, shared: SharedParts, codec: Codec) -> None:
        self.generation: Generation = shared.generation
        #: Where this process keeps the values that it reads; None: nowhere.
        self.local: LocalValues | None = shared.local
        self._redis = context.redis
        self._freshness = shared.freshness
        self._namespace = namespace = options.namespace
        self._strict = options.strict
        self._codec = codec
        #: Values that others have set are used.
        self._foreign = foreign = shared.freshness is None or options.foreign == "use"
        self._question = entry_keys.read_with_tombstone if foreign else entry_keys.read
        self._counters = context.counters
        self._hits, self._misses = f"{namespace}.hits", f"{namespace}.misses"
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._nonce = os.urandom(8).hex()
        self._numbers = itertools.count()

    def count(self, what: str, n: int = 1) -> None:
        self._counters.add(f"{self._namespace}.{what}", n)

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self) -> FreshnessSnapshot | None:
        """The snapshot under which values may be used; None: nothing may be used or stored."""
        if self._redis is None:
            return None
        if self._freshness is None:
            return _ALWAYS
        try:
            snapshot = self._freshness.look()
        except BackendUnavailable:
            self.count("degraded.reads")
            return None
        if snapshot is None and self._freshness.blind:
            if self._strict:
                raise BackendUnavailable(f"PostgreSQL is away, and cached values of {self._namespace!r} may be stale")
            self.count("degraded.unguarded")
            return _BLIND
        if snapshot is None:
            self.count("bypassed")
        return snapshot

    def stands(self, snapshot: FreshnessSnapshot) -> bool:
        """Was all since `look` done under it?"""
        return (
            snapshot is _ALWAYS
            or snapshot is _BLIND
            or (self._freshness is not None and self._freshness.stands(snapshot))
        )

    def read(
        self, keys: dict[str, str], *, counted: bool = True
    ) -> tuple[list[MetadataEntry | None], FreshnessSnapshot | None]:
        """The entries of several ids, whose keys are given; None for an id without a usable entry. And under
        what they were looked for; None where nothing may be stored.

        Args:
            counted: as hits and misses; False where a reader looks again after a miss.
        """
        local = self.local
        places = [] if local is None else [local.reserve(identity) for identity in keys]
        replies, snapshot, connects = self._asked([self._question(key) for key in keys.values()])
        if snapshot is None:
            return [None] * len(keys), None
        read, foreign = self._codec.read, self._foreign
        found = [read(reply[0], reply[1], foreign and reply[2] is None) for reply in replies]
        entries = [None if entry is None else self._usable(entry, snapshot) for entry in found]
        if counted:
            missed = entries.count(None)
            if missed < len(keys):
                self._counters.add(self._hits, len(keys) - missed)
            if missed:
                self._counters.add(self._misses, missed)
                others = sum(r is None and reply[0] is not None for r, reply in zip(found, replies, strict=True))
                if others:
                    self.count("foreign", others)
        if local is not None:
            entries = [
                None if entry is None else self._kept(local, place, entry, snapshot, connects)
                for place, entry in zip(places, entries, strict=True)
            ]
        return entries, snapshot

    def read_stale(self, key: str) -> tuple[MetadataEntry | None, FreshnessSnapshot | None]:
        """The entry of a value whose TTL is over, if it may be used while it is loaded anew; else as `read`."""
        replies, snapshot, _ = self._asked([entry_keys.read_stale(key)])
        if snapshot is None:
            return None, None
        raw, copy = replies[0]
        if raw is not None or copy is None:
            return None, snapshot
        *about, text = copy.split(b" ", 6)
        entry = self._codec.read(text, b" ".join(about), False)
        # One whose TTL is not over stands for what was deleted.
        if entry is None or entry.ends_at is None or time.time() < entry.ends_at:
            return None, snapshot
        return self._usable(entry, snapshot), snapshot

    def _asked(self, questions: list[Command]) -> tuple[list[list[bytes | None]], FreshnessSnapshot | None, int]:
        """The replies to MGETs, under what they were asked, and the client's connects after that."""
        redis, generation = self._redis, self.generation
        for _ in range(_TRIES):
            snapshot = self.look()
            if snapshot is None or redis is None:
                return [], None, 0
            try:
                if not generation.is_known():
                    asked = generation.asked()
                    *replies, reply = redis.pipeline([*questions, generation.question])
                    generation.answered(asked, reply)
                elif len(questions) == 1:
                    replies = [redis.call(*questions[0])]
                else:
                    replies = redis.pipeline(questions)
            except BackendUnavailable:
                self.count("degraded.reads")
                return [], None, 0
            connects = redis.connects
            if self.stands(snapshot):
                return replies, snapshot, connects
        return [[None, None, None]] * len(questions), snapshot, 0

    def _usable(self, entry: MetadataEntry | None, snapshot: FreshnessSnapshot) -> MetadataEntry | None:
        if entry is None or entry.ends_at is None:  # nothing, or a value that another client has set
            return entry
        if entry.generation != self.generation.known.value:
            return None
        return entry if entry.epoch == snapshot.epoch or snapshot is _ALWAYS or snapshot is _BLIND else None

    def _kept(
        self, local: LocalValues, place: Place, entry: MetadataEntry, snapshot: FreshnessSnapshot, connects: int
    ) -> MetadataEntry | None:
        try:
            entry = entry._replace(value=immutable(entry.value))
        except RecursionError:  # JSON may be nested deeper than what is written in Python can follow
            self.count("foreign")
            return None
        if entry.ends_at is not None:
            local.fill(place, entry.value, snapshot, connects, entry.ends_at - time.time())
        return entry

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

    def take(self, keys: Sequence[str], snapshot: FreshnessSnapshot | None) -> dict[str, LoadLease] | None:
        """Leases by key, or None if nothing can be stored anyway."""
        if self._redis is None or snapshot is None:
            return None
        try:
            replies = self._redis.pipeline(
                [entry_keys.take(key, self.new_lease()) for key in keys], (entry_keys.LEASE,)
            )
        except BackendUnavailable:
            self.count("degraded.leases")
            return None
        stands = self.stands(snapshot)
        return {key: self._lease(reply, snapshot if stands else None) for key, reply in zip(keys, replies, strict=True)}

    def take_over(self, key: str, snapshot: FreshnessSnapshot | None) -> LoadLease | None:
        """A lease, taken from its holder, whose loaded value will not be stored. None: as for `take`."""
        if self._redis is None or snapshot is None or self.known_generation() is None:
            return None
        try:
            (reply,) = self._redis.pipeline([entry_keys.take(key, self.new_lease(), over=True)], (entry_keys.LEASE,))
        except BackendUnavailable:
            self.count("degraded.leases")
            return None
        return self._lease(reply, None)

    def _lease(self, reply: list[Any], snapshot: FreshnessSnapshot | None) -> LoadLease:
        """The lease in a reply of lease.lua; `snapshot`: under what it can be judged what was there."""
        token, ours, stood, raw, about, tombstone = reply
        lease = LoadLease(token.decode(errors="replace"), bool(ours), stood)
        if stood == b"another type":
            self.count("foreign")
        if not (raw or about):
            return lease
        if snapshot is None:
            return lease._replace(is_unclear=True)
        entry = self._codec.read(raw or None, about or None, self._foreign and not tombstone)
        return lease._replace(entry=self._usable(entry, snapshot))

    def give_back(self, leases: dict[str, LoadLease]) -> None:
        """Have nobody wait for what will not be stored."""
        commands = [entry_keys.give_back(key, lease.token) for key, lease in leases.items() if lease.is_ours]
        if self._redis is not None and commands:
            try:
                self._redis.pipeline(commands, (entry_keys.RELEASE,))
            except BackendUnavailable:
                self.count("degraded.leases")

    def drop(self, key: str) -> None:
        """Delete what is stored."""
        if self._redis is not None:
            try:
                entry_keys.invalidate(self._redis, key, None)
            except BackendUnavailable:
                self.count("degraded.fills")

    def new_lease(self) -> str:
        return f"{self._nonce}{next(self._numbers)}"

    def store(self, fills: Iterable[Command]) -> int:
        """Returns how many of what `entry_keys.fill` made were stored."""
        fills = list(fills)
        if self._redis is None or not fills:
            return 0
        try:
            replies = self._redis.pipeline(fills, (entry_keys.FILL,))
        except BackendUnavailable:
            self.count("degraded.fills")
            return 0
        stored: int = sum(replies)
        if stored:
            self.count("fills", stored)
        if stored < len(replies):
            self.count("fills_refused", len(replies) - stored)
        return stored
