"""The command `govredis`."""

from __future__ import annotations

import sys

try:
    import click
except ImportError:  # the extra is not installed
    sys.exit("the govredis command needs its extra: pip install 'govredis[cli]'")

from ._commands import COMMANDS


@click.group()
@click.version_option(package_name="govredis")
def main() -> None:
    """Sessions, locks, limits, metadata and health on Redis. Settings come from the environment."""


for _command in COMMANDS:
    main.add_command(_command)


@main.command()
@click.option("--seconds", type=click.FloatRange(10, 600), default=24, show_default=True, help="Seconds of traffic.")
@click.option("--serve", is_flag=True, help="Print the dashboard's URL, and leave everything running until Ctrl-C.")
@click.option(
    "--topology",
    type=click.Choice(["server", "sentinel", "cluster"]),
    default="server",
    show_default=True,
    help="A server alone, a primary with Sentinels, or a Cluster.",
)
def demo(seconds: float, serve: bool, topology: str) -> None:
    """Show on real servers which promises hold.

    Starts them, a Celery worker and a site, sends traffic, takes Redis away, and reports which promises held.
    """
    from . import demo

    try:
        sys.exit(demo.serve(topology) if serve else demo.run(seconds, topology))
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; the demo needs pip install 'govredis[all,testing]'") from None
