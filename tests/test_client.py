"""RedisNode on real Redis: up, refused, hung, restarted, interrupted, forked."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from support import PATIENCE, Background, Child, WatchedSocket, eventually, hung, in_child, in_threads

from govredis import BackendError, BackendUnavailable, Config, ConfigurationError
from govredis.client import RedisNode, Script, commands
from govredis.client import node as client_module
from govredis.testing.servers import RedisServer

MakeClient = Callable[..., RedisNode]

#: A script of two reads and a write, with a name of its own per test: its SHA is unknown to the server.
SOURCE = "redis.call('SET', KEYS[1], ARGV[1]) return redis.call('GET', KEYS[1])"


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    made: list[RedisNode] = []

    def make(server: RedisServer, **settings: Any) -> RedisNode:
        patient = {"socket_timeout": PATIENCE / 2, "connect_timeout": PATIENCE / 2}
        client = RedisNode(Config(**{"redis_url": server.url, **patient, **settings}))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(redis_server: RedisServer, make_client: MakeClient) -> RedisNode:
    return make_client(redis_server)


def script(source: str = SOURCE) -> Script:
    """A Script from its source: real ones come from files."""
    made = Script("govredis.limits", "window.lua")
    made.source = source
    import hashlib

    made.sha = hashlib.sha1(source.encode()).hexdigest()
    return made


def test_the_file_of_a_script_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Script("govredis.limits", "window.lua")
    monkeypatch.delattr(commands, "files")
    again = Script("govredis.limits.backends", "window.lua")
    assert (again.source, again.sha) == (first.source, first.sha)


def works(client: RedisNode) -> bool:
    try:
        return bool(client.call("PING") == b"PONG")
    except BackendUnavailable:
        return False


def connections(server: RedisServer) -> list[dict[str, str]]:
    """The clients that the server sees, the one asking excepted."""
    lines = server.command("CLIENT", "LIST")
    if isinstance(lines, str):
        lines = [dict(word.split("=", 1) for word in line.split(" ")) for line in lines.splitlines()]
    return [c for c in lines if c["cmd"] != "client" and not c["cmd"].startswith("client|")]


# -- calls


def test_replies_are_resp2_and_bytes(client: RedisNode) -> None:
    assert client.call("SET", "k", "é") == b"OK"
    assert client.call("GET", "k") == "é".encode()
    assert client.call("GET", "nothing") is None
    assert client.call("INCRBY", "n", 5) == 5
    assert client.call("RPUSH", "l", "a", b"\xff", 3, 0.5) == 4
    assert client.call("LRANGE", "l", 0, -1) == [b"a", b"\xff", b"3", b"0.5"]
    assert client.call("CONFIG", "GET", "maxmemory") == [b"maxmemory", b"0"]  # RESP3 would make it a map


def test_a_connection_costs_no_round_trips_of_its_own(redis_server: RedisServer, client: RedisNode) -> None:
    before = redis_server.command("INFO", "stats")
    client.call("PING")
    client.call("PING")
    after = redis_server.command("INFO", "stats")

    def total(info: Any, name: str) -> int:
        return int(info[name] if isinstance(info, dict) else re.search(rf"{name}:(\d+)", info)[1])  # type: ignore[index]

    # The second INFO's connection sends what redis-py sends on connecting, before it asks.
    commands = total(after, "total_commands_processed") - total(before, "total_commands_processed")
    with_nothing = redis_server.command("INFO", "stats")
    overhead = total(with_nothing, "total_commands_processed") - total(after, "total_commands_processed")
    assert commands - overhead == 2


def test_a_script_runs_and_comes_back_after_a_flush(redis_server: RedisServer, client: RedisNode) -> None:
    ours = script()
    assert client.run(ours, ("k",), "one") == b"one"
    assert redis_server.command("SCRIPT", "EXISTS", ours.sha) in ([1], [True])
    redis_server.command("SCRIPT", "FLUSH")
    assert client.run(ours, ("k",), "two") == b"two"
    assert client.run(ours, ("k",), "three") == b"three"
    assert len(client._pool.live) == 1


def test_scripts_in_a_pipeline_come_back_after_a_flush(redis_server: RedisServer, client: RedisNode) -> None:
    one, other = script(), script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    for n in range(1, 4):
        redis_server.command("SCRIPT", "FLUSH")
        replies = client.pipeline(
            [("SET", "plain", n), one.call(("k",), (n,)), other.call((f"n{n}",), (5,)), ("GET", "plain")], (one, other)
        )
        assert replies == [b"OK", str(n).encode(), 5, str(n).encode()]


def test_a_source_is_sent_once_for_all_calls_of_its_script(
    redis_server: RedisServer, client: RedisNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = script(), script("return ARGV[1]")
    sent: list[bytes] = []
    exchange = client._exchange
    monkeypatch.setattr(client, "_exchange", lambda *a: sent.append(a[2]) or exchange(*a))  # type: ignore[func-returns-value]
    commands = [(ours if n % 2 else other).call(("k",), (str(n),)) for n in range(10)]
    assert client.pipeline(commands, [ours, other]) == [str(n).encode() for n in range(10)]
    assert len(sent) == 2
    assert [sent[1].count(each.source.encode()) for each in (ours, other)] == [1, 1]
    assert sent[1].count(b"EVALSHA") == 8


def test_a_script_that_was_not_named_is_an_error_and_not_a_private_one(client: RedisNode) -> None:
    with pytest.raises(BackendError):
        client.pipeline([script("return 'never loaded'").call((), ())])


def test_an_empty_pipeline_asks_nothing(client: RedisNode) -> None:
    assert client.pipeline([]) == []
    assert not client._pool.live


def test_a_pipeline_reads_all_replies_before_it_raises(client: RedisNode) -> None:
    client.call("SET", "text", "x")
    for _ in range(3):
        with pytest.raises(BackendError, match=r"WRONGTYPE"):
            client.pipeline([("SET", "a", 1), ("LPUSH", "text", 1), ("NOSUCHCOMMAND",), ("INCR", "count")])
        assert client.call("ECHO", "in step") == b"in step"
    assert client.call("GET", "count") == b"3"
    assert len(client._pool.live) == 1


def test_in_a_pipeline_each_may_fail_alone(redis_server: RedisServer, client: RedisNode) -> None:
    client.call("SET", "text", "x")
    one = script()
    for _ in range(2):
        redis_server.command("SCRIPT", "FLUSH")
        replies = client.pipeline([("LPUSH", "text", "1"), one.call(("k",), ("v",)), ("NO",)], (one,), each=True)
        assert [isinstance(reply, BackendError) for reply in replies] == [True, False, True]
        assert not any(isinstance(reply, BackendUnavailable) for reply in replies)
        assert "WRONGTYPE" in str(replies[0])
        assert client.call("ECHO", "in step") == b"in step"
    redis_server.command("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(BackendUnavailable, match=r"cannot serve: .*maxmemory"):
            client.pipeline([("LPUSH", "text", "1"), ("SET", "k", "v")], each=True)
    finally:
        redis_server.command("CONFIG", "SET", "maxmemory", "0")


def test_a_script_file_is_read_with_its_sha() -> None:
    ours = Script("govredis.limits", "window.lua")
    assert len(ours.sha) == 40
    assert ours.call(("k", "l"), ("1", "a")) == ("EVALSHA", ours.sha, "2", "k", "l", "1", "a")


# -- settings


def test_unix_sockets_and_databases(redis_binary: str, make_client: MakeClient) -> None:
    with RedisServer(binary=redis_binary, unix_socket=True) as server:
        client = make_client(server, redis_url=server.url.replace("db=0", "db=3"))
        client.call("SET", "k", "in 3")
        assert make_client(server).call("GET", "k") is None
        assert str(server.folder) in client.name
        server.kill()
        with pytest.raises(BackendUnavailable, match=r"is away"):
            client.call("GET", "k")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://:hunter2@h/0?db=zero", "'db'"),
        ("redis://:hunter2@h/0?foo=1", "'foo'"),
        ("redis://:hunter2@h/0?max_connections=5", "'max_connections'"),
        ("unix:///s?password=hunter2&foo=1", "'foo'"),
    ],
)
def test_a_parameter_that_is_none_is_refused_before_anything_is_sent(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^REDIS_URL is .*{problem}") as caught:
        RedisNode(Config(redis_url=url))
    assert "hunter2" not in str(caught.value)


def test_timeouts_in_the_url_count_and_its_protocol_does_not(
    redis_server: RedisServer, make_client: MakeClient
) -> None:
    url = redis_server.url + "?protocol=3&decode_responses=True&socket_timeout=77&health_check_interval=1"
    client = make_client(redis_server, redis_url=url, socket_timeout=Config().socket_timeout)
    assert client.call("CONFIG", "GET", "maxmemory") == [b"maxmemory", b"0"]
    assert client._pool.idle[0]._sock.gettimeout() == 77


# -- error answers


def test_an_error_answer_is_a_backend_error_and_the_connection_goes_on(client: RedisNode) -> None:
    client.call("SET", "text", "x")
    for _ in range(5):
        with pytest.raises(BackendError, match=r"^Redis at 127.0.0.1:\d+ answered: WRONGTYPE ") as caught:
            client.call("LPUSH", "text", 1)
        assert not isinstance(caught.value, BackendUnavailable)
        with pytest.raises(BackendError, match=r"answered: .*unknown command"):
            client.call("NOSUCHCOMMAND")
        with pytest.raises(BackendError, match=r"answered: "):
            client.run(script("return redis.call('LPUSH', KEYS[1], 1)"), ("text",))
    assert client.call("GET", "text") == b"x"
    assert len(client._pool.live) == len(client._pool.idle) == 1
    assert client.breaker.closed


def refused_in_every_way(client: RedisNode, why: str) -> None:
    """A write is BackendUnavailable, alone, in a pipeline and in a script; reads work; the breaker stays closed."""
    writer = script("redis.call('SET', KEYS[1], ARGV[1])")
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match=rf"cannot serve: .*{why}"):
            client.call("SET", "k", "v" * 100)
        with pytest.raises(BackendUnavailable, match=rf"cannot serve: .*{why}"):
            client.pipeline([("GET", "k"), ("SET", "k", "v")])
        with pytest.raises(BackendUnavailable, match=rf"cannot serve: .*{why}"):
            client.run(writer, ("k",), "v")
        assert client.call("GET", "k") is None
    assert client.breaker.closed


class Handle:
    pass


@pytest.mark.parametrize("what", ["call", "script", "pipeline", "in a transaction", "second sending"])
def test_an_error_keeps_nothing_of_those_who_called(redis_server: RedisServer, client: RedisNode, what: str) -> None:
    """A lock's handle, say: it is collected when its owner lets go of it, not when the collector next runs."""
    wrong = "INCR", "text"
    asked: dict[str, Callable[[], Any]] = {
        "call": lambda: client.call(*wrong),
        "script": lambda: client.run(script(), ("k",), "one"),
        "pipeline": lambda: client.pipeline([wrong]),
        "in a transaction": lambda: client.pipeline([("MULTI",), ("GET",), ("EXEC",)]),
        "second sending": lambda: client.call("PING"),
    }
    client.call("SET", "text", "x")

    def caller() -> weakref.ref[Handle]:
        handle = Handle()
        try:
            asked[what]()
        except BackendError:
            pass
        return weakref.ref(handle)

    with redis.Redis.from_url(redis_server.url) as other:
        other.script_flush()
        if what == "second sending":
            other.execute_command("CLIENT", "KILL", "TYPE", "normal")
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
    assert client.resends() == (what == "second sending")


