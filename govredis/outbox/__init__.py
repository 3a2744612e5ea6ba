"""The outbox: which writes in PostgreSQL Redis is told of, the relay that tells it, and what is fresh then."""

from .freshness import FreshnessLease, FreshnessSnapshot, FreshnessState
from .outbox import Outbox
from .relay import OutboxRelay

__all__ = ["FreshnessLease", "FreshnessSnapshot", "FreshnessState", "Outbox", "OutboxRelay"]
