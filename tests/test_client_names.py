"""RedisNode at a host's name: name servers that hang, fail and come back. Only their answers are not real."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from strikes import strike_anywhere
from support import PATIENCE, in_child, redis_of
from tls_proxy import TlsProxy

from govredis import BackendUnavailable, GovRedis
from govredis.breaker import Rejected
from govredis.client import RedisNode
from govredis.testing.servers import RedisServer

NAME = "redis.test"
SOON = 60.0


class NameServer:
    """The answers of socket.getaddrinfo for NAME: from a name server that may hang, and is given up after `SOON`.

    Attributes:
        addresses: of the name.
        hangs: while it is set, nobody gets an answer.
        asked_by: the thread of each question.
        hanging: how many wait, and the most of them at any time.
    """

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]
        self.answers = threading.Event()
        self.answers.set()
        self.asked_by: list[threading.Thread] = []
        self.hanging = self.most_hanging = 0
        self._really = socket.getaddrinfo

    def getaddrinfo(self, host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host != NAME:
            return self._really(host, port, *rest, **options)
        self.asked_by.append(threading.current_thread())
        if not self.answers.is_set():
            self.hanging += 1
            self.most_hanging = max(self.hanging, self.most_hanging)
            answered = self.answers.wait(SOON)
            self.hanging -= 1
            if not answered:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [found for each in self.addresses for found in self._really(each, port, *rest, **options)]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", server.getaddrinfo)
    yield server
    server.answers.set()


@pytest.fixture
def client(name_server: NameServer, redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> RedisNode:
    url = redis_server.url.replace("127.0.0.1", NAME)
    return redis_of(make_gov(redis_url=url))


def hang(client: RedisNode, name_server: NameServer) -> None:
    """From now on the name server hangs, and the client waits for it for a moment.

    Before that and after it, the client waits for long: a stall of the machine must not be an outage.
    """
    client._options["socket_connect_timeout"] = 0.2
    name_server.answers.clear()


def answer(client: RedisNode, name_server: NameServer) -> None:
    client._options["socket_connect_timeout"] = SOON
    name_server.answers.set()


def refused(client: RedisNode) -> str:
    with pytest.raises(BackendUnavailable) as caught:
        client.call("PING")
    return str(caught.value)


def test_a_name_server_that_hangs_opens_the_breaker_at_once(client: RedisNode, name_server: NameServer) -> None:
    hang(client, name_server)
    why = f"^{client.name} is away: no name server has told where {NAME} is, within 0.2 s$"
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match=why):
            client.call("PING")
        assert name_server.hanging == 1, "it is not waited for"
        assert not client.breaker.closed
    assert client.breaker.times_opened == 1


def test_a_name_server_that_hangs_costs_one_thread(
    client: RedisNode, name_server: NameServer, eventually: Callable[..., Any]
) -> None:
    hang(client, name_server)
    probes = []
    probe = client.breaker._probe
    client.breaker._probe = lambda: probes.append(1) or probe()  # type: ignore[func-returns-value]
    askers = [threading.Thread(target=refused, args=(client,)) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(SOON)
    eventually(lambda: len(probes) > 3)
    assert (name_server.hanging, name_server.most_hanging) == (1, 1)


def test_it_is_back_with_its_name_server(
    client: RedisNode, name_server: NameServer, eventually: Callable[..., Any]
) -> None:
    assert client.call("PING") == b"PONG"
    assert name_server.asked_by.pop() is not threading.current_thread()
    client._drop_idle()
    hang(client, name_server)
    refused(client)
    answer(client, name_server)
    eventually(lambda: client.breaker.closed)
    assert client.call("PING") == b"PONG"
    assert name_server.hanging == 0


def test_each_connection_asks_anew(client: RedisNode, name_server: NameServer) -> None:
    """A name leads elsewhere after a failover."""
    for count in (1, 2, 3):
        assert client.call("PING") == b"PONG"
        assert client.call("PING") == b"PONG"
        assert len(name_server.asked_by) == count
        client._drop_idle()


@pytest.mark.parametrize("other", ["127.0.0.2", "::1"])
def test_the_first_of_several_addresses_that_answers_is_used(
    client: RedisNode, name_server: NameServer, other: str
) -> None:
    name_server.addresses = [other, "127.0.0.1"]  # the server listens at the second only
    assert client.call("PING") == b"PONG"
    client._drop_idle()
    name_server.addresses = [other]
    assert "refused" in refused(client)
    name_server.addresses = []
    assert "its name has no address" in refused(client)


def test_a_name_that_nobody_knows_is_told(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
    client = redis_of(make_gov(redis_url=redis_server.url.replace("127.0.0.1", "unknown.invalid")))
    assert client is not None
    assert "connecting to unknown.invalid:" in refused(client)
    assert client.breaker.closed, "its first refusal"


@pytest.mark.parametrize("where", ["address", "socket"])
def test_without_a_name_nobody_is_asked(
    where: str, redis_binary: str, make_gov: Callable[..., GovRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer(binary=redis_binary, unix_socket=where == "socket") as server:
        client = redis_of(make_gov(redis_url=server.url))
        assert client is not None
        started: list[threading.Thread] = []
        monkeypatch.setattr(threading.Thread, "start", started.append)
        assert client.call("PING") == b"PONG"
        assert not started


def test_the_caller_asks_where_no_thread_can_start(
    client: RedisNode, name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert client.call("PING") == b"PONG"
    assert name_server.asked_by == [threading.current_thread()]


def test_tls_compares_the_name(
    name_server: NameServer, redis_server: RedisServer, make_gov: Callable[..., GovRedis], tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for named in (NAME, "other.test"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(named).configure_cert(context)
        with TlsProxy(redis_server.port, context) as proxy:
            netloc = proxy.netloc.replace("localhost", NAME)
            client = redis_of(make_gov(redis_url=f"rediss://{netloc}/0?ssl_ca_certs={tmp_path}/ca.pem"))
            assert client is not None
            if named == NAME:
                assert client.call("PING") == b"PONG"
            else:
                with pytest.raises(Rejected, match=f"not valid for '{NAME}'"):
                    client.call("PING")
    assert threading.current_thread() not in name_server.asked_by


GREEN = """
import {library}.monkey as monkey
monkey.patch_all() if "{library}" == "gevent" else monkey.monkey_patch()
import socket, threading, time
from govredis import BackendUnavailable, Config
from govredis.client import RedisNode

