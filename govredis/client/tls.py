"""TLS by one context for all connections that have the same settings."""

from __future__ import annotations

import contextlib
import os
import ssl
from typing import TYPE_CHECKING, Any

from redis.connection import SSLConnection

if TYPE_CHECKING:
    import socket

#: By the settings of a connection: the state of the files that were read, and the context made of them.
_contexts: dict[str, tuple[list[tuple[int, int]], ssl.SSLContext]] = {}


class TlsConnection(SSLConnection):
    """As redis-py has it, which makes a context at each connect: 25 ms of CPU, most of it for the system's authorities.

    Here a connect makes a new one where a file of certificates or keys has changed, as short-lived ones do.
    """

    def __init__(self, **options: Any) -> None:
        self._settings = repr(sorted((name, value) for name, value in options.items() if name.startswith("ssl_")))
        super().__init__(**options)

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        files = self._files()  # before they are read
        known, context = _contexts.get(self._settings, (None, None))
        # OpenSSL reads a folder's files by itself, as it needs them.
        is_alone = self.ca_path or self.ssl_validate_ocsp or self.ssl_validate_ocsp_stapled
        if context is None or known != files or is_alone:
            made: ssl.SSLSocket = super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
            _contexts[self._settings] = files, made.context
            return made
        return context.wrap_socket(sock, server_hostname=self.host)

    def _files(self) -> list[tuple[int, int]]:
        system = ssl.get_default_verify_paths()
        paths = self.certfile, self.keyfile, self.ca_certs, system.cafile, system.capath
        found = []
        for path in filter(None, paths):
            with contextlib.suppress(OSError):  # a missing one is an error of connecting
                state = os.stat(path)
                found.append((state.st_ino, state.st_mtime_ns))
        return found
