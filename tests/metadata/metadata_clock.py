"""A clock of the tests' own: X seconds pass without anybody waiting for them. And what is read through a cache."""

from __future__ import annotations

import time
from typing import Any

from govredis import GovRedis

X = 5.0


class Clock:
    """The clocks of Redis, as the guard reads it, and of the process: they go on by themselves, or by `sleep`."""

    def __init__(self) -> None:
        self.slept = 0.0
        #: Redis's alone, against the others.
        self.stepped = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def adopt(self, gov: GovRedis) -> GovRedis:
        """Have a GovRedis live by this clock; it renews its guard in the caller."""
        guard = gov._guard
        assert guard is not None
        read = guard.ticker.read

        def read_later() -> tuple[int, bytes | None]:
            now, raw = read()
            return now + int((self.slept + self.stepped) * 1_000_000), raw

        guard.ticker.read = read_later  # type: ignore[method-assign]
        guard._clock = lambda: time.monotonic() + self.slept
        guard._threads = False
        return gov


def name_of(gov: GovRedis, agent: str = "a") -> Any:
    """What `gov` reads as the agent's name, through its cache; None for no such agent."""
    record = gov.metadata.get_or_load(agent, gov.agents.get)
    return None if record is None else record["metadata"].get("name")


def cached(gov: GovRedis, agent: str = "a") -> Any:
    """The same, from Redis only."""
    record = gov.metadata.get(agent)
    return None if record is None else record["metadata"].get("name")
