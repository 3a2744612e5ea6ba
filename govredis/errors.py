"""Every exception govredis raises, in one tree.

Contention is never unavailability, and unavailability is never contention: `LockTimeout` says that somebody else
holds the lock, `LockUnavailable` that nobody could be asked. Bad arguments raise `ValueError` before anything is sent.
All of these pickle, with the data they carry; over a JSON result backend of Celery they keep type and message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .limits import RateLimitResult
    from .sessions import SessionBinding

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "ConfigurationError",
    "GovRedisError",
    "LockError",
    "LockLost",
    "LockTimeout",
    "LockUnavailable",
    "RateLimitExceeded",
    "SessionAlreadyBound",
    "SessionStoreUnavailable",
]


class GovRedisError(Exception):
    """Base of everything below."""


class ConfigurationError(GovRedisError, ValueError):
    """A setting is wrong, an extra is not installed, or the tables are missing; the message names which."""


class BackendError(GovRedisError):
    """Redis or PostgreSQL answered, and the answer was an error (wrong type, no permission, bad SQL)."""


class BackendUnavailable(BackendError):
    """Redis or PostgreSQL did not answer in time, refused, or cannot serve now. What was sent may have been applied."""


class LockError(GovRedisError):
    """Base of the lock errors."""


class LockTimeout(LockError, TimeoutError):
    """Somebody else held the lock for the whole of `timeout`."""


class LockLost(LockError):
    """The lock's lease ran out while it was held; somebody else may hold it now."""


class LockUnavailable(LockError, BackendUnavailable):
    """Nobody could be asked for the lock, and the configured fallback forbids, or does not yet allow, another way."""


class RateLimitExceeded(GovRedisError):
    """A limit said no. `result` is the RateLimitResult, or None where there is none.

    A str in its place is the message of one that came over a JSON result backend, where `result` cannot come along.
    """

    def __init__(self, result: RateLimitResult | str | None = None) -> None:
        self.result = None if isinstance(result, str) else result
        if result is None:
            result = "rate limit exceeded"
        elif not isinstance(result, str):
            result = f"rate limit exceeded: {result.limit}, retry after {result.retry_after:.3f} s"
        super().__init__(result)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0] if self.result is None else self.result,)


class SessionAlreadyBound(GovRedisError):
    """`bind(if_absent=True)` found the session bound to another agent: `existing` is that SessionBinding.

    Over a JSON result backend comes its message, a str, and `existing` is None.
    """

    def __init__(self, existing: SessionBinding | str) -> None:
        self.existing = None if isinstance(existing, str) else existing
        if not isinstance(existing, str):
            existing = f"session is already bound to agent {existing.agent_id!r}"
        super().__init__(existing)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0] if self.existing is None else self.existing,)


class SessionStoreUnavailable(BackendUnavailable):
    """The session's record cannot be reached and this process does not know it: not the same as logged out."""


def refuse(what: str, held: Any, wanted: str) -> ValueError:
    """The one form of a bad-argument message: what was wrong, and what is right."""
    shown = repr(held)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ValueError(f"{what} is {shown}; it must be {wanted}")


def check_timeout(value: Any) -> float:
    """Return `value` if it is how long somebody may wait, in seconds. Raises ValueError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise refuse("timeout", value, "seconds, 0 or more")
    return value


def check_ttl(value: Any, what: str = "ttl") -> float:
    """Return `value` if it is how long something may be kept, in seconds. Raises ValueError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.001 <= value < 1e9:
        raise refuse(what, value, "seconds, 0.001 or more")
    return value
