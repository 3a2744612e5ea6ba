"""`govredis limits`."""

from __future__ import annotations

import json
import sys

import click

from ._invocation import invoked_gov, print_table, printable

_operation = click.option("--operation", default="default", show_default=True, help="What is limited.")


@click.group()
def limits() -> None:
    """Show and reset what stands in the windows of rate limits, whom they refuse most, and what waits for them."""


@limits.command()
@click.argument("identity")
@_operation
def show(identity: str, operation: str) -> None:
    """Show what stands in the windows of IDENTITY, and in which store. Exits with 1 if nothing does."""
    with invoked_gov() as gov:
        standing = gov.limits.standing(identity, operation=operation)
    if not standing:
        click.echo(f"{identity} has used nothing of its limits, says {standing.backend}")
        sys.exit(1)
    rows = []
    if standing.entries:
        window = "-" if standing.window is None else f"{standing.window:g} s"
        rows.append(("log", window, str(standing.entries), _ago(standing.oldest), _ago(standing.newest)))
    for seconds, count in sorted(standing.counters.items()):
        rows.append(("counter", f"{seconds:g} s", str(count), "-", "-"))
    print_table(("KIND", "WINDOW", "USED", "OLDEST", "NEWEST"), rows)
    click.echo(f"in {standing.backend}")


@limits.command()
@click.option("-n", default=10, show_default=True, type=click.IntRange(1, 1000), help="How many.")
def top(n: int) -> None:
    """Show who was denied most, in this hour and in the one before."""
    with invoked_gov() as gov:
        found = gov.limits.most_denied(n)
    if found:
        print_table(
            ("DENIED", "IDENTITY", "OPERATION"), [(str(d.times), printable(d.identity), d.operation) for d in found]
        )
    else:
        click.echo("nobody was denied")


@limits.command()
@click.argument("identity")
@_operation
def reset(identity: str, operation: str) -> None:
    """Forget all that IDENTITY has used of its limits."""
    with invoked_gov() as gov:
        gov.limits.reset(identity, operation=operation)
    click.echo(f"{identity} is reset")


@limits.command()
@click.option("-n", default=20, show_default=True, type=click.IntRange(1, 10_000), help="How many to show.")
@click.option("--flush", is_flag=True, help="Publish all of them now, each to be decided anew.")
def parked(n: int, flush: bool) -> None:
    """Show the Celery tasks that wait for their limits, those due first.

    With --flush workers publish all of them now, and each is decided anew, by the limits as they are: after a limit was
    raised, or reset. For which there is no room, waits again, in its place. To drop one, revoke it by its id.
    """
    with invoked_gov() as gov:
        lots = gov._parked.lots() if gov._parked is not None else []
        if flush:
            click.echo(f"{sum(lot.flush() for lot in lots)} are to be published now")
            return
        count, rows = 0, []
        for lot in lots:
            count += lot.count()
            for due, message in lot.first(n):
                found = json.loads(message)
                limit = found["limit"]
                cells = (found["task"], found["id"], limit["identity"], limit["operation"], lot.broker)
                rows.append((due, [printable(cell) for cell in cells]))
    if not count:
        click.echo("nothing is parked")
        return
    shown = sorted(rows)[:n]
    print_table(
        ("DUE IN", "TASK", "ID", "IDENTITY", "OPERATION", "BROKER"), [(f"{due:.1f} s", *cells) for due, cells in shown]
    )
    if count > len(shown):
        click.echo(f"and {count - len(shown)} more")


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s ago" if seconds >= 0 else f"in {-seconds:.1f} s"
