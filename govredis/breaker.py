"""CircuitBreaker: "is this server away?" is decided here, once per process and endpoint.

The pattern is Michael Nygard's ("Release It!", 2007). The probe runs in a background thread, so that no caller pays for
finding out that the server is still away.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections.abc import Callable

from ._daemon import start_daemon
from ._fork import renew_in_child
from ._latch import Latch
from .errors import BackendError, BackendUnavailable, NotAsked

log: logging.Logger = logging.getLogger("govredis")

# Not the generator of the module `random`: its numbers are the application's, and forked children would share them.
_random = random.SystemRandom()

_FIRST_PROBE = 0.05
_SLOWEST_PROBE = 0.4
#: A failure so soon after the breaker was closed is a relapse: the server answers probes, but not real calls. Each
#: relapse in a row doubles the time until the first probe, so that fewer callers find out again.
_RELAPSE = 1.0
#: A probe this late has no thread to run it (uWSGI without --enable-threads, a stopping interpreter).
_OVERDUE = 0.5
_REFUSALS_TO_OPEN = 2
#: How long, at most, a caller waits for a probe that is about to close the breaker.
_DRAIN = 0.25


class Rejected(BackendError):
    """A server rejects our credentials, or is of a kind that we cannot use. Callers see a BackendError.

    Not an answer: replays run again after it.
    """


class ReadOnly(BackendUnavailable):
    """A server answers and can be read, but does not write now."""


class _Prober:
    """The mark of the thread that probes. It ends with the thread's frame, wherever an exception strikes that."""

    __slots__ = ("__weakref__",)


def _nobody() -> _Prober | None:
    return None


