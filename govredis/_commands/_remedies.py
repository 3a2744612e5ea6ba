"""Remedies: what `govredis doctor` says beside the commonest faults of the two servers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from ..health import Check

#: For a check of this name whose output has this: the remedy.
_REMEDIES = (
    (
        "redis",
        r"Connection refused|Error 2 connecting",
        "is redis-server running at that address, which REDIS_URL names?",
    ),
    ("redis", r"DB index is out of range", "REDIS_URL names a database that this Redis lacks{database}"),
    (
        "redis",
        r"without any password configured|no password is set",
        "REDIS_URL has a password, and this Redis has none",
    ),
    (
        "postgres",
        r"unsupported startup parameter\b.*\boptions",
        "take options= out of GOVREDIS_DATABASE_URL, or name it in ignore_startup_parameters of PgBouncer",
    ),
)
_NO_ANSWER = re.compile(r"[Tt]imed? ?out|Connection closed|WRONG_VERSION_NUMBER|wrong version number")


def remedy(check: Check, redis_url: str) -> str:
    """The remedy of a check that does not pass, after a semicolon; "" where none is known."""
    found = [text for name, pattern, text in _REMEDIES if name == check.name and re.search(pattern, check.output)]
    parts = urlsplit(redis_url)
    if check.name == "redis" and parts.scheme == "rediss" and _NO_ANSWER.search(check.output):
        found.append("perhaps that port does not speak TLS: then REDIS_URL must begin with redis://")
    number = parts.path.strip("/")
    return "".join(f"; {text.format(database=number and f': {number}')}" for text in found)
