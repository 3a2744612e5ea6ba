"""Servers that quote passwords: a Redis, or a proxy before one, and a PostgreSQL. Each of a test's own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import TracebackType

#: Makes an error of the command that was refused and the password that the client has sent.
Quoter = Callable[[list[bytes], bytes], bytes]


def as_redis_does(command: list[bytes], password: bytes) -> bytes:
    """One that knows no AUTH, word by word: its arguments, up to 128 bytes of them, on one line."""
    args = b""
    for arg in command[1:]:
        if len(args) < 128:
            args += b"'" + arg[: 128 - len(args)] + b"' "
    said = b"ERR unknown command '" + command[0][:128] + b"', with args beginning with: " + args
    return said.replace(b"\r", b" ").replace(b"\n", b" ")


class _Server:
    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._peers: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers:
            peer.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._peers.append(peer)
            threading.Thread(target=self._serve_until_closed, args=(peer,), daemon=True).start()

    def _serve_until_closed(self, peer: socket.socket) -> None:
        try:
            self.serve(peer)
        except (OSError, ValueError, IndexError):
            pass
        finally:
            peer.close()

    def serve(self, peer: socket.socket) -> None:
        raise NotImplementedError


class QuotingRedis(_Server):
    """Answers AUTH and HELLO with an error that quotes what was sent, or, as `accepts` says, takes the password and
    quotes it in the error that each later command gets."""

    def __init__(self, quote: Quoter = as_redis_does, *, accepts: bool = False) -> None:
        self._quote, self._accepts = quote, accepts
        #: The passwords that came.
        self.heard: list[bytes] = []
        super().__init__()

    def serve(self, peer: socket.socket) -> None:
        stream, password = peer.makefile("rb"), b""
        while True:
            command = [self._bulk(stream) for _ in range(int(stream.readline()[1:]))]
            if command[0] in (b"AUTH", b"HELLO"):
                password = command[-1]
                self.heard.append(password)
                if self._accepts:
                    peer.sendall(b"+OK\r\n" if command[0] == b"AUTH" else b"%1\r\n$5\r\nproto\r\n:3\r\n")
                    continue
            peer.sendall(b"-" + self._quote(command, password) + b"\r\n")

    @staticmethod
    def _bulk(stream) -> bytes:  # type: ignore[no-untyped-def]
        found: bytes = stream.read(int(stream.readline()[1:]))
        stream.readline()
        return found


class QuotingPostgres(_Server):
    """Asks for the password in clear text, and quotes it in its refusal."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        super().__init__()

    def serve(self, peer: socket.socket) -> None:
        stream = peer.makefile("rb")
        while True:
            length = int.from_bytes(stream.read(4), "big")
            if stream.read(length - 4)[:4] == b"\x00\x03\x00\x00":
                break
            peer.sendall(b"N")  # no TLS, no GSSAPI
        peer.sendall(b"R\x00\x00\x00\x08\x00\x00\x00\x03")
        assert stream.read(1) == b"p"
        password = stream.read(int.from_bytes(stream.read(4), "big") - 4).rstrip(b"\x00")
        self.heard.append(password)
        said = b"SFATAL\x00C28P01\x00Mpassword authentication failed: " + password + b" is not it\x00\x00"
        peer.sendall(b"E" + (len(said) + 4).to_bytes(4, "big") + said)
