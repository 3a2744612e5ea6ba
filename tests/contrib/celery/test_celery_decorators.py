"""rate_limited and exclusive: refusals at decoration, the function's signature, and calls without a worker."""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, shared_task
from celery._state import _task_stack
from celery.exceptions import Reject, Retry, SoftTimeLimitExceeded
from kombu.exceptions import EncodeError, OperationalError
from support import PATIENCE, REDIS_AWAY, redis_of

from govredis import Config, GovRedis, Limit, LockTimeout, LockUnavailable, RateLimitExceeded
from govredis.contrib.celery import _republish, exclusive, init_celery, rate_limited
from govredis.contrib.celery._parking import HEADER
from govredis.testing.servers import RedisServer


@pytest.fixture
def gov(celery_redis: RedisServer, make_gov: Callable[..., GovRedis], request: pytest.FixtureRequest) -> GovRedis:
    return make_gov(redis_url=celery_redis.url, key_prefix=f"{request.node.name}:".replace("{", "").replace("}", ""))


@pytest.fixture
def app(gov: GovRedis) -> Iterator[Celery]:
    app = Celery("mine", broker="memory://", set_as_current=False)
    init_celery(app, gov)
    yield app
    app.close()


class Striking:
    """The soft time limit is over when kombu encodes it."""

    def __json__(self) -> Any:
        raise SoftTimeLimitExceeded


def limited(*args: Any, **options: Any) -> Any:
    return rate_limited(*args, **{"key": "{agent}", **options})


@shared_task
def shared(agent: str) -> None: ...


DECORATORS = [limited("1/hour"), exclusive("x:{agent}")]


