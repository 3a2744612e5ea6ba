"""Whatever the order in which processes get to send what they send, and whatever is lost between: no hit is older than
the last invalidation that had been completed, and after a loss of data none is more than X behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metadata_world import MARKS, Step, Violation, World

from govredis import GovRedis
from govredis.client import Script
from govredis.metadata import cells
from govredis.metadata import guard as guard_module
from govredis.metadata.guard import Guard
from govredis.metadata.shelf import Shelf
from govredis.metadata.tick import GuardRecord, Ticker
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


@pytest.fixture
def world(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:  # fmt: skip
    monkeypatch.setattr(guard_module, "_PATIENCE", 0.02)  # one that is stopped at its tick does not go on by waiting
    made = World(redis_server, postgres_server, make_gov)
    yield made
    made.close()


GOING_ON = ["step"] * 6 + ["run"] * 2
CALLS = ["read"] * 4 + ["write", "drain", "lose", "psql"]
EVENTS = ["kill", "rollback", "late_begins", "late_commits", "sleep", "evict", "evict_guard", "flush"]
LOSSES = ["snap", "fail_over", "fail_over", "sleep"]


def schedules(*whats: list[str]) -> st.SearchStrategy[list[Step]]:
    step = st.tuples(st.one_of(*(st.sampled_from(some) for some in whats)), st.integers(0, 11))
    return st.lists(step, min_size=10, max_size=50)


ONE_OF_MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


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
    without_line(patch, cells.FILL, "if redis.call('GET', KEYS[2]) ~= ARGV[3] then return 0 end")
    patch.setitem(MARKS, "to fill", cells.FILL.sha)


def no_version(patch: pytest.MonkeyPatch) -> None:
    """An invalidation keeps a value of any version."""
    without_line(patch, cells.INVALIDATE, " and tonumber(held) >= tonumber(ARGV[1])")


def no_tick(patch: pytest.MonkeyPatch) -> None:
    """A Redis that has another tick than PostgreSQL is taken for one that has lost nothing."""
    tell = Ticker._tell

    def any_tick(self: Ticker, text: str, held: GuardRecord | None, tick: int | None, entries: Any) -> Any:
        return tell(self, text, held, tick if held is None or tick is None else held.tick, entries)

    patch.setattr(Ticker, "_tell", any_tick)


def no_connects(patch: pytest.MonkeyPatch) -> None:
    """A guard is used over other connections than it was seen on."""
    look = Guard.look

    def of_any_server(self: Guard) -> Any:
        if self._seen is not None:
            self._seen.connects = self._redis.connects
        return look(self)

    patch.setattr(Guard, "look", of_any_server)
    patch.setattr(Guard, "stands", lambda *_: True)


def no_epoch(patch: pytest.MonkeyPatch) -> None:
    """A value of any epoch is used."""
    patch.setattr(Shelf, "_usable", lambda self, record, seen: record)


def late_time(patch: pytest.MonkeyPatch) -> None:
    """A guard is valid from the end of its tick, not from before it."""
    write = Ticker._set

    def now(self: Ticker, expected: str, new: GuardRecord) -> bool:
        return write(self, expected, new._replace(at=self.read()[0]) if new.at else new)

    patch.setattr(Ticker, "_set", now)


def value_first(patch: pytest.MonkeyPatch) -> None:
    """A value is judged by a guard that was asked for after it was read."""

    def raws(self: Any, keys: list[str]) -> Any:
        found = [self._redis.call("GET", key) for key in keys]
        self._guard._seen = None
        return found, self.look(), 0

    patch.setattr(Shelf, "_raws", raws)


def call(what: str, number: int = 0) -> list[Step]:
    return [(what, number), ("run", 0)]


HALF_OF_X, X_WHOLE, ONE_SECOND = ("sleep", 2), ("sleep", 3), ("sleep", 1)
READ, DRAIN = call("read"), call("drain")
NEEDED: dict[Callable[[pytest.MonkeyPatch], None], list[Step]] = {
    no_lease: [
        *READ, ("evict_value", 0), ("read", 0), ("to fill", 0), ("write", 0), ("run", 1), ("evict_stone", 0),
        ("run", 0), *READ,
    ],
    no_version: [*READ, ("psql", 0), *DRAIN, *READ],
    no_tick: [
        *READ, ("snap", 0), ("psql", 0), *DRAIN, ("fail_over", 0),
        *DRAIN, HALF_OF_X, *DRAIN, HALF_OF_X, *DRAIN, *READ,
    ],
    no_connects: [
        *READ, ("snap", 0), X_WHOLE, ("psql", 0), ONE_SECOND, *DRAIN, *READ, ("fail_over", 0),
        HALF_OF_X, ONE_SECOND, ONE_SECOND, *READ,
    ],
    no_epoch: [*READ, ("evict_guard", 0), ("psql", 0), X_WHOLE, *READ],
    late_time: [
        *READ, ("drain", 0), ("to confirm", 0), ("psql", 0), ONE_SECOND, ("run", 0),
        HALF_OF_X, ONE_SECOND, ONE_SECOND, *READ,
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
