"""MetadataCaches: all caches of one GovRedis."""

from __future__ import annotations

from .._context import Context
from ..outbox import FreshnessLease
from .cache import MetadataCache
from .cached import Functions
from .generation import Generation
from .local import LocalTier
from .options import CacheOptions, SharedParts
from .renewals import Renewals


class MetadataCaches:
    """Makes each cache once, and gives it the parts that it shares with the others.

    Attributes:
        local: the in-process tier, where it is switched on.
        renewals: of the leases of running loads, where Redis is enabled.
    """

    def __init__(self, context: Context, freshness: FreshnessLease | None) -> None:
        redis, config = context.redis, context.config
        self.renewals: Renewals | None = None if redis is None else Renewals(redis, context.counters)
        self.local: LocalTier | None = None
        if redis is not None and config.local_cache:
            self.local = LocalTier(context.keys, redis, freshness, entries=config.local_entries)
        self._context = context
        self._freshness = freshness
        self._caches: dict[CacheOptions, MetadataCache] = {}
        self._namespaces: dict[str, tuple[Generation, Functions]] = {}

    def get(self, options: CacheOptions) -> MetadataCache:
        """The cache of these options. Raises ConfigurationError for a strict cache without PostgreSQL."""
        cache = self._caches.get(options)
        if cache is None:  # `setdefault`: two threads may make a cache each, and use the same
            made = MetadataCache(self._context, options=options, shared=self._shared(options))
            cache = self._caches.setdefault(options, made)
        return cache

    def namespaces(self) -> list[str]:
        """The namespaces of all caches that were made."""
        return list(self._namespaces)

    def close(self) -> None:
        """End the threads, waiting for them. They start again with the next read or load."""
        for part in (self.local, self.renewals):
            if part is not None:
                part.close()

    def _shared(self, options: CacheOptions) -> SharedParts:
        keys, namespace = self._context.keys, options.namespace
        known = self._namespaces.get(namespace)
        if known is None:
            redis = self._context.redis
            generation = Generation(keys, namespace, has_slots=redis is not None and redis.has_slots)
            known = self._namespaces.setdefault(namespace, (generation, Functions()))
        generation, functions = known
        local = None
        if self.local is not None:
            local = self.local.values(keys.values(namespace), generation, options.object_hook)
        return SharedParts(self._freshness, self.renewals, generation, functions, local)
