"""A broker that hangs blocks a publisher for about a second, one that refuses not at all; nothing is sent twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tasks_worker import ROOT, environment

from govredis.testing.servers import RedisServer

REFUSED = "kombu.exceptions.OperationalError"


class Publisher:
    """Another process that publishes discoveries, by their numbers."""

    def __init__(self, broker: RedisServer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("tasks_publisher.py")],
            env=environment(CELERY_BROKER_URL=broker.url, PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def publish(self, number: int, threads: int = 1) -> list[tuple[float, str]]:
        """Of each thread: the seconds it took, and the error's type."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(number, threads, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def publisher(broker: RedisServer) -> Iterator[Publisher]:
    publisher = Publisher(broker)
    try:
        assert publisher.publish(0)[0][1] == ""
        yield publisher
    finally:
        publisher.close()


@pytest.fixture
def fresh(broker: RedisServer) -> Iterator[Publisher]:
    publisher = Publisher(broker)
    yield publisher
    publisher.close()


def queued(broker: RedisServer) -> Counter[str]:
    """How often each discovery is in the queue."""
    messages = map(json.loads, broker.command("LRANGE", "celery", 0, -1))
    return Counter(message["headers"]["argsrepr"].split(", ")[1].rstrip(")") for message in messages)


def test_a_broker_that_hangs(
    broker: RedisServer, publisher: Publisher, fresh: Publisher, oversleeping: Callable[[], float]
) -> None:
    broker.pause()
    # Warm, its connection known to be broken, and a process that has never connected.
    answers = [*publisher.publish(1), *publisher.publish(2), *fresh.publish(3)]
    assert {error for _, error in answers} == {REFUSED}
    # A second, on a busy machine; a second try would be another.
    assert max(seconds for seconds, _ in answers) < 1.9 + oversleeping()
    many = publisher.publish(4, threads=25)  # ten of them have a connection, the others wait for one
    assert {error for _, error in many} == {REFUSED}
    assert max(seconds for seconds, _ in many) < 3.9 + oversleeping()
    broker.resume()
    assert [error for _, error in [*publisher.publish(5), *fresh.publish(6)]] == ["", ""]
    # Only what was sent before anybody could know may have arrived: once.
    seen = queued(broker)
    assert seen["0"] == seen["5"] == seen["6"] == 1
    assert seen["1"] <= 1
    assert seen["2"] == seen["3"] == seen["4"] == 0


def test_a_broker_that_refuses(
    broker: RedisServer, publisher: Publisher, fresh: Publisher, oversleeping: Callable[[], float]
) -> None:
    broker.kill()
    answers = [*publisher.publish(1), *publisher.publish(2), *fresh.publish(3)]
    assert {error for _, error in answers} == {REFUSED}
    assert max(seconds for seconds, _ in answers) < 0.9 + oversleeping()  # at once
    broker.restart()
    assert [error for _, error in [*publisher.publish(4), *fresh.publish(5)]] == ["", ""]
    assert queued(broker) == {"0": 1, "4": 1, "5": 1}


def test_a_broker_that_was_restarted_between_two_publishes(broker: RedisServer, publisher: Publisher) -> None:
    broker.kill()
    broker.restart()
    assert publisher.publish(1)[0][1] == ""
    assert queued(broker) == {"0": 1, "1": 1}
