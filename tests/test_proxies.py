"""govredis behind proxies: twemproxy and Envoy share the keys out, and do not take every command; HAProxy leads to the
master."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from async_service.lock_rules import renew
from cutting_proxy import CuttingProxy
from proxies import Envoy, HaProxy, Twemproxy
from quoting_server import _Server
from support import redis_of, wait_at_most

from govredis import BackendError, BackendUnavailable, Config, GovRedis, Limit
from govredis.client import RedisNode
from govredis.testing.servers import PostgresServer, RedisServer

MakeGov = Callable[..., GovRedis]
Eventually = Callable[..., Any]

pytestmark = pytest.mark.one_redis

#: For clients of a server that is killed or hangs. They are less patient only while it hangs.
PATIENT = {"socket_timeout": 20, "connect_timeout": 20}


def levels(caplog: pytest.LogCaptureFixture, of: str = "") -> list[str]:
    """The levels of the records on the server at that URL: clients of earlier tests may still find theirs away."""
    said = [r for r in caplog.records if r.name == "govredis" and r.levelno >= logging.INFO]
    return [r.levelname for r in said if of.removeprefix("redis://").removesuffix("/0") in r.getMessage()]


@pytest.fixture
def two(mortal_redis: RedisServer, redis_binary: str) -> Iterator[list[RedisServer]]:
    with RedisServer(binary=redis_binary) as other:
        yield [mortal_redis, other]


Before = Callable[[list[RedisServer]], Twemproxy | Envoy]


@pytest.fixture
def twemproxy_before(system_binary: Callable[[str], str], tmp_path: Path) -> Before:
    """Makes a twemproxy before these servers."""
    return lambda servers: Twemproxy(system_binary("nutcracker"), tmp_path, servers)


@pytest.fixture
def envoy_before(tmp_path: Path) -> Before:
    return lambda servers: Envoy(tmp_path, servers)


@pytest.fixture(params=["twemproxy", "envoy"])
def before(request: pytest.FixtureRequest) -> Before:
    """Each of the two."""
    made: Before = request.getfixturevalue(f"{request.param}_before")
    return made


@pytest.fixture
def proxy(before: Before, redis_server: RedisServer) -> Iterator[Twemproxy | Envoy]:
    with before([redis_server]) as started:
        yield started


@pytest.fixture
def gov(proxy: Twemproxy | Envoy, make_gov: MakeGov) -> Iterator[GovRedis]:
    """Through the proxy. Nothing that is done through it is an outage."""
    made = make_gov(redis_url=proxy.url)
    yield made
    assert (redis_of(made).breaker.times_opened, redis_of(made).breaker.refusals) == (0, 0)


def use_with_postgresql(gov: GovRedis) -> None:
    """Sessions, and cached values under the freshness lease."""
    assert gov.sessions.bind("s", "a").backend == "redis"
    assert gov.sessions.get("s") is not None
    assert gov.sessions.unbind_agent("a") == 1
    assert gov.sessions.get("s") is None
    gov.agents.create("a", {"n": 1})
    for _ in range(2):
        assert gov.metadata.get_or_load("a", lambda _: {"n": 1}) == {"n": 1}
    gov.agents.update_metadata("a", n=2)
    assert gov.metadata.get_or_load("a", lambda _: {"n": 2}) == {"n": 2}
    assert gov.internal.freshness is not None
    assert gov.internal.freshness.drain() is not None
    assert (gov.counters.get("guard.epochs"), gov.counters.get("agent_meta.hits")) == (1, 1)


class TestShardingProxies:
    def test_sessions(self, gov: GovRedis) -> None:
        assert gov.sessions.bind("s", "a").backend == "redis"
        assert gov.sessions.get_agent_id("s") == "a"
        new = gov.sessions.rotate("s")
        assert new is not None
        assert (gov.sessions.exists("s"), gov.sessions.for_agent("a")) == (False, [new])
        assert gov.sessions.update(new, {"x": 1}).data == {"x": 1}
        assert gov.sessions.touch(new)
        assert gov.sessions.start("b").agent_id == "b"
        assert (gov.sessions.unbind_agent("a"), gov.sessions.exists(new)) == (1, False)

    def test_limits(self, gov: GovRedis) -> None:
        assert [bool(gov.limits.hit("i", "2/minute")) for _ in range(3)] == [True, True, False]
        assert gov.limits.peek("i", "2/minute").remaining == 0
        assert [bool(result) for result in gov.limits.hit_many([("j", "1/minute"), ("k", "1/minute")])] == [True, True]
        assert gov.limits.hit("n", "5/minute;9/hour").refund()
        assert gov.limits.hit("c", Limit(5, 60, algorithm="sliding_window_counter")).backend == "redis"
        assert gov.limits.check("l", limit=1, window=60)
        gov.limits.record("l", window=60)
        assert gov.limits.get_count("l", window=60) == 1
        gov.limits.reset("l")
        assert gov.limits.get_count("l", window=60) == 0

    def test_locks_and_waiting_for_one_without_blpop(self, gov: GovRedis, eventually: Eventually) -> None:
        held = gov.locks.acquire("r", timeout=30, ttl=60)

        def expires_at() -> float:
            return time.monotonic() + held.remaining()

        first = expires_at()
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(gov.locks.acquire, "r", timeout=30)
            eventually(lambda: redis_of(gov)._pop_not_taken)
            renew(held)
            eventually(lambda: expires_at() > first)  # a stall between its two looks makes it seem sooner
            held.raise_if_lost()
            assert not waiting.done()
            assert held.release()
            with waiting.result() as other:
                assert (other.degraded, other.token > held.token) == (False, True)
        with gov.locks.acquire_many(["x", "y"], timeout=30), gov.locks.rwlock("w").read(timeout=30):
            assert gov.locks.is_locked("x")
        with gov.locks.semaphore("s", slots=2).acquire(timeout=30):
            pass

    def test_metadata_without_postgresql(self, gov: GovRedis) -> None:
        loaded: list[str] = []

        def load(which: str) -> dict[str, str]:
            loaded.append(which)
            return {"of": which}

        for _ in range(2):
            assert gov.metadata.get_or_load("a", load) == {"of": "a"}
            assert gov.metadata.get_many(["b", "c"], lambda ids: {i: load(i) for i in ids}) == {
                "b": {"of": "b"}, "c": {"of": "c"}
            }  # fmt: skip
        assert sorted(loaded) == ["a", "b", "c"]
        gov.metadata.invalidate("a")
        assert gov.metadata.get("a") is None

    def test_scripts_come_back_on_each_of_several_servers(
        self, two: list[RedisServer], before: Before, make_gov: MakeGov
    ) -> None:
        with before(two) as proxy:
            gov = make_gov(redis_url=proxy.url, **PATIENT)
            for flushed in ([], two, two[:1], two[1:]):
                for server in flushed:
                    server.command("SCRIPT", "FLUSH")
                results = gov.limits.hit_many([(f"i{n}", "9/minute") for n in range(20)])
                assert {(result.backend, result.allowed) for result in results} == {("redis", True)}
            assert all(server.command("DBSIZE") > 0 for server in two)

    @pytest.mark.parametrize("how", ["killed", "paused"])
    def test_redis_behind_it_is_away_once(
        self, how: str, mortal_redis: RedisServer, before: Before,
        make_gov: MakeGov, eventually: Eventually, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        """It answers PING itself, and the others with an error."""
        caplog.set_level(logging.INFO, "govredis")
        with before([mortal_redis]) as proxy:
            gov = make_gov(redis_url=proxy.url, **PATIENT)
            assert gov.limits.hit("i", "9/minute").backend == "redis"
            if how == "killed":
                mortal_redis.kill()
            else:
                mortal_redis.pause()
                wait_at_most(redis_of(gov), 1)
            probes: list[int] = []
            probe = redis_of(gov).breaker._probe
            redis_of(gov).breaker._probe = lambda: probes.append(1) or probe()  # type: ignore[func-returns-value]
            eventually(lambda: gov.limits.hit("i", "9/minute").backend == "local" and len(probes) > 2)
            wait_at_most(redis_of(gov), 20)
            mortal_redis.start() if how == "killed" else mortal_redis.resume()
            eventually(lambda: gov.limits.hit("i", "900/minute", operation="back").backend == "redis")
            assert redis_of(gov).breaker.times_opened == 1
            eventually(lambda: len(levels(caplog, proxy.url)) > 1)  # it is said a moment after it is used
            assert levels(caplog, proxy.url) == ["WARNING", "INFO"]
            gov.close()  # while its server is there: what it has to tell yet would find it away


class TestTwemproxy:
    @pytest.fixture
    def before(self, twemproxy_before: Before) -> Before:
        return twemproxy_before

    def test_with_postgresql_too(
        self, proxy: Twemproxy, make_gov: MakeGov, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        use_with_postgresql(gov := make_gov(redis_url=proxy.url, database_url=postgres_server.url, local_cache=True))
        assert gov.health.snapshot().stored == "postgres"
        assert redis_of(gov).breaker.times_opened == 0
        assert [level for level in levels(caplog) if level != "INFO"] == ["WARNING"], "that nothing is cached here"
        assert "closes the connection at HELLO" in caplog.text

    @pytest.mark.parametrize(
        ("names", "ask"),
        [
            ("TIME", lambda redis: redis.call("TIME")),
            ("GET or INFO", lambda redis: redis.pipeline([("GET", "a"), ("INFO",)])),
            ("GET or INFO", lambda redis: redis.pipeline([("GET", "a"), ("INFO",)], each=True)),
            ("EXEC or GET or MULTI", lambda redis: redis.pipeline([("MULTI",), ("GET", "a"), ("EXEC",)])),
            ("BLPOP", lambda redis: redis.pop("a", 0.25)),
            ("HELLO", lambda redis: redis.push_stream()),
        ],
    )
    def test_a_command_that_it_does_not_take_is_an_error_and_no_outage(
        self, names: str, ask: Callable[[RedisNode], Any], gov: GovRedis, caplog: pytest.LogCaptureFixture
    ) -> None:
        redis = redis_of(gov)
        assert redis is not None
        for _ in range(3):
            with pytest.raises(BackendError, match=f"closes the connection at {names}, and answers PING") as caught:
                ask(redis)
            assert not isinstance(caught.value, BackendUnavailable)
            assert redis.call("SET", "a", "b") == b"OK"
        assert levels(caplog) == []

    def test_nor_is_a_database_that_it_cannot_select(self, proxy: Twemproxy, make_gov: MakeGov) -> None:
        redis = redis_of(make_gov(redis_url=proxy.url.removesuffix("0") + "1"))
        assert redis is not None
        for _ in range(3):
            with pytest.raises(BackendError, match="closes the connection at SELECT") as caught:
                redis.call("GET", "a")
            assert not isinstance(caught.value, BackendUnavailable)
        assert redis.breaker.closed

    def test_health_passes_and_says_what_it_cannot_tell(self, gov: GovRedis) -> None:
        report = gov.health.check()
        assert report.status == "pass"
        eviction = next(check for check in report.checks if check.name == "eviction")
        assert eviction.output.startswith("unknown: ")
        assert "closes the connection at INFO" in eviction.output


class TestEnvoy:
    @pytest.fixture
    def before(self, envoy_before: Before) -> Before:
        return envoy_before

    def test_with_postgresql_too(
        self, proxy: Envoy, make_gov: MakeGov, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        use_with_postgresql(gov := make_gov(redis_url=proxy.url, database_url=postgres_server.url, local_cache=True))
        assert gov.health.snapshot().stored == "redis"
        assert redis_of(gov).breaker.times_opened == 0
        assert [level for level in levels(caplog) if level != "INFO"] == ["WARNING"], "that nothing is cached here"
        assert "NOPROTO in answer to HELLO" in caplog.text

    def test_health_passes_and_holders_are_listed(self, gov: GovRedis) -> None:
        with gov.locks.acquire("r", timeout=30):
            assert [holder.name for holder in gov.locks.held()] == ["r"]
            assert gov.health.check().status == "pass"


def asked(proxy: HaProxy, command: str) -> bytes:
    """On a connection of its own, as each of them may lead elsewhere."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        connection.sendall(command.encode() + b"\r\n")
        return connection.recv(1000)


