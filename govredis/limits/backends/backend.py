"""LimitBackend: the base class of the backends, and the data that they take and return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from ...errors import BackendError
from ..rates import Limit

if TYPE_CHECKING:
    from ...client import RedisNode

Mode = Literal["hit", "peek", "record"]


@dataclass(slots=True)
class Outcome:
    """A decision. `deciding` is the index, from 0, of the limit that decided; times are microseconds.

    `entries`: after an admission, what the backend's `refund` needs to know its own entries by.
    """

    admitted: bool
    deciding: int
    remaining: int
    retry_after_us: int
    reset_after_us: int
    entries: Any = field(default=None, compare=False)


class CounterEntries(NamedTuple):
    """The traces of an admission in counters.

    Attributes:
        at: when, in microseconds on the backend's clock.
        windows_us: the windows of these counters.
        member: the call that made them, where the backend knows it by one.
    """

    at: int
    windows_us: tuple[int, ...]
    member: str = ""

    @classmethod
    def of(cls, limits: Sequence[Limit], at: int, member: str = "") -> CounterEntries:
        return cls(at, tuple({limit.window_us: None for limit in limits}), member)


@dataclass(frozen=True, slots=True)
class WindowStats:
    """The contents of an identity's windows in a backend. Durations are seconds, by the backend's clock.

    Attributes:
        backend: its name.
        entries: those of the log, within the longest window that is known to be used on it.
        window: that window; None where there is no log, or where only other clients write it.
        oldest, newest: how long ago these were recorded; negative for a reservation and a lease; None without entries.
        counters: window -> count, for each sliding window counter that counts something.
    """

    backend: str
    entries: int = 0
    window: float | None = None
    oldest: float | None = None
    newest: float | None = None
    counters: Mapping[float, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries or self.counters)


class LeasedUnits(Protocol):
    """A batch that a backend leased to this process.

    Attributes:
        granted: how many units it has, spent or not.
    """

    @property
    def granted(self) -> int: ...

    def part(self) -> Any:
        """Units of the batch, as `LimitBackend.refund` takes them: which units, is settled by its first call."""


class Admission(NamedTuple):
    """An admission by one backend, as another is told of it.

    Attributes:
        key: the key of its log.
        at: when its answer came, in seconds on the clock of this process. It was admitted a moment earlier.
        cost: whole entries.
        longest_us: the longest window among its limits.
        name: unique; the same however often it is told.
    """

    key: str
    at: float
    cost: int
    longest_us: int
    name: str

    def age_us(self, now: float) -> int:
        return int((now - self.at) * 1_000_000)


class LimitBackend(ABC):
    """Keeps sliding windows per key, and decides over several limits at once, all or none.

    The window of a key is a log, or a counter for each window where the limits ask for counters. A decision counts the
    entries in (now - window, now] and later, by the backend's own clock. Counters also count whatever shares a bucket
    with such an entry: see rates.Limit.

    Every method raises BackendUnavailable while the backend is away, and BackendError where it answers with an error.

    Attributes:
        name: as `RateLimitResult.backend` says it.
        on_server: processes share it, and asking it costs a round trip.
        leases: it leases admissions.
    """

    name: ClassVar[str]
    on_server: ClassVar[bool] = False
    leases: ClassVar[bool] = False

    @abstractmethod
    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        """Decide over `limits`.

        Args:
            mode: "hit" records `cost` entries if every limit admits them, and writes nothing otherwise. "peek" never
                writes. "record" always records.
        """

    def hit_many(self, hits: Sequence[tuple[str, Sequence[Limit], int]]) -> list[Outcome | BackendError]:
        """`decide` in mode "hit" for each key, limits and cost, in order.

        A BackendError stands in place of an Outcome where the backend refused that hit alone. A BackendUnavailable does
        where the part of it that keeps that key is away.
        """
        return [self.decide(key, limits, cost, "hit") for key, limits, cost in hits]

    def reserve(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        reservation: str,
        *,
        patience_us: int = 0,
        admit: bool = True,
    ) -> tuple[Outcome, int]:
        """`decide` in mode "hit"; where there is no room, take the first time at which there will be.

        Reservations keep the order of calls. A backend that keeps none of these limits decides, and reserves nothing.

        Args:
            reservation: its name, the same at every call for the same thing.
            patience_us: where a reservation's time has come but its room comes only in so many microseconds, it keeps
                its place before all later ones. The caller waits, and calls again. Longer waits get a later time.
            admit: False: room that there is now is reserved too, for now.

        Returns the outcome, and the time reserved in microseconds of the backend's clock; 0 for none.
        """
        return self.decide(key, limits, cost, "hit" if admit else "peek"), 0

    def lease(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        wanted: int,
        lease_us: int,
        back: tuple[Any, int] | None,
    ) -> tuple[Outcome, LeasedUnits | None]:
        """`decide` in mode "hit"; where more is left than `cost`, the caller gets some of it, to spend by itself.

        The whole batch is recorded at the lease's end; a batch of just `cost` is recorded now. A backend that does not
        lease gives no more than `cost`.

        Args:
            wanted: how much the caller takes at most, `cost` included.
            lease_us: how long the caller may spend it, from when it asked.
            back: a part of the caller's last batch, and how many units it gives back first.

        Returns the outcome; and the batch, or None where the caller got no more than `cost`.
        """
        return self.decide(key, limits, cost, "hit"), None

    def give_back(self, parts: Sequence[tuple[str, Any, int]]) -> list[bool]:
        """`refund` of several: the key of each, a part of a batch, and how many units it gives back."""
        return [self.refund(key, part, units) for key, part, units in parts]

    @abstractmethod
    def refund(self, key: str, entries: Any, cost: int) -> bool:
        """Remove the entries of one outcome, `cost` of them. Returns whether any were left."""

    @abstractmethod
    def count(self, key: str, window_us: int) -> int:
        """The entries within a window: in the log, or in the counter of just that window; the larger, if both exist."""

    @abstractmethod
    def stats(self, key: str) -> WindowStats:
        """The contents of the windows of a key. Writes nothing."""

    @abstractmethod
    def reset(self, key: str) -> None:
        """Forget a key."""

    def purge(self) -> int:
        """Delete the windows that have ended, where they do not end by themselves. Returns how many."""
        return 0


class ServerLimitBackend(LimitBackend):
    """A backend that processes share, and that can be told what another backend admitted."""

    on_server = True

    @abstractmethod
    def replicate(
        self, admissions: Sequence[Admission], now: float, node: RedisNode | None = None
    ) -> tuple[int, BackendError | None]:
        """Record admissions of another backend, each at the time that lies as long ago, by the server's clock.

        Args:
            now: as `Admission.at` counts.
            node: the one that has these keys, where the backend has nodes.

        Returns how many it could not record because of what their keys hold, and the first error among these. After an
        error (also ConfigurationError) some may have been recorded.
        """
