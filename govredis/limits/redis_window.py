"""The window in Redis: one script, one round trip."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence

from .._fork import renew_in_child
from ..client import RedisClient, Script
from ..keys import sibling
from .mirror import Admission
from .rates import Limit
from .windows import Mode, Outcome

#: Admissions that one exchange tells of: some ten milliseconds of Redis's time.
_COPIED_AT_ONCE = 1000


class RedisWindow:
    """See windows.Window. Exact among all clients of one living Redis; entries of other clients are counted."""

    backend = "redis"

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._script = Script(__package__, "log.lua", "window.lua")
        self._count = Script(__package__, "count.lua")
        self._copy = Script(__package__, "log.lua", "copy.lua")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Parent and child must not make the same members: the second's hit would count as the first's, repeated.
        self._nonce = os.urandom(6).hex()
        self._calls = itertools.count()

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        member = self._member()
        reply = self._client.run(self._script, (key, sibling(key, "window")), *_arguments(limits, cost, mode, member))
        return _outcome(reply, member)

    def hit_many(self, hits: Sequence[tuple[str, Sequence[Limit], int]]) -> list[Outcome]:
        """`decide` in mode "hit" for each key, limits and cost, in order, in one round trip."""
        members = [self._member() for _ in hits]
        commands = [
            self._script.call((key, sibling(key, "window")), _arguments(limits, cost, "hit", member))
            for (key, limits, cost), member in zip(hits, members, strict=True)
        ]
        replies = self._client.pipeline(commands, [self._script])
        return [_outcome(reply, member) for reply, member in zip(replies, members, strict=True)]

    def refund(self, key: str, entries: str, cost: int) -> bool:
        members = [f"{entries}-{i}" for i in range(1, cost + 1)]
        return int(self._client.call("ZREM", key, *members)) > 0

    def count(self, key: str, window_us: int) -> int:
        return int(self._client.run(self._count, (key,), str(window_us), ""))

    def reset(self, key: str) -> None:
        self._client.call("DEL", key, sibling(key, "window"))

    def copy(self, admissions: Sequence[Admission], now: float) -> None:
        """See mirror.CopiedWindow. One that is told twice is written once."""
        for first in range(0, len(admissions), _COPIED_AT_ONCE):
            calls: dict[str, list[Admission]] = {}
            for one in admissions[first : first + _COPIED_AT_ONCE]:
                calls.setdefault(one.key, []).append(one)
            commands = []
            for key, told in calls.items():
                args = ["", str(max(one.longest_us for one in told))]
                for one in told:
                    args += (str(one.age_us(now)), str(one.cost), one.name)
                commands.append(self._copy.call((key, sibling(key, "window")), args))
            self._client.pipeline(commands, (self._copy,))

    def _member(self) -> str:
        return f"{time.time_ns() // 1000}-{self._nonce}{next(self._calls)}"


def _arguments(limits: Sequence[Limit], cost: int, mode: Mode, member: str) -> list[str]:
    arguments = [mode, str(cost), member, ""]
    for limit in limits:
        arguments += (str(limit.count), str(limit.window_us))
    return arguments


def _outcome(reply: list[int], member: str) -> Outcome:
    admitted, deciding, remaining, retry_after, reset_after = reply
    return Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after, member)
