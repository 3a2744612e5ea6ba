"""The view of the dashboard, by the report, the account and the history."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from govredis import Config
from govredis.health import Check, HealthReport, HistoryPoint
from govredis.health.dashboard.compose import began_of, compose
from govredis.health.dashboard.told import Told
from govredis.health.dashboard.view import SPANS, DashboardView
from govredis.health.figures import BOUNDS, Latency, Minute, Outage
from govredis.locks import LockHolder

NOW = datetime(2026, 11, 30, 14, 23, 30, tzinfo=timezone.utc)
HOUR = SPANS["hour"]
POSTGRES = Config(database_url="postgresql://u@127.0.0.1/x")
REDIS, POSTGRES_CHECK = (
    Check("redis", "pass", "", {"enabled": True}),
    Check("postgres", "pass", "", {"configured": True}),
)


def ago(**since: float) -> datetime:
    return NOW - timedelta(**since)


def a_report(*checks: Check) -> HealthReport:
    statuses = [check.status for check in checks]
    return HealthReport(next((s for s in ("fail", "warn") if s in statuses), "pass"), checks, NOW)  # type: ignore[arg-type]


def shown(config: Config = POSTGRES, span: Any = HOUR, **told: Any) -> DashboardView:
    told = {"report": a_report(REDIS, POSTGRES_CHECK), "outages": [], "minutes": [], "points": [], **told}
    return compose(config, span, NOW, Told(**told))


def values(view: DashboardView, name: str) -> dict[str, list[float | None]]:
    (chart,) = [chart for chart in view.charts if chart.name == name]
    return {line.label: list(line.values) for line in chart.series}


def away(name: str, status: Any = "warn", **data: Any) -> Check:
    return Check(name, status, "it does not answer", {"configured": True, "away_for": 20.0, **data})


def test_an_outage_is_told_with_its_begin_and_its_cover() -> None:
    outage = Outage("redis", ago(seconds=95), None, "hung", "web-1:7", 15234, 0.2)
    view = shown(report=a_report(away("redis"), POSTGRES_CHECK), outages=[outage])
    assert (view.status, view.headline) == ("warn", "Redis is away, and the fallbacks cover it")
    assert view.since == outage.began
    (finding,) = view.findings
    assert (finding.since, finding.page) == (outage.began, "docs/troubleshooting.md")
    assert "PostgreSQL counts limits, exactly. A lock has one holder on each host" in finding.cover
    assert [(band.label, band.began, band.ended) for band in view.bands] == [("Redis hung, goes on", outage.began, NOW)]
    assert view.outages is not None and view.outages[0].served == 15234


def test_a_part_of_a_cluster_is_told_as_a_part() -> None:
    nodes: list[dict[str, Any]] = [
        {"address": f"10.0.0.{n}:6379", "status": "pass", "seconds": 0.001, "keys": 1234} for n in range(3)
    ]
    nodes[1] = {"address": "10.0.0.1:6379", "status": "warn", "away_for": 20.0}
    outage = Outage("redis", ago(seconds=95), None, "hung", "web-1:7", 3, 0.2, "10.0.0.1:6379")
    view = shown(report=a_report(away("redis", nodes=nodes), POSTGRES_CHECK), outages=[outage])
    assert view.headline == "1 of 3 primaries of Redis is away, and the fallbacks cover it"
    assert view.findings[0].cover.endswith("That is for the keys of these primaries alone: all others are served.")
    assert [(row.address, row.status, row.figures[:2]) for row in view.nodes] == [
        ("10.0.0.0:6379", "pass", ("1 ms", "1,234")),
        ("10.0.0.1:6379", "warn", (None, None)),
        ("10.0.0.2:6379", "pass", ("1 ms", "1,234")),
    ]
    assert view.outages is not None and view.outages[0].server == "Redis 10.0.0.1:6379"
    assert not any(name.startswith("nodes") for row in view.checks for name, _ in row.facts)
    nodes[2] = {**nodes[1], "address": "10.0.0.2:6379"}
    assert shown(report=a_report(away("redis", nodes=nodes), POSTGRES_CHECK)).headline.startswith("2 of 3 primaries of")
    nodes[0] = {**nodes[1], "address": "10.0.0.0:6379"}
    assert shown(report=a_report(away("redis", nodes=nodes), POSTGRES_CHECK)).headline.startswith("Redis is away")


def test_the_cover_goes_by_the_settings_and_by_postgres() -> None:
    strict = Config(lock_fallback="fail", limit_fallback="deny")
    (finding,) = shown(strict, report=a_report(away("redis", "fail"))).findings
    assert finding.cover.startswith(
        "Limits refuse everything. Nobody gets a lock. Each process knows only the sessions"
    )
    assert finding.since == NOW - timedelta(seconds=20), "there is no record of the outage"
    both = shown(report=a_report(away("redis", "fail"), away("postgres", "fail")))
    assert both.headline == "Redis and PostgreSQL are away"
    assert both.findings[0].cover.startswith("Each process counts limits for itself")


@pytest.mark.parametrize(
    ("checks", "headline"),
    [
        ((REDIS, POSTGRES_CHECK), "Everything works"),
        ((Check("redis", "pass", "disabled", {"enabled": False}),), "Everything works, and Redis is disabled"),
        ((REDIS, Check("beat", "warn", "", {})), "beat needs a look"),
        ((Check("beat", "warn", "", {}), Check("outbox", "warn", "", {})), "beat, outbox need a look"),
        ((Check("beat", "warn", "", {}), Check("postgres", "fail", "", {"configured": True})), "postgres fails"),
        ((REDIS, away("postgres")), "PostgreSQL is away, and the fallbacks cover it"),
    ],
)
def test_headlines(checks: tuple[Check, ...], headline: str) -> None:
    assert shown(report=a_report(*checks)).headline == headline


def test_the_worst_finding_comes_first() -> None:
    view = shown(
        report=a_report(REDIS, Check("beat", "warn", "", {}), Check("postgres", "fail", "", {"configured": True}))
    )
    assert [finding.name for finding in view.findings] == ["postgres", "beat"]


def test_since_when_something_is_wrong_is_in_the_history() -> None:
    def point(minutes: float, status: Any) -> HistoryPoint:
        return HistoryPoint(ago(minutes=minutes), status, {})

    warns = a_report(Check("beat", "warn", "", {}))
    points = [point(9, "warn"), point(5, "pass"), point(4, "warn"), point(2, "fail")]
    assert shown(report=warns, points=points).since == ago(minutes=4)
    assert shown(report=warns).since is None
    assert shown(points=points).since is None, "all is well now"


def test_nothing_told_is_unknown() -> None:
    view = compose(POSTGRES, HOUR, NOW, Told(unknown={"Health": "late"}))
    assert (view.status, view.headline) == ("fail", "The state is unknown")
    assert (view.locks, view.denied, view.outages, view.snapshots) == (None, None, None, None)
    assert {chart.unknown for chart in view.charts} == {
        "Unknown now: the account cannot be read.",
        "Unknown now: the history cannot be read.",
    }
    assert view.unknown == (("Health", "late"),)


def test_an_empty_installation() -> None:
    view = shown()
    assert (view.status, view.findings, view.snapshots, view.unknown) == ("pass", (), (), ())
    assert {chart.unknown for chart in view.charts if chart.is_empty} == {
        *("No calls in this time.", "No snapshots in this time.", "None in this time."),
    }
    assert [chart.name for chart in view.charts if not chart.is_empty] == ["status"], "the report has one"


class TestSteps:
    """The charts of an hour have steps of a minute. The last goes on."""

    @staticmethod
    def minute(ago_: int, *, redis: Latency | None = None, **counts: int) -> Minute:
        at = NOW.replace(second=0) - timedelta(minutes=ago_)
        named = {name.replace("__", "."): count for name, count in counts.items()}
        return Minute(at, named, {} if redis is None else {"redis": redis})

    def test_they_begin_at_whole_minutes_and_hours(self) -> None:
        assert began_of(HOUR, NOW) == datetime(2026, 11, 30, 13, 24, tzinfo=timezone.utc)
        assert began_of(SPANS["week"], NOW) == datetime(2026, 11, 23, 16, tzinfo=timezone.utc)
        assert [len(shown(span=span).times()) for span in SPANS.values()] == [60, 96, 84]

    def test_rates_are_per_minute(self) -> None:
        minutes = [self.minute(4, limits__denied=6), self.minute(2, other=1), self.minute(0, limits__denied=6)]
        denied = values(shown(minutes=minutes), "denied")["denied"]
        assert denied[54:] == [None, 6.0, 0.0, 0.0, 0.0, 12.0], "half a minute has passed of the last"
        by_day = values(shown(minutes=minutes, span=SPANS["day"]), "denied")["denied"]
        assert by_day[-1] == pytest.approx(12 / 8.5), "since 14:15"
        early = compose(POSTGRES, HOUR, NOW - timedelta(seconds=25), Told(minutes=minutes))
        assert values(early, "denied")["denied"][-1] is None, "a few seconds tell no rate"
        first = compose(POSTGRES, HOUR, NOW - timedelta(seconds=25), Told(minutes=minutes[2:]))
        assert values(first, "denied")["denied"][-1] == 36.0, "unless there is nothing else to show"

    def test_ratios(self) -> None:
        minutes = [
            self.minute(1, agent_meta__hits=3, agent_meta__misses=1, sessions__hits=9),
            self.minute(0, agent_meta__misses=2),
        ]
        found = values(shown(minutes=minutes), "hits")
        assert list(found) == ["sessions", "agent_meta"], "the busiest first"
        assert found["agent_meta"][-3:] == [None, 0.75, 0.0]
        assert found["sessions"][-3:] == [None, 1.0, None]

    def test_latencies_of_a_step_are_added_up(self) -> None:
        def latency(bucket: int, count: int) -> Latency:
            return Latency(count, 1.0, tuple(count * (n == bucket) for n in range(len(BOUNDS) + 1)))

        minutes = [self.minute(1, redis=latency(2, 99)), self.minute(0, redis=latency(5, 1))]
        found = values(shown(minutes=minutes, span=SPANS["day"]), "latency-redis")
        assert found["p50"][-1] == (latency(2, 99) + latency(5, 1)).quantile(0.5)
        assert found["p99"][-2] is None

    def test_fallbacks_are_of_all_kinds_of_a_feature(self) -> None:
        minutes = [self.minute(1, limits__degraded__postgres=2, limits__degraded__local=3, limits__allowed=9)]
        assert values(shown(minutes=minutes), "fallbacks")["limits"][-2] == 5.0

    def test_figures_of_snapshots(self) -> None:
        figures = {
            "keys.session": 7.0, "keys.lock": 1.0, "redis.used_memory": 6e6, "redis.maxmemory": 0.0,
            "celery.mails.depth": 4.0, "celery.mails.read": 1.0, "census.age": 3.0,
        }  # fmt: skip
        view = shown(points=[HistoryPoint(ago(seconds=70), "warn", figures)])
        assert {label: line[-2] for label, line in values(view, "keys").items()} == {"session": 7.0, "lock": 1.0}
        assert {label: line[-2] for label, line in values(view, "memory").items()} == {"used": 6e6}
        assert {label: line[-2] for label, line in values(view, "queues").items()} == {"mails": 4.0}
        assert values(view, "status")["worst"][-3:] == [None, 1, 0]
        assert view.snapshots is not None and view.snapshots[0].status == "warn"

    def test_the_state_of_a_step_is_the_worst_in_it(self) -> None:
        view = shown(points=[HistoryPoint(ago(seconds=20), "warn", {}), HistoryPoint(ago(seconds=10), "pass", {})])
        assert values(view, "status")["worst"][-1] == 1

    def test_a_week_shows_what_the_snapshots_say_of_the_days_that_the_account_has_not(self) -> None:
        figures = {
            "counters.hit_ratios.hour.agent_meta": 0.5, "counters.hit_ratios.hour.report": 0.25,
            "counters.denials.hour": 120.0, "counters.lock_waits.hour": 6.0,
            "counters.fallbacks.hour.limits": 60.0, "counters.latencies.hour.redis.p50": 0.002,
        }  # fmt: skip
        points = [HistoryPoint(ago(days=2), "pass", figures), HistoryPoint(ago(hours=3), "pass", figures)]
        minutes = [self.minute(180, limits__denied=240, agent_meta__hits=1)]
        view = shown(span=SPANS["week"], points=points, minutes=minutes)

        def known(name: str, label: str) -> list[float]:
            return [value for value in values(view, name)[label] if value is not None]

        assert known("denied", "denied")[:2] == [2.0, 2.0], "240 in two hours"
        assert known("hits", "agent_meta") == [0.5, 1.0]
        assert known("locks", "waits")[0] == pytest.approx(0.1)
        assert known("fallbacks", "limits")[:2] == [1.0, 0.0]
        assert known("latency-redis", "p50") == [0.002]
        assert known("hits", "report") == [0.25]
        view = shown(points=[HistoryPoint(ago(minutes=3), "pass", figures)])
        assert [known("denied", "denied"), known("latency-redis", "p50")] == [[], []], (
            "the account has this hour, and no calls in it"
        )

    def test_the_report_is_the_last_point(self) -> None:
        redis = Check("redis", "pass", "", {"used_memory": 7, "redis_version": "7.2", "maxmemory": 9})
        report = a_report(
            redis, Check("keys", "pass", "", {"session": 3}), Check("celery", "warn", "", {"q": {"depth": 2}})
        )
        view = shown(report=report)
        assert {label: line[-1] for label, line in values(view, "memory").items()} == {"used": 7.0, "most": 9.0}
        assert [values(view, name) for name in ("keys", "queues", "status")] == [
            {"session": [None] * 59 + [3.0]}, {"q": [None] * 59 + [2.0]}, {"worst": [None] * 59 + [1.0]},
        ]  # fmt: skip
        assert view.snapshots == (), "it is not stored"


def test_the_slowest_command_is_named() -> None:
    redis = Check("redis", "pass", "", {"slowest_command": "KEYS", "slowest_seconds": 0.012})
    assert (
        shown(report=a_report(redis)).about_outages == "Redis's slowest command of the last ten minutes: KEYS, 12 ms."
    )
    assert shown().about_outages == ""


class TestLocks:
    @staticmethod
    def of(*holders: LockHolder) -> list[tuple[str, str, datetime | None]]:
        rows = shown(locks=list(holders)).locks
        assert rows is not None
        return [(row.name, row.owner, row.since) for row in rows]

    def test_a_token_tells_since_when_and_an_owner_by_which_process(self) -> None:
        token = int(ago(hours=3).timestamp() * 1e6)
        ours = LockHolder("report", "lock", "web-1:4121:0123456789ab-7", token, 20.0)
        newer = LockHolder("mail", "semaphore", "semaphore:web-2:7:0123456789ab-1~3", token + 10**6, 20.0)
        theirs = LockHolder("x", "lock", "worker:7", None, None)
        assert self.of(theirs, newer, ours) == [
            ("report", "web-1, process 4121", ago(hours=3)),
            ("mail", "web-2, process 7", ago(hours=3) + timedelta(seconds=1)),
            ("x", "worker:7", None),
        ]

    def test_a_token_that_is_no_time_tells_nothing(self) -> None:
        a_year_on = int((NOW + timedelta(days=365)).timestamp() * 1e6)
        assert self.of(LockHolder("a", "lock", "o", a_year_on, 1.0)) == [("a", "o", None)]

    def test_the_oldest_are_shown(self) -> None:
        view = shown(locks=[LockHolder(str(n), "lock", "o", n + 1, 1.0) for n in range(30)])
        assert view.locks is not None
        assert [row.name for row in view.locks] == [str(n) for n in range(20)]
        assert view.about_locks == "The oldest 20 of 30."
