"""A proxy that speaks TLS to clients and plain TCP to the Redis behind it: the wheel's redis-server knows no TLS."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from types import TracebackType


class TlsProxy:
    """Serves the Redis on a port of 127.0.0.1, with a certificate.

    Attributes:
        netloc: where clients connect to, by the name that the certificate is for.
    """

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._port = port
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.netloc = f"localhost:{self.port}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TlsProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # which wakes the thread that waits for it
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        """By one thread for both ways: OpenSSL bears no two in one connection."""
        server = socket.create_connection(("127.0.0.1", self._port))
        self._ends += [plain, server]
        try:
            with self._context.wrap_socket(plain, server_side=True) as client, server:
                self._ends.append(client)
                while True:
                    readable = [client] if client.pending() else select.select([client, server], [], [])[0]
                    for source in readable:
                        came = source.recv(65536)
                        if not came:
                            return
                        (server if source is client else client).sendall(came)
        except (OSError, ValueError):  # closed by the other side, or by us
            plain.close()
            server.close()
