"""RedisNode behind a proxy that sends what nobody has asked for: nobody takes it for the reply to something else."""

from __future__ import annotations

import fcntl
import logging
import queue
import select
import socket
import ssl
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cutting_proxy import CuttingProxy
from support import in_threads, redis_of
from tls_proxy import TlsProxy

from govredis import BackendError, BackendUnavailable, GovRedis
from govredis._pool import PoolExhausted
from govredis.client import RedisNode, pack_command
from govredis.client import node as client_module
from govredis.client.wire import take_over
from govredis.metadata import tracking
from govredis.testing.servers import RedisServer

MakeGov = Callable[..., GovRedis]


class StrayingProxy(CuttingProxy):
    """Sends every `nth` reply twice; or, once, something before or in the midst of a reply."""

    nth = 0

    def __init__(self, port: int) -> None:
        self._replies = 0
        self._clients: list[socket.socket] = []
        self.before = b""
        self.doubled_bytes = 0
        self.accepted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(port)
        self.port = self._listener.getsockname()[1]

    def _deliver(self, receiver: socket.socket, found: bytes, *, is_reply: bool) -> bool:
        if is_reply:
            self._clients.append(receiver)
            self._replies += 1
            if self.nth and self._replies % self.nth == 0:
                found += found
            found, self.before = self.before + found, b""
            found, self.doubled_bytes = found[: self.doubled_bytes] + found, 0
        return super()._deliver(receiver, found, is_reply=is_reply)

    def _accept(self) -> Any:
        link = super()._accept()
        self.accepted.put(link)
        return link

    def greet(self, what: bytes) -> None:
        """To the next one that is accepted."""
        self.accepted.get(timeout=20).client.sendall(what)

    def stray(self, what: bytes = b"$5\r\nstray\r\n") -> None:
        """Over every connection that is there."""
        for client in set(self._clients):
            if client.fileno() >= 0:
                client.sendall(what)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[StrayingProxy]:
    with StrayingProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: StrayingProxy, make_gov: MakeGov) -> RedisNode:
    found = redis_of(make_gov(redis_url=proxy.url))
    assert found is not None
    return found


def came(connection: Any) -> None:
    """Wait until what was sent over it is there."""
    connection._sock.settimeout(20)
    assert connection._sock.recv(1, socket.MSG_PEEK)


@pytest.mark.parametrize("nth", [2, 7])
def test_every_thread_gets_its_own_sessions(proxy: StrayingProxy, make_gov: MakeGov, nth: int) -> None:
    gov = make_gov(redis_url=proxy.url)
    for n in range(40):
        gov.sessions.bind(f"s{n}", f"agent-{n}")
    proxy.nth = nth

    def wrong(first: int) -> int:
        ids = [(first * 10 + n) % 40 for n in range(200)]
        return sum(gov.sessions.get_agent_id(f"s{n}") != f"agent-{n}" for n in ids)

    assert in_threads(*[lambda n=n: wrong(n) for n in range(4)]) == [0] * 4  # type: ignore[misc]
    assert redis_of(gov).strays > 0


