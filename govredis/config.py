"""Config: every setting, its unit, its default and its environment variable, in one table.

A bad value is a ConfigurationError that names the variable, what it held and what it may hold. Nothing here, a repr
included, shows a password.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

from . import _parsers, _redis_urls
from ._parsers import BadValue
from ._redact import redact, shown_dsn
from ._redis_urls import RedisAddress, Sentinels
from .errors import ConfigurationError

__all__ = ["Config"]

log: logging.Logger = logging.getLogger("govredis")

#: How our own variables begin, and how those that other software has too.
_OURS, _SHARED = "GOVREDIS_", "REDIS_"
#: Kubernetes puts such variables into the environment for a service whose name begins with "govredis" or "redis".
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")
#: Settings that redis_url may have as parameters, by redis-py's names.
_TIMEOUTS_IN_URL = {"socket_timeout": "socket_timeout", "connect_timeout": "socket_connect_timeout"}
#: Seconds; RedisClient.run_confirmed says how long it waits.
_CONFIRMED_WITHIN = 0.15
#: Names of variables that a warning has named: once in a process is enough.
_warned: set[str] = set()


def _setting(default: Any, variable: str, parse: Callable[[Any], Any]) -> Any:
    return field(default=default, metadata={"variable": variable, "parse": parse})


def _secret(variable: str) -> Any:
    return field(default=None, repr=False, metadata={"variable": variable, "parse": _parsers.secret})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one GovRedis. Durations are seconds.

    Each field but credential_provider has an environment variable, which `from_env` reads: docs/configuration.md lists
    them. Raises ConfigurationError on a bad value, before anything is connected.
    """

    redis_url: str = _setting("redis://localhost:6379/0", "REDIS_URL", _parsers.redis_url)
    #: False: never connect; every feature runs on its fallback, and health says "disabled".
    redis_enabled: bool = _setting(True, "REDIS_ENABLED", _parsers.flag)
    #: redis-py asks this object for user and password at each connect to redis_url: for tokens that expire, such as
    #: IAM's. In code only: a variable cannot hold an object.
    credential_provider: Any = field(
        default=None, repr=False, metadata={"variable": None, "parse": _parsers.credential_provider}
    )
    #: The Redis in which tasks wait that Celery's rate_limited refuses. It must lose no data, like the broker's. None:
    #: redis_url.
    parking_url: str | None = _setting(None, "GOVREDIS_PARKING_URL", _parsers.redis_url_or_none)
    #: None: no PostgreSQL. Never read from the app's own DATABASE_URL.
    database_url: str | None = _setting(None, "GOVREDIS_DATABASE_URL", _parsers.database_url)
    #: The schema of our tables and functions in that database; `govredis migrate` makes it.
    schema: str = _setting("public", "GOVREDIS_SCHEMA", _parsers.schema)
    #: The beginning of every key, and a part of every lock file's name and every row's key.
    key_prefix: str = _setting("", "GOVREDIS_KEY_PREFIX", _parsers.prefix)

    session_ttl: float = _setting(3600.0, "REDIS_SESSION_TTL", _parsers.seconds)
    #: Keep a SHA-256 of each session id, in keys, index and rows, instead of the id.
    session_hash_ids: bool = _setting(False, "GOVREDIS_SESSION_HASH_IDS", _parsers.flag)
    metadata_ttl: float = _setting(300.0, "REDIS_METADATA_TTL", _parsers.seconds)
    lock_ttl: float = _setting(30.0, "REDIS_LOCK_TIMEOUT", _parsers.seconds)
    #: With PostgreSQL: how old a cached value may be at most, whatever failed.
    metadata_staleness: float = _setting(5.0, "GOVREDIS_METADATA_STALENESS", _parsers.seconds)

    #: When Redis is away: "file" = flock, one holder per host, degraded; "fail" = LockUnavailable.
    lock_fallback: str = _setting("file", "GOVREDIS_LOCK_FALLBACK", _parsers.one_of("file", "fail"))
    #: When Redis and PostgreSQL are away: an in-process window, or refuse all, or let all through.
    limit_fallback: str = _setting("local", "GOVREDIS_LIMIT_FALLBACK", _parsers.one_of("local", "deny", "allow"))
    #: A denial is remembered in the process, for a second at most, and answers the same call again.
    limit_deny_cache: bool = _setting(True, "GOVREDIS_LIMIT_DENY_CACHE", _parsers.flag)
    #: Seconds between two replications, by each process, of admissions from Redis to PostgreSQL and back. None: never.
    limit_mirror: float | None = _setting(None, "GOVREDIS_LIMIT_MIRROR", _parsers.seconds_or_none)
    #: Locks are granted, and sessions revoked, once a replica has it too: a failover to that replica keeps them.
    confirm: bool = _setting(False, "GOVREDIS_CONFIRM", _parsers.flag)
    #: Folder of the lock files; all processes that share a lock on a host must share it. None: /tmp/govredis-locks-UID.
    lock_folder: str | None = _setting(None, "GOVREDIS_LOCK_FOLDER", _parsers.folder)

    #: For one read from Redis or one write. `socket_timeout` and `socket_connect_timeout` in redis_url say the same.
    socket_timeout: float = _setting(0.2, "GOVREDIS_SOCKET_TIMEOUT", _parsers.seconds)
    connect_timeout: float = _setting(0.1, "GOVREDIS_CONNECT_TIMEOUT", _parsers.seconds)
    #: For one call of PostgreSQL, connecting included.
    postgres_timeout: float = _setting(2.0, "GOVREDIS_POSTGRES_TIMEOUT", _parsers.seconds)
    #: Connections of one process, at most; a caller beyond that waits for one, up to its timeout.
    redis_connections: int = _setting(128, "GOVREDIS_REDIS_CONNECTIONS", _parsers.count)
    postgres_connections: int = _setting(10, "GOVREDIS_POSTGRES_CONNECTIONS", _parsers.count)
    #: A larger value, as JSON, is not cached.
    metadata_max_bytes: int = _setting(1_000_000, "GOVREDIS_METADATA_MAX_BYTES", _parsers.count)
    #: Events that a stream keeps, about: the oldest are trimmed.
    events_kept: int = _setting(100_000, "GOVREDIS_EVENTS_KEPT", _parsers.count)
    #: True: cached metadata is kept in the process too, coherently. Our user of Redis needs CLIENT TRACKING.
    local_cache: bool = _setting(False, "GOVREDIS_LOCAL_CACHE", _parsers.flag)
    #: Entries of each memory backend, and of the remembered denials, at most.
    local_entries: int = _setting(10_000, "GOVREDIS_LOCAL_ENTRIES", _parsers.count)

    #: The Sentinels, as host[:port],host[:port]. REDIS_URL then gives user, password, database and parameters of the
    #: server that they name; its host is not used. None: REDIS_URL alone says where Redis is.
    sentinel_hosts: str | None = _setting(None, "REDIS_SENTINEL_HOSTS", _parsers.sentinel_hosts)
    #: The service that the Sentinels watch. None: the URL's, or else mymaster.
    sentinel_master: str | None = _setting(None, "REDIS_SENTINEL_MASTER", _parsers.text_or_none)
    #: The Sentinels' own: theirs need not be the data servers'.
    sentinel_username: str | None = _setting(None, "REDIS_SENTINEL_USERNAME", _parsers.text_or_none)
    sentinel_password: str | None = _secret("REDIS_SENTINEL_PASSWORD")
    #: None: as the data servers have it.
    sentinel_tls: bool | None = _setting(None, "REDIS_SENTINEL_TLS", _parsers.flag_or_none)

    #: True: REDIS_URL names a node of a Redis Cluster, which tells the others. redis+cluster://... says so, too.
    cluster: bool = _setting(False, "REDIS_CLUSTER", _parsers.flag)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _parse(f, getattr(self, f.name), f.name))
        if self.credential_provider is not None and "@" in urlsplit(self.redis_url).netloc:
            raise ConfigurationError("redis_url has a user or a password; with a credential_provider it must have none")
        if self.limit_mirror is not None and self.database_url is None:
            raise ConfigurationError(
                f"GOVREDIS_LIMIT_MIRROR is {self.limit_mirror:g};"
                " it must be left unset where GOVREDIS_DATABASE_URL is not set"
            )
        self._check_sentinels()
        self._check_cluster()
        self._compare_timeouts()
        self._check_confirm()

    def _check_sentinels(self) -> None:
        """Refuse settings of Sentinels that nothing would read, or that the URL contradicts."""
        in_url = _address_in(self.redis_url).sentinels
        names = {f.name: f.metadata["variable"] for f in fields(self)}
        if self.sentinel_hosts is not None and (in_url is not None or self.redis_url.startswith("unix:")):
            other = "names Sentinels" if in_url is not None else "is a unix socket"
            raise ConfigurationError(
                f"{names['redis_url']} {other}; {names['sentinel_hosts']} must be left unset beside it"
            )
        of_url = {"master": "service", "username": "username", "password": "password"}
        for name in ("master", "username", "password", "tls"):
            held, variable = getattr(self, f"sentinel_{name}"), names[f"sentinel_{name}"]
            if held is None:
                continue
            if self.sentinel_hosts is None and in_url is None:
                raise ConfigurationError(f"{variable} is set; it must be left unset where no Sentinels are named")
            told = getattr(in_url, of_url.get(name, "tls"), None)
            if told not in (None, held):
                raise ConfigurationError(
                    f"{variable} and {names['redis_url']} differ; they must be the same, or one of them left out"
                )

    def _check_cluster(self) -> None:
        """Refuse settings that a Cluster contradicts."""
        found = _address_in(self.redis_url)
        if not (self.cluster or found.nodes):
            return
        names = {f.name: f.metadata["variable"] for f in fields(self)}
        says = f"{names['cluster']} is 1" if self.cluster else f"{names['redis_url']} names nodes of a Cluster"
        if found.sentinels is not None or self.sentinel_hosts is not None:
            raise ConfigurationError(f"{says}; Sentinels must be left out beside a Cluster")
        if self.redis_url.startswith("unix:"):
            raise ConfigurationError(f"{says}; {names['redis_url']} must not be a unix socket")
        if urlsplit(found.url).path not in {"", "/", "/0"} or parse_qs(urlsplit(found.url).query).get("db", ["0"]) != [
            "0"
        ]:
            raise ConfigurationError(f"{says}; the database in {names['redis_url']} must be 0: a Cluster has no other")

    def _compare_timeouts(self) -> None:
        """Refuse a timeout that differs between a URL and the setting: it would hold for only one of the two."""
        settings = {f.name: f for f in fields(self)}
        for where in ("redis_url", "parking_url"):
            told = parse_qs(urlsplit(getattr(self, where) or "").query)
            for name, parameter in _TIMEOUTS_IN_URL.items():
                if parameter not in told:
                    continue
                f, what = settings[name], f"{parameter} in {settings[where].metadata['variable']}"
                in_url, held = _parse(f, told[parameter][-1], what), getattr(self, name)
                if held not in (f.default, in_url):
                    raise ConfigurationError(
                        f"{what} is {in_url:g} and {f.metadata['variable']} is {held:g};"
                        " they must be the same, or one of them left out"
                    )

    def _check_confirm(self) -> None:
        """Refuse a timeout in which Redis may not have said yet that no replica has confirmed anything."""
        names = {f.name: f.metadata["variable"] for f in fields(self)}
        told = parse_qs(urlsplit(self.redis_url).query).get("socket_timeout")
        timeout = float(told[-1]) if told else self.socket_timeout
        if self.confirm and timeout < _CONFIRMED_WITHIN:
            raise ConfigurationError(
                f"{names['socket_timeout']} is {timeout:g} and {names['confirm']} is 1;"
                f" the timeout must be {_CONFIRMED_WITHIN:g} at least, as Redis looks for replicas ten times a second"
            )

    @classmethod
    def from_env(cls) -> Config:
        """The settings of this process's environment. Raises ConfigurationError naming the variable.

        A variable that begins with GOVREDIS_ and whose name is nearly a setting's is refused, with the right name. A
        warning, once a process, names others that begin so, and those that are nearly one of our REDIS_* (other
        software has such names too). Variables that Kubernetes makes for a service called "govredis..." or "redis..."
        are ignored.
        """
        return cls.from_mapping(os.environ)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Config:
        """The settings of a mapping whose keys are the variables' names (os.environ).

        Values may be strings, with blanks around them, or already typed. The default stands for an absent or empty
        value. Other names are treated as `from_env` does. Raises ConfigurationError naming the variable.
        """
        return cls(**_read(mapping))

    @classmethod
    def from_app(
        cls, settings: Mapping[str, Any], names: Mapping[str, str], also: Collection[str] = ()
    ) -> Config | None:
        """The environment's settings, overridden by an application's own configuration.

        Args:
            settings: the application's configuration. A setting that is None there stays as the environment has it; an
                empty or blank value is the default.
            names: the names of the settings there, by the names of our fields.
            also: names there that are ours, but no settings of Config.

        Returns None where the application has no setting of Config. Raises ConfigurationError as `from_mapping`, and
        for any other name that begins as ours do.
        """
        _check_names(settings, names, also)
        values: dict[str, Any] = {}
        for f in fields(cls):
            held = _held(settings, name := names.get(f.name))
            if held is not None:
                values[f.name] = f.default if held == "" else _parse(f, held, name)
        return cls(**_read(os.environ) | values) if values else None

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.repr:
                value = f.default if value is None else Ellipsis
            if f.default is MISSING or value != f.default:
                shown.append(f"{f.name}={_redacted(f, value) if isinstance(value, str) else value!r}")
        return f"Config({', '.join(shown)})"


