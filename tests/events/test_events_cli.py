"""`govredis events`, as a program reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_events import kept

from govredis import GovRedis
from govredis.cli import main
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


@pytest.fixture
def invoke(redis_server: RedisServer) -> Callable[..., Result]:
    def run(*arguments: str, options: tuple[str, ...] = ("--json",)) -> Result:
        return CliRunner().invoke(main, ["events", *arguments, *options], env={"REDIS_URL": redis_server.url})

    return run


def objects(done: Result) -> list[Any]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.output.splitlines()]


def test_tail_prints_a_json_object_a_line(gov: GovRedis, invoke: Callable[..., Result]) -> None:
    began = datetime.now(timezone.utc)
    identity = gov.events.publish("agent.updated", {"text": "\x1b[31m\x7f\né"}, entity="a\u2028")
    gov.events.publish("agent", 2)
    first, _ = kept(gov)
    done = invoke("tail", "agent", "--after", "0", "--timeout", "0")
    assert done.output.isascii()
    assert "\x7f" not in done.output
    one, two = objects(done)
    assert one == {
        "topic": "agent.updated",
        "entity": "a\u2028",
        "payload": {"text": "\x1b[31m\x7f\né"},
        "at": first.at.isoformat(),
        "id": identity,
        "position": first.position,
        "missed": 0,
    }
    assert (two["entity"], two["payload"]) == (None, 2)
    assert objects(invoke("tail", "agent", "--after", first.position, "--timeout", "0")) == [two]
    assert objects(invoke("tail", "agent", "--timeout", "0")) == []
    assert objects(invoke("tail", "agent.updated", "--after", "0", "--timeout", "0")) == [one]
    ago = datetime.fromtimestamp(began.timestamp() - 3600, timezone.utc).isoformat().replace("+00:00", "Z")
    assert objects(invoke("tail", "agent", "--after", ago, "--timeout", "0")) == [one, two]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tail", "a b"), "Error: topic is 'a b'"),
        (("tail", "agent", "--after", "Tuesday"), "Error: after is 'Tuesday'; it must be '$' for new events"),
        (("tail", "agent", "--after", "2026-01-01T00:00:00"), "aware datetime"),
    ],
)
def test_a_mistake_is_a_line(invoke: Callable[..., Result], arguments: tuple[str, ...], said: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_dead_prints_what_was_given_up(gov: GovRedis, invoke: Callable[..., Result]) -> None:
    identity = gov.events.publish("agent", 1)
    for _ in range(2):
        gov.events.consume("g", "c", "agent", deliveries=1).get(0)
    (one,) = objects(invoke("dead", "agent"))
    assert (one["id"], one["group"], one["deliveries"]) == (identity, "g", 1)
    assert objects(invoke("dead", "other")) == []


def test_people_get_a_line_for_each(gov: GovRedis, invoke: Callable[..., Result]) -> None:
    assert invoke("dead", "agent", options=()).output == "no event was given up\n"
    gov.events.publish("agent.updated", {"text": "\x1b[31m\u202eé"}, entity="a\u2028")
    gov.events.publish("agent", None)
    shown = invoke("tail", "agent", "--after", "0", "--timeout", "0", options=()).output.splitlines()
    first, _ = kept(gov)
    at = first.at.isoformat(sep=" ", timespec="milliseconds")
    assert shown[0] == at + r'  agent.updated  a\u2028  {"text": "\u001b[31m\u202eé"}'
    assert shown[1].endswith("  agent  -  null")
    for _ in range(2):
        gov.events.consume("g", "c", "agent", deliveries=1).get(0)
    (given_up, *_) = invoke("dead", "agent", options=()).output.splitlines()
    assert given_up.endswith("  g, 1 times")