class CircuitBreaker:
    """Closed: calls go through. Open: they fail at once with BackendUnavailable, until a probe has succeeded.

    | state | entered by | calls | left by |
    | --- | --- | --- | --- |
    | closed | a probe that succeeds | go through | a timeout, or the second refusal in a row |
    | open | such a failure | raise BackendUnavailable | a probe that succeeds |
    | tripped | `trip`, while closed | wait for the probe, then as open | the probe, or 0.25 s |
    | given up | `give_up` | raise Rejected | nothing |

    While open, `probe` runs in one background thread on a jittered schedule from 50 to 400 ms. Where threads cannot
    run, a caller that finds the probe overdue runs it. Only the probe closes the breaker: a reply that was on its way
    before the breaker opened (in an older period) proves nothing. A server that fails again within a second of its
    return, time after time, waits longer for each first probe, up to 400 ms.

    `trip` is for work that a probe can do at once while the server is there. Callers wait for it, so that their work
    does not go elsewhere for want of a connection. `give_up` is for a mistake that no waiting mends: a fallback would
    hide it.

    Args:
        name: the server, without password, for logs and errors.
        probe: returns when the server can be used again, raises otherwise; called without any lock held.
        clock: seconds, monotonic.
        threads: False runs every probe in an overdue caller.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        threads: bool = True,
    ) -> None:
        self.name = name
        #: The closed path reads this attribute and no other.
        self.closed: bool = True
        #: Another number after each opening. A call's failure counts only in the period in which the call began.
        self.period: int = 0
        #: In a row. Each call that succeeds reads it.
        self.refusals: int = 0
        self.opened_at: float | None = None
        self.reason: str = ""
        self.times_opened: int = 0
        self._probe = probe
        self._clock = clock
        self._threads = threads
        self._again = False
        #: Open by `trip` alone.
        self._tripped = False
        #: Why it is open for good; "" while it is not.
        self._given_up = ""
        self._next_probe = 0.0
        self._first_wait = self._wait = _FIRST_PROBE
        self._closed_at = self._clock() - _RELAPSE
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._prober: Callable[[], _Prober | None] = _nobody
        self._stopped = Latch()
        self._drained = Latch()
        self._drained.set()
        self._thread: threading.Thread | None = None

    def renew_after_fork(self) -> None:
        self._renew()
        if not self.closed:
            # The parent's thread is not here. The probe is due at once: the child's first caller runs it, and starts a
            # thread if the server is still away.
            self._next_probe = self._clock() - _OVERDUE

    def check(self) -> None:
        """The open path: callers read `closed` first. Raises BackendUnavailable while open, Rejected once given up."""
        if self.closed:
            return
        if self._given_up:
            raise Rejected(self._given_up)
        if self._clock() >= self._next_probe + _OVERDUE:
            self.probe_now()
            if self.closed:
                return
        if self._tripped and self._thread not in (None, threading.current_thread()):
            self._drained.wait(_DRAIN)
            if self.closed:
                return
        raise NotAsked(f"{self.name} is away: {self.reason}")

    def probe_now(self) -> None:
        """Probe in this thread, unless another thread does."""
        self._probe_alone()
        if not self.closed:
            self._start_thread()

    def _probe_alone(self) -> bool:
        """Probe, unless another thread does. Returns whether this thread did."""
        prober = _Prober()
        with self._lock:
            if self._prober() is not None:
                return False
            self._prober = weakref.ref(prober)
        try:
            self._try_probe()
        finally:
            self._prober = _nobody
        return True

    def succeeded(self) -> None:
        """A call succeeded: the count of refusals in a row starts anew."""
        if self.refusals:
            with self._lock:
                self.refusals = 0

    def failed(self, period: int, reason: str, *, timed_out: bool) -> None:
        """A call that began in `period` got no answer. Opens on a timeout at once, on a refusal the second time."""
        with self._lock:
            if not self.closed or period != self.period:
                return
            self.refusals += 1
            if not timed_out and self.refusals < _REFUSALS_TO_OPEN:
                return
            relapsed = self._clock() - self._closed_at < _RELAPSE
            self._first_wait = min(_SLOWEST_PROBE, 2 * self._first_wait) if relapsed else _FIRST_PROBE
            self._open(reason, self._first_wait)
        self._opened(reason)

    def trip(self, reason: str) -> None:
        """Open now; if open already, close only after a whole new probe. Something was noted for it to do.

        While the server is not known to be away, callers that trip it again wait here for a moment. Otherwise they
        would keep it open for as long as they come.
        """
        with self._lock:
            self._again = True
            opened = self.closed
            if opened:
                self._open(reason, 0.0 if self._threads else _FIRST_PROBE)
                self._tripped = True
                self._drained = Latch()
        if opened:
            self._opened(reason)
        elif threading.current_thread() is not self._thread:
            self._drained.wait(_DRAIN)

    def give_up(self, why: str) -> None:
        """Open for good: from now on each call raises Rejected with this text."""
        with self._lock:
            first, self._given_up = not self._given_up, why
            if self.closed:
                self.closed = False
                self.period += 1
        self._drained.set()
        if first:
            log.warning("%s", why)

    def _open(self, reason: str, wait: float) -> None:
        self.closed = self._tripped = False
        self.period += 1
        self.times_opened += 1
        self.opened_at = self._clock()
        self.reason = reason
        self._wait = wait
        self._next_probe = self.opened_at + self._wait

    def _opened(self, reason: str) -> None:
        """The rest of opening, without the lock: a log handler may well use this breaker."""
        self._start_thread()
        log.warning("%s is away (%s): fallbacks take over", self.name, reason)

    def _start_thread(self) -> None:
        if not self._threads:
            return
        with self._lock:
            if self.closed or self._thread is not None:
                return
            self._stopped = Latch()  # after `close` too: its later users must not pay for the probes
            self._thread = start_daemon("govredis-probe", self._run)  # None: overdue callers probe

    def _run(self) -> None:
        stopped = self._stopped
        while True:
            with self._lock:  # so that the next `_open` sees that this thread is ending
                if self.closed or self._given_up or stopped.is_set():
                    self._thread = None
                    return
            if stopped.wait(max(0.0, self._next_probe - self._clock())) or self.closed:
                continue
            if not self._probe_alone():
                stopped.wait(_FIRST_PROBE)

    def _try_probe(self) -> None:
        self._again = False
        try:
            self._probe()
        except Exception as error:  # noqa: BLE001 - any error says that the server cannot be used
            self._tripped = False
            self._drained.set()
            with self._lock:
                self.reason = str(error)
                self._wait = min(_SLOWEST_PROBE, max(_FIRST_PROBE, self._wait * 2))
                self._next_probe = self._clock() + self._wait * _random.uniform(0.75, 1.0)
            return
        with self._lock:
            if self.closed or self._given_up:
                return
            if self._again:
                self._next_probe = self._clock()
                self._drained = Latch()
                return
            self._closed_at = self._clock()
            away = self._closed_at - (self.opened_at or 0.0)
            self.refusals = 0
            self.opened_at = None
            self.closed = True
        self._drained.set()
        log.info("%s is back after %.1f s", self.name, away)

    def is_away(self) -> bool:
        """Has a call or a probe found the server away? Not so where `trip` or `give_up` alone has opened."""
        return not (self.closed or self._tripped or self._given_up)

    def away_for(self) -> float:
        """Seconds since the breaker opened; 0 while it is closed."""
        opened_at = self.opened_at
        return 0.0 if opened_at is None else self._clock() - opened_at

    def close(self) -> None:
        """End the probe thread, waiting for it. The breaker keeps its state."""
        self._stopped.set()
        self._drained.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
