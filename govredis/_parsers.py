"""Parsers of settings: a value in code, or a text of the environment, is made what the setting holds, or refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from . import _dsn, _redis_urls, keys
from .errors import SHORTEST, TOO_LONG


class BadValue(Exception):
    """Its text says how a value must be; the caller knows the setting's name, and the value that it has."""


def seconds(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not SHORTEST <= number < TOO_LONG:
        raise BadValue(f"a number of seconds, at least {SHORTEST} and less than 1e9")
    return number


def seconds_or_none(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return seconds(value)
    except BadValue as wanted:
        raise BadValue(f"{wanted}, or left unset") from None


def count(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if isinstance(value, bool) or number < 1 or (isinstance(value, float) and value != number):
        raise BadValue("a whole number of at least 1")
    return number


def flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise BadValue("1 or 0 (also true/false, yes/no, on/off)")


def one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise BadValue("one of " + ", ".join(choices))
        return str(value)

    return parse


def redis_url(value: Any) -> str:
    found = _redis_urls.parse(value) if isinstance(value, str) else None
    if found is None:
        raise BadValue(_redis_urls.WANTED)
    scheme, _, rest = value.partition(":")
    return f"{scheme.lower()}:{rest}"  # redis-py knows it in small letters only


def redis_url_or_none(value: Any) -> str | None:
    return None if value is None or value == "" else redis_url(value)


def database_url(value: Any) -> str | None:
    if value is None or value == "":
        return None
    wanted = (
        "postgresql://[user[:password]@][host][:port][,host[:port]...]/database, with @ : / ? # in a password written"
        " as %40 %3A %2F %3F %23, or libpq's other form: host=... dbname=... or service=..."
    )
    if not isinstance(value, str) or not (_dsn.is_url(value) or _dsn.is_pairs(value)) or _dsn.seems_mangled(value):
        raise BadValue(wanted)
    if "\0" in value or value != value.encode(errors="replace").decode():  # an environment may hold any bytes
        raise BadValue(wanted)
    if not _dsn.is_url(value):
        return value
    scheme, _, rest = value.partition("://")
    if not rest.strip("/?"):
        raise BadValue(wanted)
    return f"{scheme.lower()}://{rest}"  # libpq knows no capitals


def prefix(value: Any) -> str:
    if not keys.is_prefix(value):
        raise BadValue(
            "a str of at most 512 bytes of UTF-8, without '{', '}' or control characters, and without a kind of our"
            " keys for a word (session:, lock:, ...)"
        )
    return str(value)


# Without characters that would end a quoted name, a string or the body of a function.
_SCHEMA = re.compile(r"(?!pg_)[A-Za-z_][A-Za-z0-9_-]{0,62}")


def schema(value: Any) -> str:
    if not isinstance(value, str) or not _SCHEMA.fullmatch(value):
        raise BadValue(
            "at most 63 letters of ASCII, digits, '_' and '-', neither beginning with a digit or '-', nor with 'pg_'"
        )
    return value


def folder(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str | os.PathLike) or not os.path.isabs(value):
        raise BadValue("an absolute path")
    return os.fspath(value)


def text_or_none(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise BadValue("a str")
    return value


def secret(value: Any) -> str | None:
    return text_or_none(value)


def credential_provider(value: Any) -> Any:
    if value is not None and not callable(getattr(value, "get_credentials", None)):
        raise BadValue("an object with a method get_credentials(), as redis-py's CredentialProvider has it, or None")
    return value


def sentinel_hosts(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or _redis_urls.hosts_of(value, _redis_urls.SENTINEL_PORT) is None:
        raise BadValue("host[:port][,host[:port]...], the addresses of Sentinels")
    return value


def flag_or_none(value: Any) -> bool | None:
    return None if value is None or value == "" else flag(value)
