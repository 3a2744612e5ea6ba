"""The commands that work on a GovRedis: of `govredis`, on the environment's, and of `flask govredis`, on the app's."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

import click

from .api import GovRedis
from .errors import BackendError, ConfigurationError

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
    except (ConfigurationError, BackendError) as error:
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


COMMANDS = (migrate, health)
