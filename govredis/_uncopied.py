"""Uncopied: the base of objects that stand for a resource of this process. A copy would claim the same resource."""

from __future__ import annotations

from typing import NoReturn


class Uncopied:
    """Cannot be copied or pickled: `copy.copy`, `copy.deepcopy` and `pickle.dumps` raise TypeError.

    The destructor of a copy would end a resource that the original still holds, and a forked child would not renew the
    copy.
    """

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(f"a {kind} cannot be copied or pickled: it belongs to this process; hand on the {kind} itself")
