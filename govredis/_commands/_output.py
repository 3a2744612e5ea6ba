"""The output of commands: JSON for programs, tables with colours on a terminal, and plain columns elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import printable

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

#: Words that have a colour, wherever they fill a cell.
_STYLES = {"pass": "green", "warn": "bold yellow", "fail": "bold red"}


def json_option(command: F) -> F:
    """`--json`, which the command gets as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def print_json(data: Any, *, line: bool = False) -> None:
    """Print data; `line`: on a single line. Instants are in ISO 8601, and durations are seconds."""
    text = json.dumps(data, indent=None if line else 2, default=_text)
    click.echo(text.replace("\x7f", "\\u007f"))  # the one control character that JSON leaves


def say(line: str) -> None:
    """Print a line, made safe for a terminal: other people's text may be part of it."""
    click.echo(printable(line))


def print_table(title: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells below their title."""
    lines = [[printable(cell) for cell in row] for row in rows]
    console = terminal()
    if console is None:
        lines.insert(0, list(title))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            click.echo("  ".join(cells).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in title:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in line))
    console.print(table)


def terminal() -> Console | None:
    """The terminal of a person, who reads colours; None where the output goes elsewhere, or rich is not installed."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in (None, "", "dumb"):
        return None
    try:
        from rich.console import Console
    except ImportError:  # `flask govredis`, without the extra
        return None
    return Console(file=sys.stdout, highlight=False, emoji=False)


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
