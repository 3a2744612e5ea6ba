"""HealthMonitor: what it says of living, hung, absent, disabled and half-made servers, and where it keeps it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from govredis import BackendError, BackendUnavailable, ConfigurationError, GovRedis, HealthReport
from govredis.health import Check, HealthMonitor
from govredis.limits.parked import Arrival
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

AWAY = "redis://user:hunter2@127.0.0.1:1/0"
PG_AWAY = "postgresql://postgres:hunter2@127.0.0.1:1/postgres"


def by_name(report: HealthReport) -> dict[str, Check]:
    assert [check.name for check in report.checks] == ["redis", "postgres", "counters"]
    return {check.name: check for check in report.checks}


def ticking(gov: GovRedis) -> tuple[HealthMonitor, list[float]]:
    """A monitor of the same servers whose clock is the list's only element."""
    now = [100.0]
    return HealthMonitor(gov._keys, gov._redis, gov._postgres, gov.counters, clock=lambda: now[0]), now


class TestStatus:
    def test_pass(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.mset({f"k{n}": n for n in range(7)})
        report = gov.health.check()
        checks = by_name(report)
        assert report.status == "pass"
        assert {(check.status, check.output) for check in report.checks} == {("pass", "")}
        redis = checks["redis"].data
        assert (redis["enabled"], redis["keys"], redis["times_away"]) == (True, 7, 0)
        assert redis["redis_version"].count(".") == 2
        assert min(redis["uptime_in_seconds"], redis["used_memory"], redis["connected_clients"]) >= 0
        assert redis["seconds"] > 0
        postgres = checks["postgres"].data
        assert (postgres["configured"], postgres["times_away"]) == (True, 0)
        assert postgres["seconds"] > 0
        assert report.at.utcoffset() is not None
        assert report.stored is None

    def test_keys_are_counted_without_a_scan(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.config_resetstat()
        gov.health.check()
        stats = {name.removeprefix("cmdstat_") for name in plain_redis.info("commandstats")}
        assert "dbsize" in stats
        assert not stats & {"scan", "keys"}

    def test_redis_away_is_a_warning(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        report = make_gov(redis_url=AWAY, database_url=postgres_server.url).health.check()
        redis = by_name(report)["redis"]
        assert (report.status, redis.status) == ("warn", "warn")
        assert "is away" in redis.output
        assert "fallbacks are in use" in redis.output
        assert redis.data["away_for"] >= 0

    def test_postgres_away_is_a_warning(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        report = make_gov(redis_url=redis_server.url, database_url=PG_AWAY).health.check()
        postgres = by_name(report)["postgres"]
        assert (report.status, postgres.status) == ("warn", "warn")
        assert "is away" in postgres.output

    def test_both_away_fail(self, make_gov: Callable[..., GovRedis]) -> None:
        report = make_gov(redis_url=AWAY, database_url=PG_AWAY).health.check()
        assert report.status == "fail"
        assert {check.status for check in report.checks} == {"warn", "pass"}

    def test_redis_away_without_a_postgres_fails(self, make_gov: Callable[..., GovRedis]) -> None:
        assert make_gov(redis_url=AWAY).health.check().status == "fail"

    def test_redis_away_fails_what_has_no_fallback(self, make_gov: Callable[..., GovRedis]) -> None:
        report = make_gov(redis_url=AWAY, lock_fallback="fail", limit_fallback="deny").health.check()
        assert report.status == "fail"
        assert "no fallback for locks and limits" in by_name(report)["redis"].output

    def test_disabled_passes_and_says_so(self, make_gov: Callable[..., GovRedis]) -> None:
        report = make_gov(redis_enabled=False).health.check()
        assert report.status == "pass"
        checks = by_name(report)
        assert (checks["redis"].output, checks["redis"].data) == ("disabled", {"enabled": False})
        assert (checks["postgres"].output, checks["postgres"].data) == ("not configured", {"configured": False})

    def test_wrong_credentials_fail(self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> None:
        mortal_redis.command("CONFIG", "SET", "requirepass", "right")
        report = make_gov(redis_url=mortal_redis.url.replace("//", "//:hunter2@")).health.check()
        assert (report.status, by_name(report)["redis"].status) == ("fail", "fail")
        assert "hunter2" not in json.dumps(report.as_dict())

    def test_missing_tables_fail(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        url = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        report = make_gov(redis_url=redis_server.url, database_url=url).health.check()
        postgres = by_name(report)["postgres"]
        assert (report.status, postgres.status) == ("fail", "fail")
        assert "govredis migrate" in postgres.output
        assert "0001_limits.sql" in postgres.data["missing_migrations"]

    def test_hung_servers_take_no_longer_than_their_deadlines(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, mortal_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, database_url=mortal_postgres.url, postgres_timeout=30)
        assert gov.health.check().status == "pass"
        fresh = make_gov(redis_url=mortal_redis.url, database_url=mortal_postgres.url, postgres_timeout=30)
        mortal_redis.pause()
        mortal_postgres.pause()
        try:
            for hung in (gov, fresh):
                monitor, _ = ticking(hung)
                began = time.monotonic()
                assert monitor.check().status == "fail"
                # 2 s for Redis and 2 s for PostgreSQL, and what a busy machine adds; not the 30 s.
                assert time.monotonic() - began < 10
        finally:
            mortal_redis.resume()
            mortal_postgres.resume()


class TestCaching:
    def test_what_was_seen_holds_for_a_second(self, gov: GovRedis, plain_redis: Any) -> None:
        monitor, now = ticking(gov)
        first = monitor.check()
        plain_redis.set("k", 1)
        now[0] += 0.999
        assert monitor.check() is first
        now[0] += 0.001
        assert by_name(monitor.check())["redis"].data["keys"] == by_name(first)["redis"].data["keys"] + 1

    def test_many_at_once_look_once(self, gov: GovRedis) -> None:
        monitor, _ = ticking(gov)
        before = gov.postgres.statements
        threads = [threading.Thread(target=monitor.check) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gov.postgres.statements - before == 2


class TestRatios:
    def test_are_of_the_time_since_the_check_before(self, gov: GovRedis) -> None:
        monitor, now = ticking(gov)

        def ratios() -> Any:
            now[0] += 1
            return by_name(monitor.check())["counters"].data["hit_ratios"]

        assert ratios() == {}
        gov.metadata.set("a", 1)
        for identity in ("a", "a", "a", "none"):
            gov.metadata.get(identity)
        gov.sessions.get("none")
        assert ratios() == {"agent_meta": 0.75, "sessions": 0.0}
        gov.metadata.get("a")
        assert ratios() == {"agent_meta": 1.0}, "a good start hides no bad hour, nor the other way round"
        assert ratios() == {}
        counts = by_name(monitor.check())["counters"].data["counts"]
        assert (counts["agent_meta.hits"], counts["agent_meta.misses"]) == (4, 1)

    def test_a_child_counts_from_its_start(self, gov: GovRedis) -> None:
        monitor, _ = ticking(gov)
        for _ in range(5):
            gov.metadata.get("none")
        monitor.check()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                gov.metadata.set("a", 1)
                gov.metadata.get("a")
                found = by_name(monitor.check())["counters"].data["hit_ratios"]
                status = 0 if found == {"agent_meta": 1.0} else 2
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0


class TestSnapshots:
    def test_go_to_redis(self, gov: GovRedis, plain_redis: Any) -> None:
        report = gov.health.snapshot()
        assert report.stored == "redis"
        ((_, fields),) = plain_redis.xrange("govredis:health")
        assert json.loads(fields["report"]) == json.loads(json.dumps(report.as_dict()))

    def test_the_stream_is_capped(self, gov: GovRedis, plain_redis: Any) -> None:
        with plain_redis.pipeline(transaction=False) as pipe:
            for n in range(10_500):
                pipe.xadd("govredis:health", {"report": n})
            pipe.execute()
        gov.health.snapshot()
        assert 10_000 <= plain_redis.xlen("govredis:health") < 10_200

    def test_go_to_postgres_while_redis_is_away(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        for options in ({"redis_url": AWAY}, {"redis_enabled": False}):
            gov = make_gov(database_url=postgres_server.url, **options)
            report = gov.health.snapshot()
            assert report.stored == "postgres"
            assert gov.counters.get("health.degraded.snapshots") == ("redis_url" in options)
        connection = psycopg2.connect(postgres_server.url)
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT report FROM govredis_health_snapshots ORDER BY at DESC")
            stored = [found for (found,) in cursor.fetchall()]
        connection.close()
        assert len(stored) == 2
        assert stored[0] == json.loads(json.dumps(report.as_dict()))

    def test_the_table_is_bounded(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        gov = make_gov(redis_url=AWAY, database_url=postgres_server.url)
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots"
            " SELECT 'x', now() - n * interval '1 day', '{}' FROM generate_series(29, 33, 2) n"
        )
        assert gov.health.snapshot().stored == "postgres"
        days = gov.postgres.fetch("SELECT extract(day FROM now() - at)::int FROM govredis_health_snapshots ORDER BY 1")
        assert days == [(0,), (29,)]

    def test_go_nowhere_where_nothing_takes_them(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer, plain_redis: Any,
        redis_server: RedisServer,
    ) -> None:  # fmt: skip
        unmigrated = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        plain_redis.set("govredis:health", "not a stream")
        for options in (
            {"redis_enabled": False},
            {"redis_url": AWAY, "database_url": PG_AWAY},
            {"redis_url": redis_server.url},
            {"redis_url": AWAY, "database_url": unmigrated},
        ):
            assert make_gov(**options).health.snapshot().stored is None


class TestBeat:
    def test_is_unknown_until_the_first(self, gov: GovRedis) -> None:
        assert "beat" not in {check.name for check in gov.health.check().checks}

    @pytest.mark.parametrize(("age", "status"), [(0, "pass"), (290, "pass"), (310, "warn"), (86_000, "warn")])
    def test_warns_of_three_that_did_not_come(self, gov: GovRedis, plain_redis: Any, age: int, status: str) -> None:
        assert gov.health.beat(100) is True
        assert 86_390 < plain_redis.ttl("govredis:heartbeat") <= 86_400
        # As old as that: the age is what is gone of its day.
        began = time.monotonic()
        plain_redis.pexpire("govredis:heartbeat", 86_400_000 - age * 1000)
        report = gov.health.check()
        took = time.monotonic() - began
        assert [check.name for check in report.checks] == ["redis", "postgres", "counters", "beat"]
        beat = report.checks[-1]
        assert (report.status, beat.status) == (status, status)
        assert beat.data["every"] == 100
        since = beat.data["seconds_since"]
        assert age <= since < age + took + 0.01
        assert beat.output == (
            "" if status == "pass" else f"no heartbeat for {since:.0f} s: beat is gone, or every worker"
        )
        assert json.loads(json.dumps(report.as_dict()))["checks"]["beat"][0]["status"] == status

    def test_a_later_one_counts_anew_with_its_own_interval(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.health.beat(10)
        plain_redis.pexpire("govredis:heartbeat", 1000)
        assert gov.health.beat(0.25) is True
        assert gov.health.check().checks[-1].data["every"] == 0.25
        assert plain_redis.ttl("govredis:heartbeat") > 80_000

    def test_a_long_interval_is_remembered_for_longer(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.health.beat(36_000)
        assert plain_redis.ttl("govredis:heartbeat") > 3 * 36_000
        beat = gov.health.check().checks[-1]
        assert (beat.status, beat.data["seconds_since"] < 100) == ("pass", True)

    def test_what_nobody_here_has_written_is_warned_of(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("govredis:heartbeat", "x")
        beat = gov.health.check().checks[-1]
        assert (beat.name, beat.status) == ("beat", "warn")
        assert "b'x'" in beat.output

    def test_is_forgotten_after_a_day(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.health.beat(10)
        plain_redis.pexpire("govredis:heartbeat", 1)
        while plain_redis.exists("govredis:heartbeat"):
            time.sleep(0.001)
        assert len(gov.health.check().checks) == 3

    def test_is_not_noted_where_redis_is_away(self, make_gov: Callable[..., GovRedis]) -> None:
        for options, counted in (({"redis_url": AWAY}, 1), ({"redis_enabled": False}, 0)):
            gov = make_gov(**options)
            assert gov.health.beat(10) is False
            assert gov.counters.get("health.degraded.heartbeats") == counted
            assert len(gov.health.check().checks) == 3

    def test_an_error_of_redis_is_no_outage(self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer) -> None:
        mortal_redis.command("CONFIG", "SET", "requirepass", "right")
        with pytest.raises(BackendError):
            make_gov(redis_url=mortal_redis.url.replace("//", "//:wrong@")).health.beat(10)

    @pytest.mark.parametrize("every", [0, -1, "15", None, True])
    def test_refuses_what_is_no_time(self, gov: GovRedis, plain_redis: Any, every: Any) -> None:
        with pytest.raises(ValueError, match=r"^every is "):
            gov.health.beat(every)
        assert plain_redis.dbsize() == 0

    def test_prefixes_do_not_see_each_others(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        one, other = (make_gov(redis_url=redis_server.url, key_prefix=prefix) for prefix in ("one:", "two:"))
        one.health.beat(10)
        assert (len(one.health.check().checks), len(other.health.check().checks)) == (4, 3)


class TestPurge:
    def test_deletes_what_is_older_than_thirty_days(self, gov: GovRedis) -> None:
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots"
            " SELECT 'x', now() - n * interval '1 day' + interval '1 hour', '{}' FROM generate_series(27, 33) n"
        )
        assert gov.health.purge() == 3
        days = gov.postgres.fetch("SELECT extract(day FROM now() - at)::int FROM govredis_health_snapshots ORDER BY 1")
        assert days == [(26,), (27,), (28,), (29,)]
        assert gov.health.purge() == 0

    def test_without_a_postgres_there_is_nothing(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        assert make_gov(redis_url=redis_server.url).health.purge() == 0

    def test_raises_what_is_wrong(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        with pytest.raises(BackendUnavailable):
            make_gov(redis_enabled=False, database_url=PG_AWAY).health.purge()
        unmigrated = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        with pytest.raises(ConfigurationError, match="govredis migrate"):
            make_gov(redis_enabled=False, database_url=unmigrated).health.purge()


class TestForm:
    def test_is_health_json_without_passwords(self, make_gov: Callable[..., GovRedis]) -> None:
        report = make_gov(redis_url=AWAY, database_url=PG_AWAY).health.check()
        form = report.as_dict()
        text = json.dumps(form, allow_nan=False)
        assert json.loads(text) == form
        assert set(form) == {"status", "time", "checks"}
        assert form["status"] == "fail"
        assert form["time"] == report.at.isoformat()
        assert set(form["checks"]) == {"redis", "postgres", "counters"}
        for (component,) in form["checks"].values():
            assert component["status"] in {"pass", "warn", "fail"}
            assert isinstance(component["output"], str)
        for shown in (text, repr(report)):
            assert "hunter2" not in shown


class TestParked:
    """Celery tasks that wait for their limits."""

    def test_how_many_and_whether_they_are_published_in_time(self, gov: GovRedis, plain_redis: Any) -> None:
        assert gov._parked is not None
        assert "parked" not in {check.name for check in gov.health.check().checks}
        for run, seconds in (("one", 60), ("two", 0)):
            gov._parked.lot("redis://h:6379/0").park(Arrival(run), seconds, b"{}")
        gov._parked.lot("amqp://h:5672/").park(Arrival("three"), 60, b"{}")
        gov.health.renew_after_fork()  # what was seen last is forgotten
        check = gov.health.check().checks[-1]
        assert (check.name, check.status, check.output, check.data["count"]) == ("parked", "pass", "", 3)
        assert 0 <= check.data["overdue"] < 30

        plain_redis.zincrby("{govredis:parked}:due:redis://h:6379/0", -40_000_000, "two:1")
        gov.health.renew_after_fork()
        report = gov.health.check()
        check = report.checks[-1]
        assert (report.status, check.status) == ("warn", "warn")
        assert 40 <= check.data["overdue"] < 70
        assert check.output.startswith("parked tasks for redis://h:6379/0 are overdue by ")
        assert check.output.endswith("does a worker run that reaches it?")

    def test_where_they_wait_is_away(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url, parking_url="redis://127.0.0.1:1/0")
        check = gov.health.check().checks[-1]
        assert (check.name, check.status) == ("parked", "warn")
        assert "127.0.0.1:1 is away" in check.output
