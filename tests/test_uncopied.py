"""An object that holds something of this process cannot be copied: the copy would end it, or use it in a child."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis

HOW: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps}
HANDLES: dict[str, Callable[[GovRedis], Any]] = {
    "gov": lambda gov: gov,
    "sessions": lambda gov: gov.sessions,
    "locks": lambda gov: gov.locks,
    "rwlock": lambda gov: gov.locks.rwlock("x"),
    "semaphore": lambda gov: gov.locks.semaphore("x", slots=2),
    "limits": lambda gov: gov.limits,
    "metadata": lambda gov: gov.metadata,
    "agents": lambda gov: gov.agents,
    "health": lambda gov: gov.health,
    "postgres": lambda gov: gov.postgres,
    "counters": lambda gov: gov.counters,
    "client": lambda gov: gov.locks._redis,
}
HOLDS: dict[str, Callable[[GovRedis], Any]] = {
    "lock": lambda gov: gov.locks.acquire("x", ttl=1000),
    "read": lambda gov: gov.locks.rwlock("x").read(ttl=1000),
    "write": lambda gov: gov.locks.rwlock("x").write(ttl=1000),
    "semaphore": lambda gov: gov.locks.semaphore("x", slots=1).acquire(ttl=1000),
    "many": lambda gov: gov.locks.acquire_many(["x", "y"], ttl=1000),
}


def refuses(how: str, what: Any) -> None:
    with pytest.raises(TypeError, match=f"a {type(what).__name__} cannot be copied or pickled"):
        HOW[how](what)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("handle", HANDLES)
def test_no_handle_is_copied(gov: GovRedis, handle: str, how: str) -> None:
    refuses(how, HANDLES[handle](gov))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", HOLDS)
def test_a_held_lock_is_not_copied_and_goes_on_being_held(gov: GovRedis, kind: str, how: str) -> None:
    with HOLDS[kind](gov) as held:
        refuses(how, held)
        gc.collect()
        for each in held.values() if kind == "many" else [held]:
            assert not each._lease._abandoned
            each.extend(100)
    assert held.remaining() == 0


@pytest.mark.parametrize("how", HOW)
def test_a_transaction_is_not_copied(gov: GovRedis, how: str) -> None:
    with gov.postgres.transaction(timeout=30) as tx:
        refuses(how, tx)


@pytest.mark.parametrize("how", HOW)
def test_an_invalidation_that_waits_for_its_commit_is_not_copied(gov: GovRedis, how: str, postgres_server: Any) -> None:
    import psycopg2

    connection = psycopg2.connect(postgres_server.url)
    try:
        with gov.metadata.after_commit(connection) as commit:
            refuses(how, commit)
        connection.commit()
    finally:
        connection.close()
