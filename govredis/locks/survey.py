"""LockSurvey: all locks that are held on Redis, by the list of held locks and by a scan for others."""

from __future__ import annotations

from collections.abc import Sequence

from .._boottime import clock
from ..client import RedisClient
from ..keys import Keys
from .backends.redis_backend import RedisLockBackend
from .held_list import HeldLockList
from .holders import (
    FoundHolders,
    HeldCounts,
    ListedLock,
    LockHolder,
    LockScan,
    count_listed,
    read_list,
    still_held,
)
from .lease import LockLease
from .node_by_node import NodeByNode
from .renewal import renewer
from .resource import lock_keys
from .shared_locks import shared_lock_keys

#: For one `count`: steps of the scan, their seconds, and how many locks from outside are counted at most.
_STEPS, _STEPS_FOR, _MOST_OUTSIDE = 10, 0.01, 200
#: Locks held through govredis that a glance looks at.
_MOST_LISTED = 1000


class LockSurvey:
    """Looks for held locks on all nodes of Redis. Where some do not answer, their locks are missing, and it says so.

    Args:
        keys: of this prefix.
        held_list: the list of held locks.
        backends: whose leases in this process are held, too: they may not be listed yet.
    """

    def __init__(self, keys: Keys, held_list: HeldLockList, backends: Sequence[RedisLockBackend]) -> None:
        self._keys = keys
        self._list = held_list
        self._backends = backends
        #: For `count`, which goes on from call to call: its scan, and the locks from outside that it knows.
        self._scan = LockScan(keys.locks())
        self._outside: set[bytes] = set()

    def held(self, redis: RedisClient) -> FoundHolders:
        """All of them, by name. Raises BackendUnavailable, BackendError."""
        nodes = NodeByNode(redis)
        held = self._listed(nodes)
        listed = {self._keys.lock(holder.name).encode() for holder in held if holder.kind == "lock"}
        scan, found = LockScan(self._keys.locks()), set[bytes]()
        while True:
            found.update(scan.step(nodes))
            if scan.done:
                break
        held += scan.read(nodes, found - listed).values()
        return _sorted(held, nodes)

    def glance(self, redis: RedisClient) -> FoundHolders:
        """Some of them: 1,000 from the list, and 200 from outside that `count` has come to."""
        nodes = NodeByNode(redis)
        held = self._listed(nodes, _MOST_LISTED)
        outside = self._scan.read(nodes, list(self._outside)[:_MOST_OUTSIDE]).values()
        held += [holder for holder in outside if holder.token is None]
        return _sorted(held, nodes)

    def count(self, redis: RedisClient) -> HeldCounts:
        """How many there are. Looks at 10,000 keys of the database at most, and the next call goes on there."""
        nodes = NodeByNode(redis)
        until = clock() + _STEPS_FOR
        for _ in range(_STEPS):
            self._outside.update(self._scan.step(nodes))
            if self._scan.done or clock() >= until:
                break
        found = self._scan.read(nodes, list(self._outside)[:_MOST_OUTSIDE])
        self._outside = {key for key, holder in found.items() if holder.token is None}
        count, longest, seconds = count_listed(nodes, self._list)
        return HeldCounts(count, len(self._outside), longest, seconds, tuple(sorted(nodes.unanswered)))

    def _listed(self, nodes: NodeByNode, most: int = 0) -> list[LockHolder]:
        """Those through govredis, by the list and this process's own leases; `most` of the list, unless it is 0."""
        leases = [lease for lease in renewer.leases() if isinstance(lease, LockLease) and not lease.degraded]
        mine = [lease.entry() for lease in leases if lease.backend in self._backends]
        entries = {(e.kind, e.name, e.owner): e for e in (*read_list(nodes, self._list, most), *mine)}
        return still_held(nodes, [(entry, self._keys_of(entry)) for entry in entries.values()])

    def _keys_of(self, entry: ListedLock) -> tuple[str, ...]:
        key = self._keys.lock(entry.name)
        if entry.kind == "lock":
            return lock_keys(key)
        return shared_lock_keys(key, "semaphore" if entry.kind == "semaphore" else "rwlock")


def _sorted(held: list[LockHolder], nodes: NodeByNode) -> FoundHolders:
    held.sort(key=lambda holder: (holder.name, holder.kind, holder.token or 0))
    return FoundHolders(held, nodes.unanswered)
