"""Sessions in Redis alone: records, the agents' indexes, and the marks that revocations leave.

A bind takes two round trips, so that a bind that began before a revocation does not survive it, however late it is
carried out. The first reads the session's record and mark, and then notes the session in its agent's index. The second
writes the new record, if the old one is still what was read and no newer mark is there. So the mark that `unbind`
leaves stops it. `unbind_agent` reads the index: either it finds the session there and leaves it such a mark, or it came
before the bind. Such binds compare marks that the server made: no clock has to agree with another.

In a Redis Cluster an agent's index and its sessions have slots of their own, and each node carries out what concerns
its keys. Steps that must follow one another are round trips of their own there: a bind takes three.

A process that was cut off tells of its changes later. Its revocation ends the record that this process knew, and no
other, whatever the clocks say; if it knew none, a record that is older by the clocks. The revocation leaves a mark of
its own, which stops binds that were made before it by the clocks. A bind that is told later is compared with all marks
by the clocks.

The async service writes records, too, extends ours, and knows of no index. This process notes a record in its agent's
index when it first sees it, if the record is not ours or has more than our TTL left. It notes it again when the record
ends later than was noted, was bound anew, or Redis was away and may have lost the index.

Any client may have put anything at our keys. GET fails where there is no string, and with it the whole pipeline; MGET
finds nothing there. A value that cannot be read is counted as `sessions.malformed`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from ..._context import Context
from ...client import Arg, Command, RedisClient, RedisNode, Script
from ...errors import BackendError, BackendUnavailable
from ...keys import is_id, sibling
from ..binding import (
    NO_END,
    BindRequest,
    SessionBinding,
    SessionRecord,
    Unreadable,
    UpdateBase,
    decode,
    encode,
    encode_changed,
    ends_at,
    members_of,
    microseconds,
    same_binding,
    touch_is_due,
)
from .backend import PrimarySessionBackend, Unconfirmed
from .marks import read_mark

#: A command whose reply was lost may arrive a second time within so many milliseconds.
_AGAIN_MS = "10000"
#: PTTL's answer where there is nothing.
_NOTHING = -2
#: Milliseconds for which an index names a session without end, and the most for any session.
_ENDLESS, _LONGEST = 366 * 24 * 3600 * 1000, 10**12
#: How often a record may change between look and write.
_TRIES = 100


class Observed(NamedTuple):
    """The content of a key when it was read: a string, a value of another type, or nothing."""

    raw: bytes | None
    is_other: bool

    @property
    def is_nothing(self) -> bool:
        return self.raw is None and not self.is_other


class IndexNote(NamedTuple):
    """A binding that this process has noted in its agent's index, and until when; None: it has no end."""

    agent_id: str
    bound_at: datetime
    until: datetime | None

    def covers(self, binding: SessionBinding) -> bool:
        if (self.agent_id, self.bound_at) != (binding.agent_id, binding.bound_at):
            return False
        return self.until is None or (binding.expires_at is not None and binding.expires_at <= self.until)


