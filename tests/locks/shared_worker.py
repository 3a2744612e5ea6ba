"""Work of another process with read/write locks and semaphores: imported by lock_worker.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from govredis import HeldLock, LockError, LockLost

SLOTS = 2


def hammer(takes: list[tuple[str, Callable[..., HeldLock]]], folder: str, until: str) -> dict[str, int]:
    """Take each in turn until the file `until` exists, and look who else is inside.

    Args:
        takes: "read", "write" or "semaphore", and the function that takes it.
        folder: has a file of each process inside. If two overlap, the second sees both.
    """
    tally = dict.fromkeys(["done", "overlaps", "lost", "errors", "degraded"], 0)
    for n in range(10**9):
        if os.path.exists(until):
            break
        kind, take = takes[n % len(takes)]
        try:
            held = take(timeout=10, ttl=30)
        except LockError:
            tally["errors"] += 1
            continue
        try:
            with held:
                mine = f"{folder}/{kind}.{os.getpid()}"
                os.close(os.open(mine, os.O_CREAT | os.O_EXCL))
                inside = [name.split(".")[0] for name in os.listdir(folder)]
                readers, writers, slots = (inside.count(k) for k in ("read", "write", "semaphore"))
                tally["overlaps"] += writers > 1 or (writers > 0 and readers > 0) or slots > SLOTS
                time.sleep(0.001)
                tally["done"] += 1
                tally["degraded"] += held.degraded
                os.unlink(mine)
        except LockLost:
            tally["lost"] += 1
    return tally
