"""KeyCensus: how many keys of each kind Redis holds, counted in small steps, by one process at a time.

SCAN walks all keys. Its cursor and the counts so far are kept in Redis, so that any process goes on where another has
stopped. Counts are those of the last whole round. A key that is there during all of a round is counted, and as a rule
once: SCAN may show it again where a hash table shrinks meanwhile. A round walks the nodes of a Cluster one by one, and
begins anew where their list changes. While slots move between nodes, their keys may be counted twice or not at all.
A node that is away is left out: the counts name it, and lack the keys of it that were not counted before.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._context import Context
from ..client import Command, RedisNode, Script
from ..errors import BackendError, BackendUnavailable, printable
from ..keys import Keys
from .nodes import address_in
from .probes.probe import answered
from .report import Check

#: Milliseconds of rest after a round.
REST_MS = 30_000
#: The state is forgotten after a day without a step.
_TTL_MS = 86_400_000
#: Keys that one SCAN looks at: the first time, at least and at most.
_FIRST, _FEWEST, _MOST = 100, 10, 2000
#: Microseconds that one SCAN should take: shorter, and the next looks at more keys; longer, and at fewer.
_SHORT, _LONG = 300, 1000
#: Seconds for which the census is taken beyond the budget: one step, over a slow network.
_SPARE = 5.0
#: Words before the first colon that are counted in a round. Keys beyond count as others.
_MOST_WORDS = 500

_KINDS = ("session", "agent_sessions", "lock", "rate_limit", "agent_meta", "events", "govredis")
_OTHER = "other"
#: Siblings that cached values alone have: their word is a namespace.
_OF_VALUES = {b"stamp", b"lease", b"tombstone", b"stale"}


@dataclass(slots=True)
class _Tally:
    """The keys of one word: those themselves, their siblings, and among both those that never expire."""

    keys: int = 0
    siblings: int = 0
    lasting: int = 0


@dataclass(slots=True)
class CensusRound:
    """A round under way.

    Attributes:
        cursor: SCAN's.
        at_once: keys that the next SCAN looks at.
        seen: keys that were counted so far.
        unknown: keys among them whose TTL an ACL hides.
        of: keys that there were at the last step.
        namespaces: words that are known to be namespaces of cached values.
        crowded: there were more words than are counted.
        nodes: the addresses of the Cluster's nodes; [] for a server that is alone.
        walked: how many of these were walked to their end.
        unanswered: those among them that were away.
    """

    began: float
    cursor: str = "0"
    at_once: int = _FIRST
    seen: int = 0
    unknown: int = 0
    of: int = 0
    crowded: bool = False
    words: dict[str, _Tally] = field(default_factory=dict)
    namespaces: set[str] = field(default_factory=set)
    nodes: list[str] = field(default_factory=list)
    walked: int = 0
    unanswered: list[str] = field(default_factory=list)

    def dump(self) -> str:
        words = {word: [tally.keys, tally.siblings, tally.lasting] for word, tally in self.words.items()}
        rest = [self.began, self.cursor, self.at_once, self.seen, self.unknown, self.of, self.crowded]
        places = [self.nodes, self.walked, *self.unanswered] if self.nodes else []
        return json.dumps([*rest, words, sorted(self.namespaces), *places], separators=(",", ":"))

    @classmethod
    def load(cls, held: bytes, now: float) -> CensusRound:
        """A new round where nothing is held, or something that govredis has not written."""
        try:
            began, cursor, at_once, seen, unknown, of, crowded, words, namespaces, *places = json.loads(held)
            nodes, walked, *unanswered = places or ([], 0)
            return cls(
                float(began),
                str(int(cursor)),
                min(_MOST, max(_FEWEST, int(at_once))),
                int(seen),
                int(unknown),
                int(of),
                bool(crowded),
                {str(word): _Tally(*map(int, tally)) for word, tally in words.items()},
                set(map(str, namespaces)),
                list(map(str, nodes)),
                int(walked),
                list(map(str, unanswered)),
            )
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            return cls(now)

    def result(self, ended: float) -> str:
        counts: dict[str, _Tally] = {}
        for word, tally in self.words.items():
            total = counts.setdefault(word if word in _KINDS or word in self.namespaces else _OTHER, _Tally())
            total.keys += tally.keys
            total.siblings += tally.siblings
            total.lasting += tally.lasting
        return json.dumps(
            {
                "began": self.began,
                "ended": ended,
                "keys": {kind: counts.get(kind, _Tally()).keys for kind in sorted({*_KINDS, _OTHER, *counts})},
                "siblings": {kind: tally.siblings for kind, tally in sorted(counts.items()) if tally.siblings},
                "without_ttl": {kind: tally.lasting for kind, tally in sorted(counts.items()) if tally.lasting},
                "ttl_unknown": self.unknown,
                "crowded": self.crowded,
                **({"unanswered": self.unanswered} if self.unanswered else {}),
            },
            separators=(",", ":"),
        )


class KeyCensus:
    """Counts the keys of one Redis, and is the probe that shows them.

    Its checks: "keys", the keys of each kind; "census", their siblings, those without a TTL, how old the counts are,
    and how far the round under way is. Each is there once there is something to show.

    Args:
        namespaces: says which namespaces of cached values this process has made. Others are found by the siblings of
            their values.
    """

    name = "keys"

    def __init__(self, context: Context, namespaces: Callable[[], Iterable[str]]) -> None:
        self._redis = context.redis
        self._keys = context.keys
        self._key = context.keys.census()
        self._counters = context.counters
        self._namespaces = namespaces
        self._take = Script(__package__, "census_take.lua")
        self._put = Script(__package__, "census_put.lua")
        self.commands: tuple[Command, ...] = (("HMGET", self._key, "round", "last"), ("TIME",))

    # -- counting ------------------------------------------------------------------------------------------------

    def step(self, budget: float) -> bool:
        """Go on with the census for about so many seconds. Returns whether a round has ended.

        Raises BackendUnavailable, BackendError.
        """
        redis = self._redis
        if redis is None:
            return False
        asked = time.monotonic()
        process = secrets.token_hex(8)
        taken = redis.run(self._take, (self._key,), process, f"{(budget + _SPARE) * 1000:.0f}")
        if not taken:
            return False
        now = int(taken[0]) / 1000
        nodes = {address_in(redis, node): node for node in redis.nodes()}
        current = CensusRound.load(taken[1], now)
        addresses = sorted(filter(None, nodes))
        if current.nodes != addresses or not 0 <= current.walked < len(nodes):
            current = CensusRound(now, nodes=addresses)
        current.namespaces |= set(self._namespaces())
        current.of = _keys_of(nodes)
        hidden: set[str] = set()
        in_order = [nodes[address] for address in sorted(nodes)]
        while True:
            try:
                current.walked += self._scan(in_order[current.walked], current, hidden)
            except BackendUnavailable:
                if not addresses:
                    raise
                current.unanswered.append(addresses[current.walked])
                current.walked, current.cursor = current.walked + 1, "0"
            ended = current.walked == len(in_order)
            if ended or time.monotonic() >= asked + budget:
                break
        whole = current.result(now + time.monotonic() - asked) if ended else ""
        args = process, "" if ended else current.dump(), whole, str(REST_MS), str(_TTL_MS)
        return bool(redis.run(self._put, (self._key,), *args)) and ended

    def _scan(self, node: RedisNode, current: CensusRound, hidden: set[str]) -> bool:
        """One SCAN, and the TTLs of what it finds. Returns whether it was the node's last."""
        before, (cursor, found), after = node.pipeline(
            (("TIME",), ("SCAN", current.cursor, "COUNT", str(current.at_once)), ("TIME",))
        )
        took = (int(after[0]) - int(before[0])) * 1_000_000 + int(after[1]) - int(before[1])
        if took > _LONG:
            current.at_once = max(_FEWEST, current.at_once // 2)
        elif took < _SHORT:
            current.at_once = min(_MOST, current.at_once * 2)
        keys = [(key, *sort_key(self._keys, key)) for key in dict.fromkeys(found)]
        asked: list[Command] = [("PTTL", key) for key, word, _ in keys if word not in hidden]
        ttls = iter(node.pipeline(asked, each=True))
        refused: set[str] = set()
        for _, word, sibling in keys:
            ttl = None if word in hidden else next(ttls)
            if isinstance(ttl, BackendError):
                if not isinstance(ttl, BackendUnavailable):  # that is a key on its way to another node
                    refused.add(word)  # by an ACL; more of them would only fill its log
                ttl = None
            if ttl != -2:  # it has ended meanwhile
                self._count(current, word, sibling, lasting=ttl == -1, unknown=ttl is None)
        hidden |= refused
        current.cursor = cursor.decode()
        return bool(cursor == b"0")

    def _count(self, current: CensusRound, word: str, sibling: bytes | None, *, lasting: bool, unknown: bool) -> None:
        has_room = word in current.words or len(current.words) < _MOST_WORDS
        if sibling in _OF_VALUES and word not in _KINDS and has_room:
            current.namespaces.add(word)
        if not (has_room or word in _KINDS or word in current.namespaces or word == _OTHER):
            current.crowded = True
            word = _OTHER
        tally = current.words.setdefault(word, _Tally())
        if sibling is None:
            tally.keys += 1
        else:
            tally.siblings += 1
        tally.lasting += lasting
        current.seen += 1
        current.unknown += unknown

    # -- showing -------------------------------------------------------------------------------------------------

    def check(self, replies: Sequence[Any]) -> list[Check]:
        (under_way, last), (seconds, _) = answered(replies)
        data: dict[str, Any] = {}
        checks = []
        now = int(seconds)
        if last is not None:
            try:
                whole = json.loads(last)
                counts = {str(kind): int(n) for kind, n in whole["keys"].items()}
                data = {"age": round(max(0.0, now - whole["ended"]), 3)}
                data |= {name: whole[name] for name in ("siblings", "without_ttl", "ttl_unknown", "crowded")}
                if "unanswered" in whole:
                    data["unanswered"] = [printable(str(address)) for address in whole["unanswered"]]
                data["took"] = round(whole["ended"] - whole["began"], 3)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self._counters.add("health.unreadable")
                return []
            checks.append(Check("keys", "pass", "", counts))
        if under_way is not None:
            current = CensusRound.load(under_way, now)
            data["progress"] = round(min(1.0, current.seen / current.of), 4) if current.of else 0.0
        if data:
            checks.append(Check("census", "pass", "", data))
        return checks


def _keys_of(nodes: Mapping[str, RedisNode]) -> int:
    """How many keys there are, by their addresses; a node of a Cluster that is away has none."""
    found = 0
    for address, node in nodes.items():
        try:
            found += node.call("DBSIZE")
        except BackendUnavailable:
            if not address:
                raise
    return found


def sort_key(keys: Keys, key: bytes) -> tuple[str, bytes | None]:
    """The word of a key under this prefix, its kind or perhaps a namespace; and the name of the sibling, if it is one.

    Keys that cannot be ours are of the word "other".
    """
    sibling = None
    if key.startswith(b"{"):
        tag, end, name = key[1:].partition(b"}:")
        if not end:
            return _OTHER, None
        key, sibling = tag, name
    prefix = keys.prefix.encode()
    if not key.startswith(prefix):
        return _OTHER, None
    word, colon, rest = key[len(prefix) :].partition(b":")
    if not colon:
        return _OTHER, None
    kind = word.decode(errors="replace")
    if kind not in _KINDS and (len(word) > 512 or keys.may_be_another_kind(rest)):
        return _OTHER, None
    return kind, sibling
