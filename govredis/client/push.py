"""PushStream: a RESP3 connection on which the server also speaks unasked."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from ..errors import BackendError, BackendUnavailable
from .rights import error_of_text

_AT_ONCE = 65536
#: The first words of a node's answers that it does not serve a key, or not now.
_NOT_NOW = {"ASK", "CLUSTERDOWN", "MOVED", "TRYAGAIN"}


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
        self._timeout = connected.gettimeout()
        self.close = close
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)

    def fileno(self) -> int:
        """The socket's, for selectors."""
        return self._socket.fileno()

    def send(self, commands: Sequence[tuple[str, ...]]) -> None:
        """Send commands; `read` returns their replies, in order, among the pushes.

        Raises BackendUnavailable.
        """
        self._sent = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(self._sent)
        except OSError as error:
            raise self._away(error) from error

    def read(self, seconds: float) -> tuple[list[Any], list[list[Any]]]:
        """Return the replies and the pushes, as soon as any come, or none after `seconds`; 0: those that have come.

        Raises BackendUnavailable where the connection is over, BackendError for a reply that is an error.
        """
        replies: list[Any] = []
        pushes: list[list[Any]] = []
        deadline = time.monotonic() + seconds
        left = seconds
        while not replies and not pushes and left >= 0:
            self._receive(left)
            left = deadline - time.monotonic()
            while (found := self._next()) is not _NOTHING:
                if isinstance(found, hiredis.PushNotification):
                    pushes.append(found)
                elif isinstance(found, Exception):
                    raise self._refused(self._hide(str(found)))
                else:
                    replies.append(found)
        return replies, pushes

    def _refused(self, text: str) -> BackendError:
        if text.partition(" ")[0] in _NOT_NOW:
            return BackendUnavailable(f"{self._name} answered: {text}")
        return error_of_text(self._name, text, self._sent, self._pattern)

    def _receive(self, seconds: float) -> None:
        try:
            self._socket.settimeout(seconds)
            came = self._socket.recv(_AT_ONCE)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
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
