"""FreshnessRecord: the freshness lease as its key holds it."""

from __future__ import annotations

from typing import NamedTuple

from .shard import ShardRecord, read_slots, write_slots


class FreshnessRecord(NamedTuple):
    """The freshness lease as its key holds it. `at` is in microseconds of Redis's clock."""

    epoch: int
    #: The number of the last run that told Redis.
    run: int
    #: The number that PostgreSQL had before that run.
    confirmed: int
    #: 0: not valid yet.
    at: int
    #: None outside a Cluster.
    shard: ShardRecord | None = None

    @classmethod
    def parse(cls, raw: bytes | None) -> FreshnessRecord | None:
        """None for anything that is no lease of ours."""
        words = (raw or b"").split()
        try:
            epoch, run, confirmed, at = map(int, words[:4])
            held = cls(epoch, run, confirmed, at)
            if len(words) > 4:
                replication, offset, slots, left = (word.decode() for word in words[4:])
                held = held._replace(shard=ShardRecord(replication, int(offset), read_slots(slots), read_slots(left)))
        except (TypeError, ValueError):
            return None
        return held if min(held[:4]) >= 0 and max(held[:4]) < 2**63 else None

    def __str__(self) -> str:
        words: list[object] = [*self[:4]]
        if self.shard is not None:
            words += [*self.shard[:2], write_slots(self.shard.slots), write_slots(self.shard.left)]
        return " ".join(map(str, words))