class RedisSessionBackend(PrimarySessionBackend):
    """The primary where there is no PostgreSQL; else a part of the RowCache.

    Raises BackendError where Redis answers with an error, and Unreadable where another client has put something else at
    the session's key, or at the agent's index. The next bind replaces that.
    """

    def __init__(self, context: Context, redis: RedisClient, *, now: Callable[[], datetime]) -> None:
        self._keys = context.keys
        self._client = redis
        self._confirms = context.config.confirm and context.postgres is None
        self._ttl_ms = int(context.config.session_ttl * 1000)
        self._counters = context.counters
        self._now = now
        self._entries = context.config.local_entries
        #: By session: those that the async service has bound or extended.
        self._noted: dict[str, IndexNote] = {}
        redis.on_recovery(lambda _: self._noted.clear())
        self.bind_script: Script = Script(__package__, "values.lua", "bind.lua")
        self._update = Script(__package__, "values.lua", "update.lua")
        self._touch = Script(__package__, "touch.lua")
        self.unbind_script: Script = Script(__package__, "values.lua", "unbind.lua")
        self.index: Script = Script(__package__, "index.lua")

    def on(self, node: RedisNode) -> RedisSessionBackend:
        """This backend, asking that node alone."""
        backend = copy.copy(self)
        backend._client = node
        return backend

    def replay_soon(self, session_ids: Iterable[str], agent_id: str | None = None) -> None:
        """There are pending writes for these: the nodes that keep them are used no more until they were told."""
        keys = [] if agent_id is None else [self._keys.agent_sessions(agent_id)]
        by_node: dict[RedisNode | None, str] = {}
        for key in (*keys, *map(self._keys.session, session_ids)):
            try:
                by_node[self._client.at(key)] = key
            except BackendUnavailable:
                by_node[None] = key  # no node has it
        for key in by_node.values():
            self._client.replay_soon("sessions were changed without it", key)

    def bind(self, request: BindRequest) -> tuple[SessionBinding, bool]:
        key = self._keys.session(request.session_id)
        reads: list[Command] = [("MGET", key, sibling(key, "revoked"))]
        if request.origin is not None:
            reads.append(("MGET", self._keys.session(request.origin)))
        indexing = self.indexing(request.agent_id, request.session_id, request.ttl_ms)
        # In this order: a mark that was left because the index names the session must not be among those read.
        (raw, marks), *origin = self._in_order(reads, (indexing,), (self.index,))[:-1]
        seen, indexed = Observed(raw, False), request.ttl_ms
        for _ in range(_TRIES):
            old: SessionRecord | None = None
            count = 0
            if request.if_absent and not seen.is_nothing:
                held = self.get(request.session_id, 0)
                if held is not None:
                    return held, True
                seen = Observed(None, False)
            elif not seen.is_nothing:
                with contextlib.suppress(Unreadable):
                    old = decode(request.session_id, seen.raw or b"", NO_END, self._now())
                count = 1  # a value that cannot be read is another client's binding nevertheless
            members = None
            if request.origin is not None:
                members = members_of(origin[0][0])
            if old is not None:
                if same_binding(old.binding, request.binding("redis")):  # this bind arrived twice
                    return self.get(request.session_id, 0) or old.binding, True
                count = old.binding.bind_count
                if request.origin is None and old.binding.agent_id == request.agent_id:
                    members = members_of(old.raw)
            command = self.binding(request, marks or b"", seen, count + 1, members, indexed)
            ((status, there, ttl_ms),) = self._client.pipeline((command,), (self.bind_script,))
            if status > 0:
                return request.binding("redis", ends_at(self._now(), ttl_ms), count + 1), True
            if status < 0:
                return request.binding("redis", request.ends_at()), False
            seen = Observed(there or None, not there and ttl_ms != _NOTHING)
            if request.keeps_ttl and indexed is not None and (ttl_ms == NO_END or ttl_ms > indexed):
                indexed = None if ttl_ms == NO_END else ttl_ms
                self._client.pipeline((self.indexing(request.agent_id, request.session_id, indexed),), (self.index,))
        raise BackendError(f"session {request.session_id!r} changed at each of {_TRIES} tries to bind it")

    def get(self, session_id: str, touch: int) -> SessionBinding | None:
        raw, ttl_ms = self.look(session_id)
        if raw is None:
            return None
        record = self.decoded(session_id, raw, ttl_ms)
        if not record.ours or not 0 <= ttl_ms <= self._ttl_ms:
            self._note(record)
        return self.touched(record, touch) if touch else record.binding

    def read_for_update(self, session_id: str) -> UpdateBase | None:
        raw, ttl_ms = self.look(session_id)
        if raw is None:
            return None
        record = self.decoded(session_id, raw, ttl_ms)
        if not record.ours or not 0 <= ttl_ms <= self._ttl_ms:
            self._note(record)
        return UpdateBase(record.binding, record)

    def compare_and_set(self, base: UpdateBase, data: str | None) -> SessionBinding | None:
        record: SessionRecord = base.state
        key = self._keys.session(record.binding.session_id)
        keys = key, sibling(key, f"update:{secrets.token_hex(8)}")
        command = self._update.call(keys, (record.raw, encode_changed(record.raw, data), _AGAIN_MS))
        (written,) = self._client.pipeline((command,), (self._update,))
        return replace(record.binding, data=None if data is None else json.loads(data)) if written else None

    def look(self, session_id: str, node: RedisNode | None = None) -> tuple[bytes | None, int]:
        """The value there, b"" for a type other than a string, None for nothing; and its PTTL.

        Args:
            node: ask this one, and no other that has the session by then.
        """
        key, client = self._keys.session(session_id), node or self._client
        (raw,), ttl_ms = client.pipeline((("MGET", key), ("PTTL", key)))
        if raw is None and ttl_ms != _NOTHING:  # else it was bound between the two
            raw = None if client.call("TYPE", key) in (b"string", b"none") else b""
        return raw, ttl_ms

    def read_many(self, session_ids: Sequence[str]) -> dict[str, SessionRecord]:
        """The records of these sessions, as far as there are any and they can be read."""
        raws = self._client.pipeline([("MGET", self._keys.session(sid)) for sid in session_ids])
        found = {}
        for sid, (raw,) in zip(session_ids, raws, strict=True):
            record = None if raw is None else self.readable(sid, raw, -1)
            if record is not None:
                found[sid] = record
        return found

    def touched(self, record: SessionRecord, wanted_ms: int) -> SessionBinding:
        """The record's binding with this TTL again, if a tenth of that has passed."""
        binding = record.binding
        if not touch_is_due(record.ttl_ms, wanted_ms):
            return binding
        touching = self._touch.call((self._keys.session(binding.session_id),), (str(wanted_ms),))
        # First: an index may name a session too many, never one too few.
        named = is_id(binding.agent_id)
        indexing = (self.indexing(binding.agent_id, binding.session_id, wanted_ms),) if named else ()
        try:
            existed = self._in_order(indexing, (touching,), (self.index, self._touch))[-1]
        except BackendUnavailable:
            self._counters.add("sessions.degraded.touch")
            return binding
        return replace(binding, expires_at=self._now() + timedelta(milliseconds=wanted_ms)) if existed else binding

    def unbind(self, session_id: str) -> bool:
        if self._confirms:
            return self._unbind_confirmed(session_id)
        return bool(self._client.pipeline((self.unbinding(session_id),), (self.unbind_script,))[0])

    def for_agent(self, agent_id: str) -> list[str]:
        found = self.read_many(self.named(agent_id))
        return sorted(sid for sid, record in found.items() if record.binding.agent_id == agent_id)

    def unbind_agent(self, agent_id: str) -> int:
        named = self.named(agent_id)
        ended, failed = self.unbind_of(agent_id, named)
        if failed is not None:
            raise failed
        if self._confirms:  # a replica that has a node's last write has those before
            for sid in {self._client.at(self._keys.session(sid)): sid for sid in named}.values():
                self._unbind_confirmed(sid, agent_id)
        return len(ended)

    def unbind_of(self, agent_id: str, session_ids: Sequence[str]) -> tuple[list[str], BackendError | None]:
        """End those of these sessions that are the agent's.

        Returns them, and the error of those that could not be ended: a BackendUnavailable, if any was one.
        """
        if not session_ids:
            return [], None
        commands = [self.unbinding(sid, agent_id) for sid in session_ids]
        try:
            replies = self._client.pipeline(commands, (self.unbind_script,), each=True)
        except BackendUnavailable as error:
            return [], error
        failed = [reply for reply in replies if isinstance(reply, BackendError)]
        failed.sort(key=lambda error: not isinstance(error, BackendUnavailable))
        ended = [sid for sid, had in zip(session_ids, replies, strict=True) if had == 1]
        return ended, failed[0] if failed else None

    def named(self, agent_id: str) -> list[str]:
        """The sessions that the agent's index names; some of them may have ended."""
        key = self._keys.agent_sessions(agent_id)
        try:
            (members,) = self._client.pipeline((("ZRANGE", key, "0", "-1"),))
        except BackendUnavailable:
            raise
        except BackendError as error:
            if self._client.call("TYPE", key) in (b"zset", b"none"):
                raise
            self._counters.add("sessions.malformed")
            raise Unreadable(f"the index of the sessions of agent {agent_id!r} is no sorted set: {error}") from error
        named = []
        for member in members:
            sid = member.decode(errors="replace")
            if is_id(sid) and sid.encode() == member:
                named.append(sid)
            else:  # no session has such an id
                self._counters.add("sessions.malformed")
        return named

    def indexing(self, agent_id: str, session_id: str, ttl_ms: int | None) -> Command:
        """The command that has the agent's index name a session for so long; None: the session has no end."""
        ttl_ms = _ENDLESS if ttl_ms is None else min(ttl_ms, _LONGEST)
        return self.index.call((self._keys.agent_sessions(agent_id),), (session_id, str(ttl_ms)))

    def marking(self, session_id: str) -> Command:
        """The command that asks when the session was last revoked: see read_mark."""
        return ("MGET", sibling(self._keys.session(session_id), "revoked"))

    def mark(self, session_id: str) -> int:
        """When the session was last revoked, in microseconds; 0: it was not, or that is forgotten."""
        return read_mark(self._client.call(*self.marking(session_id)))

    def decoded(self, session_id: str, raw: bytes, ttl_ms: int) -> SessionRecord:
        try:
            return decode(session_id, raw, ttl_ms, self._now())
        except Unreadable:
            self._counters.add("sessions.malformed")
            raise

    def readable(self, session_id: str, raw: bytes, ttl_ms: int) -> SessionRecord | None:
        try:
            return self.decoded(session_id, raw, ttl_ms)
        except Unreadable:
            return None

    # -- inside --------------------------------------------------------------------------------------------------

    def _in_order(self, first: Sequence[Command], then: Sequence[Command], scripts: Sequence[Script]) -> list[Any]:
        """The replies to commands, and to others that are carried out after them."""
        if isinstance(self._client, RedisNode) or not first:  # one server carries them out as they come
            return self._client.pipeline((*first, *then), scripts)
        return self._client.pipeline(first, scripts) + self._client.pipeline(then, scripts)

    def _note(self, record: SessionRecord) -> None:
        """Note a session that another client has bound or extended in its agent's index, once."""
        binding = record.binding
        sid, agent_id = binding.session_id, binding.agent_id
        noted = self._noted.get(sid)
        if (noted is not None and noted.covers(binding)) or not is_id(agent_id):
            return
        # For longer than it has left: a client that extends it once will do so again.
        ttl_ms = None if binding.expires_at is None else record.ttl_ms + self._ttl_ms
        try:
            self._client.pipeline((self.indexing(agent_id, sid, ttl_ms),), (self.index,))
        except BackendUnavailable:  # its turn comes with a later look
            self._counters.add("sessions.degraded.index")
            return
        if len(self._noted) >= self._entries:
            self._noted.clear()
        self._noted[sid] = IndexNote(
            agent_id, binding.bound_at, None if ttl_ms is None else ends_at(self._now(), ttl_ms)
        )

    def binding(
        self,
        request: BindRequest,
        marks: Arg,
        seen: Observed,
        bind_count: int,
        members: str | None,
        indexed: int | None,
    ) -> Command:
        key = self._keys.session(request.session_id)
        text = encode(request.agent_id, request.bound_at, request.data, bind_count, members)
        keeps = str(NO_END if indexed is None else indexed) if request.keeps_ttl else ""
        ttl_ms = str(NO_END if request.ttl_ms is None else request.ttl_ms)
        args = seen.raw or b"", str(int(seen.is_other)), text, ttl_ms, keeps, marks, str(microseconds(request.bound_at))
        return self.bind_script.call((key, sibling(key, "revoked")), args)

    def unbinding(
        self, session_id: str, agent_id: str = "", at: str = "", seen: bytes = b"", is_over: str = ""
    ) -> Command:
        """The command that ends a session; its arguments are those of unbind.lua."""
        return self.unbind_script.call(self._ended_keys(session_id), (agent_id, at, str(self._ttl_ms), seen, is_over))

    def _ended_keys(self, session_id: str) -> tuple[str, str, str]:
        key = self._keys.session(session_id)
        return key, sibling(key, "revoked"), sibling(key, "lease")

    def _unbind_confirmed(self, session_id: str, agent_id: str = "") -> bool:
        """End a session. Raises Unconfirmed."""
        args = agent_id, "", str(self._ttl_ms), "", ""
        had, is_confirmed = self._client.run_confirmed(self.unbind_script, self._ended_keys(session_id), *args)
        if not is_confirmed:
            self._counters.add("sessions.unconfirmed")
            raise Unconfirmed(
                f"{self._client.name} has carried out the revocation, and no replica has confirmed it in time"
                " (GOVREDIS_CONFIRM=1): a failover may undo it. Revoke again"
            )
        return bool(had)