really, answers = socket.getaddrinfo, threading.Event()

def getaddrinfo(host, *rest, **options):
    if host != "{name}":
        return really(host, *rest, **options)
    answers.wait()
    return really("127.0.0.1", *rest, **options)

socket.getaddrinfo = getaddrinfo
client = RedisNode(Config(redis_url="redis://{name}:{port}/0", connect_timeout=0.2, socket_timeout=60))
others = []
threading.Thread(target=lambda: [others.append(time.sleep(0.01)) for _ in range(5)], daemon=True).start()
try:
    client.call("PING")
except BackendUnavailable as error:
    print(str(error).partition("away: ")[2], not client.breaker.closed, len(others) > 0)
answers.set()
while not client.breaker.closed:
    time.sleep(0.01)
print(client.call("PING"))
"""


@pytest.mark.once
@pytest.mark.one_redis
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_it_is_waited_for_by_one_greenlet_alone(library: str, redis_server: RedisServer) -> None:
    code = GREEN.format(library=library, name=NAME, port=redis_server.port)
    if library == "eventlet":
        code = code.replace("import eventlet.monkey as monkey", "import eventlet as monkey")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.splitlines() == [
        f"no name server has told where {NAME} is, within 0.2 s True True",
        "b'PONG'",
    ], done.stderr


def test_a_child_does_not_wait_for_its_parents_lookup(client: RedisNode, name_server: NameServer) -> None:
    hang(client, name_server)
    refused(client)

    def ping() -> object:
        name_server.answers = threading.Event()
        answer(client, name_server)
        client.breaker.check()
        return client.call("PING")

    assert in_child(ping) == b"PONG"


def test_an_exception_anywhere_leaves_nobody_waiting(client: RedisNode, name_server: NameServer) -> None:
    resolver = client._options["resolver"]

    def works() -> None:
        assert resolver.addresses(SOON) == ["127.0.0.1"]

    assert strike_anywhere(lambda _: resolver.addresses(SOON), works) > 10
