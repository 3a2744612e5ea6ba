"""The story that `govredis demo` tells: real servers, real traffic, Redis taken away, and what held."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable

SECONDS = 24.0
_SERVED = """The dashboard: {url}govredis/dashboard

A site, a Celery worker with beat, Redis, a broker and PostgreSQL run, and some visitors come.

  {url}    has calls to try
  kill -STOP {redis}; sleep 20; kill -CONT {redis}    is an outage of Redis to look at

Ctrl-C ends all of it."""


def run(seconds: float = SECONDS, topology: str = "server") -> int:
    """Tell it, with `seconds` of traffic. `topology`: "server", "sentinel" or "cluster". Returns the exit code.

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
            told = tell(seconds, topology, screen)
        finally:
            screen.ends()
        return print_report(told, screen.console)

    return _saying_errors(story)


def serve(topology: str = "server") -> int:
    """Start the same servers, Celery worker and site, print the dashboard's URL, and leave them running until Ctrl-C.

    Some visitors come, so that there is something to see.

    Returns the exit code, as `run`; 0 after Ctrl-C.
    """
    from ..api import GovRedis
    from ..config import Config
    from .board import AGENTS
    from .stage import stage
    from .visitors import visited

    def open_site() -> int:
        with stage(topology) as on, GovRedis(Config(**on.config)) as gov:
            for number in range(AGENTS):
                gov.agents.create(f"agent-{number}", {"name": f"Agent {number}"})
            print(_SERVED.format(url=on.url, redis=on.redis.primary.pid), flush=True)
            with contextlib.suppress(KeyboardInterrupt), visited(gov):
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
