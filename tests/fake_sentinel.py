"""A server that says what a Sentinel may say: views that no healthy group of Sentinels would give on demand."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType


class FakeSentinel:
    """Answers each pair of questions with `view`: the config epoch and the port of the primary; None hangs."""

    def __init__(self, epoch: int, port: int) -> None:
        self.view: tuple[int, int] | None = epoch, port
        #: Instead of both answers.
        self.error = b""
        #: Instead of each answer.
        self.raw = b""
        self.asked = 0
        #: When the last question came.
        self.asked_at = 0.0
        self._connected: list[socket.socket] = []
        self.connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._connected.append(connected)
            threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        with connected, contextlib.suppress(OSError):  # the client, or `cut`, may end it at any time
            while asked := connected.recv(65536):
                if b"MASTER-ADDR" not in asked:
                    connected.sendall(b"+OK\r\n")  # to AUTH
                    continue
                self.asked += 1
                self.asked_at = time.monotonic()
                if self.raw:
                    connected.sendall(2 * self.raw)
                elif self.error:
                    connected.sendall(b"$-1\r\n" + self.error)
                elif self.view is not None:
                    epoch, port = self.view
                    address = ("127.0.0.1", str(port))
                    fields = ("ip", address[0], "port", address[1], "config-epoch", str(epoch))
                    connected.sendall(_array(address) + _array(fields))

    def cut(self) -> None:
        """End its connections, as a restart does."""
        while self._connected:
            with contextlib.suppress(OSError):
                self._connected.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._listening.fileno() >= 0:
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, which keeps it open
        self._listening.close()

    def __enter__(self) -> FakeSentinel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _array(texts: tuple[str, ...]) -> bytes:
    return f"*{len(texts)}\r\n".encode() + b"".join(f"${len(text)}\r\n{text}\r\n".encode() for text in texts)
