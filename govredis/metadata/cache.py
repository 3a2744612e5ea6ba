"""MetadataCache: values in front of a slower store, with leases so that a slow reader puts nothing stale back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

from .._context import Context
from .._fork import notice_fork
from .._templates import only_begins
from .._uncopied import Uncopied
from ..errors import BackendError, BackendUnavailable, ConfigurationError, check_ttl, refuse
from ..keys import Id, id_text
from . import entry_keys
from .backends.redis_backend import RedisMetadataBackend
from .cached import Decorator
from .commit import AfterCommit
from .loading import LoadRequest, Loads, is_due
from .local import MISS
from .options import CacheOptions, SharedParts
from .pending import PendingInvalidations
from .values import Codec

__all__ = ["MetadataCache"]

V = TypeVar("V")


class MetadataCache(Uncopied):
    """Values by id, at `{namespace}:{id}`, for `ttl` seconds or until invalidated. A hit is one MGET.

    `get_or_load` takes a lease before it loads and stores only if no invalidation came between: once `invalidate` has
    returned, no later hit is older than the write it followed. `get` and `set` are two steps without a lease; `set` is
    refused for 10 s after an invalidation, and a reader slower than that can put a stale value back: prefer
    `get_or_load`.

    **With PostgreSQL** losses are bounded too: of an invalidation, of a process before it, of a key, of Redis's data,
    wholly or back to an older state. The outbox has the writes of `gov.agents`, of the tables of `govredis outbox
    watch` and of `after_commit`: no hit is more than `metadata_staleness` (5 s) behind a committed one. Where that
    cannot be shown, because no process was able to tell Redis for so long, values are loaded: one load at a time for
    each id, ten at once in a process, counted as `bypassed`. While PostgreSQL is away, values are used until their TTL,
    counted as `degraded.unguarded`; a `strict` cache raises BackendUnavailable instead. A value that was invalidated by
    `invalidate` alone may come back, until its TTL, with a Redis that restarts with older data.

    **Without PostgreSQL** all of these may be served until their TTL.

    When Redis is away: `get_or_load` and `get_many` call their loader, bounded as above, `get` is a miss, `set` returns
    False, and `invalidate` raises. Another process's invalidation that could not reach Redis meanwhile may be missed,
    as said above.

    **On a Cluster** each primary stands for itself: one that is away costs its own values, and a call of several ids
    asks all side by side. A failover may lose the last moments: an `invalidate_all`, or an `invalidate` whose write
    the outbox does not have. With PostgreSQL, values of a slot that has moved are loaded anew. In a slot that is on
    its way values may be misses, which are stored again once it has arrived.

    **With `local_cache`** values are also kept in this process, until Redis says that they have changed; local.py says
    why that is as good. A hit costs about a microsecond and asks nobody. An invalidation is heard of by other processes
    in about a millisecond, and holds there 1 s later at the latest. All readers share the values of such a cache, and
    therefore they are immutable, hit or miss: dicts and lists that compare as such and refuse changes with a TypeError.
    `copy.deepcopy` makes plain ones.

    **Beside others**, such as an async service, that set and delete these keys: a value is its plain JSON and nothing
    else. Without PostgreSQL their value is one like any other, until its TTL. With PostgreSQL it is a miss, and is
    loaded again; a cache with `foreign="use"` uses it, and `metadata_staleness` does not bound it. For 10 s after an
    `invalidate` it is a miss in any case. While a process of ours loads, their SET wins if it still stands, and so does
    their DEL of a value that stood when the load began: the loaded value is returned and not stored. A DEL where
    nothing stands leaves no trace: an old value may then be stored, for `metadata_staleness`, or without PostgreSQL
    until its TTL. Their values are not kept in the process.

    Values are anything but None that JSON can hold, or that the cache's `default` turns into it. They come back as JSON
    and the cache's `object_hook` give them back (a tuple as a list), from hit and miss alike. Without a `default`:
    datetime, date and time in ISO 8601, Decimal and UUID as their str, bytes as base64. Every method raises ValueError
    for a bad id or value before anything is sent; for a loader's value, before it is stored. It raises BackendError
    where Redis answers with an error, and ConfigurationError where PostgreSQL's tables are missing (`govredis
    migrate`).
    """

    def __init__(self, context: Context, *, options: CacheOptions, shared: SharedParts) -> None:
        if options.strict and shared.freshness is None and context.redis is not None:
            raise ConfigurationError("strict needs PostgreSQL: GOVREDIS_DATABASE_URL is not set")
        self.namespace: str = options.namespace
        self.ttl: float = options.ttl
        self._keys = context.keys
        self._redis = context.redis
        self._counters = context.counters
        self._schema = context.config.schema
        self._codec = Codec(options.default, options.object_hook)
        self._generation = shared.generation
        self._functions = shared.functions
        self._local = shared.local
        self._backend = RedisMetadataBackend(context, options, shared, self._codec)
        max_bytes = context.config.metadata_max_bytes
        self._loads = Loads(self._backend, options, self._codec, shared.renewals, max_bytes=max_bytes)
        self._pending = PendingInvalidations(context.redis, lambda i: self._keys.cached(self.namespace, i))

    def get(self, identity: Id) -> Any | None:
        """The cached value; None for a miss. A value that may not be used now is a miss too (Redis away, no valid
        freshness lease)."""
        notice_fork()
        if type(identity) is not str:
            identity = id_text(identity)
        if self._local is not None and (value := self._local.get(identity)) is not MISS:
            return value
        ((entry, _),) = self._backend.read({identity: self._keys.cached(self.namespace, identity)})
        return None if entry is None else entry.value

    def set(self, identity: Id, value: Any, *, ttl: float | None = None) -> bool:
        """Store a value, unless it was invalidated within the last 10 s (a record of `gov.agents`: for a later write).

        Args:
            ttl: seconds; None: the cache's.

        Returns whether it was stored: False also when it is too large, Redis is away, or nothing cached could be used
        now.
        """
        notice_fork()
        identity = id_text(identity)
        key = self._keys.cached(self.namespace, identity)
        stored = self._loads.store(key, value, self._codec.encode(value), self._ttl(ttl))
        self._drop(identity)
        return stored

    def get_or_load(self, identity: Id, loader: Callable[[str], V], *, ttl: float | None = None) -> V:
        """The cached value, else what `loader(identity)` returns, which is then cached.

        A single caller loads, of all threads and processes. The others wait as long as it takes, so give the loader a
        timeout of its own. If that load stores nothing (it raises, finds none, or finds too much), the waiters take
        turns. A single process loads at a time, and its threads share its result. For a loader that was killed with its
        process they wait 3 s; where its process lets no other thread run for 2 s, another may load meanwhile. Where
        nothing can be stored now, one thread of each process loads, and ten at once in a process. A loader that needs
        other values waits 2 s for what others load, and then loads it itself.

        Shortly before a value's TTL is over one caller loads it anew, the sooner the longer loads take (XFetch: Vattani
        et al., "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015). The others go on with the old one. So
        does that caller if its load fails, which is counted as `degraded.loads`.

        Args:
            loader: reads the value from where it is kept, in a snapshot not older than its call; None: there is none,
                which is not cached but by a `negative_ttl`. Its exceptions reach its own caller; but for a
                BackendUnavailable where the value is cached by then, which is counted as `degraded.loads`.
            ttl: seconds, less up to a tenth, so that what was loaded together does not end together; None: the cache's.

        Raises RecursionError where a loader asks for its own value, also through other loaders.
        """
        notice_fork()
        if type(identity) is not str:
            identity = id_text(identity)
        value: V  # the loader's word: no hit is checked
        if self._local is not None and (value := self._local.get(identity)) is not MISS:
            return value
        key = self._keys.cached(self.namespace, identity)
        ttl = self._ttl(ttl)
        ((entry, terms),) = self._backend.read({identity: key})
        if entry is not None and not is_due(entry):
            value = entry.value
            return value
        _check_loader(loader, "loader")
        try:
            value = self._loads.one(LoadRequest(identity, key, loader, ttl), entry, terms)
        except BackendUnavailable:
            if (kept := self._kept({identity: key})) is None:
                raise
            value = kept[identity]
        return value

    def reload(self, identity: str, loader: Callable[[str], V]) -> V:
        """The result of `loader(identity)`, called now. The old value is used until it is cached. Private to
        `cached`."""
        notice_fork()
        key = self._keys.cached(self.namespace, identity)
        value: V = self._loads.again(LoadRequest(identity, key, loader, self.ttl))
        return value

    @overload
    def get_many(self, identities: Iterable[Id], load_many: None = None) -> dict[str, Any]: ...
    @overload
    def get_many(
        self, identities: Iterable[Id], load_many: Callable[[list[str]], Mapping[Any, V | None]]
    ) -> dict[str, V]: ...
    def get_many(
        self, identities: Iterable[Id], load_many: Callable[[list[str]], Mapping[Any, Any]] | None = None
    ) -> dict[str, Any]:
        """The values of several ids: one round trip, and one call of `load_many` for the misses, which are then cached.

        Args:
            load_many: gets the ids that missed, as str, and returns a mapping of those it found; None: misses stay out.
                It does not wait for other loads of these values.

        Returns a dict of the ids that have a value, as str, in the order given.
        """
        notice_fork()
        if isinstance(identities, str | bytes) or not isinstance(identities, Iterable):
            raise refuse("identities", identities, "an iterable of ids")
        keys = {i: self._keys.cached(self.namespace, i) for i in map(id_text, identities)}
        found: dict[str, Any] = {}
        if self._local is not None:
            found = {i: value for i in keys if (value := self._local.get(i)) is not MISS}
        asked = {i: key for i, key in keys.items() if i not in found}
        if asked:
            missed = {}
            for (i, key), (entry, terms) in zip(asked.items(), self._backend.read(asked), strict=True):
                if entry is not None:
                    found[i] = entry.value
                else:
                    missed[i] = key, terms
            if missed and load_many is not None:
                _check_loader(load_many, "load_many")
                try:
                    found.update(self._loads.many(missed, _by_text(load_many), self.ttl))
                except BackendUnavailable:
                    if (kept := self._kept({i: key for i, (key, _) in missed.items()})) is None:
                        raise
                    found.update(kept)
        return {i: found[i] for i in keys if found.get(i) is not None}

    def _kept(self, keys: dict[str, str]) -> dict[str, Any] | None:
        """The values of these ids, whose keys are given, if all are cached now, after their load has failed.

        Where no freshness lease was valid they were loaded, cached or not. If PostgreSQL is known to be away by now,
        the cached values may be used: a reader that begins later uses them. Or others have stored them meanwhile.
        """
        found = self._backend.read(keys, counted=False)
        kept = {i: entry.value for i, (entry, _) in zip(keys, found, strict=True) if entry is not None}
        if len(kept) < len(keys):
            return None
        self._backend.count("degraded.loads")
        return kept

    def cached(self, key: str, *, shared: bool = False) -> Decorator:
        """Decorator: the function's results are cached, by an id made of its arguments.

            @gov.cache("report", ttl=60).cached("{agent_id}:{month}")
            def report(agent_id: str, month: str) -> dict: ...

            report("a", "2026-11")             # get_or_load
            report.invalidate("a", "2026-11")  # as MetadataCache.invalidate
            report.refresh("a", "2026-11")     # calls the function, caches and returns what it returns
            report.uncached("a", "2026-11")    # the function itself

        Results must be values that JSON holds, and come back as JSON gives them back. A result of None is cached with a
        `negative_ttl` only.

        Args:
            key: a template that names arguments of the function in braces: name all that the result depends on. Calls
                share a value where these arguments are equal and of one type: 1, "1" and None are three. An object
                counts by its type and its `str()`, which must not be the default. For a function without arguments: a
                plain name, such as "rates".
            shared: another function of the namespace may have the same keys, if it says shared=True too and gives the
                same values. Functions are told apart by module and name.

        Raises ValueError for a template that names no argument of a function that has some, or a name that is no
        argument, and for an async function or a generator. Raises it too for a key that another function could have. A
        call raises ValueError for an argument without a text of its own (the default repr, which has an address).
        """
        return Decorator(self, key, self._functions, shared)

    def invalidate(self, identity: Id, *, version: int | None = None) -> None:
        """Drop the value. Call it after the write has been committed; `after_commit` does.

        Once it has returned, no later hit, in any process, is older than that write. If it cannot be carried out it
        raises BackendUnavailable: a cached value may then be served, as the class says.

        Args:
            version: of the write, where it is the `version` of an AgentRecord: a value that is this new stays, and one
                older than it is not stored for the next 10 s.
        """
        notice_fork()
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 0):
            raise refuse("version", version, "a whole number of 0 or more, or None")
        identity = id_text(identity)
        key = self._keys.cached(self.namespace, identity)
        if self._redis is None:
            return
        self._drop(identity)
        entry_keys.invalidate(self._redis, key, version)
        self._drop(identity)  # again: what was being read meanwhile goes nowhere
        self._backend.count("invalidated")

    def invalidate_all(self) -> None:
        """Drop all values of the namespace, however many, and whether or not govredis has set them.

        They are deleted, and a mark that ours carry is no longer the current one. Once it has returned, this process
        uses none of them, nor does any other 1 s later; what is being loaded meanwhile is neither stored nor used.

        It walks all keys of that Redis twice, a thousand at a time, whatever they are: for a million keys 2,000 round
        trips of 1 to 3 ms of Redis's time each, between which others are served. Keys that may be those of a longer
        prefix stay, as `report:session:x` for the namespace "report": values of such ids are not used here any more,
        and others may read them until their TTL.

        On a Cluster each primary is walked so. A value of another client, whose slot moves meanwhile, may stay.

        Raises BackendUnavailable if it cannot be carried out; where that struck in the middle, or a primary is away,
        repeat it. Not part of what `metadata_staleness` bounds: a Redis that loses its data may forget it.
        """
        notice_fork()
        if self._redis is None:
            return
        try:
            self._redis.pipeline(self._generation.next())
        finally:  # where a node is away, the others have another generation now
            self._generation.forget()
            if self._local is not None:
                self._local.clear()
        start = self._keys.values(self.namespace)
        # Leases first: of a load that they stop, no value appears behind the walk over the values.
        for keys in entry_keys.walk(self._redis, f"{{{start}", "}:lease"):
            self._redis.pipeline([("UNLINK", key) for key in keys])
        for keys in entry_keys.walk(self._redis, start):
            ours = [key for key in keys if not self._keys.may_be_another_kind(key[len(start.encode()) :])]
            self._redis.pipeline([("UNLINK", key) for key in ours])
        self._backend.count("invalidated_all")

    def after_commit(self, connection: Any) -> AfterCommit:
        """A transaction of your own psycopg2 connection, and the invalidations that belong to it.

            with gov.metadata.after_commit(connection) as tx:
                cursor.execute("UPDATE users SET ...")
                tx.invalidate(user_id)

        In place of psycopg2's `with connection:`: it commits where the body succeeds, and then the values are
        invalidated; otherwise it rolls back, and nothing is. Where the connection's database has our tables, in
        GOVREDIS_SCHEMA, the invalidations are part of the transaction, in the outbox. A crash after the commit, or a
        Redis that is away, is then made good for within `metadata_staleness`. Elsewhere this process carries them out
        when Redis is back.

        Raises ValueError for a connection in autocommit mode or of another driver, and the connection's own errors.
        Raises BackendError where Redis refuses an invalidation, after all others: the transaction is committed then.
        """
        return AfterCommit(connection, self.namespace, self._keys, self._schema, self.invalidate_committed)

    def invalidate_committed(self, identity: Id, *, version: int | None = None) -> None:
        """`invalidate` for a write that is committed already: what cannot be carried out now is done on recovery.

        Private. Until then this process does not read from Redis; another process may serve the old value for as long
        as it can reach Redis and this one cannot: where the outbox has the write, until the next run of any relay.
        """
        notice_fork()
        identity = id_text(identity)
        token = self._pending.add(identity)  # first: an exception may strike (a signal's, a soft time limit's)
        try:
            self.invalidate(identity, version=version)
        except BackendError as error:
            if not isinstance(error, BackendUnavailable):
                self._pending.done(identity, token)
                raise
            self._backend.count("invalidations_owed")
            self._pending.replay_soon(identity)
        except BaseException:
            self._pending.replay_soon(identity)
            raise
        else:
            self._pending.done(identity, token)

    def stats(self) -> dict[str, int]:
        """Counts of this process for this namespace: hits, misses, loads, fills, fills_refused, invalidated,
        bypassed, degraded.unguarded, ..."""
        notice_fork()
        mine = f"{self.namespace}."
        counts = {name[len(mine) :]: n for name, n in self._counters.read().items() if name.startswith(mine)}
        return counts if self._local is None else {**counts, "local_hits": self._local.hits()}

    # -- inside --------------------------------------------------------------------------------------------------

    def _ttl(self, ttl: float | None) -> float:
        return self.ttl if ttl is None else check_ttl(ttl)

    def _drop(self, identity: str) -> None:
        if self._local is not None:
            self._local.drop(identity)


def _by_text(load_many: Callable[[list[str]], Mapping[Any, Any]]) -> Callable[[list[str]], dict[str, Any]]:
    """The ids that it finds may be what the database has for them."""
    return lambda missing: {id_text(identity): value for identity, value in load_many(missing).items()}


def _check_loader(loader: Any, name: str) -> None:
    if not callable(loader) or only_begins(loader):
        raise refuse(name, loader, "a plain function: not async, and no generator")
