"""A broker that hangs blocks a publisher for about a second, one that refuses not at all; nothing is sent twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tasks_worker import ROOT, environment

from govredis.testing.servers import RedisServer

REFUSED = "kombu.exceptions.OperationalError"


class Answer(NamedTuple):
    """How one publish ended, and the waits on its way there. See tasks_publisher.py."""

    error: str
    connects: int
    ran_out: list[float | None]
    pool: list[float | None]


class Publisher:
    """Another process that publishes discoveries, by their numbers."""

    def __init__(self, broker: RedisServer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("tasks_publisher.py")],
            env=environment(CELERY_BROKER_URL=broker.url, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def publish(self, number: int, threads: int = 1) -> list[Answer]:
        """The answer of each thread."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(number, threads, file=self._process.stdin, flush=True)
        return [Answer(*told) for told in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def publisher(broker: RedisServer) -> Iterator[Publisher]:
    publisher = Publisher(broker)
    try:
        assert publisher.publish(0)[0].error == ""
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


def test_a_broker_that_hangs(broker: RedisServer, publisher: Publisher, fresh: Publisher) -> None:
    broker.pause()
    # Warm, its connection known to be broken, and a process that has never connected.
    answers = [*publisher.publish(1), *publisher.publish(2), *fresh.publish(3)]
    assert {answer.error for answer in answers} == {REFUSED}
    assert [answer.connects for answer in answers] == [0, 1, 1], "no second try"
    assert [(answer.ran_out, answer.pool) for answer in answers] == [([1], [])] * 3, "a second"
    many = publisher.publish(4, threads=25)  # ten of them have a connection, the others wait for one
    assert {answer.error for answer in many} == {REFUSED}
    for answer in many:
        assert answer.connects <= 1
        assert answer.ran_out in ([], [1])
        # A second for a producer; and for its connection as long as another thread has it: that is a second, too.
        assert {*answer.pool} <= {1, None}
        assert answer.pool.count(None) <= 1
    broker.resume()
    assert [answer.error for answer in [*publisher.publish(5), *fresh.publish(6)]] == ["", ""]
    # Only what was sent before anybody could know may have arrived: once.
    seen = queued(broker)
    assert seen["0"] == seen["5"] == seen["6"] == 1
    assert seen["1"] <= 1
    assert seen["2"] == seen["3"] == seen["4"] == 0


def test_a_broker_that_refuses(broker: RedisServer, publisher: Publisher, fresh: Publisher) -> None:
    broker.kill()
    answers = [*publisher.publish(1), *publisher.publish(2), *fresh.publish(3)]
    assert {answer.error for answer in answers} == {REFUSED}
    assert max(answer.connects for answer in answers) == 1, "no second try"
    assert [(answer.ran_out, answer.pool) for answer in answers] == [([], [])] * 3, "at once"
    broker.restart()
    assert [answer.error for answer in [*publisher.publish(4), *fresh.publish(5)]] == ["", ""]
    assert queued(broker) == {"0": 1, "4": 1, "5": 1}


def test_a_broker_that_was_restarted_between_two_publishes(broker: RedisServer, publisher: Publisher) -> None:
    broker.kill()
    broker.restart()
    assert publisher.publish(1)[0].error == ""
    assert queued(broker) == {"0": 1, "1": 1}
