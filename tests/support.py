"""Helpers that the tests of several rooms share: waiting for an outcome, threads, forked children, servers."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import socket
import subprocess
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn, TypeVar

import psycopg2
import pytest
from cluster_service import ClusterService, flush_node

from govredis import Config, GovRedis
from govredis._pool import Pool
from govredis.client import ClusterClient, RedisClient, RedisNode
from govredis.outbox import NodeLease
from govredis.testing.servers import PostgresServer, RedisSentinel, RedisServer

T = TypeVar("T")

#: Seconds after which something that never happens fails its test. A working test waits for none of them.
PATIENCE = 120.0

#: Timeouts for servers that are killed and do not hang: a machine that stalls makes no outage of a call.
PATIENT = {"socket_timeout": 10.0, "connect_timeout": 10.0, "postgres_timeout": 20.0}

#: Where nothing listens: connections are refused at once.
REDIS_AWAY = "redis://127.0.0.1:1/0"
POSTGRES_AWAY = "postgresql://postgres:secret@127.0.0.1:1/postgres"


def redis_of(gov: GovRedis) -> RedisNode:
    """Its client of Redis, of one server. The test is skipped on a Cluster."""
    client = gov.internal.context.redis
    if isinstance(client, ClusterClient):
        pytest.skip("asks for the client of one server")
    assert isinstance(client, RedisNode), "this GovRedis has its Redis disabled"
    return client


def client_of(gov: GovRedis) -> RedisClient:
    """Its client of Redis, be it one server or a Cluster."""
    client = gov.internal.context.redis
    assert client is not None, "this GovRedis has its Redis disabled"
    return client


def lease_of(gov: GovRedis) -> NodeLease:
    """Its freshness lease, of one server."""
    freshness = gov.internal.freshness
    assert freshness is not None, "this GovRedis has no Redis, or no PostgreSQL"
    return freshness.of(redis_of(gov))


_SENT_BY_SENTINELS = ("info", "ping", "publish", "subscribe", "replconf", "client|setname", "auth")
#: Commands in Redis's statistics that Sentinels and replicas send of themselves.
OF_SENTINELS = {f"cmdstat_{name}" for name in _SENT_BY_SENTINELS}


class SentinelService:
    """A primary that Sentinels name, in the place of a RedisServer: all but `url`, for govredis, is the primary's."""

    def __init__(self, group: RedisSentinel, url: str) -> None:
        self.primary = group.master
        self.url = url

    def __getattr__(self, name: str) -> Any:
        return getattr(self.primary, name)


def eventually(condition: Callable[[], T], within: float = PATIENCE, what: str = "the condition became true") -> T:
    """Polls until `condition()` is true, and returns it. Fails after `within` seconds, naming `what`.

    The longer it has waited the rarer it asks: a hundred questions a second to a server take a tenth of a core.
    """
    began = time.monotonic()
    while not (found := condition()):
        waited = time.monotonic() - began
        assert waited < within, f"not within {within:g} s: {what}"
        time.sleep(min(0.01 + waited / 20, 0.1))
    return found


class Background(threading.Thread):
    """`work` in a thread that has begun. `result()` waits for its value, or raises its error."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work, self._value, self._error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - for the caller
            self._error = error

    def result(self, within: float = PATIENCE / 2) -> Any:
        self.join(within)
        assert not self.is_alive(), f"it hangs: {self._work}"
        if self._error is not None:
            raise self._error
        return self._value


def in_threads(*calls: Callable[[], Any], within: float = PATIENCE / 2) -> list[Any]:
    """Runs the calls at the same time, each in a thread, and returns their results. Raises the first call's error."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    threads = [Background(partial(run, call)) for call in calls]
    return [thread.result(within) for thread in threads]


