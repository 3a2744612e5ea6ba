"""The short form of the mixed run, and a check that its oracle finds faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from govredis.testing.servers import PostgresServer, RedisServer

from .mixed import MACHINES, run
from .mutants import MUTANTS
from .world import World

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeWorld = Callable[[bool], World]
#: `make test` has the short form; python -m tests.async_service the long one, of 20,000.
OPERATIONS = 600
#: A mutant shows within so many: most within some hundred.
MANY = 20_000


@pytest.fixture
def make_world(redis_server: RedisServer, postgres_server: PostgresServer) -> Iterator[MakeWorld]:
    """With PostgreSQL, or without."""
    made: list[World] = []

    def make(durable: bool) -> World:
        made.append(World(redis_server.url, postgres_server.url if durable else None))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.mark.parametrize("durable", [False, True], ids=["without PostgreSQL", "with PostgreSQL"])
def test_both_sides_see_what_they_may(make_world: MakeWorld, durable: bool) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    found = run(make_world(durable), OPERATIONS, seed)
    assert not found.disagreements, "\n".join([f"seed {seed}", *map(str, found.disagreements)])
    assert found.operations >= OPERATIONS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(name: str, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    world = make_world(mutant.durable)
    mutant.make(monkeypatch)
    found = run(world, MANY, 3, MACHINES[mutant.machine], shrink=False, most=1)
    assert found.disagreements, "the oracle takes it for right"
