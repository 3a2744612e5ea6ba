"""Apps: by Flask's own client, and under gunicorn."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support import PATIENCE

from govredis import GovRedis
from govredis.config import variables
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import RedisServer


@pytest.fixture
def app() -> Flask:
    return Flask("shop")


@pytest.fixture
def ext(app: Flask, gov: GovRedis) -> FlaskGovRedis:
    return FlaskGovRedis(app, gov)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@dataclass(frozen=True)
class Answer:
    status: int
    worker: str  # its pid
    body: bytes


class Gunicorn:
    """gunicorn with four workers on a loopback port of its own, serving served_app.py."""

    def __init__(self, log: Path, options: tuple[str, ...], settings: dict[str, object]) -> None:
        ours = set(variables().values())
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        names = {name: variables().get(name, f"GOVREDIS_{name.upper()}") for name in settings}
        environment.update({f"FLASK_{names[name]}": str(value) for name, value in settings.items()})
        # The socket is made here, so that clients wait in its backlog until there are workers, and nobody polls.
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, log.open("wb") as sink:
            self._port = listener.getsockname()[1]
            command = [sys.executable, "-m", "gunicorn", f"--bind=fd://{listener.fileno()}", "--workers=4", *options]
            self._process = subprocess.Popen(
                [*command, "--no-control-socket", f"--chdir={Path(__file__).parent}", "served_app:app"],
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=(listener.fileno(),),
                start_new_session=True,
            )

    def close(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever is left of its group
        self._process.wait(10)

    def get(self, path: str, agent: str = "agent-1") -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("GET", path, headers={"X-Agent": agent})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        return Answer(response.status, response.headers["X-Worker"], body)

    def ask(
        self, path: str, until: Callable[[list[Answer]], bool], *, agent: str = "agent-1", pause: float = 0
    ) -> list[Answer]:
        """All answers that four clients at once get, until `until` of them. Fails after PATIENCE."""
        answers: list[Answer] = []
        deadline = time.monotonic() + PATIENCE

        def client() -> None:
            while not until(answers) and time.monotonic() < deadline:
                answers.append(self.get(path, agent))
                time.sleep(pause)

        with ThreadPoolExecutor(4) as clients:
            for ended in [clients.submit(client) for _ in range(4)]:
                ended.result()
        assert until(answers), f"not within {PATIENCE:g} s, of {len(answers)} answers, the last {answers[-1:]}"
        return answers


@pytest.fixture(scope="session")
def one_redis() -> Iterator[RedisServer]:
    """A Redis to stop and restart; one that a test stops it restarts. Not of each binary: these tests are slow."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Gunicorn]]:
    """Starts gunicorn with some options of its command line, and the app's settings. Its log is shown on a failure."""
    started: list[Gunicorn] = []
    log = tmp_path / "gunicorn.log"

    def start(*options: str, **settings: object) -> Gunicorn:
        started.append(Gunicorn(log, options, {"lock_folder": tmp_path / "locks", **settings}))
        return started[-1]

    yield start
    for gunicorn in started:
        gunicorn.close()
        sys.stdout.write(log.read_text())
