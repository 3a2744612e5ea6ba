"""Health beside real workers and beats: two beats, a beat that hangs or is killed, a killed worker, an unread queue."""

from __future__ import annotations

import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery_fleet import Fleet
from kombu.exceptions import OperationalError
from support import eventually

from govredis import ConfigurationError, GovRedis
from govredis.contrib.celery import _pulse, init_celery
from govredis.contrib.celery._pulse import Pulse
from govredis.health import Check
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]


@pytest.fixture
def own_fleet(celery_broker: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    server = celery_broker.url.removesuffix("/0")
    fleet = Fleet(tmp_path, {"broker": f"{server}/4", "backend": f"{server}/1", "evidence": f"{server}/2"})
    yield fleet
    fleet.close()


def test_each_fault_is_named(own_fleet: Fleet, redis_server: RedisServer, make_gov: MakeGov, tmp_path: Path) -> None:
    """Within two intervals of half a second; a machine that stalls may take longer."""
    gov = make_gov(redis_url=redis_server.url)
    read, mail = uuid.uuid4().hex, uuid.uuid4().hex
    host = socket.gethostname()

    def conf(name: str) -> dict[str, Any]:
        ours = {"redis_url": redis_server.url, "heartbeat_interval": 0.5, "socket_timeout": 10, "connect_timeout": 10}
        ours |= {"lock_folder": str(tmp_path / "locks"), "liveness_file": str(tmp_path / f"{name} lives")}
        routes = {"task_routes": {"mail.*": {"queue": mail}}, "beat_max_loop_interval": 0.1}
        return {**routes, **{f"govredis_{key}": value for key, value in ours.items()}}

    def named(name: str, *words: str) -> Check:
        def found() -> Check | None:
            gov.health.renew_after_fork()  # what was seen last is forgotten
            checks = [c for c in gov.health.check().checks if c.name == name and c.status == "warn"]
            return checks[0] if checks and all(word in checks[0].output for word in words) else None

        return eventually(found, what=f"{name} is warned of: {words}")

    def all_is_well(workers: int) -> None:
        def found() -> bool:
            gov.health.renew_after_fork()
            checks = {check.name: check for check in gov.health.check().checks}
            well = {"beat", "workers"} <= checks.keys() and checks["workers"].data["alive"] == workers
            return well and checks["beat"].status == "pass" and checks["beat"].data.get("beats") == 1

        eventually(found, what="all is well")

    one, two = (own_fleet.worker(n, "-c", "1", "-Q", read, queue=read, conf=conf(n)) for n in ("one", "two"))
    beat = own_fleet.beat("beats", queue=read, conf=conf("beats"))
    all_is_well(workers=2)
    for name in "one", "beats":
        file = tmp_path / f"{name} lives"
        touched = file.stat().st_mtime
        eventually(lambda file=file, touched=touched: file.stat().st_mtime > touched, what=f"{name} lives")

    for priority in None, 9, 3:
        own_fleet.app().send_task("mail.send", queue=mail, priority=priority)
    check = named("celery", f"queue '{mail}' holds 3 messages", "no worker reads it")
    assert check.data[mail] == {"depth": 3, "read": False}
    assert check.data[read]["read"]

    two.kill()
    named("workers", f"two@{host} was last heard")

    second = own_fleet.beat("second", queue=read, conf=conf("second"))
    named("beat", "2 beats run", f"{host}:{beat.pid}", f"{host}:{second.pid}")
    second.kill()
    all_is_well(workers=1)

    os.kill(beat.pid, signal.SIGSTOP)
    named("beat", f"beat {host}:{beat.pid} was last heard", "stuck")
    os.kill(beat.pid, signal.SIGCONT)
    all_is_well(workers=1)
    beat.kill()
    named("beat", f"beat {host}:{beat.pid} was last heard", "gone")

    assert one.stop() == 0
    gov.health.renew_after_fork()
    workers = named("workers", f"two@{host} was last heard")
    assert f"one@{host}" not in workers.output, "it ended by itself"


class TestPulse:
    @pytest.fixture
    def app(self, celery_broker: RedisServer) -> Iterator[Celery]:
        app = Celery("mine", broker=f"{celery_broker.url.removesuffix('/0')}/5", set_as_current=False)
        yield app
        app.close()

    def test_tells_of_each_queue_and_of_unacknowledged_messages(
        self, app: Celery, make_gov: MakeGov, redis_server: RedisServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        names = [uuid.uuid4().hex for _ in range(5)]
        app.conf.update(task_default_queue=names[0], govredis_queue=names[1])
        app.conf.task_routes = [{"a": {"queue": names[2]}, "b": names[3]}, {"c": {"routing_key": "x"}}]
        init_celery(app, gov)
        app.finalize()
        with Celery("other", broker=app.conf.broker_url, set_as_current=False) as other:
            for name in (*names[:2], names[1], names[3], names[4]):
                other.send_task("a", queue=name)
        pulse = Pulse(app, gov, "worker", 15)
        pulse.beat()
        told = pulse._look()
        assert told["depths"] == {names[0]: 1, names[1]: 2, names[2]: 0, names[3]: 1}
        assert (told["unacked"], "oldest_unacked" in told) == (0, False)
        with app.connection_for_read() as connection:
            queue = connection.SimpleQueue(names[0])
            queue.get(timeout=60)
            told = pulse._look()
            queue.close()
        assert (told["depths"][names[0]], told["unacked"]) == (0, 1)
        assert told["oldest_unacked"] >= 0
        pulse.stop()
        assert [check.name for check in gov.health.check().checks if check.name == "workers"] == []

    def test_one_worker_looks_at_a_broker_in_each_interval(
        self,
        app: Celery,
        make_gov: MakeGov,
        redis_server: RedisServer,
        plain_redis: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        looks: list[Pulse] = []
        monkeypatch.setattr(Pulse, "_look", lambda pulse: looks.append(pulse) or {"depths": {}})
        one, two = (Pulse(app, gov, name, 1000) for name in ("one", "two"))
        for pulse in one, two, one:
            pulse.beat()
        assert looks == [one]
        assert gov.health.check().checks[-2].data == {"alive": 2, "lost": 0}

    @pytest.mark.parametrize("url", ["redis://:hunter2@127.0.0.1:1/0", "amqp://u:hunter2@127.0.0.1:1//"])
    def test_a_broker_that_is_away_is_unknown_without_its_password(
        self, make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any, url: str
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        app = Celery("mine", broker=url, set_as_current=False)
        app.conf.broker_transport_options = {"socket_timeout": 1, "max_retries": 0}
        Pulse(app, gov, "worker", 1000).beat()
        broker = next(check for check in gov.health.check().checks if check.name == "broker")
        assert broker.status == "pass"
        assert broker.output.startswith("unknown: ")
        assert "hunter2" not in repr(gov.health.check())
        app.close()

    def test_the_memory_s_queues_are_counted_too(self, make_gov: MakeGov) -> None:
        app = Celery("mine", broker="memory://", set_as_current=False)
        app.send_task("a", queue="celery")
        told = Pulse(app, make_gov(redis_enabled=False), "worker", 15)._look()
        assert told == {"depths": {"celery": 1}}

    def test_runs_until_it_is_stopped(self, app: Celery, make_gov: MakeGov, redis_server: RedisServer) -> None:
        pulse = Pulse(app, make_gov(redis_url=redis_server.url), "worker", 1000)
        beats = threading.Semaphore(0)
        pulse.beat = lambda: beats.release()  # type: ignore[method-assign]
        pulse.start()
        assert beats.acquire(timeout=60)
        pulse.stop()
        pulse.join(60)
        assert not pulse.is_alive()
        assert _pulse._RECENT < 1


class TestLivenessFile:
    def app(self, **conf: Any) -> Celery:
        app = Celery("mine", broker="memory://", set_as_current=False)
        app.conf.update(conf)
        return app

    def test_is_touched_by_beat_also_while_the_broker_is_away(self, make_gov: MakeGov, tmp_path: Path) -> None:
        app = self.app(govredis_liveness_file=str(tmp_path / "alive"), task_publish_retry=False)
        app.conf.broker_url = "redis://127.0.0.1:1/0"
        app.conf.broker_transport_options = {"socket_timeout": 1, "max_retries": 0}
        init_celery(app, make_gov(redis_enabled=False))
        with app.connection_for_write() as connection:
            producer = app.amqp.Producer(connection, auto_declare=False)
            app.tasks["govredis.purge"].apply_async(producer=producer)
            assert not (tmp_path / "alive").exists(), "only by a heartbeat"
            app.tasks["govredis.heartbeat"].apply_async(producer=producer)
        assert (tmp_path / "alive").exists()
        with pytest.raises(OperationalError):
            app.tasks["govredis.heartbeat"].delay()
        app.close()

    def test_that_cannot_be_written_to_is_said_once(self, make_gov: MakeGov, caplog: pytest.LogCaptureFixture) -> None:
        app = self.app(govredis_liveness_file="/proc/alive")
        init_celery(app, gov := make_gov(redis_enabled=False))
        pulse = Pulse(app, gov, "worker", 15)
        for _ in range(3):
            pulse.beat()
        said = [record.message for record in caplog.records if "govredis_liveness_file" in record.message]
        assert len(said) == 1
        assert said[0].startswith("govredis_liveness_file /proc/alive cannot be touched: ")
        assert gov.counters.get("celery.untouched") == 3

    @pytest.mark.parametrize("wrong", ["", 5, True])
    def test_a_wrong_setting_is_refused(self, make_gov: MakeGov, wrong: Any) -> None:
        app = self.app(govredis_liveness_file=wrong)
        app.finalize()
        with pytest.raises(ConfigurationError, match=r"^govredis_liveness_file is .*; it must be the path of"):
            init_celery(app, make_gov(redis_enabled=False))
