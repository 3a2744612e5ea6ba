"""`govredis outbox` and `govredis metadata`."""

from __future__ import annotations

import json
import sys

import click

from ..metadata import Outbox
from ..metadata.audit import audit as audit_agents
from ._invocation import invoked_gov, print_table


@click.group()
def outbox() -> None:
    """Tables of yours whose changes, by whomever, invalidate cached values."""


@outbox.command()
@click.argument("table")
@click.argument("column")
@click.option("--namespace", default="agent_meta", show_default=True, help="Of the cache.")
def watch(table: str, column: str, namespace: str) -> None:
    """Watch TABLE: every change of a row invalidates the value of the id in its COLUMN."""
    with invoked_gov() as gov:
        Outbox(gov.postgres).watch(table, column, namespace)
    click.echo(f"{table} is watched for {namespace}")


@outbox.command()
@click.argument("table")
def unwatch(table: str) -> None:
    """Watch TABLE no more."""
    with invoked_gov() as gov:
        Outbox(gov.postgres).unwatch(table)
    click.echo(f"{table} is not watched any more")


@outbox.command()
def status() -> None:
    """Show what is watched, and how far Redis is behind."""
    with invoked_gov() as gov:
        watched = Outbox(gov.postgres).watched()
        _, lag = (False, None) if gov._guard is None else gov._guard.state()
    print_table(("TABLE", "COLUMN", "NAMESPACE"), [(w.table, w.column, w.namespace) for w in watched])
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
    with invoked_gov() as gov:
        value = gov.cache(namespace).get(identity)
    click.echo(f"{identity} is not cached" if value is None else json.dumps(value, indent=2))
    if value is None:
        sys.exit(1)


@metadata.command()
@click.argument("identity", metavar="ID")
@click.pass_obj
def invalidate(namespace: str, identity: str) -> None:
    """Drop the cached value of ID."""
    with invoked_gov() as gov:
        gov.cache(namespace).invalidate(identity)
    click.echo(f"{identity} is invalidated")


@metadata.command()
@click.option("--samples", type=click.IntRange(1), default=1000, show_default=True, help="Cached agents, at most.")
@click.pass_obj
def audit(namespace: str, samples: int) -> None:
    """Compare cached agents with PostgreSQL, now and, those that are behind, after X. Exits with 1 if any is still."""
    with invoked_gov() as gov:
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
