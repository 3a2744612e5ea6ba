"""SentinelClient: real Sentinels and failovers, and Sentinels that say anything."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from fake_sentinel import FakeSentinel
from support import redis_of
from tls_proxy import TlsProxy

from govredis import BackendError, BackendUnavailable, Config, GovRedis
from govredis._secrets import Secrets
from govredis.client import connect
from govredis.client.primary import Primary
from govredis.client.sentinel_client import SentinelClient
from govredis.testing.servers import RedisSentinel, RedisServer

PATIENT = {"socket_timeout": 10, "connect_timeout": 10}


@pytest.fixture(scope="module")
def shared_group(redis_binary: str) -> Iterator[RedisSentinel]:
    with RedisSentinel(binary=redis_binary) as group:
        yield group


@pytest.fixture
def mortal_group(redis_binary: str) -> Iterator[RedisSentinel]:
    with RedisSentinel(binary=redis_binary) as group:
        yield group


def keeps(act: Callable[[], Any], eventually: Callable[..., Any]) -> Any:
    """Do it until Redis is there."""

    def tried() -> Any:
        try:
            return [act()]
        except BackendUnavailable:
            return None

    return eventually(tried, within=60)[0]


# -- real Sentinels ----------------------------------------------------------------------------------------------------


def test_the_url_of_sentinels_leads_to_the_primary(
    shared_group: RedisSentinel, make_gov: Callable[..., GovRedis]
) -> None:
    gov = make_gov(redis_url=shared_group.url)
    assert gov.limits.hit("a", "5/hour").backend == "redis"
    with gov.locks.acquire("a", timeout=5) as held:
        assert not held.degraded
        assert shared_group.master.command("EXISTS", "lock:a") == 1
    gov.sessions.bind("s", "a")
    assert gov.sessions.get_agent_id("s") == "a"
    assert gov.health.check().checks[0].status == "pass"


def test_settings_lead_there_too_and_name_the_service(
    shared_group: RedisSentinel, make_gov: Callable[..., GovRedis]
) -> None:
    hosts = ",".join(f"{host}:{port}" for host, port in shared_group.sentinels)
    settings = {"sentinel_hosts": hosts, "redis_url": "redis://nobody.invalid/2"}
    client = redis_of(make_gov(**settings))
    client.call("SET", "k", "v")
    shared_group.master.command("SELECT", "2")  # its connection is closed after it
    assert client.call("GET", "k") == b"v"
    wrong = redis_of(make_gov(**settings, sentinel_master="another"))
    for _ in range(3):
        with pytest.raises(BackendError, match=r"no Sentinel .* accepts us: it watches no service 'another'") as caught:
            wrong.call("PING")
        assert not isinstance(caught.value, BackendUnavailable), "a fallback would hide the mistake"


def test_the_local_cache_follows_a_failover(
    mortal_group: RedisSentinel, make_gov: Callable[..., GovRedis], eventually: Callable[..., Any]
) -> None:
    """And so does everything else: what was owed is told to the new primary before it is used."""
    gov = make_gov(redis_url=mortal_group.url, local_cache=True)
    cache, client = gov.metadata, redis_of(gov)
    assert cache.get_or_load("a", lambda _: {"v": 1}) == {"v": 1}
    eventually(lambda: cache.get("a") == {"v": 1})
    held = gov.locks.acquire("x", timeout=5)
    told: list[Any] = []
    client.on_recovery(lambda redis: told.append(redis.call("ROLE")[0]))
    before = mortal_group.master
    before.kill()
    keeps(lambda: client.call("PING"), eventually)
    assert mortal_group.master is not before
    assert told[-1:] == [b"master"]
    keeps(lambda: cache.invalidate("a"), eventually)
    assert cache.get("a") is None
    assert cache.get_or_load("a", lambda _: {"v": 2}) == {"v": 2}
    with held:
        keeps(lambda: held.extend(60), eventually)


def test_a_process_that_slept_through_a_failover_writes_nothing_to_the_old_primary(
    mortal_group: RedisSentinel, make_gov: Callable[..., GovRedis], eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The old primary, once it goes on, is a primary for ten more seconds: it does not know better."""
    gov = make_gov(redis_url=mortal_group.url)
    client = redis_of(gov)
    assert isinstance(client, SentinelClient)
    client.call("SET", "before", "1")
    old = mortal_group.master
    old.pause()
    eventually(lambda: mortal_group.master is not old, within=60)
    new = mortal_group.master
    old.resume()
    assert old.command("ROLE")[0] == "master", "it still takes writes"
    client._primary._asked_at -= 3  # it slept for longer than the two seconds
    for n in range(5):
        keeps(lambda n=n: client.call("SET", f"after:{n}", "1"), eventually)
    assert new.command("EXISTS", *(f"after:{n}" for n in range(5))) == 5


