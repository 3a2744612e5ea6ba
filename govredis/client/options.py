"""The options of a connection, from the settings and REDIS_URL."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from redis import CredentialProvider
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, SSLConnection, parse_url
from redis.retry import Retry

from .._redact import redact
from .._redis_urls import Host, Sentinels
from ..config import Config, address_of
from ..errors import ConfigurationError
from .greeting import greet, greet_primary
from .named import NamedConnection, NamedTlsConnection, by_locating, by_name
from .wire import NoCredentials

# redis-py spends two round trips on CLIENT SETINFO at every connect unless told not to; 7.x renamed how.
_NO_SETINFO = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)


class _Provider(CredentialProvider):
    """The application's provider. Its error is an error of connecting: its token service is away, say."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def get_credentials(self) -> Any:
        try:
            return self._provider.get_credentials()
        except Exception as error:
            raise NoCredentials(f"the credential_provider failed: {type(error).__name__}: {error}") from error


def connection_options(
    config: Config, locate: Callable[[], Host] | None = None, host: Host | None = None
) -> dict[str, Any]:
    """The arguments of a connection: the settings, the URL's parameters over them, and our own over both.

    Args:
        locate: tells where the primary is, at each connect; None: the URL does.
        host: in the place of the URL's.

    Raises ConfigurationError for a URL that redis-py does not take.
    """
    options = {
        "socket_timeout": config.socket_timeout,
        "socket_connect_timeout": config.connect_timeout,
        "credential_provider": None if config.credential_provider is None else _Provider(config.credential_provider),
        **_parse_url(config),
        **_OUR_OWN,
    }
    if host is not None:
        options["host"], options["port"] = host
    if locate is None:
        return by_name(options)
    return by_locating({**options, "redis_connect_func": greet_primary}, locate)


def sentinel_options(options: dict[str, Any], sentinels: Sentinels) -> tuple[type[Any], dict[str, Any]]:
    """The class and the arguments of a connection to a Sentinel, given those of one to the server that it watches."""
    kind = options["connection_class"]
    if sentinels.tls is not None:
        is_tls = sentinels.tls
    else:
        is_tls = issubclass(kind, SSLConnection)
    names = {"socket_timeout", "socket_connect_timeout", *_OUR_OWN}
    names |= {name for name in options if is_tls and name.startswith("ssl_")}
    own = {"username": sentinels.username, "password": sentinels.password, "redis_connect_func": greet}
    chosen = {name: options[name] for name in names} | own
    return NamedTlsConnection if is_tls else NamedConnection, chosen


_OUR_OWN: dict[str, Any] = {
    # No retries inside redis-py: whether a second try is safe is known here, not there.
    "retry": Retry(NoBackoff(), 0),
    "health_check_interval": 0,
    "protocol": 2,
    "decode_responses": False,
    "socket_read_size": 4096,  # for redis-py's greeting; replies are read in wire.py
    "redis_connect_func": greet,
    **_NO_SETINFO,
}


def _parse_url(config: Config) -> dict[str, Any]:
    url = address_of(config).url
    try:
        options = dict(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise wrong_url(config.redis_url, error) from None
    asked = options.get("ssl_cert_reqs")
    if isinstance(asked, str):  # Celery takes CERT_NONE and none; redis-py takes none alone
        options["ssl_cert_reqs"] = asked.lower().removeprefix("cert_")
    return options


def wrong_url(url: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"REDIS_URL is {redact(url)!r}; its parameters must be those of redis-py's connections: {redact(str(error))}"
    )


def address(options: dict[str, Any]) -> str:
    """Where Redis is, without user and password."""
    if "path" in options:
        return str(options["path"])
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
