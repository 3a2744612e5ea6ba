"""RowCache: Redis as a cache of rows in PostgreSQL, and when a copy there may be believed.

A copy names its row's version, and the epoch of the freshness lease in which it was put there. It is believed while the
lease is valid and in that epoch. Where Redis has lost data, or has older data back, a new epoch begins within
metadata_staleness. A copy is put only with a fill lease, which every change of the row ends, so no late copy outlives a
revocation. A writer of the row takes its fill lease before it writes; a reader soon after it has read. A change in
between leaves its version, which is remembered for longer than both take, or is lost together with the epoch that was
seen before the row. So an id that a stranger makes up, without a row and with nothing in Redis, leaves nothing there.

A record without a stamp was bound by a client that writes no rows (the async service; govredis without PostgreSQL, or
while that was away). If it is newer than the row, the row adopts it, and a copy takes its place. The sibling :version
says which row has stood at the key, so that the value there now has come since. It is remembered for ten minutes; after
that, or where Redis has lost it, the clocks decide: ten minutes are far apart for them. A record that no row can hold
is believed as it is, once an epoch has been checked to have no newer row.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..._context import Context
from ...client import Command, NotServedHere, RedisClient, Script
from ...errors import BackendError, BackendUnavailable
from ...keys import is_id, sibling
from ...outbox import FreshnessLease, FreshnessSnapshot, NodeLease
from ..binding import NO_END, BindRequest, CopyStamp, SessionRecord, encode, members_of
from .marks import read_mark, read_two
from .redis_backend import RedisSessionBackend
from .rows import Predecessor, SessionRow, bounded

#: A copy that takes more seconds than this is not put. Versions are remembered for longer than that and a fill lease
#: last together.
_LATE = 20.0
_LEASE_MS = "30000"
_VERSION_MS = "600000"
#: Epochs begin at 1: no process of ours believes a copy that was put while none was valid; the async service sees it.
_NO_EPOCH = 0
#: Tries, and seconds between them, while another process runs the outbox relay.
_TRIES = 10
_BETWEEN_TRIES = 0.02


class FillLease(NamedTuple):
    """The right to put a copy.

    Attributes:
        token: None: no copy is put.
        epoch: of the freshness lease.
        mark: when the session was last revoked while PostgreSQL was away, in microseconds.
    """

    token: bytes | None
    epoch: int
    mark: int


#: The values at a session's key that a copy may replace, or that the end of a row deletes: see fill.lua and drop.lua.
Replaced = tuple[str, str | bytes]
ANY: Replaced = ("any", "")
COPIES: Replaced = ("copy", "")


def of_agent(agent_id: str) -> Replaced:
    """A record of this agent's, and copies."""
    return "agent", agent_id


def same(raw: bytes | None) -> Replaced:
    """The value that was found there."""
    return "same", raw or b""


def seen_by_bind(raw: bytes | None) -> Replaced:
    """The value that was found there when a bind began, and copies."""
    return "bound", raw or b""


class CacheEntry(NamedTuple):
    """The state of a session in Redis.

    Attributes:
        raw: the value there; None for nothing.
        record: the same, if it can be read.
        believed: it counts, whatever the row says.
        epoch: of the freshness lease, as it was before.
    """

    raw: bytes | None
    record: SessionRecord | None
    believed: bool
    epoch: int


