"""Our decorators of views: the arguments that they refuse, and the views that they would not reach."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

from flask import Flask

from ...errors import refuse


class BareViews:
    """The functions below a decorator, by id, as not all can be hashed. As views they would run without it.

    Args:
        decorator, does: its name, and its work on a view.
    """

    def __init__(self, decorator: str, does: str) -> None:
        self._decorator, self._does = decorator, does
        self._functions: WeakValueDictionary[int, Callable[..., Any]] = WeakValueDictionary()

    def check(self, function: Any) -> None:
        """Raises ValueError for what is no function of a view, and for an async one."""
        if not callable(function):
            raise refuse("the decorated object", function, "the function of a view")
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"{name_of(function)} is async; @{self._decorator} is for synchronous views")

    def add(self, function: Callable[..., Any], apps: Iterable[Flask]) -> None:
        """Note a function that is decorated now. Raises ValueError if it is a view of those apps already."""
        for layer in _layers(function):
            with contextlib.suppress(TypeError):  # an object of a class with slots cannot be watched
                self._functions[id(layer)] = layer
        for app in apps:
            if refusal := self.refusal(app):
                raise ValueError(refusal)

    def refusal(self, app: Flask) -> str:
        """Which views of the app the decorator does not reach, in words; "" if there are none."""
        called = [*app.view_functions.values(), *itertools.chain(*app.before_request_funcs.values())]
        names = sorted({name_of(function) for function in called if id(_plain(function)) in self._functions})
        if not names:
            return ""
        return (
            f"@{self._decorator} does not {self._does} {', '.join(names)}: it stands above a route, or the function"
            f" itself is also a view; put the route outermost, and give a view without @{self._decorator} a function of"
            " its own"
        )


def refuse_arguments(what: str, given: Any) -> None:
    if callable(given) and not is_plain(given):
        raise refuse(what, given, "a plain callable without arguments, which reads flask.request")


def is_plain(given: Any) -> bool:
    return not inspect.iscoroutinefunction(given) and takes(given)


def takes(given: Any, *args: Any) -> bool:
    try:
        inspect.signature(given).bind(*args)
    except TypeError:
        return False
    return True


def without(given: Any) -> Any:
    """A callable, made to ignore the view's arguments; any other value as it is."""
    return (lambda *args, **kwargs: given()) if callable(given) else given


def name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def _layers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function, and all that it wraps: another decorator may stand between ours and a route below it."""
    layer: Callable[..., Any] | None = function
    while layer is not None:
        yield _plain(layer)
        layer = getattr(layer, "__wrapped__", None)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a method: the method is a new object at each access."""
    found: Callable[..., Any] = getattr(function, "__func__", function)
    return found
