"""Config: every setting, its unit, its default and its environment variable, in one table.

A bad value is a ConfigurationError that names the variable, what it held and what it may hold. Nothing here, a repr
included, shows a password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any
from urllib.parse import SplitResult, urlsplit

from . import keys
from .errors import ConfigurationError

__all__ = ["Config"]

# user:PASSWORD@host; PASSWORD@host, where the colon was forgotten; user:PASSWORD, where the host was.
_PASSWORD_IN_URL = re.compile(r"(//[^:@]*:).*(@)|(//)[^:@/?#]*(@)|(//[^:@/?#\[]*:)(?!\d*(?:[/?#]|$)).*$", re.DOTALL)
# The same of what is no URL at all, for want of its //.
_PASSWORD_WITHOUT_SCHEME = re.compile(r"(?:\A|(?<=\s))([^\s:/@]+:)(?!//|\s).*(@)", re.DOTALL)
_PASSWORD_BY_NAME = re.compile(r"""(pass\w*['"]?\s*[=:]\s*)('(?:[^'\\]|\\.)*'|[^&\s'"]*)""", re.IGNORECASE | re.DOTALL)


def redact(text: str) -> str:
    """`text` with every password of a URL or of a libpq string replaced by ***."""
    shown = _PASSWORD_IN_URL.sub(lambda m: f"{m[1] or m[3] or m[5]}***{m[2] or m[4] or ''}", text)
    shown = _PASSWORD_WITHOUT_SCHEME.sub(r"\1***\2", shown)
    return _PASSWORD_BY_NAME.sub(r"\1***", shown)


class _Bad(Exception):
    """What a setting must be; the caller knows its name and what it held."""


def _seconds(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not 0.001 <= number < 1e9:
        raise _Bad("a number of seconds, at least 0.001 and less than 1e9")
    return number


def _seconds_or_none(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return _seconds(value)
    except _Bad as wanted:
        raise _Bad(f"{wanted}, or left unset") from None


def _count(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if isinstance(value, bool) or number < 1 or (isinstance(value, float) and value != number):
        raise _Bad("a whole number of at least 1")
    return number


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise _Bad("1 or 0 (also true/false, yes/no, on/off)")


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise _Bad("one of " + ", ".join(choices))
        return str(value)

    return parse


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none. What urlsplit raises may quote a password: it ends here."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError when it is no port
        (parts.hostname or "").encode("idna")  # and this when it is no host
    except ValueError:
        return None
    # Of an unescaped @ in a password, what follows it would pass for the host, and be shown.
    return parts if parts.netloc.count("@") <= 1 else None


def _redis_url(value: Any) -> str:
    wanted = (
        "redis://[user:password@]host[:port][/db], rediss://... or unix:///path/to/socket[?db=0],"
        " with @ : / ? # in a password written as %40 %3A %2F %3F %23"
    )
    if not isinstance(value, str):
        raise _Bad(wanted)
    parts = _split(value)
    if parts is None:
        raise _Bad(wanted)
    if parts.scheme == "unix":
        if not parts.path:
            raise _Bad(wanted)
    elif parts.scheme not in {"redis", "rediss"} or not parts.hostname or not re.fullmatch(r"(/\d*)?", parts.path):
        raise _Bad(wanted)
    return value


def _redis_url_or_none(value: Any) -> str | None:
    return None if value is None or value == "" else _redis_url(value)


def _database_url(value: Any) -> str | None:
    if value is None or value == "":
        return None
    wanted = (
        "postgresql://[user[:password]@][host][:port]/database,"
        " with @ : / ? # in a password written as %40 %3A %2F %3F %23"
    )
    if not isinstance(value, str):
        raise _Bad(wanted)
    parts = _split(value)
    if parts is None or parts.scheme not in {"postgresql", "postgres"} or not parts.netloc + parts.path.strip("/"):
        raise _Bad(wanted)
    return value


def _prefix(value: Any) -> str:
    if value == "":
        return ""
    try:
        return keys.check_id(value, "prefix")
    except ValueError:
        raise _Bad("a str without '{', '}' or control characters") from None


def _folder(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str | os.PathLike) or not os.path.isabs(value):
        raise _Bad("an absolute path")
    return os.fspath(value)


def _text_or_none(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _Bad("a str")
    return value


def _not_yet(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        parsed = parse(value)
        if parsed:
            raise _Bad("left unset: this version of govredis connects to a standalone Redis only")
        return parsed

    return refuse


def _setting(default: Any, variable: str, parse: Callable[[Any], Any], secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"variable": variable, "parse": parse})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one GovRedis. Durations are seconds.

    Each field has an environment variable, read by `from_env`; its name is in the field's line below. Raises
    ConfigurationError on a bad value, before anything is connected.
    """

    redis_url: str = _setting("redis://localhost:6379/0", "REDIS_URL", _redis_url)
    #: False: never connect; every feature runs on its fallback, and health says "disabled".
    redis_enabled: bool = _setting(True, "REDIS_ENABLED", _flag)
    #: Where what Celery's rate_limited refuses waits: a Redis that loses no data, as the broker's. None: redis_url.
    parking_url: str | None = _setting(None, "GOVREDIS_PARKING_URL", _redis_url_or_none)
    #: None: no PostgreSQL. Never read from the app's own DATABASE_URL.
    database_url: str | None = _setting(None, "GOVREDIS_DATABASE_URL", _database_url)
    #: Put before every key, and into every lock file's name and row's key.
    key_prefix: str = _setting("", "GOVREDIS_KEY_PREFIX", _prefix)

    session_ttl: float = _setting(3600.0, "REDIS_SESSION_TTL", _seconds)
    #: Keep a SHA-256 of each session id, in keys, index and rows, instead of the id.
    session_hash_ids: bool = _setting(False, "GOVREDIS_SESSION_HASH_IDS", _flag)
    metadata_ttl: float = _setting(300.0, "REDIS_METADATA_TTL", _seconds)
    lock_ttl: float = _setting(30.0, "REDIS_LOCK_TIMEOUT", _seconds)
    #: With PostgreSQL: how old a cached value may be at most, whatever failed.
    metadata_staleness: float = _setting(5.0, "GOVREDIS_METADATA_STALENESS", _seconds)

    #: When Redis is away: "file" = flock, one holder per host, degraded; "fail" = LockUnavailable.
    lock_fallback: str = _setting("file", "GOVREDIS_LOCK_FALLBACK", _one_of("file", "fail"))
    #: When Redis and PostgreSQL are away: an in-process window, or refuse all, or let all through.
    limit_fallback: str = _setting("local", "GOVREDIS_LIMIT_FALLBACK", _one_of("local", "deny", "allow"))
    #: A denial is remembered in the process, for a second at most, and answers the same call again.
    limit_deny_cache: bool = _setting(True, "GOVREDIS_LIMIT_DENY_CACHE", _flag)
    #: How often each process tells PostgreSQL what Redis admitted, and the other way round. None: never.
    limit_mirror: float | None = _setting(None, "GOVREDIS_LIMIT_MIRROR", _seconds_or_none)
    #: Folder of the lock files; all processes that share a lock on a host must share it. None: /tmp/govredis-locks-UID.
    lock_folder: str | None = _setting(None, "GOVREDIS_LOCK_FOLDER", _folder)

    #: One read from, or write to, Redis.
    socket_timeout: float = _setting(0.2, "GOVREDIS_SOCKET_TIMEOUT", _seconds)
    connect_timeout: float = _setting(0.1, "GOVREDIS_CONNECT_TIMEOUT", _seconds)
    #: One PostgreSQL call, connecting included.
    postgres_timeout: float = _setting(2.0, "GOVREDIS_POSTGRES_TIMEOUT", _seconds)
    #: Connections of one process, at most; a caller beyond that waits for one, up to its timeout.
    redis_connections: int = _setting(128, "GOVREDIS_REDIS_CONNECTIONS", _count)
    postgres_connections: int = _setting(10, "GOVREDIS_POSTGRES_CONNECTIONS", _count)
    #: A larger value, as JSON, is not cached.
    metadata_max_bytes: int = _setting(1_000_000, "GOVREDIS_METADATA_MAX_BYTES", _count)
    #: True: cached metadata is kept in the process too, coherently (needs CLIENT TRACKING, allowed to our user).
    local_cache: bool = _setting(False, "GOVREDIS_LOCAL_CACHE", _flag)
    #: Entries of each in-process store, and of the remembered denials, at most.
    local_entries: int = _setting(10_000, "GOVREDIS_LOCAL_ENTRIES", _count)

    # Read so that an async service's environment is understood; a value is refused until the client has them.
    sentinel_hosts: str | None = _setting(None, "REDIS_SENTINEL_HOSTS", _not_yet(_text_or_none))
    sentinel_master: str | None = _setting(None, "REDIS_SENTINEL_MASTER", _not_yet(_text_or_none))
    cluster: bool = _setting(False, "REDIS_CLUSTER", _not_yet(_flag))

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _parse(f, getattr(self, f.name), f.name))

    @classmethod
    def from_env(cls) -> Config:
        """The settings of this process's environment. Raises ConfigurationError naming the variable."""
        return cls.from_mapping(os.environ)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Config:
        """The settings of a mapping whose keys are the variables' names (os.environ).

        Values may be strings or already typed; a name that is not a setting is ignored; an absent or empty one is the
        default. Raises ConfigurationError naming the variable.
        """
        values = {}
        for f in fields(cls):
            variable = f.metadata["variable"]
            held = mapping.get(variable)
            if held is not None and held != "":
                values[f.name] = _parse(f, held, variable)
        return cls(**values)

    @classmethod
    def from_app(cls, settings: Mapping[str, Any], prefix: str) -> Config:
        """The environment's settings, with those of an application's own configuration put over them.

        An application names a setting by its field: `prefix` + "redis_url"; in capitals if the prefix is. Raises
        ConfigurationError as `from_mapping`.
        """
        values = {}
        for f in fields(cls):
            name = prefix + (f.name.upper() if prefix.isupper() else f.name)
            if settings.get(name) is not None:
                values[f.name] = _parse(f, settings[name], name)
        return replace(cls.from_env(), **values)

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is MISSING or value != f.default:
                shown.append(f"{f.name}={redact(value) if isinstance(value, str) else value!r}")
        return f"Config({', '.join(shown)})"


def _parse(f: Field[Any], held: Any, name: str) -> Any:
    try:
        return f.metadata["parse"](held)
    except _Bad as wanted:
        shown = repr(redact(held)) if isinstance(held, str) else redact(repr(held))
        raise ConfigurationError(f"{name} is {shown}; it must be {wanted}") from None
