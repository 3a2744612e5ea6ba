"""Short turns: for a moment, no thread of this process computes for long before another gets its turn.

CPython runs its threads in turns. A thread that makes a system call may lose its turn to those that compute, and waits
for 5 ms for each of them. To renew many leases takes some thousand such calls.
"""

from __future__ import annotations

import sys
from types import TracebackType

from .._fork import renew_in_child

#: Seconds of a turn, in place of the usual 0.005.
_SHORT = 0.0005


class ShortTurns:
    """`with short_turns:` sets the interpreter's switch interval, and sets it back. For a single thread at a time.

    An interval that the application sets meanwhile stays. A child that is forked meanwhile gets the former one.
    """

    def __init__(self) -> None:
        #: The interval before, and ours as the interpreter rounds it.
        self._intervals: tuple[float, float] | None = None
        renew_in_child(self)

    def __enter__(self) -> None:
        before = sys.getswitchinterval()
        if before > _SHORT:
            sys.setswitchinterval(_SHORT)
            self._intervals = before, sys.getswitchinterval()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        intervals, self._intervals = self._intervals, None
        if intervals is not None and sys.getswitchinterval() == intervals[1]:
            sys.setswitchinterval(intervals[0])

    def renew_after_fork(self) -> None:
        self.__exit__(None, None, None)


short_turns: ShortTurns = ShortTurns()
