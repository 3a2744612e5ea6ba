"""CircuitBreaker: "is this server away?" is decided here, once per process and endpoint.

The pattern is Michael Nygard's ("Release It!", 2007). The probe runs in a background thread, so that no caller pays for
finding out that the server is still away.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ._daemon import start_daemon
from ._fork import renew_in_child
from ._latch import Latch
from ._sole import Sole, nobody
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
#: Seconds without another such answer after which a server that could not serve is taken for well again.
_QUIET = 10.0


class Rejected(BackendError):
    """A server rejects our credentials, or is of a kind that we cannot use. Callers see a BackendError.

    Not an answer: replays run again after it.
    """


class ReadOnly(BackendUnavailable):
    """A server answers and can be read, but does not write now."""


@dataclass(slots=True)
class OutageNote:
    """A time in which this process could not use a server, in seconds since 1970; `ended` is None while it is open.

    Attributes:
        kind: "refused"; "hung": no answer within the timeout; "cannot write", "cannot serve": in the server's words.
        slowest: seconds of the slowest call that got no answer.
    """

    began: float
    kind: str
    ended: float | None = None
    slowest: float = 0.0

    def is_over(self, now: float) -> bool:
        """A server that says that it cannot serve does not say when it can: silence does."""
        return self.ended is not None and (self.kind in {"refused", "hung"} or now - self.ended > _QUIET)


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
        #: The outage that goes on; None while the server is there, and where `trip` or `give_up` alone has opened.
        self.outage: OutageNote | None = None
        self._unable: OutageNote | None = None
        #: Called with each outage when it begins and when it ends, without any lock held.
        self.watchers: list[Callable[[OutageNote], None]] = []
        self._probe = probe
        self._clock = clock
        self._threads = threads
        self._again = False
        #: Open by `trip` alone.
        self._tripped = False
        #: Its opening was not logged, nor will be its closing.
        self._quiet = False
        #: Why it is open for good; "" while it is not.
        self._given_up = ""
        self._next_probe = 0.0
        self._first_wait = self._wait = _FIRST_PROBE
        self._closed_at = self._clock() - _RELAPSE
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._probing = Sole()
        self._stopped = Latch()
        self._drained = Latch()
        self._drained.set()
        self._thread: threading.Thread | None = None

    def renew_after_fork(self) -> None:
        self._renew()
        self._unable = None
        if self.outage is not None:
            self.outage = replace(self.outage, slowest=0.0)  # the parent tells of its own
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
        if self._tripped and self._thread is not threading.current_thread():
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
        mark = self._probing.take()
        if mark is None:
            return False
        try:
            self._try_probe()
        finally:
            self._probing.holder = nobody
        return True

    def succeeded(self) -> None:
        """A call succeeded: the count of refusals in a row starts anew."""
        if self.refusals:
            with self._lock:
                self.refusals = 0

    def failed(self, period: int, reason: str, *, timed_out: bool, kind: str | None = None) -> None:
        """A call that began in `period` got no answer. Opens on a timeout at once, on a refusal the second time.

        Args:
            kind: of outage; None: "hung" for a timeout, else "refused".
        """
        with self._lock:
            if not self.closed or period != self.period:
                return
            self.refusals += 1
            if not timed_out and self.refusals < _REFUSALS_TO_OPEN:
                return
            relapsed = self._clock() - self._closed_at < _RELAPSE
            self._first_wait = min(_SLOWEST_PROBE, 2 * self._first_wait) if relapsed else _FIRST_PROBE
            self._open(reason, self._first_wait)
            note = self.outage = OutageNote(time.time(), kind or ("hung" if timed_out else "refused"))
        self._opened(reason)
        self._noted(note)

    def note_slow(self, seconds: float) -> None:
        """A call got no answer for so long."""
        if (outage := self.outage) is not None and seconds > outage.slowest:
            outage.slowest = seconds

    def cannot_serve(self, kind: str) -> None:
        """The server answered that it cannot serve now. That opens nothing, as other calls may work, and is noted."""
        with self._lock:
            if not self.closed:
                return
            now, note = time.time(), self._unable
            if note is not None and note.kind == kind and not note.is_over(now):
                note.ended = now
                return
            note = self._unable = OutageNote(now, kind, now)
        self._noted(note)

    def _noted(self, note: OutageNote) -> None:
        for watch in self.watchers:
            watch(note)

    def trip(self, reason: str, *, quiet: bool = False) -> None:
        """Open now; if open already, close only after a whole new probe. Something was noted for it to do.

        While the server is not known to be away, callers that trip it again wait here for a moment. Otherwise they
        would keep it open for as long as they come. `quiet`: this caller does not wait, and nothing is logged.
        """
        with self._lock:
            self._again = True
            opened = self.closed
            if opened:
                self._quiet = quiet
                self._drained = Latch()  # first: other threads read these marks without the lock
                self._open(reason, 0.0 if self._threads else _FIRST_PROBE, tripped=True)
        if opened:
            self._opened(reason)
        elif not quiet and threading.current_thread() is not self._thread:
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

    def _open(self, reason: str, wait: float, *, tripped: bool = False) -> None:
        self._tripped = tripped
        self._quiet = self._quiet and tripped
        self.closed = False
        self.period += 1
        self.times_opened += 1
        self.opened_at = self._clock()
        self.reason = reason
        self._wait = wait
        self._next_probe = self.opened_at + self._wait

    def _opened(self, reason: str) -> None:
        """The rest of opening, without the lock: a log handler may well use this breaker."""
        self._start_thread()
        if not self._quiet:
            log.warning("%s is away (%s): fallbacks take over", self.name, reason)

    def _start_thread(self) -> None:
        if not self._threads:
            self._drained.set()
            return
        with self._lock:
            if self.closed or self._thread is not None:
                return
            self._stopped = Latch()  # after `close` too: its later users must not pay for the probes
            self._thread = start_daemon("govredis-probe", self._run)  # None: overdue callers probe
            if self._thread is None:
                self._drained.set()

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
            began = None
            with self._lock:
                if self.outage is None and not (self._given_up or self._stopped.is_set()):
                    began = self.outage = OutageNote(time.time(), "refused")
                self.reason = str(error)
                self._wait = min(_SLOWEST_PROBE, max(_FIRST_PROBE, self._wait * 2))
                self._next_probe = self._clock() + self._wait * _random.uniform(0.75, 1.0)
            if began is not None:
                self._noted(began)
            if self._quiet:
                self._quiet = False
                log.warning("%s is away (%s): fallbacks take over", self.name, error)
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
            ended, self.outage = self.outage, None
            if ended is not None:
                ended.ended = time.time()
            self.closed = True
        self._drained.set()
        if not self._quiet:
            log.info("%s is back after %.1f s", self.name, away)
        if ended is not None:
            self._noted(ended)

    def is_away(self) -> bool:
        """Has a call or a probe found the server away? Not so where `trip` or `give_up` alone has opened."""
        return not (self.closed or self._tripped or self._given_up)

    def away_for(self) -> float:
        """Seconds since the breaker opened; 0 while it is closed."""
        opened_at = self.opened_at
        return 0.0 if opened_at is None else self._clock() - opened_at

    def retire(self) -> None:
        """The server is not used any more. Its outage is over, and the probe ends, which is not waited for."""
        self._stopped.set()
        self._drained.set()
        with self._lock:
            ended, self.outage = self.outage, None
        if ended is not None:
            ended.ended = time.time()
            self._noted(ended)

    def close(self) -> None:
        """End the probe thread, waiting for it. The breaker keeps its state."""
        self._stopped.set()
        self._drained.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
