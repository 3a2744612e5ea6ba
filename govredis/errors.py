"""Every exception govredis raises, in one tree.

Contention is never unavailability, and unavailability is never contention. `LockTimeout` says that somebody else holds
the lock; `LockUnavailable` says that no server could be asked. Bad arguments raise `ValueError` before anything is
sent. All of these pickle, with the data they carry. Over a JSON result backend of Celery they keep type and message.
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
    "SessionChanged",
    "SessionStoreUnavailable",
]


def printable(text: str, keep: str = "") -> str:
    """Return `text`, of any origin, safe for a log or a terminal.

    Control characters, escape sequences and marks that turn the direction of writing are spelled out.

    Args:
        keep: characters that are left as they are.
    """
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text])


class GovRedisError(Exception):
    """Base of all errors of govredis. Its text is printable, even where it quotes a server or other people's data."""

    def __str__(self) -> str:
        return printable(super().__str__(), "\n")


class ConfigurationError(GovRedisError, ValueError):
    """A setting is wrong, an extra is not installed, or the tables are missing; the message names which."""


class BackendError(GovRedisError):
    """Redis or PostgreSQL answered, and the answer was an error (wrong type, no permission, bad SQL)."""


class BackendUnavailable(BackendError):
    """Redis or PostgreSQL did not answer in time, refused, or cannot serve now. A command may have been applied."""


class NotAsked(BackendUnavailable):
    """Nothing was sent. Private: callers see a BackendUnavailable."""


class NotTaken(BackendError):
    """A proxy, or this Redis, does not take this command: it says so, or ends the connection each time.

    Private: callers see a BackendError.
    """


class NoRight(BackendError):
    """An ACL of Redis forbids our user this command or key. Private: callers see a BackendError."""


class LockError(GovRedisError):
    """Base of the lock errors."""


class LockTimeout(LockError, TimeoutError):
    """Somebody else held the lock for the whole of `timeout`."""


class LockLost(LockError):
    """The lock's lease ran out while it was held; somebody else may hold it now."""


class LockUnavailable(LockError, BackendUnavailable):
    """The lock could be neither granted nor refused.

    No server could be asked, and the fallback forbids another way, or does not allow it yet. Or no connection was free,
    no replica confirmed the grant, or the lock folder cannot be used.
    """


class RateLimitExceeded(GovRedisError):
    """A limit said no. `result` is the RateLimitResult, or None where there is none.

    A JSON result backend carries the message alone: a str in the place of `result`.
    """

    def __init__(self, result: RateLimitResult | str | None = None) -> None:
        self.result: RateLimitResult | None = None if isinstance(result, str) else result
        if result is None:
            result = "rate limit exceeded"
        elif not isinstance(result, str):
            result = f"rate limit exceeded: {result.limit}, retry after {result.retry_after:.3f} s"
        super().__init__(result)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0] if self.result is None else self.result,)


class SessionAlreadyBound(GovRedisError):
    """`bind(if_absent=True)` found the session bound to another agent: `existing` is that SessionBinding.

    A JSON result backend carries the message alone, and `existing` is None.
    """

    def __init__(self, existing: SessionBinding | str) -> None:
        self.existing: SessionBinding | None = None if isinstance(existing, str) else existing
        if not isinstance(existing, str):
            existing = f"session is already bound to agent {existing.agent_id!r}"
        super().__init__(existing)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0] if self.existing is None else self.existing,)


class SessionChanged(GovRedisError):
    """`update` changed nothing: the session has ended, was bound anew, or was changed by others at each try.

    `existing` is the SessionBinding that stands instead; None where the session has ended. A JSON result backend
    carries the message alone, and `existing` is None.
    """

    def __init__(self, existing: SessionBinding | str | None = None) -> None:
        self.existing: SessionBinding | None = None if isinstance(existing, str) else existing
        if existing is None:
            existing = "the session has ended, or was never bound"
        elif not isinstance(existing, str):
            existing = f"the session of agent {existing.agent_id!r} was bound anew or changed meanwhile"
        super().__init__(existing)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0] if self.existing is None else self.existing,)


class SessionStoreUnavailable(BackendUnavailable):
    """The session's record cannot be reached, and this process does not know the session. The user may be logged in."""


def refuse(what: str, held: Any, wanted: str) -> ValueError:
    """The ValueError for a bad argument: its name, its value, and the values that are allowed."""
    shown = repr(held)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ValueError(f"{what} is {shown}; it must be {wanted}")


#: Seconds: the shortest time for which something can be kept, and a time beyond all that can be waited or kept for.
SHORTEST, TOO_LONG = 0.001, 1e9


def check_timeout(value: Any) -> float:
    """Return `value` if it is a time to wait, in seconds. Raises ValueError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < TOO_LONG:
        raise refuse("timeout", value, "seconds, from 0 to less than 1e9")
    return value


def check_ttl(value: Any, what: str = "ttl") -> float:
    """Return `value` if it is a time to keep something, in seconds. Raises ValueError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not SHORTEST <= value < TOO_LONG:
        raise refuse(what, value, f"seconds, from {SHORTEST} to less than 1e9")
    return value
