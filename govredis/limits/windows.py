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
    """Sliding windows per key, over several limits at once, all or none: a log, or counters where the limits are those.

    `decide` counts the entries in (now - window, now] and later, by the store's own clock. Mode "hit" records `cost`
    entries if every limit admits them and writes nothing otherwise; "peek" never writes; "record" always records.
    Counters count what shares a bucket with such an entry too: see rates.Limit. `count` is of the log, or of the
    counter of just that window: the larger, where there are both.
    """

    backend: str

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome: ...

    def count(self, key: str, window_us: int) -> int: ...

    def reset(self, key: str) -> None: ...
