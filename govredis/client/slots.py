"""Slots: which of a Cluster's 16,384 parts a key lies in (redis.io, "Redis cluster specification")."""

from __future__ import annotations

from binascii import crc_hqx

from .commands import Command

#: The number of slots.
SLOTS = 16384
#: Commands with the key in another place than the second word, and there.
_KEY_AT = {"EVAL": 3, "EVALSHA": 3, "OBJECT": 2, "MEMORY": 2, "XGROUP": 2, "XINFO": 2}
_OF_SCRIPTS, _OF_STREAMS = {"EVAL", "EVALSHA"}, {"XREAD", "XREADGROUP"}
_KEYLESS = {"ACL", "CLIENT", "CLUSTER", "CONFIG", "DBSIZE", "INFO", "PING", "ROLE", "SCAN", "SCRIPT", "SLOWLOG", "TIME"}


def slot_of(key: str | bytes) -> int:
    """The slot of a key: CRC16 of its hash tag, if it has any, else of the whole."""
    raw = key.encode() if isinstance(key, str) else key
    start = raw.find(b"{")
    if start >= 0:
        end = raw.find(b"}", start + 1)
        if end > start + 1:
            raw = raw[start + 1 : end]
    return crc_hqx(raw, 0) & (SLOTS - 1)


def slot_of_command(command: Command) -> int | None:
    """The slot of a command's first key; None: it has no key."""
    name = command[0]
    if name in _KEYLESS or (name in _OF_SCRIPTS and command[2] == "0"):
        return None
    if name in {"XREAD", "XREADGROUP"}:
        return slot_of(command[command.index("STREAMS") + 1])
    return slot_of(command[_KEY_AT.get(str(name), 1)])
