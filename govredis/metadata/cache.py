"""MetadataCache: values in front of a slower store, with leases so that a slow reader puts nothing stale back."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._counters import Counters
from .._fork import renew_in_child
from ..client import RedisClient, Script
from ..errors import BackendError, BackendUnavailable, check_ttl, refuse
from ..keys import Keys, check_namespace, sibling
from .values import decode, encode

__all__ = ["MetadataCache"]

#: A load that takes longer than this is not stored.
_LEASE_MS = "30000"
#: How long `set` is refused after an invalidation: the longest that a get-load-set without a lease is expected to take.
_TOMBSTONE_MS = "10000"
#: Owed invalidations told, and noted as told, at once.
_AT_ONCE = 500


class MetadataCache:
    """Values by id, at `{namespace}:{id}`, for `ttl` seconds or until invalidated. A hit is one GET.

    `get_or_load` takes a lease before it loads and stores only if no invalidation came between: once `invalidate` has
    returned, no later hit is older than the write it followed, on a Redis that keeps its data (one restarted or failed
    over to with older data serves what that had, at most until its TTL). `get` and `set` are two steps without a lease;
    `set` is refused for 10 s after an invalidation, and a reader slower than that can put a stale value back: prefer
    `get_or_load`.

    When Redis is away: `get_or_load` and `get_many` call their loader, `get` is a miss, `set` returns False, and
    `invalidate` raises. What another process invalidated, or failed to, while it could not reach Redis may be served
    until its TTL.

    Values are anything JSON can hold but None, and come back as JSON gives them back (a tuple as a list), from hit and
    miss alike. Every method raises ValueError for a bad id or value before anything is sent, and BackendError where
    Redis answers with an error.
    """

    def __init__(
        self, keys: Keys, redis: RedisClient | None, *, namespace: str, ttl: float, counters: Counters
    ) -> None:
        self.namespace = check_namespace(namespace)
        self.ttl = check_ttl(ttl)
        self._keys = keys
        self._redis = redis
        self._counters = counters
        self._hits, self._misses = f"{namespace}.hits", f"{namespace}.misses"
        self._lease = Script(__package__, "lease.lua")
        self._fill = Script(__package__, "fill.lua")
        self._invalidate = Script(__package__, "invalidate.lua")
        if redis is not None:
            redis.on_recovery(self._replay)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._nonce = os.urandom(8).hex()
        self._leases = itertools.count()
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        #: Invalidations that could not be carried out; they are the parent's to carry out.
        #: By id, with a token: one owed anew while it is told of is owed still.
        self._owed: dict[str, object] = {}

    def get(self, identity: str) -> Any | None:
        """The cached value, or None for a miss, which Redis being away is too."""
        return self._read(self._keys.cached(self.namespace, identity))

    def set(self, identity: str, value: Any, *, ttl: float | None = None) -> bool:
        """Store a value, unless it was invalidated within the last 10 s.

        Args:
            ttl: seconds; None: the cache's.

        Returns whether it was stored: False also when Redis is away.
        """
        key = self._keys.cached(self.namespace, identity)
        return self._store(key, encode(value), "", self._ttl_ms(ttl))

    def get_or_load(self, identity: str, loader: Callable[[str], Any], *, ttl: float | None = None) -> Any | None:
        """The cached value, else what `loader(identity)` returns, which is then cached.

        Args:
            loader: reads the value from where it is kept, in a snapshot not older than its call; None: there is none,
                and nothing is cached. Its exceptions reach the caller.
            ttl: seconds; None: the cache's.
        """
        key = self._keys.cached(self.namespace, identity)
        ttl_ms = self._ttl_ms(ttl)
        value = self._read(key)
        if value is not None:
            return value
        lease = self._take_lease(key)
        value = loader(identity)
        if value is None:
            return None
        text = encode(value)
        if lease is not None:
            self._store(key, text, lease, ttl_ms)
        return decode(text)

    def get_many(
        self, identities: Iterable[str], load_many: Callable[[list[str]], Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The values of several ids: one round trip, and one call of `load_many` for the misses, which are then cached.

        Args:
            load_many: gets the ids that missed, returns a mapping of those it found; None: misses stay out.

        Returns a dict of the ids that have a value, in the order given.
        """
        keys = {i: self._keys.cached(self.namespace, i) for i in identities}
        found = self._read_many(keys)
        missing = [i for i in keys if i not in found]
        if missing and load_many is not None:
            leases = self._take_leases([keys[i] for i in missing])
            loaded = load_many(missing)
            texts = {i: encode(loaded[i]) for i in missing if loaded.get(i) is not None}
            if leases is not None:
                self._store_many({keys[i]: text for i, text in texts.items()}, leases)
            found.update((i, decode(text)) for i, text in texts.items())
        return {i: found[i] for i in keys if i in found}

    def invalidate(self, identity: str, *, version: int | None = None) -> None:
        """Drop the value. Call it after the write has been committed.

        Once it has returned, no later hit, in any process, is older than that write. If it cannot be carried out it
        raises BackendUnavailable: a cached value may then be served until its TTL.

        Args:
            version: of the write, noted with the invalidation.
        """
        if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
            raise refuse("version", version, "a whole number, or None")
        key = self._keys.cached(self.namespace, identity)
        if self._redis is None:
            return
        tombstone = "" if version is None else str(version)
        self._redis.run(self._invalidate, self._cells(key), tombstone, _TOMBSTONE_MS)
        self._counters.add(f"{self.namespace}.invalidated")

    def invalidate_or_owe(self, identity: str, *, version: int | None = None) -> None:
        """`invalidate` for a write that is committed already: what cannot be carried out now is done on recovery.

        Private to AgentStore. Until then this process does not read from Redis; another process may serve the old value
        for as long as it can reach Redis and this one cannot, at most until the value's TTL.
        """
        token = object()
        with self._lock:
            self._owed[identity] = token  # before trying: an exception may strike (a signal's, a soft time limit's)
        try:
            self.invalidate(identity, version=version)
        except BackendError as error:
            if not isinstance(error, BackendUnavailable):
                self._paid(identity, token)
                raise
            self._counters.add(f"{self.namespace}.invalidations_owed")
            self._replay_soon()
        except BaseException:
            self._replay_soon()
            raise
        else:
            self._paid(identity, token)

    def _replay_soon(self) -> None:
        if self._redis is not None:
            self._redis.replay_soon("invalidations are owed to it")

    def stats(self) -> dict[str, int]:
        """Counts of this process for this namespace: hits, misses, loads, fills, fills_refused, invalidated, ..."""
        mine = f"{self.namespace}."
        return {name[len(mine) :]: n for name, n in self._counters.read().items() if name.startswith(mine)}

    # -- inside --------------------------------------------------------------------------------------------------

    def _ttl_ms(self, ttl: float | None) -> str:
        return str(int((self.ttl if ttl is None else check_ttl(ttl)) * 1000))

    def _cells(self, key: str) -> tuple[str, str, str]:
        return key, sibling(key, "lease"), sibling(key, "tombstone")

    def _new_lease(self) -> str:
        return f"{self._nonce}{next(self._leases)}"

    def _degraded(self, what: str) -> None:
        self._counters.add(f"{self.namespace}.degraded.{what}")

    def _read(self, key: str) -> Any | None:
        if self._redis is None:
            return None
        try:
            raw = self._redis.call("GET", key)
        except BackendUnavailable:
            self._degraded("reads")
            return None
        value = None if raw is None else decode(raw)
        self._counters.add(self._hits if value is not None else self._misses)
        return value

    def _read_many(self, keys: Mapping[str, str]) -> dict[str, Any]:
        if self._redis is None or not keys:
            return {}
        try:
            raws = self._redis.pipeline([("GET", key) for key in keys.values()])
        except BackendUnavailable:
            self._degraded("reads")
            return {}
        values = {i: decode(raw) for i, raw in zip(keys, raws, strict=True) if raw is not None}
        found = {i: value for i, value in values.items() if value is not None}
        self._counters.add(self._hits, len(found))
        self._counters.add(self._misses, len(keys) - len(found))
        return found

    def _take_lease(self, key: str) -> str | None:
        """A lease, or None if nothing can be stored anyway."""
        leases = self._take_leases([key])
        return None if leases is None else leases[key]

    def _take_leases(self, keys: list[str]) -> dict[str, str] | None:
        self._counters.add(f"{self.namespace}.loads", len(keys))
        if self._redis is None:
            return None
        commands = [self._lease.call((sibling(key, "lease"),), (self._new_lease(), _LEASE_MS)) for key in keys]
        try:
            replies = self._redis.pipeline(commands, (self._lease,))
        except BackendUnavailable:
            self._degraded("leases")
            return None
        return {key: lease.decode() for key, lease in zip(keys, replies, strict=True)}

    def _store(self, key: str, text: str, lease: str, ttl_ms: str) -> bool:
        if self._redis is None:
            return False
        try:
            stored = self._redis.run(self._fill, self._cells(key), text, ttl_ms, lease)
        except BackendUnavailable:
            self._degraded("fills")
            return False
        self._counters.add(f"{self.namespace}.{'fills' if stored else 'fills_refused'}")
        return bool(stored)

    def _store_many(self, texts: Mapping[str, str], leases: Mapping[str, str]) -> None:
        if self._redis is None or not texts:
            return
        ttl_ms = self._ttl_ms(None)
        commands = [self._fill.call(self._cells(key), (text, ttl_ms, leases[key])) for key, text in texts.items()]
        try:
            replies = self._redis.pipeline(commands, (self._fill,))
        except BackendUnavailable:
            self._degraded("fills")
            return
        self._counters.add(f"{self.namespace}.fills", sum(replies))
        self._counters.add(f"{self.namespace}.fills_refused", len(replies) - sum(replies))

    def _replay(self, redis: RedisClient) -> None:
        with self._lock:
            owed = list(self._owed.items())
        for i in range(0, len(owed), _AT_ONCE):
            some = owed[i : i + _AT_ONCE]
            cells = [self._cells(self._keys.cached(self.namespace, identity)) for identity, _ in some]
            redis.pipeline([self._invalidate.call(c, ("", _TOMBSTONE_MS)) for c in cells], (self._invalidate,))
            for identity, token in some:
                self._paid(identity, token)

    def _paid(self, identity: str, token: object) -> None:
        with self._lock:
            if self._owed.get(identity) is token:
                del self._owed[identity]
