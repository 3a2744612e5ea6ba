"""The calls of a decorated function: whom each is for, how many there may be, and what each takes of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeAlias, TypeVar

from .._templates import KeyTemplate
from ..errors import refuse
from ..keys import check_name
from .rates import Rate, check_cost, parse_rate

P = ParamSpec("P")
R = TypeVar("R")

#: The arguments of a call.
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = Mapping[str, Any]


class LimitedCalls:
    """What every `rate_limited` decorator takes, checked at decoration.

    Args:
        rate: as in `RateLimiter.hit`, or a callable that gets a call's arguments and returns one.
        key: a template of the function's argument names, "{agent_id}", or a callable that gets a call's arguments.
        operation: what is limited.
        cost: as in `RateLimiter.hit`, or a callable that gets a call's arguments and returns one.
        exempt: a callable that gets a call's arguments; where it returns something true, the call is let through,
            and nothing else here is asked. None: no call is.

    Raises ValueError for a bad one. What the callables return is for `RateLimiter.hit` to refuse.
    """

    def __init__(
        self,
        rate: Rate | Callable[..., Rate],
        key: str | Callable[..., Any],
        operation: str,
        cost: int | Callable[..., int] = 1,
        exempt: Callable[..., Any] | None = None,
    ) -> None:
        check_name(operation, "operation")
        if not isinstance(key, str) and not callable(key):
            raise refuse("key", key, 'a template such as "{agent_id}", or a callable')
        # What a coroutine function returns is true: all calls would be let through.
        if exempt is not None and (not callable(exempt) or inspect.iscoroutinefunction(exempt)):
            raise refuse("exempt", exempt, "a plain callable, or None")
        limits = () if callable(rate) else parse_rate(rate)
        if not callable(cost):
            check_cost(cost, limits)
        self.rate = rate
        self.key = key
        self.operation = operation
        self.cost = cost
        self.exempt = exempt

    def of(self, function: Callable[..., Any]) -> Callable[[Args, Kwargs], tuple[Any, Rate, int] | None]:
        """Returns what gives, from a call's arguments, its identity, its rate and its cost; None: it is exempt.

        Raises ValueError for a key template that does not fit the function.
        """
        identify = self.identify(function)

        def look(args: Args, kwargs: Kwargs) -> tuple[Any, Rate, int] | None:
            if self.exempts(args, kwargs):
                return None
            return identify(args, kwargs), *self.terms(args, kwargs)

        return look

    def limit(self, function: Callable[P, R], admit: Callable[[Any, Rate, int], None]) -> Callable[P, R]:
        """The function, each call of which `admit` lets through, or raises. Raises as `of`."""
        look = self.of(function)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            found = look(args, kwargs)
            if found is not None:
                admit(*found)
            return function(*args, **kwargs)

        return limited

    def exempts(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether the call is let through."""
        return self.exempt is not None and bool(self.exempt(*args, **kwargs))

    def identify(self, function: Callable[..., Any]) -> Callable[[Args, Kwargs], Any]:
        """As `of`, of the identity alone."""
        key = self.key
        if callable(key):
            return lambda args, kwargs: key(*args, **kwargs)
        return KeyTemplate(key, function).fill

    def terms(self, args: Args, kwargs: Kwargs) -> tuple[Rate, int]:
        """The call's rate and cost."""
        rate, cost = self.rate, self.cost
        return (
            rate(*args, **kwargs) if callable(rate) else rate,
            cost(*args, **kwargs) if callable(cost) else cost,
        )
