"""The parity check of metadata: are cached agents what PostgreSQL has, and if not, for how long?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from ..client import RedisClient
from ..errors import ConfigurationError
from ..keys import Keys
from .agents import AgentStore
from .cache import MetadataCache
from .entry_keys import walk

__all__ = ["AgentParity", "verify"]


class AgentParity(NamedTuple):
    """The result for a sample of cached agents."""

    #: Compared: those that could be used, of all that were found.
    compared: int
    #: Older than PostgreSQL when they were first compared.
    behind: int
    #: The same value, and still older, when X had passed. There should be none.
    stale: list[str]


def verify(
    keys: Keys,
    redis: RedisClient | None,
    cache: MetadataCache,
    agents: AgentStore,
    *,
    samples: int,
    staleness: float,
    sleep: Callable[[float], None] = time.sleep,
) -> AgentParity:
    """Compare cached agents with PostgreSQL, and those that are behind once more after `staleness` seconds.

    Reads like any reader; finds keys by SCAN, some at a time, until there are enough. Raises BackendUnavailable,
    BackendError, ConfigurationError.
    """
    if redis is None:
        raise ConfigurationError("Redis is disabled: nothing is cached")
    sampled = _sample(redis, keys.cached(cache.namespace, "x")[:-1], samples)
    compared, behind = _compare(cache, agents, sampled)
    stale = []
    if behind:
        sleep(staleness)
        _, still = _compare(cache, agents, list(behind))
        stale = sorted(i for i, version in still.items() if behind[i] == version)
    return AgentParity(compared, len(behind), stale)


def _sample(redis: RedisClient, start: str, samples: int) -> list[str]:
    found: dict[str, None] = {}
    for some in walk(redis, start):
        found.update((key.decode(errors="replace")[len(start) :], None) for key in some)
        if len(found) >= samples:
            break
    return list(found)[:samples]


def _compare(cache: MetadataCache, agents: AgentStore, ids: list[str]) -> tuple[int, dict[str, int]]:
    """How many could be compared, and the versions of those that are behind. Cached first: PostgreSQL may be newer, but
    not by what was written before."""
    cached = {
        i: value
        for i, value in cache.get_many(ids).items()
        if isinstance(value, dict) and value.keys() == {"agent_id", "metadata", "status", "version"}
    }
    now = agents.get_many(cached)
    behind = {
        i: value["version"] for i, value in cached.items() if i not in now or value["version"] < now[i]["version"]
    }
    return len(cached), behind
