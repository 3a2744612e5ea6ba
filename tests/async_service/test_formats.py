"""The async service's client itself: it leaves in Redis the formats that it documents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from async_service.blocking import Agent, BlockingService

pytestmark = pytest.mark.one_redis


def test_sessions(async_service: BlockingService, plain_redis: Any) -> None:
    sessions = async_service.sessions
    async_service.skew = -3600
    assert sessions.bind("s", "a", label="x")["bind_count"] == 1
    assert sessions.bind("s", "a", label="y")["bind_count"] == 2
    found = json.loads(plain_redis.get("session:s"))
    assert set(found) == {"agent_id", "bound_at", "bind_count", "label"}
    assert found == sessions.get("s")
    assert 86_390 < plain_redis.ttl("session:s") <= 86_400
    assert sessions.extend("s", 90_000)
    assert plain_redis.ttl("session:s") > 86_400
    assert "bind_count" not in sessions.bind("t", "a", ttl=None, counted=False)
    assert plain_redis.ttl("session:t") == -1
    assert [sessions.delete("s"), sessions.delete("s"), sessions.extend("s"), sessions.get("s")] == [1, 0, 0, None]


def test_locks(async_service: BlockingService, plain_redis: Any) -> None:
    locks = async_service.locks
    assert [locks.acquire("x", "me"), locks.acquire("x", "you"), locks.holder("x")] == [True, False, "me"]
    assert plain_redis.pttl("lock:x") > 29_000
    assert [locks.release("x", "you"), locks.release("x", "me"), locks.release("x", "me")] == [False, True, False]
    assert locks.acquire("x", "you")
    assert [locks.force_release("x"), locks.force_release("x")] == [True, False]


def test_limits(async_service: BlockingService, plain_redis: Any) -> None:
    limits = async_service.limits
    async_service.skew = -100
    limits.record("op", "i", 3600)
    async_service.skew = 0
    limits.record("op", "i", 3600)
    assert 3650 < plain_redis.ttl("rate_limit:op:i") <= 3660
    assert limits.count("op", "i", 3600) == 2
    assert [limits.check("op", "i", 2, 3600), limits.check("op", "i", 3, 3600)] == [False, True]
    assert limits.check("op", "i", 2, 60), "which prunes the other"
    assert plain_redis.zcard("rate_limit:op:i") == 1


def test_metadata(async_service: BlockingService, plain_redis: Any) -> None:
    metadata, agent = async_service.metadata, Agent("a", {"n": 1}, version=3)
    metadata.set(agent)
    assert metadata.get("a") == agent
    assert json.loads(plain_redis.get("agent_meta:a")) == {
        "agent_id": "a", "metadata": {"n": 1}, "status": "active", "version": 3
    }  # fmt: skip
    assert 290 < plain_redis.ttl("agent_meta:a") <= 300
    plain_redis.set("agent_meta:a", '{"agent_id": "a", "epoch": 1}')
    with pytest.raises(TypeError, match="epoch"):
        metadata.get("a")
    assert [metadata.invalidate("a"), metadata.invalidate("a"), metadata.get("a")] == [True, False, None]
