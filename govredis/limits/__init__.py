"""Rate limits: RateLimiter, the rates it takes, and its windows in Redis, PostgreSQL and the process."""

from .limiter import RateLimiter
from .rates import Limit
from .result import RateLimitResult

__all__ = ["Limit", "RateLimitResult", "RateLimiter"]
