"""Guard: may what is cached in Redis be used now? The reader's side; tick.py is what makes it so.

A reader asks for the guard once and keeps it until it ends, so that a hit stays one GET. Its end is counted from before
it was asked for, on a clock that is never set. What is kept tells nothing of another server, or of one restarted with
older data, and such a one is reached over a new connection only: so the count of connects, as it was before the guard
was asked for, must stand after the value was read. If it does not, guard *and* value are read again, in this order: a
guard that was made valid after the value was read says nothing of it. (A master that is made a replica must drop its
clients, as Sentinel has it do; a proxy must not change servers behind a connection.)
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._counters import Counters
from .._fork import renew_in_child
from ..client import RedisClient, Script
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from ..keys import Keys
from .outbox import Outbox, OutboxLag
from .tick import GuardRecord, Invalidations, PostgresAway, Ticker, microseconds

if TYPE_CHECKING:
    from ..postgres import Postgres

__all__ = ["Guard", "Seen"]

log = logging.getLogger("govredis")

#: Seconds on a clock that is never set, and that runs on in suspend where there is such a one.
clock: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
#: What is left of a guard's life when it is renewed in the background.
_RENEWED_AT = 1 / 3
#: How long a reader that finds no valid guard waits for somebody else's tick, at most.
_PATIENCE = 0.25
_SLICE = 0.01
#: How long one thread's tick keeps others from it, at most.
_CLAIMED_FOR = 5.0
#: Seconds between two tries that failed.
_BETWEEN_TRIES = 1.0


class Seen:
    """A guard as this process has seen it: valid until `until`, while `connects` stands."""

    __slots__ = ("connects", "epoch", "renew_at", "until")

    def __init__(self, epoch: int, until: float, renew_at: float, connects: int) -> None:
        self.epoch = epoch
        self.until = until
        self.renew_at = renew_at
        self.connects = connects


class Guard:
    """The guard of one Redis and key prefix, and the tick. Safe to share between threads, and across fork.

    To use a cached value: `seen = guard.look()` before it is read and `guard.stands(seen)` after; and its epoch must be
    `seen.epoch`. What is loaded after `look` is stored with that epoch.

    Args:
        staleness: X, in seconds: how far a value used under a valid guard may be behind what is committed.
        patience: see Ticker.
        clock: seconds, never set.
        threads: False renews in the caller that finds the guard ended.
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient,
        postgres: Postgres,
        *,
        staleness: float,
        patience: float,
        counters: Counters,
        clock: Callable[[], float] = clock,
        threads: bool = True,
    ) -> None:
        self.staleness = staleness
        self._outbox = Outbox(postgres)
        self.ticker = Ticker(keys, redis, postgres, staleness=staleness, patience=patience, counters=counters)
        #: PostgreSQL could not be asked for a tick: there is no valid guard, and nothing better than what is cached.
        self.blind = False
        self._redis = redis
        self._counters = counters
        self._clock = clock
        self._threads = threads
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._claimed_until = 0.0
        self._seen: Seen | None = None
        self._again_at = 0.0
        self._thread: threading.Thread | None = None

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self) -> Seen | None:
        """The guard, if one is valid; None: go to the source (or, where `blind`, take what there is).

        Costs nothing while a guard is known. Else one round trip, and where none is valid, a tick, for which others
        wait up to 0.25 s. Raises BackendUnavailable if Redis is away; ConfigurationError naming `govredis migrate`.
        """
        seen = self._seen
        if seen is None or seen.connects != self._redis.connects:
            return self._find()
        now = self._clock()
        if now >= seen.renew_at:
            if now >= seen.until:
                return self._find()
            seen.renew_at = seen.until  # once
            self._renew_soon()
        return seen

    def stands(self, seen: Seen) -> bool:
        """Was what has been read since `look` read under `seen`? If not, look and read again."""
        return seen.connects == self._redis.connects and self._clock() < seen.until

    def epoch(self) -> int | None:
        """The epoch, if a guard is valid now. As `look`."""
        seen = self.look()
        return None if seen is None else seen.epoch

    def state(self, *, timeout: float | None = None) -> tuple[bool, OutboxLag | None]:
        """Is a guard valid in Redis, and what has Redis not been told? None: it was never told of anything, or has
        forgotten. Does not tick. Raises BackendUnavailable, BackendError, ConfigurationError.
        """
        _, raw = self.ticker.read()
        held = GuardRecord.parse(raw)
        return self._ask() is not None, None if held is None else self._outbox.lag(held.epoch, timeout=timeout)

    def _find(self) -> Seen | None:
        seen = self._ask()
        deadline = self._clock() + _PATIENCE
        while seen is None and self._again_at <= self._clock() < deadline:
            if self._claim():
                try:
                    seen = self._tick_and_ask()
                finally:
                    self._claimed_until = 0.0
            else:
                time.sleep(_SLICE)  # another thread is at it
                seen = self._seen
                if seen is not None and not self.stands(seen):
                    seen = None
        return seen

    def _tick_and_ask(self) -> Seen | None:
        seen = self._ask()  # while we waited for our turn somebody may have ticked
        if seen is None:
            self._tick()
            seen = self._ask()
            if seen is None:
                time.sleep(_SLICE)  # another process is at it
        return seen

    def _ask(self) -> Seen | None:
        """The guard in Redis, if it is valid."""
        for _ in range(2):  # the first time, perhaps, over a new connection
            connects, sent = self._redis.connects, self._clock()
            now_us, raw = self.ticker.read()
            if self._redis.connects == connects:
                break
        seen = self._valid(now_us, raw, sent, connects)
        if seen is not None:
            self._seen = seen
            self.blind = False
        return seen

    def _valid(self, now_us: int, raw: bytes | None, sent: float, connects: int) -> Seen | None:
        held = GuardRecord.parse(raw)
        # At a time later than now, the clock has been set back: nobody knows how long it has been valid.
        if held is None or held.at > now_us:
            return None
        left = self.staleness - (now_us - held.at) / 1_000_000
        if left <= 0:
            return None
        return Seen(held.epoch, sent + left, sent + left - self.staleness * _RENEWED_AT, connects)

    # -- over a connection of the in-process tier's ----------------------------------------------------------------

    def questions(self) -> list[tuple[str, ...]]:
        """The commands that ask for the guard."""
        return [("TIME",), ("GET", self.ticker.key)]

    def answered(self, sent: float, replies: list[Any]) -> Seen | None:
        """The guard that their replies tell of, if it is valid; `sent`: when they were asked, on the guard's clock."""
        time_now, raw = replies
        return self._valid(microseconds(time_now), raw, sent, -1)

    def _claim(self) -> bool:
        """May this thread tick? Not while another is at it; but one that an exception has struck claims nothing for
        ever: two at once are harmless."""
        with self._lock:
            now = self._clock()
            if now < self._claimed_until:
                return False
            self._claimed_until = now + _CLAIMED_FOR
            return True

    # -- ticking -------------------------------------------------------------------------------------------------

    def drain(self) -> int | None:
        """Tick now. Returns of how many entries of the outbox Redis was told; None if it could not be, or another is
        at it. Redis or PostgreSQL being away is counted, not raised; ConfigurationError is.
        """
        return self._tick()

    def watch(self, namespace: str, invalidations: Invalidations, scripts: Sequence[Script] = ()) -> None:
        """Say how the outbox's entries of a namespace are invalidated; without, as cached values are.

        Args:
            invalidations: makes of (id, version) pairs the commands that do it; each must be harmless the second time,
                and where there is nothing to invalidate.
            scripts: those among the commands.
        """
        self.ticker.register(namespace, invalidations, scripts)

    def _tick(self) -> int | None:
        try:
            told = self.ticker.tick()
        except BackendUnavailable as error:
            self.blind = isinstance(error, PostgresAway)
            self._counters.add("guard.degraded.postgres" if self.blind else "guard.degraded.redis")
            self._again_at = self._clock() + _BETWEEN_TRIES
            return None
        self.blind = False
        return told

    def _renew_soon(self) -> None:
        if not self._threads:
            return
        thread = threading.Thread(target=self._renew, name="govredis-guard", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter is going down: a caller renews at its end
            if error.__context__ is not None:
                raise error.__context__ from None  # a signal handler's exception, struck in there
            return
        self._thread = thread

    def _renew(self) -> None:
        if not self._claim():
            return
        try:
            seen = self._ask()
            # Not its `renew_at`: somebody may have taken it by now.
            if seen is None or self._clock() >= seen.until - self.staleness * _RENEWED_AT:
                self._tick()
                self._ask()
        except (BackendError, ConfigurationError) as error:
            if not isinstance(error, BackendUnavailable):
                log.error("the guard of cached values could not be renewed: %s", error)
        finally:
            self._claimed_until = 0.0

    def close(self) -> None:
        """Wait for the thread that renews, if there is one."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
