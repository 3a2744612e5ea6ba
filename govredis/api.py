"""GovRedis: wires the features to one Redis and one PostgreSQL. And the process-wide GovRedis."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import finalize

from . import _boottime
from ._clock import Clock
from ._context import Context
from ._counters import Counters
from ._fork import notice_fork
from ._uncopied import Uncopied
from .client import connect
from .client.in_memory import InMemoryRedisClient
from .config import Config, config_at
from .errors import ConfigurationError
from .events import EventBus, StatusChanges
from .health import HealthMonitor, HealthReport
from .health.account import Account
from .health.dashboard import Dashboard
from .health.fleet import Fleet
from .health.heartbeat import Heartbeat
from .limits import RateLimiter
from .limits.parked import Parked
from .locks import DistributedLock
from .metadata import AgentStore, CachedValues, CacheOptions, MetadataCache, MetadataCaches
from .outbox import FreshnessLease
from .sessions import SessionCache
from .sessions.cache import utc_now

if TYPE_CHECKING:
    from .postgres import Postgres


@dataclass(frozen=True, slots=True)
class Internals:
    """Parts of a GovRedis for govredis's own commands and integrations; not public.

    Attributes:
        freshness: what cached values stand under, where there are Redis and PostgreSQL.
        heartbeat: Celery's beat and its workers, as health sees them.
        fleet: Celery's workers, beats and queues, as they tell of themselves.
        parked: Celery's tasks that wait for their limits, where Redis is enabled.
        caches: all that `cache` has made, and the parts that they share.
        account: the sums over all processes.
        dashboard: the page of all this for people.
    """

    context: Context
    freshness: FreshnessLease | None
    heartbeat: Heartbeat
    fleet: Fleet
    parked: Parked | None
    caches: MetadataCaches
    account: Account
    dashboard: Dashboard


class GovRedis(Uncopied):
    """Sessions, locks, limits, metadata, agents, events and health over one Redis and, if configured, one PostgreSQL.

    Connects on first use. Safe to share between threads, and to create before a fork; several may live side by side.

    Args:
        config: the settings; None: the defaults. `GovRedis.from_env()` reads the environment's.

    Attributes:
        sessions, locks, limits, events, health: the features.
        metadata: the MetadataCache of the namespace "agent_meta".
        config: the settings.
        counters: the counts of this process, by name: docs/metrics.md lists them.

    Raises ConfigurationError where an extra that the settings need is not installed.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._wire(Context.of(config if config is not None else Config()), time)

    #: Removes the lock folder that `in_memory` has made.
    _remove_folder: Callable[[], object] | None = None

    def _wire(self, context: Context, clock: Clock) -> None:
        self.config: Config = context.config
        config = self.config
        self.counters: Counters = context.counters
        keys, redis, postgres = context.keys, context.redis, context.postgres
        self._parking = redis
        if redis is not None and config.parking_url is not None:
            self._parking = connect(config_at(config, config.parking_url))
        freshness = None
        if redis is not None and postgres is not None:
            freshness = FreshnessLease(context, CachedValues(keys))
        heartbeat, fleet, account = Heartbeat(context), Fleet(context), Account(context, clock)
        parked = None if self._parking is None else Parked(keys, self._parking)
        caches = MetadataCaches(context, freshness)

        now = utc_now if clock is time else partial(_utc_of, clock)
        self.sessions: SessionCache = SessionCache(context, freshness=freshness, now=now)
        self.locks: DistributedLock = DistributedLock(context)
        self.limits: RateLimiter = RateLimiter(
            context, sleep=clock.sleep, clock=_boottime.clock if clock is time else clock.monotonic
        )
        self.events: EventBus = EventBus(context)
        changes = StatusChanges(context, self.events, "health.changed", usual="pass")
        self.health: HealthMonitor = HealthMonitor(
            context,
            heartbeat,
            fleet=fleet,
            freshness=freshness,
            parked=parked,
            lock_folder=self.locks.check_folder,
            locks_held=self.locks.count_held,
            namespaces=caches.namespaces,
            account=account,
            noted=lambda report: _note(changes, report),
            clock=clock.monotonic,
        )
        dashboard = Dashboard(context, self.health, account, locks=self.locks.glance, denied=self.limits.most_denied)
        self.internal: Internals = Internals(context, freshness, heartbeat, fleet, parked, caches, account, dashboard)
        self.metadata: MetadataCache = self.cache("agent_meta")

    @classmethod
    def from_env(cls) -> GovRedis:
        """A GovRedis with the settings of this process's environment. Raises ConfigurationError."""
        return cls(Config.from_env())

    @classmethod
    def in_memory(cls, config: Config | None = None, *, clock: Clock = time) -> GovRedis:
        """A GovRedis for tests, with a Redis of its own in this process: fakeredis, of the extra `testing`.

        Each one begins empty, and nobody else sees its data: no other GovRedis, no other process, and of a forked child
        only the child's copy. Lock files lie in a folder of its own, unless `config` names one; `close` removes it.

        Args:
            config: the settings; None: the defaults. It needs no URL of Redis. PostgreSQL is used if it is configured.
                `local_cache` is off, as fakeredis does not say what has changed, and so is `limit_deny_cache`.
            clock: what limits, sessions and Redis's TTLs go by, with the functions of the module `time`. The pytest
                fixture `gov_clock` is one, and sees to locks and cached values too.

        Raises ConfigurationError where the extra is not installed.
        """
        config = config if config is not None else Config()
        gov = cls.__new__(cls)
        config = replace(config, redis_enabled=True, parking_url=None, local_cache=False, limit_deny_cache=False)
        client = InMemoryRedisClient(config, clock)
        if config.lock_folder is None:
            folder = tempfile.mkdtemp(prefix="govredis-")
            gov._remove_folder = finalize(gov, _remove, folder, os.getpid())
            config = replace(config, lock_folder=folder)
        gov._wire(Context.of(config, client), clock)
        return gov

    @property
    def agents(self) -> AgentStore:
        """The AgentStore. Raises ConfigurationError where no PostgreSQL is configured."""
        return AgentStore(self.internal.context.keys, self.postgres, self.metadata)

    @property
    def postgres(self) -> Postgres:
        """The PostgreSQL of GOVREDIS_DATABASE_URL. Raises ConfigurationError where that is not set."""
        postgres = self.internal.context.postgres
        if postgres is None:
            raise ConfigurationError("GOVREDIS_DATABASE_URL is not set; it must be postgresql://[user[:password]@]...")
        return postgres

    def cache(
        self,
        namespace: str,
        ttl: float | None = None,
        *,
        strict: bool = False,
        negative_ttl: float | None = None,
        stale: float = 0.0,
        foreign: Literal["use"] | None = None,
        default: Callable[[Any], Any] | None = None,
        object_hook: Callable[[dict[str, Any]], Any] | None = None,
    ) -> MetadataCache:
        """The MetadataCache of a namespace, its keys at `{namespace}:{id}`.

        Args:
            namespace: a name without a colon that no other kind of key has.
            ttl: seconds that a value is kept unless `set` says otherwise; None: metadata_ttl.
            strict: while PostgreSQL is away, and a value may be stale, raise BackendUnavailable instead of using it.
            negative_ttl: seconds for which the cache remembers that a loader found nothing. Meanwhile a value that is
                created must be invalidated too, or it is not seen. None: not at all.
            stale: seconds after its TTL for which `get_or_load` still uses a value: while a caller loads it anew, and
                where that fails. Such a cache keeps each value twice.
            foreign: "use": with PostgreSQL, use values that others have set, such as an async service, though their age
                is unknown. None: load them anew. Without PostgreSQL they are used.
            default: turns a value without a JSON form into one that has a form, or raises TypeError; see `json.dumps`.
                None: datetime, date and time in ISO 8601, Decimal and UUID as their str, bytes as base64.
            object_hook: turns each dict of the JSON into an object; see `json.loads`. A local cache shares that object
                between callers, so it must be immutable. A value of others for which it raises ValueError or the like
                is a miss.

        There is one cache for each namespace and settings: give the same functions each time, not new lambdas.

        Raises ValueError for a bad argument, and for settings that exclude each other. Raises ConfigurationError for a
        strict cache where Redis is enabled and no PostgreSQL is configured.
        """
        notice_fork()
        ttl = self.config.metadata_ttl if ttl is None else ttl
        options = CacheOptions(namespace, ttl, strict, negative_ttl, stale, foreign, default, object_hook)
        return self.internal.caches.get(options)

    def close(self) -> None:
        """Close the connections and end the probe threads.

        A process that ends without it still tells its last denials and admissions, within a second, unless it is
        killed. Locks that are held are not released. Pending writes (revocations and invalidations made while Redis or
        PostgreSQL was away) are lost: close when the servers are back.
        """
        notice_fork()
        internal, context = self.internal, self.internal.context
        self.limits.close()
        self.events.close()
        features, servers = (internal.caches, internal.freshness), (context.redis, self._parking, context.postgres)
        for part in (*features, context.teller, *servers):
            if part is not None:
                part.close()
        if self._remove_folder is not None:
            self._remove_folder()

    def __enter__(self) -> GovRedis:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GovRedis({self.config!r})"


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child leaves it to its parent
        shutil.rmtree(folder, ignore_errors=True)


def _note(changes: StatusChanges, report: HealthReport) -> None:
    """Without outputs, which name hosts."""
    changes.note(report.status, {"checks": {c.name: c.status for c in report.checks if c.status != "pass"}})


def _utc_of(clock: Clock) -> datetime:
    return datetime.fromtimestamp(clock.time(), timezone.utc)


#: Empty, or the process-wide GovRedis under "gov". No mutex: held during a fork, it would stay held in the child.
_process_wide: dict[str, GovRedis] = {}


def configure(gov: GovRedis | None) -> None:
    """Make `gov` the process-wide GovRedis that get_session_cache() and its friends use; None: from the environment.

    The GovRedis from before is not closed.
    """
    if gov is None:
        _process_wide.clear()
    else:
        _process_wide["gov"] = gov


def get_gov() -> GovRedis:
    """The process-wide GovRedis: the one that `configure` set, or one made from the environment on first use.

    Raises ConfigurationError for a bad environment, as GovRedis.from_env.
    """
    gov = _process_wide.get("gov")
    if gov is None:
        # Two threads may make one each. One of the two is forgotten, before it has connected.
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


def get_event_bus() -> EventBus:
    """`events` of the process-wide GovRedis."""
    return get_gov().events
