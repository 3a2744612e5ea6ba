"""CacheOptions: the settings of one cache; SharedParts: what it shares with the other caches of its GovRedis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import check_ttl, refuse
from ..keys import check_namespace
from ..outbox import FreshnessLease
from .cached import Functions
from .generation import Generation
from .local import LocalValues
from .renewals import Renewals
from .values import check_functions


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The settings of a cache, as `GovRedis.cache` explains them. Equal options mean one cache.

    Raises ValueError for options that contradict each other, and for values out of bounds.
    """

    namespace: str
    ttl: float
    strict: bool = False
    negative_ttl: float | None = None
    stale: float = 0.0
    foreign: str | None = None
    default: Callable[[Any], Any] | None = None
    object_hook: Callable[[dict[str, Any]], Any] | None = None

    def __post_init__(self) -> None:
        check_functions(default=self.default, object_hook=self.object_hook)
        check_namespace(self.namespace)
        check_ttl(self.ttl)
        if self.negative_ttl is not None:
            check_ttl(self.negative_ttl, "negative_ttl")
        if self.stale:
            check_ttl(self.stale, "stale")
        if self.foreign not in (None, "use"):
            raise refuse("foreign", self.foreign, "'use' or None")
        if self.strict and self.foreign:
            raise refuse("foreign", self.foreign, "None for a strict cache: nobody can tell whether they are stale")


@dataclass(frozen=True, slots=True)
class SharedParts:
    """Parts that several caches of one GovRedis have in common.

    Attributes:
        freshness: under which values are used; None: without Redis or PostgreSQL.
        renewals: of the leases of running loads; None: without Redis.
        generation: of the cache's namespace.
        functions: whose results the namespace holds.
        local: the values that this process keeps; None: without a local cache.
    """

    freshness: FreshnessLease | None
    renewals: Renewals | None
    generation: Generation
    functions: Functions
    local: LocalValues | None
