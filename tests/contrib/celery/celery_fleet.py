"""Real workers and beats as subprocesses, and what they have noted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from support import PATIENCE, eventually

HERE = Path(__file__).parent

#: Beat publishes none of our tasks.
NEVER = {f"{name}_interval": None for name in ("drain", "census", "heartbeat", "snapshot", "purge")}


def in_app(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The settings as an app's configuration has them."""
    return {f"govredis_{name}": value for name, value in {**settings, **more}.items()}


def close_backend(app: Celery) -> None:
    """End the connections to an app's results in Redis: its client, which was given its pool, does not."""
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()


class Process:
    """A `celery` command on celery_app, with its children in a process group of its own."""

    def __init__(self, name: str, folder: Path, command: list[str], settings: dict[str, Any], module: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        ours = ("REDIS_", "GOVREDIS_", "CELERY_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment["GOVREDIS_TEST_APP"] = json.dumps({"name": name, **settings})
        with open(self.log, "ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", module, *command],
                cwd=HERE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        """kill -9, the children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self._popen.terminate()
        return self.wait()

    def wait(self) -> int:
        return self._popen.wait(PATIENCE)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Fleet:
    """Starts processes, reads what they noted, and ends them all.

    Args:
        urls: `broker`, `backend` and `evidence`.
    """

    def __init__(self, folder: Path, urls: dict[str, str]) -> None:
        self.folder = folder
        self.urls = urls
        self.processes: dict[str, Process] = {}
        self.evidence = redis.Redis.from_url(urls["evidence"], decode_responses=True)
        self.needed: list[str] = []
        self._apps: dict[str, Celery] = {}
        self._started: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def worker(self, name: str, *options: str, beat: bool = False, **settings: Any) -> Process:
        """Start a worker. `settings` as in celery_app; without a queue: that of its name."""
        quick = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO", "-n", f"{name}@%h"]
        if beat:
            quick += ["--beat", "-s", str(self.folder / f"{name}.schedule")]
        return self._start(name, ["worker", *quick, *options], settings)

    def beat(self, name: str, **settings: Any) -> Process:
        """Start a beat of its own."""
        return self._start(
            name, ["beat", "-l", "INFO", "--pidfile=", "-s", str(self.folder / f"{name}.schedule")], settings
        )

    def _start(self, name: str, command: list[str], settings: dict[str, Any]) -> Process:
        self._started[name] = (command, settings)
        return self.again(name)

    def again(self, name: str) -> Process:
        """Start anew what has ended."""
        command, settings = self._started[name]
        self.evidence.delete(f"ready:{name}")
        process = Process(name, self.folder, command, {**self.urls, "queue": name, **settings}, "celery_app")
        self.processes[name] = process
        return process

    def mend(self) -> None:
        """Start what a failed test has left ended."""
        ended = [name for name in self.needed if not self.processes[name].running]
        for name in ended:
            self.again(name)
        self.wait_ready(*ended)

    def wait_ready(self, *names: str) -> None:
        for name in names:
            process = self.processes[name]
            eventually(
                lambda name=name, process=process: self.evidence.exists(f"ready:{name}") or not process.running,
                what=f"{name} is ready",
            )
            assert process.running, f"{name} ended:\n{process.text()[-3000:]}"

    def noted(self, what: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.evidence.lrange(what, 0, -1)]

    def app(self, broker: str | None = None) -> Celery:
        """Publishes to a broker: tasks are named, `send_task("alone", ["key", 1])`, and none is imported."""
        broker = broker or self.urls["broker"]
        if broker not in self._apps:
            app = Celery("publisher", broker=broker, backend=self.urls["backend"], set_as_current=False)
            # Else a result that is collected when the servers are gone looks for them for 20 s.
            app.backend.remove_pending_result = lambda result: result
            self._apps[broker] = app
        return self._apps[broker]

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        for app in self._apps.values():
            close_backend(app)
            app.close()
        self.evidence.close()

    def logs(self, last: int = 60) -> Iterator[tuple[str, str]]:
        for name, process in self.processes.items():
            yield name, "\n".join(process.text().splitlines()[-last:])


class Reader:
    """Another process that has a GovRedis: evaluates an expression, JSON comes back."""

    _CODE = """
import json, sys
from govredis import Config, GovRedis
gov = GovRedis(Config(**json.loads(sys.argv[1])))
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""

    def __init__(self, **config: Any) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", self._CODE, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def eval(self, expression: str) -> Any:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        print(expression, file=self._popen.stdin, flush=True)
        return json.loads(self._popen.stdout.readline())

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()
