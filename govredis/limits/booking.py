"""Hits of what comes again by itself, and gets its turn in the order of calls. For Celery's tasks."""

from __future__ import annotations

from typing import Literal

from ..errors import BackendUnavailable
from .limiter import RateLimiter
from .questions import Question
from .rates import Rate
from .result import RateLimitResult


def hit_or_book(
    limiter: RateLimiter,
    identity: str,
    rate: Rate,
    *,
    booking: str,
    operation: str,
    cost: int = 1,
    patience: float = 0.0,
    admit: bool = True,
) -> tuple[RateLimitResult, bool]:
    """`limiter.hit`; what is refused is booked, and everybody else's hits count it.

    Called again when that time has come, it is admitted; where others were admitted meanwhile later than they were
    booked for, it may be told a later time, and keeps its place before all that was booked for later. Only Redis books,
    and only windows that are logs: the others are hit.

    Args:
        booking: what identifies it: the same at each call.
        patience: seconds that the caller waits, where that is enough, to call again: meanwhile it keeps its place.
        admit: False: what there is room for is booked too, for now.

    Returns the result, and whether it is booked, for `retry_after` seconds from now. Raises ValueError, BackendError.
    """
    question: Question = (identity, rate, operation, cost)
    key, limits = limiter._check(question)
    # What is only booked is neither counted nor mirrored: it is, when it is called for.
    mode: Literal["hit", "peek"] = "hit" if admit else "peek"
    store, stores = limiter._redis_window, limiter._windows
    if store is not None and not limits[0].counted:
        patience_us = int(patience * 1_000_000)
        try:
            outcome, at = store.book(key, limits, cost, booking, patience_us=patience_us, admit=admit)
        except BackendUnavailable:
            stores = stores[1:]
        else:
            return limiter._result(outcome, store, limits, question, mode, None), at > 0
    return limiter._ask(question, mode, stores), False