class Child:
    """`work` in a forked child process. `result()` waits for its value, and fails with its traceback if it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answer, write_end = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12+: there are other threads
            self.pid = os.fork()
        if not self.pid:
            self._work(work, write_end)
        os.close(write_end)

    @staticmethod
    def _work(work: Callable[[], Any], write_end: int) -> NoReturn:
        # A child that hangs ends, even where its parent has gone, and its stacks are in the report.
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(int(PATIENCE))
        try:
            try:
                told = True, work()
            except BaseException:  # noqa: BLE001 - for the parent
                told = False, traceback.format_exc()
            with open(write_end, "wb") as answer:
                answer.write(pickle.dumps(told))
        finally:
            os._exit(0)

    def result(self) -> Any:
        with open(self._answer, "rb") as answer:
            told = answer.read()
        os.waitpid(self.pid, 0)
        assert told, "the child hung, was killed, or returned something that cannot be pickled"
        worked, value = pickle.loads(told)
        assert worked, value
        return value

    def kill(self) -> None:
        """kill -9. Nothing to do the second time. `result()` has no value then."""
        if self._answer >= 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._answer)
            self._answer = -1


def in_child(work: Callable[[], Any]) -> Any:
    """Runs `work` in a forked child process, and returns its value."""
    return Child(work).result()


class Waits(threading.local):
    """The waits of this thread for sockets: connections that it tried, and the timeouts, in seconds, that ran out."""

    def __init__(self) -> None:
        self.connects = 0
        self.timeouts: list[float | None] = []


class WatchedSocket(socket.socket):
    """Notes in `waits`. A test puts it in the place of `socket.socket`, and reads the waits instead of a clock."""

    waits = Waits()

    def connect(self, address: Any) -> None:
        self.waits.connects += 1
        self._watched(super().connect, address)

    def sendall(self, *args: Any) -> None:
        self._watched(super().sendall, *args)

    def recv(self, *args: Any) -> bytes:
        return self._watched(super().recv, *args)

    def recv_into(self, *args: Any) -> int:
        return self._watched(super().recv_into, *args)

    def _watched(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args)
        except TimeoutError:
            self.waits.timeouts.append(self.gettimeout())
            raise


def wait_at_most(client: RedisNode, seconds: float) -> None:
    """From now on the client waits so long for an answer.

    A client of a server that will hang gets a short timeout only then. Before that and after it, a stall of the machine
    would be an outage.
    """
    client._timeout = client._options["socket_timeout"] = seconds
    for connection in [*client._pool.idle]:
        connection._sock.settimeout(seconds)


@contextlib.contextmanager
def hung(server: RedisServer, client: RedisNode) -> Iterator[None]:
    """In the body the server hangs, and the client waits for a second."""
    patient = client._timeout
    wait_at_most(client, 1)
    server.pause()
    try:
        yield
    finally:
        wait_at_most(client, patient)
        server.resume()


class Gate:
    """An event of several processes: a child that is forked later shares it."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0)

    def open(self) -> None:
        os.eventfd_write(self._descriptor, 1)

    def wait(self) -> None:
        """Returns once it is open."""
        assert select.select([self._descriptor], [], [], PATIENCE)[0], "the other process never opened the gate"

    def __del__(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def all_in_use(*pools: Pool[Any]) -> Iterator[None]:
    """All connections of these pools are in use. A caller waits a tenth of a second for one, whatever the timeouts.

    So the timeouts themselves can be long, and a machine that stalls makes no outage.
    """
    with contextlib.ExitStack() as stack:
        for pool in pools:
            for _ in range(pool._bound):
                stack.callback(pool.give, pool.take(20))
            stack.callback(vars(pool).pop, "take")
            vars(pool)["take"] = partial(_take_soon, pool.take)
        yield


def _take_soon(take: Callable[..., T], wait: float, connecting: float = 0.0) -> T:
    return take(min(wait, 0.1), connecting)


@contextlib.contextmanager
def migrated_postgres() -> Iterator[PostgresServer]:
    """A new PostgreSQL server that has our tables."""
    with PostgresServer() as server:
        with GovRedis(Config(redis_enabled=False, database_url=server.url)) as gov:
            gov.postgres.migrate()
        _keep_password_cheaply(server.url)
        yield server


def _keep_password_cheaply(url: str) -> None:
    """The 4096 iterations over a password take half of a login's CPU. Before PostgreSQL 16 their number is fixed."""
    with contextlib.closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        if connection.server_version < 160000:
            return
        cursor.execute("SET scram_iterations = 1")
        cursor.execute("ALTER ROLE CURRENT_USER PASSWORD %s", [connection.info.password])


@contextlib.contextmanager
def copied_postgres(stopped: PostgresServer, config: Iterable[str] = ()) -> Iterator[PostgresServer]:
    """A PostgreSQL server that begins with the data of one that is stopped: `initdb` takes over a second of CPU."""
    with contextlib.closing(PostgresServer(config=config)) as server:
        subprocess.run(["cp", "-a", f"{stopped.folder}/.", str(server.folder)], check=True)
        yield server.start()


#: All tables whose rows tests write. The outbox goes last: it takes note of deletions.
TABLES = [
    *("govredis_limit_windows", "govredis_limit_counters", "govredis_agents", "govredis_health_snapshots"),
    "govredis_health_hours",
    *("govredis_sessions", "govredis_session_agents", "govredis_outbox", "govredis_epochs", "govredis_events"),
    *("govredis_account", "govredis_outages"),
]


def empty(connection: Any) -> None:
    """Empties all tables once nobody else is at them.

    As TRUNCATE does, which makes new files for each table and index: for a few rows that takes fifty times as long.
    """
    with connection, connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {', '.join(TABLES)} IN ACCESS EXCLUSIVE MODE")
        cursor.execute("; ".join(f"DELETE FROM {table}" for table in TABLES))


def flush(server: RedisServer | ClusterService) -> None:
    """Deletes all keys and scripts."""
    server.flush() if isinstance(server, ClusterService) else flush_node(server)
