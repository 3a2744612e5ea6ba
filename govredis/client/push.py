"""PushStream: a RESP3 connection on which the server also speaks unasked."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from ..errors import BackendError, BackendUnavailable
from .rights import error_of_text

_AT_ONCE = 65536


class PushStream:
    """Commands, their replies, and pushes, for one thread. After an error close it, and make another.

    Args:
        name: the server's, for errors.
        connected: a socket that has said HELLO 3, and has no reply outstanding.
        close: closes the socket, never raising.
        hide: takes passwords out of a text of the server's.
        pattern: gives the glob of all keys of a key's kind, for errors.
    """

    def __init__(
        self,
        name: str,
        connected: socket.socket,
        close: Callable[[], None],
        hide: Callable[[str], str],
        pattern: Callable[[str], str],
    ) -> None:
        self._name = name
        self._hide = hide
        self._pattern = pattern
        self._sent = b""
        self._socket = connected
        self.close = close
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)

    def send(self, commands: Sequence[tuple[str, ...]]) -> None:
        """Send commands; `read` returns their replies, in order, among the pushes.

        Raises BackendUnavailable.
        """
        self._sent = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]
        try:
            self._socket.sendall(self._sent)
        except OSError as error:
            raise self._away(error) from error

    def read(self, seconds: float) -> tuple[list[Any], list[list[Any]]]:
        """Return the replies and the pushes, as soon as any come, or none after `seconds`.

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
                    raise error_of_text(self._name, self._hide(str(found)), self._sent, self._pattern)
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
            raise BackendError(f"{self._name} does not speak Redis: {self._hide(str(error))}") from None

    def _away(self, error: OSError) -> BackendUnavailable:
        return BackendUnavailable(f"{self._name} is away: {error}")


_NOTHING = object()
