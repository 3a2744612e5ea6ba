"""init_celery: the tasks and settings that it puts into an app, those that it leaves alone, and the app's GovRedis."""

from __future__ import annotations

import ast
import copy
import re
import socket
import sys
import types
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app
from celery.schedules import crontab, schedule
from kombu.exceptions import OperationalError
from support import PATIENCE, REDIS_AWAY, Background, WatchedSocket, in_child, redis_of

from govredis import (
    BackendUnavailable,
    Config,
    ConfigurationError,
    GovRedis,
    RateLimitExceeded,
    configure,
    get_rate_limiter,
)
from govredis.contrib.celery import exclusive, init_celery, rate_limited
from govredis.contrib.celery._gov import gov_of
from govredis.testing.servers import RedisServer

NAMES = "census", "drain_outbox", "health_snapshot", "heartbeat", "invalidate_metadata", "purge"
TASKS = {f"govredis.{name}" for name in NAMES}
PERIODIC = {
    "govredis.census": 10,
    "govredis.health_snapshot": 60,
    "govredis.heartbeat": 15,
    "govredis.purge": 3600,
}


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    yield
    configure(None)


def make_app(**conf: Any) -> Celery:
    app = Celery("mine", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(conf)
    return app


def ours(app: Celery) -> set[str]:
    return {name for name in app.tasks if name.startswith("govredis.")}


def scheduled(app: Celery) -> dict[str, Any]:
    app.finalize()
    return {name: entry["schedule"] for name, entry in app.conf.beat_schedule.items()}


def test_a_workers_threads_start_behind_its_forks(tmp_path: Path) -> None:
    """An embedded beat hung where a thread of ours had a mutex of kombu's in the instant of the fork."""
    app = make_app()
    init_celery(app)

    def steps(**options: Any) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a worker that runs as root
            worker = app.Worker(pool="prefork", concurrency=1, schedule_filename=str(tmp_path / "schedule"), **options)
        return [type(step).__name__ for step in worker.steps]

    with_beat, without = (in_child(partial(steps, beat=beat)) for beat in (True, False))  # it changes the process
    assert {"Pool", "Beat"} <= set(with_beat[: with_beat.index("_WorkerStep")])
    assert {"Pool"} <= set(without[: without.index("_WorkerStep")])


class TestTasks:
    @pytest.mark.parametrize("finalized", [False, True])
    def test_are_added(self, finalized: bool) -> None:
        app = make_app()
        if finalized:
            app.finalize()
        init_celery(app)
        assert app.finalized is finalized, "it is left to the app when it is made"
        assert ours(app) == TASKS
        assert scheduled(app) == PERIODIC
        for name in TASKS:
            assert app.tasks[name].app is app
            assert app.tasks[name].__doc__
        assert app.tasks["govredis.invalidate_metadata"].acks_late
        assert {app.tasks[name].ignore_result for name in PERIODIC} == {True}

    def test_purge_deletes_what_is_over_of_sessions_too(self, gov: GovRedis) -> None:
        app = make_app()
        init_celery(app, gov)
        app.finalize()
        for sid in ("over", "alive"):
            gov.sessions.bind(sid, "a")
        gov.postgres.fetch("UPDATE govredis_sessions SET expires_at = now() - interval '1 day' WHERE session = 'over'")
        redis_of(gov).call("DEL", "session:over")  # which would keep it alive, as an EXPIRE of the async service's does
        assert app.tasks["govredis.purge"]() == 1
        assert gov.postgres.fetch("SELECT session FROM govredis_sessions") == [("alive",)]

    def test_entries_expire_before_the_next_and_the_heartbeat_knows_its_interval(self) -> None:
        app = make_app(govredis_heartbeat_interval=7)
        init_celery(app)
        app.finalize()
        for name, entry in app.conf.beat_schedule.items():
            assert entry["task"] == name
            assert entry["options"] == {"expires": entry["schedule"], "expiration": entry["schedule"]}
        assert app.conf.beat_schedule["govredis.heartbeat"]["kwargs"] == {"every": 7}
        assert "kwargs" not in app.conf.beat_schedule["govredis.purge"]

    def test_twice_is_harmless(self) -> None:
        app = make_app()
        init_celery(app)
        init_celery(app)
        app.finalize()
        tasks = {name: app.tasks[name] for name in TASKS}
        init_celery(app)
        assert {name: app.tasks[name] for name in TASKS} == tasks
        assert scheduled(app) == PERIODIC

    @pytest.mark.parametrize("finalized", [False, True])
    def test_a_task_of_the_users_own_stays(self, finalized: bool) -> None:
        app = make_app()

        @app.task(shared=False, name="govredis.purge")
        def mine() -> str:
            return "mine"

        if finalized:
            app.finalize()
        init_celery(app)
        assert app.tasks["govredis.purge"]() == "mine"
        assert ours(app) == TASKS

    def test_an_app_that_was_not_given_has_none(self) -> None:
        app, other = make_app(), make_app()
        init_celery(app)
        app.finalize()
        late = make_app()
        for without in (other, late):
            without.finalize()
            assert ours(without) == set()
            assert not without.conf.beat_schedule
            assert len(without.steps["worker"]) == 0


class TestSchedule:
    @pytest.mark.parametrize("finalized", [False, True])
    def test_the_users_schedule_stays(self, finalized: bool) -> None:
        mine: dict[str, Any] = {
            "govredis.purge": {"task": "something.else", "schedule": crontab(hour=3)},
            "often": {"task": "govredis.heartbeat", "schedule": 1.0, "kwargs": {"every": 1}},
            "daily": {"task": "report", "schedule": schedule(86_400)},
        }
        before = copy.deepcopy(mine)
        app = make_app(beat_schedule=mine)
        if finalized:
            app.finalize()
        init_celery(app)
        assert scheduled(app) == {
            "govredis.purge": crontab(hour=3),
            "often": 1.0,
            "daily": schedule(86_400),
            "govredis.census": 10,
            "govredis.health_snapshot": 60,
        }
        assert mine == before, "the user's own dict, which may be another app's too"

    def test_an_entry_object_is_seen_too(self) -> None:
        from celery.beat import ScheduleEntry

        app = make_app()
        app.conf.beat_schedule = {
            "mine": ScheduleEntry(name="mine", task="govredis.purge", schedule=schedule(9), app=app)
        }
        init_celery(app)
        app.finalize()
        assert set(app.conf.beat_schedule) == {"mine", *PERIODIC} - {"govredis.purge"}

    def test_intervals(self) -> None:
        never = {"govredis_census_interval": None, "govredis_snapshot_interval": None}
        app = make_app(govredis_heartbeat_interval=0.5, govredis_purge_interval=7, **never)
        init_celery(app)
        assert scheduled(app) == {"govredis.heartbeat": 0.5, "govredis.purge": 7}
        assert ours(app) == TASKS, "to be called, by whoever wants to"

    @pytest.mark.parametrize("interval", [{}, {"govredis_drain_interval": 0.5}])
    def test_the_outbox_is_drained_where_there_is_one(self, interval: dict[str, float]) -> None:
        app = make_app(govredis_database_url="postgresql://h/d", **interval)
        init_celery(app)
        assert scheduled(app) == {**PERIODIC, "govredis.drain_outbox": interval.get("govredis_drain_interval", 1)}

    @pytest.mark.parametrize("interval", ["often", 0, -1, True, float("nan")])
    @pytest.mark.parametrize("which", ["drain", "census", "heartbeat", "snapshot", "purge"])
    def test_refuses_a_wrong_interval(self, which: str, interval: Any) -> None:
        app = make_app(**{f"govredis_{which}_interval": interval})
        app.finalize()
        with pytest.raises(ConfigurationError, match=f"^govredis_{which}_interval is .*; it must be .*, or None$"):
            init_celery(app)


class TestQueue:
    def queues(self, app: Celery) -> dict[str, str | None]:
        return {name: getattr(app.tasks[name], "queue", None) for name in TASKS}

    def test_is_the_apps_default_one(self) -> None:
        app = make_app(task_default_queue="mine")
        init_celery(app)
        app.finalize()
        assert self.queues(app) == dict.fromkeys(TASKS)

    def test_a_queue_that_a_setting_names_is_for_our_tasks_and_not_for_the_users(self) -> None:
        app = make_app(govredis_queue="ours")

        @app.task(shared=False, name="govredis.purge")
        def purge() -> None: ...

        init_celery(app)
        app.finalize()
        assert self.queues(app) == {**dict.fromkeys(TASKS, "ours"), "govredis.purge": None}

    @pytest.mark.parametrize("queue", ["", 5, ["a"]])
    def test_refuses_what_is_no_name(self, queue: Any) -> None:
        app = make_app(govredis_queue=queue)
        app.finalize()
        with pytest.raises(
            ConfigurationError, match=r"^govredis_queue is .*; it must be the name of a queue, or None$"
        ):
            init_celery(app)


class TestUnboundedBroker:
    """A broker that hangs."""

    SAID = "blocks for as long as the broker hangs"

    def said(self, caplog: pytest.LogCaptureFixture, broker: str, **conf: Any) -> int:
        caplog.clear()
        app = Celery("mine", set_as_current=False)
        app.conf.update(broker_url=broker, **conf)
        for _ in range(2):
            init_celery(app)
            app.finalize()
        return caplog.text.count(self.SAID)

    def test_is_warned_of_once(self, caplog: pytest.LogCaptureFixture) -> None:
        urls = ("redis://h", "rediss://h", "sentinel://h;sentinel://i", "redis://u:hunter2@h/3")
        assert [self.said(caplog, url) for url in urls] == [1, 1, 1, 1]
        assert "hunter2" not in caplog.text
        assert self.said(caplog, "redis://h", broker_transport_options={"visibility_timeout": 9}) == 1
        assert "{'visibility_timeout': 9, 'socket_timeout': 1," in caplog.text, "the user's own stay"
        of_sentinels = {"master_name": "m", "sentinel_kwargs": {"password": "hunter2", "username": "u"}}
        assert self.said(caplog, "sentinel://h", broker_transport_options=of_sentinels) == 1
        assert "hunter2" not in caplog.text

    def test_nothing_is_said_where_it_is_bounded_or_no_redis(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.said(caplog, "redis://h", broker_transport_options={"socket_timeout": 5}) == 0
        assert self.said(caplog, "memory://") == self.said(caplog, "amqp://h") == 0

    def test_the_warning_is_true(
        self, caplog: pytest.LogCaptureFixture, celery_broker: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(socket, "socket", WatchedSocket)

        def publish(app: Celery) -> tuple[str, int, list[float | None]]:
            waits = WatchedSocket.waits
            try:
                app.send_task("any", queue="unbounded")
            except OperationalError:
                return "refused", waits.connects, waits.timeouts
            return "published", waits.connects, waits.timeouts

        url = celery_broker.url.removesuffix("/0")
        unbounded = Celery("mine", broker=f"{url}/5", set_as_current=False)
        init_celery(unbounded)
        unbounded.finalize()
        told = re.search(r"With broker_transport_options=(\{.*\}) and task_publish_retry=(\w+) it", caplog.text)
        assert told is not None
        bounded = Celery("mine", broker=f"{url}/6", set_as_current=False)
        bounded.conf.update(
            broker_transport_options=ast.literal_eval(told[1]), task_publish_retry=ast.literal_eval(told[2])
        )
        celery_broker.pause()
        try:
            blocked = Background(lambda: publish(unbounded))
            assert Background(lambda: publish(bounded)).result(PATIENCE) == ("refused", 1, [1]), "a second, once"
            assert blocked.is_alive(), "the other one blocks"
        finally:
            celery_broker.resume()
        answer, _, ran_out = blocked.result(PATIENCE)
        assert (answer, ran_out) == ("published", [])
        celery_broker.command("DEL", "unbounded")
        for app in (unbounded, bounded):
            app.pool.force_close_all()
            app.close()


class TestSettings:
    def test_make_a_gov_of_the_apps_own_over_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REDIS_SESSION_TTL", "77")
        monkeypatch.setenv("REDIS_URL", "redis://environment")
        app = make_app(govredis_redis_url="redis://mine/3", govredis_key_prefix="mine:")
        init_celery(app)
        app.finalize()
        config = gov_of(app).config
        assert (config.redis_url, config.key_prefix, config.session_ttl) == ("redis://mine/3", "mine:", 77)
        assert gov_of(app) is gov_of(app)

    @pytest.mark.parametrize(
        ("namespace", "name"),
        [
            (None, "govredis_key_prefix"),
            ("CELERY", "CELERY_GOVREDIS_KEY_PREFIX"),
            ("celery", "celery_govredis_key_prefix"),
            ("MY_APP", "MY_APP_GOVREDIS_KEY_PREFIX"),
        ],
    )
    @pytest.mark.parametrize("init_first", [True, False])
    def test_from_a_module(
        self, monkeypatch: pytest.MonkeyPatch, namespace: str | None, name: str, init_first: bool
    ) -> None:
        module = types.ModuleType("settings_of_mine")
        setattr(module, name, "mine:")
        setattr(module, name.replace("key_prefix", "purge_interval").replace("KEY_PREFIX", "PURGE_INTERVAL"), 5)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        app = Celery("mine", broker="memory://", set_as_current=False)
        if init_first:
            init_celery(app)
        app.config_from_object(module.__name__, namespace=namespace)
        if not init_first:
            init_celery(app)
        assert scheduled(app) == {**PERIODIC, "govredis.purge": 5}
        assert gov_of(app).config.key_prefix == "mine:"

    @pytest.mark.parametrize("namespace", [None, "CELERY"])
    def test_a_wrong_name_in_a_module_is_named(self, namespace: str | None) -> None:
        prefix = f"{namespace}_GOVREDIS_" if namespace else "govredis_"
        app = Celery("mine", broker="memory://", set_as_current=False)
        wrong = prefix + ("REDIS_ULR" if namespace else "redis_ulr")
        app.config_from_object({wrong: "redis://u:hunter2@h/0"}, namespace=namespace)
        app.finalize()
        with pytest.raises(ConfigurationError, match=r"^govredis_redis_ulr is no setting") as caught:
            init_celery(app)
        assert str(caught.value).endswith("; the name must be govredis_redis_url")

    def test_a_strange_name_is_refused_with_those_there_are(self) -> None:
        app = make_app(govredis_wonder="redis://u:hunter2@h/0")
        app.finalize()
        with pytest.raises(ConfigurationError, match=r"^govredis_wonder is no setting; these are: .*") as caught:
            init_celery(app)
        assert "hunter2" not in str(caught.value)
        assert "govredis_redis_url" in str(caught.value)
        assert "govredis_purge_interval" in str(caught.value)

    def test_a_wrong_value_is_named_without_its_password(self) -> None:
        app = make_app(govredis_redis_url="redis://u:hunter2@h:port/0")
        app.finalize()
        with pytest.raises(ConfigurationError, match=r"^govredis_redis_url is 'redis://u:\*\*\*@h:port/0'") as caught:
            init_celery(app)
        assert "hunter2" not in str(caught.value)

    def test_tasks_of_an_app_finalized_later_raise_the_wrong_setting(self, caplog: pytest.LogCaptureFixture) -> None:
        app = make_app(govredis_lock_fallback="none")
        init_celery(app)
        app.finalize()  # Celery logs what a receiver of its signal raised
        assert ours(app) == TASKS
        for task in ("govredis.purge", "govredis.heartbeat", "govredis.health_snapshot"):
            with pytest.raises(ConfigurationError, match=r"^govredis_lock_fallback is 'none'"):
                app.tasks[task]()
        with pytest.raises(ConfigurationError, match=r"^govredis_lock_fallback is 'none'"):
            app.tasks["govredis.invalidate_metadata"]("agent")
        (step,) = app.steps["worker"]
        with pytest.raises(ConfigurationError, match=r"^govredis_lock_fallback is 'none'"):
            step(types.SimpleNamespace(app=app))

    def test_with_a_gov_the_settings_are_not_read(self) -> None:
        gov = GovRedis(Config(key_prefix="given:"))
        app = make_app(govredis_key_prefix="settings:")
        init_celery(app, gov)
        app.finalize()
        assert gov_of(app) is gov


class TestChoiceOfGov:
    def test_with_neither_gov_nor_settings_it_is_the_process_wide_one(self) -> None:
        mine = GovRedis(Config(key_prefix="configured:"))
        app = make_app(govredis_purge_interval=5)  # an interval makes no GovRedis
        init_celery(app)
        app.finalize()
        configure(mine)
        assert gov_of(app) is mine
        assert get_rate_limiter() is mine.limits
        other = GovRedis(Config())
        configure(other)
        assert gov_of(app) is other, "asked for at each call"

    def test_an_app_that_was_not_given_uses_the_process_wide_one(self) -> None:
        mine = GovRedis(Config())
        configure(mine)
        assert gov_of(make_app(govredis_key_prefix="unread:")) is mine

    def test_each_app_has_its_own(self, celery_redis: RedisServer, tmp_path: Path) -> None:
        apps = [
            make_app(
                govredis_redis_url=celery_redis.url,
                govredis_key_prefix=prefix,
                govredis_lock_folder=str(tmp_path),
                govredis_socket_timeout=10,
            )
            for prefix in ("one:", "two:")
        ]
        given = GovRedis(Config(redis_url=celery_redis.url, key_prefix="three:", socket_timeout=10))
        apps.append(make_app())
        for app, gov in zip(apps, (None, None, given), strict=True):
            init_celery(app, gov)

            @app.task(shared=False, name="limited")
            @rate_limited("1/hour", key="{agent}", operation="own", on_limit="raise")
            def limited(agent: str) -> str:
                return agent

            @app.task(shared=False, name="locked", bind=True)
            @exclusive("own:{agent}")
            def locked(self: Any, agent: str) -> list[str]:
                gov = gov_of(self.app)
                return [
                    key
                    for key in celery_redis.command("KEYS", "*lock:own:a")
                    if key.startswith(gov.internal.context.keys.prefix)
                ]

        for app, prefix in zip(apps, ("one:", "two:", "three:"), strict=True):
            assert app.tasks["limited"].apply(("a",)).get() == "a"
            with pytest.raises(RateLimitExceeded):
                app.tasks["limited"].apply(("a",)).get()
            assert app.tasks["locked"].apply(("a",)).get() == [f"{prefix}lock:own:a"]
            assert app.tasks["govredis.heartbeat"].apply(kwargs={"every": 9}).get() is True
            assert celery_redis.command("GET", f"{prefix}govredis:heartbeat") == "9"
            assert celery_redis.command("ZCARD", f"{prefix}rate_limit:own:a") == 1
            assert gov_of(app).counters.get("limits.denied") == 1
        for app in apps:
            gov_of(app).close()


class TestCalls:
    """Our tasks as functions: their results."""

    def test_snapshot_heartbeat_purge_and_invalidation(
        self, celery_redis: RedisServer, celery_settings: dict[str, Any]
    ) -> None:
        settings = {f"govredis_{name}": value for name, value in celery_settings.items()}
        app = make_app(**{**settings, "govredis_key_prefix": "calls:"})
        init_celery(app)
        app.finalize()
        gov = gov_of(app)
        gov.postgres.migrate()  # under this prefix
        assert app.tasks["govredis.health_snapshot"]() == {"status": "pass", "stored": "redis"}
        assert celery_redis.command("XLEN", "calls:govredis:health") == 1
        assert app.tasks["govredis.heartbeat"]() is True
        assert celery_redis.command("GET", "calls:govredis:heartbeat") == "15"
        gov.metadata.set("a", 1)
        assert app.tasks["govredis.invalidate_metadata"]("a") is None
        assert gov.metadata.get("a") is None
        gov.metadata.get_or_load("a", lambda _: 1)
        gov.postgres.fetch("SELECT govredis_outbox_add('agent_meta', 'a', 1)")
        assert app.tasks["govredis.drain_outbox"]() == 1
        assert gov.metadata.get("a") is None
        gov.postgres.fetch(
            "INSERT INTO govredis_limit_windows SELECT %s || n, '{}', 1, 5 FROM generate_series(1, 3) n",
            (gov.internal.context.keys.row("default:"),),
        )
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots SELECT %s, now() - n * interval '31 days', '{}'"
            " FROM generate_series(1, 2) n",
            (gov.internal.context.keys.health_history(),),
        )
        assert app.tasks["govredis.purge"]() == 5
        assert app.tasks["govredis.purge"]() == 0
        gov.close()

    def test_with_redis_away(self) -> None:
        app = make_app(govredis_redis_url=REDIS_AWAY)
        init_celery(app)
        app.finalize()
        assert app.tasks["govredis.heartbeat"]() is False
        assert app.tasks["govredis.health_snapshot"]() == {"status": "fail", "stored": None}
        assert app.tasks["govredis.drain_outbox"]() is None
        assert app.tasks["govredis.purge"]() == 0, "there is no PostgreSQL: nothing to purge"
        with pytest.raises(BackendUnavailable):
            app.tasks["govredis.invalidate_metadata"]("a")
        with pytest.raises(BackendUnavailable):
            app.tasks["govredis.invalidate_metadata"].apply(("a",)).get()
        gov_of(app).close()


class TestNames:
    def test_in_upper_case_without_a_namespace(self) -> None:
        app = make_app(GOVREDIS_KEY_PREFIX="mine:", GOVREDIS_PURGE_INTERVAL=7)
        init_celery(app)
        app.finalize()
        assert gov_of(app).config.key_prefix == "mine:"
        assert app.conf.beat_schedule["govredis.purge"]["schedule"] == 7

    def test_settings_of_a_flask_app_in_the_same_module_are_not_its_own(self) -> None:
        app = Celery("mine", set_as_current=False)
        module = {"CELERY_BROKER_URL": "memory://", "GOVREDIS_SESSION_HEADER": "X", "CELERY_GOVREDIS_KEY_PREFIX": "c:"}
        app.config_from_object(types.SimpleNamespace(**module), namespace="CELERY")
        init_celery(app)
        app.finalize()
        assert gov_of(app).config.key_prefix == "c:"

    def test_the_current_app_and_a_second_time(self) -> None:
        app = make_app()
        app.set_current()
        try:
            with GovRedis(Config()) as gov:
                init_celery(current_app, gov)
                init_celery(app)
                assert gov_of(app) is gov
        finally:
            Celery("another").set_current()
