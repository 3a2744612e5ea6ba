"""Metadata: MetadataCache in front of PostgreSQL, AgentStore, the agents' records there, the outbox and the guard."""

from .agents import AgentRecord, AgentStore
from .cache import MetadataCache
from .guard import Guard
from .outbox import Outbox

__all__ = ["AgentRecord", "AgentStore", "Guard", "MetadataCache", "Outbox"]
