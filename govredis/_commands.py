"""The commands that work on a GovRedis: of `govredis`, on the environment's, and of `flask govredis`, on the app's."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

import click

from .api import GovRedis
from .errors import BackendError, ConfigurationError
from .locks import LockHolder
from .metadata import Outbox
from .metadata.audit import audit as audit_agents

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
        # An outsider's owner may be anything, and this may be a terminal.
        owner = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in h.owner)
        rows.append((h.name, h.kind, "-" if h.token is None else str(h.token), ends, owner))
    _print_table(rows)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@click.group()
def outbox() -> None:
    """Tables of yours whose changes, by whomever, invalidate cached values."""


@outbox.command()
@click.argument("table")
@click.argument("column")
@click.option("--namespace", default="agent_meta", show_default=True, help="Of the cache.")
def watch(table: str, column: str, namespace: str) -> None:
    """Watch TABLE: every change of a row invalidates the value of the id in its COLUMN."""
    with _gov() as gov:
        Outbox(gov.postgres).watch(table, column, namespace)
    click.echo(f"{table} is watched for {namespace}")


@outbox.command()
@click.argument("table")
def unwatch(table: str) -> None:
    """Watch TABLE no more."""
    with _gov() as gov:
        Outbox(gov.postgres).unwatch(table)
    click.echo(f"{table} is not watched any more")


@outbox.command()
def status() -> None:
    """Show what is watched, and how far Redis is behind."""
    with _gov() as gov:
        watched = Outbox(gov.postgres).watched()
        _, lag = (False, None) if gov._guard is None else gov._guard.state()
    _print_table([("TABLE", "COLUMN", "NAMESPACE"), *((w.table, w.column, w.namespace) for w in watched)])
    if lag is None:
        click.echo("this Redis is told of nothing: no cached values are in use")
    elif lag.entries:
        click.echo(f"this Redis has not been told of {lag.entries} changes, the oldest {lag.oldest:.1f} s ago")
    else:
        click.echo("this Redis has been told of everything")


@click.group()
@click.option("--namespace", default="agent_meta", show_default=True, help="Of the cache.")
@click.pass_context
def metadata(context: click.Context, namespace: str) -> None:
    """Look at cached values."""
    context.obj = namespace


@metadata.command()
@click.argument("identity", metavar="ID")
@click.pass_obj
def get(namespace: str, identity: str) -> None:
    """Print the cached value of ID as JSON. Exits with 1 if there is none, or it may not be used now."""
    with _gov() as gov:
        value = gov.cache(namespace).get(identity)
    click.echo(f"{identity} is not cached" if value is None else json.dumps(value, indent=2))
    if value is None:
        sys.exit(1)


@metadata.command()
@click.argument("identity", metavar="ID")
@click.pass_obj
def invalidate(namespace: str, identity: str) -> None:
    """Drop the cached value of ID."""
    with _gov() as gov:
        gov.cache(namespace).invalidate(identity)
    click.echo(f"{identity} is invalidated")


@metadata.command()
@click.option("--samples", type=click.IntRange(1), default=1000, show_default=True, help="Cached agents, at most.")
@click.pass_obj
def audit(namespace: str, samples: int) -> None:
    """Compare cached agents with PostgreSQL, now and, those that are behind, after X. Exits with 1 if any is still."""
    with _gov() as gov:
        if namespace != "agent_meta":
            raise ValueError(f"only agent_meta can be audited: nobody knows where the values of {namespace} are from")
        found = audit_agents(
            gov._keys, gov._redis, gov.metadata, gov.agents, samples=samples, staleness=gov.config.metadata_staleness
        )
    rate = len(found.stale) / found.compared if found.compared else 0.0
    click.echo(f"{found.compared} compared, {found.behind} behind, {len(found.stale)} of them for too long: {rate:.2%}")
    for identity in found.stale:
        click.echo(identity)
    if found.stale:
        sys.exit(1)


COMMANDS = (migrate, health, locks, outbox, metadata)
