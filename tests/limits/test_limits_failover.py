"""Redis killed and restored under load: at most N per backend in any window, by the servers' records."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import psycopg2
import pytest
from cutting_proxy import CuttingProxy
from limit_load import (
    UNPRUNED,
    Call,
    Load,
    all_calls,
    in_dead_redis,
    in_postgres,
    in_redis,
    never_more,
    unjustified,
    until_grown,
    until_there,
)
from stalls import undisturbed
from support import REDIS_AWAY, redis_of

from govredis import GovRedis, Limit
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

N = 40
RATE = [Limit(N, 0.25), UNPRUNED]
PROCESSES = 4


@pytest.fixture
def one_redis(one_redis_binary: str) -> Iterator[RedisServer]:
    with RedisServer(binary=one_redis_binary, persistent=True) as server:
        yield server


def test_redis_killed_and_restored_with_its_data_and_without(
    redis_binary: str, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    def redis_grows() -> None:
        until_grown(lambda: in_redis(redis), 2 * N)

    def postgres_grows() -> None:
        until_grown(lambda: in_postgres(postgres_server), 2 * N)

    with RedisServer(binary=redis_binary, persistent=True) as redis:
        settings = [{"redis_url": redis.url, "database_url": postgres_server.url}] * PROCESSES
        with Load(settings, RATE, pause=0.002) as load:
            redis_grows()
            redis.kill()
            postgres_grows()
            redis.restart("keep")
            redis_grows()
            redis.kill()
            postgres_grows()
            lost = in_dead_redis(redis, redis_binary, tmp_path)
            redis.restart("empty")
            redis_grows()
            reports = load.stop()
        held = {"lost": lost, "redis": in_redis(redis), "postgres": in_postgres(postgres_server)}
    calls = all_calls(reports)
    for entries in held.values():
        never_more(entries, RATE)
    # Hits that were in flight when Redis was killed may be in both.
    admitted = {backend: sum(c.allowed for c in calls if c.backend == backend) for backend in ("redis", "postgres")}
    assert sum(admitted.values()) == sum(call.allowed for call in calls), "nobody else decided"
    assert admitted["postgres"] == len(held["postgres"])
    assert 0 <= len(held["lost"]) + len(held["redis"]) - admitted["redis"] <= 2 * PROCESSES
    # No refusal within N: Redis refused in its first life or in its second.
    refused: dict[str, list[Call]] = {
        backend: [c for c in calls if not c.allowed and c.backend == backend] for backend in admitted
    }
    assert refused["redis"]
    assert refused["postgres"]
    assert not list(unjustified(held["postgres"], refused["postgres"], RATE))
    of_neither = list(unjustified(held["lost"], refused["redis"], RATE))
    assert not list(unjustified(held["redis"], of_neither, RATE))
    # Each process went over once at each kill, at most, and back once: nothing flaps.
    assert all(1 <= report.opened <= 2 for report in reports)


def test_redis_away_for_some_and_there_for_others(one_redis: RedisServer, postgres_server: PostgresServer) -> None:
    urls = [one_redis.url, REDIS_AWAY] * 2
    with Load([{"redis_url": url, "database_url": postgres_server.url} for url in urls], RATE, pause=0.002) as load:
        until_grown(lambda: in_redis(one_redis), 3 * N)
        until_grown(lambda: in_postgres(postgres_server), 3 * N)
        reports = load.stop()
    for number, (backend, entries) in enumerate(
        [("redis", in_redis(one_redis)), ("postgres", in_postgres(postgres_server))]
    ):
        calls = all_calls(reports[number::2])
        assert {call.backend for call in calls} == {backend}
        assert sum(call.allowed for call in calls) == len(entries)
        never_more(entries, RATE)
        assert not list(unjustified(entries, calls, RATE))


def test_a_redis_that_answers_every_other_call_is_in_use_for_those_and_no_backend_exceeds_its_limit(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    """A single failure is no outage: the breaker opens at two in a row. Failed calls take a place in both backends."""
    with CuttingProxy(redis_server.port) as proxy:
        gov = make_gov(redis_url=proxy.url, database_url=postgres_server.url, limit_deny_cache=False)
        results = []
        for number in range(60):
            if number % 2:
                proxy.cut_next(b"rate_limit:default:k", times=2)  # the second time it is sent, too
                proxy.cut_next(b"PING")  # by which a proxy is known that does not take our command
            results.append(gov.limits.hit("k", "20/hour"))
        assert [r.backend for r in results] == ["redis", "postgres"] * 30
        assert redis_of(gov).breaker.times_opened == 0
        assert len(in_redis(redis_server)) == len(in_postgres(postgres_server)) == 20
        assert sum(r.allowed for r in results) == 30, "20 by PostgreSQL, 10 by Redis, and 10 whose replies were lost"


class TestReplication:
    """No window ends within these tests, so all of it spans the failover. About 200 hits a second, to tell apart."""

    RATE = (Limit(400, 3600),)
    INTERVAL = 0.2
    #: Seconds for which a busy machine may let the thread that tells wait.
    SLACK = 1.0

    def load(self, redis: RedisServer, postgres: PostgresServer, replication: bool) -> Load:
        settings = {
            "redis_url": redis.url,
            "database_url": postgres.url,
            **({"limit_mirror": self.INTERVAL} if replication else {}),
        }
        return Load([settings] * PROCESSES, self.RATE, pause=0.02)

    @pytest.mark.parametrize("replication", [True, False])
    def test_a_failover_to_postgres_admits_what_an_interval_does_beyond_the_limit(
        self,
        one_redis: RedisServer,
        postgres_server: PostgresServer,
        tmp_path: Path,
        one_redis_binary: str,
        replication: bool,
    ) -> None:
        folders = (tmp_path / str(n) for n in count())

        def attempt() -> None:
            one_redis.kill()
            one_redis.restart("empty")
            with psycopg2.connect(postgres_server.url) as connection, connection.cursor() as cursor:
                cursor.execute("TRUNCATE govredis_limit_windows")
            connection.close()
            with self.load(one_redis, postgres_server, replication) as load:
                until_there(lambda: in_redis(one_redis), 340)
                killed = time.time_ns() // 1000
                one_redis.kill()
                until_there(lambda: in_postgres(postgres_server), 400)
                reports = load.stop()
            by_redis = in_dead_redis(one_redis, one_redis_binary, next(folders))
            by_postgres = sum(call.allowed for call in all_calls(reports) if call.backend == "postgres")
            not_told_yet = sum(entry > killed - (self.INTERVAL + self.SLACK) * 1e6 for entry in by_redis)
            assert (len(by_redis) + by_postgres <= 400 + not_told_yet) == replication
            if replication:
                in_flight = len(by_redis) + by_postgres - len(in_postgres(postgres_server))
                assert 0 <= in_flight <= PROCESSES, "all that a process knew it told in the end"

        undisturbed(attempt, self.SLACK / 2)

    @pytest.mark.parametrize("replication", [True, False])
    def test_the_way_back_admits_what_the_others_do_until_the_last_process_is_back(
        self, one_redis: RedisServer, postgres_server: PostgresServer, replication: bool
    ) -> None:
        one_redis.kill()
        with self.load(one_redis, postgres_server, replication) as load:
            until_there(lambda: in_postgres(postgres_server), 340)
            one_redis.restart("empty")
            until_there(lambda: in_redis(one_redis), 400)
            until_there(
                lambda: re.findall("cmd=evalsha", one_redis.command("CLIENT", "LIST", "TYPE", "normal")), PROCESSES
            )
            stopped = time.time_ns() // 1000
            reports = load.stop()
        by_redis = [[call for call in report.calls if call.backend == "redis"] for report in reports]
        last_is_back = max(calls[0].began if calls else stopped for calls in by_redis)
        before_that = sum(call.allowed and call.began <= last_is_back for calls in by_redis for call in calls)
        admitted = sum(call.allowed for call in all_calls(reports))
        assert (admitted <= 400 + before_that + PROCESSES) == replication
        if replication:
            assert len(in_redis(one_redis)) == admitted, "each entry once, however often it was told"
