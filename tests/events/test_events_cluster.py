"""Events on a Redis Cluster: each stream is on one node, and costs nothing but its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from shards import FAILING_OVER, SHAPE, Shards, closed
from support import PATIENT, client_of, eventually

from govredis import BackendUnavailable, GovRedis
from govredis.events import Event
from govredis.keys import Keys
from govredis.testing.servers import PostgresServer, RedisCluster

pytestmark = [pytest.mark.once]

KEYS = Keys()


@pytest.fixture(scope="module")
def running(one_redis_binary: str) -> Iterator[Shards]:
    with RedisCluster(binary=one_redis_binary, **SHAPE) as cluster:
        yield Shards(cluster)


@pytest.fixture
def shards(running: Shards) -> Shards:
    running.revive()
    return running


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], shards: Shards, postgres_server: PostgresServer) -> GovRedis:
    return make_gov(redis_url=shards.url, database_url=postgres_server.url, **PATIENT)


def publish_in_transaction(gov: GovRedis, postgres: PostgresServer, topics: list[str]) -> None:
    with contextlib.closing(psycopg2.connect(postgres.url)) as connection:
        for topic in topics:
            gov.events.publish(topic, {"in": topic}, connection)
        connection.commit()


def read(gov: GovRedis, topic: str) -> list[object]:
    with gov.events.listen(topic, after="0", timeout=0) as events:
        return [event.payload for event in events]


def cannot_deliver(gov: GovRedis) -> bool:
    try:
        gov.events.deliver()
    except BackendUnavailable:
        return True
    return False


def waiting(gov: GovRedis) -> list[tuple[str]]:
    """The streams of the events that are still in PostgreSQL."""
    assert gov.postgres is not None
    return gov.postgres.fetch("SELECT DISTINCT stream FROM govredis_events")


def test_streams_on_all_nodes(gov: GovRedis, shards: Shards) -> None:
    for topic in shards.ids(KEYS.events, "topic"):
        for n in range(3):
            gov.events.publish(topic, n)
        assert read(gov, topic) == [0, 1, 2]
        with gov.events.consume("group", "name", topic, timeout=0) as events:
            assert [event.payload for event in events] == [0, 1, 2]
        assert gov.events.dead(topic) == []


def test_a_node_that_is_away_costs_its_own_streams(gov: GovRedis, shards: Shards) -> None:
    topics = shards.ids(KEYS.events, "topic")
    shards.cluster.nodes[1].kill()
    for n in (0, 2):
        gov.events.publish(topics[n], n)
        assert read(gov, topics[n]) == [n]
    with pytest.raises(BackendUnavailable):
        gov.events.publish(topics[1], 1)


def test_events_of_transactions_wait_for_their_node_and_no_other(
    gov: GovRedis, shards: Shards, postgres_server: PostgresServer
) -> None:
    topics = shards.ids(KEYS.events, "topic")
    relay = gov.events.relay
    assert relay is not None
    for dead in (0, 1, 2):
        shards.cluster.nodes[dead].kill()
        publish_in_transaction(gov, postgres_server, topics)
        # The relay's own thread may be at some of them meanwhile.
        eventually(lambda: cannot_deliver(gov))
        eventually(lambda dead=dead: waiting(gov) == [(topics[dead],)])  # type: ignore[misc]
        for n in {0, 1, 2} - {dead}:
            assert read(gov, topics[n])[-1] == {"in": topics[n]}
        assert waiting(gov) == [(topics[dead],)]
        shards.start(shards.cluster.nodes[dead])
        closed(gov, map(KEYS.events, topics))
        eventually(lambda: gov.events.deliver() or not waiting(gov))
    assert [len(read(gov, topic)) for topic in topics] == [3, 3, 3]


def test_a_listener_goes_on_where_its_stream_has_moved_to(gov: GovRedis, shards: Shards) -> None:
    topic = shards.ids(KEYS.events, "topic")[0]
    slot = shards.cluster.nodes[0].command("CLUSTER", "KEYSLOT", KEYS.events(topic))
    found: list[Event] = []
    listener, consumer = gov.events.listen(topic), gov.events.consume("group", "name", topic)

    def collect(reader: Iterator[Event]) -> None:
        for event in reader:
            found.append(event)

    threads = [threading.Thread(target=collect, args=(reader,)) for reader in (listener, consumer)]
    for thread in threads:
        thread.start()
    try:
        gov.events.publish(topic, 0)
        eventually(lambda: len(found) == 2)
        shards.cluster.move_slots([slot], shards.cluster.nodes[1])
        gov.events.publish(topic, 1)
        eventually(lambda: len(found) == 4)
    finally:
        listener.close()
        consumer.close()
        for thread in threads:
            thread.join(20)
        shards.cluster.move_slots([slot], shards.cluster.nodes[0])
    assert sorted(event.payload for event in found) == [0, 0, 1, 1]
    assert not any(event.missed for event in found)
    assert client_of(gov).at(KEYS.events(topic)).breaker.closed


def test_listeners_and_transactions_bear_a_failover(
    make_gov: Callable[..., GovRedis], one_redis_binary: str, postgres_server: PostgresServer
) -> None:
    with RedisCluster(binary=one_redis_binary, **FAILING_OVER) as cluster:
        gov = make_gov(redis_url=cluster.url, database_url=postgres_server.url, **PATIENT)
        first = cluster.master_of(KEYS.events("topic"))
        gov.events.publish("topic", 0)
        (replica,) = cluster.replicas_of(first)
        eventually(lambda: replica.command("DBSIZE") == first.command("DBSIZE"))
        with gov.events.listen("topic", after="0") as listener:
            assert next(listener).payload == 0
            first.kill()
            publish_in_transaction(gov, postgres_server, ["topic"])
            event = next(listener)
        assert (event.payload, event.missed) == ({"in": "topic"}, 0)
        assert cluster.master_of(KEYS.events("topic")) is not first