class RowCache:
    """The copies of rows. Methods that only read, or lease, raise BackendUnavailable. Methods that change Redis after a
    row was changed never do: Redis is not used again before it was told.

    Args:
        records: all that stands at the keys of sessions, copies or not.
        freshness: None: no copy is believed.
    """

    def __init__(
        self, context: Context, redis: RedisClient, *, records: RedisSessionBackend, freshness: FreshnessLease | None
    ) -> None:
        self.records = records
        self._keys = context.keys
        self._client = redis
        self._freshness = freshness
        self._entries = context.config.local_entries
        self._counters = context.counters
        self._lease = Script(__package__, "values.lua", "lease.lua")
        self._fill = Script(__package__, "values.lua", "fill.lua")
        self._drop = Script(__package__, "values.lua", "drop.lua")
        #: Records without a stamp that count, and the epoch in which that was checked.
        self._checked: dict[str, tuple[bytes, int]] = {}
        if freshness is not None:
            freshness.watch("session", self._invalidations, (self._drop,))
            redis.on_recovery(lambda node: _catch_up(freshness.of(node)))

    def read(self, session_id: str) -> CacheEntry:
        """The value of a session, and whether it may be believed."""
        snapshot: FreshnessSnapshot | None = None
        for is_last in (False, True):  # the first time, perhaps, over a new connection
            snapshot = self._look(session_id)
            try:
                raw, ttl_ms = self.records.look(session_id, None if snapshot is None else snapshot.node)
            except NotServedHere:
                if not is_last:
                    continue  # the session has moved to another node
                snapshot = None  # it is on its way
                raw, ttl_ms = self.records.look(session_id)
            record = None if raw is None else self.records.readable(session_id, raw, ttl_ms)
            if record is None or snapshot is None or self._freshness is None:
                break
            if self._freshness.stands(snapshot):
                if record.stamp is None:
                    believed = self._checked.get(session_id) == (record.raw, snapshot.epoch)
                else:
                    believed = record.stamp.epoch == snapshot.epoch
                return CacheEntry(raw, record, believed, snapshot.epoch)
        return CacheEntry(raw, record, False, _NO_EPOCH if snapshot is None else snapshot.epoch)

    def believe(self, record: SessionRecord, epoch: int) -> None:
        """Believe a record without a stamp, for as long as it and the epoch stay."""
        if len(self._checked) >= self._entries:
            self._checked.clear()
        self._checked[record.binding.session_id] = (record.raw, epoch)

    def mark(self, session_id: str) -> int:
        """The same as FillLease.mark."""
        return self.records.mark(session_id)

    def epoch(self, session_id: str) -> int:
        """The freshness lease's epoch now; 0: none is valid."""
        snapshot = self._look(session_id)
        return _NO_EPOCH if snapshot is None else snapshot.epoch

    def stood(self, session_id: str) -> tuple[bytes | None, int]:
        """The value of a session, and the newest version of a row that stood there before it; 0: that is not known."""
        key = self._keys.session(session_id)
        raw, versions = self._client.call("MGET", key, sibling(key, "version"))
        told, stood, stayed = read_two(versions)
        if stayed and stayed != hashlib.sha1(raw or b"", usedforsecurity=False).hexdigest():
            stood = max(stood, told)
        return raw, stood

    def last_epoch(self, session_id: str) -> int:
        """The epoch that this process has seen last; 0: none."""
        if self._freshness is None:
            return _NO_EPOCH
        return self._freshness.last_epoch(self._keys.session(session_id)) or _NO_EPOCH

    def lease(self, session_id: str, epoch: int, asked_at: float, adopted: SessionRecord | None = None) -> FillLease:
        """Take a fill lease after the row was read.

        Args:
            epoch: the epoch before that.
            asked_at: when the row was asked for, by time.monotonic().
            adopted: the record that the row has adopted; its agent's index gets it.
        """
        commands = [self._leasing(session_id), self.records.marking(session_id)]
        if adopted is not None and is_id(adopted.binding.agent_id):
            ttl_ms = None if adopted.ttl_ms == NO_END else adopted.ttl_ms
            commands.append(self.records.indexing(adopted.binding.agent_id, session_id, ttl_ms))
        token, mark, *indexed = self._client.pipeline(commands, (self._lease, self.records.index), each=True)
        for reply in (token, mark):
            if isinstance(reply, BackendError):
                raise reply
        if indexed and self._is_away(indexed[0]):
            token = None
        return FillLease(None if time.monotonic() - asked_at > _LATE else token, epoch, read_mark(mark))

    def lease_to_bind(self, request: BindRequest) -> tuple[FillLease, Predecessor, bytes | None]:
        """Take a fill lease before the row is written, and note the session in its agent's index.

        Also returns what stands at the key, as SessionRows.bind and as fill_bound take it.
        """
        epoch = self.epoch(request.session_id)
        commands = [
            self.records.indexing(request.agent_id, request.session_id, request.ttl_ms),
            self._leasing(request.session_id),
            ("MGET", self._keys.session(request.session_id)),
        ]
        if request.keeps_ttl:
            commands.append(("PTTL", self._keys.session(request.session_id)))
        indexed, *replies = self._client.pipeline(commands, (self.records.index, self._lease), each=True)
        for reply in replies:
            if isinstance(reply, BackendError):
                raise reply
        token, (raw,), *left = replies
        if self._is_away(indexed):
            token = None
        before = Predecessor() if raw is None else self._predecessor(request, raw, *left)
        if before.left_ms is not None and not 0 <= before.left_ms <= (request.ttl_ms or 0):
            ttl_ms = None if before.left_ms == NO_END else before.left_ms
            indexing = self.records.indexing(request.agent_id, request.session_id, ttl_ms)
            if self._is_away(self._client.pipeline((indexing,), (self.records.index,), each=True)[0]):
                token = None
        return FillLease(token, epoch, 0), before, raw

    def fill(self, session_id: str, row: SessionRow, lease: FillLease, over: Replaced, keeps_ttl: bool = False) -> bool:
        """Put a copy of the row. Returns whether it is there.

        Args:
            over: the values that it may replace.
            keeps_ttl: it ends when the value does that it replaces.
        """
        ttl_ms = "" if keeps_ttl else _left_ms(row)
        return self._put(session_id, row, lease, over, ttl_ms, False) == 1

    def fill_bound(self, request: BindRequest, row: SessionRow, lease: FillLease, seen: bytes | None) -> bool | None:
        """Put a copy of a row that was just bound. Returns whether it is there; None if another client bound the
        session since `seen` was read: that counts as newer.
        """
        if lease.token is None:
            self.drop({request.session_id: row.version}, COPIES)
            return False
        put = self._put(request.session_id, row, lease, seen_by_bind(seen), _left_ms(row), request.keeps_ttl)
        return None if put < 0 else put == 1

    def drop(self, versions: Mapping[str, int], over: Replaced) -> tuple[set[str], set[str]]:
        """Delete what the change of these rows ends.

        Args:
            versions: the rows' versions, by session.

        Returns the sessions that had something, and those whose Redis is away. Raises BackendError.
        """
        commands = [self._dropping(sid, version, over) for sid, version in versions.items()]
        if not commands:
            return set(), set()
        replies: Sequence[Any]
        try:
            replies = self._client.pipeline(commands, (self._drop,), each=True)
        except BackendUnavailable as error:
            replies = [error] * len(commands)
        untold = {sid for sid, reply in zip(versions, replies, strict=True) if isinstance(reply, BackendUnavailable)}
        if untold:
            self._untold(untold)
        for reply in replies:
            if isinstance(reply, BackendError) and not isinstance(reply, BackendUnavailable):
                raise reply
        return {sid for sid, had in zip(versions, replies, strict=True) if had == 1}, untold

    def living(self, versions: Mapping[str, int]) -> dict[str, int]:
        """The sessions that have a copy of that version of the row, and how much it has left, as PTTL says it."""
        commands: list[Command] = []
        for sid in versions:
            key = self._keys.session(sid)
            commands += [("MGET", key), ("PTTL", key)]
        replies = self._client.pipeline(commands) if commands else []
        found = {}
        for (sid, version), (raw,), left_ms in zip(versions.items(), replies[::2], replies[1::2], strict=True):
            record = None if raw is None else self.records.readable(sid, raw, left_ms)
            is_copy = record is not None and record.stamp is not None and record.stamp.version == version
            if is_copy and left_ms >= NO_END:
                found[sid] = left_ms
        return found

    # -- inside --------------------------------------------------------------------------------------------------

    def _put(
        self, session_id: str, row: SessionRow, lease: FillLease, over: Replaced, ttl_ms: str, no_sooner: bool
    ) -> int:
        """fill.lua's reply."""
        if lease.token is None:
            return 0
        key = self._keys.session(session_id)
        stamp = CopyStamp(lease.epoch, row.version)
        text = encode(row.agent_id, row.bound_at, row.data, row.bind_count, row.members, stamp)
        args = (text, ttl_ms, lease.token, str(row.version), _VERSION_MS, *over, str(int(no_sooner)))
        try:
            return int(self._client.run(self._fill, (*self._keys_of(key), sibling(key, "revoked")), *args))
        except BackendUnavailable:
            if over[0] != "same":
                self._untold((session_id,))
            return 0

    def _untold(self, session_ids: Iterable[str]) -> None:
        """Redis was not told. On its recovery the outbox relay does so, before this process uses it again."""
        self._counters.add("sessions.degraded.untold")
        self.records.replay_soon(session_ids)

    def _is_away(self, indexed: Any) -> bool:
        """Is the node of a Cluster away that has the index, by the reply to `indexing`? Then no copy is put: without
        PostgreSQL only the index tells which sessions an agent has.
        """
        if not isinstance(indexed, BackendError):
            return False
        if not isinstance(indexed, BackendUnavailable):
            raise indexed
        self._counters.add("sessions.degraded.index")
        return True

    def _look(self, session_id: str) -> FreshnessSnapshot | None:
        """The freshness lease of the node that has the session, if it is valid and says something of that."""
        if self._freshness is None:
            return None
        key = self._keys.session(session_id)
        snapshot = self._freshness.look(key)
        return snapshot if snapshot is not None and snapshot.covers(key) else None

    def _leasing(self, session_id: str) -> Command:
        lease = sibling(self._keys.session(session_id), "lease")
        return self._lease.call((lease,), (secrets.token_hex(8), _LEASE_MS))

    def _keys_of(self, key: str) -> tuple[str, str, str]:
        return key, sibling(key, "lease"), sibling(key, "version")

    def _predecessor(self, request: BindRequest, raw: bytes, left_ms: int | None = None) -> Predecessor:
        """The value that a bind finds, as far as it matters to the row."""
        record = self.records.readable(request.session_id, raw, NO_END)
        left_ms = None if left_ms is None or left_ms < NO_END else bounded(left_ms)
        if record is None:
            return Predecessor(counted=1)  # a value that cannot be read is another client's binding nevertheless
        if record.stamp is not None:
            return Predecessor(copied=record.stamp.version, left_ms=left_ms)
        is_agents = record.binding.agent_id == request.agent_id
        return Predecessor(record.binding.bind_count, None, left_ms, members_of(raw) if is_agents else None)

    def _dropping(self, session_id: str, version: int, over: Replaced) -> Command:
        return self._drop.call(self._keys_of(self._keys.session(session_id)), (str(version), _VERSION_MS, *over))

    def _invalidations(self, changes: Sequence[tuple[str, int]]) -> Sequence[Command]:
        commands = []
        for session_id, version in changes:
            with contextlib.suppress(ValueError):  # no session has such an id: it has another prefix
                commands.append(self._dropping(session_id, version, COPIES))
        return commands


def _left_ms(row: SessionRow) -> str:
    """How long a copy of the row lives. The copy of a row that ends this instant ends a millisecond later."""
    return str(NO_END if row.left_ms is None else max(row.left_ms, 1))


def _catch_up(lease: NodeLease) -> None:
    """Run the outbox relay. A run of another process's may have begun before our row was written.

    Raises BackendUnavailable where Redis does not serve yet: a node of a Cluster that was restarted waits for the
    others first.
    """
    lease.relay.read()
    for _ in range(_TRIES):
        if lease.drain() is not None:
            break
        time.sleep(_BETWEEN_TRIES)
