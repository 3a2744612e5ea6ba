"""Stalls of the machine: for a few seconds nothing on it runs, and then all clocks are ahead.

A virtual machine that is paused stalls so. A lock of 3 s is lost then, and rightly. A test of such a lock asks for a
machine that does not stall, and says so with `undisturbed`. All other tests must bear a stall.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import pytest

T = TypeVar("T")

_ATTEMPTS = 10

#: Sleeps in short slices until its input ends, and prints by how much the longest was late, in seconds.
_WATCH = """
import select, sys, time
longest, last, ended = 0.0, time.monotonic(), []
print("begun", flush=True)
while not ended:
    ended = select.select([sys.stdin], [], [], 0.05)[0]
    now = time.monotonic()
    longest, last = max(longest, now - last - 0.05), now
print(longest)
"""


class StallWatch:
    """`with StallWatch() as watch: ...`: `watch.longest` is the longest stall in seconds, as another process saw it."""

    def __enter__(self) -> StallWatch:
        self.longest = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "begun\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.longest = float(self.process.communicate()[0])


def undisturbed(attempt: Callable[[], T], longest: float) -> T:
    """Runs `attempt`, and once more if it failed while the machine stalled for over `longest` seconds.

    Each attempt sets up all that it needs. A failure without such a stall is raised at once.
    """
    for last in [*[False] * (_ATTEMPTS - 1), True]:
        watch = StallWatch()
        try:
            with watch:
                return attempt()
        except (Exception, pytest.fail.Exception):
            if last or watch.longest <= longest:
                raise
    raise AssertionError("there is a last attempt")
