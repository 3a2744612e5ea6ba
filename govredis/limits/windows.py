"""What a store of sliding windows is: the port that Redis, PostgreSQL and the process implement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

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


class CounterEntries(NamedTuple):
    """What an admission added to counters.

    Attributes:
        at: when, in microseconds on the store's clock.
        windows_us: of which windows.
        member: the call that made them, where the store knows it by one.
    """

    at: int
    windows_us: tuple[int, ...]
    member: str = ""

    @classmethod
    def of(cls, limits: Sequence[Limit], at: int, member: str = "") -> CounterEntries:
        return cls(at, tuple({limit.window_us: None for limit in limits}), member)


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands in an identity's windows, in one store. Durations are seconds, by the store's clock.

    Attributes:
        backend: the store.
        entries: of the log, within the longest window ever used on it.
        window: that window; None where there is no log, or one that only other clients write.
        oldest, newest: how long ago these were recorded; negative for one that is booked; None without entries.
        counters: window -> count, of the sliding window counters that count something.
    """

    backend: str
    entries: int = 0
    window: float | None = None
    oldest: float | None = None
    newest: float | None = None
    counters: Mapping[float, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries or self.counters)


class Window(Protocol):
    """Sliding windows per key, over several limits at once, all or none: a log, or counters where the limits are those.

    `decide` counts the entries in (now - window, now] and later, by the store's own clock. Mode "hit" records `cost`
    entries if every limit admits them and writes nothing otherwise; "peek" never writes; "record" always records.
    Counters count what shares a bucket with such an entry too: see rates.Limit.

    `refund` removes the entries of one outcome, `cost` of them, and says whether any were left. `count` is of the log,
    or of the counter of just that window: the larger, where there are both.
    """

    backend: str

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome: ...

    def refund(self, key: str, entries: Any, cost: int) -> bool: ...

    def count(self, key: str, window_us: int) -> int: ...

    def standing(self, key: str) -> Standing: ...

    def reset(self, key: str) -> None: ...
