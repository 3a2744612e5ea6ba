"""MetadataCache while Redis is away, and the invalidations that are pending meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import PATIENCE, PATIENT, REDIS_AWAY, eventually, in_child, redis_of

from govredis import BackendUnavailable, GovRedis
from govredis.testing.servers import RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


def back(gov: GovRedis) -> None:
    eventually(lambda: redis_of(gov).breaker.closed)


@pytest.fixture(params=["away", "disabled"])
def without_redis(request: pytest.FixtureRequest, make_gov: Callable[..., GovRedis]) -> GovRedis:
    return make_gov(redis_url=REDIS_AWAY, redis_enabled=request.param == "away")


def test_reads_go_to_the_loader(without_redis: GovRedis) -> None:
    cache = without_redis.metadata
    assert cache.get("a") is None
    assert cache.set("a", 1) is False
    for n in range(3):
        assert cache.get_or_load("a", lambda _, n=n: (n,)) == [n]
        assert cache.get_many(["a", "b"], lambda ids, n=n: {"a": (n,)}) == {"a": [n]}
    assert cache.get_many(["a"]) == {}
    with pytest.raises(ValueError, match="value"):
        cache.get_or_load("a", lambda _: {1, 2})


def test_invalidate_raises_unless_disabled(without_redis: GovRedis) -> None:
    if without_redis.internal.context.redis is None:
        without_redis.metadata.invalidate("a")
        return
    for _ in range(3):
        with pytest.raises(BackendUnavailable):
            without_redis.metadata.invalidate("a")
    assert not without_redis.metadata._pending.tokens, "the caller was told"


def pair(make: Callable[[], GovRedis]) -> tuple[GovRedis, GovRedis]:
    first, second = make(), make()
    first.metadata.set("a", "old")
    first.metadata.set("b", "kept")
    return first, second


@pytest.fixture
def two(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> tuple[GovRedis, GovRedis]:
    """The process that is cut off, and another."""
    return pair(lambda: make_gov(redis_url=mortal_redis.url, **PATIENT))


@pytest.fixture
def two_impatient(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> tuple[GovRedis, GovRedis]:
    """The same, for a Redis that hangs: a timeout of a second is waited for."""
    return pair(lambda: make_gov(redis_url=mortal_redis.url))


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_pending_invalidation_is_carried_out_before_this_process_reads_again(
    make_gov: Callable[..., GovRedis], redis_binary: str, how: str
) -> None:
    with RedisServer(binary=redis_binary, persistent=True) as server:
        gov = make_gov(redis_url=server.url, socket_timeout=1)
        gov.metadata.set("a", "old")
        gov.metadata.set("b", "kept")
        if how == "killed":
            server.kill()
        else:
            server.pause()
        gov.metadata.invalidate_committed("a")
        assert gov.metadata.stats()["invalidations_owed"] == 1
        assert gov.metadata.get_or_load("a", lambda _: "new") == "new"
        if how == "killed":
            server.restart("keep")
        else:
            server.resume()
        deadline = time.monotonic() + PATIENCE
        while gov.metadata.get("b") is None:
            assert gov.metadata.get("a") is None
            assert time.monotonic() < deadline
        assert gov.metadata.get("a") is None
        assert not gov.metadata._pending.tokens


def test_a_refused_invalidation_that_leaves_the_breaker_closed_is_pending_too(
    two: tuple[GovRedis, GovRedis], mortal_redis: RedisServer
) -> None:
    """READONLY, as after a failover: PING succeeds, the invalidation does not."""
    gov, other = two
    mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BackendUnavailable):
        gov.metadata.invalidate("a")
    assert redis_of(gov).breaker.closed
    gov.metadata.invalidate_committed("a")
    assert not redis_of(gov).breaker.closed
    deadline = time.monotonic() + 0.6  # some probes, which all get a PONG and then READONLY
    while time.monotonic() < deadline:
        assert gov.metadata.get("a") is None
        assert gov.metadata.get_or_load("a", lambda _: "new") == "new"
    assert other.metadata.get("a") == "old", "another process may serve it meanwhile: documented"
    mortal_redis.command("REPLICAOF", "NO", "ONE")
    back(gov)
    for g in two:
        assert g.metadata.get("a") is None
    assert other.metadata.get("b") == "kept"
    assert gov.metadata.get_or_load("a", lambda _: "new") == "new"


def test_invalidations_of_every_cache_are_pending(two: tuple[GovRedis, GovRedis], mortal_redis: RedisServer) -> None:
    gov, other = two
    gov.cache("report").set("r", "old")
    mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
    gov.metadata.invalidate_committed("a", version=3)
    gov.cache("report").invalidate_committed("r")
    mortal_redis.command("REPLICAOF", "NO", "ONE")
    back(gov)
    assert (other.metadata.get("a"), other.cache("report").get("r")) == (None, None)


def test_a_child_does_not_share_its_parents_pending_invalidations(
    two: tuple[GovRedis, GovRedis], mortal_redis: RedisServer
) -> None:
    gov, _ = two
    mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
    gov.metadata.invalidate_committed("a")
    assert in_child(lambda: gov.metadata.stats().get("invalidations_owed", 0)) == 0
    assert set(gov.metadata._pending.tokens) == {"a"}


def test_an_invalidation_noted_anew_while_it_is_told_is_pending_still(
    two_impatient: tuple[GovRedis, GovRedis], mortal_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_impatient
    mortal_redis.pause()
    first.metadata.invalidate_committed("a")
    pipeline = redis_of(first).pipeline
    again = threading.Thread(target=first.metadata.invalidate_committed, args=("a",))

    def then_note_again(*args: Any, **options: Any) -> Any:
        replies = pipeline(*args, **options)
        if again.ident is None:
            second.metadata.get_or_load("a", lambda _: "filled, and old by now")
            again.start()
            eventually(lambda: redis_of(first).breaker._again)
        return replies

    monkeypatch.setattr(redis_of(first), "pipeline", then_note_again)
    mortal_redis.resume()
    back(first)
    again.join()
    assert second.metadata.get("a") is None
    assert not first.metadata._pending.tokens


def test_many_pending_invalidations_are_told_in_pieces(
    two_impatient: tuple[GovRedis, GovRedis], mortal_redis: RedisServer
) -> None:
    first, _ = two_impatient
    mortal_redis.pause()
    for n in range(60_000):  # more than one send takes within its timeout
        first.metadata._pending.tokens[f"agent-{n}-{'x' * 100}"] = object()
    first.metadata.invalidate_committed("a")
    mortal_redis.resume()
    eventually(lambda: not first.metadata._pending.tokens)
    back(first)


def test_an_exception_within_the_invalidation_leaves_it_pending(
    two: tuple[GovRedis, GovRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two

    def struck(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(redis_of(first), "run", struck)
    with pytest.raises(KeyboardInterrupt):
        first.metadata.invalidate_committed("a")
    back(first)
    assert not first.metadata._pending.tokens
    assert second.metadata.get("a") is None
