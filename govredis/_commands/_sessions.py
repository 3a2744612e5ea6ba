"""`govredis sessions`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..sessions import SessionBinding
from ._invocation import answer_no, invoked_gov
from ._output import json_option, print_json, say


@click.group()
def sessions() -> None:
    """Look a session up, and compare sessions.

    Compares those in PostgreSQL with their copies in Redis.
    """


@sessions.command()
@click.argument("session_id")
@json_option
def show(session_id: str, as_json: bool) -> None:
    """Show the agent of the session SESSION_ID. Exits with 1 if it is bound to nobody."""
    with invoked_gov() as gov:
        binding = gov.sessions.get(session_id)
    if as_json:
        print_json(None if binding is None else asdict(binding))
    elif binding is None:
        say(f"{session_id} is bound to nobody")
    else:
        _print_binding(binding)
    if binding is None:
        answer_no()


@sessions.command()
@json_option
def verify(as_json: bool) -> None:
    """Compare the sessions in PostgreSQL with their copies in Redis. Exits with 1 if any differ.

    Redis is told of a change within GOVREDIS_METADATA_STALENESS: a session that differs for longer is a fault.
    """
    with invoked_gov() as gov:
        parity = gov.sessions.verify()
    if as_json:
        print_json(asdict(parity))
    else:
        say(
            f"{parity.rows} rows, {parity.bound} of them bound; of these {parity.copied} in Redis,"
            f" {parity.others} bound there by others; {len(parity.differing)} differ"
        )
        for session_id in parity.differing:
            say(session_id)
    if parity.differing:
        answer_no()


def _print_binding(binding: SessionBinding) -> None:
    ends = "never" if binding.expires_at is None else binding.expires_at.isoformat(timespec="seconds")
    for name, value in (
        ("agent", binding.agent_id),
        ("bound", f"{binding.bound_at.isoformat(timespec='seconds')}, {binding.bind_count} times"),
        ("ends", ends),
        ("data", json.dumps(binding.data)),
        ("says", binding.backend),
    ):
        say(f"{name:6} {value}")
