"""Locks: DistributedLock, and what it makes and returns."""

from .held import HeldLock, HeldLocks
from .holders import FoundHolders, HeldCounts, LockHolder
from .lock import DistributedLock
from .shared_locks import ReadWriteLock, Semaphore

__all__ = [
    "DistributedLock",
    "FoundHolders",
    "HeldCounts",
    "HeldLock",
    "HeldLocks",
    "LockHolder",
    "ReadWriteLock",
    "Semaphore",
]
