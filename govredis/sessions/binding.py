"""SessionBinding, and its JSON form at `session:{id}`, which the async service shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from ..errors import BackendError, refuse

MAX_DATA_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class SessionBinding:
    """Which agent a session belongs to.

    Attributes:
        session_id, agent_id: the two.
        bound_at: aware UTC; by the clock of the process that bound.
        expires_at: aware UTC; None where the record in Redis has no expiry (somebody else wrote it).
        bind_count: how often the session has been bound.
        data: what `bind(data=)` was given, else None.
        backend: "redis", or "local": this process's own memory of it, while Redis is away.
    """

    session_id: str
    agent_id: str
    bound_at: datetime
    expires_at: datetime | None
    bind_count: int
    data: Any
    backend: str


def encode(agent_id: str, bound_at: str, data: Any) -> str:
    """The JSON to store, without its bind_count and closing brace. Raises ValueError if `data` does not serialise."""
    head = json.dumps({"agent_id": agent_id, "bound_at": bound_at})[:-1]
    if data is None:
        return head
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"data cannot be stored as JSON: {error}") from None
    if len(text) > MAX_DATA_BYTES:
        raise refuse("data", f"{len(text)} bytes of JSON", f"at most {MAX_DATA_BYTES} bytes of JSON")
    return f'{head}, "data": {text}'


def decode(session_id: str, raw: bytes | str, ttl_ms: int, now: datetime) -> SessionBinding:
    """The binding of a record in Redis that has `ttl_ms` (as PTTL says) left. Raises BackendError for what is none."""
    try:
        record = json.loads(raw)
        agent_id = record["agent_id"]
        bind_count = int(record.get("bind_count") or 1)
        if not isinstance(agent_id, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise BackendError(f"the record of session {session_id!r} is not a JSON object with an agent_id") from None
    return SessionBinding(
        session_id,
        agent_id,
        _instant(record),
        now + timedelta(milliseconds=ttl_ms) if ttl_ms >= 0 else None,
        bind_count,
        record.get("data"),
        "redis",
    )


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
    return datetime.fromtimestamp(0, timezone.utc)
