"""What a store of sliding windows is: the port that Redis, PostgreSQL and the process implement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .rates import Limit

Mode = Literal["hit", "peek", "record"]


@dataclass(slots=True)
class Outcome:
    """A decision. `deciding` is the index, from 0, of the limit that decided; times are microseconds.

    `entries`: of an admission, what the store's `refund` takes to know which entries are its own.
    """

    admitted: bool
    deciding: int
    remaining: int
    retry_after_us: int
    reset_after_us: int
    entries: Any = field(default=None, compare=False)


class Window(Protocol):
    """A sliding window log per key, over several limits at once, all or none.

    `decide` counts the entries in (now - window, now] and later, by the store's own clock. Mode "hit" records `cost`
    entries if every limit admits them and writes nothing otherwise; "peek" never writes; "record" always records.

    `refund` removes the entries of one outcome, `cost` of them, and says whether any were left.
    """

    backend: str

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome: ...

    def refund(self, key: str, entries: Any, cost: int) -> bool: ...

    def count(self, key: str, window_us: int) -> int: ...

    def reset(self, key: str) -> None: ...
