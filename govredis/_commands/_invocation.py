"""The parts that every command needs: its GovRedis, and its way of printing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import click

from ..api import GovRedis
from ..errors import BackendError, ConfigurationError, printable

_GOV = "govredis.gov"


def work_on(gov: GovRedis) -> None:
    """Have the commands of this invocation work on `gov`. Without it they make the environment's, and close it."""
    click.get_current_context().meta[_GOV] = gov


@contextlib.contextmanager
def invoked_gov() -> Iterator[GovRedis]:
    """The GovRedis of this invocation. Our errors end it with one line, without a traceback."""
    gov: GovRedis | None = click.get_current_context().meta.get(_GOV)
    try:
        if gov is not None:
            yield gov
        else:
            with GovRedis.from_env() as gov:
                yield gov
    except (ConfigurationError, BackendError, ValueError) as error:
        raise click.ClickException(printable(str(error), "\n")) from error


def say(line: str) -> None:
    """Print a line, made safe for a terminal: other people's text may be part of it."""
    click.echo(printable(line))


def print_table(title: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells below their title, each column as wide as it must be."""
    lines = [title, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(map(str.ljust, line, widths)).rstrip())
