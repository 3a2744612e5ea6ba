"""The promises that only several processes can break: gunicorn with four workers, on real servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support import PATIENCE

from govredis.testing.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from conftest import Answer, Gunicorn

N = 30
KINDS = [(), ("--preload",), ("--preload", "--worker-class=gthread", "--threads=4")]
each_kind = pytest.mark.parametrize("options", KINDS, ids=["sync", "preload", "threads"])


def all_workers(answers: list[Answer]) -> bool:
    return len({answer.worker for answer in answers}) == 4


def all_say(status: str) -> Callable[[list[Answer]], bool]:
    return lambda answers: all_workers([a for a in answers if json.loads(a.body)["status"] == status])


def assert_limit_holds(gunicorn: Gunicorn, agent: str) -> list[Answer]:
    answers = gunicorn.ask(f"/visit/{N}", lambda so_far: len(so_far) >= 3 * N and all_workers(so_far), agent=agent)
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) == N
    assert statuses.count(429) == len(statuses) - N
    return answers


@each_kind
def test_one_limit_holds_across_all_workers(
    serve: Callable[..., Gunicorn], one_redis: RedisServer, options: tuple[str, ...]
) -> None:
    one_redis.command("FLUSHALL")
    # With timeouts that a busy machine keeps, and nothing to fall back on that the workers would share.
    gunicorn = serve(*options, redis_url=one_redis.url, socket_timeout=10, connect_timeout=10, limit_fallback="deny")
    gunicorn.ask("/govredis/live", all_workers)
    assert_limit_holds(gunicorn, "agent-1")  # all workers have answered: on their own, each would admit as many


@each_kind
def test_redis_killed_under_load_no_request_fails_or_waits_for_a_timeout(
    serve: Callable[..., Gunicorn], one_redis: RedisServer, postgres_server: PostgresServer, options: tuple[str, ...]
) -> None:
    one_redis.command("FLUSHALL")
    # No stall is taken for an outage; and a request that waited for one of these would not be answered: see `get`.
    timeouts = dict.fromkeys(("socket_timeout", "connect_timeout", "postgres_timeout"), 10 * PATIENCE)
    urls = {"redis_url": one_redis.url, "database_url": postgres_server.url}
    gunicorn = serve(*options, **urls, health_details="true", **timeouts)
    gunicorn.ask("/govredis/ready", all_say("pass"))
    enough = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        load = beside.submit(gunicorn.ask, f"/visit/{N}", lambda _: enough.is_set(), agent="load", pause=0.02)
        try:
            answers = assert_limit_holds(gunicorn, "before")
            one_redis.kill()
            try:
                answers += assert_limit_holds(gunicorn, "meanwhile")  # in PostgreSQL
                warned = gunicorn.ask("/govredis/health", all_say("warn"))
            finally:
                one_redis.restart(data="empty")
            back = gunicorn.ask("/govredis/ready", all_say("pass"))
            answers += assert_limit_holds(gunicorn, "after")
        finally:
            enough.set()
        during = load.result()
    for answer in warned:
        report = json.loads(answer.body)
        if report["status"] == "warn":
            (redis,) = report["checks"]["redis"]
            assert redis["status"] == "warn"
            assert "fallbacks are in use" in redis["output"]
    assert {answer.status for answer in during} == {200, 429}
    assert {answer.status for answer in warned + back} == {200}


def test_the_metrics_of_any_worker_are_of_all(serve: Callable[..., Gunicorn], one_redis: RedisServer) -> None:
    one_redis.command("FLUSHALL")
    gunicorn = serve("--preload", redis_url=one_redis.url, socket_timeout=10, connect_timeout=10, health_details="true")
    served = gunicorn.ask(f"/visit/{10**6}", all_workers)
    hits = f"govredis_limits_allowed_total {float(len(served) + 1)}\n"  # one before the fork, by the parent

    def all_know(answers: list[Answer]) -> bool:
        assert all(answer.status == 200 for answer in answers)
        return all_workers([answer for answer in answers if hits in answer.body.decode()])

    gunicorn.ask("/govredis/metrics", all_know, pause=0.05)
