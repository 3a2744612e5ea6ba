"""Tasks that handle events: each event becomes a message of the task, whatever is away meanwhile."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.signals import setup_logging
from kombu.exceptions import OperationalError
from support import eventually

from govredis import GovRedis
from govredis.contrib.celery import _events, init_celery, on_event, rate_limited
from govredis.contrib.celery._events import EventForwarder, forwarders
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


@pytest.fixture
def handled() -> queue.Queue[Any]:
    return queue.Queue()


@pytest.fixture
def app(gov: GovRedis, handled: queue.Queue[Any], redis_server: RedisServer) -> Iterator[Celery]:
    app = Celery("mailer", broker=redis_server.url, set_as_current=False)
    app.conf.update(
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_transport_options={"socket_timeout": 60},
    )
    init_celery(app, gov)

    @app.task(name="handle", bind=True, shared=False)
    @rate_limited("100/hour", key="mail")
    @on_event("agent.*")
    def handle(self: Any, event: dict[str, Any]) -> None:
        handled.put((self.request.id, event))

    @app.task(name="other", shared=False)
    def other() -> None: ...

    yield app
    app.close()


@pytest.fixture
def started(app: Celery, gov: GovRedis) -> Iterator[Callable[[], EventForwarder]]:
    made: list[EventForwarder] = []

    def start() -> EventForwarder:
        app.finalize()
        (forwarder,) = forwarders(app, gov, f"worker-{len(made)}@host")
        forwarder.start()
        made.append(forwarder)
        eventually(lambda: gov.internal.context.redis.call("EXISTS", "events:agent"))  # type: ignore[union-attr]
        return forwarder

    yield start
    for forwarder in made:
        forwarder.stop()


def messages(gov: GovRedis, n: int) -> list[dict[str, Any]]:
    redis = gov.internal.context.redis
    assert redis is not None
    eventually(lambda: redis.call("LLEN", "celery") >= n)
    return [json.loads(message) for message in reversed(redis.call("LRANGE", "celery", "0", "-1"))]


@pytest.fixture
def logging_as_it_is() -> Iterator[None]:
    """A worker in this process leaves the loggers of the other tests alone."""

    def leave(**_: Any) -> None: ...

    setup_logging.connect(leave)
    yield
    setup_logging.disconnect(leave)


@pytest.mark.usefixtures("logging_as_it_is")
def test_a_worker_runs_the_task_for_each_event(app: Celery, gov: GovRedis, handled: queue.Queue[Any]) -> None:
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
        eventually(lambda: gov.internal.context.redis.call("EXISTS", "events:agent"))  # type: ignore[union-attr]
        ids = [gov.events.publish("agent.updated", {"n": n}, entity=n) for n in range(3)]
        gov.events.publish("agent", "not asked for")
        gov.events.publish("agent.deleted", None)
        found = [handled.get(timeout=60) for _ in range(4)]
    expected = {event.id: event.as_dict() for event in gov.events.listen("agent.*", after="0", timeout=0)}
    assert dict(found) == expected
    assert {identity for identity, _ in found} >= set(ids)
    assert gov.counters.get("celery.events") == 4


def test_events_wait_for_a_broker_that_is_away_and_none_is_given_up(
    app: Celery, gov: GovRedis, started: Callable[[], EventForwarder], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    tries = []
    monkeypatch.setattr(_events, "_RETRY", 0.01)
    forwarder = started()
    with monkeypatch.context() as patched:

        def away(*args: Any, **options: Any) -> Any:
            tries.append(1)
            raise OperationalError("it is away")

        patched.setattr(type(app.tasks["handle"]), "apply_async", away)
        ids = [gov.events.publish("agent.updated", n) for n in range(3)]
        eventually(lambda: len(tries) > 10)
    found = messages(gov, 3)
    assert [message["headers"]["id"] for message in found] == ids
    assert gov.events.dead("agent") == []
    assert caplog.text.count("cannot be published as tasks, and wait: it is away") == 1
    assert forwarder.is_alive()


def test_two_workers_publish_each_event_once(gov: GovRedis, started: Callable[[], EventForwarder]) -> None:
    started(), started()
    ids = [gov.events.publish("agent.updated", n) for n in range(50)]
    found = messages(gov, 50)
    assert sorted(message["headers"]["id"] for message in found) == sorted(ids)


def test_a_name_of_celerys_may_have_any_characters(app: Celery, gov: GovRedis) -> None:
    @app.task(name="mail:{send}", shared=False)
    @on_event("order.*")
    def send(event: dict[str, Any]) -> None: ...

    app.finalize()
    (forwarder,) = [each for each in forwarders(app, gov, "a:{b}@host") if each._topic == "order.*"]
    forwarder.start()
    try:
        eventually(lambda: gov.internal.context.redis.call("EXISTS", "events:order"))  # type: ignore[union-attr]
        gov.events.publish("order.paid", 1)
        assert [message["headers"]["task"] for message in messages(gov, 1)] == ["mail:{send}"]
    finally:
        forwarder.stop()


def test_a_forwarder_ends_when_its_worker_stops(gov: GovRedis, started: Callable[[], EventForwarder]) -> None:
    forwarder = started()
    forwarder.stop()
    eventually(lambda: not forwarder.is_alive())


def test_only_tasks_with_the_decorator_have_a_thread_and_none_without_redis(
    app: Celery, gov: GovRedis, make_gov: Callable[..., GovRedis]
) -> None:
    app.finalize()
    assert [forwarder._task.name for forwarder in forwarders(app, gov, "w")] == ["handle"]
    assert forwarders(app, make_gov(redis_enabled=False), "w") == []


def test_mistakes_are_refused_at_decoration(app: Celery) -> None:
    with pytest.raises(ValueError, match=r"^topic is "):
        on_event("a b")
    with pytest.raises(ValueError, match=r"^@on_event stands above @app\.task"):
        on_event("agent")(app.task(lambda event: None, name="x", shared=False))
    with pytest.raises(ValueError, match="it must be the function of a task"):
        on_event("agent")("x")  # type: ignore[type-var]
