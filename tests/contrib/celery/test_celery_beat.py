"""Beat beside workers that do not read its queue, and beside a broker that is away."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery_fleet import Fleet
from kombu.exceptions import OperationalError
from support import REDIS_AWAY, eventually

from govredis import GovRedis
from govredis.contrib.celery import init_celery
from govredis.health import Check
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: Intervals, in seconds.
OFTEN = {"drain_interval": 0.3, "heartbeat_interval": 0.3, "snapshot_interval": 0.3, "purge_interval": 0.3}


@pytest.fixture
def own_fleet(celery_broker: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    """Without workers."""
    server = celery_broker.url.removesuffix("/0")
    fleet = Fleet(tmp_path, {"broker": f"{server}/3", "backend": f"{server}/1", "evidence": f"{server}/2"})
    yield fleet
    fleet.close()


def in_app(folder: Path, **settings: Any) -> dict[str, Any]:
    """As an app's configuration has them. Patient: no server is taken for away because the machine is busy."""
    ours = {"lock_folder": str(folder / "locks"), "socket_timeout": 10, "connect_timeout": 10, **OFTEN, **settings}
    return {"beat_max_loop_interval": 0.1, **{f"govredis_{name}": value for name, value in ours.items()}}


def beat(gov: GovRedis) -> Check | None:
    return next((check for check in gov.health.check().checks if check.name == "beat"), None)


def test_a_queue_that_no_worker_reads(
    own_fleet: Fleet, redis_server: RedisServer, make_gov: Callable[..., GovRedis], tmp_path: Path
) -> None:
    gov = make_gov(redis_url=redis_server.url)
    unread, read = uuid.uuid4().hex, uuid.uuid4().hex
    options = ("apart", "-c", "1", "-Q", f"{read},low")
    worker = own_fleet.worker(*options, beat=True, queue=unread, conf=in_app(tmp_path, redis_url=redis_server.url))
    found = eventually(lambda: (found := beat(gov)) and found.status == "warn" and found, what="it is warned of")
    assert re.match(
        rf"beat is alive, and no worker has run the last \d+ heartbeats, .* queue '{unread}':", found.output
    )

    def messages() -> list[dict[str, Any]]:
        raw = own_fleet.app().connection_for_write().default_channel.client.lrange(unread, 0, -1)
        return [json.loads(message) for message in raw]

    def queued() -> Counter[str]:
        return Counter(message["headers"]["task"] for message in messages())

    eventually(lambda: queued()["govredis.heartbeat"] > 8, what="heartbeats go on")
    assert queued()["govredis.purge"] <= 4, "until beat knew that two heartbeats were not run"
    assert {message["properties"]["expiration"] for message in messages()} == {"300"}
    assert all(message["headers"]["expires"] for message in messages())
    late = own_fleet.worker(
        "late", "-c", "1", "-Q", unread, queue=unread, conf=in_app(tmp_path, redis_url=gov.config.redis_url)
    )
    eventually(lambda: re.search(r"Task govredis.purge\S+ succeeded", late.text()), what="all are published again")
    late.kill()
    worker.kill()

    conf = in_app(tmp_path, redis_url=redis_server.url, queue=read)
    own_fleet.worker(*options, beat=True, queue=unread, conf=conf)
    eventually(lambda: (found := beat(gov)) and found.status == "pass" and not found.output, what="they are run")
    eventually(lambda: own_fleet.processes["apart"].text().count("Task govredis.heartbeat") > 3, what="several are")
    # The last heartbeat may be old for a moment, where the machine has stalled.
    eventually(lambda: (found := beat(gov)) and found.status == "pass", what="they still are")


def test_a_broker_that_is_away_is_said_once_by_each(
    own_fleet: Fleet, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """It is the Redis of everything else too."""
    with RedisServer(persistent=True) as server:
        conf = in_app(tmp_path, redis_url=server.url, database_url=postgres_server.url)
        settings: dict[str, Any] = {"broker": server.url, "conf": conf, "queue": "outage"}
        worker, own_beat = own_fleet.worker("outage", "-c", "2", **settings), own_fleet.beat("beats", **settings)
        own_fleet.wait_ready("outage")
        eventually(lambda: worker.text().count("Task govredis.heartbeat") > 2, what="they are run")
        processes = {process: len(process.text()) for process in (worker, own_beat)}

        def lines(text: str) -> list[str]:
            said = [line for process, seen in processes.items() for line in process.text()[seen:].splitlines()]
            return [line for line in said if text in line]

        def run_again() -> bool:
            nonlocal at
            if not own_fleet.processes["outage"].running:
                # kombu 5.7: a broker that goes while messages are not acknowledged ends the worker.
                assert "in restore_unacked" in worker.text()
                at = len(worker.text())
                own_fleet.again("outage")
            # Received over the new connection: a worker that kombu ends has ended by then.
            received = re.findall(r"Task govredis.heartbeat\[(\S+)\] received", worker.text()[at:])
            return any(f"[{task}] succeeded" in worker.text()[at:] for task in received)

        server.kill()
        # Any: where the worker was late before, beat publishes the heartbeats alone.
        eventually(lambda: len(lines("Sending due task")) > 8, what="beat has gone on")
        assert own_beat.running
        at = len(worker.text())
        server.restart()
        eventually(lambda: lines("beat publishes our tasks again"), what="it is said that it is over")
        eventually(run_again, what="they are run again")
        assert not lines("Message Error")
        assert len(lines("beat cannot publish our tasks until the broker is back")) == 1
        away = Counter(
            (process.name, child)
            for process, seen in processes.items()
            for child in re.findall(r"(\S*)\] Redis at \S+ is away", process.text()[seen:])
        )
        assert set(away.values()) <= {1}, "one of each process"
        assert own_beat.stop() == own_fleet.processes["outage"].stop() == 0


def test_a_publisher_that_is_not_beat_gets_the_error(make_gov: Callable[..., GovRedis]) -> None:
    app = Celery("mine", broker=REDIS_AWAY, set_as_current=False)
    app.conf.update(broker_transport_options={"socket_timeout": 1, "max_retries": 0}, task_publish_retry=False)
    gov = make_gov(redis_enabled=False)
    init_celery(app, gov)
    with pytest.raises(OperationalError):
        app.tasks["govredis.purge"].delay()
    assert gov.counters.get("celery.unpublished") == 0
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection, auto_declare=False)
        for _ in range(2):
            assert app.tasks["govredis.purge"].apply_async(producer=producer) is None
    assert gov.counters.get("celery.unpublished") == 2
    app.close()
