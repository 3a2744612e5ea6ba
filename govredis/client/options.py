"""The options of a connection, from the settings and REDIS_URL."""

from __future__ import annotations

import inspect
from typing import Any

from redis import CredentialProvider
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, parse_url
from redis.retry import Retry

from .._redact import redact
from ..config import Config
from ..errors import ConfigurationError
from .greeting import greet
from .named import by_name
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


def connection_options(config: Config) -> dict[str, Any]:
    """The arguments of a connection: the settings, the URL's parameters over them, and our own over both.

    Raises ConfigurationError for a URL that redis-py does not take.
    """
    options = {
        "socket_timeout": config.socket_timeout,
        "socket_connect_timeout": config.connect_timeout,
        "credential_provider": None if config.credential_provider is None else _Provider(config.credential_provider),
        **_parse_url(config.redis_url),
        # No retries inside redis-py: whether a second try is safe is known here, not there.
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "protocol": 2,
        "decode_responses": False,
        "socket_read_size": 4096,  # for redis-py's greeting; replies are read in wire.py
        "redis_connect_func": greet,
        **_NO_SETINFO,
    }
    return by_name(options)


def _parse_url(url: str) -> dict[str, Any]:
    try:
        options = dict(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise wrong_url(url, error) from None
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
