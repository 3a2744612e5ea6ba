"""What a limiter is asked."""

from __future__ import annotations

from typing import TypeAlias

from ..errors import refuse
from .rates import Rate

#: What `hit` was asked: identity, rate, operation and cost, as they were given.
Question: TypeAlias = tuple[str, Rate, str, int]
#: One of which the last, or the last two, may be left out.
Hit: TypeAlias = tuple[str, Rate] | tuple[str, Rate, str] | Question


def question_of(hit: Hit, operation: str, cost: int) -> Question:
    if not isinstance(hit, tuple) or not 2 <= len(hit) <= 4:
        raise refuse("hit", hit, "(identity, rate), (identity, rate, operation) or (identity, rate, operation, cost)")
    rest: tuple[str | int, ...] = (operation, cost)
    return (*hit, *rest[len(hit) - 2 :])