def test_out_of_memory(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    mortal_redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    mortal_redis.command("CONFIG", "SET", "maxmemory", 1)
    refused_in_every_way(client, "maxmemory")
    mortal_redis.command("CONFIG", "SET", "maxmemory", 0)
    assert client.call("SET", "k", "v") == b"OK"


def test_a_replica_and_one_promoted_again(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    client.call("PING")
    mortal_redis.command("REPLICAOF", "127.0.0.1", 1)
    refused_in_every_way(client, "read only replica")
    before = {c["id"] for c in connections(mortal_redis)}
    with pytest.raises(BackendUnavailable):
        client.call("SET", "k", "v")
    assert client.call("GET", "k") is None
    assert {c["id"] for c in connections(mortal_redis)}.isdisjoint(before)  # the name may point elsewhere by now
    mortal_redis.command("REPLICAOF", "NO", "ONE")
    assert client.call("SET", "k", "v") == b"OK"


def test_a_replica_that_may_not_serve_what_it_has(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    mortal_redis.command("CONFIG", "SET", "replica-serve-stale-data", "no")
    mortal_redis.command("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(BackendUnavailable, match=r"cannot serve: Link with MASTER is down"):
        client.call("GET", "k")


def test_a_failed_snapshot(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    mortal_redis.command("CONFIG", "SET", "save", "3600 1")
    shutil.rmtree(mortal_redis.folder / "data")
    mortal_redis.command("BGSAVE")
    eventually(lambda: "rdb_last_bgsave_status:err" in client.call("INFO", "persistence").decode())
    refused_in_every_way(client, "MISCONF")
    mortal_redis.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
    assert client.call("SET", "k", "v") == b"OK"


def test_loading(redis_binary: str, make_client: MakeClient) -> None:
    slow = ["key-load-delay 400000", "rdbcompression no"]  # it looks up from loading every 2 MB
    with RedisServer(binary=redis_binary, config=slow) as server:
        client = make_client(server)
        value = "v" * 2_500_000
        client.pipeline([("SET", f"k{n}", value) for n in range(8)])
        server.command("SAVE")
        server.kill()
        with ThreadPoolExecutor(1) as pool, redis.Redis.from_url(server.url) as plain:
            starting = pool.submit(server.start)

            def loading() -> bool:
                try:
                    return not plain.ping()
                except redis.BusyLoadingError:
                    return True
                except redis.ConnectionError:
                    return False

            eventually(loading, 60)
            # The pooled connection is dead, so this connects anew, and is told.
            with pytest.raises(BackendUnavailable, match=r"loading"):
                client.call("GET", "k1")
            assert not client.breaker.closed  # at once: it answers PING in the same way
            starting.result()
        eventually(lambda: client.breaker.closed, 60)
        assert client.breaker.times_opened == 1
        assert client.call("GET", "k1") == value.encode()


def test_a_wrong_password_is_a_mistake_and_not_an_outage(redis_binary: str, make_client: MakeClient) -> None:
    with RedisServer(binary=redis_binary, config=["requirepass right"]) as server:
        for url in (server.url, server.url.replace("//", "//:hunter2@"), server.url.replace("//", "//ann:hunter2@")):
            client = make_client(server, redis_url=url)
            for _ in range(3):
                with pytest.raises(BackendError) as caught:
                    client.call("GET", "k")
                assert not isinstance(caught.value, BackendUnavailable)
                assert "hunter2" not in str(caught.value)
            assert client.breaker.closed
        assert works(make_client(server, redis_url=server.url.replace("//", "//:right@")))


def test_a_mistake_is_seen_after_an_outage_too(redis_binary: str, make_client: MakeClient) -> None:
    """A Redis that comes back with another password, or with a user who may not PING, is back."""
    rules = "user ann on >pw ~* +get +set"
    with RedisServer(binary=redis_binary, config=["requirepass right", rules]) as server:
        wrong = make_client(server, redis_url=server.url.replace("//", "//:hunter2@"))
        no_ping = make_client(server, redis_url=server.url.replace("//", "//ann:pw@"))
        assert no_ping.call("SET", "k", "v") == b"OK"
        for client in (wrong, no_ping):
            client.breaker.trip("a test")
            eventually(lambda: client.breaker.closed)  # noqa: B023
        with pytest.raises(BackendError, match=r"rejected our credentials"):
            wrong.call("GET", "k")
        assert no_ping.call("GET", "k") == b"v"


def test_too_many_clients(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    holder, client = make_client(mortal_redis), make_client(mortal_redis)
    holder.call("PING")
    holder.call("CONFIG", "SET", "maxclients", 1)
    with pytest.raises(BackendUnavailable, match=r"max number of clients"):
        client.call("PING")
    assert not client.breaker.closed
    holder.call("CONFIG", "SET", "maxclients", 100)
    eventually(lambda: works(client))


def test_a_server_that_speaks_something_else(make_client: MakeClient) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                with listener.accept()[0] as peer:
                    peer.recv(1000)
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        client = RedisNode(
            Config(redis_url=f"redis://127.0.0.1:{listener.getsockname()[1]}/0", socket_timeout=PATIENCE)
        )

        def ask() -> None:
            for _ in range(2):
                with pytest.raises(BackendError, match=r"does not speak Redis") as caught:
                    client.call("PING")
                assert not isinstance(caught.value, BackendUnavailable)

        in_threads(serve, ask)
        assert not client._pool.idle


def test_a_full_pool(redis_server: RedisServer, make_client: MakeClient) -> None:
    client = make_client(redis_server, redis_connections=1)
    client._for_place = 1
    held = client._pool.take(1)
    with pytest.raises(BackendUnavailable, match=r"all 1 connections to Redis at .* are in use"):
        client.call("PING")
    assert client.breaker.closed  # ours, not Redis's fault
    client._pool.give(held)
    assert works(client)


# -- dead connections


def test_a_killed_connection_is_invisible_to_the_caller(redis_server: RedisServer, client: RedisNode) -> None:
    def kill() -> None:
        redis_server.command("CLIENT", "KILL", "TYPE", "normal")

    for n in range(1, 6):
        kill()
        assert client.call("INCR", "n") == n
        kill()
        assert client.pipeline([("ECHO", n), ("GET", "n")]) == [str(n).encode()] * 2
        kill()
        assert client.run(script(), ("k",), n) == str(n).encode()
    assert client.breaker.closed
    assert client.breaker.refusals == 0


def test_all_pooled_connections_are_replaced_after_a_restart(
    mortal_redis: RedisServer, make_client: MakeClient
) -> None:
    client = make_client(mortal_redis)
    held = [client._pool.take(1) for _ in range(5)]
    for connection in held:
        client._open(connection)
        client._pool.give(connection)
    mortal_redis.restart(data="empty")
    assert client.call("INCR", "n") == 1
    assert [c is None for c in (connection._sock for connection in held)] == [True] * 5
    assert client.breaker.closed


def test_a_command_that_timed_out_is_not_sent_again(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    client.call("SET", "n", 0)
    with hung(mortal_redis, client), pytest.raises(BackendUnavailable, match=r"Timeout"):
        client.call("INCR", "n")
    eventually(lambda: works(client))
    assert client.call("GET", "n") == b"1"  # once: a hung server executes it on waking


def test_a_command_that_timed_out_on_a_new_connection_is_not_sent_again(
    mortal_redis: RedisServer, make_client: MakeClient
) -> None:
    client = make_client(mortal_redis)
    with hung(mortal_redis, client), pytest.raises(BackendUnavailable):
        client.pipeline([("INCR", "n"), ("INCR", "n")])
    eventually(lambda: works(client))
    assert client.call("GET", "n") == b"2"


# -- Redis away


def test_refused(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    mortal_redis.kill()
    client = make_client(mortal_redis, socket_timeout=10 * PATIENCE, connect_timeout=10 * PATIENCE)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"^Redis at 127.0.0.1:\d+ is away: "):
        client.call("PING")
    assert client.breaker.closed
    with pytest.raises(BackendUnavailable):
        client.call("PING")
    assert not client.breaker.closed
    assert time.monotonic() - began < PATIENCE  # neither retries nor waits: either timeout would be more
    sent = client._pool
    sent._connect = lambda _: pytest.fail("an open breaker does not connect")  # type: ignore[method-assign]
    for _ in range(1000):
        with pytest.raises(BackendUnavailable):
            client.call("PING")


def test_hung_no_call_started_after_the_first_timeout_pays_one(
    mortal_redis: RedisServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, opened = threading.Barrier(4), threading.Event()
    hangs = False

    class Socket(WatchedSocket):
        def recv_into(self, *args: Any) -> int:
            if hangs and not opened.is_set():
                under_way.wait(PATIENCE)  # the first timeout runs out when all of them have asked
            return super().recv_into(*args)

    monkeypatch.setattr(socket, "socket", Socket)
    client = make_client(mortal_redis)
    client.call("PING")

    def use() -> tuple[int, int]:
        """The timeouts that ran out in this thread: before one had, and after that."""
        timeouts = WatchedSocket.waits.timeouts
        while not opened.is_set():
            with pytest.raises(BackendUnavailable):
                client.call("PING")
            before = len(timeouts)
            opened.set()
        for _ in range(1000):
            with pytest.raises(BackendUnavailable):
                client.call("PING")
        return before, len(timeouts) - before

    with hung(mortal_redis, client):
        hangs = True
        # Those that were under way have waited.
        assert in_threads(*[use] * 4) == [(1, 0)] * 4
        assert client.breaker.times_opened == 1


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_back_in_use_soon_after_it_is_back(how: str, mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    breaker, begun = client.breaker, []
    probe = breaker._probe
    breaker._probe = lambda: begun.append(1) or probe()  # type: ignore[func-returns-value]
    for _ in range(2):
        client.call("PING")
        if how == "killed":
            mortal_redis.kill()
            eventually(lambda: not works(client) and not breaker.closed)
            mortal_redis.start()
        else:
            with hung(mortal_redis, client):
                eventually(lambda: not works(client) and not breaker.closed)
        begun.clear()
        assert breaker._next_probe - breaker._clock() < 0.5
        eventually(lambda: works(client))
        assert len(begun) <= 1, "its first probe finds it back"


def test_one_warning_and_one_info_per_outage(
    mortal_redis: RedisServer, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "govredis")
    url = mortal_redis.url.replace("//", "//:hunter2@")
    mortal_redis.command("CONFIG", "SET", "requirepass", "hunter2")
    client = make_client(mortal_redis, redis_url=url)
    client.call("PING")
    mortal_redis.kill()
    for _ in range(10):
        assert not works(client)
    mortal_redis.start()
    eventually(lambda: client.breaker.closed)
    eventually(
        lambda: [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    )  # it closes first, and then says so
    assert "hunter2" not in caplog.text


# -- recovery


class Outage:
    """A Redis that is away for a client that knows it."""

    def __init__(self, server: RedisServer, client: RedisNode) -> None:
        self.server, self.client = server, client
        server.kill()
        eventually(lambda: not works(client) and not client.breaker.closed)


def test_replays_run_before_anybody_elses_command(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    entered, go = threading.Event(), threading.Event()

    def replay(redis: RedisNode) -> None:
        redis.call("RPUSH", "order", "replay 1")
        entered.set()
        go.wait(20)
        redis.pipeline([("RPUSH", "order", "replay 2")])
        redis.run(script("return redis.call('RPUSH', KEYS[1], ARGV[1])"), ("order",), "replay 3")

    client.on_recovery(replay)
    Outage(mortal_redis, client)
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            try:
                client.call("RPUSH", "order", "other")
            except BackendUnavailable:
                time.sleep(0.0005)

    def direct() -> None:
        try:
            mortal_redis.start()
            assert entered.wait(20)
            time.sleep(0.3)  # time for the others to do wrong
            go.set()
            eventually(lambda: client.breaker.closed)
            eventually(lambda: client.call("LLEN", "order") > 10)
        finally:
            stop.set()
            go.set()

    in_threads(others, others, others, direct)
    order = client.call("LRANGE", "order", 0, -1)
    assert order[:3] == [b"replay 1", b"replay 2", b"replay 3"]
    assert set(order[3:]) == {b"other"}


def test_after_replay_soon_the_replays_come_first(redis_server: RedisServer, client: RedisNode) -> None:
    """Others wait for them; Redis is not away."""
    pending = ["one"]

    def replay(redis: RedisNode) -> None:
        while pending:
            redis.call("RPUSH", "told", pending[-1])
            pending.pop()

    client.on_recovery(replay)
    client.call("PING")
    client.replay_soon("writes are pending")
    eventually(lambda: works(client))  # at once, but on a machine that is busy for a quarter of a second
    assert client.call("LRANGE", "told", 0, -1) == [b"one"]
    assert client.breaker.times_opened == 1


def test_while_the_replays_run_nobody_else_uses_redis(redis_server: RedisServer, client: RedisNode) -> None:
    running, go_on = threading.Event(), threading.Event()
    client.on_recovery(lambda _: (running.set(), go_on.wait(20)))
    client.call("PING")
    client.replay_soon("writes are pending")
    assert running.wait(20)
    with pytest.raises(BackendUnavailable, match=r"writes are pending"):
        client.call("PING")
    go_on.set()
    eventually(lambda: works(client))


def test_a_replay_that_finds_redis_unavailable_keeps_it_closed_to_all(client: RedisNode) -> None:
    runs: list[bool] = []

    def replay(redis: RedisNode) -> None:
        runs.append(client.breaker.closed)
        if len(runs) < 3:
            raise BackendUnavailable("gone again")

    client.on_recovery(replay)
    client.breaker.trip("a test")
    eventually(lambda: client.breaker.reason == "gone again")
    eventually(lambda: works(client))
    assert runs == [False] * 3


def test_another_error_of_a_replay_is_logged_and_harms_nobody(
    client: RedisNode, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    def broken(redis: RedisNode) -> None:
        redis.call("SET", "text", "x")
        redis.call("LPUSH", "text", 1)

    client.on_recovery(broken)
    client.on_recovery(lambda redis: ran.append(redis))
    client.breaker.trip("a test")
    eventually(lambda: works(client))
    assert ran == [client]
    assert sum("a replay on Redis at" in r.getMessage() for r in caplog.records) == 1


def test_a_caller_that_was_under_way_does_not_overtake_the_replays(
    mortal_redis: RedisServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds its connection dead, and the breaker opened meanwhile: it is not sent again."""
    client = make_client(mortal_redis)
    client.call("PING")
    connection = client._pool.idle[-1]
    send = connection.send_packed_command

    def overtaken(*args: Any) -> Any:
        client.breaker._threads = False  # no probe before we look
        client.breaker.trip("writes are pending")
        at = client.breaker._clock()
        monkeypatch.setattr(client.breaker, "_clock", lambda: at)  # nor an overdue one
        mortal_redis.restart(data="empty")
        return send(*args)

    connection.send_packed_command = overtaken
    with pytest.raises(BackendUnavailable, match=r"writes are pending"):
        client.call("SET", "k", "v")
    assert mortal_redis.command("GET", "k") is None


# -- interruption


class Struck(BaseException):
    """The exception that the signal handler raises, as KeyboardInterrupt or a soft time limit would be."""


STRIKES = 10_000


# A socket that redis-py had opened and not noted yet when it was struck: Python closes it, and says so.
@pytest.mark.usefixtures("destructors_struck")
def test_a_signal_at_any_point_gives_nobody_anothers_reply(redis_server: RedisServer, make_client: MakeClient) -> None:
    """10,000 exceptions raised at random points of calls, while two threads use the same client."""
    client = make_client(redis_server, redis_connections=8)
    ours = script("return ARGV[1]")
    client.run(ours, (), "loaded")
    armed = False
    stop = threading.Event()
    served = itertools.count()

    def strike(*_: Any) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Struck

    def ask(text: str, way: int) -> None:
        wanted = text.encode()
        if way == 0:
            assert client.call("ECHO", text) == wanted
        elif way == 1:
            assert client.pipeline([("ECHO", text), ("ECHO", text + "!")]) == [wanted, wanted + b"!"]
        else:
            assert client.run(ours, (), text) == wanted

    def load(thread: int) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            ask(f"{thread}:{n}", n % 3)
            next(served)
            time.sleep(0.002)

    def strikes() -> None:
        nonlocal armed
        struck = 0
        for n in itertools.count():
            if struck >= STRIKES:
                return
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))
                ask(f"main:{n}", n % 3)
                armed = False
            except Struck:
                struck += 1

    errors: list[BaseException] = []

    def loading(thread: int) -> None:
        try:
            load(thread)
        except BaseException as error:  # noqa: BLE001 - for the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=loading, args=(t,)) for t in range(2)]
    previous = signal.signal(signal.SIGALRM, strike)
    try:
        for thread in threads:
            thread.start()
        strikes()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not errors, errors[0]
    assert next(served) > 100
    assert client.call("ECHO", "after") == b"after"
    assert sum(1 for _ in client._pool.live) <= 8
    # Every place is still there to be had. A cycle may hold some until it is collected.
    gc.collect()
    held = [client._pool.take(5) for _ in range(8)]
    for connection in held:
        client._pool.give(connection)
    eventually(lambda: len(connections(redis_server)) <= 8)
    assert client.breaker.closed


def test_an_exception_between_send_and_read_costs_the_connection(client: RedisNode) -> None:
    client.call("SET", "k", "somebody's")
    connection = client._pool.idle[-1]
    read = connection.read_response

    def interrupted() -> Any:
        connection.read_response = read
        raise Struck

    connection.read_response = interrupted
    with pytest.raises(Struck):
        client.call("GET", "k")
    assert connection._sock is None
    assert client.call("ECHO", "mine") == b"mine"
    assert client._pool.idle[-1] is not connection


def test_an_exception_in_the_middle_of_a_pipelines_replies(client: RedisNode) -> None:
    client.call("PING")
    connection = client._pool.idle[-1]
    read, replies = connection.read_response, itertools.count()

    def interrupted() -> Any:
        if next(replies) == 1:
            raise Struck
        return read()

    connection.read_response = interrupted
    with pytest.raises(Struck):
        client.pipeline([("ECHO", n) for n in range(3)])
    assert client.pipeline([("ECHO", n) for n in range(3)]) == [b"0", b"1", b"2"]
    assert connection._sock is None


# -- threads, processes, descriptors


def test_fifty_threads_share_one_client(redis_server: RedisServer, make_client: MakeClient) -> None:
    client = make_client(redis_server, redis_connections=20, socket_timeout=20)
    barrier = threading.Barrier(50)

    def use(thread: int) -> None:
        barrier.wait(20)
        for n in range(30):
            text = f"{thread}:{n}".encode()
            assert client.call("ECHO", text) == text
            assert client.pipeline([("ECHO", text), ("INCR", "n")])[0] == text

    in_threads(*[lambda t=t: use(t) for t in range(50)])  # type: ignore[misc]
    assert client.call("GET", "n") == b"1500"
    assert len(connections(redis_server)) <= 20


def hammer(client: RedisNode, who: str, rounds: int = 200) -> None:
    ours = script("return ARGV[1]")
    for n in range(rounds):
        text = f"{who}:{n}".encode()
        assert client.call("ECHO", text) == text
        assert client.pipeline([("ECHO", text), ("INCR", "count"), ("ECHO", text)])[::2] == [text, text]
        assert client.run(ours, (), text) == text


def test_parent_and_children_work_on_after_a_fork(redis_server: RedisServer, client: RedisNode) -> None:
    in_threads(*[lambda: client.call("PING")] * 4)
    before = {c["id"] for c in connections(redis_server)}
    children = [Child(lambda n=n: hammer(client, f"child {n}")) for n in range(3)]  # type: ignore[misc]
    hammer(client, "parent")
    for child in children:
        child.result()
    hammer(client, "parent again")
    assert client.call("GET", "count") == b"1000"
    assert before == {c["id"] for c in connections(redis_server)}  # the parent's are the ones it had


@pytest.mark.parametrize("ending", ["exits", "closes", "collects"])
def test_a_child_does_not_disturb_the_parents_sockets(
    ending: str, redis_server: RedisServer, client: RedisNode
) -> None:
    client.call("PING")
    socket_before = client._pool.idle[-1]._sock
    inherited = client._pool.idle[-1]

    def child() -> None:
        nonlocal inherited
        if ending == "closes":
            client.call("PING")
            client.close()
        elif ending == "collects":
            del inherited

    in_child(child)
    assert client.call("ECHO", "still") == b"still"
    assert client._pool.idle[-1]._sock is socket_before


def test_a_child_forked_by_multiprocessing_has_no_descriptor_of_its_parent(client: RedisNode) -> None:
    used = client._pool.take(1)
    used.connect()
    client.call("PING")  # and an idle one
    descriptors = [connection._sock.fileno() for connection in (used, *client._pool.idle)]
    assert len(descriptors) == 2
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def links() -> list[str]:
        folder = Path("/proc/self/fd")
        return [os.readlink(folder / str(d)) for d in descriptors if os.path.lexists(folder / str(d))]

    process = context.Process(target=lambda: found.put(links()))
    process.start()
    assert not set(found.get()) & set(links())
    process.join(20)
    assert used._sock is not None


def test_a_child_waits_for_nothing_of_its_parents(redis_server: RedisServer, make_client: MakeClient) -> None:
    client = make_client(redis_server, redis_connections=1)
    held = client._pool.take(1)
    with client._pool._counting:  # another thread was taking one when we forked
        child = Child(lambda: client.call("PING"))
    assert child.result() == b"PONG"
    client._pool.give(held)


def test_a_child_forked_while_redis_is_away_finds_it_back(mortal_redis: RedisServer, make_client: MakeClient) -> None:
    client = make_client(mortal_redis)
    Outage(mortal_redis, client)
    mortal_redis.start()
    in_child(lambda: eventually(lambda: works(client)))
    eventually(lambda: works(client))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_close_gives_everything_back(redis_server: RedisServer, make_client: MakeClient) -> None:
    threads_before, before = set(threading.enumerate()), descriptors()
    for _ in range(20):
        client = RedisNode(Config(redis_url=redis_server.url, socket_timeout=PATIENCE / 2))
        in_threads(*[lambda c=client: c.call("PING")] * 3)  # type: ignore[misc]
        client.breaker.trip("a test")
        client.close()
        client.close()
    assert descriptors() == before
    assert set(threading.enumerate()) <= threads_before
    eventually(lambda: not connections(redis_server))


def test_a_closed_client_reconnects_if_it_is_used_again(client: RedisNode) -> None:
    client.call("PING")
    client.close()
    assert works(client)


def test_a_client_dropped_without_close_leaves_nothing(redis_server: RedisServer) -> None:
    import gc

    for _ in range(5):
        client = RedisNode(Config(redis_url=redis_server.url, socket_timeout=PATIENCE / 2))
        client.call("PING")
        assert connections(redis_server)
        del client
    gc.collect()
    eventually(lambda: not connections(redis_server))


def test_a_long_pipeline_goes_in_pieces(client: RedisNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """One deadline is for one exchange, and must not have to do for any number of commands."""
    pieces = []
    round_trip = client._round_trip

    def noted(packed: bytes, replies: int = 0, **options: Any) -> Any:
        pieces.append(replies)
        return round_trip(packed, replies, **options)

    monkeypatch.setattr(client, "_round_trip", noted)
    assert client.pipeline([("ECHO", str(n)) for n in range(1200)]) == [str(n).encode() for n in range(1200)]
    assert pieces == [500, 500, 200]
    pieces.clear()
    assert client.pipeline([("SET", "k", "x" * 600_000)] * 3) == [b"OK"] * 3
    assert pieces == [2, 1]


# -- waiting


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> float:
    """To wait for what is there already: long, as one that comes late to a busy machine is gone."""
    monkeypatch.setattr(client_module, "LONGEST_POP", 20.0)
    return 19.0


def test_pop_returns_the_element_or_none(redis_server: RedisServer, client: RedisNode, at_once: float) -> None:
    assert client.pop("l", 0.25) is None
    client.call("RPUSH", "l", "a", "b")
    assert client.pop("l", at_once) == b"a"
    got: list[Any] = []

    def wait() -> None:
        while not got:
            if (element := client.pop("empty", at_once)) is not None:
                got.append(element)

    def push() -> None:
        eventually(lambda: int(redis_server.command("INFO", "clients")["blocked_clients"]))
        client.call("RPUSH", "empty", "c")

    in_threads(wait, push)
    assert got == [b"c"]
    client.call("SET", "no list", "")
    with pytest.raises(BackendError, match="WRONGTYPE"):
        client.pop("no list", at_once)
    assert client.pop("l", at_once) == b"b"


@pytest.mark.parametrize("hz", [1, 10])
@pytest.mark.parametrize("seconds", [-1, 0, 0.001, 0.03, 0.2499, 0.25, 5])
def test_pop_waits_so_long_however_late_the_server_is_and_that_is_no_outage(
    redis_binary: str, make_client: MakeClient, seconds: float, hz: int
) -> None:
    with RedisServer(binary=redis_binary, config=[f"hz {hz}"]) as server:
        client = make_client(server, socket_timeout=0.05)
        took: list[float] = []
        longest = min(max(seconds, 0), 0.35) + 0.05
        # On a busy machine some come late for its own reasons.
        while len(took) < 3 or (min(took) >= longest and len(took) < 20):
            began = time.monotonic()
            assert client.pop("l", seconds) is None
            took.append(time.monotonic() - began)
        assert min(took) < longest
        assert min(took) >= min(max(seconds, 0), 0.149)  # a whole slice ends when the server next looks
        assert client.breaker.closed
        assert client.breaker.times_opened == 0


def test_waiting_calls_leave_the_others_their_connections(redis_server: RedisServer, make_client: MakeClient) -> None:
    client = make_client(redis_server, redis_connections=1, socket_timeout=10 * PATIENCE)
    answered: list[Any] = []

    def others() -> None:
        eventually(lambda: int(redis_server.command("INFO", "clients")["blocked_clients"]))
        answered.append(client.call("PING"))
        client.call("RPUSH", "l", "x")

    def wait() -> None:
        while client.pop("l", 0.25) is None:
            pass

    in_threads(wait, others)
    assert answered == [b"PONG"]
    # And wait for a connection no longer than they would for the element.
    held = client._waiting.take(1)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="all 1 connections"):
        client.pop("l", 0.05)
    assert time.monotonic() - began < PATIENCE
    assert client.breaker.closed
    client._waiting.give(held)


def test_pop_from_a_server_that_hangs_or_is_gone(
    mortal_redis: RedisServer, make_client: MakeClient, at_once: float
) -> None:
    client = make_client(mortal_redis)
    assert client.pop("l", 0.01) is None
    with hung(mortal_redis, client):
        assert client.pop("l", 0.01) is None
        assert client.breaker.closed
        with pytest.raises(BackendUnavailable):
            client.call("PING")
        assert not client.breaker.closed
        with pytest.raises(BackendUnavailable):
            client.pop("l", 0.01)
    eventually(lambda: works(client))
    mortal_redis.restart(data="empty")
    client.call("RPUSH", "l", "x")
    assert client.pop("l", at_once) == b"x"
    mortal_redis.kill()
    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            client.pop("l", 0.01)
    assert not client.breaker.closed


def test_an_idle_waiting_connection_that_was_killed_is_replaced(
    redis_server: RedisServer, client: RedisNode, at_once: float
) -> None:
    client.call("RPUSH", "l", 1, 2, 3)
    assert client.pop("l", at_once) == b"1"
    redis_server.command("CLIENT", "KILL", "TYPE", "normal")
    assert client.pop("l", at_once) == b"2"
    assert client.breaker.refusals == 0


def test_an_exception_while_it_waits_costs_the_connection(
    redis_server: RedisServer, client: RedisNode, at_once: float
) -> None:
    class Struck(BaseException):
        pass

    def strike(*_: object) -> None:
        raise Struck

    client.call("RPUSH", "l", "x")
    client.pop("l", at_once)

    def alarm() -> None:
        eventually(lambda: int(redis_server.command("INFO", "clients")["blocked_clients"]))
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, strike)
    try:
        alarms = Background(alarm)
        with pytest.raises(Struck):
            client.pop("l", at_once)
        alarms.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not client._waiting.idle
    eventually(lambda: not int(redis_server.command("INFO", "clients")["blocked_clients"]))
    client.call("RPUSH", "l", "y")
    assert client.pop("l", at_once) == b"y"


def test_a_child_forked_while_its_parent_waits(redis_server: RedisServer, client: RedisNode, at_once: float) -> None:
    client.call("RPUSH", "l", "x")
    client.pop("l", at_once)
    used = client._waiting.take(1)
    client.call("RPUSH", "l", "y")
    client.pop("l", at_once)
    used.connect()
    socket_before = client._waiting.idle[-1]._sock

    def child() -> None:
        assert not client._waiting.idle
        assert used._sock is None
        client.call("RPUSH", "child's", "y")
        assert client.pop("child's", at_once) == b"y"
        client.close()

    in_child(child)
    client.call("RPUSH", "l", "z")
    assert client.pop("l", at_once) == b"z"
    assert client._waiting.idle[-1]._sock is socket_before
    assert used._sock is not None
    client._waiting.give(used)


def test_close_closes_those_that_have_waited_too(
    redis_server: RedisServer, make_client: MakeClient, at_once: float
) -> None:
    before = descriptors()
    client = make_client(redis_server)
    client.call("RPUSH", "l", "x")
    assert client.pop("l", at_once) == b"x"
    assert len(connections(redis_server)) == 2
    client.close()
    assert descriptors() == before
    eventually(lambda: not connections(redis_server))


def test_a_script_of_several_files_is_one() -> None:
    whole = Script("govredis.locks", "queue.lua", "release.lua")
    parts = [Script("govredis.locks", name).source for name in ("queue.lua", "release.lua")]
    assert whole.source == "\n".join(parts)
    assert whole.sha not in [Script("govredis.locks", "release.lua").sha]


def test_a_process_that_closes_its_descriptors_connects_anew(redis_server: RedisServer) -> None:
    """As daemons do when they begin."""
    code = (
        "import os, sys\n"
        "from govredis import Config\n"
        "from govredis.client import RedisNode\n"
        "client = RedisNode(Config(redis_url=sys.argv[1], socket_timeout=20, connect_timeout=20))\n"
        "client.call('SET', 'k', 'v')\n"
        "os.closerange(3, 256)\n"
        "print(client.call('GET', 'k'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, redis_server.url], capture_output=True, text=True, timeout=120)
    assert done.stdout == "b'v'\n", done.stderr
