"""What every command needs: the GovRedis that it works on, and how it prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import click

from ..api import GovRedis
from ..errors import BackendError, ConfigurationError

_GOV = "govredis.gov"


def work_on(gov: GovRedis) -> None:
    """Have the commands of this invocation work on `gov`. Without, on one of the environment's, closed after it."""
    click.get_current_context().meta[_GOV] = gov


@contextlib.contextmanager
def invoked_gov() -> Iterator[GovRedis]:
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


def printable(text: str) -> str:
    """What others have written may be anything, and this may be a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_table(title: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells below their title, each column as wide as it must be."""
    lines = [title, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())
