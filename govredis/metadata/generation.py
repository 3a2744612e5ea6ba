"""Generation: all values of a namespace at once, by a mark that they carry."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from ..client import Command

#: Seconds for which a process goes on with the generation that it knows.
KNOWN_FOR = 1.0


class Known(NamedTuple):
    """What the last answer said, until when it holds, and how often it had been forgotten by then."""

    value: str
    until: float
    serial: int


class Generation:
    """The generation of one namespace's values, as this process knows it: "" until all have been invalidated once.

    Args:
        key: where it is in Redis, without a TTL: one for each namespace that was ever invalidated as a whole.
    """

    def __init__(self, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        #: What asks for it, along with the next read.
        self.question: Command = ("MGET", key)
        self.known = Known("", 0.0, 0)
        self._clock = clock
        self._serial = 0

    def is_known(self) -> bool:
        """Need it not be asked for?"""
        _, until, serial = self.known
        return self._clock() < until and serial == self._serial

    def asked(self) -> tuple[float, int]:
        """To be taken before the question is sent, for `answered`."""
        return self._clock(), self._serial

    def answered(self, asked: tuple[float, int], reply: list[bytes | None]) -> None:
        sent, serial = asked
        self.known = Known((reply[0] or b"").decode(errors="replace"), sent + KNOWN_FOR, serial)

    def forget(self) -> None:
        """What is being asked now does not count any more."""
        self._serial += 1

    def next(self) -> Command:
        """What begins another one."""
        return "SET", self.key, secrets.token_hex(8)
