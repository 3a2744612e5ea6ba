"""A cached value's form in Redis: plain JSON with one reserved member, so that the async service can read it.

The member comes last: its epoch is that of the guard under which the value was loaded, its version that of the write
which made the value what it is, where that is known. invalidate.lua looks for it there.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

MEMBER = "__govredis__"


class Versioned(dict[str, Any]):
    """A value of which the member `version` is its own row's, and of the sequence govredis_versions."""


class Record(NamedTuple):
    """A value as it was found in Redis."""

    value: Any
    epoch: int | None


def version_of(value: Any) -> str:
    """The version for a script's argument, "" where there is none.

    Only what AgentStore read has one: a member that happens to be called so may count anything.
    """
    return str(value["version"]) if isinstance(value, Versioned) else ""


def encode(value: Any, epoch: int | None = None) -> str:
    """The JSON to store. Raises ValueError for what is None, does not serialise, or uses the reserved member."""
    if value is None:
        raise ValueError("value is None, which stands for a miss; it must be anything else that JSON can hold")
    if isinstance(value, dict) and MEMBER in value:
        raise ValueError(f"value has a member {MEMBER!r}, which is reserved")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"value cannot be stored as JSON: {error}") from None
    ours = f'"at": {time.time():.6f}'
    if epoch is not None:
        ours += f', "epoch": {epoch}'
    if isinstance(value, Versioned):
        ours += f', "version": {value["version"]}'
    if not isinstance(value, dict):
        return f'{{"value": {text}, "{MEMBER}": {{{ours}, "bare": true}}}}'
    member = f'"{MEMBER}": {{{ours}}}'
    return f"{text[:-1]}, {member}}}" if value else f"{{{member}}}"


def decode(raw: bytes | str) -> Record | None:
    """What is stored; None for what is foreign: not JSON, or without the reserved member."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    ours = record.pop(MEMBER, None) if isinstance(record, dict) else None
    if not isinstance(ours, dict):
        return None
    value = record.get("value") if ours.get("bare") else record
    return None if value is None else Record(value, ours.get("epoch"))
