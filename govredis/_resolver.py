"""Resolver: the addresses of a host's name, by a deadline.

With a name server that hangs, the C library's lookup takes as long as /etc/resolv.conf says, 10 to 20 s, and cannot be
interrupted. So a thread asks, and callers wait for the thread as long as they choose.
"""

from __future__ import annotations

import socket
import threading

from ._daemon import start_daemon
from ._fork import renew_in_child
from ._latch import Latch


class _Lookup:
    """A question to the C library, and its answer."""

    __slots__ = ("addresses", "ended", "error")

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.error: Exception | None = None
        self.ended = Latch()

    def run(self, host: str) -> None:
        try:
            # As text. Connecting looks each address up again, with its port, and that asks no name server.
            found = socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM)
            self.addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        except Exception as error:  # noqa: BLE001 - `addresses` raises it to the callers
            self.error = error.with_traceback(None)
        finally:
            self.ended.set()


class Resolver:
    """Looks one name up, anew at each call, as the addresses of a name may change at any time.

    While a lookup hangs no other one is started: all callers wait for that one, each until its own deadline. So a name
    server that hangs costs one thread. Its return is noticed once the C library asks it again, 5 s by default.

    Args:
        host: the name.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._lookup: _Lookup | None = None

    def addresses(self, seconds: float) -> list[str]:
        """Its addresses, the preferred first.

        Raises TimeoutError after so many seconds; socket.gaierror (an OSError) where there is no such name.
        """
        lookup = self._asked()
        if not lookup.ended.wait(seconds):
            raise TimeoutError(f"no name server has told where {self.host} is, within {seconds:g} s")
        if lookup.error is not None:
            raise type(lookup.error)(*lookup.error.args)
        return lookup.addresses

    def _asked(self) -> _Lookup:
        """The lookup that is under way, or a new one."""
        with self._lock:
            lookup = self._lookup
            if lookup is not None and not lookup.ended.is_set():
                return lookup
            lookup = _Lookup()
            if start_daemon("govredis-resolver", lookup.run, self.host) is None:
                lookup.run(self.host)
            self._lookup = lookup  # not before it runs: else all would wait for what an exception has kept from running
            return lookup
