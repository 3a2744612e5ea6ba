"""Sole: at most one frame at a time does a thing, wherever an exception strikes it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class SoleMark:
    """The mark of the frame that does it. It ends with the frame."""

    __slots__ = ("__weakref__",)


def nobody() -> SoleMark | None:
    """A free `holder`."""
    return None


class Sole:
    """A lock that no exception leaves taken: it is free once the mark that `take` returned is gone.

    A traceback may keep the mark's frame for longer, so the holder ends with `sole.holder = nobody`. No exception
    strikes between the steps of an assignment.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self.holder: Callable[[], SoleMark | None] = nobody

    def take(self) -> SoleMark | None:
        """A mark, to be kept in a local variable for as long as the thing is done; None where another has it."""
        mark = SoleMark()
        with self._lock:
            if self.holder() is not None:
                return None
            self.holder = weakref.ref(mark)
        return mark
