"""Tasks that rate_limited parks: the message as it was, published when due, worked on once, whatever goes away.

By workers in this process, on a broker of the fleet's.
"""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery, group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from celery.result import AsyncResult
from celery.signals import task_received
from celery_fleet import close_backend
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.memory import Transport as MemoryTransport
from stalls import undisturbed
from support import PATIENCE, REDIS_AWAY, eventually, redis_of
from test_celery_decorators import Striking, run
from test_celery_workers import most_within

from govredis import GovRedis, Limit, RateLimitExceeded
from govredis.contrib.celery import _parking as parking_module
from govredis.contrib.celery import _publisher as publisher_module
from govredis.contrib.celery import apply_reserved, exclusive, init_celery, rate_limited
from govredis.contrib.celery._parking import HEADER, arrival_of, decode, lot_of, still_to_wait, to_publish
from govredis.contrib.celery._publisher import Publisher
from govredis.limits import parked as parked_module
from govredis.limits.parked import Arrival, ParkingLot
from govredis.testing.servers import RedisServer

# The warning is about Celery's use of redis-py, in a worker that is otherwise a process of its own.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

QUIET = {f"govredis_{name}_interval": None for name in ("census", "heartbeat", "snapshot", "purge")}


@pytest.fixture
def gov(celery_redis: RedisServer, make_gov: Callable[..., GovRedis]) -> GovRedis:
    return make_gov(redis_url=celery_redis.url, key_prefix=f"{uuid.uuid4().hex}:")


@pytest.fixture
def make_app(request: pytest.FixtureRequest) -> Iterator[Callable[..., Celery]]:
    made: list[Celery] = []

    def make(broker: RedisServer, gov: GovRedis | None = None, **conf: Any) -> Celery:
        server = broker.url.removesuffix("/0")
        # As a module of its own: its queue and results are nobody else's.
        backend = conf.pop("backend", f"{server}/8")
        app = Celery("mine", broker=f"{server}/7", backend=backend, set_as_current=False)
        app.conf.update(
            task_default_queue=uuid.uuid4().hex,
            accept_content=["json", "pickle"],
            worker_prefetch_multiplier=1,
            broker_connection_retry_on_startup=True,
            **{**QUIET, **conf},
        )
        init_celery(app, gov or request.getfixturevalue("gov"))
        made.append(app)
        if backend is not None:
            app.backend.remove_pending_result = lambda result: result
        return app

    yield make
    for app in made:
        if app.conf.result_backend is not None:
            close_backend(app)
        app.close()


@pytest.fixture
def app(make_app: Callable[..., Celery], celery_broker: RedisServer) -> Celery:
    return make_app(celery_broker)


def lot(app: Celery, gov: GovRedis) -> ParkingLot:
    found = lot_of(app, gov)
    assert found is not None
    return found


@contextmanager
def working(app: Celery, **options: Any) -> Iterator[None]:
    """A worker in this process. Its changes to the logging are undone: other tests look at that."""
    root = logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    try:
        with start_worker(app, perform_ping_check=False, shutdown_timeout=30, **options):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextmanager
def deliveries() -> Iterator[list[Any]]:
    """The requests that arrive at a worker."""
    seen: list[Any] = []

    def note(request: Any, **_: Any) -> None:
        seen.append(request)

    task_received.connect(note)
    yield seen
    task_received.disconnect(note)


def limited_task(app: Celery, rate: str = "1/hour", **options: Any) -> tuple[Any, list[Any]]:
    """A task, and what it was run with."""
    ran: list[Any] = []

    @app.task(shared=False, name="limited", **options)
    @rate_limited(rate, key=lambda *args, **kwargs: "a", operation="parking")
    def task(*args: Any, **kwargs: Any) -> Any:
        ran.append((args, kwargs))
        return len(ran)

    return task, ran


def delivered(app: Celery) -> dict[str, Any]:
    """By the app's own queue, for `run`."""
    return {"delivery_info": {"exchange": "", "routing_key": app.conf.task_default_queue}}


def use_up(gov: GovRedis, rate: str = "1/hour") -> None:
    assert gov.limits.hit("a", rate, operation="parking")


def go_on(app: Celery, gov: GovRedis, identity: str = "a") -> None:
    """As when the window of the limit is over, once a message is parked: there is room, and it is due."""
    eventually(lambda: lot(app, gov).count() == 1, what="it is parked")
    gov.limits.reset(identity, operation="parking")
    lot(app, gov).flush()


