"""The keys of a cached value, K and its siblings, and the scripts that work on them."""

from __future__ import annotations

from ..client import Command, RedisClient, Script
from ..keys import sibling

LEASE = Script(__package__, "lease.lua")
FILL = Script(__package__, "fill.lua")
RELEASE = Script(__package__, "release.lua")
INVALIDATE = Script(__package__, "invalidate.lua")

#: A load that takes longer than this is not stored.
_LEASE_MS = "30000"
#: How long `set` is refused after an invalidation: the longest that a get-load-set without a lease is expected to take.
_TOMBSTONE_MS = "10000"


def cells(key: str) -> tuple[str, str, str]:
    """A value's keys: itself, its lease, its tombstone."""
    return key, sibling(key, "lease"), sibling(key, "tombstone")


def take(key: str, lease: str) -> Command:
    """Take a lease, or share the one that stands. See lease.lua."""
    return LEASE.call((key, sibling(key, "lease")), (lease, _LEASE_MS))


def take_over(key: str, lease: str) -> Command:
    """Take a lease from whoever has it."""
    return "SET", sibling(key, "lease"), lease, "PX", _LEASE_MS


def give_back(key: str, lease: str) -> Command:
    """Give a lease back. See release.lua."""
    return RELEASE.call((sibling(key, "lease"),), (lease,))


def fill(key: str, text: str, ttl_ms: str, lease: str, version: str) -> Command:
    """Store a value under a lease, or "" for none. See fill.lua."""
    return FILL.call(cells(key), (text, ttl_ms, lease, version))


def invalidation(key: str, version: int | None) -> Command:
    """Invalidate a value; of a write whose version is known, or not. See invalidate.lua."""
    return INVALIDATE.call(cells(key), _stone(version))


def invalidate(redis: RedisClient, key: str, version: int | None) -> None:
    """The same, now."""
    redis.run(INVALIDATE, cells(key), *_stone(version))


def _stone(version: int | None) -> tuple[str, str]:
    return "" if version is None else str(version), _TOMBSTONE_MS
