"""RedisMetadataBackend: a namespace's values in Redis, which of them may be used, and how they are stored."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..._context import Context
from ..._fork import renew_in_child
from ...client import Command, Script
from ...errors import BackendError, BackendUnavailable
from .. import entry_keys
from ..immutable import immutable
from ..local import LocalValues, Place
from ..options import CacheOptions, SharedParts
from ..values import Codec, MetadataEntry
from .questions import Terms, ValueQuestions


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
        #: Where this process keeps the values that it reads; None: nowhere.
        self.local: LocalValues | None = shared.local
        self._redis = context.redis
        self._namespace = namespace = options.namespace
        self._asking = ValueQuestions(context.redis, shared, options, self.count)
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

    def terms(self, key: str) -> Terms | None:
        """The terms for a key, with its generation known; None: nothing may be used or stored."""
        return self._asking.terms(key)

    def stands(self, terms: Terms, key: str) -> bool:
        """Was all since `terms` done under them?"""
        return self._asking.stand(terms, key)

    def count(self, what: str, n: int = 1) -> None:
        self._counters.add(f"{self._namespace}.{what}", n)

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, keys: dict[str, str], *, counted: bool = True) -> list[tuple[MetadataEntry | None, Terms | None]]:
        """For each of several ids, whose keys are given: its usable entry, and the terms under which it was looked for.
        Without terms nothing can be stored.

        Args:
            counted: as hits and misses; False where a reader looks again after a miss.
        """
        local = self.local
        places = itertools.repeat(None) if local is None else [local.reserve(identity) for identity in keys]
        answers = self._asking.ask(list(keys.values()), self._question)
        found: list[tuple[MetadataEntry | None, Terms | None]] = []
        asked = missed = others = 0
        for place, (reply, terms, connects) in zip(places, answers, strict=False):
            entry = None
            if terms is not None:
                asked += 1
                entry = self._codec.read(reply[0], reply[1], self._foreign and reply[2] is None)
                others += entry is None and reply[0] is not None
                entry = self._usable(entry, terms)
                missed += entry is None
                if entry is not None and place is not None:
                    entry = self._kept(place, entry, terms, connects)
            found.append((entry, terms))
        if counted:
            self._count_read(asked, missed, others)
        return found

    def _count_read(self, asked: int, missed: int, others: int) -> None:
        if missed < asked:
            self._counters.add(self._hits, asked - missed)
        if missed:
            self._counters.add(self._misses, missed)
        if others:
            self.count("foreign", others)

    def read_stale(self, key: str) -> tuple[MetadataEntry | None, Terms | None]:
        """The entry of a value whose TTL is over, if it may be used while it is loaded anew; else as `read`."""
        ((raw, copy, *_), terms, _) = self._asking.ask([key], entry_keys.read_stale)[0]
        if terms is None or raw is not None or copy is None:
            return None, terms
        *about, text = copy.split(b" ", 6)
        entry = self._codec.read(text, b" ".join(about), False)
        # One whose TTL is not over stands for what was deleted.
        if entry is None or entry.ends_at is None or time.time() < entry.ends_at:
            return None, terms
        return self._usable(entry, terms), terms

    def _usable(self, entry: MetadataEntry | None, terms: Terms) -> MetadataEntry | None:
        if entry is None or entry.ends_at is None:  # nothing, or a value that another client has set
            return entry
        return entry if terms.fit(entry.epoch, entry.generation) else None

    def _kept(self, place: Place, entry: MetadataEntry, terms: Terms, connects: int) -> MetadataEntry | None:
        try:
            entry = entry._replace(value=immutable(entry.value))
        except RecursionError:  # JSON may be nested deeper than what is written in Python can follow
            self.count("foreign")
            return None
        if entry.ends_at is not None and self.local is not None:
            self.local.fill(place, entry.value, terms.node, terms.snapshot, connects, entry.ends_at - time.time())
        return entry

    # -- writing -------------------------------------------------------------------------------------------------

    def take(self, terms: Mapping[str, Terms | None]) -> dict[str, LoadLease]:
        """Leases, by key; for a key without one nothing can be stored.

        Args:
            terms: by key.
        """
        asked = {key: its for key, its in terms.items() if its is not None}
        replies = self._sent(
            [entry_keys.take(key, self.new_lease()) for key in asked], entry_keys.LEASE, "degraded.leases"
        )
        leases = {}
        for (key, its), reply in zip(asked.items(), replies, strict=True):
            if reply is not None:
                leases[key] = self._lease(reply, its if self._asking.stand(its, key) else None)
        return leases

    def take_over(self, key: str) -> tuple[LoadLease, Terms] | None:
        """A lease, taken from its holder, whose loaded value will not be stored. None: nothing can be stored."""
        terms = self.terms(key)
        if terms is None:
            return None
        (reply,) = self._sent([entry_keys.take(key, self.new_lease(), over=True)], entry_keys.LEASE, "degraded.leases")
        return None if reply is None else (self._lease(reply, None), terms)

    def _lease(self, reply: list[Any], terms: Terms | None) -> LoadLease:
        """The lease in a reply of lease.lua; `terms`: under what it can be judged what was there."""
        token, ours, stood, raw, about, tombstone = reply
        lease = LoadLease(token.decode(errors="replace"), bool(ours), stood)
        if stood == b"another type":
            self.count("foreign")
        if not (raw or about):
            return lease
        if terms is None:
            return lease._replace(is_unclear=True)
        entry = self._codec.read(raw or None, about or None, self._foreign and not tombstone)
        return lease._replace(entry=self._usable(entry, terms))

    def give_back(self, leases: dict[str, LoadLease]) -> None:
        """Have nobody wait for what will not be stored."""
        commands = [entry_keys.give_back(key, lease.token) for key, lease in leases.items() if lease.is_ours]
        self._sent(commands, entry_keys.RELEASE, "degraded.leases")

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
        replies = [reply for reply in self._sent(list(fills), entry_keys.FILL, "degraded.fills") if reply is not None]
        stored: int = sum(replies)
        if stored:
            self.count("fills", stored)
        if stored < len(replies):
            self.count("fills_refused", len(replies) - stored)
        return stored

    def _sent(self, commands: list[Command], script: Script, failed: str) -> list[Any]:
        """The replies to a script of each key; None from a node that is away, counted as `failed`."""
        if self._redis is None or not commands:
            return [None] * len(commands)
        try:
            replies = self._redis.pipeline(commands, (script,), each=True)
        except BackendUnavailable:
            self.count(failed)
            return [None] * len(commands)
        for i, reply in enumerate(replies):
            if isinstance(reply, BackendError):
                if not isinstance(reply, BackendUnavailable):
                    raise reply
                replies[i] = None
        if None in replies:
            self.count(failed)
        return replies