def test_a_stray_reply_on_an_idle_connection_costs_it(
    proxy: StrayingProxy, client: RedisNode, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for times in (1, 2):
            client.call("SET", "k", "mine")
            (idle,) = client._pool.idle
            proxy.stray()
            came(idle)
            assert client.call("GET", "k") == b"mine"
            assert idle not in client._pool.live
            assert client.strays == times
    assert client.resends() == 0
    assert [r.message for r in caplog.records if "nobody asked for" in r.message] == [
        f"{client.name} sent a reply that nobody asked for: a proxy's fault? Its connection was dropped"
    ]


def test_a_reply_that_comes_twice_is_asked_for_once_more(proxy: StrayingProxy, client: RedisNode) -> None:
    client.call("SET", "k", "mine")
    for command, reply, size in ((("GET", "k"), b"mine", 10), (("EXISTS", "k"), 1, 4)):
        client.call("PING")
        before, proxy.doubled_bytes = client.resends(), size
        assert client.call(*command) == reply
        assert client.resends() == before + 1


def test_an_error_that_comes_twice_is_asked_for_once_more_too(proxy: StrayingProxy, client: RedisNode) -> None:
    client.call("PING")
    proxy.before = b"-ERR of somebody else\r\n"
    assert client.call("ECHO", "x") == b"x"
    proxy.before = b"$-1\r\n"
    with pytest.raises(BackendError, match="unknown command"):
        client.call("NOSUCH")
    assert client.strays == 2


def test_a_server_that_always_says_more_is_away(proxy: StrayingProxy, client: RedisNode) -> None:
    proxy.nth = 1
    with pytest.raises(BackendUnavailable, match="more replies than it was asked for"):
        client.call("PING")
    proxy.nth = 0
    assert client.call("PING") == b"PONG"


class TestSeveralReplies:
    @pytest.mark.parametrize("doubled", [7, 14])
    def test_a_stray_reply_in_the_midst_shifts_no_other(
        self, proxy: StrayingProxy, client: RedisNode, doubled: int
    ) -> None:
        """`$1 a` is of 7 bytes: the first comes twice, or the first two."""
        client.call("PING")
        proxy.doubled_bytes = doubled
        assert client.pipeline([("ECHO", c) for c in "abc"]) == [b"a", b"b", b"c"]
        assert client.strays == 1

    def test_a_stray_error_does_not_run_a_script_twice(self, proxy: StrayingProxy, make_gov: MakeGov) -> None:
        gov = make_gov(redis_url=proxy.url)
        assert gov.limits.hit("a", "2/hour").remaining == 1
        proxy.before = b"-NOSCRIPT of somebody else\r\n"
        assert gov.limits.hit("a", "2/hour").remaining == 0
        assert gov.limits.get_count("a", 3600) == 2


class TestWaitingCalls:
    @pytest.fixture(autouse=True)
    def late_is_not_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An element that comes late, on a machine that is busy or stalls, is gone."""
        monkeypatch.setattr(client_module, "LONGEST_POP", 60.0)

    def test_pop(self, proxy: StrayingProxy, client: RedisNode) -> None:
        client.call("RPUSH", "l", "a", "b", "c")
        assert client.pop("l", 59) == b"a"
        (idle,) = client._waiting.idle
        proxy.stray(b"*2\r\n$1\r\nl\r\n$5\r\nstray\r\n")
        came(idle)
        assert client.pop("l", 59) == b"b"
        assert client.strays >= 1

    def test_a_reply_that_is_taken_later(self, proxy: StrayingProxy, client: RedisNode) -> None:
        client.pop("none", 0.01)
        client.call("RPUSH", "l", "a")
        client.pop("l", 59)
        (idle,) = client._waiting.idle
        proxy.stray()
        came(idle)
        pending = client.send(pack_command(("ECHO", "mine")))
        assert pending.reply() == b"mine"
        proxy.before = b"$5\r\nstray\r\n"
        with pytest.raises(BackendUnavailable, match="more replies"):
            client.send(pack_command(("ECHO", "mine"))).reply()


def test_a_greeting_that_says_too_much(proxy: StrayingProxy, make_gov: MakeGov) -> None:
    client = redis_of(make_gov(redis_url=proxy.url.removesuffix("/0") + "/1"))
    assert client is not None
    proxy.nth = 1  # SELECT's reply
    with pytest.raises(BackendUnavailable, match="when we connected"):
        client.call("ECHO", "x")
    proxy.nth = 0
    assert client.call("ECHO", "x") == b"x"


def test_a_stray_reply_before_the_reply_itself_is_found_out_by_the_next_call(
    proxy: StrayingProxy, client: RedisNode
) -> None:
    """The limit: nothing tells it from the reply. It is one wrong answer, and no more."""
    client.call("SET", "k", "mine")
    (idle,) = client._pool.idle
    send = idle.send_packed_command

    def stray_and_send(*args: Any) -> None:
        proxy.stray()
        came(idle)
        send(*args)

    idle.send_packed_command = stray_and_send
    client.call("GET", "k")
    idle.send_packed_command = send
    if idle._sock is not None:  # else it was found out already
        came(idle)  # the reply itself
    assert client.call("GET", "k") == b"mine"
    assert client.strays == 1


def test_a_full_pool_after_something_was_sent_says_that_it_was(
    proxy: StrayingProxy, client: RedisNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.call("PING")
    proxy.cut_next(b"INCR")
    take = client._pool.take

    def full_the_second_time(*args: Any) -> Any:
        if client.resends():
            raise PoolExhausted("all are in use")
        return take(*args)

    monkeypatch.setattr(client._pool, "take", full_the_second_time)
    with pytest.raises(BackendUnavailable) as caught:
        client.call("INCR", "n")
    assert not isinstance(caught.value, PoolExhausted)


def test_over_tls_a_session_ticket_is_no_reply(proxy: StrayingProxy, tmp_path: Path, make_gov: MakeGov) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with TlsProxy(proxy.port, context) as over_tls:
        client = redis_of(make_gov(redis_url=f"rediss://{over_tls.netloc}/0?ssl_ca_certs={tmp_path / 'ca.pem'}"))
        assert client is not None
        idle = client._connect()
        idle.connect()
        take_over(idle)
        assert idle._sock.version() == "TLSv1.3"
        raw_poll(idle)  # two tickets
        assert fionread(idle)
        assert not idle.unread()
        client._pool.live.add(idle)
        client._pool.give(idle)
        for _ in range(3):
            assert client.call("ECHO", "mine") == b"mine"
            assert [*client._pool.idle] == [idle]
        assert client.strays == 0
        proxy.stray()
        raw_poll(idle)
        assert client.call("ECHO", "mine") == b"mine"
        assert client.strays == 1
        assert idle not in client._pool.live
        client.close()


def raw_poll(connection: Any) -> None:
    assert select.select([connection._sock], [], [], 20)[0]


def fionread(connection: Any) -> bool:
    return any(fcntl.ioctl(connection._sock, termios.FIONREAD, bytes(4)))


def test_a_server_that_turns_us_away_at_once_is_heard(
    client: RedisNode, proxy: StrayingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client._connect()
    connect = made.connect

    def connect_and_hear() -> None:
        connect()
        proxy.greet(b"-ERR max number of clients reached\r\n")
        came(made)

    made.connect = connect_and_hear
    client._pool.live.add(made)
    client._pool.give(made)
    with pytest.raises(BackendUnavailable, match="max number of clients"):
        client.call("PING")
    assert client.strays == 0


def test_the_tracking_connection_of_the_local_tier_ends(
    proxy: StrayingProxy, make_gov: MakeGov, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer taken for that to a later question would make values valid for longer than they are."""
    heard, ended = threading.Event(), threading.Event()
    answered, failed = tracking.Tracking._answered, tracking.Tracking._failed

    def note_answer(self: Any, *what: Any) -> None:
        answered(self, *what)
        heard.set()

    def note_end(self: Any, tier: Any, error: Exception) -> float:
        if isinstance(error, BackendUnavailable):
            ended.set()
        return failed(self, tier, error)

    monkeypatch.setattr(tracking.Tracking, "_answered", note_answer)
    monkeypatch.setattr(tracking.Tracking, "_failed", note_end)
    gov = make_gov(redis_url=proxy.url, local_cache=True)
    gov.metadata.get_or_load("a", lambda _: {"x": 1})
    assert heard.wait(20)
    # Again and again: one that is just taking the other's place, as warms up the process, may not have been reached.
    assert any(proxy.stray(b"+PONG\r\n") or ended.wait(0.2) for _ in range(100))
    heard.clear()
    assert heard.wait(20), "another one takes its place"
    assert gov.metadata.get("a") == {"x": 1}
