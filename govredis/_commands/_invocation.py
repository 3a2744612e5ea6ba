"""The parts that every command needs: its GovRedis, and the codes that it exits with."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import click

from ..api import GovRedis
from ..errors import BackendError, ConfigurationError, printable

_GOV = "govredis.gov"

#: Exit codes, beside 0. They are the same for all commands, and docs/cli.md has them.
NO, USAGE, FAILED = 1, 2, 3


class CommandFailed(click.ClickException):
    """The command could not ask, or could not do it: a server is away or refuses, or a setting is wrong."""

    exit_code = FAILED


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
    except (ConfigurationError, BackendError) as error:
        raise CommandFailed(printable(str(error), "\n")) from error
    except ValueError as error:  # of an argument: an id that is refused, say
        raise click.UsageError(printable(str(error), "\n")) from error


@contextlib.contextmanager
def until_interrupted(watches: bool = True) -> Iterator[None]:
    """For a command that goes on until Ctrl-C: that is its end, and no error. Any other command is aborted by it."""
    try:
        yield
    except KeyboardInterrupt:
        if not watches:
            raise


def answer_no() -> NoReturn:
    """Exit as a command does whose answer is no: nothing is there, or it is bad."""
    sys.exit(NO)
