"""A TCP proxy before Redis that drops a connection when a chosen reply comes back: by then the command was executed."""

from __future__ import annotations

import selectors
import socket
import threading
from collections import deque
from types import TracebackType


class _Link:
    """A client's connection, the one to Redis for it, and what was asked last."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.request = b""
        self.answered = False

    def other(self, end: socket.socket) -> socket.socket:
        return self.server if end is self.client else self.client

    def close(self) -> None:
        self.client.close()
        self.server.close()


class _Cut:
    def __init__(self, request: bytes, reply: bytes, times: int) -> None:
        self.request, self.reply, self.left = request, reply, times


class CuttingProxy:
    """Forwards between its clients and the Redis on a port of 127.0.0.1. For clients that ask one thing at a time, and
    small replies: a request is all that comes before a reply, and a reply is known by the first bytes that come.

    Attributes:
        url: where clients connect to.
        cuts: how many connections it has cut.
        exchanges: the latest (request, beginning of the reply), cut ones too.
        accepting: while it is not set, a client that connects has to wait, and after that all the others.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.cuts = 0
        self.accepting = threading.Event()
        self.accepting.set()
        self.exchanges: deque[tuple[bytes, bytes]] = deque(maxlen=1000)
        self._armed: list[_Cut] = []
        self._mutex = threading.Lock()
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="cutting-proxy", daemon=True)
        self._thread.start()

    def cut_next(self, request: bytes, *, reply: bytes = b"", times: int = 1) -> None:
        """Drop the connection at the next reply, or next few, that begin with `reply`, to what contains `request`."""
        with self._mutex:
            self._armed.append(_Cut(request, reply, times))

    def close(self) -> None:
        self._end.close()
        self._thread.join()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        links: dict[socket.socket, _Link] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    if end is self._ended:
                        for link in links.values():
                            link.close()
                        self._listener.close()
                        self._ended.close()
                        return
                    if end is self._listener:
                        link = self._accept()
                        if link is not None:
                            for one in link.client, link.server:
                                links[one] = link
                                selector.register(one, selectors.EVENT_READ)
                    elif end in links and not self._forward(end, links[end]):
                        link = links[end]
                        for one in link.client, link.server:
                            selector.unregister(one)
                            del links[one]
                        link.close()

    def _accept(self) -> _Link | None:
        client, _ = self._listener.accept()
        self.accepting.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            client.close()
            return None
        for end in client, server:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Link(client, server)

    def _forward(self, end: socket.socket, link: _Link) -> bool:
        """False when both ends of the link must be closed."""
        try:
            found = end.recv(65536)
            if not found:
                return False
            if end is link.client:
                link.request = found if link.answered else link.request + found
                link.answered = False
            elif not link.answered:
                link.answered = True
                self.exchanges.append((link.request, found[:100]))
                if self._is_to_be_cut(link.request, found):
                    return False
            return self._deliver(link.other(end), found, is_reply=end is link.server)
        except OSError:
            return False

    def _deliver(self, receiver: socket.socket, found: bytes, *, is_reply: bool) -> bool:
        """False when the connection must be closed. For those who do more than cut."""
        receiver.sendall(found)
        return True

    def _is_to_be_cut(self, request: bytes, reply: bytes) -> bool:
        with self._mutex:
            for cut in self._armed:
                if cut.request in request and reply.startswith(cut.reply):
                    cut.left -= 1
                    if not cut.left:
                        self._armed.remove(cut)
                    self.cuts += 1
                    return True
        return False
