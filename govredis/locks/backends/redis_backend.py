"""RedisLockBackend: the scripts that grant, extend and release locks of one kind on Redis."""

from __future__ import annotations

import functools
import itertools
import math
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..._counters import Counters
from ..._fork import renew_in_child
from ...client import Command, NotServedHere, RedisClient, RedisNode, Script, pack_command
from ...errors import BackendError, BackendUnavailable
from ..held_list import HeldLockList
from ..host_lock.record import FENCE_KEPT, LockRecord
from ..resource import Resource
from .late_releases import LateReleases, Release

_FENCE_KEPT_MS = f"{FENCE_KEPT * 1000:.0f}"

#: Seconds that a waiter has to confirm a hand-over; CONFIRM_MS in queue.lua.
CONFIRM = 1.0


class ScriptFiles(NamedTuple):
    """The .lua files of the scripts of one kind of lock.

    Attributes:
        force: None where a lock of this kind cannot be taken from its holder.
    """

    acquire: tuple[str, ...]
    extend: tuple[str, ...]
    release: tuple[str, ...]
    force: tuple[str, ...] | None = None


class UnconfirmedGrant(BackendUnavailable):
    """Redis has granted a lock, no replica has confirmed that, and the lock was released again."""


_EXCLUSIVE, _SHARED = ("queue.lua", "hand.lua"), ("queue.lua", "slots.lua")
EXCLUSIVE = ScriptFiles(
    ("acquire_free.lua", *_EXCLUSIVE, "acquire.lua"),
    (*_EXCLUSIVE, "extend.lua"),
    ("release_alone.lua", *_EXCLUSIVE, "release.lua"),
    (*_EXCLUSIVE, "force.lua"),
)
SHARED = ScriptFiles((*_SHARED, "slots_acquire.lua"), (*_SHARED, "slots_extend.lua"), (*_SHARED, "slots_release.lua"))


class Renewal(NamedTuple):
    """The request to Redis that renews a lease.

    Attributes:
        resource, owner, token: the lock's.
        ttl: seconds of the new lease; for a lease that is not extended, the rest of it.
        extends: False: the lease is only kept on the list of held locks.
        listed: its entry on that list.
    """

    resource: Resource
    owner: str
    token: int
    ttl: float
    extends: bool
    listed: str


