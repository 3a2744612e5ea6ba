"""`govredis limits`."""

from __future__ import annotations

import json
import sys

import click
from click.core import ParameterSource

from ._invocation import invoked_gov, print_table, say

_operation = click.option("--operation", default="default", show_default=True, help="The limited operation.")


@click.group()
def limits() -> None:
    """Show and reset rate limits, and the tasks that wait."""


@limits.command()
@click.argument("identity")
@_operation
def show(identity: str, operation: str) -> None:
    """Show what IDENTITY has used of one operation.

    Shows the windows of --operation, and the backend that has them. Exits with 1 if they are empty.
    """
    with invoked_gov() as gov:
        stats = gov.limits.stats(identity, operation=operation)
    if not stats:
        say(f"{identity} has used nothing of {_named(operation)}, says {stats.backend}")
        sys.exit(1)
    rows = []
    if stats.entries:
        window = "-" if stats.window is None else f"{stats.window:g} s"
        rows.append(("log", window, str(stats.entries), _ago(stats.oldest), _ago(stats.newest)))
    for seconds, count in sorted(stats.counters.items()):
        rows.append(("counter", f"{seconds:g} s", str(count), "-", "-"))
    print_table(("KIND", "WINDOW", "USED", "OLDEST", "NEWEST"), rows)
    say(f"in {stats.backend}")


@limits.command()
@click.option("-n", default=10, show_default=True, type=click.IntRange(1, 1000), help="How many.")
def top(n: int) -> None:
    """Show the identities that were denied most.

    Counts this hour and the hour before.
    """
    with invoked_gov() as gov:
        found = gov.limits.most_denied(n)
    if found:
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
def parked(n: int, flush: bool) -> None:
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
            say(f"{sum(lot.flush() for lot in lots)} will be published now")
            return
        count, rows, aside = 0, [], []
        for lot in lots:
            count += lot.count()
            rows += [(due, [*_described(message), lot.broker]) for due, message in lot.first(n)]
            aside += lot.set_aside()
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
        click.echo("\ncannot be published, and set aside:")
        rows_aside = []
        for one in sorted(aside, key=lambda each: each.due)[:n]:
            entry, why = one.entry.decode(errors="backslashreplace"), one.why
            rows_aside.append((f"{one.due:.1f} s", str(one.tries), _described(one.message)[0], entry, why))
        print_table(("AGAIN IN", "TRIES", "TASK", "ENTRY", "WHY"), rows_aside)


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
