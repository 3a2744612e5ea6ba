"""RedisNode at the address of a Redis Cluster's node, which answers for some keys and sends away for the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import redis_of

from govredis import BackendError, BackendUnavailable, GovRedis
from govredis.breaker import Rejected
from govredis.client import Script
from govredis.testing.servers import RedisCluster

MOVED = (
    r"is a node of a Redis Cluster \(it answered MOVED \d+ 127.0.0.1:\d+\): REDIS_CLUSTER must be 1, or the URL must"
    r" begin with redis\+cluster:// or rediss\+cluster://$"
)
#: Some lie "here", on the node at the address, and some "there".
KEYS = [f"k{n}" for n in range(20)]


@pytest.fixture(scope="module")
def cluster(redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(masters=2, replicas=0, binary=redis_binary) as started:
        yield started


def is_there(cluster: RedisCluster, key: str) -> bool:
    """Is the key another node's than that at the address?"""
    return bool(cluster.nodes[0].command("CLUSTER", "KEYSLOT", key) >= 8192)


@pytest.fixture
def here(cluster: RedisCluster) -> str:
    return next(key for key in KEYS if not is_there(cluster, key))


@pytest.fixture
def there(cluster: RedisCluster) -> str:
    return next(key for key in KEYS if is_there(cluster, key))


@pytest.mark.parametrize("how", ["call", "script", "pipeline", "each alone"])
def test_its_first_answer_that_says_so_ends_all(
    how: str, cluster: RedisCluster, here: str, there: str, make_gov: Callable[..., GovRedis],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    client = redis_of(make_gov(redis_url=cluster.nodes[0].url))
    assert client is not None
    assert client.call("GET", here) is None, "nobody knows yet"
    ask: dict[str, Callable[[], Any]] = {
        "call": lambda: client.call("SET", there, "v"),
        "script": lambda: client.run(Script("govredis.locks", "release.lua"), (there,), "x"),
        "pipeline": lambda: client.pipeline([("GET", here), ("GET", there), ("GET", here)]),
        "each alone": lambda: client.pipeline([("GET", here), ("GET", there), ("GET", here)], each=True),
    }
    for _ in range(2):
        with pytest.raises(BackendError, match=MOVED) as caught:
            ask[how]()
        assert not isinstance(caught.value, BackendUnavailable), "a fallback would hide the mistake"
    client._exchange = lambda *_: pytest.fail("nothing is sent any more")  # type: ignore[method-assign]
    for key in KEYS:
        with pytest.raises(BackendError, match=MOVED):
            client.call("GET", key)
        with pytest.raises(BackendError, match=MOVED):
            client.pipeline([("GET", key)], each=True)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_the_features_and_health_say_so(
    cluster: RedisCluster, there: str, make_gov: Callable[..., GovRedis], caplog: pytest.LogCaptureFixture
) -> None:
    gov = make_gov(redis_url=cluster.nodes[0].url)
    with pytest.raises(BackendError, match=MOVED):
        redis_of(gov).call("GET", there)
    uses: list[Callable[[], Any]] = [
        lambda: gov.limits.hit("a", "5/minute"),
        lambda: gov.sessions.bind("s", "a"),
        lambda: gov.locks.try_acquire("a"),
        lambda: gov.metadata.get("a"),
    ]
    for use in uses:
        with pytest.raises(Rejected, match=MOVED):
            use()
    report = gov.health.check()
    redis = next(check for check in report.checks if check.name == "redis")
    assert (report.status, redis.status) == ("fail", "fail")
    assert "REDIS_CLUSTER" in redis.output
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_an_outage_meanwhile_and_a_probe_change_nothing(
    cluster: RedisCluster, there: str, make_gov: Callable[..., GovRedis], eventually: Callable[..., Any]
) -> None:
    client = redis_of(make_gov(redis_url=cluster.nodes[0].url))
    assert client is not None
    client.breaker.trip("a test")
    client.on_recovery(lambda redis: redis.call("GET", there))
    eventually(lambda: client.breaker._given_up)
    for _ in range(2):
        with pytest.raises(Rejected, match=MOVED):
            client.call("PING")
    eventually(lambda: client.breaker._thread is None)
    client.replay_soon("a test")
    with pytest.raises(Rejected, match=MOVED):
        client.call("PING")
