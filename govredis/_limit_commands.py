"""`govredis limits`."""

from __future__ import annotations

import click

from ._invocation import invoked_gov

_operation = click.option("--operation", default="default", show_default=True, help="What is limited.")


@click.group()
def limits() -> None:
    """Show and reset what stands in the windows of rate limits, and whom they refuse most."""


@limits.command()
@click.argument("identity")
@_operation
def reset(identity: str, operation: str) -> None:
    """Forget all that IDENTITY has used of its limits."""
    with invoked_gov() as gov:
        gov.limits.reset(identity, operation=operation)
    click.echo(f"{identity} is reset")
