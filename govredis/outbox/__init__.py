"""The outbox: which writes in PostgreSQL Redis is told of, the relay that tells it, and what is fresh then."""

from .freshness import FreshnessLease
from .node_lease import FreshnessSnapshot, FreshnessState, NodeLease
from .outbox import Outbox
from .relay import OutboxRelay
from .users_transaction import NotingFunction, check_transaction

__all__ = [
    "FreshnessLease",
    "FreshnessSnapshot",
    "FreshnessState",
    "NodeLease",
    "NotingFunction",
    "Outbox",
    "OutboxRelay",
    "check_transaction",
]
