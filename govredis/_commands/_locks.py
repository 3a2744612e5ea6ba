"""`govredis locks`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from ..locks import LockHolder
from ._invocation import invoked_gov, print_table, printable


@click.group(invoke_without_command=True)
def locks() -> None:
    """Show the locks that are held, of every kind. A holder from outside is found by its name only: locks show NAME."""
    if click.get_current_context().invoked_subcommand is None:
        with invoked_gov() as gov:
            held = gov.locks.held()
        if held:
            _print_holders(held)
        else:
            click.echo("no locks are held")


@locks.command()
@click.argument("name")
def show(name: str) -> None:
    """Show who holds the lock NAME. Exits with 1 if nobody does."""
    with invoked_gov() as gov:
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
    with invoked_gov() as gov:
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
