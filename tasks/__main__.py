"""`python -m tasks [options of celery worker]`: see that everything is there, then be a worker with beat."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

from govredis import Config, ConfigurationError, GovRedis, GovRedisError
from govredis._secrets import Secrets

from . import app
from .agents import DISCOVERIES

_PATIENCE = 3.0  # seconds for the broker

#: For each variable: the check of the health report, and the environment that leaves out the other server.
_SERVERS = {
    "REDIS_URL": ("redis", {"GOVREDIS_DATABASE_URL": ""}),
    "GOVREDIS_DATABASE_URL": ("postgres", {"REDIS_URL": "", "REDIS_ENABLED": "0"}),
}


def main() -> None:
    logging.getLogger("govredis").disabled = True  # what it would say is said below
    # Each once, on a line of its own: a setting that is wrong is so for both servers, and drivers say more than one.
    problems = dict.fromkeys(" ".join(problem.split()) for problem in check())
    if problems:
        sys.exit("\n".join(f"tasks: {problem}" for problem in problems))
    # Without what workers tell each other: the loop that publishes it also acknowledges and keeps the time limits, and
    # a broker that hangs would hold it up.
    alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    worker = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--beat", *alone, *sys.argv[1:]]
    os.execv(sys.executable, worker)


def check() -> Iterator[str]:
    """Says in words where the environment is wrong. Makes the table of discoveries where it is right."""
    for variable, (name, without) in _SERVERS.items():
        try:
            with GovRedis(Config.from_mapping({**os.environ, **without})) as gov:
                seen = next(check for check in gov.health.check().checks if check.name == name)
                if seen.status != "pass":
                    yield f"{variable}: {seen.output.partition('; ')[0]}"  # what the health says of fallbacks is not
                elif name == "postgres":
                    gov.postgres.fetch(DISCOVERIES)  # raises where none is configured
        except ConfigurationError as error:
            yield str(error)  # names the variable
        except GovRedisError as error:
            yield f"{variable}: {error}"
    try:
        with app.connection_for_write() as broker:
            broker.ensure_connection(max_retries=1, interval_start=0.2, timeout=_PATIENCE)
    except Exception as error:  # noqa: BLE001 - each transport has its own, and a URL that is none others still
        variable = "CELERY_BROKER_URL" if os.environ.get("CELERY_BROKER_URL") else "CELERY_BROKER_URL (as REDIS_URL)"
        secrets = Secrets((app.conf.broker_url,))
        why = secrets.hide(str(error)) or type(error).__name__
        if isinstance(error, ValueError):  # what it quotes may be of the password
            why = "it is no URL; @ : / ? # in a password are written as %40 %3A %2F %3F %23"
        yield f"{variable}: {secrets.hide(app.conf.broker_url)} cannot be used: {why}"


if __name__ == "__main__":
    main()
