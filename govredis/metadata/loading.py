"""Loads: a value that is not in Redis is loaded once, by a single reader, and stored there."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..client import Command
from . import entry_keys
from .backends.questions import Terms
from .backends.redis_backend import LoadLease, RedisMetadataBackend
from .immutable import immutable
from .options import CacheOptions
from .renewals import Load, Renewals
from .single_flight import SingleFlight, Start, loads_of_thread, refuse_own, running
from .values import Codec, MetadataEntry, stamp, too_deep, version_of

#: A loaded value's TTL is shorter by up to this part of it: values that were loaded together do not end together.
_JITTER = 0.1
#: Seconds between two looks for a value that another process loads: a tenth of the wait so far, within these.
_SOONEST_LOOK, _LATEST_LOOK = 0.002, 0.25
#: Seconds that a loader waits for another's load: the other may be waiting for the value that this one loads.
_NESTED_PATIENCE = 2.0
#: How often a reader looks again at a value that came over a connection too new to judge it.
_UNCLEAR_LOOKS = 3

T = TypeVar("T")

# Not the module's own generator: an application that has seeded it must get its numbers, and forked children theirs.
_random = random.SystemRandom()


class LoadRequest(NamedTuple):
    """One value that a reader wants.

    Attributes:
        ttl: seconds, before jitter.
    """

    identity: str
    key: str
    loader: Callable[[str], Any]
    ttl: float


class Turn(Enum):
    """The next step of a reader, after a miss and a look at the value's lease: the first row that applies.

    | turn       | the look has found                                        | the reader                             |
    | ---------- | --------------------------------------------------------- | -------------------------------------- |
    | `STORED`   | a value that was stored since the miss                    | gives the lease back, takes the value  |
    | `UNCLEAR`  | something, over a connection that is too new to judge it  | gives the lease back, looks again      |
    | `LOADING`  | that the lease is its own                                 | loads and stores                       |
    | `CIRCULAR` | that the lease is of a load in which this thread is       | raises RecursionError                  |
    | `OVERDUE`  | another's lease, after all its patience                   | loads and stores, under that lease     |
    | `WAITING`  | another's lease                                           | sleeps, looks again                    |

    `UNCLEAR` comes three times at most; then the value is loaded, and written over. A reader looks again after it took
    the lease, so of those who wait for a load that stored nothing a single one loads.
    """

    STORED = auto()
    UNCLEAR = auto()
    LOADING = auto()
    CIRCULAR = auto()
    OVERDUE = auto()
    WAITING = auto()


class Loads:
    """The loads of one cache, and the values that they store.

    Args:
        renewals: of the leases of running loads; None: nothing is stored, so there are no leases.
        max_bytes: of a value, in JSON; larger ones are not stored.
    """

    def __init__(
        self,
        backend: RedisMetadataBackend,
        options: CacheOptions,
        codec: Codec,
        renewals: Renewals | None,
        *,
        max_bytes: int,
    ) -> None:
        #: Seconds that a reader waits for another process's load before it loads itself: as long as that one lives.
        self.patience: float = math.inf
        self._backend = backend
        self._codec = codec
        self._renewals = renewals
        self._negative_ttl = options.negative_ttl
        self._stale = options.stale
        self._max_bytes = max_bytes
        self._single_flight = SingleFlight(options.namespace, lambda: backend.count("waits"))

    def one(self, request: LoadRequest, entry: MetadataEntry | None, terms: Terms | None) -> Any:
        """Load, or have another's load; until then `entry` is used, if there is one.

        Args:
            terms: under which the entry was looked for; None: nothing can be stored.
        """
        identity, key, *_ = request
        if entry is None and self._stale:
            entry, terms = self._backend.read_stale(key)
        if entry is not None:
            return self._refreshed(request, entry, terms)
        self._refuse_own(key)
        while True:
            # A default, not a closure: the next round has other terms.
            def go(start: Start, terms: Terms | None = terms) -> str | MetadataEntry:
                return self._found_or_loaded(request, terms, start)

            found, is_mine = self._single_flight.run(key, go)
            if is_mine or isinstance(found, str):
                return self._shown(found)
            # Another thread has found a value in Redis, perhaps before this one came: look there.
            ((entry, terms),) = self._backend.read({identity: key})
            if entry is not None:
                return entry.value

    def again(self, request: LoadRequest) -> Any:
        """Load now; the old value is used until the new one is stored."""
        taken = self._backend.take_over(request.key)
        return self._bypass(request) if taken is None else self._shown(self._under(taken[0], request, taken[1]))

    def many(
        self,
        wanted: dict[str, tuple[str, Terms | None]],
        load_many: Callable[[list[str]], Mapping[str, Any]],
        ttl: float,
    ) -> dict[str, Any]:
        """Load the values of several ids by one call. Waits for nobody else's load.

        Args:
            wanted: by id: the key, and the terms under which the value was missed.
        """
        self._backend.count("loads", len(wanted))
        leases = self._backend.take(dict(wanted.values()))
        keys = {i: key for i, (key, _) in wanted.items()}
        entries = {i: lease.entry for i, key in keys.items() if (lease := leases.get(key)) is not None}
        found = {i: self._value(entry.value) for i, entry in entries.items() if entry is not None}
        missing = [i for i in wanted if i not in found]
        generations = {i: terms.generation for i, (_, terms) in wanted.items() if terms is not None}
        fills: dict[str, Command] = {}
        texts = {}
        began = time.monotonic()
        try:
            load = Load(self, keys.values(), {key: lease.token for key, lease in leases.items() if lease.is_ours})
            loaded = self._all_loaded(load, missing, load_many, alone=len(leases) < len(wanted))
            cost = (time.monotonic() - began) / max(1, len(missing))
            for i in missing:
                (key, terms), value = wanted[i], loaded.get(i)
                texts[i], lease = self._text(value), leases.get(key)
                if lease is None or terms is None:
                    continue
                under = terms.epoch, generations[i]
                fill = self._filling(key, value, texts[i], under, lease, _jittered(ttl), cost)
                if fill is not None:
                    fills[key] = fill
        finally:
            self._backend.give_back({key: lease for key, lease in leases.items() if key not in fills})
        self._backend.store(fills.values())
        found.update((i, self._given(text)) for i, text in texts.items())
        return found

    def _all_loaded(
        self, load: Load, missing: list[str], load_many: Callable[[list[str]], Mapping[str, Any]], *, alone: bool
    ) -> Mapping[str, Any]:
        if not missing:
            return {}

        def run() -> Mapping[str, Any]:
            return self._run(load, lambda: load_many(missing))

        return self._single_flight.alone(run) if alone else run()

    def store(self, key: str, value: Any, text: str, ttl: float) -> bool:
        """Store a value that was not loaded here, without a lease; `text`: its JSON."""
        for _ in range(2):  # again over a new connection, under which the terms from before say nothing
            terms = self._backend.terms(key)
            if terms is None:
                return False
            fill = self._filling(key, value, text, (terms.epoch, terms.generation), None, ttl, 0.0)
            if fill is None or not self._backend.store([fill]):
                return False
            if self._backend.stands(terms, key):
                return True
        return False

    # -- inside --------------------------------------------------------------------------------------------------

    def _found_or_loaded(self, request: LoadRequest, terms: Terms | None, start: Start) -> str | MetadataEntry:
        """The JSON of the loaded value; or, where another was sooner, the entry that it has stored. See Turn."""
        identity, key, *_ = request
        began, waits, unclear = time.monotonic(), 0, 0
        while True:
            leases = self._backend.take({key: terms})
            lease, waited = leases.get(key), time.monotonic() - began
            if lease is None or terms is None:
                return self._loaded_alone(request, start)
            turn = self._turn(lease, waited, unclear)
            if turn is Turn.STORED:
                self._backend.give_back(leases)
                return lease.entry  # type: ignore[return-value]
            if turn is Turn.LOADING:
                start(False)
                return self._under(lease, request, terms)
            if turn is Turn.CIRCULAR:
                raise refuse_own(loads_of_thread(), key)
            if turn is Turn.OVERDUE:
                start(False)
                return self._single_flight.alone(partial(self._under, lease, request, terms))
            if turn is Turn.UNCLEAR:
                unclear += 1
                self._backend.give_back(leases)
            else:
                if not waits:
                    self._backend.count("waits")
                waits += 1
                time.sleep(min(max(_SOONEST_LOOK, waited / 10), _LATEST_LOOK) * _random.uniform(0.5, 1.0))
            ((entry, terms),) = self._backend.read({identity: key}, counted=False)
            if entry is not None:
                return entry

    def _turn(self, lease: LoadLease, waited: float, unclear: int) -> Turn:
        """Args: the seconds waited so far, and how many looks were unclear."""
        if lease.entry is not None:
            return Turn.STORED
        if lease.is_unclear and unclear < _UNCLEAR_LOOKS:
            return Turn.UNCLEAR
        if lease.is_ours:
            return Turn.LOADING
        mine = loads_of_thread()
        if any(lease.token in load.leases.values() for load in mine):
            return Turn.CIRCULAR
        return Turn.OVERDUE if waited >= self.patience or (mine and waited >= _NESTED_PATIENCE) else Turn.WAITING

    def _refreshed(self, request: LoadRequest, entry: MetadataEntry, terms: Terms | None) -> Any | None:
        """Load a value whose entry is still used, unless another does, or has."""
        key = request.key
        leases = self._backend.take({key: terms})
        lease = leases.get(key)
        if lease is None or terms is None:
            return self._bypass(request)
        if not lease.is_ours:
            return entry.value
        stored = lease.entry
        if lease.is_unclear or (stored is not None and stored.ends_at != entry.ends_at):
            self._backend.give_back(leases)
            return self._value((stored or entry).value)
        return self._shown(self._under(lease, request, terms, old=entry))

    def _bypass(self, request: LoadRequest) -> Any | None:
        """Load where nothing can be stored, once for all threads that ask meanwhile."""
        text, _ = self._single_flight.run(request.key, lambda start: self._loaded_alone(request, start))
        return self._shown(text)

    def _loaded_alone(self, request: LoadRequest, start: Start) -> str:
        """The JSON of a value that cannot be stored."""

        def load() -> str:
            self._backend.count("loads")
            return self._text(self._run(Load(self, [request.key], {}), lambda: request.loader(request.identity)))

        start(True)
        return self._single_flight.alone(load)

    def _under(
        self,
        lease: LoadLease,
        request: LoadRequest,
        terms: Terms,
        *,
        old: MetadataEntry | None = None,
    ) -> str | MetadataEntry:
        """The JSON of the value that is loaded and stored; `old`, where there is one and the loader fails."""
        key = request.key
        under = terms.epoch, terms.generation  # from before the load
        self._backend.count("loads")
        fill: Command | None = None
        began = time.monotonic()
        try:
            load = Load(self, [key], {key: lease.token} if lease.is_ours else {})
            try:
                value = self._run(load, lambda: request.loader(request.identity))
            except Exception:
                if old is None:
                    raise
                self._backend.count("degraded.loads")
                return old
            cost, text = time.monotonic() - began, self._text(value)
            fill = self._filling(key, value, text, under, lease, _jittered(request.ttl), cost)
            if fill is None and old is not None:
                self._backend.drop(key)  # the value that is there has ended
        finally:
            if fill is None:
                self._backend.give_back({key: lease})
        if fill is not None:
            self._backend.store([fill])
        return text

    def _run(self, load: Load, loader: Callable[[], T]) -> T:
        with load.running:
            if load.leases and self._renewals is not None:
                self._renewals.add(load)
            return running(load, loader)

    def _refuse_own(self, key: str) -> None:
        loads = loads_of_thread()
        if any(load.of is self and key in load.keys for load in loads):
            raise refuse_own(loads, key)

    def _filling(
        self,
        key: str,
        value: Any,
        text: str,
        under: tuple[int | None, str],
        lease: LoadLease | None,
        ttl: float,
        cost: float,
    ) -> Command | None:
        """The command that stores a value, or that there is none; None where that cannot be stored.

        Args:
            under: the epoch and the generation.
        """
        stale = self._stale
        if value is None:
            if self._negative_ttl is None:
                return None
            ttl, stale = self._negative_ttl, 0.0
        if len(text) > self._max_bytes:
            self._backend.count("too_large")
            return None
        (epoch, generation), version = under, version_of(value)
        about = stamp(text, version, ttl=ttl, cost=cost, epoch=epoch, generation=generation)
        token, stood = ("", b"") if lease is None else (lease.token, lease.stood)
        return entry_keys.fill(key, text, about, ttl=ttl, stale=stale, lease=token, stood=stood, version=version)

    def _text(self, value: Any) -> str:
        """The JSON of a loaded value, "" for none. Raises ValueError."""
        return "" if value is None else self._codec.encode(value)

    def _shown(self, found: str | MetadataEntry) -> Any:
        return self._given(found) if isinstance(found, str) else self._value(found.value)

    def _given(self, text: str) -> Any:
        """The value as a hit gives it; None for "". Raises ValueError for a value that no hit could give."""
        return self._value(self._codec.decode(text)) if text else None

    def _value(self, value: Any) -> Any:
        if self._backend.local is None:
            return value
        try:
            return immutable(value)
        except RecursionError:
            raise too_deep() from None


def is_due(entry: MetadataEntry) -> bool:
    """Is it time to load it again? Before the end of its TTL, with a chance that grows as the end comes near."""
    if entry.ends_at is None:
        return False
    left = entry.ends_at - time.time()
    if left > 40 * entry.cost:  # the logarithm of a random number has no more than 53 bits
        return False
    return left <= -entry.cost * math.log(1 - _random.random())


def _jittered(ttl: float) -> float:
    return ttl * (1 - _JITTER * _random.random())
