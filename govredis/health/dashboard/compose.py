"""A DashboardView of what the servers have told: reports, counts, outages, points of the history."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from ...config import Config
from .. import verdict
from ..history import HistoryPoint
from ..report import Check, HealthReport, Status
from . import guide, texts
from .charts import Band
from .curves import SERVERS, Steps, charts_of
from .told import Told
from .view import (
    CheckRow,
    DashboardView,
    DeniedRow,
    Fault,
    LockRow,
    NodeRow,
    OutageRow,
    SnapshotRow,
    Span,
)

if TYPE_CHECKING:
    from ...locks import LockHolder
    from ..figures import Outage

_ROWS = 20
_MINUTE = 60
_SNAPSHOTS = 8
#: An owner token of ours: host, process id and a nonce.
_OWNER = re.compile(r"(?:read:|write:|semaphore:)?([^:]+):(\d+):[0-9a-f]{12}-\d+(?:~[0-9a-f]+)?")


def began_of(span: Span, now: datetime) -> datetime:
    """The beginning of the charts. Their steps begin at whole minutes or hours: no look moves a value to another."""
    ended = (int(now.timestamp()) // span.step + 1) * span.step
    return datetime.fromtimestamp(ended - span.seconds, timezone.utc)


def compose(config: Config, span: Span, now: datetime, told: Told) -> DashboardView:
    began = began_of(span, now)
    ended = began + timedelta(seconds=span.seconds)
    checks = () if told.report is None else told.report.checks
    status: Status = "fail" if told.report is None else told.report.status
    outages = told.outages or []
    shown = sorted(outages, key=lambda each: each.began, reverse=True)
    locks = sorted(told.locks or (), key=lambda each: each.token or float("inf"))
    points = None if told.points is None else [point for point in told.points if point.at >= began]
    shown_points = [*(points or ()), *(() if told.report is None else (_point(told.report),))]
    return DashboardView(
        at=now if told.report is None else told.report.at,
        prefix=config.key_prefix,
        span=span,
        status=status,
        headline="The state is unknown" if told.report is None else guide.headline(checks, status),
        since=_since(status, now, outages, points or ()),
        findings=tuple(_findings(config, checks, outages, now)),
        checks=tuple(CheckRow(c.name, c.status, c.output, tuple(_facts(c.data))) for c in checks),
        began=began,
        ended=ended,
        bands=tuple(Band(_in_words(each), each.began, each.ended or now) for each in outages),
        charts=tuple(charts_of(Steps(span, began, now), told, shown_points)),
        locks=None if told.locks is None else tuple(_lock(each, now) for each in locks[:_ROWS]),
        denied=None if told.denied is None else tuple(DeniedRow(*each) for each in told.denied),
        outages=None if told.outages is None else tuple(_outage(each) for each in shown[:_ROWS]),
        snapshots=None
        if points is None
        else tuple(SnapshotRow(each.at, each.status) for each in reversed(points[-_SNAPSHOTS:])),
        about_locks=f"The oldest {_ROWS} of {len(locks)}." if len(locks) > _ROWS else "",
        about_snapshots=""
        if span.step <= _MINUTE
        else f"The worst status of each {texts.duration(span.step)}, and the time of its last snapshot.",
        about_outages=_slowest(checks),
        unknown=tuple(told.unknown.items()),
        nodes=tuple(_node(each) for check in checks for each in check.data.get("nodes", ())),
    )


# -- the state ---------------------------------------------------------------------------------------------------


def _findings(config: Config, checks: Sequence[Check], outages: Iterable[Outage], now: datetime) -> Iterator[Fault]:
    """The faults, the worst first."""
    postgres_away = any(check.name == "postgres" and verdict.is_away(check) for check in checks)
    wrong = [check for check in checks if check.status != "pass"]
    for check in sorted(wrong, key=lambda each: each.status != "fail"):
        since = next((each.began for each in outages if each.server == check.name and each.ended is None), None)
        if since is None and verdict.is_away(check):
            since = now - timedelta(seconds=check.data["away_for"])
        todo, page = guide.remedy(check)
        cover = guide.cover(check, config, postgres_away=postgres_away)
        yield Fault(check.name, check.status, check.output, since, cover, todo, page)


def _since(status: Status, now: datetime, outages: Iterable[Outage], points: Sequence[HistoryPoint]) -> datetime | None:
    """Since when something is wrong: by the history, or by an outage that it does not know of yet."""
    if status == "pass":
        return None
    found = [each.began for each in outages if each.ended is None]
    for point in reversed(points):
        if point.status == "pass":
            break
        found.append(point.at)
    return min(found, default=None)


def _slowest(checks: Sequence[Check]) -> str:
    """The slowest command of Redis, in words; "" where none was slow."""
    for check in checks:
        command, seconds = check.data.get("slowest_command"), check.data.get("slowest_seconds")
        if check.name == "redis" and command is not None and isinstance(seconds, int | float):
            return f"Redis's slowest command of the last ten minutes: {command}, {texts.seconds(seconds)}."
    return ""


def _facts(data: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        full = f"{within}{name}"
        if name == "nodes":
            continue  # they have a table of their own
        if isinstance(value, dict):
            yield from _facts(value, f"{full}.")
        else:
            yield full, texts.fact(full, value)


def _point(report: HealthReport) -> HistoryPoint:
    """The report as the history would have it: a chart ends now, and not with the last snapshot."""
    values = {f"{check.name}.{name}": value for check in report.checks for name, value in _numbers(check.data)}
    return HistoryPoint(report.at, report.status, values)


def _numbers(data: dict[str, Any], within: str = "") -> Iterator[tuple[str, float]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{within}{name}.")
        elif isinstance(value, int | float):
            yield f"{within}{name}", float(value)


# -- the tables --------------------------------------------------------------------------------------------------


def _lock(holder: LockHolder, now: datetime) -> LockRow:
    ours = _OWNER.fullmatch(holder.owner)
    owner = f"{ours[1]}, process {ours[2]}" if ours else holder.owner
    return LockRow(holder.name, holder.kind, owner, holder.since_at(now.timestamp()), holder.remaining)


#: As NODE_FIGURES, by their names in the report.
_OF_NODE: dict[str, texts.Unit] = {
    "seconds": texts.seconds,
    "keys": texts.number,
    "used_memory": texts.size,
    "connected_clients": texts.number,
    "instantaneous_ops_per_sec": texts.number,
    "connected_slaves": texts.number,
}


def _node(each: dict[str, Any]) -> NodeRow:
    figures = (unit(each[name]) if name in each else None for name, unit in _OF_NODE.items())
    return NodeRow(each["address"], each["status"], tuple(figures))


def _outage(each: Outage) -> OutageRow:
    return OutageRow(_server(each), each.kind, each.began, each.ended, each.noticed_by, each.served, each.slowest)


def _in_words(outage: Outage) -> str:
    lasted = "goes on" if outage.ended is None else f"for {texts.duration(outage.ended - outage.began)}"
    return f"{_server(outage)} {outage.kind}, {lasted}"


def _server(outage: Outage) -> str:
    return f"{SERVERS[outage.server]} {outage.node}".rstrip()