class TestTheMessage:
    @pytest.mark.parametrize("own", ["json", "pickle"])
    @pytest.mark.parametrize("sent_as", ["json", "pickle"])
    def test_is_as_it_was(self, app: Celery, gov: GovRedis, own: str, sent_as: str) -> None:
        task, ran = limited_task(app, serializer=own)
        value = {1, 2} if sent_as == "pickle" else {"é": [1, None]}
        options = {
            "headers": {"x-tenant": "acme"},
            "priority": 3,
            "expires": 300,
            "link": task.si(5).set(queue="elsewhere"),
            "reply_to": "somebody",
            "time_limit": 70,
            "soft_time_limit": 60,
            "shadow": "by another name",
            "ignore_result": True,
        }
        with deliveries() as seen, working(app):
            use_up(gov)
            task.apply_async((value,), {"n": 1}, serializer=sent_as, **options)
            go_on(app, gov)
            eventually(lambda: ran, what="it ran")
        assert ran == [((value,), {"n": 1})]
        first, second = (request._message for request in seen)
        assert (second.content_type, second.content_encoding) == (first.content_type, first.content_encoding)
        assert first.content_type == {"json": "application/json", "pickle": "application/x-python-serialize"}[sent_as]
        assert second.decode() == first.decode()
        assert {**second.headers, HEADER: None} == {**first.headers, HEADER: None}
        assert first.headers["x-tenant"] == "acme"
        times, publication, of = second.headers[HEADER].split(":")
        assert (times, len(publication), of) == ("1", 12, "0.0")
        for name in ("priority", "correlation_id", "reply_to", "delivery_mode"):
            assert second.properties[name] == first.properties[name]
        assert second.delivery_info == first.delivery_info
        assert gov.counters.get("celery.parked") == gov.counters.get("celery.published") == 1

    def test_goes_where_it_came_from(self, app: Celery, gov: GovRedis) -> None:
        """By an exchange of its own."""
        from kombu import Exchange, Queue

        exchange = Exchange(uuid.uuid4().hex, type="direct")
        queue = Queue(uuid.uuid4().hex, exchange, routing_key="limited.one")
        app.conf.task_queues = [queue]
        task, ran = limited_task(app)
        with deliveries() as seen, working(app):
            use_up(gov)
            # Not before: nobody would have bound the queue.
            task.apply_async((1,), exchange=exchange.name, routing_key="limited.one")
            go_on(app, gov)
            eventually(lambda: ran, what="it ran")
        assert [request.delivery_info["exchange"] for request in seen] == [exchange.name] * 2
        assert [request.delivery_info["routing_key"] for request in seen] == ["limited.one"] * 2

    def test_waits_with_its_budget_untouched_and_its_state_says_so(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app, "1/hour", max_retries=0)
        with working(app):
            use_up(gov, "1/hour")
            result = task.delay()
            eventually(lambda: result.state == "RETRY", what="it waits")
            ((due, message),) = lot(app, gov).first(9)
            assert 3000 < due <= 3600
            assert json.loads(message)["id"] == result.id
            assert not ran
            gov.limits.reset("a", operation="parking")
            lot(app, gov).flush()
            assert result.get(PATIENCE) == 1
            eventually(lambda: lot(app, gov).count() == 0, what="nothing is parked any more")
        assert task.max_retries == 0
        assert not hasattr(task, "override_max_retries")

    def test_each_retry_of_the_users_is_a_run_of_its_own(self, app: Celery, gov: GovRedis) -> None:
        """It is limited, runs, fails, is retried, is limited."""
        ran: list[int] = []

        @app.task(
            shared=False,
            name="failing",
            bind=True,
            autoretry_for=(KeyError,),
            retry_kwargs={"max_retries": 1, "countdown": 0},
        )
        @rate_limited("1/hour", key=lambda self: "a", operation="parking")
        def failing(self: Any) -> int:
            ran.append(self.request.retries)
            if not self.request.retries:
                raise KeyError
            return 7

        with deliveries() as seen, working(app):
            use_up(gov)
            result = failing.delay()
            go_on(app, gov)
            eventually(lambda: ran == [0], what="it failed")
            go_on(app, gov)
            assert result.get(PATIENCE) == 7
        assert ran == [0, 1]
        assert [request.request_dict.get(HEADER, "::").split(":")[::2] for request in seen] == [
            ["", ""],
            ["1", "0.0"],
            ["1", "0.0"],  # the retry brings the header of the run before along, which is none of its own
            ["1", "1.0"],
        ]

    def test_a_task_that_replaces_itself_is_another_run(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)

        @app.task(shared=False, name="replaced", bind=True)
        @rate_limited("1/hour", key=lambda self: "b", operation="parking")
        def replaced(self: Any) -> None:
            self.replace(task.s(3))

        with working(app):
            use_up(gov)
            gov.limits.hit("b", "1/hour", operation="parking")
            result = replaced.delay()
            go_on(app, gov, "b")
            eventually(lambda: gov.counters.get("celery.parked") == 2, what="the other one is parked")
            go_on(app, gov)
            assert result.get(PATIENCE) == 1
        assert ran == [((3,), {})]

    def test_a_conflict_of_a_lock_below_or_above_it_loses_nothing(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from govredis.contrib.celery import _decorators

        monkeypatch.setattr(_decorators, "_FIRST_WAIT", 0.01)
        ran: list[str] = []

        @app.task(shared=False, name="below")
        @rate_limited("1/3 seconds", key="{agent}", operation="parking")
        @exclusive("x:{agent}")
        def below(agent: str) -> None:
            ran.append(agent)

        @app.task(shared=False, name="above")
        @exclusive("x:{agent}")
        @rate_limited("1/3 seconds", key="{agent}", operation="parking")
        def above(agent: str) -> None:
            ran.append(agent)

        for agent in ("b", "c"):
            gov.limits.hit(agent, "1/3 seconds", operation="parking")
        with gov.locks.acquire("x:b"), working(app):
            below.delay("b"), above.delay("c")
            eventually(lambda: ran, what="the one above ran")
            with gov.locks.acquire("x:c"):
                above.delay("c")
                eventually(lambda: gov.counters.get("celery.conflicts.retry") > 2, what="both meet the lock")
        with working(app):
            eventually(lambda: len(ran) == 3, what="all ran")
        assert sorted(ran) == ["b", "c", "c"]

    @pytest.mark.parametrize("pool", ["solo", "threads"])
    def test_pools(self, app: Celery, gov: GovRedis, pool: str) -> None:
        task, ran = limited_task(app, "2/3 seconds")
        with deliveries() as seen, working(app, pool=pool, concurrency=2):
            results = [task.delay(n) for n in range(5)]
            assert sorted(result.get(PATIENCE) for result in results) == [1, 2, 3, 4, 5]
        assert len(seen) <= 9
        assert len(ran) == 5

    def test_a_message_that_cannot_be_encoded_fails(self, app: Celery, gov: GovRedis) -> None:
        from kombu.exceptions import EncodeError

        task, _ = limited_task(app)
        use_up(gov)
        with pytest.raises(EncodeError):
            run(task, object())
        assert lot(app, gov).count() == 0

    def test_a_soft_time_limit_that_strikes_the_encoder_is_raised_as_it_is(self, app: Celery, gov: GovRedis) -> None:
        task, _ = limited_task(app)
        use_up(gov)
        with pytest.raises(SoftTimeLimitExceeded):
            run(task, Striking())
        assert lot(app, gov).count() == 0


class TestNotRun:
    def test_revoked_while_it_is_parked(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)
        with working(app):
            use_up(gov)
            result = task.delay()
            eventually(lambda: result.state == "RETRY", what="it waits")
            eventually(lambda: app.control.revoke(result.id, reply=True), what="it is revoked")
            go_on(app, gov)
            eventually(lambda: result.state == "REVOKED", what="it is known as such")
            eventually(lambda: lot(app, gov).count() == 0, what="nothing is parked any more")
        assert not ran

    def test_expired_while_it_is_parked(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)
        with working(app):
            use_up(gov)
            result = task.apply_async(expires=1)
            expires = time.time() + 1
            eventually(lambda: time.time() > expires, what="it expires")
            go_on(app, gov)
            eventually(lambda: result.state == "REVOKED", what="it is known as such")
        assert not ran

    def test_eager_and_direct_calls_do_not_wait(self, app: Celery, gov: GovRedis) -> None:
        task, _ = limited_task(app)
        use_up(gov)
        for call in (lambda: task(), lambda: task.apply().get()):
            with pytest.raises(RateLimitExceeded):
                call()
        assert lot(app, gov).count() == 0


class TestTwice:
    """No publication, and no delivery, is worked on beside another."""

    def park(self, app: Celery, gov: GovRedis, task: Any) -> bytes:
        use_up(gov)
        with pytest.raises(Retry):
            run(task, id="one")
        ((_, message),) = lot(app, gov).first(1)
        return message

    def test_a_publisher_that_was_killed_before_it_removed_it(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)
        use_up(gov)
        with pytest.raises(Retry):
            run(task, 1, id="one", **delivered(app))
        go_on(app, gov)
        (taken,) = lot(app, gov).take()[0]
        with app.connection_for_write() as connection:
            for _ in range(2):
                body, options = to_publish(app, decode(taken.message))
                app.amqp.Producer(connection).publish(body, **options)
        lot(app, gov).flush()  # its lease is over
        with working(app):
            eventually(lambda: gov.counters.get("celery.duplicates") == 2, what="all three have come")
        assert ran == [((1,), {})]
        assert AsyncResult("one", app=app).state == "SUCCESS"

    def test_a_worker_that_was_killed_after_it_had_parked_it(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)
        self.park(app, gov, task)
        with pytest.raises(Ignore, match="limited of this id was parked since"):
            run(task, id="one", delivery_info={"exchange": "", "routing_key": "celery", "redelivered": True})
        assert (lot(app, gov).count(), ran) == (1, [])

    def test_a_worker_that_was_killed_before_it_had_parked_it(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, _ = limited_task(app, "1/8 minutes")
        use_up(gov, "1/8 minutes")

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(ParkingLot, "park", killed)
            run(task, id="one")
        gov.limits.hit_or_reserve("a", "1/hour", reservation="another", operation="parking")
        with pytest.raises(Retry) as retry:
            run(task, id="one", delivery_info={"exchange": "", "routing_key": "celery", "redelivered": True})
        assert retry.value.when <= 3600, "it has kept its place"
        assert lot(app, gov).count() == 1

    def test_a_worker_that_was_killed_while_it_ran(self, app: Celery, gov: GovRedis) -> None:
        """Its message is delivered again, and takes another place."""
        task, ran = limited_task(app, "2/hour")
        header = {HEADER: "1:abc:0.0"}
        for _ in range(2):
            run(task, id="one", headers=header)
        with pytest.raises(Ignore):
            run(task, id="one", headers={HEADER: "1:def:0.0"})
        assert len(ran) == 2
        with pytest.raises(Retry):
            run(task, id="one", headers=header)
        with pytest.raises(Ignore):
            run(task, id="one", headers=header)
        assert lot(app, gov).count() == 1


class TestWaiting:
    def test_a_little_too_early_it_waits_itself(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            gov.limits.reset("a", operation="parking")  # it has room then

        monkeypatch.setattr(parking_module.time, "sleep", sleep)
        monkeypatch.setattr(parking_module, "_PATIENCE", 4000.0)
        task, ran = limited_task(app)
        use_up(gov)
        run(task, headers={HEADER: "1:abc:0.0"})
        assert len(ran) == 1
        assert 3600 - PATIENCE < sum(slept) <= 3600
        slept.clear()
        with pytest.raises(Retry):
            run(task, id="two")
        assert slept == [], "on its first delivery it does not"

    def test_half_a_second_at_most(self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[float] = []
        real = gov.limits.hit_or_reserve

        def hit_or_reserve(*args: Any, patience: float, **options: Any) -> Any:
            asked.append(patience)
            return real(*args, patience=patience, **options)

        monkeypatch.setattr(gov.limits, "hit_or_reserve", hit_or_reserve)
        task, ran = limited_task(app)
        use_up(gov)
        with pytest.raises(Retry) as retry:
            run(task, headers={HEADER: "1:abc:0.0"})
        assert (3600 - PATIENCE < retry.value.when <= 3600, ran, asked) == (True, [], [0.5])


class TestAway:
    def test_the_broker_while_something_is_due(
        self,
        make_app: Callable[..., Celery],
        gov: GovRedis,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(publisher_module, "_RETRY", 0.05)
        monkeypatch.setattr(parked_module, "LEASE", 0.05)
        caplog.set_level(logging.INFO, logger="govredis")
        with RedisServer(persistent=True) as broker:
            app = make_app(broker, backend=None)
            task, _ = limited_task(app, "1/minute")
            use_up(gov, "1/minute")
            broker.kill()
            with pytest.raises(Retry):
                run(task, 1, **delivered(app))  # needs no broker
            lot(app, gov).flush()
            publisher = Publisher(app, gov, lot(app, gov))
            publisher.start()
            eventually(lambda: "cannot be published" in caplog.text, what="it is known")
            assert lot(app, gov).count() == 1
            broker.restart()
            eventually(lambda: lot(app, gov).count() == 0, what="it is published")
            publisher.stop()
            assert "published again" in caplog.text
            assert caplog.text.count("cannot be published") == 1
            with redis.Redis.from_url(app.conf.broker_url) as client:
                assert client.llen(app.conf.task_default_queue) == 1

    def test_a_message_that_cannot_be_published_delays_no_other(
        self, app: Celery, gov: GovRedis, caplog: pytest.LogCaptureFixture
    ) -> None:
        task, _ = limited_task(app, "1/minute")
        use_up(gov, "1/minute")
        for task_id, queue in (("one", "unknown"), ("two", app.conf.task_default_queue)):
            with pytest.raises(Retry):
                run(task, id=task_id, delivery_info={"exchange": "", "routing_key": queue})
        lot(app, gov).flush()
        # As of an app that has queues of its own, and makes no others.
        app.amqp.queues.pop("unknown")
        app.amqp.queues.create_missing = False
        publisher = Publisher(app, gov, lot(app, gov))
        publisher.start()
        eventually(lambda: gov.counters.get("celery.published"), what="the other one is published")
        publisher.stop()
        assert (
            "parked task one:0.0:1 is set aside, as it cannot be published (try 1): KeyError: 'unknown'" in caplog.text
        )
        ((_, message),) = lot(app, gov).first(9)
        assert json.loads(message)["id"] == "one"

    def test_redis_while_something_is_parked(
        self, celery_broker: RedisServer, make_gov: Callable[..., GovRedis], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(publisher_module, "_RETRY", 0.05)
        with RedisServer(persistent=True) as server:
            gov = make_gov(redis_url=server.url, limit_fallback="allow")
            app = Celery("mine", broker=celery_broker.url, set_as_current=False)
            app.conf.task_default_queue = uuid.uuid4().hex
            init_celery(app, gov)
            task, ran = limited_task(app)
            use_up(gov)
            with pytest.raises(Retry):
                run(task, 1, **delivered(app))
            publisher = Publisher(app, gov, lot(app, gov))
            publisher.start()
            server.kill()
            eventually(lambda: gov.limits.peek("b", "1/hour").degraded, what="it is known")
            run(task, 2, id="two", headers={HEADER: "1:abc:0.0"})
            assert ran == [((2,), {})], "nobody can tell a copy then"
            server.restart()
            eventually(lambda: not gov.limits.peek("b", "1/hour").degraded, what="it is back")
            go_on(app, gov)
            eventually(lambda: celery_broker.command("LLEN", app.conf.task_default_queue), what="it is published")
            publisher.stop()
            app.close()

    def test_redis_between_reserving_and_parking(
        self, celery_redis: RedisServer, celery_broker: RedisServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        """It is published anew. It may have been parked all the same: only one of the two messages is worked on."""
        gov = make_gov(redis_url=celery_redis.url, parking_url=REDIS_AWAY, key_prefix=f"{uuid.uuid4().hex}:")
        app = Celery("mine", broker=celery_broker.url, set_as_current=False)
        app.conf.task_default_queue = uuid.uuid4().hex
        init_celery(app, gov)
        task, _ = limited_task(app, "1/8 minutes")
        use_up(gov, "1/8 minutes")
        with pytest.raises(Retry) as retry:
            run(task, 1, headers={"x-tenant": "acme"})
        assert 480 - PATIENCE < retry.value.exc.result.retry_after <= retry.value.when <= 1.25 * 480
        headers = retry.value.sig.options["headers"]
        assert headers["x-tenant"] == "acme"
        task.push_request(id="one", headers=headers)
        arrival = arrival_of(task.request)
        task.pop_request()
        assert (arrival.run, arrival.times, len(arrival.publication)) == ("one:0.0", 1, 12)
        assert gov.counters.get("celery.unparked") == 1
        app.close()

    def test_a_worker_that_ends_ends_its_thread(self, app: Celery) -> None:
        def running() -> set[threading.Thread]:
            return {thread for thread in threading.enumerate() if isinstance(thread, Publisher)}

        before = running()
        with working(app):
            (publisher,) = running() - before
        eventually(lambda: not publisher.is_alive(), what="it ended")


def parked_as(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The parked message, changed; `change` works on it, or returns another in its place."""

    def planted(message: bytes) -> bytes:
        parked = json.loads(message)
        return json.dumps(change(parked) or parked).encode()

    return planted


#: Things that somebody has planted in place of a parked message.
POISONS: dict[str, Callable[[bytes], bytes]] = {
    "no text": lambda _: b"\xff\xfe\x00",
    "no JSON": lambda message: message[:-1],
    "nothing": lambda _: b"",
    "nested": lambda _: b"[" * 100_000,
    "a list": lambda _: b"[1]",
    "a number": lambda _: b"5",
    "no members": lambda _: b"{}",
    "no limit": parked_as(lambda parked: parked.pop("limit") and None),
    "a limit of another shape": parked_as(lambda parked: parked["limit"].update(rate=[["x", None]])),
    "an identity that is none": parked_as(lambda parked: parked["limit"].update(identity="{}")),
    "no body": parked_as(lambda parked: parked.pop("body") and None),
    "a body that is not encoded": parked_as(lambda parked: parked.update(body="*")),
    "an empty body": parked_as(lambda parked: parked.update(body="")),
    "no options": parked_as(lambda parked: parked.update(options=None)),
    "an unknown option": parked_as(lambda parked: parked["options"].update(declare=7)),
}


class TestPoison:
    """A message that cannot be published is set aside, and delays no other."""

    @pytest.fixture
    def overdue(self, app: Celery, gov: GovRedis) -> tuple[list[Any], list[AsyncResult]]:
        """Arguments of the runs, and results, of a task with 30 messages that wait and are due."""
        ran: list[Any] = []

        @app.task(shared=False, name="waiting")
        @rate_limited("1/2 seconds", key="{agent}", operation="poison")
        def waiting(agent: str) -> None:
            ran.append(agent)

        results = []
        for n in range(30):
            gov.limits.hit(f"agent-{n}", "1/2 seconds", operation="poison")
            results.append(apply_reserved(waiting.s(f"agent-{n}")))
        assert lot(app, gov).count() == 30
        eventually(lambda: lot(app, gov).first(30)[-1][0] < 0, what="all are due")
        return ran, results

    def entries(self, app: Celery, gov: GovRedis) -> list[bytes]:
        found: list[bytes] = redis_of(gov).call("ZRANGE", lot(app, gov)._entries, "0", "-1")
        return found

    def test_planted_in_every_form_the_others_are_published_and_it_is_kept(
        self, app: Celery, gov: GovRedis, overdue: Any
    ) -> None:
        ran, _ = overdue
        parking, redis = lot(app, gov), redis_of(gov)
        assert redis is not None
        entries = self.entries(app, gov)[: len(POISONS)]  # those that are due first
        kept = dict(zip(entries, redis.call("HMGET", parking._messages, *entries), strict=True))
        planted = {e: poison(kept[e]) for e, poison in zip(entries, POISONS.values(), strict=True)}
        for entry, message in planted.items():
            redis.call("HSET", parking._messages, entry, message)
        # Else what Celery's earlier workers have left may be collected in the middle of a message that is nested too
        # deeply, where pytest cannot note a destructor's warning.
        gc.collect()
        with working(app):
            eventually(lambda: len(ran) == 30 - len(POISONS), what="the others ran")
            eventually(lambda: gov.counters.get("celery.set_aside") >= len(POISONS), what="each was tried")
            aside = {one.entry: one for one in parking.set_aside()}
            assert {entry: one.message for entry, one in aside.items()} == planted, "nothing is lost"
            assert all(one.tries >= 1 and one.why for one in aside.values())
            # Mended, they go through.
            for entry, message in kept.items():
                redis.call("HSET", parking._messages, entry, message)
            parking.flush()
            eventually(lambda: len(ran) == 30, what="all ran")
        assert sorted(ran) == sorted(f"agent-{n}" for n in range(30))
        assert (parking.count(), parking.set_aside()) == (0, [])
        assert redis.call("EXISTS", parking._messages, parking._aside, parking._entries) == 0

    def test_a_limit_that_cannot_be_read_is_its_tasks_alone(self, app: Celery, gov: GovRedis, overdue: Any) -> None:
        ran, _ = overdue
        key = gov.internal.context.keys.rate_limit("poison", "agent-0")
        redis_of(gov).call("DEL", key)
        redis_of(gov).call("SET", key, "text")
        with working(app):
            eventually(lambda: len(ran) == 29, what="the others ran")
            eventually(lambda: lot(app, gov).set_aside(), what="it was tried")
            (one,) = lot(app, gov).set_aside()
            assert f"the limit at {key}: " in one.why
            gov.limits.reset("agent-0", operation="poison")
            lot(app, gov).flush()
            eventually(lambda: len(ran) == 30, what="it ran too")

    def test_a_message_that_the_broker_refuses_is_set_aside_alone(
        self, app: Celery, gov: GovRedis, celery_broker: RedisServer, overdue: Any
    ) -> None:
        """The key of its queue holds something else."""
        ran, _ = overdue
        parking, redis_client, queue = lot(app, gov), redis_of(gov), uuid.uuid4().hex
        assert redis_client is not None
        for entry in self.entries(app, gov)[:2]:
            message = json.loads(redis_client.call("HGET", parking._messages, entry))
            message["options"].update(routing_key=queue, declare=[])
            redis_client.call("HSET", parking._messages, entry, json.dumps(message))
        with redis.Redis.from_url(app.conf.broker_url) as broker:
            broker.set(queue, "text")
            with working(app):
                eventually(lambda: len(ran) == 28, what="the others ran")
                eventually(lambda: len(parking.set_aside()) == 2, what="both were tried")
                assert all("WRONGTYPE" in one.why for one in parking.set_aside())
                broker.delete(queue)
                parking.flush()
                eventually(lambda: broker.llen(queue) == 2, what="both are published")
            broker.delete(queue)
        assert parking.set_aside() == []

    def test_a_broker_that_takes_nothing_sets_nothing_aside(
        self,
        make_app: Callable[..., Celery],
        gov: GovRedis,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """It is full, then away: both are said once, and all is published afterwards."""
        monkeypatch.setattr(publisher_module, "_RETRY", 0.05)
        monkeypatch.setattr(parked_module, "LEASE", 0.05)
        caplog.set_level(logging.INFO, logger="govredis")
        with RedisServer(persistent=True) as broker:
            app = make_app(broker, backend=None)
            task, _ = limited_task(app, "1/minute")
            use_up(gov, "1/minute")
            for n in range(5):
                with pytest.raises(Retry):
                    # Each of a queue of its own, which the broker names in what it says.
                    run(task, n, id=f"id-{n}", delivery_info={"exchange": "", "routing_key": f"queue-{n}"})
            parking = lot(app, gov)
            parking.flush()
            broker.command("CONFIG", "SET", "maxmemory", "1")
            publisher = Publisher(app, gov, parking)
            publisher.start()
            eventually(lambda: "cannot be published, and stay parked" in caplog.text, what="it is known")
            broker.kill()
            taken = parking.take
            tries: list[Any] = []
            monkeypatch.setattr(parking, "take", lambda: tries.append(1) or taken())
            eventually(lambda: len(tries) > 5, what="it was tried again")
            assert (parking.count(), parking.set_aside()) == (5, [])
            broker.restart()
            eventually(lambda: parking.count() == 0, what="all are published")
            publisher.stop()
        assert gov.counters.get("celery.set_aside") == 0
        assert caplog.text.count("cannot be published") == 1
        assert gov.counters.get("celery.published") == 5

    def test_a_lot_that_is_something_else_is_said_once(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(publisher_module, "_RETRY", 0.01)
        parking = lot(app, gov)
        redis_of(gov).call("SET", parking._entries, "text")
        tries: list[Any] = []
        taken = parking.take
        monkeypatch.setattr(parking, "take", lambda: tries.append(1) or taken())
        publisher = Publisher(app, gov, parking)
        publisher.start()
        eventually(lambda: len(tries) > 3, what="it was tried")
        publisher.stop()
        assert caplog.text.count("cannot be published, and stay parked") == 1
        assert "WRONGTYPE" in caplog.text
        redis_of(gov).call("DEL", parking._entries)


class TestReservedAsItIsPublished:
    def test_each_task_is_delivered_once_at_its_time(
        self,
        make_app: Callable[..., Celery],
        make_gov: Callable[..., GovRedis],
        celery_broker: RedisServer,
        celery_redis: RedisServer,
    ) -> None:
        """By a worker that is in time: those that are published run before it looks for others that are due."""

        def attempt() -> None:
            gov = make_gov(redis_url=celery_redis.url, key_prefix=f"{uuid.uuid4().hex}:")
            app = make_app(celery_broker, gov=gov)
            log = gov.internal.context.keys.rate_limit("parking", "a")
            # The log then keeps its entries for an hour: it tells at what server time each was admitted.
            gov.limits.record("a", 3600, operation="parking")
            redis_of(gov).call("DEL", log)
            task, ran = limited_task(app, "2/3 seconds")
            results = [apply_reserved(task.s(n)) for n in range(5)]
            reserved = redis_of(gov).call("ZRANGE", log, "0", "-1")
            assert reserved == [f"{result.id}:0.0-1".encode() for result in results], "in the order of calls"
            assert lot(app, gov).count() == 3
            take, count = ParkingLot.take, gov.counters.get

            def all_have_ended() -> bool:
                """They ran, or came too late for that, and are parked again."""
                return len(ran) == 2 + count("celery.published") - (count("celery.parked") - 3)

            def take_in_time(parking: ParkingLot) -> Any:
                eventually(all_have_ended, what="all that was published ran")
                return take(parking)

            with pytest.MonkeyPatch.context() as patch, deliveries() as seen:
                patch.setattr(ParkingLot, "take", take_in_time)
                with working(app):
                    assert sorted(result.get(PATIENCE) for result in results) == [1, 2, 3, 4, 5]
            assert sorted(args for args, _ in ran) == [(0,), (1,), (2,), (3,), (4,)], "each once"
            assert len(seen) == 5
            assert count("limits.allowed") == 5, "each is admitted once, when it runs"
            scores = redis_of(gov).call("ZRANGE", log, "0", "-1", "WITHSCORES")[1::2]
            admitted = [round(float(score) * 1_000_000) for score in scores]
            assert (len(admitted), most_within(3_000_000, admitted)) == (5, 2), "none before its time"

        undisturbed(attempt, longest=0.1)

    def test_it_is_what_the_signature_says(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False, name="bound", bind=True)
        @exclusive("x:{agent}")
        @rate_limited("1/3 seconds", key="{agent}", operation="parking")
        def bound(self: Any, agent: str, n: int = 0) -> list[Any]:
            return [agent, n, self.request.headers["x-tenant"]]

        signature = bound.s("b", n=3).set(task_id=uuid.uuid4().hex, headers={"x-tenant": "acme"}, priority=3)
        gov.limits.hit("b", "1/3 seconds", operation="parking")
        result = apply_reserved(signature)
        assert result.id == signature.id
        with deliveries() as seen, working(app):
            assert result.get(PATIENCE) == ["b", 3, "acme"]
        assert [request.delivery_info["priority"] for request in seen] == [3]

    def test_a_plain_key_is_the_limit_of_all_runs(self, app: Celery, gov: GovRedis) -> None:
        ran: list[Any] = []

        @app.task(shared=False, name="mail", ignore_result=True)
        @exclusive(key=lambda to: f"mail-{to}")
        @rate_limited("2/hour", key="mail", operation="parking")
        def mail(to: str) -> None:
            ran.append((to, gov.locks.is_locked(f"mail-{to}")))

        for to in ("ann", "bob", "cyd"):
            apply_reserved(mail.s(to))
        assert lot(app, gov).count() == 1, "the third has to wait for the others"
        mail.delay("dan")
        with working(app):
            eventually(lambda: lot(app, gov).count() == 2, what="the worker parked the fourth")
            eventually(lambda: len(ran) == 2, what="the first two ran")
        assert sorted(ran) == [("ann", True), ("bob", True)]

    def test_exempt_and_eager_ones_do_not_wait(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False, name="exempt")
        @rate_limited("1/hour", key="{agent}", operation="parking", exempt=lambda agent: agent == "root")
        def exempt(agent: str) -> str:
            return agent

        for _ in range(2):
            apply_reserved(exempt.s("root"))
        app.conf.task_always_eager = True
        assert apply_reserved(exempt.s("a")).get() == "a"
        assert lot(app, gov).count() == 0

    @pytest.mark.parametrize("options", [{}, {"autoretry_for": (OSError,)}])
    def test_a_bound_task_may_have_autoretry(self, app: Celery, gov: GovRedis, options: dict[str, Any]) -> None:
        @app.task(shared=False, name="retried", bind=True, **options)
        @rate_limited("1/hour", key="{to}", operation="parking")
        def retried(self: Any, to: str) -> None: ...

        for to in ("ann", "ann", "bob"):
            apply_reserved(retried.s(to))
        assert lot(app, gov).count() == 1, "the second waits for the first"

    def test_without_redis_it_is_published(self, celery_broker: RedisServer, make_gov: Callable[..., GovRedis]) -> None:
        for settings in ({"redis_url": REDIS_AWAY}, {"redis_enabled": False}):
            app = Celery("mine", broker=celery_broker.url, set_as_current=False)
            app.conf.task_default_queue = uuid.uuid4().hex
            init_celery(app, make_gov(**settings))
            task, _ = limited_task(app, "1/hour")
            for _ in range(2):
                assert apply_reserved(task.s()).id
            assert celery_broker.command("LLEN", app.conf.task_default_queue) == 2
            app.close()

    def test_a_task_that_cannot_be_parked_is_published_as_a_copy(
        self, celery_redis: RedisServer, celery_broker: RedisServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        gov = make_gov(redis_url=celery_redis.url, parking_url=REDIS_AWAY, key_prefix=uuid.uuid4().hex)
        app = Celery("mine", broker=celery_broker.url, set_as_current=False)
        app.conf.task_default_queue = uuid.uuid4().hex
        init_celery(app, gov)
        task, _ = limited_task(app, "1/8 minutes")
        use_up(gov, "1/8 minutes")
        apply_reserved(task.s().set(headers={"x-tenant": "acme"}))
        (raw,) = celery_broker.command("LRANGE", app.conf.task_default_queue, 0, -1)
        headers = json.loads(raw)["headers"]
        assert (headers[HEADER].split(":")[::2], headers["x-tenant"]) == (["1", "0.0"], "acme")
        app.close()

    def test_other_signatures_are_refused(self, app: Celery) -> None:
        task, _ = limited_task(app)

        @app.task(shared=False, name="plain")
        def plain() -> None: ...

        @app.task(shared=False, name="raising")
        @rate_limited("1/hour", key=lambda: "a", on_limit="raise")
        def raising() -> None: ...

        for other in (plain.s(), raising.s(), task.s() | task.s(), group(task.s())):
            with pytest.raises(ValueError, match="must be of one task that is rate_limited"):
                apply_reserved(other)
        for when in ({"countdown": 3}, {"eta": "2030-01-01T00:00:00"}):
            with pytest.raises(ValueError, match="without countdown and eta"):
                apply_reserved(task.s().set(**when))


class TestNoPlaceStandsEmpty:
    """Else tasks would run more slowly than the limit allows."""

    def test_it_is_due_when_the_limit_has_room_and_no_later(self, app: Celery, gov: GovRedis) -> None:
        task, _ = limited_task(app, "1/8 minutes")
        use_up(gov, "1/8 minutes")
        with pytest.raises(Retry) as retry:
            run(task, 1, **delivered(app))
        (due, *_), *others = lot(app, gov).first(2)
        assert 0 < due <= retry.value.when <= 3600
        assert others == []

    def test_a_publisher_looks_ten_times_a_second_and_when_the_next_is_due(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parking = lot(app, gov)
        next_in = iter([0.03, 7.0, None])
        monkeypatch.setattr(parking, "take", lambda: ([], next(next_in)))
        waits: list[float] = []

        class EndsAfterThree:
            def wait(self, seconds: float) -> bool:
                waits.append(seconds)
                return len(waits) > 3

        monkeypatch.setattr(publisher_module, "Latch", EndsAfterThree)
        Publisher(app, gov, parking).run()
        assert waits == [0, 0.03, 0.1, 0.1]


class TestLag:
    def test_a_task_that_would_come_in_vain_is_not_published(self, app: Celery, gov: GovRedis) -> None:
        """Others were late: it is due later than it was reserved for."""
        task, _ = limited_task(app, "1/3 seconds")
        use_up(gov, "1/3 seconds")
        with pytest.raises(Retry):
            run(task, 1, id="one", **delivered(app))
        gov.limits.record("a", 9, operation="parking", cost=1)
        found = eventually(lambda: lot(app, gov).take()[0], what="it is due")
        gov.limits.record("a", 9, operation="parking", cost=1)
        assert 0.1 < still_to_wait(gov, decode(found[0].message), 0.1) <= 3
        assert still_to_wait(gov, decode(found[0].message), 4) == 0, "so long its worker may wait"

    def test_it_stays_parked_until_it_has_its_turn(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, _ = limited_task(app, "1/3 seconds")
        use_up(gov, "1/3 seconds")
        with pytest.raises(Retry):
            run(task, 1, **delivered(app))
        eventually(lambda: lot(app, gov).first(1)[0][0] < 1, what="it is nearly due")
        gov.limits.record("a", 9, operation="parking")  # somebody was late
        publisher = Publisher(app, gov, lot(app, gov))
        publisher.start()
        eventually(lambda: lot(app, gov).count() == 0, what="it is published")
        publisher.stop()
        slept: list[float] = []
        monkeypatch.setattr(parking_module.time, "sleep", slept.append)
        run(task, 1, headers={HEADER: "1:abc:0.0"})
        assert sum(slept) <= 0.1, "it need not wait again"
        assert gov.counters.get("celery.published") == 1

    def test_flushed_it_is_published_and_decided_anew(self, app: Celery, gov: GovRedis) -> None:
        """By the limits as they are when it comes."""
        limits = ["1/hour"]
        ran: list[int] = []

        @app.task(shared=False, name="changing")
        @rate_limited(lambda n: limits[0], key=lambda n: "a", operation="parking")
        def changing(n: int) -> None:
            ran.append(n)

        with working(app):
            for n in range(3):
                changing.delay(n)
            eventually(lambda: lot(app, gov).count() == 2, what="two wait")
            limits[0] = "2/hour"
            lot(app, gov).flush()
            eventually(lambda: len(ran) == 2, what="the one ran, and the other waits again")
            eventually(lambda: gov.counters.get("celery.parked") == 3, what="it waits")
        ((due, _),) = lot(app, gov).first(9)
        assert (3500 < due <= 3600, ran) == (True, [0, 1])

    def test_limits_of_counters_are_published_anew(self, app: Celery, gov: GovRedis) -> None:
        rate = Limit(1, 60, algorithm="sliding_window_counter")

        @app.task(shared=False, name="counted")
        @rate_limited(rate, key=lambda: "a", operation="parking")
        def counted() -> None: ...

        run(counted)
        with pytest.raises(Retry) as retry:
            run(counted, **delivered(app))
        assert (lot(app, gov).count(), HEADER in (retry.value.sig.options["headers"] or {})) == (0, False)


class ReadsItsUrl(MemoryTransport):
    """As the transports of MongoDB, SQLAlchemy and Azure: the URL, whole, is the host."""

    can_parse_url = True


class TestNames:
    def test_the_keys_of_brokers(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same for every publisher and user; and without the password."""
        names = {
            "redis://h": "redis://h:6379/0",
            "redis://u:p@h:6379/0": "redis://h:6379/0",
            "redis://h:6379/1": "redis://h:6379/1",
            "amqp://guest:guest@h//": "amqp://h:5672/",
            "pyamqp://h/a": "amqp://h:5672/a",
            "whole://u:p@h1,h2/db?password=p": "whole://h1,h2/db",
            "whole://policy:k/e+y=@space": "whole://space",
            "whole://h/db": "whole://h/db",
        }
        monkeypatch.setitem(TRANSPORT_ALIASES, "whole", f"{__name__}:ReadsItsUrl")
        for url, name in names.items():
            app = Celery("mine", broker=url, set_as_current=False)
            assert lot(app, gov).broker == name
            app.close()

    @pytest.mark.parametrize(
        ("header", "times", "publication"),
        [("2:abc:3.1", 2, "abc"), ("2:abc:2.1", 0, ""), ("x:abc:3.1", 0, ""), ("", 0, ""), ("2", 0, ""), (7, 0, "")],
    )
    def test_the_keys_of_arrivals(self, app: Celery, header: Any, times: int, publication: str) -> None:
        task, _ = limited_task(app)
        task.push_request(id="one", retries=3, replaced_task_nesting=1, headers={HEADER: header})
        assert arrival_of(task.request) == Arrival("one:3.1", times, publication, False)
        task.pop_request()
