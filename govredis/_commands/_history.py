"""`govredis history` and `govredis outages`: what was."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import click

from ..health import HistoryPoint
from ..health.figures import Outage
from ..health.verdict import is_all_away
from ._invocation import CommandFailed, answer_no, invoked_gov
from ._output import json_option, print_json, print_table, say

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_BARS = "▁▂▃▄▅▆▇█"
#: The values that a person asks for first.
_SHOWN = ("redis.seconds", "redis.used_memory", "redis.connected_clients", "postgres.seconds", "outbox.oldest")


def _instant(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        if found := re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smhd])", value):
            return datetime.fromtimestamp(time.time() - float(found[1]) * _UNITS[found[2]], timezone.utc)
        instant = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:  # before the year 1, too
        instant = None
    if instant is None or instant.tzinfo is None:
        raise click.BadParameter(f"{value!r} must be a time ago, as 90m, 24h or 2d, or ISO 8601 with its zone")
    return instant


@click.command()
@click.option("--since", callback=_instant, default="24h", show_default=True, help="90m, 24h, 2d ago, or ISO 8601.")
@click.option("--until", callback=_instant, help="Likewise; now without it.")
@click.option("--points", type=click.IntRange(1, 1000), default=24, show_default=True, help="How many, at most.")
@click.option("--value", "values", multiple=True, help="A value to show, or the beginning of some; may be repeated.")
@json_option
def history(since: datetime, until: datetime | None, points: int, values: tuple[str, ...], as_json: bool) -> None:
    """Show the health over time, from the snapshots that were kept. Exits with 1 if there are none.

    The time is divided into equal parts, and each with a snapshot gives a point: its worst status, and the mean of each
    value. --value redis.used_memory chooses a value, and --value keys. all that begin so. Without it --json has all.
    """
    with invoked_gov() as gov:
        found = gov.health.history(since, until, points)
    names = sorted({name for point in found for name in point.values})
    chosen = [name for name in names if any(name == each or name.startswith(each) for each in values or _SHOWN)]
    if as_json:
        print_json([_data(point, chosen if values else names) for point in found])
    elif found:
        _print_points(found, chosen)
        for value in values:
            if not any(name.startswith(value) for name in names):
                say(f"no value begins with {value!r}; --json has all names")
    else:
        say("no snapshot was kept in this time: does beat run govredis.health_snapshot?")
    if not found:
        answer_no()


@click.command()
@click.option("--since", callback=_instant, default="30d", show_default=True, help="90m, 24h, 2d ago, or ISO 8601.")
@click.option("--until", callback=_instant, help="Likewise; now without it.")
@json_option
def outages(since: datetime, until: datetime | None, as_json: bool) -> None:
    """Show the outages of Redis and PostgreSQL.

    Shows when they were, how long they took and what they cost, by the word of all processes. They are kept for 30
    days. SERVED is how many calls fallbacks served meanwhile, and SLOWEST the slowest call that got no answer.
    """
    with invoked_gov() as gov:
        servers = [check for check in gov.health.check().checks if check.name in {"redis", "postgres"}]
        away = {check.name: check.output for check in servers if is_all_away(check)}
        if "redis" in away and ("postgres" in away or gov.config.database_url is None):
            raise CommandFailed("; ".join(away.values()))  # nobody knows of others' outages
        now = datetime.now(timezone.utc)
        found = gov.internal.account.outages(since, until or now)
    if as_json:
        print_json([asdict(each) for each in found])
    elif found:
        titles = ("SERVER", "BEGAN", "LASTED", "KIND", "SERVED", "SLOWEST", "NOTICED BY")
        print_table(titles, [_outage_row(each, now) for each in found])
    else:
        say("no outage was noticed in this time")
    if "redis" in away:
        click.echo("Redis is away: outages are shown as far as PostgreSQL knows them", err=True)


def _outage_row(outage: Outage, now: datetime) -> tuple[str, ...]:
    lasted = f"{((outage.ended or now) - outage.began).total_seconds():.1f} s"
    goes_on = ", and it goes on" if outage.ended is None else ""
    cost = str(outage.served), f"{outage.slowest:.3f} s"
    return (
        f"{outage.server} {outage.node}".rstrip(),
        _time(outage.began),
        lasted + goes_on,
        outage.kind,
        *cost,
        outage.noticed_by,
    )


def _data(point: HistoryPoint, names: Sequence[str]) -> dict[str, Any]:
    return {
        "at": point.at,
        "status": point.status,
        "values": {name: point.values[name] for name in names if name in point.values},
    }


def _print_points(points: Sequence[HistoryPoint], names: Sequence[str]) -> None:
    first, last = points[0].at, points[-1].at
    say(f"{len(points)} {'points' if len(points) > 1 else 'point'} from {_time(first)} to {_time(last)}")
    bad = [(_time(point.at), point.status) for point in points if point.status != "pass"]
    if bad:
        say("")
        print_table(("AT", "STATUS"), bad)
    if names:
        say("")
        print_table(("VALUE", "LEAST", "MOST", "LAST", "COURSE"), [_row(name, points) for name in names])


def _row(name: str, points: Sequence[HistoryPoint]) -> tuple[str, ...]:
    """A value: its least, its greatest and its last, and its course, a character for each point."""
    values = [point.values.get(name) for point in points]
    known = [value for value in values if value is not None]
    least, most = min(known), max(known)
    step = (most - least) / (len(_BARS) - 1) or 1.0
    course = "".join("·" if value is None else _BARS[round((value - least) / step)] for value in values)
    return name, *(f"{value:.6g}" for value in (least, most, known[-1])), course


def _time(instant: datetime) -> str:
    return instant.isoformat(sep=" ", timespec="seconds")
