"""`govredis outbox` and `govredis metadata`."""

from __future__ import annotations

import click

from ..metadata.verify import AgentParity
from ..metadata.verify import verify as verify_agents
from ..outbox import Outbox
from ._invocation import answer_no, invoked_gov
from ._output import json_option, print_json, print_table, say


@click.group()
def outbox() -> None:
    """Watch tables of yours.

    A change by any program then invalidates the cached value.
    """


@outbox.command()
@click.argument("table")
@click.argument("column")
@click.option("--namespace", default="agent_meta", show_default=True, help="The cache's namespace.")
def watch(table: str, column: str, namespace: str) -> None:
    """Watch TABLE, whose ids are in COLUMN.

    Every change of a row invalidates the cached value of its id.
    """
    with invoked_gov() as gov:
        Outbox(gov.postgres).watch(table, column, namespace)
    say(f"{table} is watched for {namespace}")


@outbox.command()
@click.argument("table")
def unwatch(table: str) -> None:
    """Stop watching TABLE."""
    with invoked_gov() as gov:
        Outbox(gov.postgres).unwatch(table)
    say(f"{table} is not watched any more")


@outbox.command()
@json_option
def status(as_json: bool) -> None:
    """Show the watched tables, and how far Redis is behind."""
    with invoked_gov() as gov:
        watched = Outbox(gov.postgres).watched()
        lag = None if gov.internal.freshness is None else gov.internal.freshness.state().lag
    if as_json:
        tables = [each._asdict() for each in watched]
        print_json({"watched": tables, "behind": None if lag is None else lag._asdict()})
        return
    print_table(("TABLE", "COLUMN", "NAMESPACE"), [(w.table, w.column, w.namespace) for w in watched])
    if lag is None:
        say("no cached values are in use on this Redis, so it is not told of changes")
    elif lag.entries:
        say(f"this Redis has not been told of {lag.changes}, the oldest {lag.oldest:.1f} s ago")
    else:
        say("this Redis has been told of everything")


@click.group()
@click.option("--namespace", default="agent_meta", show_default=True, help="The cache's namespace.")
@click.pass_context
def metadata(context: click.Context, namespace: str) -> None:
    """Look at cached values."""
    context.obj = namespace


@metadata.command()
@click.argument("identity", metavar="ID")
@json_option
@click.pass_obj
def get(namespace: str, identity: str, as_json: bool) -> None:
    """Print the cached value of ID, which is JSON. Exits with 1 if there is none that may be used now.

    With --json, null stands for no value.
    """
    with invoked_gov() as gov:
        value = gov.cache(namespace).get(identity)
    if value is None and not as_json:
        say(f"{identity} is not cached")
    else:
        print_json(value)
    if value is None:
        answer_no()


@metadata.command()
@click.argument("identity", metavar="ID")
@click.pass_obj
def invalidate(namespace: str, identity: str) -> None:
    """Drop the cached value of ID."""
    with invoked_gov() as gov:
        gov.cache(namespace).invalidate(identity)
    say(f"{identity} is invalidated")


@metadata.command()
@click.option("--samples", type=click.IntRange(1), default=1000, show_default=True, help="Cached agents, at most.")
@json_option
@click.pass_obj
def verify(namespace: str, samples: int, as_json: bool) -> None:
    """Compare cached agents with PostgreSQL. Exits with 1 if any stays behind for too long.

    Those that are behind are compared again after GOVREDIS_METADATA_STALENESS, the longest that they may be behind.
    """
    with invoked_gov() as gov:
        if namespace != "agent_meta":
            raise ValueError(f"only agent_meta can be verified: nobody knows where the values of {namespace} are from")
        context = gov.internal.context
        found = verify_agents(
            context.keys,
            context.redis,
            gov.metadata,
            gov.agents,
            samples=samples,
            staleness=gov.config.metadata_staleness,
        )
    if as_json:
        print_json(found._asdict())
    else:
        _print_parity(found)
    if found.stale:
        answer_no()


def _print_parity(found: AgentParity) -> None:
    rate = len(found.stale) / found.compared if found.compared else 0.0
    say(f"{found.compared} compared, {found.behind} behind, {len(found.stale)} of them for too long: {rate:.2%}")
    for identity in found.stale:
        say(identity)
