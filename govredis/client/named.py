"""Connections to a host that has a name, or that Sentinels name. The lookup has no more time than connecting."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import redis
from redis.connection import Connection, SSLConnection

from .._redis_urls import Host
from .._resolver import Resolver
from .tls import TlsConnection

if TYPE_CHECKING:
    import socket


class Addresses(Protocol):
    def addresses(self, seconds: float) -> list[str]:
        """As Resolver has it."""


class _Numeric:
    """The addresses of a host that is named by its address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def addresses(self, _: float) -> list[str]:
        return [self._address]


def resolver_of(host: str) -> Addresses:
    return _Numeric(host) if _is_address(host) else Resolver(host)


class NamedConnection(Connection):
    """Args: resolver: of its host's name; others as redis-py has them."""

    def __init__(self, *, resolver: Addresses, **options: Any) -> None:
        self._resolver = resolver
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> socket.socket:
        name, seconds = self.host, float(self.socket_connect_timeout or 0)
        try:
            addresses = self._resolver.addresses(seconds)
        except TimeoutError as error:
            raise redis.TimeoutError(str(error)) from None  # redis-py would not name the host
        failed: OSError | None = None
        try:
            for address in addresses:
                self.host = address
                try:
                    connected: socket.socket = super()._connect()  # type: ignore[no-untyped-call]
                    return connected
                except OSError as error:
                    failed = error
            raise failed or OSError("its name has no address")
        finally:
            self.host = name  # TLS compares it with the certificate
            del failed  # see wire.py


class NamedTlsConnection(TlsConnection, NamedConnection):
    """TLS over a named connection: TlsConnection connects by the next class, which is NamedConnection."""


class _FollowingConnection(NamedConnection):
    """Args: locate: tells at each connect where to connect to; resolvers: of names; others as redis-py has them."""

    def __init__(self, *, locate: Callable[[], Host], resolvers: Callable[[str], Addresses], **options: Any) -> None:
        self._locate = locate
        self._resolvers = resolvers
        super().__init__(resolver=_Numeric(""), **options)

    def _connect(self) -> socket.socket:
        self.host, self.port = self._locate()
        self._resolver = self._resolvers(self.host)
        return super()._connect()


class _FollowingTlsConnection(TlsConnection, _FollowingConnection):
    """TLS over a following connection."""


def by_name(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a connection, changed for TLS, and where the host has a name and is no IP address."""
    kind, host = options.get("connection_class", Connection), str(options.get("host", "localhost"))
    is_tls = issubclass(kind, SSLConnection)
    if "path" in options or _is_address(host):
        return {**options, "connection_class": TlsConnection} if is_tls else options
    named = NamedTlsConnection if is_tls else NamedConnection
    return {**options, "connection_class": named, "resolver": Resolver(host)}


def by_locating(options: dict[str, Any], locate: Callable[[], Host]) -> dict[str, Any]:
    """The arguments of a connection that asks `locate` for its host and port."""
    is_tls = issubclass(options.get("connection_class", Connection), SSLConnection)
    following = _FollowingTlsConnection if is_tls else _FollowingConnection
    # One resolver a name, so that a name server that hangs costs one thread, and not one at each connect.
    resolvers = functools.lru_cache(maxsize=16)(resolver_of)
    return {**options, "connection_class": following, "locate": locate, "resolvers": resolvers}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
