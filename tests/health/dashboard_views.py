"""A DashboardView for tests of the page: an outage, some locks, some denials. Each test changes what it is about."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from govredis.health.dashboard import texts
from govredis.health.dashboard.charts import Band, Chart, Series
from govredis.health.dashboard.view import (
    SPANS,
    CheckRow,
    DashboardView,
    DeniedRow,
    Fault,
    LockRow,
    OutageRow,
    SnapshotRow,
)

NOW = datetime(2026, 11, 30, 14, 23, 5, tzinfo=timezone.utc)
BEGAN = datetime(2026, 11, 30, 13, 24, tzinfo=timezone.utc)


def ago(**since: float) -> datetime:
    return NOW - timedelta(**since)


def a_view(**changes: Any) -> DashboardView:
    steps = [0.001 * (n + 1) for n in range(60)]
    latencies = Series("p50", steps), Series("p99", steps)
    view = DashboardView(
        at=NOW,
        prefix="shop:",
        span=SPANS["hour"],
        status="warn",
        headline="Redis is away, and the fallbacks cover it",
        since=ago(seconds=95),
        findings=(
            Fault("redis", "warn", "it does not answer", ago(seconds=95), "Locks go on.", "Start it.", "docs/a.md"),
        ),
        checks=(CheckRow("redis", "warn", "it does not answer", (("used_memory", "6 MiB"),)),),
        began=BEGAN,
        ended=BEGAN + timedelta(hours=1),
        bands=(Band("Redis hung, goes on", ago(seconds=95), None),),
        charts=(
            Chart("latency-redis", "Redis latency", texts.seconds, latencies, log=1e-6),
            Chart("queues", "Queues of Celery", texts.number, (), unknown="No queue is known."),
        ),
        locks=(
            LockRow("report", "lock", "web-1, process 7", ago(hours=3), 20.0),
            LockRow("x", "lock", "e2", None, None),
        ),
        denied=(DeniedRow("agent-1", "kg_store", 1234),),
        outages=(OutageRow("Redis", "hung", ago(seconds=95), None, "web-1:7", 15234, 0.2),),
        snapshots=(SnapshotRow(ago(minutes=1), "pass"),),
        about_outages="Redis's slowest command of the last ten minutes: KEYS, 12 ms.",
        about_locks="",
        about_snapshots="",
        unknown=(("Held locks", "Redis is away"),),
    )
    return replace(view, **changes)
