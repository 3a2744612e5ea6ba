"""A process of the prefork pool leaves without Python's own end, and tells pending denials and admissions first."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery_fleet import NEVER, Fleet, in_app
from support import PATIENCE, eventually

from govredis import GovRedis, RateLimitExceeded
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once


@pytest.fixture
def leaving(celery_broker: RedisServer, tmp_path: Any) -> Iterator[Fleet]:
    """No worker yet."""
    server = celery_broker.url.removesuffix("/0")
    fleet = Fleet(tmp_path, {"broker": f"{server}/3", "backend": f"{server}/4", "evidence": f"{server}/2"})
    yield fleet
    fleet.close()


@pytest.mark.parametrize("ends", ["with its worker", "after its tasks"])
def test_a_child_tells_whom_it_denied_and_what_it_admitted(
    leaving: Fleet, celery_settings: dict[str, Any], make_gov: Callable[..., GovRedis], ends: str
) -> None:
    prefix = f"{uuid.uuid4().hex}:"
    name = f"leaving-{uuid.uuid4().hex}"
    options = ["-c", "1"] if ends == "with its worker" else ["-c", "1", "--max-tasks-per-child", "3"]
    conf = in_app(celery_settings, **NEVER, key_prefix=prefix, limit_mirror=3600, limit_deny_cache=False)
    worker = leaving.worker(name, *options, silent=True, conf=conf)
    leaving.wait_ready(name)
    gov = make_gov(**{**celery_settings, "key_prefix": prefix})
    results = [leaving.app().send_task("strict", ["agent"], queue=name) for _ in range(3)]
    assert results[0].get(PATIENCE) == "agent"
    for result in results[1:]:
        with pytest.raises(RateLimitExceeded):
            result.get(PATIENCE)
    if ends == "with its worker":
        assert gov.limits.most_denied() == [], "it has not told yet"
        assert worker.stop() == 0, worker.text()[-3000:]
    eventually(gov.limits.most_denied, what="it is told")
    assert [(one.identity, one.operation, one.times) for one in gov.limits.most_denied()] == [("agent", "strict", 2)]
    without_redis = make_gov(**{**celery_settings, "key_prefix": prefix, "redis_enabled": False})
    told = lambda: without_redis.limits.get_count("agent", 3600, operation="strict")  # noqa: E731
    eventually(told, what="PostgreSQL is told")
    assert told() == 1
