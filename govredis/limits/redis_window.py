"""The window in Redis: one script, one round trip."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence

from .._fork import renew_in_child
from ..client import RedisClient, Script
from ..keys import sibling
from .rates import Limit
from .windows import Mode, Outcome


class RedisWindow:
    """See windows.Window. Exact among all clients of one living Redis; entries of other clients are counted."""

    backend = "redis"

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._script = Script(__package__, "log.lua", "window.lua")
        self._counter_script = Script(__package__, "counter.lua", "counter_window.lua")
        self._count = Script(__package__, "counter.lua", "count.lua")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Parent and child must not make the same members: the second's hit would count as the first's, repeated.
        self._nonce = os.urandom(6).hex()
        self._calls = itertools.count()

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        member = f"{time.time_ns() // 1000}-{self._nonce}{next(self._calls)}"
        pairs: list[str] = []
        for limit in limits:
            pairs += (str(limit.count), str(limit.window_us))
        keys: tuple[str, ...]
        if limits[0].counted:
            script, keys = self._counter_script, (sibling(key, "counter"),)
        else:
            script, keys = self._script, (key, sibling(key, "window"))
        admitted, deciding, remaining, retry_after, reset_after = self._client.run(
            script, keys, mode, str(cost), member, "", *pairs
        )
        return Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after)

    def count(self, key: str, window_us: int) -> int:
        return int(self._client.run(self._count, (key, sibling(key, "counter")), str(window_us), ""))

    def reset(self, key: str) -> None:
        self._client.call("DEL", key, sibling(key, "window"), sibling(key, "counter"))
