"""Primary: what an exception, a fork, a cut-off Sentinel or a hanging name server may do to the rounds of questions."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from fake_sentinel import FakeSentinel
from strikes import strike_anywhere
from support import redis_of

import govredis.client.primary
from govredis import BackendUnavailable, Config, GovRedis
from govredis._secrets import Secrets
from govredis.client import connect
from govredis.client.primary import Primary
from govredis.client.sentinel_client import SentinelClient
from govredis.testing.servers import RedisServer


@pytest.fixture
def say() -> Iterator[Callable[..., list[FakeSentinel]]]:
    with ExitStack() as ending:
        yield lambda *views: [ending.enter_context(FakeSentinel(*view)) for view in views]


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def primary_of(sentinels: list[FakeSentinel], clock: Time, moved: Callable[[], None], **settings: Any) -> Primary:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return primary_at(hosts, clock, moved, **{"socket_timeout": 10, "connect_timeout": 10, **settings})


def primary_at(hosts: str, clock: Time, moved: Callable[[], None], **settings: Any) -> Primary:
    config = Config(redis_url=f"redis+sentinel://{hosts}/mymaster", **settings)
    client = connect(config)
    assert isinstance(client, SentinelClient)
    made = client._primary
    return Primary(client._sentinels, made._connection_class, made._options, moved, Secrets.of(config), clock)


def a_round(primary: Primary, eventually: Any) -> None:
    primary.look()
    eventually(lambda: primary._asking is None or primary._asking.ended.is_set())


@pytest.mark.parametrize("knower", [0, 1, 2])
def test_each_sentinel_is_asked_beside_the_calls_too(knower: int, say: Any, eventually: Any) -> None:
    """The others were cut off with the old primary, and a busy process never waits for all."""
    sentinels, clock = say((5, 7001), (5, 7001), (5, 7001)), Time()
    primary = primary_of(sentinels, clock, lambda: None)
    primary.locate()
    sentinels[knower].view = 6, 7002
    clock.now += 1.1
    a_round(primary, eventually)
    assert primary.address == ("127.0.0.1", 7002)
    assert [sentinel.connections for sentinel in sentinels] == [1, 1, 1], "each over the same connection"


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_sentinel_that_did_not_answer_is_asked_after_the_others(hangs: int, say: Any) -> None:
    """Else the caller's wait would be over before another was asked."""
    sentinels, clock = say((1, 7001), (1, 7001)), Time()
    primary = primary_of(sentinels, clock, lambda: None, socket_timeout=1.0)
    sentinels[hangs].view = None
    primary._sentinels = tuple(("127.0.0.1", sentinels[n].port) for n in (hangs, 1 - hangs))
    for _ in range(3):
        primary.ask_all(lost=True)
    assert sentinels[1 - hangs].asked_at < sentinels[hangs].asked_at
    assert sentinels[hangs].asked == 3, "it may answer again"


