"""`govredis dashboard`."""

from __future__ import annotations

import click

from ._invocation import CommandFailed, invoked_gov, until_interrupted
from ._output import say


@click.command()
@click.option(
    "--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="The port; 0 for any that is free."
)
def dashboard(port: int) -> None:
    """Serve the dashboard on this host, until Ctrl-C.

    Prints its URL. It listens on 127.0.0.1 alone, and every user of this host can open it. For other hosts there is
    the page of FlaskGovRedis, behind your own login.
    """
    from ..health.dashboard.server import DashboardServer  # loads an HTTP server, which no other command needs

    with invoked_gov() as gov:
        try:
            server = DashboardServer(gov.internal.dashboard, port)
        except OSError as error:
            raise CommandFailed(f"127.0.0.1:{port}: {error.strerror}; --port names another") from error
        with server, until_interrupted():
            say(f"{server.url}  (Ctrl-C ends it)")
            server.serve_forever()
