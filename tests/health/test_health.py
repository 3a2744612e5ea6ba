"""HealthMonitor: what it says of living, hung, absent, disabled and half-made servers, and where it keeps it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from support import PATIENCE, REDIS_AWAY, Background, WatchedSocket, eventually

from govredis import BackendError, BackendUnavailable, ConfigurationError, GovRedis, HealthReport
from govredis.health import Check, HealthMonitor, deadlines
from govredis.health.heartbeat import Heartbeat
from govredis.health.probes import side
from govredis.health.probes.postgres_server import PostgresProbe
from govredis.health.probes.redis_server import RedisProbe
from govredis.limits.parked import Arrival
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

AWAY = "redis://user:hunter2@127.0.0.1:1/0"
PG_AWAY = "postgresql://postgres:hunter2@127.0.0.1:1/postgres"

#: For a Redis of the test's own that never hangs: a stall of the machine is no outage.
PATIENT = {"socket_timeout": 10, "connect_timeout": 10}


def by_name(report: HealthReport) -> dict[str, Check]:
    assert [check.name for check in report.checks][:3] == ["redis", "postgres", "counters"]
    return {check.name: check for check in report.checks}


def checks_of(gov: GovRedis) -> dict[str, Check]:
    """By a look of its own."""
    monitor = HealthMonitor(gov.internal.context, Heartbeat(gov.internal.context), account=gov.internal.account)
    return {check.name: check for check in monitor.check().checks}


def ticking(gov: GovRedis) -> tuple[HealthMonitor, list[float]]:
    """A monitor of the same servers whose clock is the list's only element."""
    now = [100.0]

    def clock() -> float:
        return now[0]

    return HealthMonitor(gov.internal.context, Heartbeat(gov.internal.context, clock), clock=clock), now


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
        """It looks at a bounded number of keys only, for locks from outside."""
        plain_redis.mset({f"other:{n}": n for n in range(15_000)})
        plain_redis.config_resetstat()
        gov.health.check()
        stats = plain_redis.info("commandstats")
        assert "cmdstat_dbsize" in stats
        assert "cmdstat_keys" not in stats
        assert 1 <= stats["cmdstat_scan"]["calls"] <= 10

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
        assert by_name(report)["redis"].output.endswith("; fallbacks are in use, and PostgreSQL is away too")

    def test_redis_away_without_a_postgres_fails(self, make_gov: Callable[..., GovRedis]) -> None:
        report = make_gov(redis_url=AWAY).health.check()
        assert report.status == "fail"
        assert by_name(report)["redis"].output.endswith("refused; fallbacks are in use, and no PostgreSQL covers it")

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
        report = make_gov(redis_url=mortal_redis.url.replace("//", "//:hunter2@"), **PATIENT).health.check()
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
        self,
        make_gov: Callable[..., GovRedis],
        mortal_redis: RedisServer,
        mortal_postgres: PostgresServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(socket, "socket", WatchedSocket)
        urls = {"redis_url": mortal_redis.url, "database_url": mortal_postgres.url}
        gov, fresh = (make_gov(**urls, postgres_timeout=10 * PATIENCE) for _ in range(2))
        # The timeouts are short: a stall of the machine is an outage of these servers, too.
        eventually(lambda: ticking(gov)[0].check().status == "pass", what="both answer")
        look, told = RedisProbe.look, []

        def watched(probe: RedisProbe) -> Iterator[Check]:
            """Each side has a thread of its own, which has waits of its own."""
            yield from look(probe)
            told.append((WatchedSocket.waits.connects, WatchedSocket.waits.timeouts))

        monkeypatch.setattr(RedisProbe, "look", watched)
        mortal_redis.pause()
        mortal_postgres.pause()
        try:
            for hung, connects in ((gov, 0), (fresh, 1)):
                report = Background(lambda hung=hung: ticking(hung)[0].check()).result(PATIENCE)
                assert report.status == "fail"
                assert told.pop() == (connects, [1]), "it asks Redis once, and waits for the socket timeout"
        finally:
            mortal_redis.resume()
            mortal_postgres.resume()


