"""Remedies of the commonest faults of the two servers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from ...health import Check, verdict

#: For a check of this name whose output has this: the remedy.
_REMEDIES = (
    (
        "redis",
        r"Connection refused|Error 2 connecting",
        "start redis-server, or change REDIS_URL: nothing listens at the address that it names",
    ),
    ("redis", r"DB index is out of range", "name another database in REDIS_URL: this Redis lacks that one{database}"),
    (
        "redis",
        r"without any password configured|no password is set",
        "take the password out of REDIS_URL: this Redis has none",
    ),
    (
        "redis",
        r"rejected our credentials: (?!.*(?:without any password|no password is set))",
        "correct the user and the password in REDIS_URL, or the ACL of that user",
    ),
    (
        "postgres",
        r"unsupported startup parameter\b.*\boptions",
        "take options= out of GOVREDIS_DATABASE_URL, or name it in ignore_startup_parameters of PgBouncer",
    ),
    ("postgres", r"not up to date", "run `govredis migrate`"),
    (
        "sentinels",
        "",
        "start them, or correct their addresses, REDIS_SENTINEL_USERNAME and REDIS_SENTINEL_PASSWORD; one that answers"
        " may not watch REDIS_SENTINEL_MASTER",
    ),
    ("workers", "", "look at its log, and start it again"),
    ("celery", "", "start a worker with -Q and that queue, or send the tasks elsewhere"),
    ("transactions", "", "look for a client that has forgotten to commit, in pg_stat_activity"),
    ("connections", "", "raise max_connections, or lower GOVREDIS_POSTGRES_CONNECTIONS"),
    ("clients", "", "raise maxclients, or lower GOVREDIS_REDIS_CONNECTIONS"),
    ("beat", r"^(?!.*cannot be read)", "look whether a single beat runs, and a worker that reads its queue"),
)
#: Not in the words of a proxy, which has answered.
_CUT_OFF = re.compile(r"^(?!.*the proxy before it says).*(?:Connection closed|Connection reset)", re.DOTALL)
_NO_ANSWER = re.compile(r"[Tt]imed? ?out|Connection closed|WRONG_VERSION_NUMBER|wrong version number")


def remedy(check: Check, redis_url: str) -> str:
    """The remedy of a check that does not pass; "" where its own words have it, or none is known."""
    found = [text for name, pattern, text in _REMEDIES if name == check.name and re.search(pattern, check.output)]
    if "nodes" in check.data and verdict.is_away(check):
        found = ["start the redis-server that is away, or give its slots to another node"]
    parts = urlsplit(redis_url)
    if check.name == "redis" and parts.scheme == "rediss" and _NO_ANSWER.search(check.output):
        found.append("if that port does not speak TLS, REDIS_URL must begin with redis://")
    if check.name == "redis" and parts.scheme == "redis" and _CUT_OFF.search(check.output):
        found.append("if that port speaks TLS, REDIS_URL must begin with rediss://")
    number = parts.path.strip("/")
    return "; ".join(text.format(database=number and f": {number}") for text in found)
