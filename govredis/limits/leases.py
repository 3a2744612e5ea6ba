"""Leases: admissions that this process has taken in advance, and spends without a round trip."""

from __future__ import annotations

import itertools
import operator
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from .._counters import Counters
from .._daemon import make_daemon, start
from .._exit import write_at_exit
from .._fork import renew_in_child
from .._latch import Latch
from ..errors import BackendError, BackendUnavailable, NotAsked
from .backends.backend import LeasedUnits, LimitBackend, Outcome
from .hit_request import HitRequest
from .rates import Limit, RateLimits

#: A batch is this much larger than the demand that it is for, so that mostly one batch does for a lease.
_MARGIN = 1.25
#: Where fewer calls are expected in a lease, each is a round trip: the rest of a batch costs another to give back.
_LEAST = 4
#: Units taken in advance, at most. Those of a log are entries, and Redis, which does one thing at a time, writes so
#: many in 2 to 5 ms. Those of a counter are one number; but the unspent ones are counted one by one here, in some 5 ms.
_MOST_IN_LOG, _MOST_IN_COUNTER = 1000, 1_000_000
#: A larger cost is not spent from a batch: it is counted one by one, too.
MOST_COST = 1000
#: The part of a lease for which it is spent: two clocks differ by less than a thousandth.
_SPENT_FOR = 0.999
#: Seconds between two looks of the thread, which gives back what nobody replaced: at least, and at most.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 0.25

#: Identity, operation and rate: what a batch is for.
_Name: TypeAlias = tuple[str, str, Any]


class Batch:
    """Units that this process may spend, for one identity and rate. Instants are seconds of the clock.

    Args:
        request: the call that took it, and spent the first of it.
        limits, backend, outcome: that call's.
        units: None: there are no more than that call's.
        begun: when it was sent.
        received: when it was answered.

    Attributes:
        end: the first moment at which nothing of it is spent.
        limit, remaining, full_at: of the result of each call that it admits.
        asking: until then, some thread asks for the next batch.
        measured, spent: how much was spent since then of the batches before this one: the demand.
    """

    __slots__ = (
        "_left", "_spare", "_unsent", "asking", "backend", "end", "full_at", "granted", "key", "limit", "measured",
        "remaining", "request", "spent", "units",
    )  # fmt: skip

    def __init__(
        self,
        request: HitRequest,
        key: str,
        limits: RateLimits,
        backend: LimitBackend,
        outcome: Outcome,
        units: LeasedUnits | None,
        begun: float,
        received: float,
    ) -> None:
        self.request: HitRequest = request
        self.key: str = key
        self.backend: LimitBackend = backend
        self.units: LeasedUnits | None = units
        self.end: float = begun + limits.lease_us / 1_000_000 * _SPENT_FOR
        self.granted: int = request[3] if units is None else units.granted
        self.limit: Limit = limits[outcome.deciding]
        self.remaining: int = outcome.remaining
        self.full_at: float = received + outcome.reset_after_us / 1_000_000
        self.asking: float = 0.0
        self.measured: float = begun
        self.spent: int = 0
        # Threads and signal handlers share it without a lock: each takes its units in one step of C code.
        self._left = itertools.repeat(True, self.granted - request[3])
        self._spare: deque[int] = deque()
        #: A part, and its units, whose return could not be sent.
        self._unsent: deque[tuple[Any, int]] = deque()

    def spend(self, cost: int) -> bool:
        """Take so many units; False where there are not as many."""
        if cost == 1:
            return next(self._left, False)
        taken = sum(itertools.islice(self._left, cost))
        if taken < cost:
            self._spare.append(taken)
        return taken == cost

    def has_unspent(self) -> bool:
        return operator.length_hint(self._left) > 0 or bool(self._spare) or bool(self._unsent)

    def take_unspent(self) -> int:
        """Take all that is left. Returns how much it was."""
        units = sum(self._left)
        try:
            while True:
                units += self._spare.popleft()
        except IndexError:
            return units

    def take_part(self) -> tuple[Any, int] | None:
        """Take all that is left, for one thread to give it back. None: nothing is left."""
        try:
            return self._unsent.pop()
        except IndexError:
            pass
        left = self.take_unspent()
        if not left or self.units is None:
            return None
        self.granted -= left
        return self.units.part(), left

    def keep_part(self, part: tuple[Any, int]) -> None:
        """It was not sent: the next `take_part` gives it once more."""
        self._unsent.append(part)


