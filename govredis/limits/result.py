"""RateLimitResult: what a limiter decided, and the way to give it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..errors import BackendUnavailable
from .rates import Limit


class _Refundable:
    # No field of the dataclass below: it is neither shown nor compared, and does not go along where that is pickled.
    __slots__ = ("_taken",)

    #: What gives back the entries of an admitted hit, and its arguments. Of any other result it is not set.
    _taken: tuple[Callable[..., bool], tuple[Any, ...]]


@dataclass(slots=True)
class RateLimitResult(_Refundable):
    """What a limiter decided. True in a boolean context if allowed. Durations are seconds.

    Attributes:
        allowed: whether the call was admitted.
        limit: the Limit that decided: the one violated longest, else the one with the least left.
        remaining: how much of it was left after this call.
        retry_after: 0 if allowed; else when the call would be admitted if nobody else came, and not before.
        reset_after: when `limit` would be full again if nobody came.
        violated: `limit` if denied, else None.
        backend: "redis", "postgres", "local" (this process only) or "none" (GOVREDIS_LIMIT_FALLBACK decided).
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
        """Give back what this hit took, in the store that admitted it: exactly its own entries, and once.

        Returns True if something was given back. False, and nothing is written, the second time, for a result that took
        nothing (a denial, a `peek`, one that GOVREDIS_LIMIT_FALLBACK let through), for one whose entries have aged out
        or were reset, and for a copy (pickled or not): that of the caller alone gives back. With GOVREDIS_LIMIT_MIRROR
        the other server keeps what it was told: it is stricter by that.

        Raises BackendUnavailable where that store is away; BackendError. It may have been given back all the same.
        Where it was Redis, a second try is harmless; else there is none.
        """
        try:
            taken = self._taken
            del self._taken  # of two threads, one gets past this line
        except AttributeError:
            return False
        give_back, which = taken
        try:
            return give_back(*which)
        except BackendUnavailable:
            if not self.degraded:
                self._taken = taken  # type: ignore[misc]  # mypy does not see the slot of the base
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))
