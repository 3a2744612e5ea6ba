"""`govredis limits`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from ..limits.backends.backend import WindowStats
from ..limits.parked import SetAside
from ._invocation import answer_no, invoked_gov
from ._output import json_option, print_json, print_table, say

_operation = click.option("--operation", default="default", show_default=True, help="The limited operation.")


@click.group()
def limits() -> None:
    """Show and reset rate limits, and the tasks that wait."""


@limits.command()
@click.argument("identity")
@_operation
@json_option
def show(identity: str, operation: str, as_json: bool) -> None:
    """Show what IDENTITY has used of one operation.

    Shows the windows of --operation, and the backend that has them. Exits with 1 if they are empty.
    """
    with invoked_gov() as gov:
        stats = gov.limits.stats(identity, operation=operation)
    if as_json:
        counters = [{"window": window, "count": count} for window, count in sorted(stats.counters.items())]
        print_json({**asdict(stats), "counters": counters})
    elif stats:
        _print_stats(stats)
    else:
        say(f"{identity} has used nothing of {_named(operation)}, says {stats.backend}")
    if not stats:
        answer_no()


@limits.command()
@click.option("-n", default=10, show_default=True, type=click.IntRange(1, 1000), help="How many.")
@json_option
def top(n: int, as_json: bool) -> None:
    """Show the identities that were denied most.

    Counts this hour and the hour before.
    """
    with invoked_gov() as gov:
        found = gov.limits.most_denied(n)
    if as_json:
        print_json([d._asdict() for d in found])
    elif found:
        print_table(("DENIED", "IDENTITY", "OPERATION"), [(str(d.times), d.identity, d.operation) for d in found])
    else:
        say("nobody was denied")


@limits.command()
@click.argument("identity")
@_operation
def reset(identity: str, operation: str) -> None:
    """Forget what IDENTITY has used of one operation."""
    with invoked_gov() as gov:
        gov.limits.reset(identity, operation=operation)
    say(f"{identity} is reset for {_named(operation)}")


@limits.command()
@click.option("-n", default=20, show_default=True, type=click.IntRange(1, 10_000), help="How many to show.")
@click.option("--flush", is_flag=True, help="Publish all of them now; the limits decide anew.")
@json_option
def parked(n: int, flush: bool, as_json: bool) -> None:
    """Show the Celery tasks that wait for their limits.

    The next due comes first.

    With --flush, workers publish all of them now, and the limits decide anew: use it after a limit was raised or reset.
    A task that finds no room waits again, in its old place. To drop a task, revoke it by its id.

    A task that cannot be published is set aside, and tried again now and then. It is listed a second time, with the
    reason. Once that is mended, --flush has it tried at once.
    """
    with invoked_gov() as gov:
        lots = gov.internal.parked.lots() if gov.internal.parked is not None else []
        if flush:
            flushed = sum(lot.flush() for lot in lots)
            if as_json:
                print_json({"flushed": flushed})
            else:
                say(f"{flushed} will be published now")
            return
        count, rows, aside = 0, [], list[SetAside]()
        for lot in lots:
            count += lot.count()
            rows += [(due, [*_described(message), lot.broker]) for due, message in lot.first(n)]
            aside += lot.set_aside()
    if as_json:
        print_json(_parked_data(count, sorted(rows)[:n], sorted(aside, key=lambda each: each.due)[:n]))
        return
    if not count:
        say("nothing is parked")
        return
    shown = sorted(rows)[:n]
    print_table(
        ("DUE IN", "TASK", "ID", "IDENTITY", "OPERATION", "BROKER"), [(f"{due:.1f} s", *cells) for due, cells in shown]
    )
    if count > len(shown):
        say(f"and {count - len(shown)} more")
    if aside:
        say("")
        say("cannot be published, and set aside:")
        rows_aside = []
        for one in sorted(aside, key=lambda each: each.due)[:n]:
            rows_aside.append((f"{one.due:.1f} s", str(one.tries), _described(one.message)[0], _entry(one), one.why))
        print_table(("AGAIN IN", "TRIES", "TASK", "ENTRY", "WHY"), rows_aside)


def _print_stats(stats: WindowStats) -> None:
    rows = []
    if stats.entries:
        window = "-" if stats.window is None else f"{stats.window:g} s"
        rows.append(("log", window, str(stats.entries), _ago(stats.oldest), _ago(stats.newest)))
    for seconds, count in sorted(stats.counters.items()):
        rows.append(("counter", f"{seconds:g} s", str(count), "-", "-"))
    print_table(("KIND", "WINDOW", "USED", "OLDEST", "NEWEST"), rows)
    say(f"in {stats.backend}")


def _parked_data(count: int, shown: list[tuple[float, list[str]]], aside: list[SetAside]) -> dict[str, Any]:
    names = "task", "id", "identity", "operation", "broker"
    return {
        "count": count,
        "parked": [{"due": due, **dict(zip(names, cells, strict=True))} for due, cells in shown],
        "set_aside": [
            {"due": each.due, "tries": each.tries, "task": _described(each.message)[0], "entry": _entry(each)}
            | {"why": each.why}
            for each in aside
        ],
    }


def _entry(aside: SetAside) -> str:
    return aside.entry.decode(errors="backslashreplace")


def _named(operation: str) -> str:
    """The operation in words. An operation that nobody chose comes with the option that chooses one."""
    chosen = click.get_current_context().get_parameter_source("operation") is not ParameterSource.DEFAULT
    return f"operation {operation!r}" + ("" if chosen else " (--operation names another)")


def _described(message: bytes) -> list[str]:
    """Task, id, identity and operation; "?" for each that is not there."""
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        found = None
    found = found if isinstance(found, dict) else {}
    limit = found.get("limit")
    limit = limit if isinstance(limit, dict) else {}
    cells = (found.get("task"), found.get("id"), limit.get("identity"), limit.get("operation"))
    return [cell if isinstance(cell, str) else "?" for cell in cells]


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s ago" if seconds >= 0 else f"in {-seconds:.1f} s"
