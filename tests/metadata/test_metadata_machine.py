"""Whatever the order in which processes get to send what they send, and whatever is lost between: no hit is older than
the last invalidation that had been completed, and after a loss of data none is more than X behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_world import MARKS, Step, Violation, World

from govredis import GovRedis
from govredis.client import Script
from govredis.metadata import entry_keys
from govredis.metadata.backends.questions import Answer, ValueQuestions
from govredis.metadata.backends.redis_backend import RedisMetadataBackend
from govredis.outbox import node_lease
from govredis.outbox.node_lease import NodeLease
from govredis.outbox.relay import Found, FreshnessRecord, OutboxRelay
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


@pytest.fixture
def world(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:  # fmt: skip
    monkeypatch.setattr(node_lease, "_PATIENCE", 0.02)  # a process that is stopped in a run does not go on by waiting
    made = World(redis_server, postgres_server, make_gov)
    yield made
    made.close()


GOING_ON = ["step"] * 6 + ["run"] * 2
CALLS = ["read"] * 4 + ["write", "drain", "lose", "psql"]
EVENTS = ["kill", "rollback", "late_begins", "late_commits", "sleep", "evict", "evict_freshness", "flush"]
LOSSES = ["snap", "fail_over", "fail_over", "sleep"]


def schedules(*whats: list[str]) -> st.SearchStrategy[list[Step]]:
    step = st.tuples(st.one_of(*(st.sampled_from(some) for some in whats)), st.integers(0, 11))
    return st.lists(step, min_size=10, max_size=50)


ONE_OF_MANY = settings(max_examples=40)


@ONE_OF_MANY
@given(steps=schedules(GOING_ON, GOING_ON, CALLS, EVENTS))
def test_no_hit_is_older_than_the_last_completed_invalidation(world: World, steps: list[Step]) -> None:
    world.run(steps)


@ONE_OF_MANY
@given(steps=schedules(GOING_ON, GOING_ON, CALLS, CALLS, EVENTS, LOSSES, LOSSES))
def test_after_a_loss_no_hit_is_more_than_x_behind(world: World, steps: list[Step]) -> None:
    world.run(steps)


# -- each rule is needed: without it, an order of events that is harmless with it is not -----------------------------


def without_line(patch: pytest.MonkeyPatch, script: Script, line: str) -> None:
    assert line in script.source
    source = script.source.replace(line, "")
    patch.setattr(script, "source", source)
    patch.setattr(script, "sha", hashlib.sha1(source.encode()).hexdigest())


def no_lease(patch: pytest.MonkeyPatch) -> None:
    """A fill does not ask whether its lease still stands."""
    without_line(patch, entry_keys.FILL, "if redis.pcall('GET', KEYS[3]) ~= ARGV[5] then return 0 end")
    patch.setitem(MARKS, "to fill", entry_keys.FILL.sha)


def no_version(patch: pytest.MonkeyPatch) -> None:
    """An invalidation keeps a value of any version."""
    without_line(patch, entry_keys.INVALIDATE, " and tonumber(held) >= tonumber(ARGV[1])")


def no_run(patch: pytest.MonkeyPatch) -> None:
    """A Redis that has another run number than PostgreSQL is taken for one that has lost nothing."""
    tell = OutboxRelay._tell

    def any_run(self: OutboxRelay, found: Found, last_run: int | None, entries: Any) -> Any:
        return tell(self, found, last_run if found.held is None or last_run is None else found.held.run, entries)

    patch.setattr(OutboxRelay, "_tell", any_run)


def no_connects(patch: pytest.MonkeyPatch) -> None:
    """A snapshot is used over other connections than it was read on."""
    look = NodeLease.look

    def of_any_server(self: NodeLease) -> Any:
        if self._snapshot is not None:
            self._snapshot.connects = self._node.connects
        return look(self)

    patch.setattr(NodeLease, "look", of_any_server)
    patch.setattr(NodeLease, "stands", lambda *_: True)


def no_epoch(patch: pytest.MonkeyPatch) -> None:
    """A value of any epoch is used."""
    patch.setattr(RedisMetadataBackend, "_usable", lambda self, entry, terms: entry)


def late_time(patch: pytest.MonkeyPatch) -> None:
    """A freshness lease is valid from the end of its run, not from before it."""
    write = OutboxRelay._set

    def now(self: OutboxRelay, expected: str, new: FreshnessRecord) -> bool:
        return write(self, expected, new._replace(at=self.read()[0]) if new.at else new)

    patch.setattr(OutboxRelay, "_set", now)


def value_first(patch: pytest.MonkeyPatch) -> None:
    """A value is judged by a freshness lease that was asked for after it was read."""

    def ask(self: Any, keys: Any, question: Any) -> Any:
        found = [self._redis.call(*question(key)) for key in keys]
        self._freshness.of(self._redis)._snapshot = None
        return [Answer(reply, self.terms(key), 0) for key, reply in zip(keys, found, strict=True)]

    patch.setattr(ValueQuestions, "ask", ask)


def call(what: str, number: int = 0) -> list[Step]:
    return [(what, number), ("run", 0)]


HALF_OF_X, X_WHOLE, FIFTH_OF_X = ("sleep", 2), ("sleep", 3), ("sleep", 1)
READ, DRAIN = call("read"), call("drain")
NEEDED: dict[Callable[[pytest.MonkeyPatch], None], list[Step]] = {
    no_lease: [
        *READ, ("evict_value", 0), ("read", 0), ("to fill", 0), ("write", 0), ("run", 1), ("evict_stone", 0),
        ("run", 0), *READ,
    ],
    no_version: [*READ, ("psql", 0), *DRAIN, *READ],
    no_run: [
        *READ, ("snap", 0), ("psql", 0), *DRAIN, ("fail_over", 0),
        *DRAIN, HALF_OF_X, *DRAIN, HALF_OF_X, *DRAIN, *READ,
    ],
    no_connects: [
        *READ, ("snap", 0), X_WHOLE, ("psql", 0), FIFTH_OF_X, *DRAIN, *READ, ("fail_over", 0),
        HALF_OF_X, FIFTH_OF_X, FIFTH_OF_X, *READ,
    ],
    no_epoch: [*READ, ("evict_freshness", 0), ("psql", 0), X_WHOLE, *READ],
    late_time: [
        *READ, ("drain", 0), ("to confirm", 0), ("psql", 0), FIFTH_OF_X, ("run", 0),
        HALF_OF_X, FIFTH_OF_X, FIFTH_OF_X, *READ,
    ],
    value_first: [*READ, ("psql", 0), X_WHOLE, *READ],
}  # fmt: skip


@pytest.mark.parametrize("without", NEEDED, ids=lambda without: str(without.__name__))
def test_each_rule_is_needed(world: World, monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    world.run(NEEDED[without])
    with monkeypatch.context() as patch:
        without(patch)
        with pytest.raises(Violation):
            world.run(NEEDED[without])
