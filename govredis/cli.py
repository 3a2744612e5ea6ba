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


for command in COMMANDS:
    main.add_command(command)


@main.command()
@click.option("--seconds", type=click.FloatRange(10, 600), default=24, show_default=True, help="Of traffic.")
@click.option("--serve", is_flag=True, help="Leave it all running, with the URL of its site printed, until Ctrl-C.")
def demo(seconds: float, serve: bool) -> None:
    """Start real servers, a Celery worker and a site, drive them, take Redis away, and say what held."""
    from . import demo

    try:
        sys.exit(demo.serve() if serve else demo.run(seconds))
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; the demo needs pip install 'govredis[all,testing]'") from None