class RedisLockBackend:
    """One kind of lock on one Redis.

    Args:
        redis: None where Redis is disabled; nothing but `owner` is called then.
        files: of the scripts.
        held_list: the list of held locks.
        counters: of the GovRedis.
        confirm: a grant counts only once a replica has it.
    """

    def __init__(
        self, redis: RedisClient | None, files: ScriptFiles, held_list: HeldLockList, counters: Counters, confirm: bool
    ) -> None:
        self.redis = redis
        self.acquire_script: Script = Script(__package__, *files.acquire)
        self.extend_script: Script = Script(__package__, *files.extend)
        self.release_script: Script = Script(__package__, *files.release)
        self.force_script: Script | None = None if files.force is None else Script(__package__, *files.force)
        self._list_script = Script(__package__, "list.lua")
        self._list = held_list
        self._counters = counters
        self.confirm: bool = confirm
        self.late_releases: LateReleases = LateReleases(self._release_late)
        if redis is not None:
            redis.on_recovery(self._replay)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # For people, who ask which process it is: 20 characters of a host's name tell.
        self._nonce = f"{socket.gethostname()[:20]}:{os.getpid()}:{os.urandom(6).hex()}"
        self._owners = itertools.count()
        #: Held by the thread that extends leases, until it has taken in the replies. With two extensions of one lease
        #: on their way at once, nobody would know which comes last.
        self.extending: threading.RLock = threading.RLock()
        #: Releases and lost acquires that Redis has not answered: these grants may be nobody's. Without a mutex, which
        #: a signal handler or a destructor that releases might find taken by the code that it interrupts.
        self.pending_releases: set[Release] = set()

    def owner(self, kind: str) -> str:
        """A new owner token. slots.lua knows a writer by its first letter."""
        token = f"{self._nonce}-{next(self._owners)}"
        return token if kind == "lock" else f"{kind}:{token}"

    def acquire(
        self, resource: Resource, owner: str, ttl: float, floor: int, waits: bool, dead: LockRecord | None = None
    ) -> tuple[int, int]:
        """Returns (1, fencing token), or (0, anything) where others hold it.

        Raises BackendUnavailable; an UnconfirmedGrant is one.

        Args:
            dead: the record of a "lock"'s holder whose process is dead. Its lock is released for it.
        """
        assert self.redis is not None
        keys = (*resource.keys, _wake_list(resource, owner)) if waits else resource.keys
        args = (
            owner,
            _ms(ttl),
            str(floor),
            _FENCE_KEPT_MS,
            "1" if waits else "0",
            *resource.script_args,
            *(() if dead is None else (dead.owner, str(dead.token))),
        )
        if not self.confirm:
            granted, token = self.redis.run(self.acquire_script, keys, *args)
            return granted, token
        (granted, token), confirmed = self.redis.run_confirmed(self.acquire_script, keys, *args)
        if granted and not confirmed:
            self._counters.add("locks.unconfirmed")
            self.release(resource, owner, token)
            raise UnconfirmedGrant("no replica has confirmed the grant in time (GOVREDIS_CONFIRM=1)")
        return granted, token

    def confirmation(self, resource: Resource, owner: str, ttl: float) -> bytes:
        """The command that makes a hand-over a lease. It grants nothing if it arrives too late for that."""
        args = owner, _ms(ttl), "0", _FENCE_KEPT_MS, "2", *resource.script_args
        return pack_command(self.acquire_script.call(resource.keys, args))

    def wait(self, resource: Resource, owner: str, seconds: float) -> int | None:
        """Wait until the lock is handed over: returns its fencing token; None after so many seconds.

        Raises BackendUnavailable.
        """
        assert self.redis is not None
        token = self.redis.pop(_wake_list(resource, owner), seconds)
        return None if token is None else int(token)

    def extend(self, resource: Resource, owner: str, token: int, ttl: float) -> bool | BackendError:
        """Returns whether the lease was extended: False if it is lost; the error if nobody knows.

        The caller holds `extending`.
        """
        assert self.redis is not None
        args = _extension(owner, token, ttl, resource)
        try:
            return bool(self.redis.run(self.extend_script, resource.keys, *args))
        except BackendError as error:
            return error

    def extend_each(self, renewals: Sequence[Renewal]) -> list[tuple[bool | BackendError | None, bool]]:
        """Extend leases and list them, in one pipeline. The caller holds `extending`.

        Returns for each what `extend` would, None if it is not extended; and whether it is on the list of held locks.
        """
        assert self.redis is not None
        commands: list[Command] = []
        entries: dict[str, list[str]] = {}
        for r in renewals:
            if r.extends:
                args = _extension(r.owner, r.token, r.ttl, r.resource)
                commands.append(self.extend_script.call(r.resource.keys, args))
            entries.setdefault(self._list.key_for(r.resource.key), []).extend((r.listed, _ms(r.ttl)))
        commands += [self._list_script.call((key,), args) for key, args in entries.items()]
        replies: list[Any]
        try:
            replies = self.redis.pipeline(commands, (self.extend_script, self._list_script), each=True)
        except BackendError as error:
            replies = [error] * len(commands)
        left = iter(replies)
        extended = [next(left) if r.extends else None for r in renewals]
        listed = {key: not isinstance(reply, BackendError) for key, reply in zip(entries, left, strict=True)}
        return [
            (
                reply if reply is None or isinstance(reply, BackendError) else bool(reply),
                listed[self._list.key_for(r.resource.key)],
            )
            for r, reply in zip(renewals, extended, strict=True)
        ]

    def release(self, resource: Resource, owner: str, token: int, listed: str | None = None) -> bool:
        """Returns whether the lock was still the owner's. True as well where nobody could be asked, and it is released
        later: on recovery, or when its slot has arrived.

        Args:
            listed: its entry on the list of held locks.
        """
        assert self.redis is not None
        before = self.redis.resends()
        release = _release(resource, owner, token)
        try:
            if listed is None:
                released = self.redis.run(self.release_script, release.keys, *release.args)
            else:
                commands = [self.release_script.call(*release), ("ZREM", self._list.key_for(resource.key), listed)]
                # An entry that stays is removed from the list at the end of its lease.
                released = self.redis.pipeline(commands, (self.release_script,), each=True)[0]
                if isinstance(released, BackendError):
                    try:
                        raise released
                    finally:
                        del released  # see client/wire.py
        except NotServedHere:
            self.late_releases.add(release)
            return True
        except BackendUnavailable:
            self._release_on_recovery(release)
            return True
        # If it was sent twice, the first may have released it, and others may have held it before the second.
        return bool(released) or self.redis.resends() != before

    def release_on_recovery(self, resource: Resource, owner: str, token: int) -> None:
        """Have it released when Redis is back, before this process uses Redis for anything else."""
        self._release_on_recovery(_release(resource, owner, token))

    def _release_on_recovery(self, release: Release) -> None:
        self.pending_releases.add(release)
        if self.redis is not None:
            self.redis.replay_soon("locks wait to be released on it", release.keys[0])

    def force_release(self, resource: Resource) -> bool:
        """Take the lock from its holder. Returns whether there was a holder. Raises BackendUnavailable."""
        assert self.redis is not None
        assert self.force_script is not None
        return bool(self.redis.run(self.force_script, resource.keys, _FENCE_KEPT_MS))

    def _replay(self, node: RedisNode) -> None:
        """Release grants that may be nobody's: a server that hangs executes timed-out commands when it wakes."""
        pending = [release for release in list(self.pending_releases) if node.covers(release.keys[0])]
        if not pending:
            return
        commands = [self.release_script.call(*release) for release in pending]
        failed: BackendError | None = None
        for release, reply in zip(pending, node.pipeline(commands, (self.release_script,), each=True), strict=True):
            if isinstance(reply, NotServedHere):
                self.late_releases.add(release)
            elif isinstance(reply, BackendError):
                failed = reply
                continue
            self.pending_releases.discard(release)
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # see client/wire.py

    def _release_late(self, release: Release) -> None:
        assert self.redis is not None
        try:
            self.redis.run(self.release_script, release.keys, *release.args)
        except NotServedHere:
            raise
        except BackendUnavailable:
            self._release_on_recovery(release)


def _release(resource: Resource, owner: str, token: int) -> Release:
    return Release(resource.keys, (owner, str(token), _FENCE_KEPT_MS, *resource.script_args))


def _wake_list(resource: Resource, owner: str) -> str:
    """The list that wakes a waiter: see queue.lua."""
    return f"{resource.keys[2]}:{owner}"


def _extension(owner: str, token: int, ttl: float, resource: Resource) -> tuple[str, ...]:
    return owner, _ms(ttl), str(token), _FENCE_KEPT_MS, *resource.script_args


@functools.lru_cache(100)
def _ms(ttl: float) -> str:
    # One more: Redis counts from the start of the current millisecond, and must not forget before this process does.
    return str(math.ceil(ttl * 1000) + 1)
