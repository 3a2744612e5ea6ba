"""The commands that work on a GovRedis: of `govredis`, on the environment's, and of `flask govredis`, on the app's."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator

import click

from .api import GovRedis
from .errors import BackendError, ConfigurationError
from .locks import LockHolder

_GOV = "govredis.gov"


def work_on(gov: GovRedis) -> None:
    """Have the commands of this invocation work on `gov`. Without, on one of the environment's, closed after it."""
    click.get_current_context().meta[_GOV] = gov


@contextlib.contextmanager
def _gov() -> Iterator[GovRedis]:
    """The GovRedis of this invocation. Our errors are said in one line, without a traceback."""
    gov: GovRedis | None = click.get_current_context().meta.get(_GOV)
    try:
        if gov is not None:
            yield gov
        else:
            with GovRedis.from_env() as gov:
                yield gov
    except (ConfigurationError, BackendError, ValueError) as error:
        raise click.ClickException(str(error)) from error


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
    rows = [("NAME", "KIND", "TOKEN", "ENDS IN", "OWNER")]
    for h in holders:
        ends = "never" if h.remaining is None else f"{h.remaining:.1f} s"
        rows.append((h.name, h.kind, "-" if h.token is None else str(h.token), ends, _printable(h.owner)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def _printable(text: str) -> str:
    """What an outsider wrote may be anything, and this may be a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@click.group()
def sessions() -> None:
    """Look at sessions."""


@sessions.command("show")
@click.argument("session_id")
def show_session(session_id: str) -> None:
    """Show whose the session SESSION_ID is. Exits with 1 if it is nobody's."""
    with _gov() as gov:
        binding = gov.sessions.get(session_id)
    if binding is None:
        click.echo(f"{session_id} is bound to nobody")
        sys.exit(1)
    ends = "never" if binding.expires_at is None else binding.expires_at.isoformat(timespec="seconds")
    for name, value in (
        ("agent", _printable(binding.agent_id)),
        ("bound", f"{binding.bound_at.isoformat(timespec='seconds')}, {binding.bind_count} times"),
        ("ends", ends),
        ("data", json.dumps(binding.data)),
        ("says", binding.backend),
    ):
        click.echo(f"{name:6} {value}")


@sessions.command()
def verify() -> None:
    """Compare the sessions in PostgreSQL with their copies in Redis. Exits with 1 if any differ.

    A change that Redis has not been told of is told within metadata_staleness: what differs for longer should not.
    """
    with _gov() as gov:
        parity = gov.sessions.verify()
    click.echo(
        f"{parity.rows} rows, {parity.bound} of them bound; of these {parity.copied} in Redis,"
        f" {parity.others} bound there by others; {len(parity.differing)} differ"
    )
    for session_id in parity.differing:
        click.echo(session_id)
    if parity.differing:
        sys.exit(1)


COMMANDS = (migrate, health, locks, sessions)
