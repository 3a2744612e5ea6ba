"""Rate limits: RateLimiter, the rates that it takes, and its backends in Redis, PostgreSQL and the process."""

from .backends.backend import WindowStats
from .denied_counts import Denied
from .limiter import RateLimiter
from .rates import Limit
from .result import RateLimitResult

__all__ = ["Denied", "Limit", "RateLimitResult", "RateLimiter", "WindowStats"]
