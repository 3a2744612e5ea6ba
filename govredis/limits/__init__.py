"""Rate limits: RateLimiter, the rates that it takes, and its backends in Redis, PostgreSQL and the process."""

from .limiter import RateLimiter
from .rates import Limit
from .result import RateLimitResult

__all__ = ["Limit", "RateLimitResult", "RateLimiter"]
