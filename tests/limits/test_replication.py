"""Replication: the admissions that each server is told, when, and those that it is not told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from limit_load import in_postgres, in_redis
from support import PATIENCE, PATIENT, REDIS_AWAY, eventually, in_child, redis_of

from govredis import Config, ConfigurationError, GovRedis, Limit
from govredis.keys import Keys, sibling
from govredis.limits import replication as module
from govredis.limits.backends.postgres_backend import PostgresLimitBackend
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.limits.replication import Admission, Replication
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

SECOND = 1_000_000
#: An interval that no test lives to see: the tests tell by themselves.
NEVER = 3600


def replication_of(gov: GovRedis) -> Replication:
    replication = gov.limits._decider.replication
    assert replication is not None
    return replication


def back(gov: GovRedis) -> None:
    eventually(lambda: not gov.limits.peek("other", "1/hour").degraded)


@pytest.fixture
def replicating(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> GovRedis:
    return make_gov(redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=NEVER)


@pytest.fixture
def mortal(make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    return make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url, limit_mirror=NEVER, **PATIENT)


class TestToPostgres:
    def test_admissions_by_redis_and_nothing_else_are_told_in_one_statement(
        self, replicating: GovRedis, redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        limits = replicating.limits
        for _ in range(3):
            limits.hit("k", "6/hour;5/minute")
        limits.hit("k", "6/hour", cost=2)
        limits.record("k", 60)
        assert not limits.hit("k", "6/hour")
        limits.peek("k", "9/hour")
        limits.hit("j", "1/day;1/minute")
        assert replicating.postgres.statements == 0, "a hit tells nobody"
        replication_of(replicating).tell()
        assert replicating.postgres.statements == 1
        told = in_postgres(postgres_server)
        assert len(told) == len(in_redis(redis_server)) == 6
        for entry, copy in zip(in_redis(redis_server), told, strict=True):
            assert entry <= copy <= time.time_ns() // 1000, "never older than what it is a copy of"
        rows = replicating.postgres.fetch("SELECT longest, expires FROM govredis_limit_windows ORDER BY longest")
        assert [longest for longest, _ in rows] == [3600 * SECOND, 86_400 * SECOND]
        expires = rows[0][1]
        assert 0 <= expires * 600 - told[-1] / SECOND - 3600 <= 1200
        assert replicating.counters.get("limits.mirrored.postgres") == 6
        replication_of(replicating).tell()
        assert in_postgres(postgres_server) == told, "once"

    def test_counters_are_not_replicated(self, replicating: GovRedis, postgres_server: PostgresServer) -> None:
        rate = Limit(10**12, 60, algorithm="sliding_window_counter")
        assert replicating.limits.hit("k", rate, cost=5)
        replication_of(replicating).tell()
        assert in_postgres(postgres_server) == []
        assert replicating.limits.get_count("k", 60) == 5

    def test_postgres_goes_on_from_there(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        assert [mortal.limits.hit("k", "5/hour").allowed for _ in range(3)] == [True] * 3
        replication_of(mortal).tell()
        mortal_redis.kill()
        results = [mortal.limits.hit("k", "5/hour") for _ in range(4)]
        assert [(r.backend, r.allowed) for r in results] == [("postgres", n < 2) for n in range(4)]

    def test_replicas_are_merged_into_the_log_and_the_old_go(
        self, replicating: GovRedis, postgres_server: PostgresServer
    ) -> None:
        backend = PostgresLimitBackend(replicating.postgres, Keys())
        for longest, ages in ((600, [50, 10, 90]), (650, [70]), (600, [30, 10])):
            backend.replicate([Admission("rate_limit:default:k", -age, 1, longest * SECOND, "") for age in ages], 0.0)
        assert replicating.postgres.fetch("SELECT longest FROM govredis_limit_windows") == [(650 * SECOND,)]
        found = in_postgres(postgres_server)
        assert len(found) == 6
        backend.replicate([Admission("rate_limit:default:k", -700, 1, SECOND, "")], 0.0)
        assert in_postgres(postgres_server) == found, "older than the longest window"
        assert backend.decide("rate_limit:default:k", [Limit(6, 60)], 1, "peek").remaining == 1

    def test_two_processes_may_tell_of_the_same_keys_at_once(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        """Each in another order: were rows locked in theirs, the two would wait for each other for ever."""
        keys = [f"rate_limit:default:{n}" for n in range(200)]
        failed: list[BaseException] = []

        def tell(gov: GovRedis, order: list[str]) -> None:
            try:
                for _ in range(20):
                    PostgresLimitBackend(gov.postgres, Keys()).replicate(
                        [Admission(key, 0.0, 1, 3600 * SECOND, "") for key in order], 0.0
                    )
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        govs = [make_gov(redis_enabled=False, database_url=postgres_server.url) for _ in range(2)]
        threads = [
            threading.Thread(target=tell, args=(gov, order))
            for gov, order in zip(govs, (keys, keys[::-1]), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        counts = govs[0].postgres.fetch("SELECT DISTINCT cardinality(entries) FROM govredis_limit_windows")
        assert counts == [(40,)]

    def test_a_postgres_that_hangs_holds_up_no_hit(
        self,
        monkeypatch: pytest.MonkeyPatch,
        make_gov: Callable[..., GovRedis],
        redis_server: RedisServer,
        mortal_postgres: PostgresServer,
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=mortal_postgres.url, limit_mirror=NEVER, **PATIENT)
        has_hit, wait = threading.Event(), gov.postgres._connector.wait

        def wait_until_hits_are_done(connection: Any, deadline: float) -> None:
            assert has_hit.wait(PATIENCE)
            wait(connection, time.monotonic() + 0.1)

        gov.limits.hit("k", "1000/hour")
        replication_of(gov).tell()
        gov.limits.hit("k", "1000/hour")
        mortal_postgres.pause()
        with monkeypatch.context() as patch:
            patch.setattr(gov.postgres._connector, "wait", wait_until_hits_are_done)
            telling = threading.Thread(target=replication_of(gov).tell)
            telling.start()
            eventually(lambda: gov.postgres.statements == 2)
            assert all(gov.limits.hit("k", "1000/hour").backend == "redis" for _ in range(50))
            assert telling.is_alive()
            has_hit.set()
            telling.join()
        assert gov.counters.get("limits.mirror_lost.postgres") == 1, "it may have been written"
        assert not gov.postgres.breaker.closed
        replication_of(gov).tell()
        mortal_postgres.resume()
        eventually(lambda: gov.postgres.breaker.closed)
        replication_of(gov).tell()
        assert gov.counters.read()["limits.mirrored.postgres"] == 51, "what was not sent was kept"

    def test_missing_tables_are_said_once_and_cost_no_hit(
        self,
        make_gov: Callable[..., GovRedis],
        redis_server: RedisServer,
        postgres_server: PostgresServer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        url = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        gov = make_gov(redis_url=redis_server.url, database_url=url, limit_mirror=NEVER)
        for _ in range(3):
            assert gov.limits.hit("k", "9/hour")
            replication_of(gov).tell()
        assert gov.counters.get("limits.mirror_lost.postgres") == 3
        (said,) = [r.getMessage() for r in caplog.records if "replicated" in r.getMessage()]
        assert "govredis migrate" in said


class TestToRedis:
    def test_redis_knows_when_it_is_used_again(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        mortal_redis.kill()
        results = [mortal.limits.hit("k", "9/hour", cost=2) for _ in range(3)]
        assert [r.backend for r in results] == ["postgres"] * 3
        mortal_redis.restart("empty")
        back(mortal)
        assert mortal.limits.peek("k", "9/hour", cost=3).remaining == 0
        assert not mortal.limits.hit("k", "9/hour", cost=4)
        assert mortal.counters.get("limits.mirrored.redis") == 3

    def test_admissions_while_redis_came_back_are_told_too(
        self, replicating: GovRedis, redis_server: RedisServer
    ) -> None:
        """A hit that was still with PostgreSQL; or Redis failed it once, which is no outage."""
        replication_of(replicating).note("postgres", "rate_limit:default:k", [Limit(9, 60)], 2)
        replication_of(replicating).tell()
        assert len(in_redis(redis_server)) == 2

    def test_redis_goes_away_while_it_is_told(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        replication = replication_of(mortal)
        for _ in range(3):
            replication.note("postgres", "rate_limit:default:k", [Limit(9, 60)], 1)
        mortal_redis.kill()
        replication.tell()
        mortal_redis.restart("empty")
        back(mortal)
        replication.tell()
        assert len(in_redis(mortal_redis)) == 3
        assert mortal.counters.get("limits.mirror_lost.redis") == 0

    def test_a_signal_strikes_while_it_is_told(
        self, monkeypatch: pytest.MonkeyPatch, replicating: GovRedis, redis_server: RedisServer
    ) -> None:
        """An overdue caller may run the replay, so a soft time limit, say, may strike in there."""
        replication = replication_of(replicating)
        replication.note("postgres", "rate_limit:default:k", [Limit(9, 60)], 1)

        def struck(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(replication._to_redis._backend, "replicate", struck)
            replication.tell()
        replication.tell()
        assert len(in_redis(redis_server)) == 1

    def test_an_admission_told_twice_is_recorded_once(self, replicating: GovRedis, redis_server: RedisServer) -> None:
        backend = RedisLimitBackend(redis_of(replicating))
        told = [Admission("rate_limit:default:k", -age, 2, 60 * SECOND, str(age)) for age in (5, 1, 3)]
        backend.replicate(told[:2], 0.0)
        first = in_redis(redis_server)
        backend.replicate(told, 50.0)
        assert [entry for entry in in_redis(redis_server) if entry in first] == first
        assert len(in_redis(redis_server)) == 6

    def test_a_replica_is_as_old_as_the_admission_and_is_kept_as_long(
        self, replicating: GovRedis, redis_server: RedisServer
    ) -> None:
        before = time.time_ns() // 1000
        RedisLimitBackend(redis_of(replicating)).replicate(
            [Admission("rate_limit:default:k", 2.5, 1, 100 * SECOND, "a")], 10.0
        )
        (entry,) = in_redis(redis_server)
        assert before <= entry + 7_500_000 <= time.time_ns() // 1000
        for key in ("rate_limit:default:k", sibling("rate_limit:default:k", "window")):
            assert 100_000 < redis_server.command("PTTL", key) <= 160_000
        assert redis_server.command("GET", sibling("rate_limit:default:k", "window")) == str(100 * SECOND)

    def test_thousands_are_told_in_parts(self, replicating: GovRedis, redis_server: RedisServer) -> None:
        for n in range(2500):
            replication_of(replicating).note(
                "postgres", f"rate_limit:default:{'k' if n % 2 else n}", [Limit(9, 600)], 1
            )
        replication_of(replicating).tell()
        assert len(in_redis(redis_server)) == 1250
        assert replicating.counters.get("limits.mirrored.redis") == 2500

    def test_an_admission_that_redis_refuses_does_not_keep_it_away(
        self, mortal: GovRedis, mortal_redis: RedisServer
    ) -> None:
        mortal_redis.kill()
        mortal.limits.hit("text", "9/hour")
        mortal.limits.hit("k", "9/hour")
        set_there = threading.Event()
        redis_of(mortal)._replays.insert(0, lambda _: set_there.wait(20) and None)
        mortal_redis.restart("empty")
        mortal_redis.command("SET", "rate_limit:default:text", "text")
        set_there.set()
        back(mortal)
        assert mortal.counters.get("limits.mirror_lost.redis") == 1
        assert mortal.counters.get("limits.mirrored.redis") == 1
        assert len(in_redis(mortal_redis)) == 1, "the others were told all the same"


class TestBounds:
    def test_the_oldest_go_when_too_many_wait(
        self, monkeypatch: pytest.MonkeyPatch, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        monkeypatch.setattr(module, "_KEPT", 5)
        gov = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url, limit_mirror=NEVER)
        for n in range(8):
            gov.limits.hit(str(n), "9/hour")
        assert [one.key[-1] for one in replication_of(gov)._to_redis._waiting] == list("34567")
        assert gov.counters.get("limits.mirror_lost.redis") == 3

    def test_admissions_that_come_meanwhile_have_precedence_over_those_that_failed(
        self, monkeypatch: pytest.MonkeyPatch, replicating: GovRedis
    ) -> None:
        monkeypatch.setattr(module, "_KEPT", 5)
        replication = replication_of(replicating)
        replication.renew_after_fork()
        backlog = replication._to_redis

        def copy(told: Any, now: float, _: Any) -> None:
            for n in range(3):
                replication.note("postgres", f"new{n}", [Limit(9, 60)], 1)
            raise module.BackendUnavailable("away")

        monkeypatch.setattr(backlog._backend, "replicate", copy)
        for n in range(4):
            replication.note("postgres", f"old{n}", [Limit(9, 60)], 1)
        replication.tell()
        assert [one.key for one in backlog._waiting] == ["old2", "old3", "new0", "new1", "new2"]
        assert replicating.counters.get("limits.mirror_lost.redis") == 2

    def test_admissions_that_cannot_count_any_more_are_not_told(
        self, replicating: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replication = replication_of(replicating)
        replication.note("redis", "rate_limit:default:k", [Limit(9, 60)], 1)
        monkeypatch.setattr(replication._to_postgres, "_clock", lambda: time.monotonic() + 60)
        replication.tell()
        assert replicating.postgres.statements == 0
        assert not replication._to_postgres

    def test_a_window_of_one_process_is_nobody_elses(self, replicating: GovRedis) -> None:
        replication_of(replicating).note("local", "rate_limit:default:k", [Limit(9, 60)], 1)
        assert not replication_of(replicating)._to_postgres
        assert not replication_of(replicating)._to_redis

    def test_reset_is_not_undone(self, replicating: GovRedis, postgres_server: PostgresServer) -> None:
        for identity in ("k", "j", "k"):
            replicating.limits.hit(identity, "2/hour")
        replication_of(replicating).note("postgres", "rate_limit:default:k", [Limit(9, 60)], 1)
        replicating.limits.reset("k")
        replication_of(replicating).tell()
        assert [key for (key,) in replicating.postgres.fetch("SELECT key FROM govredis_limit_windows")] == [
            "rate_limit:default:j"
        ]
        assert replicating.limits.peek("k", "2/hour").remaining == 1


class TestThread:
    def test_tells_every_interval_and_never_more_often(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=0.05)
        began, hits = time.monotonic(), 0
        while gov.counters.get("limits.mirrored.postgres") < 50:
            gov.limits.hit("k", "100000/hour")
            hits += 1
            time.sleep(0.002)
        sent = gov.postgres.statements
        assert 1 <= sent <= (time.monotonic() - began) / 0.05
        gov.close()
        assert len(in_postgres(postgres_server)) == hits, "closing tells the rest"
        gov.limits.hit("k", "100000/hour")
        gov.close()
        assert len(in_postgres(postgres_server)) == hits + 1, "also of what came after that"

    def test_ends_when_idle_and_starts_again(
        self,
        monkeypatch: pytest.MonkeyPatch,
        make_gov: Callable[..., GovRedis],
        redis_server: RedisServer,
        postgres_server: PostgresServer,
    ) -> None:
        monkeypatch.setattr(module, "_IDLE", 0.05)
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=0.01)
        for n in range(1, 4):
            gov.limits.hit("k", "9/hour")
            # Only the thread tells; on a busy machine it may have ended by now.
            eventually(lambda: replication_of(gov)._thread is None, what="the thread ends")
            assert len(in_postgres(postgres_server)) == n

    def test_a_child_tells_its_own_and_its_parent_its_own(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=0.05)
        replication = replication_of(gov)
        gov.limits.hit("k", "9/hour", cost=3)
        replication.note("postgres", "rate_limit:default:k", [Limit(9, 60)], 1)
        replication.close()
        gov.limits.hit("k", "9/hour")

        def child() -> None:
            assert not replication._to_postgres
            gov.limits.hit("k", "9/hour")
            replication.note("postgres", "rate_limit:default:k", [Limit(9, 60)], 1)
            eventually(lambda: gov.counters.get("limits.mirrored.postgres"))
            replication.close()

        with replication._to_postgres._telling:  # the thread was telling, or somebody resetting, when we forked
            in_child(child)
        replication.close()
        assert len(in_postgres(postgres_server)) == 5
        assert len(in_redis(redis_server)) == 7, "two names, though both are the second that a process gave"

    def test_without_threads_it_is_said_and_hits_go_on(
        self, replicating: GovRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        assert all(replicating.limits.hit("k", "9/hour") for _ in range(3))
        assert [r.getMessage() for r in caplog.records] == [
            "admissions of limits are not replicated: no thread can be started"
        ]


class TestSetting:
    def test_off_unless_set(self, gov: GovRedis) -> None:
        gov.limits.hit("k", "9/hour")
        assert gov.limits._decider.replication is None
        gov.close()
        assert gov.postgres.fetch("SELECT count(*) FROM govredis_limit_windows") == [(0,)]

    def test_needs_a_postgres(self) -> None:
        with pytest.raises(ConfigurationError, match=r"GOVREDIS_LIMIT_MIRROR is 0\.5; it must be left unset where"):
            GovRedis(Config(limit_mirror=0.5))

    def test_has_nothing_to_do_where_redis_is_disabled(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_enabled=False, database_url=postgres_server.url, limit_mirror=0.5)
        assert gov.limits.hit("k", "9/hour")
        assert gov.limits._decider.replication is None
