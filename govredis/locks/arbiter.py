"""Arbiter: the scripts by which locks of one kind are granted on Redis, extended and released."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import socket
from typing import NamedTuple

from .._fork import renew_in_child
from ..client import RedisClient, Script, pack_command
from ..errors import BackendError, BackendUnavailable
from .holders import Entry

#: The fence outlives the lease by a day; after that the server's clock, being the larger, takes its place.
FENCE_KEPT_MS = "86400000"

#: Seconds that a hand-over is good for unless it is confirmed; CONFIRM_MS in queue.lua.
CONFIRM = 1.0


class Resource(NamedTuple):
    """What is locked.

    Attributes:
        kind: "lock", "read", "write" or "semaphore".
        name: the user's.
        key: the first of `cells`: as it stands in errors and logs, and as its lock file goes by.
        cells: the keys of the scripts.
        terms: what the scripts take last.
    """

    kind: str
    name: str
    key: str
    cells: tuple[str, ...]
    terms: tuple[str, ...]


class Arbiter:
    """One kind of lock on one Redis.

    Args:
        redis: None where it is disabled: there is nobody to be asked then, and nothing here is called but `owner`.
        common: the .lua files that the others begin with.
        files: those of acquire, extend and release.
        index: the key of the list of what is held.
    """

    def __init__(
        self, redis: RedisClient | None, common: tuple[str, ...], files: tuple[str, str, str], index: str
    ) -> None:
        self.redis = redis
        acquire, extend, release = files
        self.acquire_script = Script(__package__, *common, acquire)
        self.extend_script = Script(__package__, *common, extend)
        self.release_script = Script(__package__, *common, release)
        self._list_script = Script(__package__, "list.lua")
        self._index = index
        if redis is not None:
            redis.on_recovery(self._replay)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # For people: who is it? 20 characters of a host's name tell.
        self._nonce = f"{socket.gethostname()[:20]}:{os.getpid()}:{os.urandom(6).hex()}"
        self._owners = itertools.count()
        #: Grants that may be nobody's: releases and lost acquires that Redis has not answered. Without a lock, which a
        #: signal handler or a destructor that releases could find taken by what it interrupts.
        self.owed: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    def owner(self, kind: str) -> str:
        """A new owner token. slots.lua knows a writer by it."""
        token = f"{self._nonce}-{next(self._owners)}"
        return token if kind == "lock" else f"{kind}:{token}"

    def acquire(
        self, resource: Resource, owner: str, ttl: float, floor: int, waits: bool, succeeds: str | None = None
    ) -> tuple[int, int]:
        """Returns (1, fencing token), or (0, anything) where others hold it. Raises BackendUnavailable.

        Args:
            succeeds: an owner of a "lock" that is certainly gone: is it still held by that one, it is granted.
        """
        assert self.redis is not None
        granted, token = self.redis.run(
            self.acquire_script,
            resource.cells,
            owner,
            _ms(ttl),
            str(floor),
            FENCE_KEPT_MS,
            "1" if waits else "0",
            *resource.terms,
            *(() if succeeds is None else (succeeds,)),
        )
        return granted, token

    def confirmation(self, resource: Resource, owner: str, ttl: float) -> bytes:
        """What makes a hand-over a lease, when it is sent; but grants nothing where it comes too late for that."""
        args = owner, _ms(ttl), "0", FENCE_KEPT_MS, "2", *resource.terms
        return pack_command(self.acquire_script.call(resource.cells, args))

    def wait(self, resource: Resource, owner: str, seconds: float) -> int | None:
        """Until the lock is handed over: its fencing token; or for so many seconds. Raises BackendUnavailable."""
        assert self.redis is not None
        token = self.redis.pop(f"{resource.cells[2]}:{owner}", seconds)
        return None if token is None else int(token)

    def extend(self, resource: Resource, owner: str, token: int, ttl: float) -> bool:
        """True if extended, False if lost. Raises BackendUnavailable."""
        assert self.redis is not None
        return bool(
            self.redis.run(
                self.extend_script, resource.cells, owner, _ms(ttl), str(token), FENCE_KEPT_MS, *resource.terms
            )
        )

    def release(self, resource: Resource, owner: str, token: int, listed: str | None = None) -> bool:
        """Whether it was still the owner's; where Redis is away, it is released on recovery, and True.

        Args:
            listed: what `enlist` returned.
        """
        assert self.redis is not None
        before = self.redis.resends()
        args = (owner, str(token), FENCE_KEPT_MS, *resource.terms)
        try:
            if listed is None:
                released = self.redis.run(self.release_script, resource.cells, *args)
            else:
                commands = [self.release_script.call(resource.cells, args), ("ZREM", self._index, listed)]
                try:
                    released = self.redis.pipeline(commands, (self.release_script,))[0]
                except BackendUnavailable:
                    raise
                except BackendError:
                    # Of the list's, perhaps: the release alone tells, which then arrives twice.
                    released = self.redis.run(self.release_script, resource.cells, *args)
        except BackendUnavailable:
            self.owe(resource, owner, token)
            return True
        # Of two arrivals, the first may have released it, and others have held it before the second.
        return bool(released) or self.redis.resends() != before

    def owe(self, resource: Resource, owner: str, token: int) -> None:
        """Have it released when Redis is back, before this process uses it for anything else."""
        self.owed.add((resource.cells, (owner, str(token), FENCE_KEPT_MS, *resource.terms)))
        if self.redis is not None:
            self.redis.replay_soon("locks are to be released on it")

    def enlist(self, resource: Resource, owner: str, token: int, ttl: float) -> str:
        """Put it on the list of what is held, for as long as the lease. Raises BackendUnavailable."""
        assert self.redis is not None
        listed = json.dumps(Entry(resource.kind, resource.name, owner, token))
        self.redis.run(self._list_script, (self._index,), listed, _ms(ttl))
        return listed

    def _replay(self, redis: RedisClient) -> None:
        """Release what may have been granted to nobody: a hung server executes what timed out when it wakes."""
        owed = list(self.owed)
        if not owed:
            return
        redis.pipeline([self.release_script.call(cells, args) for cells, args in owed], (self.release_script,))
        self.owed.difference_update(owed)


@functools.lru_cache(100)
def _ms(ttl: float) -> str:
    # One more: Redis counts from the start of the current millisecond, and shall not forget before we do.
    return str(math.ceil(ttl * 1000) + 1)
