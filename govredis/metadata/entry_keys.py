"""The keys of a cached value, K and its siblings, and the scripts that work on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..client import Command, NotServedHere, RedisClient, RedisNode, Script
from ..errors import BackendError
from ..keys import Keys, check_namespace, sibling

LEASE = Script(__package__, "lease.lua")
FILL = Script(__package__, "fill.lua")
RENEW = Script(__package__, "renew.lua")
RELEASE = Script(__package__, "release.lua")
INVALIDATE = Script(__package__, "invalidate.lua")

#: How long a lease stands unless it is renewed: so long do others wait for a loader whose process was killed.
LEASE_MS = "3000"
#: How long a lease may stand at most: govredis 0.3 took them for so long.
_LONGEST_LEASE_MS = "30000"
#: How long `set` is refused after an invalidation: the longest that a get-load-set without a lease is expected to take.
_TOMBSTONE_MS = "10000"
#: Keys that one step of a walk looks at.
_AT_ONCE = "1000"


def entry_keys(key: str) -> tuple[str, str, str, str, str]:
    """A value's keys: itself, its stamp, its lease, its tombstone, and its copy for the time after its TTL."""
    return (
        key,
        sibling(key, "stamp"),
        sibling(key, "lease"),
        sibling(key, "tombstone"),
        sibling(key, "stale"),
    )


def read(key: str) -> Command:
    """Ask for a value and its stamp."""
    return "MGET", key, f"{{{key}}}:stamp"


def read_with_tombstone(key: str) -> Command:
    """Ask for both, and whether there is a tombstone: under one, values of others are not used."""
    return "MGET", key, f"{{{key}}}:stamp", f"{{{key}}}:tombstone"


def read_stale(key: str) -> Command:
    """Ask for a value, and for the copy that is used where it has ended."""
    return "MGET", key, sibling(key, "stale")


def take(key: str, lease: str, *, over: bool = False) -> Command:
    """Take a lease, or share the one that stands, or (`over`) take it from its holder. See lease.lua."""
    return LEASE.call(entry_keys(key)[:4], (lease, LEASE_MS, _LONGEST_LEASE_MS, "1" if over else "0"))


def renew(key: str, lease: str) -> Command:
    """Have a lease stand for longer. See renew.lua."""
    return RENEW.call((sibling(key, "lease"),), (lease, LEASE_MS))


def give_back(key: str, lease: str) -> Command:
    """Give a lease back. See release.lua."""
    return RELEASE.call((sibling(key, "lease"),), (lease,))


def fill(
    key: str, text: str, stamp: str, *, ttl: float, stale: float, lease: str, stood: str | bytes, version: str
) -> Command:
    """Store a value under a lease, or "" for none; `ttl` and `stale`: seconds. See fill.lua."""
    ttl_ms = max(1, int(ttl * 1000))
    stale_ms = ttl_ms + int(stale * 1000) if stale else 0
    return FILL.call(entry_keys(key), (text, stamp, str(ttl_ms), str(stale_ms), lease, stood, version, _TOMBSTONE_MS))


def invalidation(key: str, version: int | None) -> Command:
    """Invalidate a value; of a write whose version is known, or not. See invalidate.lua."""
    return INVALIDATE.call(entry_keys(key), _stone(version))


def invalidate(redis: RedisClient, key: str, version: int | None) -> None:
    """The same, now. Raises BackendUnavailable, BackendError."""
    try:
        redis.run(INVALIDATE, entry_keys(key), *_stone(version))
    except NotServedHere:
        _invalidate_in_steps(redis, key)


def invalidate_many(node: RedisNode, keys: Sequence[str]) -> None:
    """Invalidate values of one node, in its replay. Raises BackendUnavailable, BackendError."""
    replies = node.pipeline([invalidation(key, None) for key in keys], (INVALIDATE,), each=True)
    for key, reply in zip(keys, replies, strict=True):
        if isinstance(reply, NotServedHere):
            _invalidate_in_steps(node, key)
        elif isinstance(reply, BackendError):
            raise reply


def _invalidate_in_steps(redis: RedisClient, key: str) -> None:
    """Invalidate a value whose slot is on its way: each of its keys may be on either side, and no script can run.

    With the tombstone there, and the lease gone, nothing is stored that was loaded before: then the value goes.
    """
    value, stamp, lease, tombstone, stale = entry_keys(key)
    redis.pipeline([("SET", tombstone, "", "PX", _TOMBSTONE_MS), ("UNLINK", lease)])
    redis.pipeline([("UNLINK", one) for one in (value, stamp, stale)])


class CachedValues:
    """How the outbox's relay invalidates cached values, in any namespace."""

    scripts: Sequence[Script] = (INVALIDATE,)

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def invalidations(self, namespace: str, entries: Sequence[tuple[str, int]]) -> list[Command]:
        """The commands for (id, version) pairs."""
        commands = []
        for identity, version in entries:
            try:
                key = self._keys.cached(check_namespace(namespace), identity)
            except ValueError:  # under such an id, or namespace, nothing can be cached
                continue
            commands.append(invalidation(key, version))
        return commands


def walk(redis: RedisClient, start: str, end: str = "") -> Iterator[list[bytes]]:
    """The keys that begin and end so, some at a time: all that are there from the first step to the last.

    Each step looks at a thousand keys of any kind, of one node; the nodes take turns. A key whose slot moves meanwhile
    may be missed. Raises BackendUnavailable, BackendError.
    """
    pattern = f"{_literally(start)}*{_literally(end)}"
    cursors: dict[RedisNode, bytes] = dict.fromkeys(redis.nodes(), b"0")
    while cursors:
        for node, cursor in list(cursors.items()):
            cursors[node], some = node.call("SCAN", cursor, "MATCH", pattern, "COUNT", _AT_ONCE)
            yield some
            if cursors[node] == b"0":
                del cursors[node]


def _literally(text: str) -> str:
    return "".join(f"\\{c}" if c in "*?[]\\^" else c for c in text)


def _stone(version: int | None) -> tuple[str, str]:
    return "" if version is None else str(version), _TOMBSTONE_MS
