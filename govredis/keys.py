"""Every key pattern, and the refusal of ids that would break one.

A pattern's plain part is what the async service and redis-cli see. A sibling of a key K is `{K}:name`: its hash tag is
K itself, so it lives in K's Cluster slot, and one script may use both.
"""

from __future__ import annotations

import re

from .errors import refuse

ID_BYTES = 512

# Braces would move the Cluster hash tag; control characters break logs and terminals; a lone surrogate has no UTF-8.
_BAD = re.compile(r"[{}\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_RESERVED_NAMESPACES = frozenset({"session", "agent_sessions", "lock", "rate_limit", "events", "govredis"})

_ID = "a non-empty str of at most 512 bytes of UTF-8, without '{', '}' or control characters"
_NAME = "a non-empty str of at most 512 bytes of UTF-8, without ':', '{', '}' or control characters"


def check_id(value: str, what: str = "id") -> str:
    """Return `value` if it may stand in a key. Raises ValueError otherwise."""
    # Up to 128 characters cannot exceed 512 bytes: the common id is never encoded here.
    if (
        not isinstance(value, str)
        or not value
        or _BAD.search(value)
        or (len(value) > 128 and len(value.encode()) > ID_BYTES)
    ):
        raise refuse(what, value, _ID)
    return value


def check_name(value: str, what: str) -> str:
    """As check_id, for an operation or a namespace: these come before an id in the key, so no colon either."""
    check_id(value, what)
    if ":" in value:
        raise refuse(what, value, _NAME)
    return value


def sibling(key: str, name: str) -> str:
    """The key `name` beside `key`, in the same Cluster slot."""
    return f"{{{key}}}:{name}"


class Keys:
    """The key patterns under one prefix (GOVREDIS_KEY_PREFIX, "" by default)."""

    __slots__ = ("prefix",)

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def session(self, session_id: str) -> str:
        return f"{self.prefix}session:{check_id(session_id, 'session_id')}"

    def agent_sessions(self, agent_id: str) -> str:
        return f"{self.prefix}agent_sessions:{check_id(agent_id, 'agent_id')}"

    def lock(self, resource: str) -> str:
        return f"{self.prefix}lock:{check_id(resource, 'lock name')}"

    def rate_limit(self, operation: str, identity: str) -> str:
        return f"{self.prefix}rate_limit:{check_name(operation, 'operation')}:{check_id(identity)}"

    def cached(self, namespace: str, identity: str) -> str:
        """`namespace` has passed check_namespace once, when its cache was made."""
        return f"{self.prefix}{namespace}:{check_id(identity)}"

    def values(self, namespace: str) -> str:
        """What the keys of a namespace's cached values begin with."""
        return f"{self.prefix}{namespace}:"

    def agent_row(self, agent_id: str) -> str:
        """The agent's primary key in PostgreSQL."""
        return f"{self.prefix}{check_id(agent_id, 'agent_id')}"

    def session_row(self, session_id: str) -> str:
        """The session's primary key in PostgreSQL."""
        return f"{self.prefix}{check_id(session_id, 'session_id')}"

    def guard(self) -> str:
        return f"{self.prefix}govredis:guard"

    def generation(self, namespace: str) -> str:
        """Of a namespace's cached values; "": what all of these begin with."""
        return f"{self.prefix}govredis:generation:{namespace}"

    def held_locks(self) -> str:
        return f"{self.prefix}govredis:locks"

    def parked(self) -> str:
        return f"{self.prefix}govredis:parked"

    def denied(self) -> str:
        return f"{self.prefix}govredis:denied"

    def heartbeat(self) -> str:
        return f"{self.prefix}govredis:heartbeat"

    def health_history(self) -> str:
        return f"{self.prefix}govredis:health"


def check_namespace(value: str) -> str:
    """Return `value` if it may name a cache: a name that no other key kind uses. Raises ValueError otherwise."""
    check_name(value, "namespace")
    if value in _RESERVED_NAMESPACES:
        raise refuse("namespace", value, f"none of {', '.join(sorted(_RESERVED_NAMESPACES))}")
    return value
