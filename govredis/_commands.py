"""The commands that work on a GovRedis: of `govredis`, on the environment's, and of `flask govredis`, on the app's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import click

from ._invocation import invoked_gov as _gov
from ._invocation import print_table, printable
from ._limit_commands import limits
from .locks import LockHolder


@click.command()
def migrate() -> None:
    """Make or update our tables in the PostgreSQL of GOVREDIS_DATABASE_URL."""
    with _gov() as gov:
        applied = gov.postgres.migrate()
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("up to date")


@click.command()
def health() -> None:
    """Print the health report as JSON. Exits with 1 if it says fail."""
    with _gov() as gov:
        report = gov.health.check()
    click.echo(json.dumps(report.as_dict(), indent=2))
    if report.status == "fail":
        sys.exit(1)


@click.group(invoke_without_command=True)
def locks() -> None:
    """Show the locks that are held, of every kind. A holder from outside is found by its name only: locks show NAME."""
    if click.get_current_context().invoked_subcommand is None:
        with _gov() as gov:
            held = gov.locks.held()
        if held:
            _print_holders(held)
        else:
            click.echo("no locks are held")


@locks.command()
@click.argument("name")
def show(name: str) -> None:
    """Show who holds the lock NAME. Exits with 1 if nobody does."""
    with _gov() as gov:
        holder = gov.locks.holder(name)
    if holder is None:
        click.echo(f"{name} is not locked")
        sys.exit(1)
    _print_holders([holder])
    if holder.degraded:
        click.echo("without Redis: this is what the lock file of this host says, for this host")


@locks.command()
@click.argument("name")
def release(name: str) -> None:
    """Take the lock NAME from its holder, who is gone for certain. Exits with 1 if nobody holds it.

    The waiter that has waited longest gets it. A holder that lives all the same finds out at its next renewal.
    """
    with _gov() as gov:
        released = gov.locks.force_release(name)
    click.echo(f"{name} is released" if released else f"{name} is not locked")
    if not released:
        sys.exit(1)


def _print_holders(holders: Iterable[LockHolder]) -> None:
    rows = []
    for h in holders:
        ends = "never" if h.remaining is None else f"{h.remaining:.1f} s"
        rows.append((h.name, h.kind, "-" if h.token is None else str(h.token), ends, printable(h.owner)))
    print_table(("NAME", "KIND", "TOKEN", "ENDS IN", "OWNER"), rows)


COMMANDS = (migrate, health, locks, limits)
