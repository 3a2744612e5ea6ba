"""HitRequest: the question that a hit asks of a limiter."""

from __future__ import annotations

from typing import TypeAlias

from ..errors import refuse
from ..keys import Id, id_text
from .rates import Rate

#: Identity, rate, operation and cost, as they were given; but the identity is its text.
HitRequest: TypeAlias = tuple[str, Rate, str, int]
#: The same as a caller of `hit_many` gives it: without the last, or without the last two.
HitArguments: TypeAlias = tuple[Id, Rate] | tuple[Id, Rate, str] | tuple[Id, Rate, str, int]


def request_of(hit: HitArguments, operation: str, cost: int) -> HitRequest:
    if not isinstance(hit, tuple) or not 2 <= len(hit) <= 4:
        raise refuse("hit", hit, "(identity, rate), (identity, rate, operation) or (identity, rate, operation, cost)")
    rest: tuple[str | int, ...] = (operation, cost)
    return (id_text(hit[0]), *hit[1:], *rest[len(hit) - 2 :])
