"""Metadata: MetadataCache in front of PostgreSQL, and AgentStore, the agents' records there."""

from .agents import AgentRecord, AgentStore
from .cache import MetadataCache

__all__ = ["AgentRecord", "AgentStore", "MetadataCache"]
