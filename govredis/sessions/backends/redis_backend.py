"""Sessions in Redis alone: records, the agents' indexes, and the marks that revocations leave.

A bind takes two round trips, so that a bind that began before a revocation does not survive it, however late it is
carried out. The first notes the session in its agent's index, and reads the session's record and mark. The second
writes the new record, if the old one is still what was read and no newer mark is there. So the mark that `unbind`
leaves stops it. `unbind_agent` reads the index: either it finds the session there and leaves it such a mark, or it came
before the bind. Such binds compare marks that the server made: no clock has to agree with another.

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
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple

from ..._context import Context
from ...client import Arg, Command, RedisClient, Script
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
from ..pending import AgentRevocation, Pending, Revocation
from .backend import PrimarySessionBackend

#: A command whose reply was lost may arrive a second time within so many milliseconds.
_AGAIN_MS = "10000"
#: PTTL's answer where there is nothing.
_NOTHING = -2
#: Milliseconds for which an index names a session without end, and the most for any session.
_ENDLESS, _LONGEST = 366 * 24 * 3600 * 1000, 10**12
_TWO_NUMBERS = re.compile(rb"([0-9]{1,20}) ?([0-9]{0,20}) ?([0-9a-f]*)")
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
        self._ttl_ms = int(context.config.session_ttl * 1000)
        self._counters = context.counters
        self._now = now
        self._entries = context.config.local_entries
        #: By session: those that the async service has bound or extended.
        self._noted: dict[str, IndexNote] = {}
        redis.on_recovery(lambda _: self._noted.clear())
        self._bind = Script(__package__, "values.lua", "bind.lua")
        self._update = Script(__package__, "values.lua", "update.lua")
        self._touch = Script(__package__, "touch.lua")
        self._unbind = Script(__package__, "values.lua", "unbind.lua")
        self.index: Script = Script(__package__, "index.lua")

    def bind(self, request: BindRequest) -> tuple[SessionBinding, bool]:
        key = self._keys.session(request.session_id)
        commands = [
            self.indexing(request.agent_id, request.session_id, request.ttl_ms),
            ("MGET", key, sibling(key, "revoked")),
        ]
        if request.origin is not None:
            commands.append(("MGET", self._keys.session(request.origin)))
        _, (raw, marks), *origin = self._client.pipeline(commands, (self.index,))
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
            command = self._binding(request, marks or b"", seen, count + 1, members, indexed)
            ((status, there, ttl_ms),) = self._client.pipeline((command,), (self._bind,))
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
        written = self._client.run(self._update, keys, record.raw, encode_changed(record.raw, data), _AGAIN_MS)
        return replace(record.binding, data=None if data is None else json.loads(data)) if written else None

    def look(self, session_id: str) -> tuple[bytes | None, int]:
        """The value there, b"" for a type other than a string, None for nothing; and its PTTL."""
        key = self._keys.session(session_id)
        (raw,), ttl_ms = self._client.pipeline((("MGET", key), ("PTTL", key)))
        if raw is None and ttl_ms != _NOTHING:  # else it was bound between the two
            raw = None if self._client.call("TYPE", key) in (b"string", b"none") else b""
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
        commands = [self._touch.call((self._keys.session(binding.session_id),), (str(wanted_ms),))]
        if is_id(binding.agent_id):
            # First: an index may name a session too many, never one too few.
            commands.insert(0, self.indexing(binding.agent_id, binding.session_id, wanted_ms))
        try:
            existed = self._client.pipeline(commands, (self.index, self._touch))[-1]
        except BackendUnavailable:
            self._counters.add("sessions.degraded.touch")
            return binding
        return replace(binding, expires_at=self._now() + timedelta(milliseconds=wanted_ms)) if existed else binding

    def unbind(self, session_id: str) -> bool:
        return bool(self._client.pipeline((self._unbinding(session_id),), (self._unbind,))[0])

    def for_agent(self, agent_id: str) -> list[str]:
        found = self.read_many(self.named(agent_id))
        return sorted(sid for sid, record in found.items() if record.binding.agent_id == agent_id)

    def unbind_agent(self, agent_id: str) -> int:
        return len(self.unbind_of(agent_id, self.named(agent_id)))

    def unbind_of(self, agent_id: str, session_ids: Sequence[str]) -> list[str]:
        """End those of these sessions that are the agent's, and return them."""
        commands = [self._unbinding(sid, agent_id) for sid in session_ids]
        replies = self._client.pipeline(commands, (self._unbind,)) if commands else []
        return [sid for sid, had in zip(session_ids, replies, strict=True) if had]

    def tell_unbound(self, pending: Sequence[tuple[str, Revocation]]) -> None:
        self._tell_ended({sid: (revocation, None) for sid, revocation in pending})

    def tell_agent_unbound(self, pending: tuple[str, AgentRevocation]) -> None:
        agent_id, revocation = pending
        unknown = Revocation(revocation.at)
        self._tell_ended({sid: (unknown, agent_id) for sid in self.named(agent_id) if sid not in revocation.told})

    def tell_bound(self, pending: Sequence[tuple[Pending, BindRequest]]) -> list[SessionBinding | None]:
        commands = []
        for _, request in pending:
            marks = _us(request.bound_at)
            commands += [
                self.indexing(request.agent_id, request.session_id, request.ttl_ms),
                self._binding(request, f"{marks} {marks}", Observed(None, False), 1, None, request.ttl_ms),
            ]
        replies = self._client.pipeline(commands, (self.index, self._bind))[1::2]
        standing: list[SessionBinding | None] = []
        for (_, request), (status, raw, ttl_ms) in zip(pending, replies, strict=True):
            record = self.readable(request.session_id, raw, ttl_ms) if status == 0 else None
            if status == 0 and record is None:
                self._counters.add("sessions.replays_failed")
            mine = record is not None and same_binding(record.binding, request.binding("redis"))
            standing.append(None if record is None or mine else record.binding)
        return standing

    def named(self, agent_id: str) -> list[str]:
        """The sessions that the agent's index names; some of them may have ended."""
        key = self._keys.agent_sessions(agent_id)
        try:
            members = self._client.call("ZRANGE", key, "0", "-1")
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

    def _tell_ended(self, told: Mapping[str, tuple[Revocation, str | None]]) -> None:
        """Tell of revocations made while Redis was away; with an agent, only where the session is that agent's."""
        waiting = dict(told)
        for _ in range(_TRIES):
            raws = self._client.pipeline([("MGET", self._keys.session(sid)) for sid in waiting])
            commands, asked = [], []
            for (sid, (revocation, agent_id)), (raw,) in zip(waiting.items(), raws, strict=True):
                record = None if raw is None else self.readable(sid, raw, NO_END)
                if agent_id is not None and record is not None and record.binding.agent_id != agent_id:
                    continue
                ends = record is None or revocation.ends(record.binding)
                key = self._keys.session(sid)
                keys = key, sibling(key, "revoked"), sibling(key, "lease")
                args = "", _us(revocation.at), str(self._ttl_ms), raw or b"", str(int(ends))
                commands.append(self._unbind.call(keys, args))
                asked.append(sid)
            replies = self._client.pipeline(commands, (self._unbind,)) if commands else []
            waiting = {sid: told[sid] for sid, reply in zip(asked, replies, strict=True) if reply < 0}
            if not waiting:
                return
        raise BackendError(f"{len(waiting)} sessions changed at each of {_TRIES} tries to end them")

    def _binding(
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
        args = seen.raw or b"", str(int(seen.is_other)), text, ttl_ms, keeps, marks, _us(request.bound_at)
        return self._bind.call((key, sibling(key, "revoked")), args)

    def _unbinding(self, session_id: str, agent_id: str = "") -> Command:
        key = self._keys.session(session_id)
        keys = key, sibling(key, "revoked"), sibling(key, "lease")
        return self._unbind.call(keys, (agent_id, "", str(self._ttl_ms), "", ""))


def read_two(found: bytes | None) -> tuple[int, int, str]:
    """The same as two_numbers() in values.lua."""
    match = _TWO_NUMBERS.fullmatch(found or b"")
    if match is None:
        return 0, 0, ""
    one, other, digest = int(match[1]), int(match[2] or b"0"), match[3].decode()
    return one if one < 2**53 else 0, other if other < 2**53 else 0, digest


def read_mark(reply: list[bytes | None]) -> int:
    """The newer one of a session's two marks."""
    return max(read_two(reply[0])[:2])


def _us(at: datetime) -> str:
    return str(microseconds(at))
