"""`health.history`: the reports of `snapshot` as points over time, whichever server holds them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from support import POSTGRES_AWAY, REDIS_AWAY, redis_of

from govredis import BackendUnavailable, GovRedis
from govredis.health import HistoryPoint
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]

#: The beginning of an hour, in the past.
HOUR = 1_700_000_000 // 3600 * 3600


def report(at: float, status: str = "pass", **checks: dict[str, Any]) -> str:
    """As `snapshot` keeps it."""
    moment = datetime.fromtimestamp(at, timezone.utc).isoformat()
    shown = {name: [{"status": "pass", "output": "", **data}] for name, data in checks.items()}
    return json.dumps({"status": status, "time": moment, "checks": shown})


@pytest.fixture
def in_redis(plain_redis: Any) -> Callable[..., None]:
    def keep(at: float, *args: Any, **checks: Any) -> None:
        plain_redis.xadd("govredis:health", {"report": report(at, *args, **checks)}, id=f"{at * 1000:.0f}")

    return keep


@pytest.fixture
def in_postgres(gov: GovRedis) -> Callable[..., None]:
    def keep(at: float, *args: Any, **checks: Any) -> None:
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots VALUES ('govredis:health', to_timestamp(%s), %s::jsonb)",
            (at, report(at, *args, **checks)),
        )

    return keep


def told(points: list[HistoryPoint]) -> list[tuple[float, str, dict[str, float]]]:
    return [(point.at.timestamp() - HOUR, point.status, point.values) for point in points]


class TestPoints:
    def test_are_what_snapshot_has_kept(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("k", 1)
        report = gov.health.snapshot()
        (point,) = gov.health.history()
        assert point.status == report.status
        assert abs(point.at - report.at) < timedelta(seconds=60)
        assert point.at.utcoffset() == timedelta(0)
        assert point.values["redis.keys"] == report.checks[0].data["keys"] > 0
        assert point.values["redis.used_memory"] == report.checks[0].data["used_memory"]
        assert all(isinstance(value, float) for value in point.values.values())

    def test_both_servers_reports_are_merged_in_order_and_each_counts_once(
        self, gov: GovRedis, in_redis: Callable[..., None], in_postgres: Callable[..., None]
    ) -> None:
        in_redis(HOUR + 10, redis={"keys": 1})
        in_postgres(HOUR + 20, "warn", redis={"keys": 2})
        in_redis(HOUR + 30, redis={"keys": 3})
        in_postgres(HOUR + 30.5, redis={"keys": 5})
        # The reply to XADD was lost, and PostgreSQL has the report too.
        in_redis(HOUR + 40, "fail", redis={"keys": 4})
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots VALUES ('govredis:health', to_timestamp(%s), %s::jsonb)",
            (HOUR + 41, report(HOUR + 40, "fail", redis={"keys": 4})),
        )
        assert told(gov.health.history(HOUR, HOUR + 100, 100)) == [
            (10, "pass", {"redis.keys": 1}),
            (20, "warn", {"redis.keys": 2}),
            (30.5, "pass", {"redis.keys": 4}),
            (40, "fail", {"redis.keys": 4}),
        ]

    def test_are_downsampled_to_the_worst_status_and_the_mean(
        self, gov: GovRedis, in_redis: Callable[..., None], in_postgres: Callable[..., None]
    ) -> None:
        for n, status in enumerate(["pass", "fail", "warn", "pass", "pass", "pass"]):
            in_redis(HOUR + n * 60, status, keys={"session": n, "lock": 1} if n % 2 else {"session": n})
        in_postgres(HOUR + 170, "pass", keys={"session": 100})
        assert told(gov.health.history(HOUR, HOUR + 360, 2)) == [
            (170, "fail", {"keys.session": (0 + 1 + 2 + 100) / 4, "keys.lock": 1}),
            (300, "pass", {"keys.session": 4, "keys.lock": 1}),
        ]
        assert len(gov.health.history(HOUR, HOUR + 360, 1)) == 1
        assert len(gov.health.history(HOUR, HOUR + 360, 1000)) == 7

    def test_since_and_until_bound_them(self, gov: GovRedis, in_redis: Callable[..., None]) -> None:
        for n in range(250):  # more than come in one reply
            in_redis(HOUR + n, redis={"keys": n})

        def keys(since: Any, until: Any) -> list[float]:
            return [point.values["redis.keys"] for point in gov.health.history(since, until, 1000)]

        assert keys(HOUR, HOUR + 249) == list(range(250))
        assert keys(HOUR + 100, HOUR + 110) == list(range(100, 111))
        aware = datetime.fromtimestamp(HOUR + 100, timezone(timedelta(hours=3)))
        assert keys(aware, aware + timedelta(seconds=10)) == list(range(100, 111))
        assert keys(HOUR + 1000, HOUR + 2000) == []

    def test_the_last_day_is_the_default(
        self, gov: GovRedis, in_redis: Callable[..., None], in_postgres: Callable[..., None]
    ) -> None:
        now = time.time()
        in_postgres(now - 86_400 - 600, redis={"keys": 0})
        in_redis(now - 86_400 + 600, redis={"keys": 1})
        in_redis(now - 600, redis={"keys": 2})
        assert [point.values["redis.keys"] for point in gov.health.history()] == [1, 2]
        assert [p.values["redis.keys"] for p in gov.health.history(until=now - 86_400)] == [0]

    def test_many_rows_of_postgres_are_read_in_pages(self, gov: GovRedis) -> None:
        gov.postgres.fetch(
            "INSERT INTO govredis_health_snapshots SELECT 'govredis:health', to_timestamp(%s + n), jsonb_build_object("
            "'status', 'pass', 'time', n::text, 'checks', jsonb_build_object('a', jsonb_build_array("
            "jsonb_build_object('n', n)))) FROM generate_series(0, 249) n",
            (HOUR,),
        )
        points = gov.health.history(HOUR, HOUR + 249, 1000)
        assert [point.values for point in points] == [{"a.n": n} for n in range(250)]

    def test_values_are_all_numbers_by_their_dotted_names(self, gov: GovRedis, in_redis: Callable[..., None]) -> None:
        in_redis(HOUR, celery={"a queue.b": {"depth": 3, "oldest": None}}, outbox={"fresh": True, "of": ["x", 1]})
        (point,) = gov.health.history(HOUR, HOUR + 1)
        assert point.values == {"celery.a queue.b.depth": 3, "outbox.fresh": 1}

    @pytest.mark.parametrize(
        "planted",
        [
            {"report": b"\xff"},
            {"report": "[1]"},
            {"report": "[" * 100_000},
            {"report": '{"status": "bad", "time": "", "checks": {}}'},
            {"report": '{"status": "pass", "time": "", "checks": {"a": []}}'},
            {"report": '{"status": ["pass"], "time": "", "checks": {}}'},
            {"other": "x"},
        ],
    )
    def test_what_govredis_has_not_written_is_passed_over_and_counted(
        self, gov: GovRedis, plain_redis: Any, in_redis: Callable[..., None], planted: dict[str, Any]
    ) -> None:
        in_redis(HOUR)
        plain_redis.xadd("govredis:health", planted, id=f"{HOUR + 1}000")
        in_redis(HOUR + 2, a={"n": 1, "nan": float("nan"), "inf": float("inf"), "huge": 10**400})
        assert told(gov.health.history(HOUR, HOUR + 10)) == [(0, "pass", {}), (2, "pass", {"a.n": 1})]
        assert gov.counters.get("health.unreadable") == 1

    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            ({"since": datetime(2026, 1, 1)}, "with a time zone"),
            ({"until": "yesterday"}, "until is 'yesterday'"),
            ({"since": float("nan")}, "since is nan"),
            ({"since": -1}, "since is -1"),
            ({"until": True}, "until is True"),
            ({"until": 1e12}, "until is 1000000000000.0"),
            ({"since": HOUR, "until": HOUR}, "before until"),
            ({"since": time.time() + 3600}, "before until"),
            ({"points": 0}, "an int from 1 to 1000"),
            ({"points": 1001}, "an int from 1 to 1000"),
            ({"points": 2.5}, "points is 2.5"),
            ({"points": True}, "points is True"),
        ],
    )
    def test_bad_arguments_are_refused_before_anything_is_sent(
        self, make_gov: MakeGov, bad: dict[str, Any], said: str
    ) -> None:
        gov = make_gov(redis_url=REDIS_AWAY)
        with pytest.raises(ValueError, match=said):
            gov.health.history(**bad)
        assert redis_of(gov).breaker.refusals == 0


class TestHours:
    """PostgreSQL keeps each hour."""

    def age(self, gov: GovRedis, hours: int) -> None:
        gov.postgres.fetch(
            "UPDATE govredis_health_hours SET hour = hour - n, last = last - n FROM make_interval(hours => %s) n",
            (hours,),
        )

    def test_outlive_a_redis_that_loses_its_data(self, make_gov: MakeGov, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.mset({"a": 1, "b": 2})
        one = gov.health.snapshot()
        plain_redis.mset({"c": 1, "d": 2})
        gov.health.renew_after_fork()  # what was seen last is forgotten
        two = gov.health.snapshot()
        first = gov.health.history()
        plain_redis.flushall()
        self.age(gov, 3)
        assert [point.status for point in first] == ["pass"]
        (point,) = gov.health.history()
        keys = [report.checks[0].data["keys"] for report in (one, two)]
        assert (point.status, point.values["redis.keys"]) == ("pass", sum(keys) / 2)
        assert keys[1] - keys[0] > 1
        assert abs(point.at - datetime.now(timezone.utc) + timedelta(hours=3)) < timedelta(minutes=10)

    def test_do_not_count_where_a_report_of_the_hour_is_left(
        self, gov: GovRedis, in_redis: Callable[..., None], in_postgres: Callable[..., None]
    ) -> None:
        for hour in range(4):
            gov.postgres.fetch(
                "INSERT INTO govredis_health_hours"
                " VALUES ('govredis:health', to_timestamp(%s), to_timestamp(%s), 1, %s)",
                (HOUR + hour * 3600, HOUR + hour * 3600 + 1800, '{"a.n": [4, 2]}'),
            )
        in_redis(HOUR + 10, a={"n": 1})
        in_postgres(HOUR + 2 * 3600 + 10, a={"n": 1})
        assert told(gov.health.history(HOUR, HOUR + 4 * 3600)) == [
            (10, "pass", {"a.n": 1}),
            (5400, "warn", {"a.n": 0.5}),
            (7210, "pass", {"a.n": 1}),
            (3 * 3600 + 1800, "warn", {"a.n": 0.5}),
        ]

    def test_the_worst_status_of_the_hour_stands(self, make_gov: MakeGov, postgres_server: PostgresServer) -> None:
        """Also of reports that came while Redis was away."""
        gov = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url)
        assert gov.health.snapshot().stored == "postgres"
        other = make_gov(redis_enabled=False, database_url=postgres_server.url)
        assert (other.health.snapshot().status, other.health.snapshot().stored) == ("pass", "postgres")
        other.postgres.fetch("DELETE FROM govredis_health_snapshots")
        (point,) = other.health.history()
        assert point.status == "warn"
        assert point.values["redis.enabled"] == pytest.approx(1 / 3)

    def test_are_added_to_while_redis_keeps_the_reports(self, gov: GovRedis) -> None:
        assert gov.health.snapshot().stored == "redis"
        assert gov.postgres.fetch("SELECT count(*) FROM govredis_health_snapshots") == [(0,)]
        assert gov.postgres.fetch("SELECT worst, sums->'redis.enabled' FROM govredis_health_hours") == [(0, [1, 1.0])]

    def test_are_kept_for_ninety_days(self, gov: GovRedis) -> None:
        for ends in gov.health.purge, gov.health.snapshot:
            gov.postgres.fetch(
                "INSERT INTO govredis_health_hours"
                " SELECT 'govredis:health', now() - n * interval '1 day', now(), 0, '{}'"
                " FROM generate_series(87, 93, 2) n"
            )
            told = ends()
            assert told == 2 or ends == gov.health.snapshot
            days = gov.postgres.fetch(
                "DELETE FROM govredis_health_hours WHERE hour < now() - interval '1 day'"
                " RETURNING extract(day FROM now() - hour)::int"
            )
            assert sorted(days) == [(87,), (89,)]

    def test_that_cannot_be_added_to_are_counted(self, make_gov: MakeGov, redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=POSTGRES_AWAY)
        assert gov.health.snapshot().stored == "redis"
        assert gov.counters.get("health.degraded.hours") == 1
        assert gov.counters.get("health.degraded.snapshots") == 0


class TestOutages:
    def test_the_other_server_s_part_is_the_answer(
        self, make_gov: MakeGov, gov: GovRedis, redis_server: RedisServer, postgres_server: PostgresServer,
        in_redis: Callable[..., None], in_postgres: Callable[..., None],
    ) -> None:  # fmt: skip
        in_redis(HOUR, a={"n": 1})
        in_postgres(HOUR + 10, a={"n": 2})
        for left, *where in (
            (2, REDIS_AWAY, postgres_server.url),
            (1, redis_server.url, POSTGRES_AWAY),
        ):
            half = make_gov(redis_url=where[0], database_url=where[1])
            assert [p.values["a.n"] for p in half.health.history(HOUR, HOUR + 20)] == [left]
            assert half.counters.get("health.degraded.history") == 1
        assert gov.counters.get("health.degraded.history") == 0

    def test_nothing_to_be_had_raises(self, make_gov: MakeGov, gov: GovRedis, postgres_server: PostgresServer) -> None:
        """An empty list says that nothing was kept."""
        assert gov.health.history() == []
        for where in (
            {"redis_url": REDIS_AWAY},
            {"redis_url": REDIS_AWAY, "database_url": POSTGRES_AWAY},
            {"redis_url": REDIS_AWAY, "database_url": postgres_server.url},
        ):
            with pytest.raises(BackendUnavailable, match="1:1 is away"):
                make_gov(**where).health.history()
        assert make_gov(redis_enabled=False).health.history() == []

    def test_another_prefix_has_another_history(self, make_gov: MakeGov, gov: GovRedis) -> None:
        gov.health.snapshot()
        assert make_gov(redis_url=gov.config.redis_url, key_prefix="app:").health.history() == []
        other = make_gov(redis_enabled=False, database_url=gov.config.database_url, key_prefix="app:")
        assert other.health.history() == []
