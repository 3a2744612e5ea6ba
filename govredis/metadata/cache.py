"""MetadataCache: values in front of a slower store, with leases so that a slow reader puts nothing stale back."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._counters import Counters
from .._fork import renew_in_child
from ..client import RedisClient
from ..errors import BackendError, BackendUnavailable, ConfigurationError, check_ttl, refuse
from ..keys import Keys, check_namespace
from . import cells
from .commit import AfterCommit
from .flights import Flights
from .guard import Guard, Seen
from .values import Record, decode, encode, version_of

__all__ = ["MetadataCache"]

#: Owed invalidations told, and noted as told, at once.
_AT_ONCE = 500
#: How often a read is tried whose connection turns out to be a new one.
_TRIES = 3

#: Of a cache without a guard: everything may be used, and stored.
_UNGUARDED = Seen(-1, math.inf, math.inf, 0)
#: Of one whose guard nobody can renew, since PostgreSQL is away: likewise; what is stored has no epoch, and is not used
#: when it is back.
_BLIND = Seen(-1, math.inf, math.inf, 0)


class MetadataCache:
    """Values by id, at `{namespace}:{id}`, for `ttl` seconds or until invalidated. A hit is one GET.

    `get_or_load` takes a lease before it loads and stores only if no invalidation came between: once `invalidate` has
    returned, no later hit is older than the write it followed. `get` and `set` are two steps without a lease; `set` is
    refused for 10 s after an invalidation, and a reader slower than that can put a stale value back: prefer
    `get_or_load`.

    **With PostgreSQL** what was lost is bounded too: an invalidation, a process before it, a key, Redis's data, wholly
    or back to an older state. Of what the outbox tells (`gov.agents`, the tables of `govredis outbox watch`,
    `after_commit`) no hit is more than `metadata_staleness` (5 s) behind what is committed. Where that cannot be shown,
    because nobody has been able to tell Redis for so long, values are loaded: one load at a time for each id, ten at
    once in a process, counted as `bypassed`. While PostgreSQL is away values are used until their TTL, counted as
    `degraded.unguarded`, or, by a `strict` cache, not at all: BackendUnavailable. What is invalidated by `invalidate`
    alone may come back, until its TTL, with a Redis that restarts with older data.

    **Without PostgreSQL** all of these may be served until their TTL.

    When Redis is away: `get_or_load` and `get_many` call their loader, bounded as above, `get` is a miss, `set` returns
    False, and `invalidate` raises. What another process invalidated, or failed to, while it could not reach Redis may
    be served as said.

    Values are anything JSON can hold but None, and come back as JSON gives them back (a tuple as a list), from hit and
    miss alike. Every method raises ValueError for a bad id or value before anything is sent, BackendError where Redis
    answers with an error, and ConfigurationError where PostgreSQL's tables are missing (`govredis migrate`).
    """

    def __init__(
        self,
        keys: Keys,
        redis: RedisClient | None,
        guard: Guard | None,
        *,
        namespace: str,
        ttl: float,
        strict: bool = False,
        counters: Counters,
    ) -> None:
        self.namespace = check_namespace(namespace)
        self.ttl = check_ttl(ttl)
        if strict and guard is None and redis is not None:
            raise ConfigurationError("strict needs PostgreSQL: GOVREDIS_DATABASE_URL is not set")
        self._strict = strict
        self._keys = keys
        self._redis = redis
        self._guard = guard
        self._counters = counters
        self._hits, self._misses = f"{namespace}.hits", f"{namespace}.misses"
        self._flights = Flights(namespace)
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
        """The cached value; None for a miss, which one that cannot be used now is too (Redis away, no guard)."""
        record, _ = self._read(self._keys.cached(self.namespace, identity))
        return None if record is None else record.value

    def set(self, identity: str, value: Any, *, ttl: float | None = None) -> bool:
        """Store a value, unless it was invalidated within the last 10 s (a record of `gov.agents`: for a later write).

        Args:
            ttl: seconds; None: the cache's.

        Returns whether it was stored: False also when Redis is away, or nothing cached could be used now.
        """
        key = self._keys.cached(self.namespace, identity)
        encode(value)
        ttl_ms = self._ttl_ms(ttl)
        seen = self._look()
        return seen is not None and self._store(key, value, seen, "", ttl_ms)

    def get_or_load(self, identity: str, loader: Callable[[str], Any], *, ttl: float | None = None) -> Any | None:
        """The cached value, else what `loader(identity)` returns, which is then cached.

        Args:
            loader: reads the value from where it is kept, in a snapshot not older than its call; None: there is none,
                and nothing is cached. Its exceptions reach the caller.
            ttl: seconds; None: the cache's.
        """
        key = self._keys.cached(self.namespace, identity)
        ttl_ms = self._ttl_ms(ttl)
        record, seen = self._read(key)
        if record is not None:
            return record.value
        self._count("loads")
        leases = self._take_leases([key], seen)
        if leases is None:
            text = self._flights.run(key, lambda: _text(loader(identity)))
            return None if text is None else _value(text)
        value = loader(identity)
        text = _text(value)
        if text is None:
            return None
        self._store(key, value, seen, leases[key], ttl_ms)
        return _value(text)

    def get_many(
        self, identities: Iterable[str], load_many: Callable[[list[str]], Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The values of several ids: one round trip, and one call of `load_many` for the misses, which are then cached.

        Args:
            load_many: gets the ids that missed, returns a mapping of those it found; None: misses stay out.

        Returns a dict of the ids that have a value, in the order given.
        """
        keys = {i: self._keys.cached(self.namespace, i) for i in identities}
        found, seen = self._read_many(keys)
        missing = [i for i in keys if i not in found]
        if missing and load_many is not None:
            self._count("loads", len(missing))
            leases = self._take_leases([keys[i] for i in missing], seen)
            loaded = self._flights.alone(lambda: load_many(missing)) if leases is None else load_many(missing)
            values = {i: loaded[i] for i in missing if loaded.get(i) is not None}
            texts = {i: encode(value) for i, value in values.items()}
            if leases is not None:
                self._store_many({keys[i]: value for i, value in values.items()}, seen, leases)
            found.update((i, _value(text)) for i, text in texts.items())
        return {i: found[i] for i in keys if i in found}

    def invalidate(self, identity: str, *, version: int | None = None) -> None:
        """Drop the value. Call it after the write has been committed; `after_commit` does.

        Once it has returned, no later hit, in any process, is older than that write. If it cannot be carried out it
        raises BackendUnavailable: a cached value may then be served, as the class says.

        Args:
            version: of the write, where it is the `version` of an AgentRecord: a value that is this new stays, and one
                older than it is not stored for the next 10 s.
        """
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 0):
            raise refuse("version", version, "a whole number of 0 or more, or None")
        key = self._keys.cached(self.namespace, identity)
        if self._redis is None:
            return
        cells.invalidate(self._redis, key, version)
        self._count("invalidated")

    def after_commit(self, connection: Any) -> AfterCommit:
        """A transaction of your own psycopg2 connection, and the invalidations that belong to it.

            with gov.metadata.after_commit(connection) as tx:
                cursor.execute("UPDATE users SET ...")
                tx.invalidate(user_id)

        In place of psycopg2's `with connection:`: it commits where the body succeeds, and then the values are
        invalidated; otherwise it rolls back, and nothing is. The invalidations are part of the transaction, in the
        outbox, where the connection's database has our tables: then a crash after the commit, or a Redis that is away,
        is made good for within `metadata_staleness`. Where it has not, this process carries them out when Redis is
        back.

        Raises ValueError for a connection in autocommit mode, and what the connection raises.
        """
        return AfterCommit(connection, self.namespace, self._keys, self.invalidate_or_owe)

    def invalidate_or_owe(self, identity: str, *, version: int | None = None) -> None:
        """`invalidate` for a write that is committed already: what cannot be carried out now is done on recovery.

        Private. Until then this process does not read from Redis; another process may serve the old value for as long
        as it can reach Redis and this one cannot: where the outbox has the write, until the next tick of anybody.
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
            self._count("invalidations_owed")
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
        """Counts of this process for this namespace: hits, misses, loads, fills, fills_refused, invalidated,
        bypassed, degraded.unguarded, ..."""
        mine = f"{self.namespace}."
        return {name[len(mine) :]: n for name, n in self._counters.read().items() if name.startswith(mine)}

    # -- inside --------------------------------------------------------------------------------------------------

    def _ttl_ms(self, ttl: float | None) -> str:
        return str(int((self.ttl if ttl is None else check_ttl(ttl)) * 1000))

    def _new_lease(self) -> str:
        return f"{self._nonce}{next(self._leases)}"

    def _count(self, what: str, n: int = 1) -> None:
        self._counters.add(f"{self.namespace}.{what}", n)

    def _look(self) -> Seen | None:
        """What says that values may be used; None: they may not, and nothing is to be stored."""
        if self._redis is None:
            return None
        if self._guard is None:
            return _UNGUARDED
        try:
            seen = self._guard.look()
        except BackendUnavailable:
            self._count("degraded.reads")
            return None
        if seen is None and self._guard.blind:
            if self._strict:
                raise BackendUnavailable(f"PostgreSQL is away, and cached values of {self.namespace!r} may be stale")
            self._count("degraded.unguarded")
            return _BLIND
        if seen is None:
            self._count("bypassed")
        return seen

    def _stands(self, seen: Seen) -> bool:
        return seen is _UNGUARDED or seen is _BLIND or (self._guard is not None and self._guard.stands(seen))

    def _read(self, key: str) -> tuple[Record | None, Seen | None]:
        """The record, if it may be used; and under what it was looked for, None where nothing is to be stored."""
        found, seen = self._read_all([key])
        return found[0], seen

    def _read_many(self, keys: Mapping[str, str]) -> tuple[dict[str, Any], Seen | None]:
        if not keys:
            return {}, None
        records, seen = self._read_all(list(keys.values()))
        return {i: r.value for i, r in zip(keys, records, strict=True) if r is not None}, seen

    def _read_all(self, keys: list[str]) -> tuple[list[Record | None], Seen | None]:
        redis = self._redis
        raws: list[bytes | None] = [None] * len(keys)
        for _ in range(_TRIES):
            seen = self._look()
            if seen is None or redis is None:
                break
            try:
                raws = [redis.call("GET", keys[0])] if len(keys) == 1 else redis.pipeline([("GET", k) for k in keys])
            except BackendUnavailable:
                self._count("degraded.reads")
                seen = None
                break
            if self._stands(seen):
                break
            raws = [None] * len(keys)
        if seen is None:
            return [None] * len(keys), None
        records = [None if raw is None else self._usable(decode(raw), seen) for raw in raws]
        missed = records.count(None)
        if missed < len(keys):
            self._counters.add(self._hits, len(keys) - missed)
        if missed:
            self._counters.add(self._misses, missed)
        return records, seen

    @staticmethod
    def _usable(record: Record | None, seen: Seen) -> Record | None:
        if record is None or seen is _UNGUARDED or seen is _BLIND or record.epoch == seen.epoch:
            return record
        return None

    def _take_leases(self, keys: list[str], seen: Seen | None) -> dict[str, str] | None:
        """Leases by key, or None if nothing can be stored anyway."""
        if self._redis is None or seen is None:
            return None
        try:
            replies = self._redis.pipeline([cells.take(key, self._new_lease()) for key in keys], (cells.LEASE,))
        except BackendUnavailable:
            self._count("degraded.leases")
            return None
        return {key: lease.decode() for key, lease in zip(keys, replies, strict=True)}

    def _store(self, key: str, value: Any, seen: Seen | None, lease: str, ttl_ms: str) -> bool:
        return self._fill([cells.fill(key, self._stored(value, seen), ttl_ms, lease, version_of(value))]) == 1

    def _store_many(self, values: Mapping[str, Any], seen: Seen | None, leases: Mapping[str, str]) -> None:
        ttl_ms = self._ttl_ms(None)
        self._fill(
            [cells.fill(key, self._stored(v, seen), ttl_ms, leases[key], version_of(v)) for key, v in values.items()]
        )

    @staticmethod
    def _stored(value: Any, seen: Seen | None) -> str:
        return encode(value, None if seen is None or seen.epoch < 0 else seen.epoch)

    def _fill(self, fills: list[Any]) -> int:
        """Returns how many were stored."""
        if self._redis is None or not fills:
            return 0
        try:
            replies = self._redis.pipeline(fills, (cells.FILL,))
        except BackendUnavailable:
            self._count("degraded.fills")
            return 0
        stored: int = sum(replies)
        if stored:
            self._count("fills", stored)
        if stored < len(replies):
            self._count("fills_refused", len(replies) - stored)
        return stored

    def _replay(self, redis: RedisClient) -> None:
        with self._lock:
            owed = list(self._owed.items())
        for i in range(0, len(owed), _AT_ONCE):
            some = owed[i : i + _AT_ONCE]
            keys = [self._keys.cached(self.namespace, identity) for identity, _ in some]
            redis.pipeline([cells.invalidation(key, None) for key in keys], (cells.INVALIDATE,))
            for identity, token in some:
                self._paid(identity, token)

    def _paid(self, identity: str, token: object) -> None:
        with self._lock:
            if self._owed.get(identity) is token:
                del self._owed[identity]


def _text(value: Any) -> str | None:
    return None if value is None else encode(value)


def _value(text: str) -> Any:
    """The value as a hit would give it."""
    record = decode(text)
    return None if record is None else record.value
