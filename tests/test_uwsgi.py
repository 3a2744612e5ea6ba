"""uWSGI forks its workers in C, after the app was loaded and used: without --lazy-apps, as by default.

A worker hangs for ever where a thread of the master had Python's GIL at the fork: github.com/unbit/uwsgi/issues/2387.
With --py-call-uwsgi-fork-hooks the master takes the GIL for the fork, and Python's own hooks run.
So the app leaves a thread in the master only where this option is given.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import eventually

from govredis.testing.servers import RedisServer

#: As many clients as four workers of two threads serve at once.
REQUESTS, WORKERS, CLIENTS = 10_000, 4, 8
HOOKS = "--py-call-uwsgi-fork-hooks"


class Uwsgi:
    def __init__(self, folder: Path, redis_url: str, options: tuple[str, ...], locked_before: bool) -> None:
        # A socket for each worker, so that all of them answer: the kernel may well prefer some.
        self._sockets = [str(folder / f"http{n}") for n in range(1, WORKERS + 1)]
        sockets = [f"--http-socket={path}" for path in self._sockets]
        sockets += [f"--map-socket={n}:{n + 1}" for n in range(WORKERS)]
        self._log = folder / "uwsgi.log"
        command = [Path(sys.executable).with_name("uwsgi"), "--master", f"--processes={WORKERS}", "--need-app"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *sockets, "--module=uwsgi_app", "--listen=100", *options],
                env={
                    **os.environ,
                    "APP_REDIS": redis_url,
                    "APP_LOCKS": str(folder / "locks"),
                    "APP_LOCKED_BEFORE": "yes" if locked_before else "",
                },
                cwd=Path(__file__).parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def get(self, path: str, worker: int) -> tuple[str, str]:
        """The worker's process id, and what it says."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(self._sockets[worker])
            client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            with client.makefile("rb") as answer:
                pid, said = answer.read().decode().split("\r\n\r\n")[1].split()
        return pid, said

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            try:
                for worker in range(WORKERS):
                    self.get("/session/0", worker)
                return
            except OSError:
                time.sleep(0.05)

    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        sys.stdout.write(self.log())


@pytest.fixture(
    params=[(), ("--enable-threads", "--threads=3"), (HOOKS,)],
    ids=["alone", "threads", "hooks"],
)
def uwsgi(request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path: Path) -> Iterator[Uwsgi]:
    server = Uwsgi(tmp_path, redis_server.url, request.param, locked_before=HOOKS in request.param)
    try:
        server.wait()
        yield server
    finally:
        server.close()


@pytest.mark.one_redis
def test_no_worker_answers_anothers_question(uwsgi: Uwsgi, redis_server: RedisServer) -> None:
    def ask(client: int) -> tuple[set[str], list[str], list[str], list[str]]:
        pids, wrong, limited, locked = set(), [], [], []
        worker = client % WORKERS
        for n in range(REQUESTS // CLIENTS):
            which = (client * 25 + n) % 100
            pid, said = uwsgi.get(f"/session/{which}", worker)
            pids.add(pid)
            if said != f"agent-{which}":
                wrong.append(f"{which}: {said}")
            if n % 50 == 0:
                locked.append(uwsgi.get("/lock/_", worker)[1])
                limited.append(uwsgi.get("/limit/_", worker)[1])
        return pids, wrong, limited, locked

    # The load below shows a shared connection only where two workers happen to meet on it.
    assert len({uwsgi.get("/connection/_", worker)[1] for worker in range(WORKERS)}) == WORKERS
    with ThreadPoolExecutor(CLIENTS) as clients:
        found = [*clients.map(ask, range(CLIENTS))]
    assert [wrong for _, wrong, _, _ in found] == [[]] * CLIENTS
    assert len(set().union(*(pids for pids, *_ in found))) == WORKERS
    admitted = [said for _, _, limited, _ in found for said in limited]
    assert (admitted.count("True"), admitted.count("False")) == (99, 101)  # of 100; the app has used one
    alone = [said for *_, locked in found for said in locked]
    assert alone == ["True"] * 200
    assert redis_server.command("GET", "count") == "200"


@pytest.mark.one_redis
@pytest.mark.parametrize(
    ("options", "locked_before", "warns"),
    [((), True, True), ((), False, False), ((HOOKS,), True, False), (("--lazy-apps",), True, False)],
    ids=["thread", "no-thread", "hooks", "lazy-apps"],
)
def test_a_thread_beside_forks_without_hooks_is_warned_of(
    options: tuple[str, ...], locked_before: bool, warns: bool, redis_server: RedisServer, tmp_path: Path
) -> None:
    server = Uwsgi(tmp_path, redis_server.url, options, locked_before)
    try:
        eventually(lambda: "WSGI app 0" in server.log(), what="uWSGI loaded the app")
        assert server.log().count("set py-call-uwsgi-fork-hooks = true") == warns
    finally:
        server.close()
