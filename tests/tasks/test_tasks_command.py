"""`python -m tasks`: what is wrong with the environment is said in words; where nothing is, it becomes a worker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import PATIENCE, eventually
from tasks_worker import ROOT, Servers, Worker, environment

from govredis import Config, GovRedis

DEAD = "redis://someone:secret@127.0.0.1:1/0"
NO_POSTGRES = "postgresql://someone:secret@127.0.0.1:1/nothing"


@pytest.fixture(scope="module")
def bare() -> Iterator[Servers]:
    """Servers on which `govredis migrate` has not been run."""
    servers = Servers()
    try:
        for server in (servers.cache, servers.broker, servers.postgres):
            server.start()
        yield servers
    finally:
        servers.close()


def refused(**variables: str) -> list[str]:
    """The lines that the command says where it does not start. Always: one line for each problem, and no password."""
    ended = subprocess.run(
        [sys.executable, "-m", "tasks"],
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert all(line.startswith("tasks: ") for line in lines), ended.stderr
    assert "secret" not in ended.stderr
    return [line.removeprefix("tasks: ") for line in lines]


def test_a_fault_is_said_in_words(servers: Servers, bare: Servers) -> None:
    good = servers.environment
    cases: dict[str, tuple[dict[str, str], list[list[str]]]] = {
        "malformed": (
            {
                "REDIS_URL": "nonsense://someone:secret@x",
                "GOVREDIS_DATABASE_URL": "nonsense://someone:secret@x",
                "CELERY_BROKER_URL": "nonsense://someone:secret@x",
            },
            [
                ["REDIS_URL", "nonsense://someone:***@x", "must be redis://"],
                ["GOVREDIS_DATABASE_URL", "nonsense://someone:***@x", "must be postgresql://"],
                ["CELERY_BROKER_URL", "nonsense://someone:***@x", "No such transport"],
            ],
        ),
        "refused": (
            {"REDIS_URL": DEAD, "GOVREDIS_DATABASE_URL": NO_POSTGRES, "CELERY_BROKER_URL": DEAD},
            [
                ["REDIS_URL", "127.0.0.1:1 is away", "Connection refused"],
                ["GOVREDIS_DATABASE_URL", "127.0.0.1:1/nothing is away", "Connection refused"],
                ["CELERY_BROKER_URL", "redis://someone:***@127.0.0.1:1/0", "Connection refused"],
            ],
        ),
        "the broker is REDIS_URL": (
            {**good, "REDIS_URL": DEAD, "CELERY_BROKER_URL": ""},
            [["REDIS_URL"], ["CELERY_BROKER_URL (as REDIS_URL)", "Connection refused"]],
        ),
        "a password that is not escaped": (
            {**good, "CELERY_BROKER_URL": "redis://someone:secret/x@127.0.0.1:1/0"},
            [["CELERY_BROKER_URL", "it is no URL", "%2F"]],
        ),
        "no database": ({**good, "GOVREDIS_DATABASE_URL": ""}, [["GOVREDIS_DATABASE_URL is not set"]]),
        "no tables": (bare.environment, [["GOVREDIS_DATABASE_URL", "govredis migrate"]]),
        "another setting, said once": ({**good, "REDIS_LOCK_TIMEOUT": "soon"}, [["REDIS_LOCK_TIMEOUT", "soon"]]),
        "RabbitMQ": (
            {**good, "CELERY_BROKER_URL": "amqp://someone:secret@127.0.0.1:1//"},
            [["CELERY_BROKER_URL", "amqp://someone:***@127.0.0.1:1//", "Connection refused"]],
        ),
        "Redis off, and no matter what its URL is": (
            {**good, "REDIS_ENABLED": "0", "REDIS_URL": DEAD, "GOVREDIS_DATABASE_URL": NO_POSTGRES},
            [["GOVREDIS_DATABASE_URL", "is away"]],
        ),
    }
    with ThreadPoolExecutor(4) as threads:
        said = {name: threads.submit(refused, **variables) for name, (variables, _) in cases.items()}
    for name, (_, wanted) in cases.items():
        lines = said[name].result()
        assert len(lines) == len(wanted), (name, lines)
        for line, words in zip(lines, wanted, strict=True):
            assert all(word in line for word in words), (name, line, words)
            assert line.startswith(words[0])


def test_servers_that_hang(bare: Servers) -> None:
    for server in (bare.cache, bare.postgres, bare.broker):
        server.pause()
    try:
        redis, postgres, broker = refused(**bare.environment)
    finally:
        for server in (bare.cache, bare.postgres, bare.broker):
            server.resume()
    assert redis.startswith("REDIS_URL: ")
    assert postgres.startswith("GOVREDIS_DATABASE_URL: ")
    assert broker.startswith("CELERY_BROKER_URL: ")


def test_it_becomes_a_worker_that_sigterm_ends_when_its_tasks_have_ended(
    bare: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with GovRedis(Config(redis_enabled=False, database_url=bare.postgres.url)) as gov:
        gov.postgres.migrate()
    worker = Worker(bare, tmp_path_factory.mktemp("other"))
    try:
        running = worker.send("slow", 1.5)
        queued = [worker.send("slow", 0, countdown=60) for _ in range(3)]
        worker.wait_began(running)
        eventually(lambda: bare.broker.command("HLEN", "unacked") == 4, what="they wait in the worker")
        assert worker.terminate() == 0
        assert worker.noted("ended")[running] == 1
        # Each task that had not begun is in the queue again, for any other worker.
        assert bare.broker.command("HLEN", "unacked") == 0
        assert {m["headers"]["id"] for m in worker.messages()} >= {*queued}
    finally:
        worker.close()
