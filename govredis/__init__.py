"""Sessions, locks, rate limits, a metadata cache, events and health on Redis, for synchronous Python."""

from ._version import __version__
from .api import (
    GovRedis,
    configure,
    get_agent_store,
    get_distributed_lock,
    get_event_bus,
    get_health_monitor,
    get_metadata_cache,
    get_rate_limiter,
    get_session_cache,
)
from .config import Config
from .errors import (
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    GovRedisError,
    LockError,
    LockLost,
    LockTimeout,
    LockUnavailable,
    RateLimitExceeded,
    SessionAlreadyBound,
    SessionChanged,
    SessionStoreUnavailable,
)
from .events import DeadEvent, Event, EventConsumer, EventListener
from .health import HealthReport
from .limits import Limit, RateLimitResult
from .locks import HeldLock
from .sessions import SessionBinding

__all__ = [
    # the object
    "GovRedis",
    "Config",
    "configure",
    # its features, of the process-wide one
    "get_session_cache",
    "get_distributed_lock",
    "get_rate_limiter",
    "get_metadata_cache",
    "get_agent_store",
    "get_health_monitor",
    "get_event_bus",
    # what they take and return
    "Limit",
    "RateLimitResult",
    "HeldLock",
    "SessionBinding",
    "Event",
    "EventListener",
    "EventConsumer",
    "DeadEvent",
    "HealthReport",
    # errors
    "GovRedisError",
    "ConfigurationError",
    "BackendError",
    "BackendUnavailable",
    "LockError",
    "LockTimeout",
    "LockLost",
    "LockUnavailable",
    "RateLimitExceeded",
    "SessionAlreadyBound",
    "SessionChanged",
    "SessionStoreUnavailable",
    "__version__",
]
