"""`cached`: a function whose results are cached. See MetadataCache.cached."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from .._templates import KeyTemplate, refuse_unless_plain
from ..errors import refuse
from ..keys import check_id

if TYPE_CHECKING:
    from .cache import MetadataCache

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class CachedFunction(Generic[P, R]):
    """A function whose results are cached. Calls are `get_or_load`; also of a method, on its instance."""

    def __init__(
        self, cache: MetadataCache, template: KeyTemplate, function: Callable[P, R], first: tuple[Any, ...] = ()
    ) -> None:
        functools.update_wrapper(self, function)
        self._cache = cache
        self._template = template
        self._function = function
        self._first = first

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._cache.get_or_load(self._id(args, kwargs), lambda _: self.uncached(*args, **kwargs))

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, cache what it returns, whatever is cached, and return it."""
        return self._cache.reload(self._id(args, kwargs), lambda _: self.uncached(*args, **kwargs))

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """As MetadataCache.invalidate, of what a call with these arguments has cached."""
        self._cache.invalidate(self._id(args, kwargs))

    def uncached(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function; the cache has no part in it."""
        return self._function(*self._first, *args, **kwargs)

    def _id(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return self._template.fill((*self._first, *args), kwargs)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> CachedFunction[P, R]: ...
    @overload
    def __get__(
        self: CachedFunction[Concatenate[S, Q], R], instance: S, owner: type | None = None
    ) -> CachedFunction[Q, R]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return CachedFunction(self._cache, self._template, self._function, (instance,))


class Functions:
    """The functions whose results one namespace holds: no two may give one key, or one would answer for the other."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[KeyTemplate, bool]] = {}

    def add(self, function: Callable[..., Any], template: KeyTemplate, shared: bool) -> None:
        """Raises ValueError where a call of another one could have the same key, unless both are shared.

        A function that was decorated before, as where its module is loaded again, takes its own place.
        """
        added = _identity(function)
        for known, (others, others_shared) in list(self._known.items()):
            if known != added and template.may_meet(others) and not (shared and others_shared):
                raise ValueError(
                    f"{_shown(added)} with the template {template.template!r} could have a key of {_shown(known)} with"
                    f" {others.template!r}; begin each template with a word of its own, use two namespaces,"
                    " or say shared=True for both"
                )
        self._known[added] = template, shared


def _identity(function: Any) -> object:
    """The name of a function in any process that has loaded it."""
    inner = function.__func__ if isinstance(function, staticmethod) else function
    name = getattr(inner, "__qualname__", None)
    if name is None:  # a partial, say: nothing but itself
        return inner
    # All lambdas of a module have one name.
    return inner.__module__, name, inner.__code__ if name.endswith("<lambda>") else None


def _shown(identity: object) -> str:
    return f"{identity[0]}.{identity[1]}" if isinstance(identity, tuple) else repr(identity)


class Decorator:
    """Decorates a function, whose results are then cached."""

    def __init__(self, cache: MetadataCache, template: str, functions: Functions, shared: bool) -> None:
        self._cache = cache
        self._template = template
        self._functions = functions
        self._shared = shared

    def __call__(self, function: Callable[P, R]) -> CachedFunction[P, R]:
        refuse_unless_plain(function, "cached")
        if not isinstance(self._template, str):
            raise refuse("key", self._template, 'a template such as "{agent_id}", or a plain name')
        # With arguments, one call's result would be another's answer.
        template = KeyTemplate(self._template, function, typed=True, shared=not inspect.signature(function).parameters)
        if template.plain is not None:
            check_id(template.fill((), {}), "key")
        self._functions.add(function, template, self._shared)
        return CachedFunction(self._cache, template, function)