def test_a_sentinel_that_was_restarted_has_answered_all_the_time(
    say: Any, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    (sentinel,), clock = say((1, 7001)), Time()
    primary = primary_of([sentinel], clock, lambda: None)
    primary.locate()
    sentinel.cut()
    clock.now += 1.1
    a_round(primary, eventually)
    assert sentinel.asked == 2
    assert caplog.records == []


def test_a_connection_that_was_not_used_for_long_is_not_trusted(say: Any, eventually: Any) -> None:
    """A firewall forgets it, and the caller would wait in vain."""
    (sentinel,), clock = say((1, 7001)), Time()
    primary = primary_of([sentinel], clock, lambda: None)
    primary.locate()
    clock.now += 11
    a_round(primary, eventually)
    assert sentinel.connections == 2


def test_no_exception_loses_a_sentinel_or_a_move(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, the caller asks, and a signal handler's exception strikes in there."""
    monkeypatch.setattr(govredis.client.primary, "start_daemon", lambda *_: None)
    sentinels, clock, told = say((1, 7001), (1, 7001)), Time(), list[Any]()
    primary = primary_of(sentinels, clock, lambda: told.append(primary.address))
    primary.locate()
    epoch = 1

    def moves(_: Any) -> None:
        nonlocal epoch
        epoch += 1
        for sentinel in sentinels:
            sentinel.view = epoch, 7000 + epoch
        clock.now += 3
        primary.look()

    def works() -> None:
        clock.now += 3
        primary.look()
        assert sorted(port for _, port in primary._sentinels) == sorted(sentinel.port for sentinel in sentinels)
        assert primary.address == ("127.0.0.1", 7000 + epoch)
        assert told[-1] == primary.address, "the connections to the old one would stay in use"

    assert strike_anywhere(moves, works) > 20


def test_each_caller_gets_an_error_of_its_own(say: Any) -> None:
    """One that all raise would keep the frames of all, and what they hold."""
    (sentinel,), clock = say((1, 7001)), Time()
    sentinel.close()
    primary = primary_of([sentinel], clock, lambda: None)
    errors = []
    for _ in range(2):
        with pytest.raises(redis.ConnectionError, match="no Sentinel") as caught:
            primary.locate()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


@pytest.mark.parametrize(
    "raw", [b"+OK\r\n", b":1\r\n", b"*1\r\n$1\r\nx\r\n", b"*2\r\n:1\r\n:2\r\n", b"no such thing\r\n"]
)
def test_a_server_that_says_anything_is_no_sentinel(raw: bytes, say: Any, caplog: pytest.LogCaptureFixture) -> None:
    (sentinel,) = say((1, 7001))
    primary = primary_of([sentinel], Time(), lambda: None)
    sentinel.raw = raw
    with pytest.raises(redis.ConnectionError, match=r"no Sentinel of 127.0.0.1:\d+ answers: "):
        primary.locate()
    assert len(caplog.records) == 1


def test_a_move_during_the_probe_has_the_replays_told_to_the_new_primary(
    redis_server: RedisServer, mortal_redis: RedisServer, make_gov: Callable[..., GovRedis], say: Any, eventually: Any
) -> None:
    (sentinel,) = say((1, mortal_redis.port))
    settings = {"socket_timeout": 10, "connect_timeout": 10}
    client = redis_of(make_gov(redis_url=f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster", **settings))
    assert isinstance(client, SentinelClient)
    client.call("PING")
    told: list[int] = []

    def replay(server: Any) -> None:
        told.append(int(server.call("CONFIG", "GET", "port")[1]))
        if len(told) == 1:
            sentinel.view = 2, redis_server.port
            client._primary.ask_all(lost=True)

    client.on_recovery(replay)
    client.replay_soon("test")

    def port() -> Any:
        try:
            return client.call("CONFIG", "GET", "port")[1]
        except BackendUnavailable:
            return None

    eventually(port, within=60)
    assert told == [mortal_redis.port, redis_server.port]
    assert {int(port()) for _ in range(5)} == {redis_server.port}


def test_names_that_resolve_slowly_cost_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    over = threading.Event()
    right = socket.getaddrinfo

    def hang(host: Any, *args: Any, **more: Any) -> Any:
        if str(host).endswith(".test"):
            asked.append(str(host))
            over.wait(60)
        return right(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        client = connect(Config(redis_url="redis+sentinel://sentinel.test/mymaster"))
        assert isinstance(client, SentinelClient)
        for _ in range(3):
            client._primary.ask_all(lost=True)
        assert asked == ["sentinel.test"]
        client._primary.address = "server.test", 6379
        monkeypatch.setattr(client._primary, "locate", lambda: client._primary.address)
        for _ in range(3):
            with pytest.raises(redis.TimeoutError, match=r"where server\.test is"):
                client._connect().connect()
        assert asked == ["sentinel.test", "server.test"]
    finally:
        over.set()
