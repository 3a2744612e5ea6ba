"""Loads: what is not in Redis is loaded once, by one of those who want it, and stored there."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..client import Command
from . import cells
from .flights import Flights
from .frozen import read_only
from .guard import Seen
from .shelf import Lease, Shelf
from .values import Record, decode, encode, version_of

#: A loaded value's TTL is shorter by up to this part of it: what was loaded together does not end together.
_JITTER = 0.1
#: Seconds between two looks for what another is loading.
_LOOKS = 0.002, 0.05

# Not the module's own generator: an application that has seeded it shall get its numbers, and forked children theirs.
_random = random.SystemRandom()


class Loads:
    """The loads of one cache, and what they store.

    Args:
        negative_ttl: seconds that it is remembered that there is no value; None: it is not.
        stale: seconds for which a value stays after its TTL, to be used while it is loaded anew.
        max_bytes: of a value, in JSON; larger ones are not stored.
    """

    def __init__(
        self, shelf: Shelf, *, namespace: str, negative_ttl: float | None, stale: float, max_bytes: int
    ) -> None:
        #: Seconds that a reader waits for what another loads, before it loads itself.
        self.patience = 2.0
        self._shelf = shelf
        self._negative_ttl = negative_ttl
        self._stale = stale
        self._max_bytes = max_bytes
        self._flights = Flights(namespace)

    def one(
        self,
        identity: str,
        key: str,
        loader: Callable[[str], Any],
        ttl: float,
        record: Record | None,
        seen: Seen | None,
    ) -> Any | None:
        """Load, or have somebody else's load; `record` is what there is meanwhile."""
        give_up = time.monotonic() + self.patience
        pause, longest = _LOOKS
        while True:
            leases = self._shelf.take([key], seen)
            if leases is None:
                return self._alone(identity, key, loader)
            lease = leases[key]
            found = lease.record
            if found is not None and not is_over(found) and (record is None or found.ends_at != record.ends_at):
                self._shelf.give_back(leases)  # somebody else was sooner
                return self._value(found)
            if lease.is_unclear and time.monotonic() < give_up:  # then it is loaded, and written over
                self._shelf.give_back(leases)
            elif lease.is_ours:
                return self._under(lease, identity, key, loader, ttl, record, seen)
            elif record is not None:
                return record.value
            elif time.monotonic() >= give_up:
                break
            else:
                if pause == _LOOKS[0]:
                    self._shelf.count("waits")
                time.sleep(pause * _random.uniform(0.5, 1.0))
                pause = min(longest, 2 * pause)
            (record,), seen = self._shelf.read({identity: key})
            if record is not None:
                return record.value
        return self._flights.alone(lambda: self._under(lease, identity, key, loader, ttl, None, seen))

    def again(self, identity: str, key: str, loader: Callable[[str], Any], ttl: float) -> Any | None:
        """Load now; the old value is used until the new one is stored."""
        seen = self._shelf.look()
        lease = self._shelf.take_over(key, seen)
        if lease is None:
            return self._alone(identity, key, loader)
        return self._under(lease, identity, key, loader, ttl, None, seen)

    def many(
        self,
        keys: dict[str, str],
        load_many: Callable[[list[str]], Mapping[str, Any]],
        ttl: float,
        seen: Seen | None,
    ) -> dict[str, Any]:
        missing = list(keys)
        self._shelf.count("loads", len(missing))
        leases = self._shelf.take(list(keys.values()), seen)
        if leases is None:
            loaded = self._flights.alone(lambda: load_many(missing))
            texts = {i: encode(loaded[i]) for i in missing if loaded.get(i) is not None}
            return {i: self._given(text) for i, text in texts.items()}
        found = {i: self._value(record) for i in missing if (record := leases[keys[i]].record) and not is_over(record)}
        missing = [i for i in missing if i not in found]
        generation = self._shelf.generation.known.value
        fills: dict[str, Command] = {}
        texts = {}
        began = time.monotonic()
        try:
            loaded = load_many(missing) if missing else {}
            cost = (time.monotonic() - began) / max(1, len(missing))
            for i in missing:
                key, shorter = keys[i], ttl * (1 - _JITTER * _random.random())
                fill, texts[i] = self._filling(key, loaded.get(i), seen, generation, leases[key].token, shorter, cost)
                if fill is not None:
                    fills[key] = fill
        finally:
            self._shelf.give_back({key: lease for key, lease in leases.items() if key not in fills})
        self._shelf.store(fills.values())
        found.update((i, self._given(text)) for i, text in texts.items())
        return found

    def store(self, key: str, value: Any, ttl: float) -> bool:
        """Store what was not loaded here, without a lease."""
        for _ in range(2):  # again over a new connection, where what was known of the guard says nothing
            seen = self._shelf.look()
            generation = None if seen is None else self._shelf.known_generation()
            if seen is None or generation is None:
                return False
            fill, _ = self._filling(key, value, seen, generation, "", ttl, 0.0)
            if fill is None or not self._shelf.store([fill]):
                return False
            if self._shelf.stands(seen):
                return True
        return False

    # -- inside --------------------------------------------------------------------------------------------------

    def _alone(self, identity: str, key: str, loader: Callable[[str], Any]) -> Any | None:
        """Where nothing can be stored."""
        self._shelf.count("loads")
        text = self._flights.run(key, lambda: None if (value := loader(identity)) is None else encode(value))
        return None if text is None else self._given(text)

    def _under(
        self,
        lease: Lease,
        identity: str,
        key: str,
        loader: Callable[[str], Any],
        ttl: float,
        record: Record | None,
        seen: Seen | None,
    ) -> Any | None:
        generation = self._shelf.generation.known.value  # from before the load
        self._shelf.count("loads")
        fill: Command | None = None
        began = time.monotonic()
        try:
            try:
                value = loader(identity)
            except Exception:
                if record is None:
                    raise
                self._shelf.count("degraded.loads")
                return record.value
            ttl *= 1 - _JITTER * _random.random()
            fill, text = self._filling(key, value, seen, generation, lease.token, ttl, time.monotonic() - began)
            if fill is None and record is not None:
                self._shelf.drop(key)  # what is there is not it
        finally:
            if fill is None:
                self._shelf.give_back({key: lease})
        if fill is not None:
            self._shelf.store([fill])
        return self._given(text)

    def _filling(
        self, key: str, value: Any, seen: Seen | None, generation: str, lease: str, ttl: float, cost: float
    ) -> tuple[Command | None, str]:
        """The command that stores a value, None where it is not to be stored; and what it stores."""
        stale = self._stale
        if value is None and self._negative_ttl is not None:
            ttl, stale = self._negative_ttl, 0.0
        epoch = None if seen is None or seen.epoch < 0 else seen.epoch
        text = encode(value, epoch, ttl=ttl, cost=cost, generation=generation)
        if value is None and self._negative_ttl is None:
            return None, text
        if len(text) > self._max_bytes:
            self._shelf.count("too_large")
            return None, text
        return cells.fill(key, text, str(max(1, int((ttl + stale) * 1000))), lease, version_of(value)), text

    def _given(self, text: str) -> Any:
        """The value as a hit gives it."""
        record = decode(text)
        return None if record is None else self._value(record)

    def _value(self, record: Record) -> Any:
        return record.value if self._shelf.local is None else read_only(record.value)


def is_over(record: Record) -> bool:
    """Is its TTL over, and is it there for its `stale` time only?"""
    return record.ends_at is not None and time.time() >= record.ends_at


def is_due(record: Record) -> bool:
    """Is it time to load it anew? Before the end of its TTL, with a chance that grows the nearer that is."""
    if record.ends_at is None:
        return False
    left = record.ends_at - time.time()
    if left > 40 * record.cost:  # the logarithm of what is random has no more than 53 bits
        return False
    return left <= -record.cost * math.log(1 - _random.random())
