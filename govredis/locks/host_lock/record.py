"""The content of a lock file: a holder's record and a passer's, and how they are read."""

from __future__ import annotations

import os
import struct
import zlib
from typing import NamedTuple

#: Token, deadline, owner, boot, liveness; then a CRC, which tells a half-written record.
_RECORD = struct.Struct("<Qd63p37p40p")
RECORD_BYTES = _RECORD.size + 4
#: The places of the two records in the file.
HOLDERS, PASSERS = 0, RECORD_BYTES

#: Seconds that the fence outlives the lease. After that the clock is the larger, and takes its place. So tokens rise
#: unless a clock is behind another, or set back, by more than that.
FENCE_KEPT = 3600.0


class LockRecord(NamedTuple):
    """A record of a lock file. `deadline` is of `clock` since the boot `boot`; `liveness`, of the writer's process."""

    token: int
    owner: str
    deadline: float
    boot: str
    liveness: str


class RecordPair(NamedTuple):
    """The two records and their bytes, read at once. A record that is not whole is None."""

    holder: LockRecord | None
    passer: LockRecord | None
    holders: bytes
    passers: bytes


def token_of(raw: bytes) -> int | None:
    """The token of a whole record that stands alone."""
    if len(raw) != RECORD_BYTES or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    return int.from_bytes(raw[:8], "little")


def reaches(record: LockRecord | None, mine: LockRecord) -> bool:
    """Whether its token is as high as mine."""
    return record is not None and record.token >= mine.token


def format_record(record: LockRecord) -> bytes:
    token, owner, deadline, boot, liveness = record
    packed = _RECORD.pack(token, deadline, owner.encode(), boot.encode(), liveness.encode())
    return packed + zlib.crc32(packed).to_bytes(4, "little")


def parse_record(raw: bytes) -> LockRecord | None:
    """The record, or None for an empty or half-written one."""
    packed = raw[:-4]
    if len(raw) != RECORD_BYTES or zlib.crc32(packed) != int.from_bytes(raw[-4:], "little"):
        return None
    token, deadline, owner, boot, liveness = _RECORD.unpack(packed)
    return LockRecord(token, owner.decode(), deadline, boot.decode(), liveness.decode())


def read_records(fd: int) -> RecordPair:
    """Both records of the file. Raises OSError."""
    raw = os.pread(fd, 2 * RECORD_BYTES, 0)
    holder = parse_record(raw[:RECORD_BYTES])
    passer = parse_record(raw[PASSERS:])
    if raw and (holder is None or (passer is None and len(raw) > PASSERS)):
        # Read it again: it was being written.
        raw = os.pread(fd, 2 * RECORD_BYTES, 0)
        holder, passer = parse_record(raw[:RECORD_BYTES]), parse_record(raw[PASSERS:])
    return RecordPair(holder, passer, raw[:RECORD_BYTES], raw[PASSERS:])
