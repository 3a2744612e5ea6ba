"""A cached value's form in Redis: plain JSON with one reserved member, so that the async service can read it.

The member comes last: when the value was stored ("at"), for how many seconds it is good from then, how many its load
took, the generation of its namespace, the epoch of the guard under which it was loaded, and the version of the write
which made it what it is; each where it is known. invalidate.lua looks for the version at the end.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

MEMBER = "__govredis__"


class Versioned(dict[str, Any]):
    """A value of which the member `version` is its own row's, and of the sequence govredis_versions."""


class Record(NamedTuple):
    """A value as it was found in Redis. None: it is known that there is none."""

    value: Any
    epoch: int | None
    generation: str
    #: When its TTL is over, on the clock of who stored it; None: only Redis knows.
    ends_at: float | None
    #: Seconds that it took to load.
    cost: float


def version_of(value: Any) -> str:
    """The version for a script's argument, "" where there is none.

    Only what AgentStore read has one: a member that happens to be called so may count anything.
    """
    return str(value["version"]) if isinstance(value, Versioned) else ""


def check(value: Any) -> str:
    """Its JSON. Raises ValueError for what is None, does not serialise, or uses the reserved member."""
    if value is None:
        raise ValueError("value is None, which stands for a miss; it must be anything else that JSON can hold")
    if isinstance(value, dict) and MEMBER in value:
        raise ValueError(f"value has a member {MEMBER!r}, which is reserved")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"value cannot be stored as JSON: {error}") from None


def encode(
    value: Any, epoch: int | None = None, *, ttl: float | None = None, cost: float = 0.0, generation: str = ""
) -> str:
    """The JSON to store; of None, that there is no value. Raises ValueError as `check`, except for None."""
    text = "null" if value is None else check(value)
    ours = f'"at": {time.time():.6f}'
    if ttl is not None:
        ours += f', "ttl": {ttl:.3f}'
    if cost:
        ours += f', "cost": {cost:.6f}'
    if generation:
        ours += f', "generation": "{generation}"'
    if epoch is not None:
        ours += f', "epoch": {epoch}'
    if isinstance(value, Versioned):
        ours += f', "version": {value["version"]}'
    if not isinstance(value, dict):
        # govredis 0.2 takes a bare null for a miss.
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
    get = ours.get
    at, ttl = get("at"), get("ttl")
    ends_at = at + ttl if isinstance(at, float) and isinstance(ttl, float) else None
    value = record.get("value") if get("bare") else record
    if value is None and ends_at is None:
        return None
    return Record(value, get("epoch"), get("generation", ""), ends_at, get("cost", 0.0))
