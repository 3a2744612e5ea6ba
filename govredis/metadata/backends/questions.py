"""ValueQuestions: values are read from the nodes that have them, and each is judged by what its own node says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ...client import Command, NotServedHere, Redirected, RedisClient, RedisNode
from ...errors import BackendError, BackendUnavailable
from ...outbox import FreshnessSnapshot
from ..generation import GenerationMark
from ..options import CacheOptions, SharedParts

#: Nodes whose terms are kept.
_NODES = 256
#: How often a read is tried whose connection turns out to be a new one, or whose key to be on another node.
_TRIES = 3

#: For a cache without a freshness lease: all values may be used, and stored.
_ALWAYS = FreshnessSnapshot(None, -1, math.inf, math.inf, 0)
#: While PostgreSQL is away and the lease cannot be renewed: likewise. Values that are stored then have no epoch, and
#: are not used when it is back.
_BLIND = FreshnessSnapshot(None, -1, math.inf, math.inf, 0)


class Terms(NamedTuple):
    """Under what the values of one node are used and stored."""

    node: RedisNode
    snapshot: FreshnessSnapshot
    mark: GenerationMark

    @property
    def epoch(self) -> int | None:
        """For what is stored; None: it has none."""
        return None if self.snapshot.epoch < 0 else self.snapshot.epoch

    @property
    def generation(self) -> str:
        """As far as this process knows it."""
        return self.mark.known.value

    def fit(self, epoch: int | None, generation: str) -> bool:
        """May a value be used that was stored under these?"""
        snapshot = self.snapshot
        return generation == self.mark.known.value and (snapshot.node is None or epoch == snapshot.epoch)


Reply: TypeAlias = list[bytes | None]


class Answer(NamedTuple):
    """The reply for one key. Without terms there is none, and nothing can be stored."""

    reply: Reply
    terms: Terms | None
    #: The node's, after it has replied.
    connects: int


_NOTHING: Reply = [None, None, None]
_NO_ANSWER = Answer(_NOTHING, None, 0)


class ValueQuestions:
    """How one cache asks Redis.

    A key's node, its freshness lease and its mark go together: a reply counts if it came from the node whose lease
    covers the key, and over the connections under which the lease was read. Redirections are not followed. After a
    MOVED the key is looked for anew. In a slot that is on its way a key may be a miss, and then nothing is stored.

    Args:
        count: counts by name what is not as it should be. A node that is away is counted, never raised.
    """

    def __init__(
        self,
        redis: RedisClient | None,
        shared: SharedParts,
        options: CacheOptions,
        count: Callable[[str], None],
    ) -> None:
        self._redis = redis
        self._freshness = shared.freshness
        self._generation = shared.generation
        self._namespace = options.namespace
        self._strict = options.strict
        self._count = count
        #: The last terms of each node: to make them anew for each read took a tenth of its time.
        self._last: dict[RedisNode, Terms] = {}

    def terms(self, key: str) -> Terms | None:
        """Those for a key, with its generation known; None: nothing may be used or stored."""
        if self._redis is None:
            return None
        try:
            node = self._redis.at(key)
        except BackendUnavailable:
            self._count("degraded.reads")
            return None
        terms = self._terms_of(node)
        if terms is not None and not terms.snapshot.covers(key) and self._widened(key):
            return self.terms(key)
        if terms is None or not terms.snapshot.covers(key):
            return None
        try:
            if not terms.mark.is_known():
                asked = terms.mark.asked()
                terms.mark.answered(asked, self._redis.call(*terms.mark.question))
        except BackendUnavailable:
            self._count("degraded.fills")
            return None
        return terms

    def stand(self, terms: Terms, key: str) -> bool:
        """Was all since `terms` done under them, on their node?"""
        return terms.snapshot.node is None or (terms.node.covers(key) and self._stand(terms))

    def _stand(self, terms: Terms) -> bool:
        return self._freshness is None or self._freshness.stands(terms.snapshot)

    def ask(self, keys: Sequence[str], question: Callable[[str], Command]) -> list[Answer]:
        """The replies to each key's MGET, in order. Nodes are asked side by side."""
        if self._redis is None:
            return [_NO_ANSWER] * len(keys)
        answers: dict[str, Answer] = {}
        left = keys
        for _ in range(_TRIES):
            left = self._try(self._redis, left, question, answers)
            if not left:
                break
        return [answers.get(key, _NO_ANSWER) for key in keys]

    def _try(
        self, redis: RedisClient, keys: Sequence[str], question: Callable[[str], Command], answers: dict[str, Answer]
    ) -> list[str]:
        """Ask once, and put in what is found. Returns the keys for another try."""
        asked, again = [], []
        for node, some in self._by_node(redis, keys).items():
            terms = self._terms_of(node)
            if terms is None:
                continue
            if len(keys) == 1 and terms.mark.is_known() and terms.snapshot.covers(some[0]):
                return self._try_one(redis, terms, some[0], question(some[0]), answers)
            covered = [key for key in some if terms.snapshot.covers(key)]
            if len(covered) < len(some):
                others = [key for key in some if key not in covered]
                if self._widened(others[0]):
                    again += others
                else:
                    self._count("bypassed")
            if covered:
                mark = None if terms.mark.is_known() else terms.mark.asked()
                asked.append(_AskedNode(terms, covered, list(map(question, covered)), mark))
        for one, replies in zip(asked, _replies(redis, asked), strict=True):
            again += self._judge(redis, one, replies, answers)
        return again

    def _try_one(
        self, redis: RedisClient, terms: Terms, key: str, question: Command, answers: dict[str, Answer]
    ) -> list[str]:
        """As `_try` does, most often: with a single command."""
        reply: Any
        try:
            reply = terms.node.call(*question)
        except BackendUnavailable as error:
            reply = error.with_traceback(None)
        else:
            connects = terms.node.connects
            if self._stand(terms):
                answers[key] = Answer(reply, terms, connects)
                return []
        return self._judge(redis, _AskedNode(terms, [key], [], None), [reply], answers)

    def _widened(self, key: str) -> bool:
        """Is it worthwhile to look again, for a key that its node's lease did not cover?"""
        try:
            return self._freshness is not None and self._freshness.widen(key)
        except BackendUnavailable:
            return False

    def _by_node(self, redis: RedisClient, keys: Sequence[str]) -> dict[RedisNode, list[str]]:
        found: dict[RedisNode, list[str]] = {}
        for key in keys:
            try:
                found.setdefault(redis.at(key), []).append(key)
            except BackendUnavailable:
                self._count("degraded.reads")
        return found

    def _terms_of(self, node: RedisNode) -> Terms | None:
        last = self._last.get(node)
        if self._freshness is None:
            if last is not None and last.mark.is_known():
                return last
            return self._noted(Terms(node, _ALWAYS, self._generation.at(node)))
        lease = self._freshness.of(node)
        try:
            snapshot = lease.look()
        except BackendUnavailable:
            self._count("degraded.reads")
            return None
        if snapshot is None and lease.blind:
            if self._strict:
                raise BackendUnavailable(f"PostgreSQL is away, and cached values of {self._namespace!r} may be stale")
            self._count("degraded.unguarded")
            return Terms(node, _BLIND, self._generation.at(node))
        if snapshot is None:
            self._count("bypassed")
            return None
        if last is not None and last.snapshot is snapshot and last.mark.is_known():
            return last
        return self._noted(Terms(node, snapshot, self._generation.at(node)))

    def _noted(self, terms: Terms) -> Terms:
        if len(self._last) >= _NODES:  # of nodes that have left, too
            self._last.clear()
        self._last[terms.node] = terms
        return terms

    def _judge(
        self, redis: RedisClient, asked: _AskedNode, replies: list[Any], answers: dict[str, Answer]
    ) -> list[str]:
        """Put in the replies that count. Returns the keys for another try."""
        terms, keys, _, mark = asked
        connects = terms.node.connects
        if mark is not None and not self._told(redis, terms.mark, mark, replies.pop()):
            return []
        again, failed = [], False
        stands = self._stand(terms)
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, BackendError):
                if not isinstance(reply, BackendUnavailable):
                    raise reply
                if isinstance(reply, Redirected) and not reply.ask:
                    again.append(key)
                else:
                    failed = True
            elif stands:
                answers[key] = Answer(reply, terms, connects)
            else:
                answers[key] = Answer(_NOTHING, terms, connects)  # a miss, if there is no other try
                again.append(key)
        if failed:
            self._count("degraded.reads")
        return again

    def _told(self, redis: RedisClient, mark: GenerationMark, asked: tuple[float, int], reply: Any) -> bool:
        """Take the generation; False where it cannot be told."""
        try:
            if isinstance(reply, NotServedHere):  # the mark's slot, not that of the values, is elsewhere
                reply = redis.call(*mark.question)
            if isinstance(reply, BackendError):
                raise reply
        except BackendUnavailable:
            self._count("degraded.reads")
            return False
        mark.answered(asked, reply)
        return True


class _AskedNode(NamedTuple):
    """Questions to one node. `mark`: its `asked`; None: it is known."""

    terms: Terms
    keys: list[str]
    questions: list[Command]
    mark: tuple[float, int] | None


def _replies(redis: RedisClient, asked: Sequence[_AskedNode]) -> list[list[Any]]:
    """The replies of each node; its error in the place of each reply that is missing."""
    parts = []
    for terms, _, questions, mark in asked:
        parts.append((terms.node, questions if mark is None else [*questions, terms.mark.question]))
    return redis.pipelines(parts)
