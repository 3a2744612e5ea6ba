"""A cached value in Redis: its plain JSON, as anybody else would write it, and beside it a stamp.

The stamp has six words, "-" for an unknown one:

1. the SHA-1 of the JSON; "-" says that there is known to be no value
2. the time at which its TTL is over
3. the seconds that its load took
4. the epoch of the freshness lease under which it was loaded
5. the generation of its namespace
6. the version of the write that made it

A value without a stamp, or with a stamp that has another SHA-1, was set by another client. No two values have the same
SHA-1 by chance. It protects nothing against clients that may write to Redis: they may write the stamp too. It is SHA-1
because Redis's scripts have no other hash, and compare values as well.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import time
import uuid
from collections.abc import Callable
from hashlib import sha1
from typing import Any, NamedTuple, NoReturn

from ..errors import refuse

#: The member that govredis 0.3 and older put into each value.
_OLD_MEMBER = "__govredis__"
#: Raised for text that is no JSON, or none for the object_hook. Not every Exception: a soft time limit's may strike.
_UNREADABLE = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
#: Seconds, since 1970 or for a load: no number of ours is so large.
_LONG = 1e11


class Versioned(dict[str, Any]):
    """A value whose member `version` is its row's, from the sequence govredis_versions."""


class MetadataEntry(NamedTuple):
    """A value as it was found in Redis. None: it is known that there is none."""

    value: Any
    epoch: int | None
    generation: str
    #: When its TTL is over, on the clock of who stored it; None: another client did, and only Redis knows.
    ends_at: float | None
    #: Seconds that it took to load.
    cost: float


def version_of(value: Any) -> str:
    """The version for a script's argument, "" where there is none.

    Only what AgentStore read has one: a member that happens to be called so may count anything.
    """
    return str(value["version"]) if isinstance(value, Versioned) else ""


def stamp(text: str, version: str, *, ttl: float, cost: float, epoch: int | None, generation: str) -> str:
    """The stamp of a value; `text`: its JSON, or "" where there is none."""
    digest = sha1(text.encode()).hexdigest() if text else "-"
    known = "-" if epoch is None else epoch
    return f"{digest} {time.time() + ttl:.3f} {cost:.6f} {known} {generation or '-'} {version or '-'}"


class Codec:
    """Values to JSON, and back.

    Args:
        default: of what JSON has no form for, something that it has; None: as `plain`.
        object_hook: replaces each object, a dict; None: the dict.
    """

    def __init__(
        self,
        default: Callable[[Any], Any] | None = None,
        object_hook: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self._encode = json.JSONEncoder(allow_nan=False, default=default or plain).encode
        decoder = json.JSONDecoder(object_hook=object_hook, parse_constant=_refuse)
        self._decode = decoder.decode
        self._decode_ours = decoder.raw_decode  # at half the price: there is no space around it, nor anything else
        self._has_hook = object_hook is not None

    def encode(self, value: Any) -> str:
        """The JSON of a value. Raises ValueError for None, for what has none, and for what could not be read back."""
        if value is None:
            raise ValueError("value is None, which stands for a miss; it must be anything else that JSON can hold")
        try:
            text = self._encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"value cannot be stored as JSON: {error}") from None
        if self._has_hook:  # what it raises, it raises now
            self._decode(text)
        return text

    def decode(self, text: str) -> Any:
        """A value from what `encode` made of it, as a hit gives it. Raises ValueError for a value that no hit could
        give."""
        try:
            return self._decode(text)
        except RecursionError:
            raise too_deep() from None

    def read(self, raw: bytes | None, about: bytes | None, foreign: bool) -> MetadataEntry | None:
        """The value found in Redis; None: there is none of ours, nor, where `foreign` may be used, of others."""
        known = None if about is None else _parsed(about)
        if raw is None:
            return MetadataEntry(None, *known[1:]) if known is not None and known[0] == "-" else None
        ours = known is not None and sha1(raw).hexdigest() == known[0]
        if not ours and not foreign:
            return None
        try:
            text = raw.decode()
            value = self._decode_ours(text)[0] if ours else self._decode(text)
        except _UNREADABLE:
            return None
        if known is not None and ours:
            return MetadataEntry(value, *known[1:])
        if value is None or (isinstance(value, dict) and isinstance(value.get(_OLD_MEMBER), dict)):
            return None
        return MetadataEntry(value, None, "", None, 0.0)


def check_functions(**functions: object) -> None:
    """Raises ValueError for a value that cannot be called, unless it is None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise refuse(name, function, "a function of one argument, or None")


def plain(value: Any) -> Any:
    """The form in JSON of what rows of PostgreSQL hold. Raises TypeError for other types.

    datetime, date and time: ISO 8601. Decimal and UUID: their str. bytes, bytearray, memoryview: base64.
    """
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} has no form in JSON; give the cache a `default` that makes one")


def too_deep() -> ValueError:
    return ValueError("value is nested too deep to be read back")


def _parsed(about: bytes) -> tuple[str, int | None, str, float, float] | None:
    """The SHA-1 of a stamp, and what a MetadataEntry has beside its value; None for what is no stamp of ours."""
    try:
        digest, end, took, known, generation, _ = about.decode().split(" ")
        ends_at, cost = float(end), float(took)
        if not (-_LONG < ends_at < _LONG and 0 <= cost < _LONG):
            return None
        return digest, None if known == "-" else int(known), "" if generation == "-" else generation, ends_at, cost
    except ValueError:
        return None


def _refuse(constant: str) -> NoReturn:
    # NaN and Infinity are Python's own, and equal nothing.
    raise ValueError(f"{constant} is no JSON")
