"""The app that uWSGI serves in a test: everything was used before it forks its workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from govredis import Config, GovRedis

SESSIONS = 100
gov = GovRedis(
    Config(
        redis_url=os.environ["APP_REDIS"], lock_folder=os.environ["APP_LOCKS"], socket_timeout=10, connect_timeout=10
    )
)
for n in range(SESSIONS):
    gov.sessions.bind(f"s{n}", f"agent-{n}")
gov.limits.hit("all", "100/hour")
if os.environ["APP_LOCKED_BEFORE"]:
    gov.locks.acquire("counter").release()  # the thread that renews locks runs on in the master


def session(of: str) -> str:
    return str(gov.sessions.get_agent_id(f"s{of}"))


def connection(_: str) -> str:
    redis = gov.internal.context.redis
    assert redis is not None
    return str(redis.call("CLIENT", "ID"))


def limit(_: str) -> str:
    return str(gov.limits.hit("all", "100/hour").allowed)


def lock(_: str) -> str:
    redis = gov.internal.context.redis
    assert redis is not None
    others = gov.locks.try_acquire("counter")
    if others is not None:
        others.release()
    with gov.locks.acquire("counter", timeout=60):
        alone = redis.call("INCR", "inside") == 1
        redis.call("SET", "count", str(int(redis.call("GET", "count") or 0) + 1))
        redis.call("DECR", "inside")
    return str(alone)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    what, of = environ["PATH_INFO"].strip("/").split("/")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {globals()[what](of)}".encode()]
