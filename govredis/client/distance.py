"""Distance: does Redis hang, or is it merely farther away than our timeouts allow?"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from .._daemon import start_daemon
from .._fork import renew_in_child

log: logging.Logger = logging.getLogger("govredis")


class Distance:
    """The length of a round trip to one server, measured while calls time out, with more patience than calls have.

    Args:
        name: the server's, for the log.
        timeouts: in seconds, by the names of their settings.
        measure: returns the seconds of a round trip; raises where there is none.
    """

    def __init__(self, name: str, timeouts: Mapping[str, float], measure: Callable[[], float]) -> None:
        self._name = name
        self.timeouts: Mapping[str, float] = timeouts
        self._measure = measure
        #: The settings that are too short, and the time of a round trip; "" while no such setting is known.
        self.problem: str = ""
        self._has_warned = False
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Measure now, and note a problem. Takes some seconds where Redis hangs. Raises nothing."""
        try:
            seconds = self._measure()
        except Exception:  # noqa: BLE001 - Redis is away altogether, as the breaker says
            return
        short = [f"{name} ({timeout:g} s)" for name, timeout in self.timeouts.items() if timeout <= seconds]
        if not short:
            return
        self.problem = (
            f"a round trip takes {seconds:.2g} s, longer than {' and '.join(short)}:"
            f" raise {'both' if len(short) > 1 else 'it'}, to {3 * seconds:.1g} s say"
        )
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s is too far away: %s", self._name, self.problem)

    def ask_soon(self) -> None:
        """`ask` in a thread, for the probe, which goes on meanwhile. Nothing while a thread asks, or after it found."""
        with self._lock:
            if self.problem or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = start_daemon("govredis-distance", self.ask)

    def forget(self) -> None:
        """Redis is in use again."""
        self.problem = ""
