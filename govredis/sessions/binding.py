"""SessionBinding, and its JSON form at `session:{id}`, which the async service shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from ..errors import BackendError, refuse

MAX_DATA_BYTES = 64 * 1024
#: PostgreSQL's integer and bigint end there: a larger number is none of ours.
_MANY_BINDS, _BIGINT = 2**31 - 1, 2**63
#: The member that only our records have. In the copy of a row it names the row's version, and the epoch.
RESERVED = "__govredis__"
#: The members that we know. All others belong to other clients, and stay.
_KNOWN = frozenset({"agent_id", "bound_at", "bind_count", "data", RESERVED})
#: PTTL's answer for a key that has no end.
NO_END = -1

_1970 = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Unreadable(BackendError):
    """The value at one of our keys is no record: another client has put it there."""


@dataclass(frozen=True, slots=True)
class SessionBinding:
    """Which agent a session belongs to.

    Attributes:
        session_id, agent_id: the two.
        bound_at: aware UTC; by the clock of the process that bound.
        expires_at: aware UTC; None for a session without end, which another client has made.
        bind_count: how often the session has been bound.
        data: what `bind(data=)` was given, else None.
        backend: which backend answered: "redis"; "postgres", the row itself, where Redis has no copy or is away; or
            "local", this process's own memory, while no server can be asked.
    """

    session_id: str
    agent_id: str
    bound_at: datetime
    expires_at: datetime | None
    bind_count: int
    data: Any
    backend: str


class BindRequest(NamedTuple):
    """The arguments of one bind.

    Attributes:
        ttl_ms: milliseconds; None: without end.
        data: JSON.
        if_absent: only where nobody is bound.
        keeps_ttl: a session that ends later, or never, goes on doing so.
        origin: the session whose foreign members it gets. None: it keeps its own, if it stays with the same agent.
    """

    session_id: str
    agent_id: str
    bound_at: datetime
    ttl_ms: int | None
    data: str | None
    if_absent: bool
    keeps_ttl: bool = False
    origin: str | None = None

    def binding(self, backend: str, expires_at: datetime | None = None, bind_count: int = 1) -> SessionBinding:
        """The binding that it makes, which ends at that time."""
        data = None if self.data is None else json.loads(self.data)
        return SessionBinding(self.session_id, self.agent_id, self.bound_at, expires_at, bind_count, data, backend)

    def ends_at(self) -> datetime | None:
        """The end of the session, if it had none before."""
        return None if self.ttl_ms is None else self.bound_at + timedelta(milliseconds=self.ttl_ms)


class CopyStamp(NamedTuple):
    """The row that a record is a copy of: its version, and the freshness lease's epoch in which it was copied."""

    epoch: int
    version: int


class SessionRecord(NamedTuple):
    """The value at `session:{id}`.

    Attributes:
        stamp: None for a value that is no copy of a row.
        ttl_ms: as PTTL says it.
        ours: govredis has written it, and noted it in its agent's index.
    """

    binding: SessionBinding
    stamp: CopyStamp | None
    raw: bytes
    ttl_ms: int
    ours: bool


class UpdateBase(NamedTuple):
    """A session as it was read for an update, and the state by which its backend knows whether it still is so."""

    binding: SessionBinding
    state: Any


def same_binding(one: SessionBinding, other: SessionBinding) -> bool:
    """Do the two come from the same bind, whatever the session's data was then?"""
    return (one.agent_id, one.bound_at) == (other.agent_id, other.bound_at)


def later(one: datetime | None, other: datetime | None) -> datetime | None:
    """The later of two ends; no end (None) is the latest."""
    return None if one is None or other is None else max(one, other)


def touch_is_due(left_ms: int | None, ttl_ms: int) -> bool:
    """Has a tenth of the TTL passed, so that a touch is worth a write?

    Args:
        left_ms: what is left of the session; None, and below 0: it has no end, or is over.
        ttl_ms: what a touch gives it.
    """
    return left_ms is not None and 0 <= left_ms <= 0.9 * ttl_ms


