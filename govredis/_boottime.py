"""A clock that all processes of a host share, that nobody sets."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

#: Seconds since the host started; runs on in suspend, where the system has such a clock.
clock: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