def _address_in(redis_url: str) -> RedisAddress:
    found = _redis_urls.parse(redis_url)
    assert found is not None  # the setting's parser took it
    return found


def address_of(config: Config) -> RedisAddress:
    """Where Redis is: the URL that redis-py takes, and the Sentinels or nodes that name its host, if any."""
    found = _address_in(config.redis_url)
    if config.cluster and not found.nodes:
        parts = urlsplit(found.url)
        return found._replace(nodes=((parts.hostname or "localhost", parts.port or _redis_urls.PORT),))
    named = found.sentinels
    hosts = config.sentinel_hosts and _redis_urls.hosts_of(config.sentinel_hosts, _redis_urls.SENTINEL_PORT)
    if hosts:
        named = Sentinels(hosts, _redis_urls.SERVICE)
    if named is None:
        return found
    held: dict[str, Any] = {
        "service": config.sentinel_master,
        "username": config.sentinel_username,
        "password": config.sentinel_password,
        "tls": config.sentinel_tls,
    }
    told = {name: value for name, value in held.items() if value is not None}
    return found._replace(sentinels=named._replace(**told))


def config_at(config: Config, redis_url: str) -> Config:
    """The same settings for another Redis, which has not the credentials, Sentinels or Cluster of this one."""
    sentinels: dict[str, Any] = {f.name: None for f in fields(config) if f.name.startswith("sentinel_")}
    return replace(config, redis_url=redis_url, credential_provider=None, cluster=False, **sentinels)


