"""`govredis locks`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click

from ..errors import LockUnavailable, printable
from ..locks import LockHolder
from ._invocation import CommandFailed, answer_no, invoked_gov
from ._output import json_option, print_json, print_table, say


@click.group(invoke_without_command=True)
@json_option
def locks(as_json: bool) -> None:
    """Show the locks that are held, and release one.

    Shows locks of every kind, an async service's too. Looks at all keys of the database. If nodes of a Cluster do not
    answer, the locks of the others are shown, an error names those nodes, and the exit code is 3.
    """
    if click.get_current_context().invoked_subcommand is None:
        with invoked_gov() as gov:
            held = gov.locks.held()
        if as_json:
            print_json([_data(holder) for holder in held])
        elif held:
            _print_holders(held)
        else:
            say("no locks are found" if held.unanswered else "no locks are held")
        if held.unanswered:
            raise CommandFailed(printable(f"locks are missing: no answer from {', '.join(held.unanswered)}"))


@locks.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the holder of the lock NAME. Exits with 1 if nobody holds it.

    While Redis is away, the lock files tell of this host's processes. Exits with 3 if none of them holds it.
    """
    with invoked_gov() as gov:
        holder, away = gov.locks.look(name)
        if holder is None and away is not None:
            raise LockUnavailable(f"no process of this host holds {name}, and others cannot be asked: {away}")
    if as_json:
        print_json(None if holder is None else _data(holder))
    elif holder is None:
        say(f"{name} is not locked")
    else:
        _print_holders([holder])
        if holder.degraded:
            say("Redis is away: this is read from the lock file, and holds for this host alone")
    if holder is None:
        answer_no()


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
        answer_no()


def _data(holder: LockHolder) -> dict[str, Any]:
    return {**asdict(holder), "since": holder.since}


def _print_holders(holders: Iterable[LockHolder]) -> None:
    rows = []
    for h in holders:
        ends = "never" if h.remaining is None else f"{h.remaining:.1f} s"
        held = "-" if h.since is None else f"{max(0.0, time.time() - h.since.timestamp()):.1f} s"
        rows.append((h.name, h.kind, "-" if h.token is None else str(h.token), held, ends, h.owner))
    print_table(("NAME", "KIND", "TOKEN", "HELD FOR", "ENDS IN", "OWNER"), rows)