class TestSides:
    """Each server is asked in a thread of its own."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch, patience: dict[str, float]) -> None:
        monkeypatch.setattr(deadlines, "SPARE", 0.1)
        monkeypatch.setattr(deadlines, "POSTGRES", 0.1)

    def test_a_probe_that_hangs_is_named_and_holds_nothing_up(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        hang, entered = threading.Event(), threading.Semaphore(0)

        def lock_folder() -> None:
            entered.release()
            hang.wait()

        gov = make_gov(redis_url=redis_server.url)
        monitor = HealthMonitor(gov.internal.context, Heartbeat(gov.internal.context), lock_folder=lock_folder)
        try:
            for _ in range(5):
                report = Background(monitor.check).result()
                locks = next(check for check in report.checks if check.name == "locks")
                assert (report.status, locks.status) == ("warn", "warn")
                assert "has not answered for" in locks.output
                assert by_name(report)["redis"].status == "pass", "the others go on"
                monitor._last = None
            assert entered.acquire(blocking=False)
            assert not entered.acquire(blocking=False), "threads do not pile up"
        finally:
            hang.set()

        def answers() -> bool:
            monitor._last = None
            return "locks" not in {check.name for check in monitor.check().checks}

        eventually(answers)

    @pytest.mark.parametrize("probe", [RedisProbe, PostgresProbe])
    def test_a_server_whose_probe_hangs_counts_as_away(
        self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch, probe: type[Any]
    ) -> None:
        """A name server that hangs, say."""
        hang = threading.Event()

        def look(_: Any) -> Iterator[Check]:
            hang.wait()
            yield Check("redis", "pass", "", {})

        monkeypatch.setattr(probe, "look", look)
        monkeypatch.setattr(deadlines, "SPARE", -20.0 if probe is RedisProbe else 0.1)
        monitor, _ = ticking(gov)
        try:
            report = Background(monitor.check).result()
        finally:
            hang.set()
        name = "redis" if probe is RedisProbe else "postgres"
        found = by_name(report)[name]
        assert (report.status, found.status) == ("warn", "warn")
        assert "it has not answered for" in found.output
        assert found.data["away_for"] >= 0

    def test_where_no_thread_runs_the_caller_looks(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(side, "start_daemon", lambda *_: None)
        gov.health.renew_after_fork()
        assert gov.health.check().status == "pass"

    def test_an_error_of_a_probe_is_the_caller_s(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        def look(_: Any) -> Iterator[Check]:
            raise ZeroDivisionError
            yield

        monkeypatch.setattr(RedisProbe, "look", look)
        with pytest.raises(ZeroDivisionError):
            ticking(gov)[0].check()


class TestCaching:
    def test_a_report_holds_for_a_second(self, gov: GovRedis, plain_redis: Any) -> None:
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
        ticking(gov)[0].check()
        once, before = gov.postgres.statements - before, gov.postgres.statements
        threads = [threading.Thread(target=monitor.check) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gov.postgres.statements - before == once > 0


class TestCounters:
    """The account has tests of its own."""

    def test_two_pollers_do_not_spoil_each_others_ratios(
        self, gov: GovRedis, make_gov: Callable[..., GovRedis]
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url)
        gov.metadata.set("a", 1)
        for identity in ("a", "a", "a", "none"):
            gov.metadata.get(identity)
        other.sessions.get("none")
        for each in gov, other:
            each.internal.account.flush()
        for poller in gov, other, gov:
            data = checks_of(poller)["counters"].data
            for span in "minute", "hour", "day":
                assert data["hit_ratios"][span] == {"agent_meta": 0.75, "sessions": 0.0}
        assert checks_of(gov)["counters"].data["counts"]["agent_meta.hits"] == 3, "of this process"

    def test_sums_over_the_last_minute_hour_and_day(self, gov: GovRedis) -> None:
        gov.limits.hit("a", "1/hour")
        for _ in range(3):
            gov.limits.hit("a", "1/hour")
        for name, n in {
            "locks.waits": 2,
            "locks.waited_ms": 2500,
            "locks.lost": 1,
            "limits.degraded.memory": 4,
        }.items():
            gov.counters.add(name, n)
        gov.internal.account.flush()
        data = checks_of(gov)["counters"].data
        for span in "minute", "hour", "day":
            redis = data["latencies"][span]["redis"]
            assert redis["calls"] > 0
            assert 0 <= redis["p50"] <= redis["p99"]
            others = data.keys() - {"counts", "hit_ratios", "latencies", "source"}
            assert {name: data[name][span] for name in others} == {
                "denials": 3,
                "fallbacks": {"limits": 4},
                "lock_waits": 2,
                "lock_waited_seconds": 2.5,
                "locks_lost": 1,
            }
        assert data["source"] == "redis"

    def test_an_account_that_redis_refuses_is_a_warning(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("{govredis:account}:totals", "planted")
        gov.counters.add("limits.allowed")
        gov.internal.account.flush()
        check = checks_of(gov)["counters"]
        assert check.status == "warn"
        assert "WRONGTYPE" in check.output


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
            " SELECT 'govredis:health', now() - n * interval '1 day', '{}' FROM generate_series(29, 33, 2) n"
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

    @pytest.mark.parametrize(("age", "status"), [(0, "pass"), (1900, "pass"), (2100, "warn"), (86_000, "warn")])
    def test_warns_of_two_that_did_not_come(self, gov: GovRedis, plain_redis: Any, age: int, status: str) -> None:
        assert gov.health.beat(1000) is True
        assert 86_400 - PATIENCE < plain_redis.ttl("govredis:heartbeat") <= 86_400
        # As old as that: the age is what is gone of its day.
        began = time.monotonic()
        plain_redis.pexpire("govredis:heartbeat", 86_400_000 - age * 1000)
        report = gov.health.check()
        took = time.monotonic() - began
        assert [check.name for check in report.checks] == ["redis", "postgres", "counters", "beat"]
        beat = report.checks[-1]
        assert (report.status, beat.status) == (status, status)
        assert beat.data["every"] == 1000
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

    def test_a_heartbeat_that_govredis_has_not_written_is_warned_of(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("govredis:heartbeat", "x")
        beat = gov.health.check().checks[-1]
        assert (beat.name, beat.status) == ("beat", "warn")
        assert "b'x'" in beat.output

    def test_is_forgotten_after_a_day(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.health.beat(10)
        plain_redis.pexpire("govredis:heartbeat", 1)
        while plain_redis.exists("govredis:heartbeat"):
            time.sleep(0.001)
        self.age_in_postgres(gov, 86_400)
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
            make_gov(redis_url=mortal_redis.url.replace("//", "//:wrong@"), **PATIENT).health.beat(10)

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

    def test_is_missed_where_redis_has_lost_its_data(self, gov: GovRedis, plain_redis: Any) -> None:
        """PostgreSQL has the last one, for a process that has never looked."""
        assert gov.health.beat(1000) is True
        plain_redis.flushall()
        (*_, beat) = ticking(gov)[0].check().checks
        assert (beat.name, beat.status, beat.data["every"]) == ("beat", "pass", 1000), "beat may be alive"
        self.age_in_postgres(gov, 1900)
        assert ticking(gov)[0].check().checks[-1].status == "pass"
        self.age_in_postgres(gov, 200)
        (*_, beat) = ticking(gov)[0].check().checks
        assert (beat.name, beat.status) == ("beat", "warn")
        assert beat.output.startswith("no heartbeat for 21")
        self.age_in_postgres(gov, 86_400)
        assert "beat" not in {check.name for check in ticking(gov)[0].check().checks}, "after a day"
        assert gov.health.beat(100) is True
        assert gov.postgres.fetch("SELECT key FROM govredis_health_snapshots") == [("govredis:heartbeat",)], "one row"
        assert gov.health.purge() == 0

    def age_in_postgres(self, gov: GovRedis, seconds: int) -> None:
        gov.postgres.fetch(f"UPDATE govredis_health_snapshots SET at = at - interval '{seconds} seconds'")

    def test_a_process_misses_what_it_has_seen_where_there_is_no_postgres(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        gov.health.beat(1000)
        monitor, now = ticking(gov)
        assert monitor.check().checks[-1].status == "pass"
        plain_redis.flushall()
        now[0] += 1900
        assert (monitor.check().checks[-1].name, monitor.check().checks[-1].status) == ("beat", "pass")
        now[0] += 200
        (*_, beat) = monitor.check().checks
        assert (beat.name, beat.status, beat.output[:19]) == ("beat", "warn", "no heartbeat for 21")
        gov.health.beat(100)
        now[0] += 2
        assert monitor.check().checks[-1].status == "pass"
        plain_redis.flushall()
        now[0] += 86_401
        assert "beat" not in {check.name for check in monitor.check().checks}, "after a day"

    def test_is_noted_in_postgres_while_redis_is_away(
        self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
    ) -> None:
        for options in ({"redis_url": AWAY}, {"redis_enabled": False}):
            gov = make_gov(database_url=postgres_server.url, **options)
            assert gov.health.beat(10) is True
            assert gov.health.check().checks[-1].name == "beat"

    def test_published_and_not_run_is_warned_of(self, gov: GovRedis, plain_redis: Any) -> None:
        def beat() -> Check | None:
            return next((check for check in ticking(gov)[0].check().checks if check.name == "beat"), None)

        def publish(times: int) -> None:
            for n in range(times):
                assert gov.internal.heartbeat.note_published(1000, "queue\n") > n

        publish(1)
        assert (found := beat()) is not None
        assert found.status == "pass"
        publish(1)
        assert (found := beat()) is not None
        assert (found.status, found.data) == ("warn", {"unread": 2, "every": 1000})
        assert "no worker has run the last 2 heartbeats, which went to the queue 'queue\\\\n'" in found.output
        assert "govredis_queue" in found.output
        gov.health.beat(1000)
        assert (found := beat()) is not None
        assert (found.status, "seconds_since" in found.data) == ("pass", True), "they are run again"
        publish(2)
        plain_redis.pexpire("govredis:unread_heartbeats", 86_400_000 - 2_100_000)
        assert (found := beat()) is not None
        assert found.status == "pass", "beat is gone too; the heartbeat has run a moment ago"
        plain_redis.delete("govredis:heartbeat")
        gov.postgres.fetch("DELETE FROM govredis_health_snapshots")
        assert (found := beat()) is not None
        assert (found.status, found.output[:19]) == ("warn", "no heartbeat for 21"), "none has ever run"

    def test_publication_is_noted_for_a_day(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.internal.heartbeat.note_published(10, "celery")
        assert plain_redis.hgetall("govredis:unread_heartbeats") == {"count": "1", "every": "10", "queue": "celery"}
        assert 86_400 - PATIENCE < plain_redis.ttl("govredis:unread_heartbeats") <= 86_400

    def test_a_publisher_is_held_up_by_nothing(self, make_gov: Callable[..., GovRedis], plain_redis: Any) -> None:
        for options, counted in (({"redis_url": AWAY}, 1), ({"redis_enabled": False}, 0)):
            gov = make_gov(**options)
            assert gov.internal.heartbeat.note_published(10, "celery") == 0
            assert gov.counters.get("health.degraded.heartbeats") == counted

    @pytest.mark.parametrize("planted", [{"x": "y"}, {"count": "x", "every": "1", "queue": "q"}, {"count": "3"}])
    def test_counts_that_govredis_has_not_published_are_warned_of(
        self, gov: GovRedis, plain_redis: Any, planted: dict[str, str]
    ) -> None:
        plain_redis.hset("govredis:unread_heartbeats", mapping=planted)
        plain_redis.pexpire("govredis:unread_heartbeats", 1000_000)
        beat = gov.health.check().checks[-1]
        assert (beat.name, beat.status) == ("beat", "warn")
        assert "govredis has not written" in beat.output

    @pytest.mark.parametrize("planted", [b"nan", b"inf", b"1e400", b"-5", b"0", b"\xff\xfe", b"9" * 5000, b"true"])
    def test_no_number_of_seconds_is_warned_of(self, gov: GovRedis, plain_redis: Any, planted: bytes) -> None:
        plain_redis.set("govredis:heartbeat", planted, px=1000_000)
        report = gov.health.check()
        beat = report.checks[-1]
        assert (report.status, beat.name, beat.status) == ("warn", "beat", "warn")
        assert "govredis has not written" in beat.output
        assert len(beat.output) < 400
        json.dumps(report.as_dict(), allow_nan=False)

    def test_a_heartbeat_that_lasts_for_ever_or_is_of_another_type_is_warned_of(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        plain_redis.set("govredis:heartbeat", "10", px=10**15)
        assert "govredis has not written" in gov.health.check().checks[-1].output
        plain_redis.delete("govredis:heartbeat")
        plain_redis.hset("govredis:heartbeat", "a", 1)
        gov.health.renew_after_fork()
        report = gov.health.check()
        assert (report.status, report.checks[0].status) == ("warn", "pass")
        assert report.checks[-1].output.startswith("the heartbeat cannot be read: ")
        assert "WRONGTYPE" in report.checks[-1].output
        plain_redis.delete("govredis:heartbeat")
        gov.health.renew_after_fork()
        assert gov.health.check().status == "pass"


class TestEviction:
    @pytest.mark.parametrize(
        ("policy", "maxmemory", "warns"),
        [
            ("allkeys-lru", "100mb", True),
            ("allkeys-lfu", "100mb", True),
            ("allkeys-random", "100mb", True),
            ("volatile-lfu", "100mb", True),
            ("volatile-random", "100mb", True),
            ("volatile-ttl", "100mb", True),
            ("volatile-lru", "100mb", True),
            ("noeviction", "100mb", False),
            ("allkeys-lru", "0", False),
        ],
    )
    def test_is_warned_of_where_it_may_drop_what_is_in_use(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, policy: str, maxmemory: str, warns: bool
    ) -> None:
        mortal_redis.command("CONFIG", "SET", "maxmemory", maxmemory)
        mortal_redis.command("CONFIG", "SET", "maxmemory-policy", policy)
        report = make_gov(redis_url=mortal_redis.url, **PATIENT).health.check()
        redis, *others = report.checks
        assert (redis.status, redis.data["maxmemory_policy"]) == ("pass", policy)
        found = [check for check in others if check.name == "eviction"]
        assert [check.status for check in found] == ["warn"] * warns
        assert report.status == ("warn" if warns else "pass")
        for check in found:
            assert check.output.startswith(f"maxmemory_policy is {policy}: ")
            assert "granted twice" in check.output
            assert check.output.endswith("set it to noeviction")

    def test_is_unknown_where_info_is_refused(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        mortal_redis.command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "+@all", "-info", "-dbsize")
        report = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"), **PATIENT).health.check()
        assert (report.status, report.checks[0].status) == ("warn", "pass")  # by "rights": see test_acl.py
        (eviction,) = [check for check in report.checks if check.name == "eviction"]
        assert eviction.status == "pass"
        assert eviction.output.startswith("unknown: ")
        assert "info" in eviction.output
        assert "keys" not in report.checks[0].data

    def test_an_acl_that_refuses_all_is_a_warning(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        """All that is looked at is informative: what else the user may do, its calls find out."""
        mortal_redis.command("ACL", "SETUSER", "ann", "on", ">pw", "~x", "+set")
        report = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"), **PATIENT).health.check()
        assert (report.status, report.checks[0].status) == ("warn", "pass")

    def test_refused_credentials_are_a_failure(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        report = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"), **PATIENT).health.check()
        assert (report.status, report.checks[0].status) == ("fail", "fail")


class TestLockFolder:
    @pytest.mark.parametrize("settings", [{}, {"redis_enabled": False}, {"lock_fallback": "fail"}])
    def test_in_which_no_file_can_be_made_is_said(
        self,
        make_gov: Callable[..., GovRedis],
        redis_server: RedisServer,
        postgres_server: PostgresServer,
        tmp_path: Path,
        settings: dict[str, Any],
    ) -> None:
        """A process that uses no locks is ready all the same: a warning."""
        (tmp_path / "file").touch()
        urls = {"redis_url": redis_server.url, "database_url": postgres_server.url}
        for folder, said in (tmp_path / "file", "is not a directory"), (Path("/proc/govredis"), "cannot be"):
            report = make_gov(**{**urls, "lock_folder": str(folder), **settings}).health.check()
            (locks,) = [check for check in report.checks if check.name == "locks"]
            # With the fallback "fail" locks do without a folder that cannot be written to, by Redis alone.
            status = "pass" if settings.get("lock_fallback") == "fail" and said == "cannot be" else "warn"
            assert (report.status, locks.status) == (status, status)
            assert str(folder) in locks.output
            assert said in locks.output
            assert "locks locks" not in locks.output
            assert "*" not in locks.output

    def test_a_usable_folder_is_not_mentioned_and_left_as_it_was(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, tmp_path: Path
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, lock_folder=str(tmp_path / "mine"))
        assert gov.health.check().status == "pass"
        assert list((tmp_path / "mine").iterdir()) == []


class TestPurge:
    def test_deletes_what_is_older_than_thirty_days(self, gov: GovRedis) -> None:
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots"
            " SELECT 'govredis:health', now() - n * interval '1 day' + interval '1 hour', '{}'"
            " FROM generate_series(27, 33) n"
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

    def test_their_number_and_whether_they_are_published_in_time(self, gov: GovRedis, plain_redis: Any) -> None:
        assert gov.internal.parked is not None
        assert "parked" not in {check.name for check in gov.health.check().checks}
        for run, seconds in (("one", 60), ("two", 0)):
            gov.internal.parked.lot("redis://h:6379/0").park(Arrival(run), seconds, b"{}")
        gov.internal.parked.lot("amqp://h:5672/").park(Arrival("three"), 60, b"{}")
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

    def test_a_parking_server_that_is_away_is_a_warning(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, parking_url=REDIS_AWAY)
        check = gov.health.check().checks[-1]
        assert (check.name, check.status) == ("parked", "warn")
        assert "127.0.0.1:1 is away" in check.output
