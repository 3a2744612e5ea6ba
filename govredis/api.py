"""GovRedis: one object that wires the features to one Redis and one PostgreSQL, and the process-wide one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._counters import Counters
from .client import RedisClient
from .config import Config
from .errors import ConfigurationError
from .health import HealthMonitor
from .keys import Keys, check_namespace
from .limits import RateLimiter
from .limits.parked import Parked
from .locks import DistributedLock
from .metadata import AgentStore, Generation, Guard, LocalTier, MetadataCache
from .sessions import SessionCache

if TYPE_CHECKING:
    from .postgres import Postgres


class GovRedis:
    """Sessions, locks, limits, metadata, agents and health over one Redis and, if configured, one PostgreSQL.

    Connects on first use. Safe to share between threads, and to create before a fork; several may live side by side.

    Args:
        config: the settings; None: the defaults. `GovRedis.from_env()` reads the environment.

    Raises ConfigurationError where an extra that the settings need is not installed.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config if config is not None else Config()
        self.counters = Counters()
        self._keys = Keys(self.config.key_prefix)
        self._redis = RedisClient(self.config) if self.config.redis_enabled else None
        self._postgres: Postgres | None = None
        if self.config.database_url is not None:
            from .postgres import Postgres  # loads psycopg2, which is an extra

            self._postgres = Postgres(self.config)
        elif self.config.limit_mirror is not None:
            raise ConfigurationError(
                f"GOVREDIS_LIMIT_MIRROR is {self.config.limit_mirror:g};"
                " it must be left unset where GOVREDIS_DATABASE_URL is not set"
            )
        parking = self._redis
        if parking is not None and self.config.parking_url is not None:
            parking = RedisClient(replace(self.config, redis_url=self.config.parking_url))
        self._parking = parking
        self._parked = Parked(self._keys, parking) if parking is not None else None
        self._caches: dict[tuple[str, float, bool, float | None, float], MetadataCache] = {}
        self._generations: dict[str, Generation] = {}

        config, keys, redis = self.config, self._keys, self._redis
        self._guard: Guard | None = None
        if redis is not None and self._postgres is not None:
            self._guard = Guard(
                keys,
                redis,
                self._postgres,
                staleness=config.metadata_staleness,
                patience=config.postgres_timeout,
                counters=self.counters,
            )
        self._local: LocalTier | None = None
        if redis is not None and config.local_cache:
            self._local = LocalTier(keys, redis, self._guard, entries=config.local_entries)
        self.sessions = SessionCache(
            keys,
            redis,
            self._postgres,
            self._guard,
            ttl=config.session_ttl,
            local_entries=config.local_entries,
            counters=self.counters,
            hash_ids=config.session_hash_ids,
        )
        self.locks = DistributedLock(
            keys,
            redis,
            ttl=config.lock_ttl,
            fallback=config.lock_fallback,
            folder=config.lock_folder,
            counters=self.counters,
        )
        self.limits = RateLimiter(
            keys,
            redis,
            self._postgres,
            fallback=config.limit_fallback,
            local_entries=config.local_entries,
            deny_cache=config.limit_deny_cache,
            counters=self.counters,
            mirror=config.limit_mirror,
        )
        self.metadata = self.cache("agent_meta")
        uncovered = ["locks"] if config.lock_fallback == "fail" else []
        if config.limit_fallback == "deny" and self._postgres is None:
            uncovered.append("limits")
        self.health = HealthMonitor(
            keys, redis, self._postgres, self.counters, guard=self._guard, parked=self._parked, uncovered=uncovered
        )

    @classmethod
    def from_env(cls) -> GovRedis:
        """A GovRedis with the settings of this process's environment. Raises ConfigurationError."""
        return cls(Config.from_env())

    @property
    def agents(self) -> AgentStore:
        """The AgentStore. Raises ConfigurationError where no PostgreSQL is configured."""
        return AgentStore(self._keys, self.postgres, self.metadata)

    @property
    def postgres(self) -> Postgres:
        """The PostgreSQL of GOVREDIS_DATABASE_URL. Raises ConfigurationError where none is configured."""
        if self._postgres is None:
            raise ConfigurationError("GOVREDIS_DATABASE_URL is not set; it must be postgresql://[user[:password]@]...")
        return self._postgres

    def cache(
        self,
        namespace: str,
        ttl: float | None = None,
        *,
        strict: bool = False,
        negative_ttl: float | None = None,
        stale: float = 0.0,
    ) -> MetadataCache:
        """The MetadataCache of a namespace, its keys at `{namespace}:{id}`.

        Args:
            namespace: without a colon, and no other key kind's.
            ttl: seconds that a value is kept unless `set` says otherwise; None: metadata_ttl.
            strict: no value while nobody can tell whether it is stale, because PostgreSQL is away: BackendUnavailable.
            negative_ttl: seconds for which it is remembered that a loader found none; until then, what is created is
                seen only if it is invalidated, too. None: not at all.
            stale: seconds after its TTL for which `get_or_load` still uses a value: while one caller loads it anew, and
                where that fails.

        Raises ConfigurationError for a strict one where no PostgreSQL is configured.
        """
        if ttl is None:
            ttl = self.config.metadata_ttl
        which = namespace, ttl, strict, negative_ttl, stale
        cache = self._caches.get(which)
        if cache is None:
            generation = self._generations.get(namespace)
            if generation is None:
                made = Generation(self._keys.generation(check_namespace(namespace)))
                generation = self._generations.setdefault(namespace, made)
            local = self._local
            cache = self._caches.setdefault(
                which,
                MetadataCache(
                    self._keys,
                    self._redis,
                    self._guard,
                    namespace=namespace,
                    ttl=ttl,
                    strict=strict,
                    negative_ttl=negative_ttl,
                    stale=stale,
                    max_bytes=self.config.metadata_max_bytes,
                    generation=generation,
                    local=None if local is None else local.values(self._keys.values(namespace), generation),
                    counters=self.counters,
                ),
            )
        return cache

    def close(self) -> None:
        """Close the connections and end the probe threads.

        Locks still held are not released, and what this process owes Redis or PostgreSQL (revocations and invalidations
        made while they were away) is lost: close when they are back.
        """
        self.limits.close()
        if self._local is not None:
            self._local.close()
        if self._guard is not None:
            self._guard.close()
        for redis in (self._redis, self._parking):
            if redis is not None:
                redis.close()
        if self._postgres is not None:
            self._postgres.close()

    def __enter__(self) -> GovRedis:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GovRedis({self.config!r})"


