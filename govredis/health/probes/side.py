"""Side: the probes of one server, in a thread of their own, until a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from ..._daemon import start_daemon
from ..._latch import Latch
from ..report import Check

#: Seconds that a caller waits for the thread to begin, before it runs the probes itself (uWSGI without threads).
_TO_BEGIN = 0.1


#: Seconds of one wait. A stall of the machine counts as one.
_SLICE = 0.05


class Patience:
    """The time that `check` has waited so far, for all sides together."""

    def __init__(self) -> None:
        self.spent: float = 0.0


class _SideRun:
    """One run of a side's probes."""

    def __init__(self, look: Callable[[], Iterator[Check]]) -> None:
        self._look = look
        self._claim = threading.Lock()
        self._begun = Latch()
        self.ended = Latch()
        self.began_at: float = time.monotonic()
        self.is_hung = False
        self.checks: list[Check] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return  # another thread runs it
        self._begun.set()
        try:
            self.checks.extend(self._look())
        except BaseException as error:  # noqa: BLE001 - for the caller
            self.error = error
        finally:
            self.ended.set()

    def wait(self, patience: Patience, deadline: float) -> bool:
        """Returns whether it has ended."""
        if not self._begun.wait(_TO_BEGIN):
            self.run()
        while not self.ended.wait(_SLICE) and not self.is_hung:
            patience.spent += _SLICE
            self.is_hung = patience.spent >= deadline
        return self.ended.is_set()


class Side:
    """Looks at one server.

    A run that is not over by its deadline goes on, and its findings are dropped. Until then no other run begins, so
    that threads do not pile up.

    Args:
        look: yields the checks, the server's own first. It may hang.
        deadline: seconds for all of them.
        hung: the check of a server that has not answered for so many seconds.
    """

    def __init__(
        self, look: Callable[[], Iterator[Check]], deadline: float, hung: Callable[[float], list[Check]]
    ) -> None:
        self._look = look
        self._deadline = deadline
        self._hung = hung
        self._round: _SideRun | None = None

    def renew_after_fork(self) -> None:
        self._round = None

    def begin(self) -> None:
        if self._round is None or self._round.ended.is_set():
            self._round = _SideRun(self._look)
            start_daemon("govredis-health", self._round.run)

    def finish(self, patience: Patience) -> list[Check]:
        """The checks of this run; where it has not ended, those that are there, and that of a hung server."""
        current = self._round
        assert current is not None
        if current.wait(patience, self._deadline):
            if current.error is not None:
                raise current.error
            return current.checks
        hung = self._hung(time.monotonic() - current.began_at)
        names = {check.name for check in hung}
        return hung + [check for check in list(current.checks) if check.name not in names]
