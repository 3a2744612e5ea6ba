"""The dashboard on real servers: all that it asks, while they are there and while they are not, and in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import REDIS_AWAY, in_child

from govredis import GovRedis
from govredis.errors import BackendError
from govredis.health.dashboard import Dashboard
from govredis.health.dashboard.view import SPANS, DashboardView
from govredis.testing.servers import PostgresServer, RedisServer

HOUR = SPANS["hour"]
MakeGov = Callable[..., GovRedis]


def dashboard_of(gov: GovRedis, **parts: Any) -> Dashboard:
    """One that never waits for the end of a second, with some parts in the place of its own."""
    own: dict[str, Any] = {"locks": gov.locks.glance, "denied": gov.limits.most_denied, "deadline": 60.0}
    return Dashboard(gov.internal.context, gov.health, gov.internal.account, **{**own, **parts})


def used(gov: GovRedis) -> None:
    """Calls that leave something to see."""
    for _ in range(3):
        gov.limits.hit("agent-1", "1/minute", operation="kg_store")
    gov.metadata.get_or_load("a", lambda _: {"n": 1})
    gov.metadata.get("a")
    gov.limits.close()  # tells the denials now
    gov.internal.account.flush()
    gov.health.snapshot()


def line(view: DashboardView, chart: str, label: str) -> list[float]:
    """The values that are known."""
    (found,) = [each for each in view.charts if each.name == chart]
    (series,) = [each for each in found.series if each.label == label]
    return [value for value in series.values if value is not None]


def test_it_shows_what_all_servers_know(gov: GovRedis) -> None:
    with gov.locks.acquire("report", ttl=60) as held:
        used(gov)
        view = gov.internal.dashboard.view(HOUR)
    assert (view.status, view.headline, view.unknown) == ("pass", "Everything works", ())
    assert view.locks is not None and view.denied is not None and view.snapshots is not None
    assert [(row.name, row.kind) for row in view.locks] == [("report", "lock")]
    assert view.locks[0].since is not None
    assert view.locks[0].since.timestamp() == pytest.approx(held.token / 1e6)
    assert [(row.identity, row.operation, row.times) for row in view.denied] == [("agent-1", "kg_store", 2)]
    assert [row.status for row in view.snapshots] == ["pass"]
    assert [check.name for check in view.checks][:2] == ["redis", "postgres"]
    assert sum(line(view, "hits", "agent_meta")) > 0
    assert line(view, "memory", "used")[0] > 100_000
    assert len(line(view, "latency-redis", "p99")) >= 1
    assert len(line(view, "latency-postgres", "p50")) >= 1


def test_redis_is_away(
    mortal_redis: RedisServer, postgres_server: PostgresServer, make_gov: MakeGov, eventually: Callable[..., Any]
) -> None:
    gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url)
    used(gov)
    mortal_redis.stop()
    for _ in range(3):
        gov.limits.hit("agent-1", "9/minute", operation="kg_store")
    gov.internal.account.flush()
    eventually(lambda: gov.health.check().status == "warn")
    gov.health.snapshot()
    view = gov.internal.dashboard.view(HOUR)
    assert (view.status, view.headline) == ("warn", "Redis is away, and the fallbacks cover it")
    (finding,) = view.findings
    assert finding.since is not None and "PostgreSQL counts limits, exactly" in finding.cover
    assert (view.locks, view.denied) == (None, None)
    assert [name for name, _ in view.unknown] == ["Held locks", "Most denied"]
    assert view.outages is not None and [row.ended for row in view.outages] == [None]
    assert view.snapshots is not None and view.snapshots[0].status == "warn", "PostgreSQL has it"
    assert sum(line(view, "fallbacks", "limits")) > 0


def test_both_are_away(make_gov: MakeGov) -> None:
    gov = make_gov(redis_url=REDIS_AWAY, database_url="postgresql://127.0.0.1:1/x")
    page = gov.internal.dashboard.page().body.decode()
    assert "Redis and PostgreSQL are away" in page
    assert "Unknown now" in page


def test_redis_is_disabled(postgres_server: PostgresServer, make_gov: MakeGov) -> None:
    gov = make_gov(redis_enabled=False, database_url=postgres_server.url)
    assert "Everything works, and Redis is disabled" in gov.internal.dashboard.page().body.decode()


def test_the_charts_keep_what_a_redis_that_is_away_has_told(
    mortal_redis: RedisServer, postgres_server: PostgresServer, make_gov: MakeGov, eventually: Callable[..., Any]
) -> None:
    gov, now = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url), [100.0]
    dashboard = dashboard_of(gov, clock=lambda: now[0])
    gov.health.snapshot()
    assert line(dashboard.view(HOUR), "memory", "used")
    mortal_redis.stop()
    eventually(lambda: gov.health.check().status == "warn")
    now[0] += 60
    view = dashboard.view(HOUR)
    assert view.status == "warn"
    assert line(view, "memory", "used"), "the snapshot was in Redis"
    assert view.snapshots is not None and len(view.snapshots) == 1, "its hour in PostgreSQL is no further snapshot"


@pytest.mark.one_redis
def test_a_history_that_tells_less_while_redis_is_away_takes_nothing_from_the_charts(
    mortal_redis: RedisServer,
    postgres_server: PostgresServer,
    make_gov: MakeGov,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gov, now = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url), [100.0]
    dashboard = dashboard_of(gov, clock=lambda: now[0])
    gov.health.snapshot()
    dashboard.view(HOUR)
    mortal_redis.stop()
    eventually(lambda: gov.health.check().status == "warn")
    monkeypatch.setattr(gov.health, "history", lambda **_: [])
    for _ in range(2):
        now[0] += 60
        view = dashboard.view(HOUR)
        assert view.snapshots is not None and [row.status for row in view.snapshots] == ["pass"]
        assert line(view, "memory", "used")


class TestDeadline:
    @pytest.mark.one_redis
    def test_no_page_waits_longer_and_the_next_shows_what_came_later(
        self, gov: GovRedis, eventually: Callable[..., Any]
    ) -> None:
        gate, entered = threading.Event(), threading.Event()

        def slow() -> list[Any]:
            entered.set()
            assert gate.wait(60)
            return []

        dashboard = dashboard_of(gov, locks=slow, deadline=0.0)
        dashboard.view(HOUR)
        assert entered.wait(60)
        early = dashboard.view(HOUR)
        assert early.headline == "Everything works", "what was told before is shown"
        assert dict(early.unknown) == dict.fromkeys(
            ("Held locks", "Most denied", "Counts", "History"), "no answer within the page's deadline"
        )
        assert (early.locks, early.every) == (None, 5)
        gate.set()
        eventually(lambda: not dashboard.view(HOUR).unknown)
        assert dashboard.view(HOUR).locks == ()

    @pytest.mark.one_redis
    def test_readers_share_a_look_for_a_second(self, gov: GovRedis) -> None:
        now, asked = [100.0], []

        def denied(n: int) -> list[Any]:
            asked.append(n)
            return []

        dashboard = dashboard_of(gov, denied=denied, clock=lambda: now[0])
        for _ in range(3):
            dashboard.view(HOUR)
        assert len(asked) == 1
        now[0] += 1.0
        dashboard.view(HOUR)
        dashboard.view(SPANS["day"])
        assert len(asked) == 3, "another time of the charts is another look"

    @pytest.mark.one_redis
    def test_charts_are_read_anew_as_often_as_a_reader_looks(
        self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now, read = [100.0], []
        history = gov.health.history
        monkeypatch.setattr(gov.health, "history", lambda **span: [read.append(span), *history(**span)][1:])
        dashboard = dashboard_of(gov, clock=lambda: now[0])
        for _ in range(31):
            assert dashboard.view(SPANS["day"]).snapshots is not None
            now[0] += 1.0
        assert [span["points"] for span in read] == [96, 96, 96], "there is nothing yet, every 14 of the 15 seconds"
        gov.health.snapshot()
        for _ in range(2):
            now[0] += 14
            snapshots = dashboard.view(SPANS["day"]).snapshots
            assert snapshots is not None and len(snapshots) == 1
        every, few = (span["points"] for span in read[3:])
        assert every == 96
        assert few <= 2, "steps that have ended do not change; perhaps one ends just now"

    @pytest.mark.one_redis
    def test_a_look_that_never_ends_is_given_up(self, gov: GovRedis) -> None:
        now, gate, asked = [100.0], threading.Event(), []

        def hangs() -> list[Any]:
            asked.append(threading.current_thread())
            assert gate.wait(60)
            return []

        dashboard = dashboard_of(gov, locks=hangs, clock=lambda: now[0], deadline=0.0)
        for seconds in 0, 59, 1:
            now[0] += seconds
            dashboard.view(HOUR)
        gate.set()
        for thread in threading.enumerate():
            if thread.name == "govredis-dashboard":
                thread.join(60)
        assert len(asked) == 2


@pytest.mark.one_redis
def test_an_error_of_a_server_is_shown_without_a_password(
    redis_server: RedisServer, postgres_server: PostgresServer, make_gov: MakeGov
) -> None:
    gov = make_gov(redis_url=redis_server.url.replace("//", "//:zq-secret-9@"), database_url=postgres_server.url)

    def refused() -> list[Any]:
        raise BackendError("not with the password zq-secret-9")

    assert dict(dashboard_of(gov, locks=refused).view(HOUR).unknown)["Held locks"] == "not with the password ***"


@pytest.mark.one_redis
def test_a_fault_of_ours_reaches_the_reader(gov: GovRedis) -> None:
    def broken() -> list[Any]:
        raise LookupError("a fault of ours")

    dashboard = dashboard_of(gov, locks=broken)
    with pytest.raises(LookupError, match="a fault of ours"):
        dashboard.view(HOUR)


@pytest.mark.one_redis
def test_a_forked_child_looks_for_itself(gov: GovRedis) -> None:
    gate, entered = threading.Event(), threading.Event()
    blocked = [True]

    def locks() -> list[Any]:
        if blocked[0]:
            entered.set()
            assert gate.wait(60)
        return []

    dashboard = dashboard_of(gov, locks=locks, deadline=0.0)
    dashboard.view(HOUR)
    assert entered.wait(60)

    def child() -> Any:
        blocked[0], dashboard._deadline = False, 60.0
        return dashboard.view(HOUR).locks

    assert in_child(child) == ()
    gate.set()
