"""Metadata: MetadataCache in front of PostgreSQL, AgentStore, the agents' records there, the outbox and the guard."""

from .agents import AgentRecord, AgentStore
from .cache import MetadataCache
from .generation import Generation
from .guard import Guard
from .local import LocalTier
from .outbox import Outbox

__all__ = ["AgentRecord", "AgentStore", "Generation", "Guard", "LocalTier", "MetadataCache", "Outbox"]
