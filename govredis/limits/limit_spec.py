"""LimitSpec: the limit that a `rate_limited` decorator puts on the calls of its function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeAlias, TypeVar

from .._templates import KeyTemplate, check_key
from ..errors import refuse
from ..keys import check_id, check_name, id_text
from .rates import Rate, check_cost, parse_rate

P = ParamSpec("P")
R = TypeVar("R")

#: The arguments of a call.
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = Mapping[str, Any]


class LimitSpec:
    """The arguments that every `rate_limited` decorator takes, checked at decoration.

    Args:
        rate: as in `RateLimiter.hit`, or a callable that gets a call's arguments and returns one.
        key: a template of the function's argument names, "{agent_id}"; a plain name, for all calls; or a callable that
            gets a call's arguments.
        operation: the name of the limited operation.
        cost: as in `RateLimiter.hit`, or a callable that gets a call's arguments and returns one.
        exempt: a callable that gets a call's arguments; where it returns something true, the call is let through,
            and no other callable here is called. None: no call is exempt.

    Raises ValueError for a bad argument. `RateLimiter.hit` refuses bad values that the callables return.
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
        check_key(key, "key", "{agent_id}")
        # A coroutine is true: all calls would be let through.
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

    def reader_of(self, function: Callable[..., Any]) -> Callable[[Args, Kwargs], tuple[Any, Rate, int] | None]:
        """A function that returns the identity, the rate and the cost of a call from its arguments; None: exempt.

        Raises ValueError for a key template that does not fit the function, and for a plain key that is no id, or that
        is the name of an argument: its braces were forgotten.
        """
        identify = self.identify(function)

        def read(args: Args, kwargs: Kwargs) -> tuple[Any, Rate, int] | None:
            if self.exempts(args, kwargs):
                return None
            return identify(args, kwargs), *self.terms(args, kwargs)

        return read

    def limit(self, function: Callable[P, R], admit: Callable[[Any, Rate, int], None]) -> Callable[P, R]:
        """The function behind `admit`, which raises for a call that it does not admit. Raises as `reader_of`."""
        read = self.reader_of(function)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            found = read(args, kwargs)
            if found is not None:
                admit(*found)
            return function(*args, **kwargs)

        return limited

    def exempts(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether the call is let through."""
        return self.exempt is not None and bool(self.exempt(*args, **kwargs))

    def identify(self, function: Callable[..., Any]) -> Callable[[Args, Kwargs], Any]:
        """As `reader_of`, for the identity alone."""
        key = self.key
        if callable(key):
            return lambda args, kwargs: id_text(key(*args, **kwargs))
        template = KeyTemplate(key, function, shared=True)
        if template.plain is not None:
            check_id(template.plain, "key")
            if template.plain in inspect.signature(function).parameters:
                raise ValueError(
                    f"key {key!r} of {getattr(function, '__qualname__', function)!s} is the name of an argument; write"
                    f" '{{{key}}}' for a limit of each value, or take another name for one limit of all calls"
                )
        return template.fill

    def terms(self, args: Args, kwargs: Kwargs) -> tuple[Rate, int]:
        """The call's rate and cost."""
        rate, cost = self.rate, self.cost
        return (
            rate(*args, **kwargs) if callable(rate) else rate,
            cost(*args, **kwargs) if callable(cost) else cost,
        )
