"""Connections to a host that has a name. The lookup of its address has no more time than connecting."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

import redis
from redis.connection import Connection, SSLConnection

from .._resolver import Resolver

if TYPE_CHECKING:
    import socket


class _NamedConnection(Connection):
    """Args: resolver: of its host's name; others as redis-py has them."""

    def __init__(self, *, resolver: Resolver, **options: Any) -> None:
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


class _NamedSSLConnection(SSLConnection, _NamedConnection):
    """TLS over a named connection: SSLConnection connects by the next class, which is _NamedConnection."""


def by_name(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a connection, changed where the host has a name and is no IP address or unix socket."""
    kind, host = options.get("connection_class", Connection), str(options.get("host", "localhost"))
    if "path" in options or _is_address(host):
        return options
    named = _NamedSSLConnection if issubclass(kind, SSLConnection) else _NamedConnection
    return {**options, "connection_class": named, "resolver": Resolver(host)}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
