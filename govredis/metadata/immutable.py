"""Immutable values: the in-process tier gives the same object to all readers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

_Refuses: TypeAlias = Callable[..., NoReturn]


def _refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    kind = type(self).__mro__[1].__name__
    raise TypeError(
        f"this value is shared by all who read it from the cache: change a copy, copy.deepcopy(value) or {kind}(value)"
    )


class ImmutableDict(dict[str, Any]):
    """A dict that cannot be changed; its copies, also those by pickle, are plain dicts."""

    __slots__ = ()
    __setitem__: _Refuses = _refused
    __delitem__: _Refuses = _refused
    __ior__: _Refuses = _refused
    clear: _Refuses = _refused
    pop: _Refuses = _refused
    popitem: _Refuses = _refused
    setdefault: _Refuses = _refused
    update: _Refuses = _refused

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {name: copy.deepcopy(value, memo) for name, value in self.items()}

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class ImmutableList(list[Any]):
    """A list of the same kind."""

    __slots__ = ()
    __setitem__: _Refuses = _refused
    __delitem__: _Refuses = _refused
    __iadd__: _Refuses = _refused
    __imul__: _Refuses = _refused
    append: _Refuses = _refused
    clear: _Refuses = _refused
    extend: _Refuses = _refused
    insert: _Refuses = _refused
    pop: _Refuses = _refused
    remove: _Refuses = _refused
    reverse: _Refuses = _refused
    sort: _Refuses = _refused

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return [copy.deepcopy(value, memo) for value in self]

    def __copy__(self) -> list[Any]:
        return list(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def immutable(value: Any) -> Any:
    """A value from JSON in a form that cannot be changed: equal to it, and of subclasses of its types."""
    if isinstance(value, dict):
        return ImmutableDict({name: immutable(member) for name, member in value.items()})
    if isinstance(value, list):
        return ImmutableList(map(immutable, value))
    return value