class Leases:
    """The batches of this process, for rates with `Limit.lease`.

    A `hit` that finds no batch takes one: what its process needs in a lease, by what it has spent, and a quarter more;
    but at most half of the rest. A process that needs fewer than four in a lease takes none. Redis records all of it at
    the lease's end, which counts from when the process asked. So no admission is recorded before it happens, and there
    are never more than N within any window, even if the process is killed or stopped. Capacity that is leased to
    clients in advance is the idea of Doorman (Google, 2016).

    Under-use: an admission counts for up to `lease` seconds longer, and units that a process holds unspent count as
    taken. So a call is refused only where a log of `window + lease` seconds, with all that is held unspent, has no room
    for it. (A counter's window is a sixtieth longer, too.) A process holds at most half of the rest that it found, for
    at most `lease` seconds. Then the units go back: with the next batch, in its round trip; within half a second by a
    thread; at `close` and at the end of the process. Those of a killed process count for `lease + window` seconds. So
    do those that Redis may not have taken back, or leased without its reply arriving: the counter limits.lease_lost
    says how many these are at most.

    A result's `remaining` counts units held unspent as taken, and so does `peek`. A `retry_after` is an upper bound, as
    units may come back earlier. `refund` gives back to Redis. `reset` ends this process's leases; other processes spend
    theirs to their ends. While Redis is away, so does this one; then the fallback decides. GOVREDIS_LIMIT_MIRROR tells
    PostgreSQL only what was spent: a window that spans a failover admits what is spent of leases after it on top. A
    forked child neither spends nor gives back its parent's.

    Threads never wait for one another: beside a thread that takes a batch, each takes just what its own call needs.
    `hit_many` spends batches and takes none. Costs above 1,000, and `hit_or_reserve`, do neither.

    Args:
        entries: batches that are spent, at most. Beyond, the oldest is only given back.
        clock: seconds; runs on while the host is suspended.
        forget: called with the identity and operation whose units were given back.
    """

    def __init__(
        self, counters: Counters, entries: int, clock: Callable[[], float], forget: Callable[[str, str], None]
    ) -> None:
        self._counters = counters
        self._entries = entries
        self._clock = clock
        self._forget = forget
        self.renew_after_fork()
        renew_in_child(self)
        write_at_exit(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._batches: dict[_Name, Batch] = {}
        #: Those with units that may have to be given back, in order.
        self._ending: dict[Batch, None] = {}
        #: How often batches were forgotten: those that are being taken meanwhile are not spent.
        self._forgotten = 0
        self._thread: threading.Thread | None = None
        self._stopped = Latch()

    def spend(self, request: HitRequest) -> Batch | None:
        """The batch that admits this very request, if any does. Nothing in the request has been checked yet."""
        identity, rate, operation, cost = request
        if type(operation) is not str or type(cost) is not int:  # a subclass may say that it equals another
            return None
        try:
            batch = self._batches.get((identity, operation, tuple(rate) if isinstance(rate, list) else rate))
        except TypeError:  # it has no hash, so it is no rate
            return None
        if batch is None or not 1 <= cost <= MOST_COST or self._clock() >= batch.end:
            return None
        return batch if batch.spend(cost) else None

    def take(self, request: HitRequest, key: str, limits: RateLimits, backend: LimitBackend) -> Outcome:
        """Decide over a request that no batch admits, and take the next batch.

        Raises BackendUnavailable, BackendError.
        """
        cost, lease = request[3], limits.lease_us / 1_000_000
        name, forgotten, now = _name(request), self._forgotten, self._clock()
        last = self._batches.get(name)
        wanted, back = cost, None
        if last is not None:
            if now < last.asking:
                return backend.lease(key, limits, cost, cost, limits.lease_us, None)[0]
            last.asking = now + lease
            back = last.take_part()
            wanted += _demand(last.spent + last.granted, now - last.measured, lease, limits)
        try:
            outcome, units = backend.lease(key, limits, cost, wanted, limits.lease_us, back)
        except NotAsked:
            if last is not None and back is not None:
                last.keep_part(back)
            raise
        except BaseException as error:
            # A server that answered with an error has leased nothing. Any other may have done all of it.
            if isinstance(error, BackendUnavailable) or not isinstance(error, BackendError):
                self._lose(wanted - cost + (0 if back is None else back[1]))
            raise
        finally:
            if last is not None:
                last.asking = 0.0
        if last is not None:
            self._ending.pop(last, None)
        if back is not None:
            self._forget(request[0], request[2])
        if outcome.admitted:
            batch = Batch(request, key, limits, backend, outcome, units, now, self._clock())
            if last is not None and now - last.measured < lease:
                batch.measured, batch.spent = last.measured, last.spent + last.granted
            self._keep(name, batch, last, forgotten)
        return outcome

    def forget(self, identity: str, operation: str) -> None:
        """Spend nothing more of an identity's batches, and give nothing of them back: they are reset."""
        self._forgotten += 1
        for name in list(self._batches):
            if name[:2] == (identity, operation) and (batch := self._batches.pop(name, None)) is not None:
                batch.take_unspent()
                self._ending.pop(batch, None)

    def close(self) -> None:
        """End the thread, waiting for it, and give back all that is unspent. The next `hit` takes a batch again."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout=5)
        self._batches.clear()
        self._give_back(list(self._ending))

    write_pending = close

    def has_pending(self) -> bool:
        return any(batch.has_unspent() for batch in list(self._ending))

    # -- inside --------------------------------------------------------------------------------------------------

    def _keep(self, name: _Name, batch: Batch, last: Batch | None, forgotten: int) -> None:
        if batch.units is not None:
            self._ending[batch] = None
        with self._lock:
            held = self._batches.get(name)
            # Another thread may have taken more meanwhile; or all was reset, and the thread gives this back.
            if forgotten == self._forgotten and (held is None or held is last or batch.units is not None):
                self._batches.pop(name, None)  # so that the oldest comes first
                self._batches[name] = batch
            if len(self._batches) > self._entries:
                del self._batches[next(iter(self._batches))]
            if len(self._ending) > 2 * self._entries:  # there is no thread to give them back
                oldest = next(iter(self._ending))
                del self._ending[oldest]
                self._lose(oldest.take_unspent())
        thread = self._thread
        if batch.units is not None and (thread is None or not thread.is_alive()):
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped = Latch()
            self._thread = thread = make_daemon("govredis-leases", self._run)
            start(thread)  # without a thread, the rest of a batch goes back with the next one, or at `close`

    def _run(self) -> None:
        stopped = self._stopped
        while (batches := list(self._ending)) and not stopped.wait(self._pause(batches)):
            if self._thread is not threading.current_thread():
                return  # an exception struck `_start` just when it had started this thread: there is another
            now = self._clock()
            self._give_back([batch for batch in batches if now >= batch.end])
        self._thread = None  # before the last look: a batch that comes from now on starts another
        if self._ending and not stopped.is_set():
            self._start()

    def _pause(self, batches: list[Batch]) -> float:
        """Until the first of them ends, and a little longer: a busy identity has replaced its batch by then."""
        first = min(batch.end for batch in batches) - self._clock()
        return min(max(0.0, first) + _SHORTEST_PAUSE, _LONGEST_PAUSE)

    def _give_back(self, batches: list[Batch]) -> None:
        parts = [(batch, part) for batch in batches if (part := batch.take_part()) is not None]
        try:
            # All are of one backend: the other one leases nothing.
            returns = [(batch.key, *part) for batch, part in parts]
            given = parts[0][0].backend.give_back(returns) if parts else []
        except BackendError:
            given = [False] * len(parts)
        for (batch, (_, units)), was_given in zip(parts, given, strict=True):
            if was_given:
                self._forget(batch.request[0], batch.request[2])
            else:
                self._lose(units)
        for batch in batches:
            self._ending.pop(batch, None)

    def _lose(self, units: int) -> None:
        if units:
            self._counters.add("limits.lease_lost", units)


def _name(request: HitRequest) -> _Name:
    identity, rate, operation, _ = request
    return identity, operation, tuple(rate) if isinstance(rate, list) else rate


def _demand(spent: int, seconds: float, lease: float, limits: RateLimits) -> int:
    """How much to take in advance for a lease, where so much was spent in so many seconds."""
    # The rate of a moment says little, so a new demand is taken for no more than twice what was spent so far.
    expected = int(spent / max(seconds, lease / 2) * lease * _MARGIN)
    return 0 if expected < _LEAST else min(expected, _MOST_IN_COUNTER if limits[0].counted else _MOST_IN_LOG)
