"""The command `govredis`."""

from __future__ import annotations

import json
import sys

from .errors import BackendError, ConfigurationError

try:
    import click
except ImportError:  # the extra is not installed
    sys.exit("the govredis command needs its extra: pip install 'govredis[cli]'")

from .api import GovRedis


class _Group(click.Group):
    """Says our errors in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ConfigurationError, BackendError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="govredis")
def main() -> None:
    """Sessions, locks, limits, metadata and health on Redis. Settings come from the environment."""


@main.command()
def migrate() -> None:
    """Make or update our tables in the PostgreSQL of GOVREDIS_DATABASE_URL."""
    with GovRedis.from_env() as gov:
        applied = gov.postgres.migrate()
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("up to date")


@main.command()
def health() -> None:
    """Print the health report as JSON. Exits with 1 if it says fail."""
    with GovRedis.from_env() as gov:
        report = gov.health.check()
    click.echo(json.dumps(report.as_dict(), indent=2))
    if report.status == "fail":
        sys.exit(1)


@main.command()
@click.option("--seconds", type=click.FloatRange(10, 600), default=24, show_default=True, help="Of traffic.")
def demo(seconds: float) -> None:
    """Start a real Redis and a real PostgreSQL, drive them, take Redis away, and say what held."""
    from .demo import run

    sys.exit(run(seconds))
