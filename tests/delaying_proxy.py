"""A TCP proxy before Redis that holds each reply back for a time: as of a Redis that is far away."""

from __future__ import annotations

import contextlib
import socket
import threading

from cutting_proxy import CuttingProxy


class DelayingProxy(CuttingProxy):
    """As CuttingProxy.

    Attributes:
        seconds: for which a reply is on its way.
    """

    seconds = 0.0

    def _deliver(self, receiver: socket.socket, found: bytes, *, is_reply: bool) -> bool:
        if not is_reply:
            return super()._deliver(receiver, found, is_reply=False)

        def send() -> None:
            with contextlib.suppress(OSError):  # nobody waits for it any more
                receiver.sendall(found)

        timer = threading.Timer(self.seconds, send)
        timer.daemon = True
        timer.start()
        return True
