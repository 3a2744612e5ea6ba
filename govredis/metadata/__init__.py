"""Metadata: MetadataCache in front of PostgreSQL, and AgentStore, the agents' records there."""

from .agents import AgentRecord, AgentStore
from .cache import MetadataCache
from .caches import MetadataCaches
from .commit import AfterCommit
from .entry_keys import CachedValues
from .options import CacheOptions

__all__ = [
    "AfterCommit",
    "AgentRecord",
    "AgentStore",
    "CacheOptions",
    "CachedValues",
    "MetadataCache",
    "MetadataCaches",
]