def encode_data(data: Any) -> str | None:
    """`data` as JSON. Raises ValueError if it does not serialise."""
    if data is None:
        return None
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"data cannot be stored as JSON: {error}") from None
    if len(text) > MAX_DATA_BYTES:
        raise refuse("data", f"{len(text)} bytes of JSON", f"at most {MAX_DATA_BYTES} bytes of JSON")
    return text


def encode(
    agent_id: str,
    bound_at: datetime,
    data: str | None,
    bind_count: int,
    members: str | None = None,
    stamp: CopyStamp | None = None,
) -> str:
    """The JSON to store. The stamp of a row's copy comes last: drop.lua looks for it there."""
    text = json.dumps({"agent_id": agent_id, "bound_at": iso(bound_at)})[:-1]
    if members is not None:
        text += f", {members[1:-1]}"
    if data is not None:
        text += f', "data": {data}'
    ours = "{}" if stamp is None else json.dumps(stamp._asdict())
    return f'{text}, "bind_count": {bind_count}, "{RESERVED}": {ours}}}'


def encode_changed(raw: bytes, data: str | None) -> str:
    """The JSON of a record with other data, which is no copy of a row any more. Foreign members stay."""
    record = json.loads(raw)
    if record.get(RESERVED) != {}:
        record.pop(RESERVED, None)
    if data is None:
        record.pop("data", None)
    else:
        record["data"] = json.loads(data)
    return json.dumps(record)


def members_of(raw: bytes | None) -> str | None:
    """A record's foreign members, as a JSON object; None where it has none, and for a value that is no record."""
    try:
        others = {name: value for name, value in json.loads(raw or b"{}").items() if name not in _KNOWN}
    except (ValueError, AttributeError, RecursionError):
        return None
    return json.dumps(others) if others else None


def iso(at: datetime) -> str:
    return at.astimezone(timezone.utc).isoformat(timespec="microseconds")


def microseconds(at: datetime) -> int:
    """Since 1970."""
    return (at - _1970) // timedelta(microseconds=1)


def decode(session_id: str, raw: bytes, ttl_ms: int, now: datetime) -> SessionRecord:
    """A value in Redis that has `ttl_ms` left, as PTTL says it. Raises Unreadable if it is no record."""
    try:
        record = json.loads(raw)
        agent_id = record["agent_id"]
        bind_count = int(record.get("bind_count") or 1)
        if not isinstance(agent_id, str) or not agent_id:
            raise TypeError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise unreadable(session_id) from None
    if not 1 <= bind_count < _MANY_BINDS:
        bind_count = 1
    expires_at = ends_at(now, ttl_ms)
    binding = SessionBinding(
        session_id, agent_id, _instant(record), expires_at, bind_count, record.get("data"), "redis"
    )
    return SessionRecord(binding, _stamp(record.get(RESERVED)), raw, ttl_ms, RESERVED in record)


def ends_at(now: datetime, ttl_ms: int) -> datetime | None:
    """The end of a key that has so much left, as PTTL says it; None: it has no end."""
    try:
        return now + timedelta(milliseconds=ttl_ms) if ttl_ms >= 0 else None
    except OverflowError:  # after the year 9999
        return None


def unreadable(session_id: str) -> Unreadable:
    return Unreadable(f"the record of session {session_id!r} is not a JSON object with an agent_id")


def _stamp(member: Any) -> CopyStamp | None:
    if not isinstance(member, dict):
        return None
    epoch, version = member.get("epoch"), member.get("version")
    if not isinstance(epoch, int) or not isinstance(version, int):
        return None
    return CopyStamp(epoch, version) if 0 <= epoch < _BIGINT and 0 <= version < _BIGINT else None


def _instant(record: Mapping[str, Any]) -> datetime:
    """The member bound_at: the async service writes ISO 8601 with a zone, or without one for UTC."""
    text = record.get("bound_at")
    if isinstance(text, str):
        try:
            # Python 3.10 does not read the Z of ISO 8601.
            at = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
            if at.tzinfo is timezone.utc:  # ours
                return at
            return at.astimezone(timezone.utc) if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)
        except (ValueError, OverflowError):  # the latter in the years 1 and 9999
            pass
    return _1970
