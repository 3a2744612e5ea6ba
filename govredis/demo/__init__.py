"""The story that `govredis demo` tells: real servers, real traffic, Redis taken away, and what held."""

from __future__ import annotations

import sys

SECONDS = 24.0


def run(seconds: float = SECONDS) -> int:
    """Tell it, with `seconds` of traffic. Returns the exit code.

    0: everything held. 1: something did not, or a worker ended early; it is printed. 2: a server could not be started.
    130: interrupted. Nothing is left behind, whichever it is.
    """
    from ..testing.servers import ServerError
    from .report import Screen, print_report
    from .story import WorkerError, tell

    screen = Screen()
    try:
        try:
            told = tell(seconds, screen)
        finally:
            screen.ends()
        return print_report(told, screen.console)
    except ServerError as error:
        print("govredis demo:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except WorkerError as error:
        print("govredis demo:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("govredis demo: interrupted; all servers and workers are gone", file=sys.stderr)
        return 130
