"""What a store of sliding windows is: the port that Redis, PostgreSQL and the process implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from .rates import Limit

Mode = Literal["hit", "peek", "record"]


class Outcome(NamedTuple):
    """A decision. `deciding` is the index, from 0, of the limit that decided; times are microseconds."""

    admitted: bool
    deciding: int
    remaining: int
    retry_after_us: int
    reset_after_us: int


class Window(Protocol):
    """A sliding window log per key, over several limits at once, all or none.

    `decide` counts the entries in (now - window, now] and later, by the store's own clock. Mode "hit" records `cost`
    entries if every limit admits them and writes nothing otherwise; "peek" never writes; "record" always records.
    """

    backend: str

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome: ...

    def count(self, key: str, window_us: int) -> int: ...

    def reset(self, key: str) -> None: ...
