"""Generation: all values of a namespace at once, by a mark that they carry."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from ..client import Command

#: "" until the first `next`.
_OURS = re.compile(rb"(?:[0-9a-f]{16})?")
#: Seconds for which a process goes on with the generation that it knows.
KNOWN_FOR = 1.0


class Known(NamedTuple):
    """The last answer, until when it holds, and how often the generation had been forgotten by then."""

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
        #: Asks for it, along with the next read.
        self.question: Command = ("MGET", key)
        self.known: Known = Known("", 0.0, 0)
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
        self.known = Known(_name(reply[0] or b""), sent + KNOWN_FOR, serial)

    def forget(self) -> None:
        """A question that is under way does not count any more."""
        self._serial += 1

    def next(self) -> Command:
        """The command that begins another generation."""
        return "SET", self.key, secrets.token_hex(8)


def _name(held: bytes) -> str:
    """The generation that values carry. A foreign value stands for a generation too, by a name that is short."""
    if _OURS.fullmatch(held):
        return held.decode()
    return f"-{hashlib.sha256(held).hexdigest()[:16]}"