def variables() -> dict[str, str]:
    """The names of the variables, by the names of our fields. Fields that only code can give are left out."""
    return {f.name: f.metadata["variable"] for f in fields(Config) if f.metadata["variable"] is not None}


def _read(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a mapping holds under the variables' names, by the names of our fields."""
    _check_names(mapping, names := variables())
    _warn_of_near_names(mapping)
    values = {}
    for f in fields(Config):
        held = _held(mapping, name := names.get(f.name))
        if held is not None and held != "":
            values[f.name] = _parse(f, held, name)
    return values


def _check_names(held: Iterable[str], names: Mapping[str, str], also: Collection[str] | None = None) -> None:
    """Refuse a name that is nearly a setting's: its value would be ignored in silence.

    Args:
        held: the names that are there.
        names: the names of the settings, by the names of our fields.
        also: further names of ours in an application's configuration, where no other name may begin as ours do. None:
            the names are the environment's, where others may.
    """
    prefix = names["key_prefix"][: len(_OURS)]
    known = {*names.values(), *(also or ())}
    strangers = [name for name in held if name.startswith(prefix) and name not in known]
    if not strangers:
        return
    meant = {name.removeprefix(prefix).lower(): name for name in known}
    for field_name, variable in variables().items():
        for written in (variable, variable.removeprefix("REDIS_"), variable.removeprefix(_OURS), field_name):
            meant[written.lower()] = names[field_name]
    for name in strangers:
        if _SERVICE_LINK.search(name):
            continue
        near = difflib.get_close_matches(name.removeprefix(prefix).lower(), meant, n=1, cutoff=0.75)
        if near:
            raise ConfigurationError(f"{name} is no setting; the name must be {meant[near[0]]}")
        if also is not None:
            raise ConfigurationError(f"{name} is no setting; these are: {', '.join(sorted(known))}")
        _warn_once(name, "it is ignored")


def _warn_of_near_names(held: Iterable[str]) -> None:
    """Name variables that are nearly one of our REDIS_*: they may be a mistake, or other software's."""
    ours = {name.removeprefix(_SHARED): name for name in variables().values() if name.startswith(_SHARED)}
    for name in held:
        written = name.removeprefix(_SHARED)
        if not name.startswith(_SHARED) or written in ours or _SERVICE_LINK.search(name):
            continue
        near = difflib.get_close_matches(written, ours, n=1, cutoff=0.85)
        if near:
            _warn_once(name, f"it is ignored; is {ours[near[0]]} meant?")


def _warn_once(name: str, what_of_it: str) -> None:
    if name not in _warned:
        _warned.add(name)
        log.warning("%s is no setting that this govredis reads from the environment: %s", name, what_of_it)


def _held(mapping: Mapping[str, Any], name: str | None) -> Any:
    """The value of that name; "" for a blank value, None for an absent one."""
    held = None if name is None else mapping.get(name)
    return held.strip() if isinstance(held, str) else held  # a secret that was read from a file ends with a newline


def _redacted(f: Field[Any], held: str) -> str:
    return shown_dsn(held) if f.name.endswith("_url") else redact(held)


def _parse(f: Field[Any], held: Any, name: str | None) -> Any:
    try:
        return f.metadata["parse"](held)
    except BadValue as wanted:
        shown = repr(_redacted(f, held)) if isinstance(held, str) else redact(repr(held))
        if f.metadata["parse"] is _parsers.secret:
            shown = "***"
        raise ConfigurationError(f"{name} is {shown}; it must be {wanted}") from None