class TestRefusals:
    @pytest.mark.parametrize("decorate", DECORATORS)
    def test_above_the_task(self, app: Celery, decorate: Any) -> None:
        @app.task(shared=False)
        def lazy(agent: str) -> None: ...

        for task in (lazy, shared):
            with pytest.raises(ValueError, match=r"stands above @app\.task; it must stand below it"):
                decorate(task)
        assert not app.finalized, "to look is not to make"
        app.finalize()
        for task in (lazy, app.tasks[lazy.name], shared):
            with pytest.raises(ValueError, match=r"stands above @app\.task"):
                decorate(task)

    @pytest.mark.parametrize("decorate", DECORATORS)
    def test_coroutines_and_generators(self, decorate: Any) -> None:
        async def coroutine(agent: str) -> None: ...

        def generator(agent: str) -> Iterator[str]:
            yield agent

        for function in (coroutine, generator):
            with pytest.raises(ValueError, match=rf"{function.__name__} only begins when it is called"):
                decorate(function)

    def test_bad_templates_and_choices(self) -> None:
        async def later(agent: str) -> str:
            return agent

        for key in (None, 5, b"mail", later):
            for decorate in (exclusive, functools.partial(rate_limited, "1/hour")):
                with pytest.raises(
                    ValueError, match=r"key is .*; it must be a template .*, a plain name, or a plain call"
                ):
                    decorate(key=key)  # type: ignore[operator]
        with pytest.raises(ValueError, match="on_limit is"):
            limited("1/hour", on_limit=["skip"])
        with pytest.raises(ValueError, match="on_conflict is"):
            exclusive("x:{agent}", on_conflict=["skip"])  # type: ignore[call-overload]

    @pytest.mark.parametrize("decorate", DECORATORS)
    @pytest.mark.parametrize("what", [None, "agent", 5])
    def test_an_object_that_is_no_function(self, decorate: Any, what: Any) -> None:
        with pytest.raises(ValueError, match="it must be the function of a task"):
            decorate(what)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: limited("often"), "often"),
            (lambda: limited("0/hour"), "it must be"),
            (lambda: limited("1/hour", key=None), "key is None"),
            (lambda: limited("1/hour", key=7), "key is 7"),
            (lambda: limited("1/hour", on_limit="wait"), "on_limit is 'wait'"),
            (lambda: limited("1/hour", on_limit=None), "on_limit is None"),
            (lambda: limited("1/hour", operation="a:b"), "operation is 'a:b'"),
            (lambda: limited("1/hour", operation=""), "operation is ''"),
            (lambda: exclusive("{agent}", on_conflict="wait"), "on_conflict is 'wait'"),
            (lambda: exclusive("{agent}", ttl=0), "ttl is 0"),
            (lambda: exclusive("{agent}", ttl=-1), "ttl is -1"),
            (lambda: exclusive("{agent}", ttl="60"), "ttl is '60'"),  # type: ignore[arg-type]
        ],
    )
    def test_bad_arguments(self, make: Callable[[], Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            make()

    @pytest.mark.parametrize("key", ["{nobody}", "{agent", "{0}", "{}"])
    def test_bad_templates(self, key: str) -> None:
        def function(agent: str) -> None: ...

        for decorate in (limited("1/hour", key=key), exclusive(key)):
            with pytest.raises(ValueError, match="key"):
                decorate(function)

    @pytest.mark.parametrize("key", ["", "a\nb", "{{agent}}", "a" * 600])
    def test_plain_names_of_no_lock(self, key: str) -> None:
        def function(agent: str) -> None: ...

        with pytest.raises(ValueError, match="lock name"):
            exclusive(key)(function)

        with pytest.raises(ValueError, match="key"):
            limited("1/hour", key=key)(function)


class TestFunctions:
    def test_name_doc_and_signature_are_kept(self, app: Celery) -> None:
        def function(self: Any, agent: str, n: int = 3, *, fast: bool = False) -> int:
            """Its docstring."""
            return n

        for decorate in DECORATORS:
            wrapped = decorate(function)
            assert (wrapped.__name__, wrapped.__doc__) == ("function", "Its docstring.")
            assert wrapped.__module__ == __name__
            assert inspect.signature(wrapped) == inspect.signature(function)
        task = app.task(shared=False, bind=True)(DECORATORS[0](DECORATORS[1](function)))
        assert task.name.endswith("test_celery_decorators.function")
        assert task.__doc__ == "Its docstring."

    @pytest.mark.parametrize("bind", [True, False])
    @pytest.mark.parametrize("decorate", DECORATORS)
    def test_arguments_are_checked_as_they_are_published(self, app: Celery, decorate: Any, bind: bool) -> None:
        if bind:

            @app.task(shared=False, bind=True)
            @decorate
            def task(self: Any, agent: str, n: int) -> None: ...

        else:

            @app.task(shared=False)
            @decorate
            def task(agent: str, n: int) -> None: ...

        for args, kwargs in (((), {}), (("a",), {}), (("a", 1, 2), {}), (("a",), {"m": 1})):
            with pytest.raises(TypeError):
                task.delay(*args, **kwargs)
        assert task.delay("a", 1).id
        assert task.delay("a", n=1).id

    def test_key_and_rate_get_the_arguments_and_the_function_what_it_was_given(
        self, app: Celery, celery_redis: RedisServer, gov: GovRedis
    ) -> None:
        seen: list[Any] = []

        @app.task(shared=False)
        @rate_limited(
            lambda agent, plan="free": seen.append((agent, plan)) or Limit({"free": 1, "paid": 2}[plan], 3600),
            key=lambda agent, plan="free": f"who-{agent}",
            operation="plans",
        )
        def task(agent: str, plan: str = "free") -> list[str]:
            return [agent, plan]

        assert task("a", plan="paid") == ["a", "paid"]
        assert task.apply(("a", "paid")).get() == ["a", "paid"]
        with pytest.raises(RateLimitExceeded) as caught:
            task("a")
        assert caught.value.result.limit == Limit(1, 3600)
        assert seen == [("a", "paid"), ("a", "paid"), ("a", "free")]
        assert celery_redis.command("ZCARD", f"{gov.internal.context.keys.prefix}rate_limit:plans:who-a") == 2


class TestOfAllRuns:
    def test_a_plain_key_is_a_limit_of_all_runs(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False)
        @limited("2/hour", key="mail", operation="sent")
        def mail(to: str) -> str:
            return to

        assert [mail("ann"), mail.apply(("bob",)).get()] == ["ann", "bob"]
        with pytest.raises(RateLimitExceeded):
            mail("cyd")
        assert gov.limits.get_count("mail", window=3600, operation="sent") == 2
        with pytest.raises(ValueError, match=r"key 'to' of .*mail is the name of an argument; write '\{to\}'"):
            limited("2/hour", key="to")(mail.run)

    def test_a_plain_key_is_a_lock_of_all_runs(self, app: Celery, gov: GovRedis) -> None:
        def function(agent: str) -> bool:
            return gov.locks.is_locked("everybody")

        assert app.task(exclusive("everybody")(function), name="alone")("agent-1") is True
        assert not gov.locks.is_locked("everybody")


class TestCallableKeys:
    @pytest.mark.parametrize("bind", [True, False])
    def test_get_the_arguments_of_the_run(self, app: Celery, gov: GovRedis, bind: bool) -> None:
        seen: list[Any] = []

        def name(*args: Any, **kwargs: Any) -> str:
            seen.append((args[-1:], kwargs))
            return f"agent-{args[-1]}"

        def body(*args: Any, **kwargs: Any) -> bool:
            return gov.locks.is_locked(f"agent-{args[-1]}")

        task = app.task(shared=False, bind=bind, name="named")(exclusive(key=name, on_conflict="raise")(body))
        assert task("a", n=1) is True
        assert not gov.locks.is_locked("agent-a")
        with gov.locks.acquire("agent-a", timeout=0):
            with pytest.raises(LockTimeout):
                task("a")
            assert task.apply(("b",)).get() is True
        assert seen == [(("a",), {"n": 1}), (("a",), {}), (("b",), {})]

    @pytest.mark.parametrize("name", [7, uuid.UUID(int=7)])
    def test_may_give_an_int_or_a_uuid(self, app: Celery, gov: GovRedis, name: Any) -> None:
        def body() -> bool:
            return gov.locks.is_locked(str(name))

        assert app.task(shared=False, name="by_id")(exclusive(lambda: name)(body))() is True

    @pytest.mark.parametrize("name", [None, "", "a\nb", True, 7.5, ["a"]])
    def test_that_give_no_name_are_an_error_of_the_run(self, app: Celery, name: Any) -> None:
        ran: list[str] = []

        def nightly(agent: str) -> None:
            ran.append(agent)

        task = app.task(shared=False, name="no_name")(exclusive(lambda agent: name, on_conflict="skip")(nightly))
        with pytest.raises(
            ValueError, match=r"the lock name that `key` gave for .*nightly is .*; it must be a non-empty str"
        ):
            task.apply(("a",)).get()
        assert ran == []


class TestWithoutAWorker:
    """Nobody has a message there that could be published anew."""

    @pytest.mark.parametrize("on_limit", ["retry", "raise"])
    @pytest.mark.parametrize("bind", [True, False])
    def test_a_limit_raises(self, app: Celery, gov: GovRedis, on_limit: str, bind: bool) -> None:
        if bind:

            @app.task(shared=False, bind=True)
            @limited("1/hour", on_limit=on_limit)
            def task(self: Any, agent: str) -> str:
                return f"{self.name.rpartition('.')[2]} {agent}"

        else:

            @app.task(shared=False)
            @limited("1/hour", on_limit=on_limit)
            def task(agent: str) -> str:
                return f"task {agent}"

        assert task("a") == "task a"
        for call in (lambda: task("a"), lambda: task.apply(("a",)).get()):
            with pytest.raises(RateLimitExceeded) as caught:
                call()
            assert caught.value.result.violated == Limit(1, 3600)
            assert 3600 - PATIENCE < caught.value.result.retry_after <= 3600
        assert task.apply(("b",)).get() == "task b"
        assert gov.counters.get(f"celery.limited.{on_limit}") == 2
        assert gov.counters.get("limits.denied") == 2

    def test_a_limit_skips(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False)
        @limited("1/hour", on_limit="skip")
        def task(agent: str) -> str:
            return agent

        assert [task("a"), task("a"), task.apply(("a",)).get()] == ["a", None, None]
        assert gov.counters.get("celery.limited.skip") == 2

    @pytest.mark.parametrize("on_conflict", ["retry", "raise"])
    def test_a_conflict_raises(self, app: Celery, gov: GovRedis, on_conflict: str) -> None:
        @app.task(shared=False)
        @exclusive("agent:{agent}", ttl=20, on_conflict=on_conflict)  # type: ignore[call-overload]
        def task(agent: str) -> str:
            return agent

        with gov.locks.acquire("agent:a", timeout=1):
            for call in (lambda: task("a"), lambda: task.apply(("a",)).get()):
                with pytest.raises(LockTimeout):
                    call()
            assert task("b") == "b"
        assert task("a") == "a"
        assert gov.counters.get("celery.conflicts.raise") + gov.counters.get("celery.conflicts.retry") == 2

    def test_a_conflict_skips(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False)
        @exclusive("agent:{agent}", on_conflict="skip")
        def task(agent: str) -> str:
            return agent

        with gov.locks.acquire("agent:a", timeout=1):
            assert [task("a"), task.apply(("a",)).get()] == [None, None]
        assert task("a") == "a"
        assert gov.counters.get("celery.conflicts.skip") == 2

    @pytest.mark.parametrize("on_conflict", ["retry", "raise", "skip"])
    def test_a_lock_that_is_unavailable_is_no_conflict(
        self, make_gov: Callable[..., GovRedis], on_conflict: str
    ) -> None:
        gov = make_gov(redis_url=REDIS_AWAY, lock_fallback="fail")
        app = Celery("mine", broker="memory://", set_as_current=False)
        init_celery(app, gov)
        ran: list[str] = []

        @app.task(shared=False)
        @exclusive("agent:{agent}", on_conflict=on_conflict)  # type: ignore[call-overload]
        def task(agent: str) -> None:
            ran.append(agent)

        with pytest.raises(LockUnavailable):
            task.apply(("a",)).get()
        assert ran == []
        assert not any(name.startswith("celery.conflicts") for name in gov.counters.read())

    def test_the_lock_is_held_while_it_runs_with_its_ttl_and_no_longer(
        self, app: Celery, gov: GovRedis, celery_redis: RedisServer
    ) -> None:
        key = f"{gov.internal.context.keys.prefix}lock:agent:a"

        def body(agent: str, fails: bool) -> int:
            if fails:
                raise KeyError(agent)
            return int(celery_redis.command("PTTL", key))

        mine = app.task(shared=False, name="mine")(exclusive("agent:{agent}", ttl=77)(body))
        default = app.task(shared=False, name="default")(exclusive("agent:{agent}")(body))
        assert 60_000 < mine("a", False) <= 77_500
        assert 15_000 < default("a", False) <= 30_500
        with pytest.raises(KeyError):
            mine("a", True)
        assert celery_redis.command("EXISTS", key) == 0

    def test_exclusive_above_a_limit_takes_nothing_of_it_for_a_conflict(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False)
        @exclusive("agent:{agent}")
        @limited("1/hour", operation="both")
        def task(agent: str) -> str:
            return agent

        with gov.locks.acquire("agent:a", timeout=1), pytest.raises(LockTimeout):
            task("a")
        assert task("a") == "a"
        with pytest.raises(RateLimitExceeded):
            task("a")
        with gov.locks.acquire("agent:a", timeout=1) as held:
            assert held.token, "a limit below it leaves no lock behind"

    def test_a_key_of_a_bad_call_is_an_error(self, app: Celery) -> None:
        def body(agent: Any) -> None: ...

        for decorate in DECORATORS:
            task = app.task(shared=False, name=f"bad{DECORATORS.index(decorate)}")(decorate(body))
            with pytest.raises(ValueError, match="agent is None"):
                task(None)

    def test_no_task_at_all(self, gov: GovRedis) -> None:
        """The function is used on its own: then Celery's current app says whose GovRedis it is, else process-wide."""
        from govredis import configure

        Celery("of nobody", broker="memory://", set_as_current=True)  # not another test's
        configure(gov)
        function = limited("1/hour", operation="alone")(lambda agent: agent)
        assert function("a") == "a"
        with pytest.raises(RateLimitExceeded):
            function("a")
        assert gov.counters.get("limits.denied") == 1

    def test_a_task_inside_of_a_task_is_a_call_of_its_own(self, app: Celery, gov: GovRedis) -> None:
        other_gov = GovRedis(Config(redis_url=gov.config.redis_url, key_prefix="other:", socket_timeout=10))
        other = Celery("other", broker="memory://", set_as_current=False)
        init_celery(other, other_gov)

        @other.task(shared=False)
        @limited("1/hour", operation="inside")
        def inner(agent: str) -> str:
            return agent

        @app.task(shared=False)
        @limited("1/hour", operation="inside")
        def outer(agent: str) -> Any:
            return inner(agent)

        assert outer("a") == "a"
        assert gov.counters.get("limits.allowed") == 1
        assert other_gov.counters.get("limits.allowed") == 1
        other_gov.limits.reset("a", operation="inside")
        other_gov.close()


def run(task: Any, *args: Any, **request: Any) -> Any:
    """As a worker runs it, whose broker is in memory."""
    info = {"exchange": "", "routing_key": "celery"}
    task.push_request(
        **{"id": "one", "args": args, "kwargs": {}, "called_directly": False, "delivery_info": info, **request}
    )
    _task_stack.push(task)
    try:
        return task.run(*args)
    finally:
        _task_stack.pop()
        task.pop_request()


class TestPublishedAnew:
    """The running task's message where Redis is away."""

    @pytest.fixture
    def gov(self, make_gov: Callable[..., GovRedis]) -> GovRedis:
        return make_gov(redis_url=REDIS_AWAY)

    @pytest.fixture(autouse=True)
    def serializers(self, app: Celery) -> None:
        app.conf.accept_content = ["json"]

    @pytest.mark.parametrize("visible", [None, "1200", 0, -1, 10_000], ids=repr)
    def test_a_visibility_timeout_that_is_none_bounds_nothing(self, app: Celery, visible: Any) -> None:
        app.conf.broker_transport_options = {"visibility_timeout": visible}

        @app.task(shared=False)
        @limited("1/8 minutes")
        def task(agent: str) -> None: ...

        run(task, "a")
        with pytest.raises(Retry) as retry:
            run(task, "a")
        assert 480 - PATIENCE <= retry.value.when <= 600

    @pytest.mark.parametrize("late", [True, False])
    def test_a_message_that_cannot_be_encoded_fails_and_does_not_come_back(self, app: Celery, late: bool) -> None:
        @app.task(shared=False, acks_late=late)
        @limited("1/minute", key=lambda thing: "a")
        def task(thing: object) -> None: ...

        run(task, object())
        with pytest.raises(EncodeError):
            run(task, object())

    @pytest.mark.parametrize("late", [True, False])
    def test_a_soft_time_limit_that_strikes_the_encoder_loses_no_task(
        self, app: Celery, late: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """kombu makes an EncodeError of it."""
        monkeypatch.setattr(_republish.time, "sleep", lambda _: None)

        @app.task(shared=False, acks_late=late)
        @limited("1/minute", key=lambda thing: "a")
        def task(thing: object) -> None: ...

        run(task, Striking())
        with pytest.raises(Reject if late else SoftTimeLimitExceeded) as caught:
            run(task, Striking())
        if late:
            assert caught.value.requeue
            assert isinstance(caught.value.__cause__, SoftTimeLimitExceeded)

    @pytest.mark.parametrize("late", [True, False])
    def test_a_message_that_a_broker_refuses_comes_back_no_sooner_than_a_second(
        self, app: Celery, late: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waited: list[float] = []
        monkeypatch.setattr(_republish.time, "sleep", waited.append)
        # Nobody listens there.
        app.conf.update(broker_url=REDIS_AWAY, task_publish_retry=False)
        app.conf.broker_transport_options = {"max_retries": 0}

        @app.task(shared=False, acks_late=late)
        @limited("1/minute")
        def task(agent: str) -> None: ...

        run(task, "a")
        with pytest.raises(Reject if late else OperationalError) as caught:
            run(task, "a")
        if late:
            assert caught.value.requeue
            assert waited[-1:] == [1.0]
        else:
            assert 1.0 not in waited

    @pytest.mark.parametrize("ignored", [True, False])
    def test_whether_its_result_is_wanted_is_kept(self, app: Celery, ignored: bool) -> None:
        @app.task(shared=False, ignore_result=not ignored)
        @limited("1/minute")
        def task(agent: str) -> None: ...

        run(task, "a")
        with pytest.raises(Retry) as retry:
            run(task, "a", ignore_result=ignored)
        assert retry.value.sig.options["ignore_result"] is ignored

    def test_it_waits_as_long_as_the_limit_says_or_up_to_a_quarter_longer(self, app: Celery) -> None:
        @app.task(shared=False)
        @limited("1/8 minutes")
        def task(agent: str) -> None: ...

        run(task, "a")
        waits = set()
        for _ in range(8):
            with pytest.raises(Retry) as retry:
                run(task, "a")
            retry_after = retry.value.exc.result.retry_after
            assert 480 - PATIENCE < retry_after <= retry.value.when <= retry_after * 1.25
            assert retry.value.exc.result.degraded
            waits.add(retry.value.when)
        assert len(waits) == 8, "not all at the same time"

    @pytest.mark.parametrize(("visible", "most"), [(None, 600), (4, 2)])
    def test_it_waits_no_longer_than_its_broker_can_bear(self, app: Celery, visible: Any, most: float) -> None:
        app.conf.broker_transport_options = {"visibility_timeout": visible}

        @app.task(shared=False)
        @limited("1/hour")
        def task(agent: str) -> None: ...

        run(task, "a")
        with pytest.raises(Retry) as retry:
            run(task, "a")
        assert retry.value.when == most


class TestWithAMessage:
    def test_a_task_that_it_calls_does_not_begin_it_anew(self, app: Celery, gov: GovRedis) -> None:
        @app.task(shared=False)
        @exclusive("x:{agent}")
        @limited("1/minute", operation="inner")
        def inner(agent: str) -> None: ...

        @app.task(shared=False, bind=True, autoretry_for=(KeyError,))
        @limited("9/minute", operation="outer")
        def outer(self: Any, agent: str) -> None:
            inner.run(agent)

        gov.limits.hit("a", "1/minute", operation="inner")
        with pytest.raises(RateLimitExceeded):
            run(outer, "a")
        with gov.locks.acquire("x:b"), pytest.raises(LockTimeout):
            run(outer, "b")
        for _ in range(9):
            gov.limits.hit("c", "9/minute", operation="outer")
        with pytest.raises(Retry):
            run(outer, "c")

    def test_a_class_and_the_one_that_it_extends_are_one_task(self, app: Celery) -> None:
        class Base(app.Task):  # type: ignore[misc,name-defined]
            @limited("1/minute")
            def run(self, agent: str) -> str:
                return agent

        class Extended(Base):
            name = "extended"

            def run(self, agent: str) -> str:
                return str(super().run(agent))

        task = app.register_task(Extended())
        assert run(task, "a") == "a"
        with pytest.raises(Retry):
            run(task, "a")

    @pytest.mark.parametrize("header", [None, "1:abc:0.0"], ids=["as it was sent", "parked before"])
    def test_a_message_comes_again_where_no_connection_is_free_to_ask(
        self, make_gov: Callable[..., GovRedis], celery_redis: RedisServer, header: str | None
    ) -> None:
        """Redis may well admit it, or know it for one too many: it is neither run unasked, nor does it fail."""
        gov = make_gov(redis_url=celery_redis.url, redis_connections=1, socket_timeout=0.1, connect_timeout=0.1)
        app, ran = Celery("crowded", broker="memory://", set_as_current=False), []
        init_celery(app, gov)

        @app.task(shared=False)
        @limited("9/minute", operation="crowded")
        def task(agent: str) -> None:
            ran.append(agent)

        connection = redis_of(gov)._pool.take(5)
        headers = {} if header is None else {HEADER: header}
        with pytest.raises(Retry) as retry:
            run(task, "a", headers=headers)
        assert 1 <= retry.value.when <= 1.25
        assert retry.value.sig.options["headers"].get(HEADER) == header
        assert ran == []
        redis_of(gov)._pool.give(connection)
        run(task, "a", headers=headers)
        assert ran == ["a"]
        app.close()
