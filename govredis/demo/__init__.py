"""The story that `govredis demo` tells: real servers, real traffic, Redis taken away, and what held."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable

SECONDS = 24.0


def run(seconds: float = SECONDS) -> int:
    """Tell it, with `seconds` of traffic. Returns the exit code.

    0: everything held. 1: something did not, or a worker ended early; it is printed. 2: a server could not be started.
    130: interrupted. Nothing is left behind, whichever it is.
    """
    from .report import Screen, print_report
    from .story import tell

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not everywhere there is a µ
    screen = Screen()

    def story() -> int:
        try:
            told = tell(seconds, screen)
        finally:
            screen.ends()
        return print_report(told, screen.console)

    return _saying_errors(story)


def serve() -> int:
    """Start the same servers, Celery worker and site, print the site's URL, and leave them running until Ctrl-C.

    Returns the exit code, as `run`; 0 after Ctrl-C.
    """
    from ..api import GovRedis
    from ..config import Config
    from .board import AGENTS
    from .site import HELP
    from .stage import stage

    def open_site() -> int:
        with stage() as on:
            with GovRedis(Config(**on.config)) as gov:
                for number in range(AGENTS):
                    gov.agents.create(f"agent-{number}", {"name": f"Agent {number}"})
            print(HELP.format(url=on.url), "\nCtrl-C ends all of it.", sep="", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    on.processes.check()
                    time.sleep(0.5)
        return 0

    return _saying_errors(open_site)


def _saying_errors(story: Callable[[], int]) -> int:
    from ..testing.servers import ServerError
    from .processes import ProcessError

    try:
        return story()
    except ServerError as error:
        print("govredis demo:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except ProcessError as error:
        print("govredis demo:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("govredis demo: interrupted; all servers and workers are gone", file=sys.stderr)
        return 130
