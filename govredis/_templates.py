"""Key templates of decorators: "agent:{agent_id}" filled from the arguments of the decorated function."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class _NotNone(string.Formatter):
    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise ValueError(f"{field_name} is None, which identifies nobody")
        return value, first


_format = _NotNone()


class KeyTemplate:
    """A template bound to a function's signature.

    Args:
        template: text with the function's argument names in braces.
        function: the decorated function.
        shared: it may name no argument: all callers are to share one key, as they may a lock.

    Attributes:
        plain: what it always comes to, where it names no argument.

    Raises ValueError at once for a name that is not an argument, for a template without any unless it may be shared
    (every caller would have one identity), and for one that cannot be parsed.
    """

    def __init__(self, template: str, function: Callable[..., Any], *, shared: bool = False) -> None:
        self.template = template
        self._signature = inspect.signature(function)
        try:
            names = list(_names(template))
        except ValueError as error:
            raise ValueError(f"key {template!r}: {error}") from None
        known = [p.name for p in self._signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        where = f"key {template!r} of {getattr(function, '__qualname__', function)!s}"
        if not names and not shared:
            raise ValueError(f"{where} names no argument; it must name at least one of {', '.join(known) or '(none)'}")
        for name in names:
            if name.split(".")[0].split("[")[0] not in known:
                raise ValueError(f"{where} names {name!r}; the function's arguments are {', '.join(known) or '(none)'}")
        self.plain = None if names else template.format()

    def fill(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The key for one call.

        Raises TypeError where the call does not fit the signature, as the call would; ValueError where an argument that
        the template names is None: all such calls would share one identity.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _format.vformat(self.template, (), bound.arguments)


def refuse_unless_plain(function: Any, decorator: str) -> None:
    """Raise ValueError for what only begins when it is called: what surrounds the call would be over by then."""
    inner = function.__func__ if isinstance(function, staticmethod) else function
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(kind(inner) for kind in kinds):
        name = getattr(inner, "__qualname__", inner)  # a partial has none
        raise ValueError(f"{name!s} only begins when it is called; @{decorator} is for plain functions")


def _names(template: str) -> Iterator[str]:
    for _, name, spec, _ in string.Formatter().parse(template):
        if name is not None:
            yield name
            yield from _names(spec or "")  # a format spec may name arguments too
