"""MetadataCache: values in front of a slower store, with leases so that a slow reader puts nothing stale back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._counters import Counters
from .._fork import renew_in_child
from ..client import RedisClient
from ..errors import BackendError, BackendUnavailable, ConfigurationError, check_ttl, refuse
from ..keys import Keys, check_namespace
from . import cells
from .cached import Decorator
from .commit import AfterCommit
from .generation import Generation
from .guard import Guard
from .loading import Loads, is_due, is_over
from .local import MISS, LocalValues
from .shelf import Shelf
from .values import check

__all__ = ["MetadataCache"]

#: Owed invalidations told, and noted as told, at once.
_AT_ONCE = 500


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

    **With `local_cache`** values are also kept in this process, until Redis says that they have changed; local.py says
    why that is as good. A hit costs half a microsecond and asks nobody. An invalidation is heard of by other processes
    in about a millisecond, and holds there 1 s later at the latest. What such a cache gives is shared by all who read
    it, and therefore read-only, hit or miss: dicts and lists that compare as such, refuse changes with a TypeError, and
    of which `copy.deepcopy` makes plain ones.

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
        negative_ttl: float | None = None,
        stale: float = 0.0,
        max_bytes: int = 1_000_000,
        generation: Generation | None = None,
        local: LocalValues | None = None,
        counters: Counters,
    ) -> None:
        self.namespace = check_namespace(namespace)
        self.ttl = check_ttl(ttl)
        if strict and guard is None and redis is not None:
            raise ConfigurationError("strict needs PostgreSQL: GOVREDIS_DATABASE_URL is not set")
        self._keys = keys
        self._redis = redis
        self._counters = counters
        self._local = local
        self._generation = Generation(keys.generation(namespace)) if generation is None else generation
        self._shelf = Shelf(
            redis, guard, self._generation, local, namespace=namespace, strict=strict, counters=counters
        )
        self._loads = Loads(
            self._shelf,
            namespace=namespace,
            negative_ttl=None if negative_ttl is None else check_ttl(negative_ttl, "negative_ttl"),
            stale=check_ttl(stale, "stale") if stale else 0.0,
            max_bytes=max_bytes,
        )
        if redis is not None:
            redis.on_recovery(self._replay)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        #: Invalidations that could not be carried out; they are the parent's to carry out.
        #: By id, with a token: one owed anew while it is told of is owed still.
        self._owed: dict[str, object] = {}

    def get(self, identity: str) -> Any | None:
        """The cached value; None for a miss, which one that cannot be used now is too (Redis away, no guard)."""
        if self._local is not None and (value := self._local.get(identity)) is not MISS:
            return value
        (record,), _ = self._shelf.read({identity: self._keys.cached(self.namespace, identity)})
        return None if record is None or is_over(record) else record.value

    def set(self, identity: str, value: Any, *, ttl: float | None = None) -> bool:
        """Store a value, unless it was invalidated within the last 10 s (a record of `gov.agents`: for a later write).

        Args:
            ttl: seconds; None: the cache's.

        Returns whether it was stored: False also when it is too large, Redis is away, or nothing cached could be used
        now.
        """
        key = self._keys.cached(self.namespace, identity)
        check(value)
        stored = self._loads.store(key, value, self._ttl(ttl))
        self._drop(identity)
        return stored

    def get_or_load(self, identity: str, loader: Callable[[str], Any], *, ttl: float | None = None) -> Any | None:
        """The cached value, else what `loader(identity)` returns, which is then cached.

        One caller loads, of all threads and processes; the others wait for it, 2 s at most, and then load themselves,
        ten at once in a process. Shortly before a value's TTL is over one caller loads it anew, the sooner the longer
        loads take (XFetch: Vattani et al., "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015), and the
        others go on with the old one; so does that caller if its load fails, which is counted as `degraded.loads`.

        Args:
            loader: reads the value from where it is kept, in a snapshot not older than its call; None: there is none,
                which is not cached but by a `negative_ttl`. Its exceptions reach the caller.
            ttl: seconds, less up to a tenth, so that what was loaded together does not end together; None: the cache's.
        """
        if self._local is not None and (value := self._local.get(identity)) is not MISS:
            return value
        key = self._keys.cached(self.namespace, identity)
        ttl = self._ttl(ttl)
        (record,), seen = self._shelf.read({identity: key})
        if record is not None and not is_due(record):
            return record.value
        return self._loads.one(identity, key, loader, ttl, record, seen)

    def reload(self, identity: str, loader: Callable[[str], Any]) -> Any | None:
        """What `loader(identity)` returns now; cached then, and the old value until then. Private to `cached`."""
        return self._loads.again(identity, self._keys.cached(self.namespace, identity), loader, self.ttl)

    def get_many(
        self, identities: Iterable[str], load_many: Callable[[list[str]], Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The values of several ids: one round trip, and one call of `load_many` for the misses, which are then cached.

        Args:
            load_many: gets the ids that missed, returns a mapping of those it found; None: misses stay out. It waits
                for nobody who is loading one of them.

        Returns a dict of the ids that have a value, in the order given.
        """
        keys = {i: self._keys.cached(self.namespace, i) for i in identities}
        found: dict[str, Any] = {}
        if self._local is not None:
            found = {i: value for i in keys if (value := self._local.get(i)) is not MISS}
        asked = {i: key for i, key in keys.items() if i not in found}
        if asked:
            records, seen = self._shelf.read(asked)
            found.update(
                (i, record.value)
                for i, record in zip(asked, records, strict=True)
                if record is not None and not is_over(record)
            )
            missing = [i for i in asked if i not in found]
            if missing and load_many is not None:
                found.update(self._loads.many({i: keys[i] for i in missing}, load_many, self.ttl, seen))
        return {i: found[i] for i in keys if found.get(i) is not None}

    def cached(self, template: str) -> Decorator:
        """Decorator: what the function returns is cached, by an id made of its arguments.

            @gov.cache("report", ttl=60).cached("{agent_id}:{month}")
            def report(agent_id: str, month: str) -> dict: ...

            report("a", "2026-11")             # get_or_load
            report.invalidate("a", "2026-11")  # as MetadataCache.invalidate
            report.refresh("a", "2026-11")     # calls the function, caches and returns what it returns
            report.uncached("a", "2026-11")    # the function itself

        What it returns must be what JSON holds, and comes back as JSON gives it back. None is not cached but by a
        `negative_ttl`.

        Args:
            template: names arguments of the function in braces. Every call with the same id shares one value: name all
                that the result depends on, and give each function a namespace of its own, or a word in the template.

        Raises ValueError for a template that names no argument, or what is none, and for what only begins when it is
        called (async functions, generators).
        """
        return Decorator(self, template)

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
        self._drop(identity)
        cells.invalidate(self._redis, key, version)
        self._drop(identity)  # again: what was being read meanwhile goes nowhere
        self._shelf.count("invalidated")

    def invalidate_all(self) -> None:
        """Drop all values of the namespace, however many: a mark that they carry is no longer the current one.

        Once it has returned, this process uses none of them, nor does any other 1 s later; what is being loaded
        meanwhile is not used either. Raises BackendUnavailable if it cannot be carried out. Not part of what
        `metadata_staleness` bounds: a Redis that loses its data may forget it.
        """
        if self._redis is None:
            return
        self._redis.call(*self._generation.next())
        self._generation.forget()
        if self._local is not None:
            self._local.cells.clear()
        self._shelf.count("invalidated_all")

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
            self._shelf.count("invalidations_owed")
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
        counts = {name[len(mine) :]: n for name, n in self._counters.read().items() if name.startswith(mine)}
        return counts if self._local is None else {**counts, "local_hits": self._local.hits()}

    # -- inside --------------------------------------------------------------------------------------------------

    def _ttl(self, ttl: float | None) -> float:
        return self.ttl if ttl is None else check_ttl(ttl)

    def _drop(self, identity: str) -> None:
        if self._local is not None:
            self._local.drop(identity)

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
