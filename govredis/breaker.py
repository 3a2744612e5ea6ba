"""CircuitBreaker: "is this server away?" is decided here, once per process and endpoint.

The pattern is Michael Nygard's ("Release It!", 2007), with the probe in a background thread, so that no caller pays for
finding out that the server is still away.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from ._fork import renew_in_child
from .errors import BackendError, BackendUnavailable

log = logging.getLogger("govredis")

# Not the module's own generator: an application that has seeded it shall get its numbers, and forked children theirs.
_random = random.SystemRandom()

_FIRST_PROBE = 0.05
_SLOWEST_PROBE = 0.4
#: Failing again so soon after the breaker was closed is a relapse: the server answers probes, but not what is asked of
#: it. Each in a row doubles the time until the first probe, so that fewer callers find out again.
_RELAPSE = 1.0
#: A probe this late was not run: threads do not start here (uWSGI without --enable-threads, a stopping interpreter).
_OVERDUE = 0.5
_REFUSALS_TO_OPEN = 2
#: How long, at most, a caller waits for a probe that is about to close the breaker.
_DRAIN = 0.25


class Rejected(BackendError):
    """A server does not take our credentials: a BackendError to callers; a replay must not take it for an answer."""


class CircuitBreaker:
    """Closed: calls go through. Open: they fail at once with BackendUnavailable, until a probe has succeeded.

    Opens on the first timeout or the second refusal in a row. While open, `probe` runs in one background thread on a
    jittered schedule from 50 to 400 ms; where threads cannot run, a caller that finds the probe overdue runs it. A
    success closes the breaker only if it belongs to the probe: a reply that was on its way before the breaker opened
    (an older generation) proves nothing. A server that fails again within a second of having been let back in, and so
    again and again, is let in later each time, but for 400 ms at most.

    Args:
        name: the server, without password, as it shall stand in logs and errors.
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
        #: The one attribute that the closed path reads.
        self.closed = True
        self.generation = 0
        self.opened_at: float | None = None
        self.reason = ""
        self.times_opened = 0
        self._probe = probe
        self._clock = clock
        self._threads = threads
        self._refusals = 0
        self._again = False
        self._next_probe = 0.0
        self._first_wait = self._wait = _FIRST_PROBE
        self._closed_at = self._clock() - _RELAPSE
        self._stopped = threading.Event()
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._probing = threading.Lock()
        self._stopped = threading.Event()
        self._drained = threading.Event()
        self._drained.set()
        self._thread: threading.Thread | None = None

    def renew_after_fork(self) -> None:
        self._renew()
        if not self.closed:
            # The parent's thread is not here. The probe is due at once: the child's first caller runs it, and if that
            # does not help, starts a thread.
            self._next_probe = self._clock() - _OVERDUE

    def check(self) -> None:
        """Raise BackendUnavailable if open. Callers read `closed` first; this is the open path."""
        if self.closed:
            return
        if self._clock() >= self._next_probe + _OVERDUE:
            self._run_overdue_probe()
            if self.closed:
                return
        raise BackendUnavailable(f"{self.name} is away: {self.reason}")

    def _run_overdue_probe(self) -> None:
        if self._probing.acquire(blocking=False):
            try:
                self._try_probe()
            finally:
                self._probing.release()
        if not self.closed:
            self._start_thread()

    def succeeded(self) -> None:
        """A call succeeded: refusals are counted in a row."""
        if self._refusals:
            with self._lock:
                self._refusals = 0

    def failed(self, generation: int, reason: str, *, timed_out: bool) -> None:
        """A call that began in `generation` got no answer. Opens on a timeout at once, on a refusal the second time."""
        with self._lock:
            if not self.closed or generation != self.generation:
                return
            self._refusals += 1
            if not timed_out and self._refusals < _REFUSALS_TO_OPEN:
                return
            relapsed = self._clock() - self._closed_at < _RELAPSE
            self._first_wait = min(_SLOWEST_PROBE, 2 * self._first_wait) if relapsed else _FIRST_PROBE
            self._open(reason, self._first_wait)
        self._opened(reason)

    def trip(self, reason: str) -> None:
        """Open now, or, if open already, do not close before a whole new probe: something was noted for it to do.

        Once a probe has succeeded and must be repeated only for what was noted meanwhile, callers with more of it wait
        here for a moment: they would else keep the breaker open for as long as they come.
        """
        with self._lock:
            self._again = True
            opened = self.closed
            if opened:
                self._open(reason, _FIRST_PROBE)
        if opened:
            self._opened(reason)
        elif threading.current_thread() is not self._thread:
            self._drained.wait(_DRAIN)

    def _open(self, reason: str, wait: float) -> None:
        self.closed = False
        self.generation += 1
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
            self._stopped = threading.Event()  # after `close` too: who goes on using it shall not pay for the probes
            thread = threading.Thread(target=self._run, name="govredis-probe", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is going down: overdue callers probe
                if error.__context__ is not None:
                    raise error.__context__ from None  # a signal handler's exception, struck in there
                return
            self._thread = thread

    def _run(self) -> None:
        stopped = self._stopped
        while True:
            with self._lock:  # so that whoever opens the breaker next sees that this thread is ending
                if self.closed:
                    self._thread = None
                    return
            if stopped.wait(max(0.0, self._next_probe - self._clock())):
                return
            with self._probing:
                if not self.closed:
                    self._try_probe()

    def _try_probe(self) -> None:
        self._again = False
        try:
            self._probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, the server is not usable; it stands in `reason`
            self._drained.set()
            with self._lock:
                self.reason = str(error)
                self._wait = min(_SLOWEST_PROBE, self._wait * 2)
                self._next_probe = self._clock() + self._wait * _random.uniform(0.75, 1.0)
            return
        with self._lock:
            if self.closed:
                return
            if self._again:
                self._next_probe = self._clock()
                self._drained.clear()
                return
            self._closed_at = self._clock()
            away = self._closed_at - (self.opened_at or 0.0)
            self._refusals = 0
            self.opened_at = None
            self.closed = True
        self._drained.set()
        log.info("%s is back after %.1f s", self.name, away)

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
