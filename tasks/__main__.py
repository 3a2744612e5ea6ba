"""`python -m tasks [options of celery worker]`: see that everything is there, then be a worker with beat."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from govredis import Config, ConfigurationError, GovRedis
from govredis.config import redact

from . import app
from .agents import DISCOVERIES

_PATIENCE = 3.0  # seconds for the broker


def main() -> None:
    problems = list(check())
    if problems:
        sys.exit("\n".join(f"tasks: {problem}" for problem in problems))
    # Without what workers tell each other: it is published by the loop that also acknowledges and keeps the time limits,
    # and a broker that hangs would hold it up.
    alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    worker = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--beat", *alone, *sys.argv[1:]]
    os.execv(sys.executable, worker)


def check() -> Iterator[str]:
    """What is wrong with the environment, in words. Makes the table of discoveries where nothing is."""
    try:
        with GovRedis(Config.from_env()) as gov:
            for name, variable in {"redis": "REDIS_URL", "postgres": "GOVREDIS_DATABASE_URL"}.items():
                seen = next(check for check in gov.health.check().checks if check.name == name)
                if seen.status != "pass":
                    yield f"{variable}: {seen.output}"
                elif name == "postgres":
                    gov.postgres.fetch(DISCOVERIES)  # raises where none is configured
    except ConfigurationError as error:
        yield str(error)
    try:
        with app.connection_for_write() as broker:
            broker.ensure_connection(max_retries=1, timeout=_PATIENCE)
    except Exception as error:  # noqa: BLE001 - each transport has its own, and a URL that is none others still
        why = redact(str(error)) or type(error).__name__
        yield f"CELERY_BROKER_URL: {redact(app.conf.broker_url)} cannot be used: {why}"


if __name__ == "__main__":
    main()