class TestHaProxy:
    def test_it_leads_to_the_replica_that_was_promoted(
        self, two: list[RedisServer], system_binary: Callable[[str], str], tmp_path: Path, make_gov: MakeGov,
        eventually: Eventually, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        caplog.set_level(logging.INFO, "govredis")
        master, replica = two
        replica.command("REPLICAOF", "127.0.0.1", str(master.port))
        with HaProxy(system_binary("haproxy"), tmp_path, two) as proxy:
            redis = redis_of(make_gov(redis_url=proxy.url, **PATIENT))

            def write(_: int = 0) -> bool:
                try:
                    return bool(redis.call("SET", "k", "v") == b"OK")  # type: ignore[union-attr]
                except BackendUnavailable:
                    return False

            def has_settled() -> bool:
                """It takes a server for a master until it has looked."""
                return all(asked(proxy, "ROLE").startswith(b"*3\r\n$6\r\nmaster") for _ in range(10))

            eventually(lambda: has_settled() and write())
            opened = redis.breaker.times_opened
            caplog.clear()
            with ThreadPoolExecutor(4) as threads:
                assert all(threads.map(write, range(100)))
                replica.command("REPLICAOF", "NO", "ONE")
                master.command("REPLICAOF", "127.0.0.1", str(replica.port))
                eventually(lambda: has_settled() and write())
                # Each connection to the demoted server that is in use at that moment is found out by its call.
                assert sum(not written for written in threads.map(write, range(100))) <= 4
                assert all(threads.map(write, range(100)))
            assert redis.breaker.times_opened - opened <= 1
            eventually(lambda: len(levels(caplog, proxy.url)) != 1)
            assert levels(caplog, proxy.url) in ([], ["WARNING", "INFO"])
            redis.pipeline([("MULTI",), ("SET", "by", "MULTI"), ("EXEC",)])
            assert replica.command("GET", "by") in ("MULTI", b"MULTI")
            redis.close()

    def test_without_a_master_it_is_away_once(
        self, mortal_redis: RedisServer, system_binary: Callable[[str], str], tmp_path: Path, make_gov: MakeGov,
        eventually: Eventually, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        """It accepts connections, and closes them."""
        caplog.set_level(logging.INFO, "govredis")
        with HaProxy(system_binary("haproxy"), tmp_path, [mortal_redis]) as proxy:
            gov = make_gov(redis_url=proxy.url, **PATIENT)
            eventually(lambda: gov.limits.hit("i", "900/minute").backend == "redis")
            caplog.clear()
            opened = redis_of(gov).breaker.times_opened
            mortal_redis.kill()
            eventually(lambda: not redis_of(gov).breaker.closed or not gov.limits.hit("i", "900/minute"))
            assert gov.limits.hit("i", "900/minute").backend == "local"
            mortal_redis.start()
            eventually(lambda: gov.limits.hit("i", "900/minute").backend == "redis")
            assert redis_of(gov).breaker.times_opened - opened == 1
            eventually(lambda: len(levels(caplog, proxy.url)) > 1)  # it is said a moment after it is used
            assert levels(caplog, proxy.url) == ["WARNING", "INFO"]
            gov.close()  # while its server is there: what it has to tell yet would find it away


class _Answering(_Server):
    """Answers everything with one line."""

    def __init__(self, line: bytes) -> None:
        self._line = line
        super().__init__()

    def serve(self, peer: socket.socket) -> None:
        while peer.recv(65536):
            peer.sendall(self._line + b"\r\n")


@pytest.mark.parametrize("line", [b"-no upstream host", b"-upstream failure", b"-ERR Host is down"])
def test_a_proxys_error_for_an_absent_redis_is_an_outage(line: bytes) -> None:
    with _Answering(line) as server:
        redis = RedisNode(Config(redis_url=f"redis://127.0.0.1:{server.port}/0", socket_timeout=10))
        with pytest.raises(BackendUnavailable, match="the proxy before it says: "):
            redis.call("GET", "k")
        assert not redis.breaker.closed
        redis.close()


def test_an_error_that_quotes_such_words_is_no_outage() -> None:
    with _Answering(b"-ERR unknown command 'Connection refused'") as server:
        redis = RedisNode(Config(redis_url=f"redis://127.0.0.1:{server.port}/0", socket_timeout=10))
        with pytest.raises(BackendError, match="unknown command") as caught:
            redis.call("GET", "k")
        assert not isinstance(caught.value, BackendUnavailable)
        assert redis.breaker.closed
        redis.close()


class _Ending(_Server):
    """Answers PING. The command that it does not bear ends it, the second time for good."""

    asked = 0

    def serve(self, peer: socket.socket) -> None:
        while found := peer.recv(65536):
            if b"PING" not in found:
                self.asked += 1
                if self.asked == 2:
                    self._listener.shutdown(socket.SHUT_RDWR)
                    self._listener.close()
                return
            peer.sendall(b"+PONG\r\n")

    def __exit__(self, *_: object) -> None:
        pass


def test_a_server_that_a_command_has_ended_is_away() -> None:
    with _Ending() as server:
        redis = RedisNode(Config(redis_url=f"redis://127.0.0.1:{server.port}/0", socket_timeout=10))
        with pytest.raises(BackendUnavailable, match="is away"):
            redis.call("GET", "k")
        assert server.asked == 2
        redis.close()


def test_a_command_whose_replies_are_lost_by_accident_is_not_refused_by_a_proxy(mortal_redis: RedisServer) -> None:
    """Three times in a row; at the fourth it is, where PING was answered each time."""
    with CuttingProxy(mortal_redis.port) as proxy:
        redis = RedisNode(Config(redis_url=proxy.url, socket_timeout=10))
        redis.call("PING")
        proxy.cut_next(b"GET", times=3)
        assert redis.call("GET", "k") is None
        redis.call("PING")  # over a connection that idles, the command is sent once more
        proxy.cut_next(b"GET", times=4)
        with pytest.raises(BackendError, match="closes the connection at GET, and answers PING"):
            redis.call("GET", "k")
        assert (proxy.cuts, redis.breaker.closed) == (7, True)
        redis.close()


@pytest.mark.parametrize("greeting", ["SELECT", "HELLO"])
def test_a_greeting_whose_reply_is_lost_by_accident_is_an_outage(greeting: str, mortal_redis: RedisServer) -> None:
    with CuttingProxy(mortal_redis.port) as proxy:
        redis = RedisNode(Config(redis_url=proxy.url.removesuffix("0") + "1", socket_timeout=10))
        proxy.cut_next(greeting.encode())
        with pytest.raises(BackendUnavailable, match=f"In answer to {greeting}"):
            redis.push_stream() if greeting == "HELLO" else redis.call("GET", "k")
        assert (redis.call("GET", "k"), proxy.cuts) == (None, 1)
        redis.close()
