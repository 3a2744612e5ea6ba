"""A process on one version of govredis: reads calls as lines of JSON, and answers each with a line of JSON.

It uses public names only, which both versions have.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import govredis
from govredis import GovRedis, HeldLock, Limit, LockTimeout, SessionBinding

gov = GovRedis.from_env()
reports = gov.cache("report")
held: dict[str, HeldLock] = {}


def where() -> str:
    return str(Path(govredis.__file__).parent.parent)


def session_start(agent: str, data: Any) -> Any:
    return gov.sessions.start(agent, data=data).session_id


def session_get(sid: str) -> Any:
    binding = gov.sessions.get(sid, touch=True)
    return binding and described(binding)


def session_add(sid: str, name: str) -> Any:
    """Another entry in the session's data, beside those that are there."""
    return gov.sessions.update(sid, lambda data: [*(data or []), name]).data


def described(binding: SessionBinding) -> Any:
    return [binding.agent_id, binding.data, binding.bind_count, binding.backend]


def acquire(name: str, timeout: float, kind: str = "lock") -> Any:
    """Token and `degraded` of a lock that is held until `release`; None where somebody else has it."""
    acquires: dict[str, Callable[..., HeldLock]] = {
        "lock": partial(gov.locks.acquire, name),
        "read": gov.locks.rwlock(name).read,
        "write": gov.locks.rwlock(name).write,
        "slot": gov.locks.semaphore(name, slots=1).acquire,
    }
    try:
        lock = acquires[kind](timeout=timeout)
    except LockTimeout:
        return None
    held[name] = lock
    return [lock.token, lock.degraded]


def release(name: str) -> Any:
    held.pop(name).release()


def hit(identity: str, rate: str) -> Any:
    result = gov.limits.hit(identity, rate, operation="rolling")
    return [result.allowed, result.remaining, result.backend]


def hit_counter(identity: str, limit: int) -> Any:
    rate = Limit(limit, 3600, algorithm="sliding_window_counter")
    result = gov.limits.hit(identity, rate, operation="rolling")
    return [result.allowed, result.remaining, result.backend]


def load(report: str, value: Any) -> Any:
    """The cached value; where the cache has nothing, `value`."""
    return reports.get_or_load(report, lambda _: value)


def until_redis_is(state: str) -> None:
    while (gov.limits.hit(state, "1000000/hour", operation="probe").backend == "redis") != (state == "back"):
        time.sleep(0.01)


CALLS: dict[str, Callable[..., Any]] = {
    "where": where,
    "migrate": lambda: len(gov.postgres.migrate() or []),
    "session_start": session_start,
    "session_get": session_get,
    "session_add": session_add,
    "session_rotate": gov.sessions.rotate,
    "session_list": gov.sessions.for_agent,
    "session_unbind": gov.sessions.unbind,
    "session_unbind_agent": gov.sessions.unbind_agent,
    "acquire": acquire,
    "release": release,
    "holder": lambda name: getattr(gov.locks.holder(name), "token", None),
    "hit": hit,
    "hit_counter": hit_counter,
    "load": load,
    "peek": reports.get,
    "invalidate": reports.invalidate,
    "invalidate_all": reports.invalidate_all,
    "agent_create": lambda agent, metadata: bool(gov.agents.create(agent, metadata)),
    "agent_update": lambda agent, fields: bool(gov.agents.update_metadata(agent, **fields)),
    "agent_get": lambda agent: gov.metadata.get_or_load(agent, gov.agents.get)["metadata"],
    "until_redis_is": until_redis_is,
    "health": lambda: gov.health.check().status,
}

for line in sys.stdin:
    name, *args = json.loads(line)
    sys.stdout.write(json.dumps(CALLS[name](*args)) + "\n")
    sys.stdout.flush()
for lock in held.values():
    lock.release()
gov.close()
