"""Renewal after fork, in one place.

Whatever a process holds that its child must not share (sockets, threads, mutexes, random seeds) belongs to an object
that registers here and renews itself in the child.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    def renew_after_fork(self) -> None: ...


_objects: WeakSet[Renewable] = WeakSet()


def renew_in_child(obj: Renewable) -> None:
    """Have `obj.renew_after_fork()` called in every child of this process, for as long as `obj` lives."""
    _objects.add(obj)


def _after_fork_in_child() -> None:
    for obj in list(_objects):
        obj.renew_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
