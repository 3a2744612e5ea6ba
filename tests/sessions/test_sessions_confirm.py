"""GOVREDIS_CONFIRM: a session is revoked once a replica has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support import PATIENT, client_of, eventually

from govredis import BackendUnavailable, Config, GovRedis, SessionStoreUnavailable
from govredis.keys import Keys
from govredis.testing.servers import PostgresServer, RedisCluster, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]
KEYS = Keys()


@pytest.fixture(scope="module")
def pair(redis_binary: str) -> Iterator[tuple[RedisServer, RedisServer]]:
    with RedisServer(binary=redis_binary) as primary, RedisServer(binary=redis_binary) as replica:
        replica.command("REPLICAOF", "127.0.0.1", primary.port)
        yield primary, replica


@pytest.fixture
def primary(pair: tuple[RedisServer, RedisServer]) -> Iterator[RedisServer]:
    """Its replica is in step."""
    primary, replica = pair
    primary.command("FLUSHALL")

    def is_in_step() -> bool:
        primary.command("SET", "in step", "1")
        return "in step" in replica.command("KEYS", "in step")

    eventually(is_in_step)
    yield primary
    replica.resume()


@pytest.fixture
def gov(make_gov: MakeGov, primary: RedisServer) -> GovRedis:
    return make_gov(redis_url=primary.url, confirm=True, socket_timeout=2)


def test_a_replica_that_is_there_has_each_revocation(gov: GovRedis, pair: tuple[RedisServer, RedisServer]) -> None:
    replica = pair[1]
    for sid in ("s", "t", "u"):
        gov.sessions.bind(sid, "a")
    assert gov.sessions.unbind("s")
    assert replica.command("EXISTS", KEYS.session("s")) == 0
    assert gov.sessions.unbind_agent("a") == 2
    assert replica.command("EXISTS", KEYS.session("t"), KEYS.session("u")) == 0
    assert gov.sessions.unbind_agent("nobody") == 0
    new = gov.sessions.start("a", replacing="v")
    rotated = gov.sessions.rotate(new.session_id)
    assert rotated is not None
    assert replica.command("EXISTS", KEYS.session(new.session_id)) == 0
    assert gov.counters.get("sessions.unconfirmed") == 0


def test_a_revocation_that_no_replica_confirms_is_said_and_holds(
    gov: GovRedis, primary: RedisServer, pair: tuple[RedisServer, RedisServer]
) -> None:
    replica = pair[1]
    for sid in ("s", "t"):
        gov.sessions.bind(sid, "a")
    replica.pause()
    for revoke in (lambda: gov.sessions.unbind("s"), lambda: gov.sessions.unbind_agent("a")):
        with pytest.raises(SessionStoreUnavailable, match="no replica has confirmed it in time"):
            revoke()
    assert primary.command("EXISTS", KEYS.session("s"), KEYS.session("t")) == 0
    assert not gov.sessions._memory.knows("s")
    assert not gov.sessions._memory.knows("t")
    assert gov.counters.get("sessions.unconfirmed") == 2
    assert not [name for name in gov.counters.read() if "sessions.degraded" in name], "Redis is there"
    assert gov.sessions.get("s") is None
    replica.resume()
    eventually(lambda: "t" not in replica.command("KEYS", "*t"))
    assert gov.sessions.unbind("s") is False, "again, and confirmed"


def test_with_postgres_the_row_is_the_record(
    make_gov: MakeGov, primary: RedisServer, pair: tuple[RedisServer, RedisServer], postgres_server: PostgresServer
) -> None:
    gov = make_gov(redis_url=primary.url, database_url=postgres_server.url, confirm=True, socket_timeout=2)
    gov.sessions.bind("s", "a")
    pair[1].pause()
    assert gov.sessions.unbind("s")


def test_a_revocation_survives_the_failover_of_its_node(make_gov: MakeGov, one_redis_binary: str) -> None:
    config = ["cluster-require-full-coverage no"]
    with RedisCluster(binary=one_redis_binary, config=config) as cluster:
        gov = make_gov(redis_url=cluster.url, confirm=True, socket_timeout=2, connect_timeout=2)
        ids = [f"s{n}" for n in range(12)]
        for sid in ids:
            gov.sessions.bind(sid, "a")
        assert gov.sessions.unbind_agent("a") == len(ids)
        first = cluster.master_of(KEYS.session(ids[0]))
        first.kill()
        other = client_of(make_gov(redis_url=cluster.url, **PATIENT))

        def is_gone(sid: str) -> bool:
            try:
                return bool(other.call("EXISTS", KEYS.session(sid)) == 0)
            except BackendUnavailable:
                return False

        eventually(lambda: cluster.master_of(KEYS.session(ids[0])) is not first)
        for sid in ids:
            eventually(lambda sid=sid: is_gone(sid))


def test_in_memory_there_is_nobody_to_confirm() -> None:
    with GovRedis.in_memory(Config(confirm=True)) as gov:
        gov.sessions.bind("s", "a")
        assert gov.sessions.unbind("s")