#: Empty, or the process-wide GovRedis under "gov". No mutex: one that is held during a fork stays held in the child.
_process_wide: dict[str, GovRedis] = {}


def configure(gov: GovRedis | None) -> None:
    """Make `gov` the process-wide GovRedis that get_session_cache() and its friends use; None: from the environment."""
    if gov is None:
        _process_wide.clear()
    else:
        _process_wide["gov"] = gov


def get_gov() -> GovRedis:
    """The process-wide GovRedis: what `configure` set, else one made from the environment on first use."""
    gov = _process_wide.get("gov")
    if gov is None:
        # Two threads may make one each; one of the two, which has not connected yet, is forgotten.
        gov = _process_wide.setdefault("gov", GovRedis.from_env())
    return gov


def get_session_cache() -> SessionCache:
    """`sessions` of the process-wide GovRedis."""
    return get_gov().sessions


def get_distributed_lock() -> DistributedLock:
    """`locks` of the process-wide GovRedis."""
    return get_gov().locks


def get_rate_limiter() -> RateLimiter:
    """`limits` of the process-wide GovRedis."""
    return get_gov().limits


def get_metadata_cache() -> MetadataCache:
    """`metadata` of the process-wide GovRedis."""
    return get_gov().metadata


def get_agent_store() -> AgentStore:
    """`agents` of the process-wide GovRedis."""
    return get_gov().agents


def get_health_monitor() -> HealthMonitor:
    """`health` of the process-wide GovRedis."""
    return get_gov().health
