"""Rate limits: RateLimiter, the rates it takes, and its windows in Redis, PostgreSQL and the process."""

from .limiter import RateLimiter, RateLimitResult
from .rates import Limit

__all__ = ["Limit", "RateLimitResult", "RateLimiter"]
