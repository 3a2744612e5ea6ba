"""RateLimitResult: a limiter's decision, and the way to give it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..errors import BackendUnavailable, NotAsked
from .rates import Limit


class _Refundable:
    # No field of the dataclass below: it is neither shown nor compared, and does not go along where that is pickled.
    __slots__ = ("_taken",)

    #: The function that gives back an admitted hit, and its arguments. Any other result does not have it.
    _taken: tuple[Callable[..., bool], tuple[Any, ...]]


@dataclass(slots=True)
class RateLimitResult(_Refundable):
    """A limiter's decision. True in a boolean context if allowed. Durations are seconds.

    Attributes:
        allowed: whether the call was admitted.
        limit: the Limit that decided: the Limit violated longest, else the Limit with the least left.
        remaining: how much of it was left after this call.
        retry_after: 0 if allowed; else when the call would be admitted if nobody else came, and not before. Beside
            leases it may be admitted earlier, as other processes give back.
        reset_after: when `limit` would be full again if nobody came.
        violated: `limit` if denied, else None.
        backend: "redis", "postgres", "local" (this process only) or "none" (GOVREDIS_LIMIT_FALLBACK decided; in
            `hit_many` also: the key holds something else).
        degraded: True if it was not Redis that decided.
    """

    allowed: bool
    limit: Limit
    remaining: int
    retry_after: float
    reset_after: float
    violated: Limit | None
    backend: str
    degraded: bool

    def __bool__(self) -> bool:
        return self.allowed

    def refund(self) -> bool:
        """Give back what this hit took, to the backend that admitted it: exactly its own entries, and once.

        Returns True if something was given back. Otherwise it returns False and writes nothing: the second time,
        where the entries have aged out or were reset, and for a result that took nothing (a denial, a `peek`, a hit
        that GOVREDIS_LIMIT_FALLBACK let through). A copy, pickled or not, gives nothing back either. With
        GOVREDIS_LIMIT_MIRROR the other server keeps the entries that it was told: it is stricter by them.

        Raises BackendUnavailable where that backend is away, or all of this process's connections to it are in use;
        BackendError. The entries may have been given back all the same. A second try is harmless for a log of Redis,
        and where nothing was sent; else it returns False.

        A counter has sums in place of entries. It gives back to the sixtieth of its window in which the hit counted, if
        that still holds as much. After a reset, or a loss of data, within that sixtieth it may be another hit's part.
        """
        try:
            taken = self._taken
            del self._taken  # only one of two threads gets past this line
        except AttributeError:
            return False
        give_back, which = taken
        try:
            return give_back(*which)
        except BackendUnavailable as error:
            if isinstance(error, NotAsked) or not (self.degraded or self.limit.counted):
                self._taken = taken  # type: ignore[misc]  # mypy does not see the slot of the base
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))
