"""ShardRecord: for which slots the freshness lease of a Cluster's node is, and for whose data; see relay.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..client import Command, RedisClient, RedisNode
from ..client.slots import SLOTS, slot_of_command
from ..errors import BackendUnavailable

#: Slots as the bits of a number: `slots >> slot & 1`.
Slots = int

#: The question for a server's Lineage.
LINEAGE: tuple[str, ...] = ("INFO", "replication")

_NONE = "-"
_ONES = re.compile("1+")


@lru_cache(maxsize=64)
def read_slots(text: str) -> Slots:
    """The slots in a text such as "0-5460,7000". Raises ValueError."""
    slots = 0
    for each in text.split(",") if text != _NONE else ():
        first, _, last = each.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < SLOTS:
            raise ValueError(f"{each!r} is no range of slots")
        slots |= ((1 << (high - low + 1)) - 1) << low
    return slots


@lru_cache(maxsize=64)
def write_slots(slots: Slots) -> str:
    """The text that `read_slots` reads."""
    runs = _ONES.finditer(f"{slots:b}"[::-1])
    return ",".join(f"{run.start()}-{run.end() - 1}" for run in runs) or _NONE


class Lineage(NamedTuple):
    """The history of a server's data. A primary that starts, or is promoted, begins one of its own."""

    #: Its name, which no other history has.
    replication: str
    #: How long it is, in bytes.
    offset: int
    #: The history that it goes on from, and how much of that it has.
    former: str
    former_end: int

    @classmethod
    def parse(cls, info: bytes) -> Lineage:
        """Raises BackendUnavailable where INFO does not tell it."""
        told = dict(line.partition(":")[::2] for line in info.decode(errors="replace").splitlines())
        try:
            return cls(
                told["master_replid"],
                int(told["master_repl_offset"]),
                told["master_replid2"],
                int(told["second_repl_offset"]) - 1,
            )
        except (KeyError, ValueError) as error:
            raise BackendUnavailable(f"INFO replication does not tell whose data a node has: {error!r}") from error


class ShardRecord(NamedTuple):
    """The further part of the record of a Cluster's node."""

    #: The history that it belongs to: that of the server which has written it.
    replication: str
    #: How long that was, at least, when Redis was told; 0: that is not known yet.
    offset: int
    #: The slots that the node has, and from which nothing is on its way. No other values are used.
    slots: Slots
    #: Those that it had earlier in this epoch.
    left: Slots

    @classmethod
    def begun(cls, server: Lineage, slots: Slots) -> ShardRecord:
        return cls(server.replication, 0, slots, 0)

    def is_of(self, server: Lineage) -> bool:
        """Does the server have all the data that the node had when Redis was told?"""
        return self.replication == server.replication or (
            self.replication == server.former and 0 < self.offset <= server.former_end
        )

    def told(self, server: Lineage, slots: Slots) -> ShardRecord | None:
        """As the next run leaves it; None where a slot has come back: values of before have missed what was told."""
        if slots & ~self.slots & self.left:
            return None
        return ShardRecord(server.replication, 0, slots, (self.left | self.slots) & ~slots)


def own_slots(node: RedisNode) -> Slots:
    """The slots of a node by its own view, without those that are on their way to another.

    Raises BackendUnavailable, also where it has none; BackendError.
    """
    for line in node.call("CLUSTER", "NODES").decode(errors="replace").splitlines():
        _, _, flags, _, _, _, _, _, *slots = line.split()
        if "myself" in flags.split(","):
            leaving = [slot[1:].partition("->-")[0] for slot in slots if "->-" in slot]
            held = read_slots(",".join(slot for slot in slots if not slot.startswith("[")) or _NONE)
            return held & ~read_slots(",".join(leaving) or _NONE)
    raise BackendUnavailable(f"{node.name} does not tell which slots it has")


def find_slot(redis: RedisClient, key: str) -> None:
    """Have the client find out where the slot of a key is now. Raises BackendUnavailable, BackendError."""
    redis.call("PTTL", key)


def of_slots(commands: Sequence[Command], slots: Slots) -> list[Command]:
    """Those among the commands whose key is in these slots."""
    at = [(command, slot_of_command(command)) for command in commands]
    return [command for command, slot in at if slot is None or slots >> slot & 1]
