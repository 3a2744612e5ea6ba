"""Locks: DistributedLock, and HeldLock, the handle of one that is held."""

from .held import HeldLock
from .lock import DistributedLock

__all__ = ["DistributedLock", "HeldLock"]
