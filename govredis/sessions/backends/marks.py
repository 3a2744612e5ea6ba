"""The marks that revocations and rows leave beside a session: see values.lua."""

from __future__ import annotations

import re

_TWO_NUMBERS = re.compile(rb"([0-9]{1,20}) ?([0-9]{0,20}) ?([0-9a-f]*)")


def read_two(found: bytes | None) -> tuple[int, int, str]:
    """The same as two_numbers() in values.lua."""
    match = _TWO_NUMBERS.fullmatch(found or b"")
    if match is None:
        return 0, 0, ""
    one, other, digest = int(match[1]), int(match[2] or b"0"), match[3].decode()
    return one if one < 2**53 else 0, other if other < 2**53 else 0, digest


def read_mark(reply: list[bytes | None]) -> int:
    """The newer one of a session's two marks."""
    return max(read_two(reply[0])[:2])
