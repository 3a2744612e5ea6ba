"""A real hot standby in the place of PostgreSQL: it is read, writes wait, and it does not open the tables of limits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import eventually

from govredis import BackendError, BackendUnavailable, GovRedis, Limit
from govredis.testing.servers import PostgresServer

pytestmark = [pytest.mark.one_redis, pytest.mark.once]


@pytest.fixture
def standby(mortal_postgres: PostgresServer, make_gov: Callable[..., GovRedis]) -> Iterator[PostgresServer]:
    """It has a session of before."""
    gov = make_gov(redis_enabled=False, database_url=mortal_postgres.url)
    gov.sessions.bind("early", "a")
    gov.close()
    mortal_postgres.kill()
    signal = mortal_postgres.folder / "data" / "standby.signal"
    signal.touch()
    shutil.chown(signal, signal.parent.owner(), signal.parent.group())
    mortal_postgres.restart()
    yield mortal_postgres


@pytest.fixture
def gov(standby: PostgresServer, make_gov: Callable[..., GovRedis]) -> GovRedis:
    return make_gov(redis_enabled=False, database_url=standby.url)


@pytest.mark.parametrize("algorithm", ["sliding_window_log", "sliding_window_counter"])
def test_limits_go_on_by_the_fallback(gov: GovRedis, algorithm: Any) -> None:
    limit = Limit(1, 60, algorithm=algorithm)
    results = [
        gov.limits.peek("a", limit),
        *gov.limits.hit_many([("a", limit), ("b", limit)]),
        gov.limits.hit("a", limit),
    ]
    assert [bool(result) for result in results] == [True, True, True, False]
    assert {(result.backend, result.degraded) for result in results} == {("local", True)}


def test_a_reset_says_that_it_is_not_done(gov: GovRedis) -> None:
    gov.limits.hit("a", "1/minute")
    with pytest.raises(BackendUnavailable, match="recovery"):
        gov.limits.reset("a")
    assert gov.limits.hit("a", "1/minute")  # the fallback's window began anew all the same


def test_sessions_are_read_and_their_changes_told_when_it_is_promoted(gov: GovRedis, standby: PostgresServer) -> None:
    found = gov.sessions.get("early")
    assert found is not None
    assert (found.agent_id, found.backend) == ("a", "postgres")
    gov.sessions.bind("late", "b")
    assert gov.health.check().status == "warn"
    gov.postgres.fetch("SELECT pg_promote()")
    eventually(lambda: (late := gov.sessions.get("late")) and late.backend == "postgres", what="the change is told")
    eventually(lambda: gov.limits.hit("a", "1000/minute").backend == "postgres", what="limits are in use")


def test_a_read_in_the_way_of_the_replication_is_no_answer(gov: GovRedis) -> None:
    postgres = gov.postgres
    with pytest.raises(BackendUnavailable, match="conflict"):
        postgres.fetch("DO $$ BEGIN RAISE serialization_failure USING MESSAGE = 'conflict with recovery'; END $$")
    assert postgres.breaker.closed


def test_on_a_primary_these_are_answers(make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
    postgres = make_gov(redis_enabled=False, database_url=postgres_server.url).postgres
    for name in "serialization_failure", "feature_not_supported":
        with pytest.raises(BackendError) as caught:
            postgres.fetch(f"DO $$ BEGIN RAISE {name}; END $$")
        assert not isinstance(caught.value, BackendUnavailable)
