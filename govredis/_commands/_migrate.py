"""`govredis migrate`."""

from __future__ import annotations

import click

from ._invocation import invoked_gov
from ._output import json_option, print_json, say


@click.command()
@json_option
def migrate(as_json: bool) -> None:
    """Make or update our tables in PostgreSQL.

    The database is that of GOVREDIS_DATABASE_URL.
    """
    with invoked_gov() as gov:
        applied = gov.postgres.migrate()
    if as_json:
        print_json({"applied": applied})
        return
    for name in applied:
        say(f"applied {name}")
    if not applied:
        say("up to date")
