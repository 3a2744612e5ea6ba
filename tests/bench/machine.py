"""The conditions of a run: machine, versions, date, load; and cores that do not fall asleep."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The packages whose versions matter.
DISTRIBUTIONS = (
    "govredis", "redis", "hiredis", "limits", "throttled-py", "pyrate-limiter", "python-redis-lock", "dogpile.cache",
    "psycopg2-binary",
)  # fmt: skip


def load() -> list[float]:
    """Over 1, 5 and 15 minutes: how many processes wanted a core."""
    return [round(value, 1) for value in os.getloadavg()]


def conditions(redis_version: str) -> dict[str, Any]:
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    versions = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{os.cpu_count()} virtual cores, {models[0] if models else platform.machine()}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "redis": redis_version,
        "versions": versions,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def awake_cores() -> Iterator[None]:
    """Keep the cores from falling asleep between a request and its reply.

    Waking a virtual core costs tens of microseconds, and the longer a contestant computes, the deeper the server's core
    sleeps: that would be measured, not the contestants. The loops run only where nothing else wants to (SCHED_IDLE).
    """
    spin = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\np = os.getppid()\n"
    spin += "while os.getppid() == p:\n    for _ in range(100000): pass"
    loops = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
