"""Generation: all values of a namespace at once, by a mark that they carry.

On a Cluster the mark stands in many copies, all over the slots. Reads on a node ask for a copy that this node has, so
no other node need be there. All copies are set alike, and each moves with its slot. So a node that joins says the same
as the others, and a value that moves with its slot stays in use. No copy is older than the last `invalidate_all` that
has returned.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ..client import Command, RedisNode
from ..keys import Key, Keys

#: "" until the first `next`.
_OURS = re.compile(rb"(?:[0-9a-f]{16})?")
#: Seconds for which a process goes on with the generation that it knows.
KNOWN_FOR = 1.0
#: On a Cluster. A node with a hundredth of the slots has one of them but once in 30,000 times.
_COPIES = 1024


class Known(NamedTuple):
    """The last answer, until when it holds, and how often the generation had been forgotten by then."""

    value: str
    until: float
    serial: int


class GenerationMark:
    """A namespace's generation by one mark in Redis, as this process knows it: "" until all values were invalidated.

    Args:
        key: where it is in Redis, without a TTL.
    """

    def __init__(self, of: Generation, key: Key) -> None:
        self.key = key
        #: Asks for it, along with the next read.
        self.question: Command = ("MGET", key)
        self.known: Known = Known("", 0.0, 0)
        self._of = of

    def is_known(self) -> bool:
        """Need it not be asked for?"""
        _, until, serial = self.known
        return self._of._clock() < until and serial == self._of.serial

    def asked(self) -> tuple[float, int]:
        """To be taken before the question is sent, for `answered`."""
        return self._of._clock(), self._of.serial

    def answered(self, asked: tuple[float, int], reply: list[bytes | None]) -> None:
        sent, serial = asked
        self.known = Known(_name(reply[0] or b""), sent + KNOWN_FOR, serial)


class Generation:
    """The generation of one namespace's values.

    Args:
        has_slots: are there copies, as on a Cluster? Else there is one mark.
    """

    def __init__(
        self, keys: Keys, namespace: str, *, has_slots: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        #: The mark's, or the beginning of those of the copies.
        self.key: Key = keys.generation(namespace)
        #: How often it was forgotten.
        self.serial: int = 0
        self._clock = clock
        self._tags = [str(n) for n in range(_COPIES)] if has_slots else [""]
        self._key_of = partial(keys.generation, namespace)
        self._marks: dict[Key, GenerationMark] = {}
        self._by_node: WeakKeyDictionary[RedisNode, GenerationMark] = WeakKeyDictionary()

    def at(self, node: RedisNode) -> GenerationMark:
        """The mark for reads on a node. It is that node's own, unless the node has hardly any slots."""
        mark = self._by_node.get(node)
        if mark is None or not (mark.is_known() or node.covers(mark.key)):
            key = next(filter(node.covers, map(self._key_of, self._tags)), self._key_of(self._tags[0]))
            mark = self._by_node[node] = self._marks.setdefault(key, GenerationMark(self, key))
        return mark

    def is_marked_by(self, key: str) -> bool:
        """Is it the key of a mark?"""
        return key.partition(":{")[0] == self.key

    def forget(self) -> None:
        """A question that is under way does not count any more."""
        self.serial += 1

    def next(self) -> list[Command]:
        """The commands that begin another generation."""
        name = secrets.token_hex(8)
        return [("SET", self._key_of(tag), name) for tag in self._tags]


def _name(held: bytes) -> str:
    """The generation that values carry. A foreign value stands for a generation too, by a name that is short."""
    if _OURS.fullmatch(held):
        return held.decode()
    return f"-{hashlib.sha256(held).hexdigest()[:16]}"
