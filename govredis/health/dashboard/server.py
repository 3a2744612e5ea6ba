"""DashboardServer: the page on this host alone, by Python's own HTTP server."""

from __future__ import annotations

import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from .dashboard import Dashboard
from .page import HEADERS, PageResource

_HOST = "127.0.0.1"


class DashboardServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1. Raises OSError for a port that is in use, or not allowed.

    A page of another site could reach it by a name of its own that leads here (DNS rebinding). The browser then sends
    that name, so requests for other hosts than 127.0.0.1 and localhost are refused.

    Args:
        port: 0: any that is free.
    """

    daemon_threads = True
    #: A browser opens several connections at once.
    request_queue_size = 64

    def __init__(self, dashboard: Dashboard, port: int) -> None:
        self.dashboard: Dashboard = dashboard
        dashboard.check()
        super().__init__((_HOST, port), _Handler)
        self.hosts: set[str] = {f"{name}:{self.server_port}" for name in (_HOST, "localhost")}
        if self.server_port == 80:
            self.hosts |= {_HOST, "localhost"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a reader who has gone
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: DashboardServer
    #: Seconds for a request to arrive.
    timeout = 10
    server_version, sys_version = "govredis", ""

    def do_GET(self) -> None:
        self._answer(self._found())

    def _found(self) -> PageResource:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            return _text(HTTPStatus.MISDIRECTED_REQUEST, f"this is {self.server.url}")
        path, _, query = self.path.partition("?")
        if path == "/":
            return self.server.dashboard.page(dict(parse_qsl(query)).get("span"))
        found = self.server.dashboard.asset(path.removeprefix("/dashboard/"))
        return found or _text(HTTPStatus.NOT_FOUND, f"the dashboard is {self.server.url}")

    def _answer(self, found: PageResource) -> None:
        self.send_response(found.status)
        for name, value in (*HEADERS.items(), ("Content-Type", found.content_type)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(found.body)))
        self.end_headers()
        self.wfile.write(found.body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal has the URL, and is a person's."""


def _text(status: HTTPStatus, words: str) -> PageResource:
    return PageResource(f"{words}\n".encode(), "text/plain; charset=utf-8", status)
