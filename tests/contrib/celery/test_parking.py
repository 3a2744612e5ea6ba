"""What rate_limited parks: the message as it was, published when it is due, worked on once, whatever goes away.

By workers in this process, on a broker of the fleet's.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery, group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import Ignore, Retry
from celery.result import AsyncResult
from celery.signals import task_received
from celery_fleet import until
from test_celery_decorators import run

from govredis import GovRedis, Limit, RateLimitExceeded
from govredis.contrib.celery import _parking as parking_module
from govredis.contrib.celery import _publisher as publisher_module
from govredis.contrib.celery import apply_booked, exclusive, init_celery, rate_limited
from govredis.contrib.celery._parking import HEADER, arrival_of, decode, lot_of, still_to_wait, to_publish
from govredis.contrib.celery._publisher import Publisher
from govredis.limits import parked as parked_module
from govredis.limits.booking import hit_or_book
from govredis.limits.parked import Arrival, ParkingLot
from govredis.testing.servers import RedisServer

# Of Celery's use of redis-py, in a worker that is otherwise a process of its own.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

#: Takes long only when something is broken.
PATIENCE = 60.0
QUIET = {f"govredis_{name}_interval": None for name in ("heartbeat", "snapshot", "purge")}


@pytest.fixture
def gov(celery_redis: RedisServer, make_gov: Callable[..., GovRedis]) -> GovRedis:
    return make_gov(redis_url=celery_redis.url, key_prefix=f"{uuid.uuid4().hex}:")


@pytest.fixture
def make_app(gov: GovRedis) -> Iterator[Callable[..., Celery]]:
    made: list[Celery] = []

    def make(broker: RedisServer, **conf: Any) -> Celery:
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
        init_celery(app, gov)
        made.append(app)
        if backend is not None:
            app.backend.remove_pending_result = lambda result: result
        return app

    yield make
    for app in made:
        if app.conf.result_backend is not None:
            app.backend.result_consumer.stop()
            app.backend.client.close()
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
    """A worker in this process. What it makes of the logging is undone: other tests look at that."""
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


def limited_task(app: Celery, rate: str = "1/3 seconds", **options: Any) -> tuple[Any, list[Any]]:
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


def use_up(gov: GovRedis, rate: str = "1/3 seconds") -> None:
    assert gov.limits.hit("a", rate, operation="parking")


class TestTheMessage:
    @pytest.mark.parametrize("own", ["json", "pickle"])
    @pytest.mark.parametrize("sent_as", ["json", "pickle"])
    def test_is_as_it_was(self, app: Celery, gov: GovRedis, own: str, sent_as: str) -> None:
        task, ran = limited_task(app, serializer=own)
        use_up(gov)
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
        task.apply_async((value,), {"n": 1}, serializer=sent_as, **options)
        with deliveries() as seen, working(app):
            until("it ran", lambda: ran, PATIENCE)
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
        use_up(gov)
        with deliveries() as seen, working(app):
            # Not before: nobody would have bound the queue.
            task.apply_async((1,), exchange=exchange.name, routing_key="limited.one")
            until("it ran", lambda: ran, PATIENCE)
        assert [request.delivery_info["exchange"] for request in seen] == [exchange.name] * 2
        assert [request.delivery_info["routing_key"] for request in seen] == ["limited.one"] * 2

    def test_waits_with_its_budget_untouched_and_its_state_says_so(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app, "1/3 seconds", max_retries=0)
        use_up(gov, "1/3 seconds")
        result = task.delay()
        with working(app):
            until("it waits", lambda: result.state == "RETRY", PATIENCE)
            ((due, message),) = lot(app, gov).first(9)
            assert 0 < due <= 3
            assert json.loads(message)["id"] == result.id
            assert not ran
            assert result.get(PATIENCE) == 1
            until("nothing is parked any more", lambda: lot(app, gov).count() == 0, PATIENCE)
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
        @rate_limited("1/3 seconds", key=lambda self: "a", operation="parking")
        def failing(self: Any) -> int:
            ran.append(self.request.retries)
            if not self.request.retries:
                raise KeyError
            return 7

        use_up(gov)
        with deliveries() as seen, working(app):
            assert failing.delay().get(PATIENCE) == 7
        assert ran == [0, 1]
        assert [request.request_dict.get(HEADER, "::").split(":")[::2] for request in seen] == [
            ["", ""],
            ["1", "0.0"],
            ["1", "0.0"],  # the retry brings the header of the run before along, which is none of its own
            ["1", "1.0"],
        ]

    def test_one_that_replaces_itself_is_another_run(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)

        @app.task(shared=False, name="replaced", bind=True)
        @rate_limited("1/3 seconds", key=lambda self: "b", operation="parking")
        def replaced(self: Any) -> None:
            self.replace(task.s(3))

        use_up(gov)
        gov.limits.hit("b", "1/3 seconds", operation="parking")
        with working(app):
            assert replaced.delay().get(PATIENCE) == 1
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
            until("the one above ran", lambda: ran, PATIENCE)
            with gov.locks.acquire("x:c"):
                above.delay("c")
                until("both meet the lock", lambda: gov.counters.get("celery.conflicts.retry") > 2, PATIENCE)
        with working(app):
            until("all ran", lambda: len(ran) == 3, PATIENCE)
        assert sorted(ran) == ["b", "c", "c"]

    @pytest.mark.parametrize("pool", ["solo", "threads"])
    def test_pools(self, app: Celery, gov: GovRedis, pool: str) -> None:
        task, ran = limited_task(app, "2/3 seconds")
        with deliveries() as seen, working(app, pool=pool, concurrency=2):
            results = [task.delay(n) for n in range(5)]
            assert sorted(result.get(PATIENCE) for result in results) == [1, 2, 3, 4, 5]
        assert len(seen) <= 9
        assert len(ran) == 5

    def test_what_cannot_be_encoded_fails(self, app: Celery, gov: GovRedis) -> None:
        from kombu.exceptions import EncodeError

        task, _ = limited_task(app)
        use_up(gov)
        with pytest.raises(EncodeError):
            run(task, object())
        assert lot(app, gov).count() == 0


class TestNotRun:
    def test_revoked_while_it_is_parked(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)
        use_up(gov)
        result = task.delay()
        with working(app):
            until("it waits", lambda: result.state == "RETRY", PATIENCE)
            until("it is revoked", lambda: app.control.revoke(result.id, reply=True), PATIENCE)
            until("it is known as such", lambda: result.state == "REVOKED", PATIENCE)
            until("nothing is parked any more", lambda: lot(app, gov).count() == 0, PATIENCE)
        assert not ran

    def test_expired_while_it_is_parked(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app, "1/3 seconds")
        use_up(gov, "1/3 seconds")
        with working(app):
            result = task.apply_async(expires=1)
            until("it is known as such", lambda: result.state == "REVOKED", PATIENCE)
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
        (taken,) = until("it is due", lambda: lot(app, gov).take()[0], PATIENCE)
        with app.connection_for_write() as connection:
            for _ in range(2):
                body, options = to_publish(app, decode(taken.message))
                app.amqp.Producer(connection).publish(body, **options)
        lot(app, gov).flush()  # its lease is over
        with working(app):
            until("all three have come", lambda: gov.counters.get("celery.duplicates") == 2, PATIENCE)
        assert ran == [((1,), {})]
        assert AsyncResult("one", app=app).state == "SUCCESS"

    def test_a_worker_that_was_killed_after_it_had_parked_it(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app)
        self.park(app, gov, task)
        with pytest.raises(Ignore, match="limited of this id is parked since"):
            run(task, id="one", delivery_info={"exchange": "", "routing_key": "celery", "redelivered": True})
        assert (lot(app, gov).count(), ran) == (1, [])

    def test_a_worker_that_was_killed_before_it_had_parked_it(
        self, app: Celery, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, _ = limited_task(app, "1/hour")
        use_up(gov, "1/hour")

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(ParkingLot, "park", killed)
            run(task, id="one")
        hit_or_book(gov.limits, "a", "1/hour", booking="another", operation="parking")
        with pytest.raises(Retry) as retry:
            run(task, id="one", delivery_info={"exchange": "", "routing_key": "celery", "redelivered": True})
        assert retry.value.when <= 3600, "it has kept its place"
        assert lot(app, gov).count() == 1

    def test_a_worker_that_was_killed_while_it_ran(self, app: Celery, gov: GovRedis) -> None:
        """Its message is delivered again, and takes another place."""
        task, ran = limited_task(app, "2/3 seconds")
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
        real = parking_module.time.sleep

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            real(seconds)

        monkeypatch.setattr(parking_module.time, "sleep", sleep)
        monkeypatch.setattr(parking_module, "_PATIENCE", 4.0)  # by which a busy machine comes in time
        task, ran = limited_task(app, "1/3 seconds")
        use_up(gov)
        run(task, headers={HEADER: "1:abc:0.0"})
        assert len(ran) == 1
        assert 0 < sum(slept) <= 4
        slept.clear()
        with pytest.raises(Retry):
            run(task, id="two")
        assert slept == [], "on its first delivery it does not"

    def test_half_a_second_at_most(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app, "1/9 seconds")
        use_up(gov, "1/9 seconds")
        with pytest.raises(Retry) as retry:
            run(task, headers={HEADER: "1:abc:0.0"})
        assert (8 < retry.value.when <= 9, ran) == (True, [])


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
            until("it is known", lambda: "cannot be published" in caplog.text, PATIENCE)
            assert lot(app, gov).count() == 1
            broker.restart()
            until("it is published", lambda: lot(app, gov).count() == 0, PATIENCE)
            publisher.stop()
            assert "published again" in caplog.text
            assert caplog.text.count("cannot be published") == 1
            with redis.Redis.from_url(app.conf.broker_url) as client:
                assert client.llen(app.conf.task_default_queue) == 1

    def test_one_that_cannot_be_published_holds_nobody_up(
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
        until("the other one is published", lambda: gov.counters.get("celery.published"), PATIENCE)
        publisher.stop()
        assert "limited[one] is parked, and its queue unknown: 'unknown'" in caplog.text
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
            task, ran = limited_task(app, "1/3 seconds")
            use_up(gov, "1/3 seconds")
            with pytest.raises(Retry):
                run(task, 1, **delivered(app))
            publisher = Publisher(app, gov, lot(app, gov))
            publisher.start()
            server.kill()
            until("it is known", lambda: gov.limits.peek("b", "1/hour").degraded, PATIENCE)
            run(task, 2, id="two", headers={HEADER: "1:abc:0.0"})
            assert ran == [((2,), {})], "nobody can tell a copy then"
            server.restart()
            until("it is published", lambda: celery_broker.command("LLEN", app.conf.task_default_queue), PATIENCE)
            publisher.stop()
            app.close()

    def test_redis_between_booking_and_parking(
        self, celery_redis: RedisServer, celery_broker: RedisServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        """It is published anew, and of that and what may have been parked all the same, one is worked on."""
        gov = make_gov(
            redis_url=celery_redis.url, parking_url="redis://127.0.0.1:1/0", key_prefix=f"{uuid.uuid4().hex}:"
        )
        app = Celery("mine", broker=celery_broker.url, set_as_current=False)
        app.conf.task_default_queue = uuid.uuid4().hex
        init_celery(app, gov)
        task, _ = limited_task(app, "1/minute")
        use_up(gov, "1/minute")
        with pytest.raises(Retry) as retry:
            run(task, 1, headers={"x-tenant": "acme"})
        assert 59 < retry.value.exc.result.retry_after <= retry.value.when <= 75
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
        until("it ended", lambda: not publisher.is_alive(), PATIENCE)


class TestBookedAsItIsPublished:
    def test_one_delivery_each_at_its_time(self, app: Celery, gov: GovRedis) -> None:
        task, ran = limited_task(app, "2/3 seconds")
        results = [apply_booked(task.s(n)) for n in range(5)]
        assert gov.limits.get_count("a", 3600, operation="parking") == 5
        assert lot(app, gov).count() == 3
        with deliveries() as seen, working(app):
            assert [result.get(PATIENCE) for result in results] == [1, 2, 3, 4, 5]
        assert [args for args, _ in ran] == [(0,), (1,), (2,), (3,), (4,)]
        assert len(seen) == 5
        assert gov.counters.get("limits.allowed") == 5, "each is admitted once, when it runs"

    def test_it_is_what_the_signature_says(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False, name="bound", bind=True)
        @exclusive("x:{agent}")
        @rate_limited("1/3 seconds", key="{agent}", operation="parking")
        def bound(self: Any, agent: str, n: int = 0) -> list[Any]:
            return [agent, n, self.request.headers["x-tenant"]]

        signature = bound.s("b", n=3).set(task_id=uuid.uuid4().hex, headers={"x-tenant": "acme"}, priority=3)
        gov.limits.hit("b", "1/3 seconds", operation="parking")
        result = apply_booked(signature)
        assert result.id == signature.id
        with deliveries() as seen, working(app):
            assert result.get(PATIENCE) == ["b", 3, "acme"]
        assert [request.delivery_info["priority"] for request in seen] == [3]

    def test_exempt_and_eager_ones_do_not_wait(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False, name="exempt")
        @rate_limited("1/hour", key="{agent}", operation="parking", exempt=lambda agent: agent == "root")
        def exempt(agent: str) -> str:
            return agent

        for _ in range(2):
            apply_booked(exempt.s("root"))
        app.conf.task_always_eager = True
        assert apply_booked(exempt.s("a")).get() == "a"
        assert lot(app, gov).count() == 0

    def test_without_redis_it_is_published(self, celery_broker: RedisServer, make_gov: Callable[..., GovRedis]) -> None:
        for settings in ({"redis_url": "redis://127.0.0.1:1/0"}, {"redis_enabled": False}):
            app = Celery("mine", broker=celery_broker.url, set_as_current=False)
            app.conf.task_default_queue = uuid.uuid4().hex
            init_celery(app, make_gov(**settings))
            task, _ = limited_task(app, "1/hour")
            for _ in range(2):
                assert apply_booked(task.s()).id
            assert celery_broker.command("LLEN", app.conf.task_default_queue) == 2
            app.close()

    def test_where_it_cannot_be_parked_it_is_published_as_a_copy(
        self, celery_redis: RedisServer, celery_broker: RedisServer, make_gov: Callable[..., GovRedis]
    ) -> None:
        gov = make_gov(redis_url=celery_redis.url, parking_url="redis://127.0.0.1:1/0", key_prefix=uuid.uuid4().hex)
        app = Celery("mine", broker=celery_broker.url, set_as_current=False)
        app.conf.task_default_queue = uuid.uuid4().hex
        init_celery(app, gov)
        task, _ = limited_task(app, "1/hour")
        use_up(gov, "1/hour")
        apply_booked(task.s().set(headers={"x-tenant": "acme"}))
        (raw,) = celery_broker.command("LRANGE", app.conf.task_default_queue, 0, -1)
        headers = json.loads(raw)["headers"]
        assert (headers[HEADER].split(":")[::2], headers["x-tenant"]) == (["1", "0.0"], "acme")
        app.close()

    def test_what_it_is_not_for(self, app: Celery) -> None:
        task, _ = limited_task(app)

        @app.task(shared=False, name="plain")
        def plain() -> None: ...

        @app.task(shared=False, name="raising")
        @rate_limited("1/hour", key=lambda: "a", on_limit="raise")
        def raising() -> None: ...

        for other in (plain.s(), raising.s(), task.s() | task.s(), group(task.s())):
            with pytest.raises(ValueError, match="must be of one task that is rate_limited"):
                apply_booked(other)
        for when in ({"countdown": 3}, {"eta": "2030-01-01T00:00:00"}):
            with pytest.raises(ValueError, match="without countdown and eta"):
                apply_booked(task.s().set(**when))


class TestLag:
    def test_who_would_come_in_vain_is_not_published(self, app: Celery, gov: GovRedis) -> None:
        """Others were late: it is due later than it was booked for."""
        task, _ = limited_task(app, "1/3 seconds")
        use_up(gov)
        with pytest.raises(Retry):
            run(task, 1, id="one", **delivered(app))
        gov.limits.record("a", 9, operation="parking", cost=1)
        found = until("it is due", lambda: lot(app, gov).take()[0], PATIENCE)
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
        until("it is nearly due", lambda: lot(app, gov).first(1)[0][0] < 1, PATIENCE)
        gov.limits.record("a", 9, operation="parking")  # somebody was late
        publisher = Publisher(app, gov, lot(app, gov))
        publisher.start()
        until("it is published", lambda: lot(app, gov).count() == 0, PATIENCE)
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
            until("two wait", lambda: lot(app, gov).count() == 2, PATIENCE)
            limits[0] = "2/hour"
            lot(app, gov).flush()
            until("the one ran, and the other waits again", lambda: len(ran) == 2, PATIENCE)
            until("it waits", lambda: gov.counters.get("celery.parked") == 3, PATIENCE)
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


class TestNames:
    def test_of_brokers(self, gov: GovRedis) -> None:
        """The same, whoever publishes there, by which user; and without the password."""
        names = {
            "redis://h": "redis://h:6379/0",
            "redis://u:p@h:6379/0": "redis://h:6379/0",
            "redis://h:6379/1": "redis://h:6379/1",
            "amqp://guest:guest@h//": "amqp://h:5672/",
            "pyamqp://h/a": "amqp://h:5672/a",
        }
        for url, name in names.items():
            app = Celery("mine", broker=url, set_as_current=False)
            assert lot(app, gov).broker == name
            app.close()

    @pytest.mark.parametrize(
        ("header", "times", "publication"),
        [("2:abc:3.1", 2, "abc"), ("2:abc:2.1", 0, ""), ("x:abc:3.1", 0, ""), ("", 0, ""), ("2", 0, ""), (7, 0, "")],
    )
    def test_of_arrivals(self, app: Celery, header: Any, times: int, publication: str) -> None:
        task, _ = limited_task(app)
        task.push_request(id="one", retries=3, replaced_task_nesting=1, headers={HEADER: header})
        assert arrival_of(task.request) == Arrival("one:3.1", times, publication, False)
        task.pop_request()
