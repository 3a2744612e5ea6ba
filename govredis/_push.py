"""PushStream: one RESP3 connection on which the server also says what nobody asked for. client.py makes them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from .errors import BackendError, BackendUnavailable

_AT_ONCE = 65536


class PushStream:
    """For one thread. What went wrong once is over: close it, and make another.

    Args:
        name: the server's, for errors.
        connected: a socket that has said HELLO 3, and to which nothing is owed.
        close: closes it, never raising.
    """

    def __init__(self, name: str, connected: socket.socket, close: Callable[[], None]) -> None:
        self._name = name
        self._socket = connected
        self.close = close
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)

    def send(self, commands: Sequence[tuple[str, ...]]) -> None:
        """Send commands; what `read` returns are their replies, in order, among the pushes.

        Raises BackendUnavailable.
        """
        try:
            self._socket.sendall(b"".join(map(hiredis.pack_command, commands)))  # type: ignore[arg-type]
        except OSError as error:
            raise self._away(error) from error

    def read(self, seconds: float) -> tuple[list[Any], list[list[Any]]]:
        """What comes within `seconds`, as soon as something does: replies, and pushes.

        Raises BackendUnavailable where the connection is over, BackendError for a reply that is an error.
        """
        replies: list[Any] = []
        pushes: list[list[Any]] = []
        deadline = time.monotonic() + seconds
        while not replies and not pushes and (left := deadline - time.monotonic()) > 0:
            self._receive(left)
            while (found := self._next()) is not _NOTHING:
                if isinstance(found, hiredis.PushNotification):
                    pushes.append(found)
                elif isinstance(found, Exception):
                    raise BackendError(f"{self._name} answered: {found}")
                else:
                    replies.append(found)
        return replies, pushes

    def _receive(self, seconds: float) -> None:
        try:
            self._socket.settimeout(seconds)
            came = self._socket.recv(_AT_ONCE)
        except TimeoutError:
            return
        except OSError as error:
            raise self._away(error) from error
        if not came:
            raise BackendUnavailable(f"{self._name} is away: it has closed the connection")
        self._reader.feed(came)

    def _next(self) -> Any:
        try:
            return self._reader.gets()
        except hiredis.HiredisError as error:
            raise BackendError(f"{self._name} does not speak Redis: {error}") from error

    def _away(self, error: OSError) -> BackendUnavailable:
        return BackendUnavailable(f"{self._name} is away: {error}")


_NOTHING = object()
