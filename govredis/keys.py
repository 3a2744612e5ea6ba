"""Every key pattern, and the refusal of ids that would break one.

The async service and redis-cli see the plain keys. A sibling of a key K is `{K}:name`: its hash tag is K itself, so it
lives in K's Cluster slot, and one script may use both.

A prefix keeps tenants apart. In PostgreSQL a row's key has a character between prefix and id that neither can hold, so
different prefixes or ids never give one row. In Redis the wire format has no such character: the keys of two prefixes
differ unless one prefix begins the other. Even then, if both are empty or end with a colon, only a cache's values can
meet another prefix's keys: those of a cache whose namespace is the next word of the longer prefix. A prefix that has a
kind of key as one of its words, such as "session:", is refused.
"""

from __future__ import annotations

import re
from typing import TypeAlias, cast
from uuid import UUID

from .errors import refuse

#: An id as callers may give it; everywhere behind the public methods it is a str.
Id: TypeAlias = str | int | UUID

#: The results of Keys's methods, as _acl.py reads them: a key without siblings; a key with siblings; a key that is only
#: there in siblings; a tag that is a key, too, and that siblings have.
Key: TypeAlias = str
KeyAndSiblings: TypeAlias = str
Siblings: TypeAlias = str
Tag: TypeAlias = str

ID_BYTES = 512
#: An int of more bits has more than ID_BYTES digits.
_INT_BITS = 4 * ID_BYTES

