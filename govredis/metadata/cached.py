"""`cached`: a function whose results are cached. See MetadataCache.cached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from .._templates import KeyTemplate, refuse_unless_plain

if TYPE_CHECKING:
    from .cache import MetadataCache

P = ParamSpec("P")
R = TypeVar("R")


class Cached(Generic[P, R]):
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
        found: Any = self._cache.get_or_load(self._id(args, kwargs), lambda _: self.uncached(*args, **kwargs))
        return cast(R, found)

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, cache what it returns, whatever is cached, and return it."""
        found: Any = self._cache.reload(self._id(args, kwargs), lambda _: self.uncached(*args, **kwargs))
        return cast(R, found)

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """As MetadataCache.invalidate, of what a call with these arguments has cached."""
        self._cache.invalidate(self._id(args, kwargs))

    def uncached(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function; the cache has no part in it."""
        return self._function(*self._first, *args, **kwargs)

    def _id(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return self._template.fill((*self._first, *args), kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return Cached(self._cache, self._template, self._function, (instance,))


class Decorator:
    """What makes a function one whose results are cached."""

    def __init__(self, cache: MetadataCache, template: str) -> None:
        self._cache = cache
        self._template = template

    def __call__(self, function: Callable[P, R]) -> Cached[P, R]:
        refuse_unless_plain(function, "cached")
        return Cached(self._cache, KeyTemplate(self._template, function), function)
