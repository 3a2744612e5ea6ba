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
from ..errors import BackendError
from .backends.backend import LeasedUnits, LimitBackend, Outcome
from .hit_request import HitRequest
from .rates import RateLimits

#: A batch is this much larger than the demand that it is for, so that mostly one batch does for a lease.
_MARGIN = 1.25
#: And at most so many times as large as all that was spent in the lease so far: the rate of a moment says little.
_GROWTH = 4
#: Units of a batch, at most. Those of a log are entries, and Redis, which does one thing at a time, writes so many in
#: 2 to 5 ms. Those of a counter are one number there; but here the unspent ones are counted one by one, in some 5 ms.
_MOST_IN_LOG, _MOST_IN_COUNTER = 1000, 1_000_000
#: A larger cost is not spent from a batch: it is counted one by one, too.
MOST_COST = 1000
#: Seconds after its end at which the thread gives back the rest of a batch. A busy identity has replaced it by then.
_LATE = 0.02
#: The thread outlives the last batch by this many seconds.
_IDLE = 5.0

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
        measured, spent: the batches since then, this one not included, and how much of them was spent: the demand.
    """

    __slots__ = (
        "_left", "_spare", "asking", "backend", "end", "full_at", "granted", "key", "limit", "measured", "remaining",
        "request", "spent", "units",
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
        self.request = request
        self.key = key
        self.backend = backend
        self.units = units
        self.end = begun + limits.lease_us / 1_000_000
        self.granted = request[3] if units is None else units.granted
        self.limit = limits[outcome.deciding]
        self.remaining = outcome.remaining
        self.full_at = received + outcome.reset_after_us / 1_000_000
        self.asking = 0.0
        self.measured = begun
        self.spent = 0
        # Threads and signal handlers share it without a lock: each takes its units in one step of C code.
        self._left = itertools.repeat(True, self.granted - request[3])
        self._spare: deque[int] = deque()

    def spend(self, cost: int) -> bool:
        """Take so many units; False where there are not as many."""
        if cost == 1:
            return next(self._left, False)
        taken = sum(itertools.islice(self._left, cost))
        if taken < cost:
            self._spare.append(taken)
        return taken == cost

    def has_unspent(self) -> bool:
        return operator.length_hint(self._left) > 0 or bool(self._spare)

    def take_unspent(self) -> int:
        """Take all that is left. Returns how much it was."""
        units = sum(self._left)
        while self._spare:
            units += self._spare.popleft()
        return units


class Leases:
    """The batches of this process, for rates with `Limit.lease`.

    A `hit` that finds no batch takes one: as much as its process needed in the last lease and a quarter more, but at
    most half of the rest. Redis records all of it at the lease's end, which counts from when the process asked. So no
    admission is recorded before it happens, and there are never more than N within any window, even if the process is
    killed or stopped. Capacity that is leased to clients in advance is the idea of Doorman (Google, 2016).

    Under-use: an admission counts for up to `lease` seconds longer, and units that a process holds unspent count as
    taken. So a call is refused only where a log of `window + lease` seconds, with all that is held unspent, has no room
    for it. (A counter's window is a sixtieth longer, too.) A process holds at most half of the rest that it found, for
    at most `lease` seconds. Then the units go back: with the next batch, in its round trip; or by a thread, at `close`
    and at the end of the process. Those of a killed process count for `lease + window` seconds. So do those that could
    not be given back: see the counter limits.lease_lost.

    A result's `remaining` counts units held unspent as taken, and so does `peek`. A `retry_after` is an upper bound, as
    units may come back earlier. `refund` gives back to Redis. `reset` ends this process's leases; other processes spend
    theirs to their ends. While Redis is away, so does this one; then the fallback decides. A forked child neither
    spends nor gives back its parent's.

    Threads never wait for one another: beside a thread that takes a batch, each takes just what its own call needs.
    Costs above 1,000, and `hit_or_reserve`, take no batch.

    Args:
        entries: batches, at most. Beyond, the oldest is given back.
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
        #: Those with units that may have to be given back.
        self._ending: deque[Batch] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = Latch()

    def spend(self, request: HitRequest) -> Batch | None:
        """The batch that admits this very request, if any does. Nothing in the request has been checked yet."""
        identity, rate, operation, cost = request
        try:
            batch = self._batches.get((identity, operation, rate))
        except TypeError:  # a list of Limit: it has no hash
            batch = self._batches.get((identity, operation, tuple(rate))) if type(rate) is list else None
        if batch is None or type(cost) is not int or not 1 <= cost <= MOST_COST or self._clock() >= batch.end:
            return None
        return batch if batch.spend(cost) else None

    def take(self, request: HitRequest, key: str, limits: RateLimits, backend: LimitBackend) -> Outcome:
        """Decide over a request that no batch admits, and take the next batch.

        Raises BackendUnavailable, BackendError.
        """
        cost = request[3]
        name = _name(request)
        batch = self._batches.get(name)
        now = self._clock()
        if batch is not None and now < batch.asking:
            return backend.lease(key, limits, cost, cost, limits.lease_us, None)[0]
        wanted, unspent, spent = cost, None, 0
        if batch is not None:
            lease = limits.lease_us / 1_000_000
            batch.asking = now + lease
            left = batch.take_unspent()
            spent = batch.spent + batch.granted - left
            wanted = cost + _demand(spent, now - batch.measured, lease, limits)
            if left and batch.units is not None:
                unspent = batch.units.part(), left
        try:
            outcome, units = backend.lease(key, limits, cost, wanted, limits.lease_us, unspent)
        except BackendError:
            if unspent is not None:
                self._lose(unspent[1])
            raise
        finally:
            if batch is not None:
                batch.asking = 0.0
        if outcome.admitted:
            taken = Batch(request, key, limits, backend, outcome, units, now, self._clock())
            if batch is not None and now - batch.measured < lease:
                taken.measured, taken.spent = batch.measured, spent
            self._keep(name, taken)
        return outcome

    def forget(self, identity: str, operation: str) -> None:
        """Spend nothing more of an identity's batches, and give nothing of them back: they are reset."""
        for name in list(self._batches):
            if name[:2] == (identity, operation) and (batch := self._batches.pop(name, None)) is not None:
                batch.take_unspent()

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

    def _keep(self, name: _Name, batch: Batch) -> None:
        with self._lock:
            self._batches.pop(name, None)  # so that the oldest comes first
            self._batches[name] = batch
            if len(self._batches) > self._entries:
                del self._batches[next(iter(self._batches))]
        if batch.units is not None:
            self._ending.append(batch)
            thread = self._thread
            if thread is None or not thread.is_alive():
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
        while (batches := list(self._ending)) and not stopped.wait(self._until_first_ends(batches)):
            if self._thread is not threading.current_thread():
                return  # an exception struck `_start` just when it had started this thread: there is another
            now = self._clock()
            self._give_back([batch for batch in batches if now >= batch.end])
        self._thread = None  # before the last look: a batch that comes from now on starts another
        if self._ending and not stopped.is_set():
            self._start()

    def _until_first_ends(self, batches: list[Batch]) -> float:
        return max(_LATE, min(batch.end for batch in batches) - self._clock() + _LATE)

    def _give_back(self, batches: list[Batch]) -> None:
        for batch in batches:
            try:
                self._ending.remove(batch)
            except ValueError:
                continue  # another thread gives it back
            left = batch.take_unspent()
            if not left or batch.units is None:
                continue
            try:
                batch.backend.refund(batch.key, batch.units.part(), left)
            except BackendError:
                self._lose(left)
            else:
                self._forget(batch.request[0], batch.request[2])

    def _lose(self, units: int) -> None:
        self._counters.add("limits.lease_lost", units)


def _name(request: HitRequest) -> _Name:
    identity, rate, operation, _ = request
    return identity, operation, tuple(rate) if type(rate) is list else rate


def _demand(spent: int, seconds: float, lease: float, limits: RateLimits) -> int:
    """How much to take in advance for a lease, where so much was spent in so many seconds."""
    expected = int(spent / max(seconds, 1e-6) * lease * _MARGIN)
    return min(expected, spent * _GROWTH, (_MOST_IN_COUNTER if limits[0].counted else _MOST_IN_LOG) - 1)
