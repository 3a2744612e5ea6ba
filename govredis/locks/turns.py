"""Short turns: for a moment, no thread of this process computes for long before another gets its turn.

CPython runs its threads in turns. A thread that makes a system call may lose its turn to those that compute, and waits
for 5 ms for each of them. The renewal of many leases makes thousands of such calls.
"""

from __future__ import annotations

import sys
from types import TracebackType

from .._fork import renew_in_child

#: Seconds of a turn, in place of the usual 0.005. An odd number, which nobody else sets.
_SHORT = 0.000503


class ShortTurns:
    """`with short_turns:` sets the interpreter's switch interval, and sets it back. For a single thread at a time.

    An interval that the application sets meanwhile stays. A child that is forked meanwhile gets the former one; if it
    was forked in C, at its first use of govredis.
    """

    def __init__(self) -> None:
        #: The last interval that was not ours. An application that reads ours and sets it later is not believed.
        self._former = 0.005
        self._entered = False
        renew_in_child(self)

    def __enter__(self) -> None:
        interval = sys.getswitchinterval()
        if not _is_ours(interval):
            self._former = interval
        if self._former > _SHORT:
            self._entered = True  # first, as a fork or an exception may come in between
            sys.setswitchinterval(_SHORT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._entered and _is_ours(sys.getswitchinterval()):
            sys.setswitchinterval(self._former)
        self._entered = False

    def renew_after_fork(self) -> None:
        self.__exit__(None, None, None)


def _is_ours(interval: float) -> bool:
    return round(interval * 1_000_000) == round(_SHORT * 1_000_000)


short_turns: ShortTurns = ShortTurns()
