"""How replies come over a connection of redis-py, and whether the connection is in step.

It is in step while no reply has come unasked. A stray or repeated reply, from a faulty proxy, would be taken for the
reply to the next command, and so on for ever.
"""

from __future__ import annotations

import fcntl
import ssl
import termios
from collections.abc import Callable
from typing import Any

import hiredis
import redis

_NOTHING = bytes(4)
_NOT_ALL_YET = object()
_AT_ONCE = 65536


class Closed(redis.ConnectionError):
    """The server, or a proxy before it, has ended a connection after its greeting."""


class ClosedGreeting(redis.ConnectionError):
    """The connection was ended at a command of its greeting: `asked`, which ends before the first secret."""

    def __init__(self, asked: tuple[str, ...], said: str) -> None:
        super().__init__(f"{said} In answer to {asked[0]}.")
        self.asked = asked


class NoCredentials(redis.ConnectionError):
    """The application's own provider of them has failed."""


class SentinelMistake(redis.ConnectionError):
    """Sentinels refuse us, or do not know the service. Waiting mends neither."""


def take_over(connection: Any) -> None:
    """Give a connection, once it has connected, the checks of each use, and faster ways to send and receive.

    `connection.unread()`: does something wait in the socket? `connection.left_over()`: or in the parser?
    `connection.send_packed_command()` and `read_response()` do the same as redis-py's, without its own checks at each
    command.
    """
    sock = connection._sock
    connection.send_packed_command = _send_packed_command(sock)
    connection.unread = _unread_tls(sock) if hasattr(sock, "pending") else _unread(sock)
    parser = connection._parser
    if parser._reader.has_data():
        connection.left_over = parser._reader.has_data
        return
    reader = hiredis.Reader(
        protocolError=redis.InvalidResponse, replyError=parser.parse_error, notEnoughData=_NOT_ALL_YET
    )
    connection.left_over = reader.has_data
    connection.read_response = _read_response(sock, reader)


def _send_packed_command(sock: Any) -> Callable[[tuple[bytes], bool], None]:
    send = sock.sendall

    def send_packed_command(packed: tuple[bytes], _: bool) -> None:
        try:
            send(packed[0])
        except TimeoutError:
            raise redis.TimeoutError("Timeout writing to socket") from None
        except OSError as error:
            raise Closed(f"Error while writing to socket: {error}") from error

    return send_packed_command


def _read_response(sock: Any, reader: Any) -> Callable[[], Any]:
    receive, feed, get = sock.recv_into, reader.feed, reader.gets
    buffer = bytearray(_AT_ONCE)

    def read_response() -> Any:
        reply = get()
        try:
            while reply is _NOT_ALL_YET:
                came = receive(buffer)
                if not came:
                    raise Closed("Connection closed by server.")
                feed(buffer, 0, came)
                reply = get()
        except TimeoutError:
            raise redis.TimeoutError("Timeout reading from socket") from None
        except OSError as error:
            raise Closed(f"Error while reading from socket: {error}") from error
        if not isinstance(reply, Exception):
            return reply
        try:
            raise reply
        finally:
            # A cycle of the error and this frame would keep the locals of all callers, a lock's handle say, until the
            # collector runs. The same holds wherever a local variable has an error.
            del reply

    return read_response


def _unread(sock: Any) -> Callable[[], bool]:
    """By ioctl, which needs no object per connection, as poll() does, and no exception for "nothing", as recv() does.

    And gevent does not replace it by a call that waits.
    """
    fd, ioctl, how_much = sock.fileno(), fcntl.ioctl, termios.FIONREAD
    there = bytearray(4)

    def unread() -> bool:
        try:
            ioctl(fd, how_much, there)
        except OSError:  # the application has closed it, with all its descriptors
            return True
        return there != _NOTHING

    return unread


def _unread_tls(sock: Any) -> Callable[[], bool]:
    """Reading tells: the bytes in the socket may be TLS's own, such as a session ticket of TLS 1.3."""
    encrypted = _unread(sock)

    def unread() -> bool:
        if sock.pending():
            return True
        if not encrypted():
            return False
        timeout = sock.gettimeout()
        sock.settimeout(0)
        try:
            sock.recv(1)
        except (ssl.SSLWantReadError, TimeoutError):  # eventlet's socket raises the latter
            return False
        except OSError:
            pass
        finally:
            sock.settimeout(timeout)
        return True

    return unread
