"""`govredis sessions`."""

from __future__ import annotations

import json
import sys

import click

from ._invocation import invoked_gov, say


@click.group()
def sessions() -> None:
    """Look a session up, and compare sessions.

    Compares those in PostgreSQL with their copies in Redis.
    """


@sessions.command()
@click.argument("session_id")
def show(session_id: str) -> None:
    """Show the agent of the session SESSION_ID. Exits with 1 if it is bound to nobody."""
    with invoked_gov() as gov:
        binding = gov.sessions.get(session_id)
    if binding is None:
        say(f"{session_id} is bound to nobody")
        sys.exit(1)
    ends = "never" if binding.expires_at is None else binding.expires_at.isoformat(timespec="seconds")
    for name, value in (
        ("agent", binding.agent_id),
        ("bound", f"{binding.bound_at.isoformat(timespec='seconds')}, {binding.bind_count} times"),
        ("ends", ends),
        ("data", json.dumps(binding.data)),
        ("says", binding.backend),
    ):
        say(f"{name:6} {value}")


@sessions.command()
def verify() -> None:
    """Compare the sessions in PostgreSQL with their copies in Redis. Exits with 1 if any differ.

    Redis is told of a change within GOVREDIS_METADATA_STALENESS: a session that differs for longer is a fault.
    """
    with invoked_gov() as gov:
        parity = gov.sessions.verify()
    say(
        f"{parity.rows} rows, {parity.bound} of them bound; of these {parity.copied} in Redis,"
        f" {parity.others} bound there by others; {len(parity.differing)} differ"
    )
    for session_id in parity.differing:
        say(session_id)
    if parity.differing:
        sys.exit(1)
