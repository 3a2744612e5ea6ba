"""`govredis health`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ..client import SentinelClient
from ..health import Check, HealthReport
from ._invocation import answer_no, invoked_gov, until_interrupted
from ._output import json_option, print_json, print_table, say, terminal

#: The figures that a person asks for first, of checks that have many; --json has all.
_FIRST = {
    "redis": ("seconds", "keys", "used_memory", "connected_clients", "times_away"),
    "postgres": ("seconds", "connections", "times_away"),
    "counters": ("hit_ratios.hour", "denials.hour", "fallbacks.hour"),
}
#: Figures of a Cluster's nodes, by their titles.
_TITLES = {
    "SECONDS": "seconds",
    "KEYS": "keys",
    "MEMORY": "used_memory",
    "CLIENTS": "connected_clients",
    "REPLICAS": "connected_slaves",
}
_CLEAR = "\x1b[H\x1b[2J"


@click.command()
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option(
    "--every",
    type=click.FloatRange(1, 3600),
    default=2.0,
    show_default=True,
    help="With --watch: seconds between two looks.",
)
@json_option
def health(watch: bool, every: float, as_json: bool) -> None:
    """Show the health report. Exits with 1 if it says fail.

    With --watch, it is the last report that decides. With --json besides, each report is a line.
    """
    report: HealthReport | None = None
    with invoked_gov() as gov, until_interrupted(watch):
        redis = gov.internal.context.redis
        if isinstance(redis, SentinelClient):
            redis.ask_sentinels()  # a new process knows nothing of them yet
        while True:
            report = gov.health.check()
            if as_json:
                print_json(report.as_dict(), line=watch)
            else:
                _print_report(report, anew=watch)
            if not watch:
                break
            time.sleep(every)
    if report is None or report.status == "fail":
        answer_no()


def _print_report(report: HealthReport, *, anew: bool) -> None:
    if anew and terminal() is not None:
        click.echo(_CLEAR, nl=False)
    say(f"{report.status} at {report.at.isoformat(timespec='seconds')}")
    say("")
    print_table(("CHECK", "STATUS", "OUTPUT"), [(each.name, each.status, _shown(each)) for each in report.checks])
    nodes = [node for check in report.checks for node in check.data.get("nodes", ())]
    if nodes:
        say("")
        print_table(("NODE", "STATUS", *_TITLES), [_node(each) for each in nodes])
    if anew and terminal() is None:
        say("")


def _node(each: Mapping[str, Any]) -> tuple[str, ...]:
    figures = (each.get(name) for name in _TITLES.values())
    return each["address"], each["status"], *("-" if value is None else _number(value) for value in figures)


def _shown(check: Check) -> str:
    """The words of a check. Where it has none, its figures."""
    if check.output:
        return check.output
    names = _FIRST.get(check.name, tuple(check.data))
    found = (figure for name in names for figure in _figures(name, _at(name, check.data)))
    words = [f"{name} {_number(value)}" for name, value in found]
    source = check.data.get("source", "redis")
    return ", ".join(words if source == "redis" else [*words, f"as far as {source} knows"])


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"


def _at(name: str, data: Mapping[str, Any]) -> Any:
    """The value of that name, which leads into mappings by its dots; None where there is none."""
    if name in data:
        return data[name]
    value: Any = data
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _figures(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for inner in value:
            yield from _figures(f"{name}.{inner}", value[inner])
    elif isinstance(value, int | float):
        yield name, value
