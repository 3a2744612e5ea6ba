"""A cached value's form in Redis: plain JSON with one reserved member, so that the async service can read it."""

from __future__ import annotations

import json
import time
from typing import Any

MEMBER = "__govredis__"


def encode(value: Any) -> str:
    """The JSON to store. Raises ValueError for what is None, does not serialise, or uses the reserved member."""
    if value is None:
        raise ValueError("value is None, which stands for a miss; it must be anything else that JSON can hold")
    if isinstance(value, dict) and MEMBER in value:
        raise ValueError(f"value has a member {MEMBER!r}, which is reserved")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"value cannot be stored as JSON: {error}") from None
    if not isinstance(value, dict):
        return f'{{"value": {text}, "{MEMBER}": {{"at": {time.time():.6f}, "bare": true}}}}'
    member = f'"{MEMBER}": {{"at": {time.time():.6f}}}'
    return f"{text[:-1]}, {member}}}" if value else f"{{{member}}}"


def decode(raw: bytes | str) -> Any | None:
    """The value of a stored record; None for one that is foreign: not JSON, or without the reserved member."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    ours = record.pop(MEMBER, None) if isinstance(record, dict) else None
    if not isinstance(ours, dict):
        return None
    return record.get("value") if ours.get("bare") else record
