"""Events for browsers: sent as they come, from where the browser was, to those that the view lets in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient
from support import PATIENCE, Background, eventually, redis_of

from govredis import GovRedis
from govredis.contrib.flask import FlaskGovRedis
from govredis.contrib.flask._events import _lines
from govredis.testing.servers import RedisServer


@pytest.fixture
def view(app: Flask, ext: FlaskGovRedis) -> None:
    @app.get("/events")
    def events() -> Response:
        return ext.events("agent", only=lambda event: event.entity != "hidden", heartbeat=20)

    @app.get("/beating")
    def beating() -> Response:
        return ext.events("agent", only=lambda event: False, heartbeat=0.001)


def blocks(client: FlaskClient, path: str = "/events", last: str | None = None) -> Iterator[str]:
    """The blocks of the stream, as they come."""
    headers = {} if last is None else {"Last-Event-ID": last}
    response = client.get(path, headers=headers, buffered=False)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-store"
    stream = iter(response.response)
    first = next(stream)
    assert (first.decode() if isinstance(first, bytes) else first) == "retry: 2000\n\n"
    for block in stream:
        yield block.decode() if isinstance(block, bytes) else block


def parsed(block: str) -> tuple[str, Any]:
    position, data, *end = block.split("\n")
    assert end == ["", ""]
    assert (position[:4], data[:6]) == ("id: ", "data: ")
    return position[4:], json.loads(data[6:])


@pytest.mark.usefixtures("view")
class TestStream:
    def test_a_browser_gets_events_as_they_come_and_what_it_missed(self, gov: GovRedis, client: FlaskClient) -> None:
        stream = blocks(client)
        comes = Background(lambda: next(stream))
        redis = redis_of(gov)
        eventually(lambda: b"cmd=xread" in redis.call("CLIENT", "LIST"))
        identity = gov.events.publish("agent.updated", {"text": "a\nb\u2028"}, entity="a")
        position, event = parsed(comes.result())
        (held,) = gov.events.listen("agent", after="0", timeout=0)
        assert event == held.as_dict()
        assert (event["payload"], event["id"]) == ({"text": "a\nb\u2028"}, identity)
        gov.events.publish("agent", "hidden", entity="hidden")
        gov.events.publish("agent", 2)
        assert parsed(next(stream))[1]["payload"] == 2
        stream.close()  # type: ignore[attr-defined]
        again = blocks(client, last=position)
        assert parsed(next(again))[1]["payload"] == 2

    @pytest.mark.parametrize("last", ["", "0", "$", "nonsense", "1-2-3", "é"])
    def test_a_strangers_last_event_id_is_no_error(self, gov: GovRedis, client: FlaskClient, last: str) -> None:
        gov.events.publish("agent", "old")
        response = client.get("/events", headers={"Last-Event-ID": last}, buffered=False)
        assert response.status_code == 200
        gov.events.publish("agent", "new")
        stream = iter(response.response)
        next(stream)
        assert '"new"' in str(next(stream))

    def test_a_heartbeat_tells_the_place(self, gov: GovRedis, client: FlaskClient, plain_redis: Any) -> None:
        gov.events.publish("agent", 1)
        stream = blocks(client, "/beating")
        ((place, _),) = plain_redis.xrange("events:agent")
        assert next(stream) == f"id: {place}\n\n"
        gov.events.publish("agent", 2)
        place = plain_redis.xrevrange("events:agent", count=1)[0][0]
        eventually(lambda: next(stream) == f"id: {place}\n\n")

    def test_a_heartbeat_comes_between_events_of_other_topics(self, gov: GovRedis, ext: FlaskGovRedis) -> None:
        until = time.monotonic() + PATIENCE

        def others() -> None:
            assert time.monotonic() < until, "no heartbeat"
            gov.events.publish("agent.theirs", 1)

        with gov.events.listen("agent.mine") as listener:
            listener.before_waiting = others
            stream = _lines(listener, None, 0.05)
            assert next(stream) == "retry: 2000\n\n"
            assert next(stream) == f"id: {listener.position}\n\n"

    def test_what_was_trimmed_is_told(self, gov: GovRedis, client: FlaskClient, plain_redis: Any) -> None:
        for n in range(3):
            gov.events.publish("agent", n)
        first = plain_redis.xrange("events:agent")[0][0]
        plain_redis.xtrim("events:agent", maxlen=1, approximate=False)
        assert parsed(next(blocks(client, last=first)))[1]["missed"] == 1

    def test_a_head_request_ends(self, client: FlaskClient) -> None:
        assert client.head("/events").status_code == 200


def test_a_stream_that_begins_in_an_outage_goes_on(app: Flask, mortal_redis: RedisServer, make_gov: Any) -> None:
    gov = make_gov(redis_url=mortal_redis.url)
    ext = FlaskGovRedis(app, gov)

    @app.get("/events")
    def events() -> Response:
        return ext.events("agent", heartbeat=0.01)

    mortal_redis.kill()
    stream = blocks(app.test_client())
    assert next(stream).startswith("id: ")
    mortal_redis.start()
    eventually(lambda: redis_of(gov).breaker.closed)
    gov.events.publish("agent", 1)
    assert parsed(eventually(lambda: "data" in (block := next(stream)) and block))[1]["payload"] == 1


@pytest.mark.parametrize("bad", [{"topic": "a b"}, {"topic": "agent", "heartbeat": 0}])
def test_a_bad_argument_is_a_value_error(app: Flask, ext: FlaskGovRedis, bad: dict[str, Any]) -> None:
    with (
        app.test_request_context(headers={"Last-Event-ID": "1-1"}),
        pytest.raises(ValueError, match=r"^(topic|heartbeat) is "),
    ):
        ext.events(**bad)