# Braces would move the Cluster hash tag; control characters break logs and terminals; a lone surrogate has no UTF-8.
_BAD = re.compile(r"[{}\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_BAD_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: The kinds of keys, and the words before our counters: a cache counts under its name too.
_RESERVED_NAMESPACES = frozenset(
    {"session", "agent_sessions", "lock", "rate_limit", "events", "govredis"}
    | {"account", "celery", "guard", "health", "instrumentation", "leases", "limits", "locks", "outages", "sessions"}
)

_ID = "a non-empty str of at most 512 bytes of UTF-8, without '{', '}' or control characters; or an int or a UUID"
_NAME = "a non-empty str of at most 512 bytes of UTF-8, without ':', '{', '}' or control characters"
_TOPIC = "words of letters, digits, '_' and '-' joined by dots, 200 characters at most"
_IS_TOPIC = re.compile(r"(?=.{1,200}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


# With such a word, keys under this prefix would be keys of that kind under the part before the word.
_KIND_IN_PREFIX = re.compile(r"(?:^|:)(?:session|agent_sessions|lock|rate_limit|events|agent_meta|govredis):")
_GLOB = re.compile(r"[*?\[\]\\'\"\s]")
#: In a row's key, behind the prefix. Neither prefixes nor ids have control characters.
_SEPARATOR = "\x1f"


def is_id(value: str) -> bool:
    """May `value` stand in a key?"""
    # Up to 128 characters cannot exceed 512 bytes: the common id is never encoded here.
    return (
        isinstance(value, str)
        and bool(value)
        and not _BAD.search(value)
        and (len(value) <= 128 or len(value.encode()) <= ID_BYTES)
    )


def id_text(value: Id) -> str:
    """An id as it stands in keys, rows and results: an int or a UUID is its str.

    Any other value, a bool too, comes back unchanged, for check_id to refuse.
    """
    if isinstance(value, str):
        return str.__str__(value)  # the text of an enum's member varies between versions of Python
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _INT_BITS:
        return int.__repr__(value)
    return cast(str, value)


def is_text(value: str) -> bool:
    """May `value`, an id from the async service, stand in a row? Unlike our own ids it may have braces."""
    return bool(value) and not _BAD_TEXT.search(value) and len(value.encode()) <= ID_BYTES


def check_id(value: Id, what: str = "id") -> str:
    """Return the text of an id that may stand in a key. Raises ValueError otherwise."""
    if type(value) is not str:
        value = id_text(value)
    if not is_id(value):
        raise refuse(what, value, _ID)
    return value


def is_prefix(value: str) -> bool:
    """May `value` stand before every key?"""
    return value == "" or (is_id(value) and not _KIND_IN_PREFIX.search(value))


def check_name(value: str, what: str) -> str:
    """Return `value` if it may be an operation or a namespace: an id without a colon. Raises ValueError otherwise.

    These stand before an id in the key, and the colon ends them.
    """
    if not is_id(value) or ":" in value:
        raise refuse(what, value, _NAME)
    return value


def check_topic(value: str) -> str:
    """Return `value` if it may be the topic of an event. Raises ValueError otherwise."""
    if not isinstance(value, str) or not _IS_TOPIC.fullmatch(value):
        raise refuse("topic", value, _TOPIC)
    return value


def sibling(key: str, name: str) -> str:
    """The key `name` beside `key`, in the same Cluster slot."""
    return f"{{{key}}}:{name}"


def _tagged(key: str, tag: str) -> str:
    """The key; with a hash tag behind it, where that puts it on a Cluster."""
    return f"{key}:{{{tag}}}" if tag else key


class Keys:
    """The key patterns under one prefix (GOVREDIS_KEY_PREFIX, "" by default)."""

    __slots__ = ("_rows", "prefix")

    def __init__(self, prefix: str = "") -> None:
        self.prefix: str = prefix
        #: The beginning of our rows' keys; under the prefix "" these are the ids.
        self._rows = prefix and prefix + _SEPARATOR

    def session(self, session_id: Id) -> KeyAndSiblings:
        return f"{self.prefix}session:{check_id(session_id, 'session_id')}"

    def agent_sessions(self, agent_id: Id) -> Key:
        return f"{self.prefix}agent_sessions:{check_id(agent_id, 'agent_id')}"

    def lock(self, resource: Id) -> KeyAndSiblings:
        return f"{self.prefix}lock:{check_id(resource, 'lock name')}"

    def locks(self) -> str:
        """The beginning of the keys of locks, an async service's too."""
        return f"{self.prefix}lock:"

    def rate_limit(self, operation: str, identity: Id) -> KeyAndSiblings:
        return f"{self.prefix}rate_limit:{check_name(operation, 'operation')}:{check_id(identity)}"

    def cached(self, namespace: str, identity: Id) -> KeyAndSiblings:
        """The key of a cached value. `namespace` passed check_namespace when its cache was made."""
        return f"{self.prefix}{namespace}:{check_id(identity)}"

    def values(self, namespace: str) -> str:
        """The beginning of the keys of a namespace's cached values."""
        return f"{self.prefix}{namespace}:"

    @staticmethod
    def may_be_another_kind(rest: bytes) -> bool:
        """Does the rest of a key, behind `values(namespace)`, make it a key of another prefix?"""
        return _KIND_IN_PREFIX.search(rest.decode(errors="replace")) is not None

    def row(self, identity: Id, what: str = "id") -> str:
        """The key of a row in PostgreSQL, by its id."""
        return f"{self._rows}{check_id(identity, what)}"

    def row_of_other(self, text: str) -> str:
        """As `row`, for an id from the async service that `is_text`."""
        return f"{self._rows}{text}"

    def row_of_key(self, key: str) -> str:
        """The key of the row in PostgreSQL that belongs to a key in Redis."""
        return f"{self._rows}{key[len(self.prefix) :]}"

    def id_of(self, row: str) -> str:
        """The id in the key of one of our rows."""
        return row[len(self._rows) :]

    def id_if_ours(self, row: str) -> str | None:
        """The id in the key of any row; None if it is another prefix's.

        A key without a prefix may come from a table of the user's own, and belongs to all prefixes.
        """
        prefix, _, identity = row.rpartition(_SEPARATOR)
        return identity if prefix in ("", self.prefix) else None

    def guard(self, tag: str = "") -> Key:
        """The freshness lease; with a tag, that of the node on a Cluster where the tag puts it."""
        return _tagged(f"{self.prefix}govredis:guard", tag)

    def generation(self, namespace: str, tag: str = "") -> Key:
        """The key of the generation of a namespace's cached values; "" gives the beginning of all of these.

        With a tag, that of a copy on a Cluster, where the tag puts it.
        """
        return _tagged(f"{self.prefix}govredis:generation:{namespace}", tag)

    def held_locks(self, tag: str = "") -> Key:
        """The list of held locks; with a tag, one of the lists on a Cluster, where the tag puts it."""
        return _tagged(f"{self.prefix}govredis:locks", tag)

    def parked(self) -> KeyAndSiblings:
        return f"{self.prefix}govredis:parked"

    def events(self, topic: str) -> KeyAndSiblings:
        """The stream of a topic, and of all that begin with the same word."""
        return f"{self.prefix}events:{check_topic(topic).partition('.')[0]}"

    def denied(self) -> Siblings:
        return f"{self.prefix}govredis:denied"

    def account(self) -> Tag:
        return f"{self.prefix}govredis:account"

    def probe(self) -> Key:
        """Never written."""
        return f"{self.prefix}govredis:probe"

    def heartbeat(self) -> Key:
        return f"{self.prefix}govredis:heartbeat"

    def unread_heartbeats(self) -> Key:
        return f"{self.prefix}govredis:unread_heartbeats"

    def health_history(self) -> Key:
        return f"{self.prefix}govredis:health"

    def fleet(self) -> Key:
        return f"{self.prefix}govredis:fleet"

    def census(self) -> Key:
        return f"{self.prefix}govredis:census"

    def pattern(self, key: str) -> str:
        """The glob of all keys of the same kind as `key`; for a sibling, the glob of all siblings of these."""
        if key.startswith("{"):
            tag, _, name = key[1:].partition("}")
            return f"{{{self.pattern(tag)}}}{name and ':*'}"
        kind, colon, _ = key[len(self.prefix) :].partition(":")
        if kind == "govredis":
            plain, tagged, _ = key.partition("{")
            return escaped_glob(plain) + (tagged and "{*}")
        return f"{escaped_glob(self.prefix + kind)}{colon}*"


def escaped_glob(text: str) -> str:
    """A glob that matches `text`, without blanks and quotes, which would part the arguments of a command."""
    return _GLOB.sub(_escaped, text)


def _escaped(special: re.Match[str]) -> str:
    return "?" if special[0].isspace() or special[0] in "'\"" else f"\\{special[0]}"


def check_namespace(value: str) -> str:
    """Return `value` if it may name a cache: neither keys nor counters of ours have it. Raises ValueError otherwise."""
    check_name(value, "namespace")
    if value in _RESERVED_NAMESPACES:
        raise refuse("namespace", value, f"none of {', '.join(sorted(_RESERVED_NAMESPACES))}")
    return value
