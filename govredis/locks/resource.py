"""Data that all parts of the locks room pass on: the subject of a lock, and the options of a caller."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import check_timeout, check_ttl
from ..keys import sibling


class Resource(NamedTuple):
    """The subject of a lock.

    Attributes:
        kind: "lock", "read", "write" or "semaphore".
        name: the user's.
        key: the first of `keys`. Errors and logs show it, and the lock file is named after it.
        keys: the keys of the scripts.
        script_args: the last arguments of the scripts.
    """

    kind: str
    name: str
    key: str
    keys: tuple[str, ...]
    script_args: tuple[str, ...]


def lock_keys(key: str) -> tuple[str, ...]:
    """The keys of the scripts of a "lock" with this key."""
    return key, sibling(key, "fence"), sibling(key, "queue"), sibling(key, "waiters")


class HoldOptions(NamedTuple):
    """How long a caller waits for a lock, and how long it keeps it.

    Attributes:
        timeout: seconds to wait; 0: one try; None: without a bound.
        ttl: seconds of the lease; None: the setting.
        renew: whether the lease is renewed in the background.
        max_hold: seconds after which the lease is no longer renewed; None: no bound.
    """

    timeout: float | None
    ttl: float | None
    renew: bool
    max_hold: float | None

    def check(self) -> None:
        """Raises ValueError for a duration that cannot be meant."""
        if self.timeout is not None:
            check_timeout(self.timeout)
        if self.ttl is not None:
            check_ttl(self.ttl)
        if self.max_hold is not None:
            check_ttl(self.max_hold, "max_hold")
