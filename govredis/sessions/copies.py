"""The copies of rows that Redis holds, and when one may be believed. What durable.py knows of Redis is here.

A copy says of which version of the row it is, and in which epoch of the guard it was put there; it is believed while
the guard stands and its epoch is that. Whatever Redis has lost, or has back from older data, the epoch is another one
then, within the guard's X seconds. A copy is put only with a lease that was taken before the row was read or written,
and that every change of the row ends; so no late copy outlives a revocation.

A record without a stamp was bound by somebody who writes no rows (the async service; govredis without PostgreSQL, or
while that was away). That it counts is looked up once an epoch, and remembered.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .._counters import Counters
from ..client import Command, RedisClient, Script
from ..errors import BackendUnavailable
from ..keys import Keys, sibling
from .binding import Order, Record, Stamp, encode_copy
from .postgres_store import SessionRow
from .redis_store import RedisSessions

#: A copy that takes longer than this to come is not put; which version was is remembered for longer.
_LEASE_MS = "30000"
_VERSION_MS = "60000"
#: Epochs begin at 1: a copy put while no guard stood is believed by nobody here, and seen by the async service.
_NO_EPOCH = 0
#: Where another process is at a tick.
_TRIES = 10
_BETWEEN_TRIES = 0.02


class Seen(Protocol):
    """The guard as it was before Redis was asked."""

    @property
    def epoch(self) -> int: ...


SeenT = TypeVar("SeenT", bound=Seen)


class Guard(Protocol[SeenT]):
    """What says whether Redis may be believed: see metadata.Guard."""

    def look(self) -> SeenT | None: ...

    def stands(self, seen: SeenT) -> bool: ...

    def watch(
        self,
        namespace: str,
        invalidations: Callable[[Sequence[tuple[str, int]]], Sequence[Command]],
        scripts: Sequence[Script] = (),
    ) -> None: ...

    def drain(self) -> int | None: ...


class Lease(NamedTuple):
    """What a copy is put with. `mark`: when the session was last revoked while PostgreSQL was away, in microseconds."""

    token: bytes
    epoch: int
    mark: int


class Copies:
    """What Redis holds of rows. `read`, `lease` and `lease_to_bind` raise BackendUnavailable; what changes Redis after
    a row was changed never does: Redis is not used again then before it was told.

    Args:
        guard: None: nothing is believed.
        entries: how many records of others are remembered to count.
    """

    def __init__(
        self,
        keys: Keys,
        client: RedisClient,
        guard: Guard[Any] | None,
        redis_sessions: RedisSessions,
        *,
        entries: int,
        counters: Counters,
    ) -> None:
        self.sessions = redis_sessions
        self._keys = keys
        self._client = client
        self._guard = guard
        self._entries = entries
        self._counters = counters
        self._lease = Script(__package__, "lease.lua")
        self._fill = Script(__package__, "fill.lua")
        self._drop = Script(__package__, "drop.lua")
        #: Records without a stamp that count, and the epoch in which that was looked up.
        self._vouched: dict[str, tuple[bytes, int]] = {}
        if guard is not None:
            guard.watch("session", self._invalidations, (self._drop,))
            client.on_recovery(lambda _: _catch_up(guard))

    def read(self, session_id: str) -> tuple[Record | None, bool]:
        """What is there, and whether it may be believed."""
        for _ in range(2):  # the first time, perhaps, over a new connection
            seen = None if self._guard is None else self._guard.look()
            record = self.sessions.read(session_id)
            if record is None or seen is None or self._guard is None:
                break
            if self._guard.stands(seen):
                if record.stamp is None:
                    return record, self._vouched.get(session_id) == (record.raw, seen.epoch)
                return record, record.stamp.epoch == seen.epoch
        return record, False

    def vouch(self, record: Record, lease: Lease) -> None:
        """A record without a stamp counts: believe it for as long as it and the epoch stay."""
        if len(self._vouched) >= self._entries:
            self._vouched.clear()
        self._vouched[record.binding.session_id] = (record.raw, lease.epoch)

    def lease(self, session_id: str) -> Lease:
        """To be taken before the row is read."""
        epoch = self._epoch()
        token, mark = self._client.pipeline((self._leasing(session_id), self.sessions.mark(session_id)), (self._lease,))
        return Lease(token, epoch, int(mark or 0))

    def lease_to_bind(self, order: Order) -> tuple[Lease, int]:
        """To be taken before the row is written: notes the session in its agent's index, too. Also returns how often
        somebody who has no row for it has bound it."""
        epoch = self._epoch()
        _, token, raw = self._client.pipeline(
            (
                self.sessions.indexing(order),
                self._leasing(order.session_id),
                ("GET", self._keys.session(order.session_id)),
            ),
            (self.sessions.index, self._lease),
        )
        return Lease(token, epoch, 0), 0 if raw is None else self.sessions.count(order.session_id, raw)

    def fill(self, session_id: str, row: SessionRow, lease: Lease, over: bytes | None) -> bool:
        """Put a copy of the row, with a lease taken before it was read or written.

        Args:
            over: what was there before; b"" for nothing; None: whatever is.

        Returns whether it is there.
        """
        key = self._keys.session(session_id)
        text = encode_copy(row.agent_id, row.bound_at, row.data, row.bind_count, Stamp(lease.epoch, row.version))
        args = (text, str(row.left_ms), lease.token, str(row.version), _VERSION_MS, b"*" if over is None else over)
        try:
            return bool(self._client.run(self._fill, (*self._cells(key), sibling(key, "revoked")), *args))
        except BackendUnavailable:
            if over is None:
                self._untold()
            return False

    def drop(self, versions: Mapping[str, int], was: bytes = b"*") -> int:
        """Rows have changed: end their copies. Returns how many there were.

        Args:
            versions: of the rows, by session.
            was: only where this is there.
        """
        commands = [self._dropping(sid, version, was) for sid, version in versions.items()]
        if not commands:
            return 0
        try:
            return sum(self._client.pipeline(commands, (self._drop,)))
        except BackendUnavailable:
            self._untold()
            return 0

    # -- inside --------------------------------------------------------------------------------------------------

    def _untold(self) -> None:
        """The outbox has it: on recovery the guard's tick tells Redis, before this process uses that again."""
        self._counters.add("sessions.degraded.untold")
        self._client.replay_soon("sessions were changed without it")

    def _epoch(self) -> int:
        seen = None if self._guard is None else self._guard.look()
        return _NO_EPOCH if seen is None else seen.epoch

    def _leasing(self, session_id: str) -> Command:
        lease = sibling(self._keys.session(session_id), "lease")
        return self._lease.call((lease,), (secrets.token_hex(8), _LEASE_MS))

    def _cells(self, key: str) -> tuple[str, str, str]:
        return key, sibling(key, "lease"), sibling(key, "version")

    def _dropping(self, session_id: str, version: int, was: bytes = b"*") -> Command:
        return self._drop.call(self._cells(self._keys.session(session_id)), (str(version), _VERSION_MS, was))

    def _invalidations(self, changes: Sequence[tuple[str, int]]) -> Sequence[Command]:
        commands = []
        for session_id, version in changes:
            with contextlib.suppress(ValueError):  # under no such id is there a session: it has another prefix
                commands.append(self._dropping(session_id, version))
        return commands


def _catch_up(guard: Guard[Any]) -> None:
    """Have Redis told what the outbox has, by a tick that began now: one that somebody else is at may have begun before
    our row was written."""
    for _ in range(_TRIES):
        if guard.drain() is not None:
            break
        time.sleep(_BETWEEN_TRIES)
