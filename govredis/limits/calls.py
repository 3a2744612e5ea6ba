"""The calls of a decorated function: whom each is for, and how many there may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .._templates import KeyTemplate
from ..errors import refuse
from ..keys import check_name
from .rates import Rate, parse_rate


class LimitedCalls:
    """What every `rate_limited` decorator takes, checked at decoration.

    Args:
        rate: as in `RateLimiter.hit`, or a callable that gets a call's arguments and returns one.
        key: a template of the function's argument names, "{agent_id}", or a callable that gets a call's arguments.
        operation: what is limited.

    Raises ValueError for a bad one.
    """

    def __init__(self, rate: Rate | Callable[..., Rate], key: str | Callable[..., Any], operation: str) -> None:
        check_name(operation, "operation")
        if not isinstance(key, str) and not callable(key):
            raise refuse("key", key, 'a template such as "{agent_id}", or a callable')
        if not callable(rate):
            parse_rate(rate)
        self.rate = rate
        self.key = key
        self.operation = operation

    def of(self, function: Callable[..., Any]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[Any, Rate]]:
        """Returns what gives, from a call's arguments, its identity and its rate.

        Raises ValueError for a key template that does not fit the function.
        """
        key, rate = self.key, self.rate
        template = None if callable(key) else KeyTemplate(key, function)

        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Rate]:
            if template is not None:
                identity = template.fill(args, kwargs)
            else:
                assert callable(key)
                identity = key(*args, **kwargs)
            return identity, (rate(*args, **kwargs) if callable(rate) else rate)

        return look