def test_connections_in_use_during_a_failover_are_not_used_again(
    mortal_group: RedisSentinel, make_gov: Callable[..., GovRedis], eventually: Callable[..., Any]
) -> None:
    """A lock's waiter has a connection to the old primary; it must not go back to the pool."""
    gov = make_gov(redis_url=mortal_group.url)
    client = redis_of(gov)
    client.call("PING")
    taken = client._pool.take(1)
    old = mortal_group.master
    mortal_group.sentinel_servers[0].command("SENTINEL", "FAILOVER", mortal_group.master_name)
    eventually(lambda: mortal_group.master is not old, within=60)
    eventually(lambda: keeps(lambda: client.call("ROLE"), eventually)[0] == b"master" and client._pool._retired)
    client._pool.give(taken)
    assert taken not in client._pool.idle
    assert taken._sock is None


def test_a_server_that_turns_replica_under_a_call_is_left_at_once(
    redis_server: RedisServer, mortal_redis: RedisServer, make_gov: Callable[..., GovRedis], say: Any,
    eventually: Callable[..., Any],
) -> None:  # fmt: skip
    """Though its connections are fine, and an answer of the Sentinels is not a second old."""
    (sentinel,) = say((1, mortal_redis.port))
    client = redis_of(make_gov(redis_url=f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster"))
    client.call("SET", "k", "1")
    mortal_redis.command("REPLICAOF", "127.0.0.1", redis_server.port)
    sentinel.view = 2, redis_server.port
    with pytest.raises(BackendUnavailable, match="cannot serve"):
        client.call("SET", "k", "2")
    assert client.breaker.times_opened == 1, "the next call is not refused first"
    keeps(lambda: client.call("SET", "k", "3"), eventually)
    assert redis_server.command("GET", "k") == "3"


def test_another_primary_has_the_replays_before_anybody_uses_it(
    redis_server: RedisServer, mortal_redis: RedisServer, make_gov: Callable[..., GovRedis], say: Any,
    eventually: Callable[..., Any],
) -> None:  # fmt: skip
    """Where the old one was never seen to be away: an administrator's failover takes no time at all."""
    (sentinel,) = say((1, mortal_redis.port))
    client = redis_of(make_gov(redis_url=f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster"))
    assert isinstance(client, SentinelClient)
    client.call("PING")
    client.on_recovery(lambda redis: redis.call("SET", "owed", "told"))
    sentinel.view = 2, redis_server.port
    client._primary._asked_at = float("-inf")
    assert keeps(lambda: client.call("GET", "owed"), eventually) == b"told"
    assert mortal_redis.command("EXISTS", "owed") == 0


def test_passwords_and_users_of_sentinels_are_their_own(redis_binary: str, make_gov: Callable[..., GovRedis]) -> None:
    with RedisSentinel(binary=redis_binary) as group:
        for sentinel in group.sentinel_servers:
            sentinel.command("ACL", "SETUSER", "watcher", "on", ">hunter2-hunter2", "+sentinel")
        for node in group.nodes:
            node.command("ACL", "SETUSER", "app", "on", ">data-pass-word", "~*", "+@all")
        settings = {"redis_url": group.url.replace("//", "//app:data-pass-word@")}
        for sentinel in group.sentinel_servers:
            sentinel.command("ACL", "SETUSER", "default", "off")
        gov = make_gov(**settings, sentinel_username="watcher", sentinel_password="hunter2-hunter2")
        assert gov.limits.hit("a", "5/hour").backend == "redis"
        refused = redis_of(make_gov(**settings, sentinel_username="watcher", sentinel_password="wrong-pass-word"))
        with pytest.raises(BackendError, match=r"no Sentinel .* accepts us") as caught:
            refused.call("PING")
        assert not isinstance(caught.value, BackendUnavailable)
        assert "pass-word" not in str(caught.value)


def test_a_forked_child_asks_over_a_connection_of_its_own(
    shared_group: RedisSentinel, make_gov: Callable[..., GovRedis]
) -> None:
    client = redis_of(make_gov(redis_url=shared_group.url))
    assert isinstance(client, SentinelClient)
    client.call("PING")

    def sockets() -> list[Any]:
        return [connection._sock for connection, _ in client._primary._connections.values()]

    inherited = sockets()
    child = os.fork()
    if child == 0:
        try:
            client._primary._asked_at = float("-inf")
            client.call("PING")
            os._exit(0 if sockets() and not set(sockets()) & set(inherited) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    client._primary._asked_at = float("-inf")
    client.call("PING")
    assert set(sockets()) == set(inherited), "and the parent's go on"


# -- Sentinels that say anything ---------------------------------------------------------------------------------------


@pytest.fixture
def say() -> Iterator[Callable[..., list[FakeSentinel]]]:
    with ExitStack() as ending:
        yield lambda *views: [ending.enter_context(FakeSentinel(*view)) for view in views]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def primary_of(sentinels: list[FakeSentinel], clock: Clock, moved: Callable[[], None], **settings: Any) -> Primary:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    config = Config(redis_url=f"redis+sentinel://{hosts}/mymaster", **{**PATIENT, **settings})
    client = connect(config)
    assert isinstance(client, SentinelClient)
    made = client._primary
    return Primary(client._sentinels, made._connection_class, made._options, moved, Secrets.of(config), clock)


def test_an_answer_holds_for_a_second_and_then_is_asked_for_beside_the_call(say: Any, eventually: Any) -> None:
    (sentinel,), clock = say((1, 7001)), Clock()
    primary = primary_of([sentinel], clock, lambda: None)
    assert primary.locate() == ("127.0.0.1", 7001)
    for _ in range(100):
        primary.look()
        primary.locate()
    assert sentinel.asked == 1
    clock.now += 1.1
    primary.look()
    eventually(lambda: sentinel.asked == 2 and primary._asking.ended.is_set())
    primary.look()
    assert sentinel.asked == 2
    assert sentinel.connections == 1, "over the same connection"


def test_after_two_seconds_of_silence_a_call_waits_for_the_answer(say: Any) -> None:
    (sentinel,), clock = say((1, 7001)), Clock()
    moves: list[Any] = []
    primary = primary_of([sentinel], clock, lambda: moves.append(primary.address))
    primary.locate()
    assert moves == [], "the first address is no move"
    sentinel.view = 2, 7002
    clock.now += 2.1
    primary.look()
    assert primary.address == ("127.0.0.1", 7002)
    assert moves == [("127.0.0.1", 7002)]


def test_an_older_epoch_is_not_believed(say: Any) -> None:
    """The Sentinel beside a primary that was cut off knows of no failover."""
    (sentinel,), clock = say((5, 7001)), Clock()
    primary = primary_of([sentinel], clock, pytest.fail)
    primary.locate()
    sentinel.view = 4, 7002
    for _ in range(5):
        clock.now += 3
        primary.look()
    assert primary.address == ("127.0.0.1", 7001)


def test_sentinels_that_were_set_up_anew_are_believed_by_majority_after_a_while(say: Any) -> None:
    sentinels, clock = say((5, 7001), (5, 7001), (5, 7001)), Clock()
    primary = primary_of(sentinels, clock, lambda: None)
    primary.ask_all(lost=True)
    for sentinel in sentinels:
        sentinel.view = 0, 7002
    clock.now += 9
    primary.ask_all(lost=True)
    assert primary.address == ("127.0.0.1", 7001), "one of them may be a moment behind"
    sentinels[0].view = 0, 7003
    clock.now += 2
    primary.ask_all(lost=True)
    assert primary.address == ("127.0.0.1", 7001), "they must agree"
    sentinels[0].view = 0, 7002
    primary.ask_all(lost=False)
    assert primary.address == ("127.0.0.1", 7001), "not while the known primary can be used"
    primary.ask_all(lost=True)
    assert primary.address == ("127.0.0.1", 7002)


def test_a_minority_that_names_an_older_epoch_is_never_believed(say: Any) -> None:
    sentinels, clock = say((5, 7001), (5, 7001), (5, 7001)), Clock()
    primary = primary_of(sentinels, clock, pytest.fail)
    primary.ask_all(lost=True)
    sentinels[0].view = 0, 7002
    for sentinel in sentinels[1:]:
        sentinel.error = b"-ERR busy\r\n"
    clock.now += 60
    primary.ask_all(lost=True)
    assert primary.address == ("127.0.0.1", 7001)


def test_the_newest_of_all_counts_where_all_are_asked(say: Any) -> None:
    sentinels, clock = say((1, 7001), (2, 7002), (1, 7001)), Clock()
    primary = primary_of(sentinels, clock, lambda: None)
    primary.ask_all(lost=True)
    assert primary.address == ("127.0.0.1", 7002)
    assert [sentinel.asked for sentinel in sentinels] == [1, 1, 1]


def test_where_a_sentinel_hangs_or_errs_the_next_is_asked(say: Any) -> None:
    sentinels, clock = say((1, 7001), (1, 7001)), Clock()
    primary = primary_of(sentinels, clock, lambda: None, socket_timeout=1.0)
    for silent, other in (sentinels, sentinels[::-1]):
        silent.view, other.view = None, (1, 7001)
        clock.now += 3
        primary.ask_all(lost=True)  # which waits for both
        clock.now += 3
        primary.look()
        assert primary.locate() == ("127.0.0.1", 7001)


def test_while_no_sentinel_answers_the_known_address_stays_and_no_call_waits_again(
    say: Any, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    (sentinel,), clock = say((1, 7001)), Clock()
    primary = primary_of([sentinel], clock, pytest.fail, socket_timeout=1.0)
    primary.locate()
    sentinel.view = None
    clock.now += 3
    with caplog.at_level(logging.INFO, "govredis"):
        primary.look()
        eventually(lambda: primary._asking.ended.is_set())
        asked = sentinel.asked
        for _ in range(50):
            primary.look()
            assert primary.locate() == ("127.0.0.1", 7001)
        assert sentinel.asked == asked, "and nobody is asked again at once"
        clock.now += 3
        primary.look()
        eventually(lambda: primary._asking.ended.is_set())
        sentinel.view = 2, 7001
        clock.now += 3
        primary.look()
        eventually(lambda: primary._asking.ended.is_set())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert said[0].endswith("going on with 127.0.0.1:7001")
    assert said[1] == "Redis 'mymaster': Sentinels answer again"


@pytest.mark.parametrize("of", ["Sentinels alone", "the server alone", "both"])
def test_tls_of_sentinels_is_apart_from_the_servers(
    of: str, redis_server: RedisServer, make_gov: Callable[..., GovRedis], say: Any, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    (sentinel,) = say((1, redis_server.port))
    with TlsProxy(redis_server.port, context) as of_server, TlsProxy(sentinel.port, context) as of_sentinel:
        port = sentinel.port if of == "the server alone" else of_sentinel.port
        is_tls = of != "Sentinels alone"
        if is_tls:
            sentinel.view = 1, of_server.port
        scheme = "rediss" if is_tls else "redis"
        trusted = f"?ssl_ca_certs={tmp_path}/authority.pem"
        url = f"{scheme}+sentinel://127.0.0.1:{port}/mymaster{trusted if is_tls else ''}"
        settings = {"Sentinels alone": {"sentinel_tls": True}, "the server alone": {"sentinel_tls": False}}
        client = redis_of(make_gov(redis_url=url, **settings.get(of, {})))
        if of == "Sentinels alone":
            with pytest.raises(BackendError, match=r"accepts us: .*CERTIFICATE_VERIFY_FAILED") as caught:
                client.call("PING")  # no setting names an authority
            assert not isinstance(caught.value, BackendUnavailable)
        else:
            assert client.call("ECHO", "x") == b"x"


def test_where_no_sentinel_has_ever_answered_redis_is_away(make_gov: Callable[..., GovRedis], say: Any) -> None:
    (sentinel,) = say((1, 7001))
    sentinel.close()
    gov = make_gov(redis_url=f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster")
    result = gov.limits.hit("a", "5/hour")
    assert result.degraded
    with pytest.raises(BackendUnavailable, match=r"no Sentinel of 127.0.0.1:\d+ answers: Error 111"):
        redis_of(gov).call("PING")


def test_a_server_that_is_no_sentinel_is_named(redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> None:
    client = redis_of(make_gov(redis_url=f"redis+sentinel://127.0.0.1:{redis_server.port}/mymaster"))
    with pytest.raises(BackendError, match=r"accepts us: it answered: unknown command .SENTINEL") as caught:
        client.call("PING")
    assert not isinstance(caught.value, BackendUnavailable)


def test_a_replica_is_refused_at_the_connect(
    shared_group: RedisSentinel, make_gov: Callable[..., GovRedis], say: Any, eventually: Callable[..., Any]
) -> None:
    (sentinel,) = say((1, shared_group.replicas[0].port))
    client = redis_of(make_gov(redis_url=f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster"))
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match="it is a replica, or becomes one"):
            client.call("GET", "k")
    sentinel.view = 2, shared_group.master.port
    keeps(lambda: client.call("SET", "k", "v"), eventually)


def test_many_threads_ask_in_one_round(say: Any) -> None:
    (sentinel,), clock = say((1, 7001)), Clock()
    primary = primary_of([sentinel], clock, lambda: None)
    threads = [threading.Thread(target=primary.locate) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert primary.address == ("127.0.0.1", 7001)
    assert sentinel.connections == 1
