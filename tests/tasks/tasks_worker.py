"""`python -m tasks` as a subprocess on servers of its own, what it noted, and a client that publishes to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import redis
from celery import Celery
from support import PATIENCE, eventually

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what is ours, and with these."""
    ours = ("REDIS_", "GOVREDIS_", "CELERY_")
    return {**{name: held for name, held in os.environ.items() if not name.startswith(ours)}, **variables}


class Servers:
    """A cache Redis, a broker that keeps its data, and a PostgreSQL; all mortal. `evidence`: what tasks noted."""

    def __init__(self) -> None:
        self.cache, self.broker, self.postgres = RedisServer(), RedisServer(persistent=True), PostgresServer()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "REDIS_URL": self.cache.url,
            "CELERY_BROKER_URL": self.broker.url,
            "GOVREDIS_DATABASE_URL": self.postgres.url,
            # A busy machine is no outage.
            "GOVREDIS_SOCKET_TIMEOUT": "10",
            "GOVREDIS_CONNECT_TIMEOUT": "10",
        }

    def close(self) -> None:
        for server in (self.cache, self.broker, self.postgres):
            server.close()


class Worker:
    """`python -m tasks -c 4`, and what it noted of the messages published through `send`."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers = servers
        self.log = folder / "worker.log"
        evidence = servers.cache.url.removesuffix("/0") + "/1"
        self._evidence = redis.Redis.from_url(evidence, decode_responses=True)
        self._client = Celery("client", broker=servers.broker.url, set_as_current=False)
        self._environment = environment(
            **servers.environment,
            GOVREDIS_LOCK_FOLDER=str(folder / "locks"),
            TASKS_TEST_EVIDENCE=evidence,
            PYTHONPATH=f"{ROOT}{os.pathsep}{Path(__file__).parent}",
        )
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tasks", "-c", "4", "-l", "INFO", "-I", "tasks_probe"],
                cwd=self.log.parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> int:
        """SIGTERM to the process that was started; its exit status."""
        self._process.terminate()
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._client.close()
        self._evidence.close()

    def send(self, task: str, *args: Any, **options: Any) -> str:
        """Publish a task, by its name. Returns its id."""
        options.setdefault("task_id", str(uuid4()))
        return str(self._client.send_task(task, args, **options).id)

    def noted(self, what: str) -> Counter[str]:
        """How often which message "began" or "ended"."""
        return Counter(line.split()[1] for line in self._evidence.lrange(what, 0, -1))

    def runs(self, task: str) -> int:
        """How often a task of this name began."""
        return sum(line.split()[0] == task for line in self._evidence.lrange("began", 0, -1))

    def wait_began(self, *ids: str, times: int = 1) -> None:
        eventually(lambda: self._all(ids, "began", times), what="they begin")

    def wait_ended(self, *ids: str, times: int = 1) -> None:
        eventually(lambda: self._all(ids, "ended", times), what="they end")

    def wait_gone(self, *ids: str) -> None:
        """Until the broker has none of these, queued or unacknowledged."""
        eventually(
            lambda: not set(ids) & {message["headers"]["id"] for message in self.messages()},
            what="the broker is settled",
        )

    def wait_done(self, *ids: str, times: int = 1) -> None:
        """Until they have run to their end: a stall of the machine makes a try fail, and the task is sent anew."""
        self.wait_ended(*ids, times=times)
        self.wait_gone(*ids)

    def messages(self) -> list[dict[str, Any]]:
        """The messages that the broker has, queued or unacknowledged."""
        ask = self.servers.broker.command
        queued, unacked = ask("LRANGE", "celery", 0, -1), ask("HVALS", "unacked")
        return [*map(json.loads, queued), *(json.loads(noted)[0] for noted in unacked)]

    def _all(self, ids: tuple[str, ...], what: str, times: int) -> bool:
        assert self.running, "the worker has ended"
        noted = self.noted(what)
        return all(noted[i] >= times for i in ids)


def stored(gov: GovRedis, agent_id: str) -> list[Any]:
    """The discoveries of an agent, in the order they came."""
    sql = "SELECT discovery FROM discoveries WHERE agent_id = %s ORDER BY at"
    return [discovery for (discovery,) in gov.postgres.fetch(sql, (agent_id,))]
