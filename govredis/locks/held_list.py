"""HeldLockList: the list of the locks that are held, in Redis."""

from __future__ import annotations

import functools
import itertools

from ..client import RedisClient
from ..client.slots import SLOTS, slot_of
from ..keys import Keys

#: A Cluster has a list for so many slots in a row.
_SLOTS_OF_A_LIST = 256


class HeldLockList:
    """Where on Redis a lock is listed.

    On one server there is one list. A Cluster has 64, by the slots of the locks' keys. A list's own slot is among those
    of its locks. So it lies on their node, as long as no Cluster parts these 256 slots: a lock's release waits for no
    other node.

    Args:
        redis: None where Redis is disabled; nothing but the constructor is called then.
    """

    def __init__(self, redis: RedisClient | None, keys: Keys) -> None:
        tags = _tags() if redis is not None and redis.has_slots else ("",)
        #: The keys of all lists.
        self.keys: tuple[str, ...] = tuple([keys.held_locks(tag) for tag in tags])
        self._only = self.keys[0] if len(self.keys) == 1 else None

    def key_for(self, lock_key: str) -> str:
        """The key of the list for the lock with that key."""
        return self._only or self.keys[slot_of(lock_key) // _SLOTS_OF_A_LIST]


@functools.cache
def _tags() -> tuple[str, ...]:
    """A hash tag for each list: the smallest number whose slot is among the list's."""
    tags: dict[int, str] = {}
    for number in map(str, itertools.count()):
        tags.setdefault(slot_of(number) // _SLOTS_OF_A_LIST, number)
        if len(tags) == SLOTS // _SLOTS_OF_A_LIST:
            return tuple(tags[place] for place in range(len(tags)))
    raise AssertionError  # it counts without end
