"""`govredis dashboard`: the page on this host alone."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PATIENCE

from govredis import GovRedis
from govredis.health.dashboard.page import HEADERS
from govredis.health.dashboard.server import DashboardServer
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis
COMMAND = [sys.executable, "-c", "from govredis.cli import main; main()", "dashboard"]


@pytest.fixture
def server(gov: GovRedis) -> Iterator[DashboardServer]:
    with DashboardServer(gov.internal.dashboard, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(PATIENCE)


def get(port: int, path: str, host: str | None = None) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def test_the_page_and_its_parts(server: DashboardServer) -> None:
    status, headers, body = get(server.server_port, "/?span=week")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert 'href="?span=week" aria-current="page"' in body
    assert HEADERS.items() <= dict(headers).items()
    for part, kind in ("dashboard.css", "text/css"), ("dashboard.js", "text/javascript"), ("warn.svg", "image/svg+xml"):
        status, headers, _ = get(server.server_port, f"/dashboard/{part}")
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert HEADERS.items() <= dict(headers).items()


@pytest.mark.parametrize(
    "path", ["/x", "/dashboard", "/dashboard/", "/dashboard/..%2Fpage.py", "/dashboard/../page.py", "//["]
)
def test_nothing_else_is_served(server: DashboardServer, path: str) -> None:
    assert get(server.server_port, path)[0] == 404


def test_an_unknown_time_is_an_hour(server: DashboardServer) -> None:
    body = get(server.server_port, "/?span=%00<script>&span=&&&=")[2]
    assert 'href="?span=hour" aria-current="page"' in body


def test_a_name_of_another_site_that_leads_here_is_refused(server: DashboardServer) -> None:
    """DNS rebinding: the browser takes the page for the other site's own, and lets that read it."""
    port = server.server_port
    for host in "evil.example", f"evil.example:{port}", "127.0.0.1", "", f"127.0.0.1.evil.example:{port}":
        for path in "/", "/dashboard/dashboard.js":
            status, headers, body = get(port, path, host)
            assert (status, body) == (421, f"this is http://127.0.0.1:{port}/\n")
            assert headers["X-Content-Type-Options"] == "nosniff"
    for host in f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}":
        assert get(port, "/", host)[0] == 200


def test_the_command_prints_its_url_and_ends_on_ctrl_c(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    environment = {
        **os.environ, "REDIS_URL": redis_server.url, "GOVREDIS_DATABASE_URL": postgres_server.url,
        "GOVREDIS_LOCK_FOLDER": str(tmp_path / "locks"), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, "--port", "0"], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        port = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)\n", said)
        assert port is not None, said
        assert get(int(port[1]), "/")[0] == 200
        again = subprocess.run([*COMMAND, "--port", port[1]], env=environment, text=True, capture_output=True)
        assert again.returncode == 3
        assert again.stderr == f"Error: 127.0.0.1:{port[1]}: Address already in use; --port names another\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_it_listens_on_loopback_alone(server: DashboardServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_reader_who_goes_leaves_no_traceback(server: DashboardServer, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        connection.sendall(b"GET / HTTP/1.0\r\n")
    assert get(server.server_port, "/")[0] == 200
    assert capfd.readouterr().err == ""
