"""Clock: the time that a GovRedis goes by. The module `time` is one; tests have one that is set by hand."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """As the module `time` has them, in seconds."""

    def time(self) -> float: ...

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...
