"""SessionBinding, and its JSON form at `session:{id}`, which the async service shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from ..errors import BackendError, refuse

MAX_DATA_BYTES = 64 * 1024
#: The member of a cached record that says which row, and of which epoch, it is of. One without it is no copy of a row.
RESERVED = "__govredis__"

_1970 = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class SessionBinding:
    """Which agent a session belongs to.

    Attributes:
        session_id, agent_id: the two.
        bound_at: aware UTC; by the clock of the process that bound.
        expires_at: aware UTC; None where the record in Redis has no expiry (somebody else wrote it).
        bind_count: how often the session has been bound.
        data: what `bind(data=)` was given, else None.
        backend: who answered: "redis"; "postgres", the row itself, where Redis has no copy or is away; or "local":
            this process's own memory of it, while nobody else can be asked.
    """

    session_id: str
    agent_id: str
    bound_at: datetime
    expires_at: datetime | None
    bind_count: int
    data: Any
    backend: str


class Order(NamedTuple):
    """What to bind. `data` is JSON, `ttl_ms` milliseconds."""

    session_id: str
    agent_id: str
    bound_at: datetime
    ttl_ms: int
    data: str | None
    if_absent: bool

    def binding(self, backend: str) -> SessionBinding:
        """The binding, where it is the first."""
        data = None if self.data is None else json.loads(self.data)
        expires_at = self.bound_at + timedelta(milliseconds=self.ttl_ms)
        return SessionBinding(self.session_id, self.agent_id, self.bound_at, expires_at, 1, data, backend)


class Stamp(NamedTuple):
    """Which row a cached record is a copy of: the guard's epoch in which it was made, and the row's version."""

    epoch: int
    version: int


class Record(NamedTuple):
    """What stands at `session:{id}`. `ttl_ms` is PTTL's."""

    binding: SessionBinding
    stamp: Stamp | None
    raw: bytes
    ttl_ms: int


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


def encode(agent_id: str, bound_at: datetime, data: str | None) -> str:
    """The JSON to store, without its bind_count and closing brace."""
    head = json.dumps({"agent_id": agent_id, "bound_at": iso(bound_at)})[:-1]
    return head if data is None else f'{head}, "data": {data}'


def encode_copy(agent_id: str, bound_at: datetime, data: str | None, bind_count: int, stamp: Stamp) -> str:
    """The JSON to store of a row."""
    member = json.dumps(stamp._asdict())
    return f'{encode(agent_id, bound_at, data)}, "bind_count": {bind_count}, "{RESERVED}": {member}}}'


def iso(at: datetime) -> str:
    return at.astimezone(timezone.utc).isoformat(timespec="microseconds")


def microseconds(at: datetime) -> int:
    """Since 1970."""
    return (at - _1970) // timedelta(microseconds=1)


def decode(session_id: str, raw: bytes, ttl_ms: int, now: datetime) -> Record:
    """A record in Redis that has `ttl_ms` (as PTTL says) left. Raises BackendError for what is none."""
    try:
        record = json.loads(raw)
        agent_id = record["agent_id"]
        bind_count = int(record.get("bind_count") or 1)
        if not isinstance(agent_id, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise BackendError(f"the record of session {session_id!r} is not a JSON object with an agent_id") from None
    expires_at = now + timedelta(milliseconds=ttl_ms) if ttl_ms >= 0 else None
    binding = SessionBinding(
        session_id, agent_id, _instant(record), expires_at, bind_count, record.get("data"), "redis"
    )
    member = record.get(RESERVED)
    stamp = None
    if isinstance(member, dict):
        epoch, version = member.get("epoch"), member.get("version")
        if isinstance(epoch, int) and isinstance(version, int):
            stamp = Stamp(epoch, version)
    return Record(binding, stamp, raw, ttl_ms)


def _instant(record: Mapping[str, Any]) -> datetime:
    """bound_at: the async service writes ISO 8601, with or without a zone, which then is UTC."""
    text = record.get("bound_at")
    if isinstance(text, str):
        try:
            # Python 3.10 does not read the Z of ISO 8601.
            at = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
            return at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)
        except ValueError:
            pass
    return _1970
