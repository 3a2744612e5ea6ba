"""The transport by itself: what the broker could not be told is told as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from kombu import Connection

from govredis.testing.servers import RedisServer
from tasks import broker as mended

ERRORS = mended.Transport.connection_errors


@pytest.fixture
def connect(broker: RedisServer) -> Iterator[Callable[[], Connection]]:
    made: list[Connection] = []

    def connect() -> Connection:
        options = {"socket_timeout": 2, "socket_connect_timeout": 2, "max_retries": 0}
        made.append(Connection(broker.url, transport=mended.Transport, transport_options=options))
        return made[-1]

    yield connect
    if not broker.running:
        broker.restart()
    mended._untold.clear()
    for connection in made:
        connection.close()


def publish(broker: RedisServer, connection: Connection, body: str) -> None:
    with connection.Producer() as producer:
        producer.publish({"is": body}, exchange="", routing_key="queue")


def queued(broker: RedisServer) -> list[dict[str, str]]:
    """The bodies in the queue, the next one first."""
    from base64 import b64decode

    return [json.loads(b64decode(json.loads(m)["body"])) for m in reversed(broker.command("LRANGE", "queue", 0, -1))]


def unacked(broker: RedisServer) -> int:
    return int(broker.command("HLEN", "unacked"))


def test_an_ack_that_failed_is_repeated(broker: RedisServer, connect: Callable[[], Connection]) -> None:
    channel = connect().channel()
    publish(broker, connect(), "a")
    message = channel.basic_get("queue")
    broker.kill()
    message.ack()
    broker.restart()
    assert unacked(broker) == 1
    connect().channel().qos.restore_visible()  # as a worker does when it has connected
    assert unacked(broker) == 0
    assert queued(broker) == []


def test_an_ack_that_failed_frees_its_place_once_it_is_told(
    broker: RedisServer, connect: Callable[[], Connection]
) -> None:
    channel = connect().channel()
    channel.basic_qos(0, 1, False)
    publish(broker, connect(), "a")
    message = channel.basic_get("queue")
    broker.pause()
    message.ack()
    assert not channel.qos.can_consume()  # nothing is asked of a broker that hangs
    broker.resume()
    channel.qos.restore_visible()
    assert channel.qos.can_consume()
    assert unacked(broker) == 0


def test_an_ack_that_failed_is_repeated_by_the_next_one(broker: RedisServer, connect: Callable[[], Connection]) -> None:
    channel = connect().channel()
    for body in "ab":
        publish(broker, connect(), body)
    first, second = channel.basic_get("queue"), channel.basic_get("queue")
    broker.pause()
    first.ack()
    broker.resume()
    second.ack()
    assert unacked(broker) == 0


def test_an_ack_that_was_not_told_is_told_when_the_connection_is_closed(
    broker: RedisServer, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    channel = connection.channel()
    publish(broker, connect(), "a")
    publish(broker, connect(), "b")
    done, kept = channel.basic_get("queue"), channel.basic_get("queue")
    broker.kill()
    done.ack()
    broker.restart()
    connection.close()
    assert unacked(broker) == 0
    assert queued(broker) == [kept.payload] == [{"is": "b"}]


@pytest.mark.parametrize("away", ["killed", "hung"])
def test_a_message_that_could_not_be_noted_goes_back(
    broker: RedisServer, connect: Callable[[], Connection], away: str
) -> None:
    channel = connect().channel()
    for body in "ab":
        publish(broker, connect(), body)
    popped = channel.Message(channel._get("queue"), channel=channel)
    broker.kill() if away == "killed" else broker.pause()
    with pytest.raises(ERRORS):
        channel.qos.append(popped, popped.delivery_tag)
    broker.restart() if away == "killed" else broker.resume()
    assert queued(broker) == [{"is": "b"}]
    connect().channel().qos.restore_visible()
    assert queued(broker) == [{"is": "a"}, {"is": "b"}]
    assert unacked(broker) == 0


def test_a_reject_that_failed_is_repeated(broker: RedisServer, connect: Callable[[], Connection]) -> None:
    channel = connect().channel()
    publish(broker, connect(), "a")
    message = channel.basic_get("queue")
    broker.kill()
    message.reject(requeue=True)
    broker.restart()
    connect().channel().qos.restore_visible()
    assert queued(broker) == [{"is": "a"}]
    assert unacked(broker) == 0


def test_it_is_the_transport_of_redis_urls_and_of_no_others() -> None:
    from kombu.transport import resolve_transport, virtual

    assert resolve_transport("redis") is resolve_transport("rediss") is mended.Transport
    for url in ("amqp://", "amqps://"):
        with Connection(url) as connection:
            assert not isinstance(connection.transport, virtual.Transport)
