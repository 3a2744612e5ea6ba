"""PendingInvalidations: those of committed writes that Redis has not been told of."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .._fork import renew_in_child
from ..client import RedisClient, RedisNode
from . import entry_keys

#: Invalidations carried out, and noted as carried out, at once.
_AT_ONCE = 500


class PendingInvalidations:
    """Kept while their node is away; carried out when it is back, before this process uses it for anything else.

    Args:
        key_of: the key of an id's value.
    """

    def __init__(self, redis: RedisClient | None, key_of: Callable[[str], str]) -> None:
        self._redis = redis
        self._key_of = key_of
        if redis is not None:
            redis.on_recovery(self._replay)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        #: By id, a token: an invalidation that is added again while it is carried out stays pending. A child starts
        #: without any; its parent carries them out.
        self.tokens: dict[str, object] = {}

    def add(self, identity: str) -> object:
        """Returns the token that `done` takes."""
        token = object()
        with self._lock:
            self.tokens[identity] = token
        return token

    def done(self, identity: str, token: object) -> None:
        with self._lock:
            if self.tokens.get(identity) is token:
                del self.tokens[identity]

    def replay_soon(self, identity: str) -> None:
        """Use the node of this id no more until all that are pending there are carried out."""
        if self._redis is not None:
            self._redis.replay_soon("invalidations are pending", self._key_of(identity))

    def _replay(self, node: RedisNode) -> None:
        with self._lock:
            pending = [(identity, self._key_of(identity), token) for identity, token in self.tokens.items()]
        pending = [one for one in pending if node.covers(one[1])]
        for i in range(0, len(pending), _AT_ONCE):
            some = pending[i : i + _AT_ONCE]
            entry_keys.invalidate_many(node, [key for _, key, _ in some])
            for identity, _, token in some:
                self.done(identity, token)
