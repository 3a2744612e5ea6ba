"""PendingInvalidations: those of committed writes that Redis has not been told of."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .._fork import renew_in_child
from ..client import RedisClient
from . import entry_keys

#: Invalidations carried out, and noted as carried out, at once.
_AT_ONCE = 500


class PendingInvalidations:
    """Kept while Redis is away; carried out when it is back, before this process uses it for anything else.

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

    def replay_soon(self) -> None:
        """Use Redis no more until all are carried out."""
        if self._redis is not None:
            self._redis.replay_soon("invalidations are pending")

    def _replay(self, redis: RedisClient) -> None:
        with self._lock:
            pending = list(self.tokens.items())
        for i in range(0, len(pending), _AT_ONCE):
            some = pending[i : i + _AT_ONCE]
            commands = [entry_keys.invalidation(self._key_of(identity), None) for identity, _ in some]
            redis.pipeline(commands, (entry_keys.INVALIDATE,))
            for identity, token in some:
                self.done(identity, token)
