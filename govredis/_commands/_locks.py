"""`govredis locks`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from ..locks import LockHolder
from ._invocation import invoked_gov, print_table, say


@click.group(invoke_without_command=True)
def locks() -> None:
    """Show the locks that are held, and release one.

    Shows locks of every kind, an async service's too. Looks at all keys of the database.
    """
    if click.get_current_context().invoked_subcommand is None:
        with invoked_gov() as gov:
            held = gov.locks.held()
        if held:
            _print_holders(held)
        else:
            say("no locks are held")


@locks.command()
@click.argument("name")
def show(name: str) -> None:
    """Show the holder of the lock NAME. Exits with 1 if nobody holds it."""
    with invoked_gov() as gov:
        holder = gov.locks.holder(name)
    if holder is None:
        say(f"{name} is not locked")
        sys.exit(1)
    _print_holders([holder])
    if holder.degraded:
        say("Redis is away: this is read from the lock file, and holds for this host alone")


@locks.command()
@click.argument("name")
def release(name: str) -> None:
    """Take the lock NAME from a holder that is certainly gone. Exits with 1 if nobody holds it.

    The process that has waited longest gets it. If the holder is alive after all, it finds out at its next renewal.
    """
    with invoked_gov() as gov:
        released = gov.locks.force_release(name)
    say(f"{name} is released" if released else f"{name} is not locked")
    if not released:
        sys.exit(1)


def _print_holders(holders: Iterable[LockHolder]) -> None:
    rows = []
    for h in holders:
        ends = "never" if h.remaining is None else f"{h.remaining:.1f} s"
        rows.append((h.name, h.kind, "-" if h.token is None else str(h.token), ends, h.owner))
    print_table(("NAME", "KIND", "TOKEN", "ENDS IN", "OWNER"), rows)
