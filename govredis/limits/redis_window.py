"""The window in Redis: one script, one round trip."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from typing import Literal

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
        self._book = Script(__package__, "log.lua", "book.lua")
        self._count = Script(__package__, "count.lua")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Parent and child must not make the same members: the second's hit would count as the first's, repeated.
        self._nonce = os.urandom(6).hex()
        self._calls = itertools.count()

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        admitted, deciding, remaining, retry_after, reset_after = self._client.run(
            self._script, (key, sibling(key, "window")), mode, str(cost), self._member(), "", *_pairs(limits)
        )
        return Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after)

    def book(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        booking: str,
        *,
        patience_us: int = 0,
        mode: Literal["hit", "book"] = "hit",
    ) -> tuple[Outcome, int]:
        """As `decide`; what finds no room is booked for the first time at which there will be, in the order of calls.

        Args:
            booking: the same at every call for the same thing.
            patience_us: one whose time has come, and for which there will be room in so many microseconds, keeps its
                place before all that is booked for later: its caller waits, and calls again. Longer waits are booked.
            mode: "hit" admits what there is room for. "book" books it for now, to be admitted by a "hit".

        Returns the outcome and the time booked, in microseconds of Redis's clock; 0 where it was admitted.
        """
        keys = (key, *_siblings(key))
        admitted, deciding, remaining, retry_after, reset_after, at = self._client.run(
            self._book, keys, mode, str(cost), self._member(), "", booking, str(patience_us), *_pairs(limits)
        )
        return Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after), at

    def count(self, key: str, window_us: int) -> int:
        return int(self._client.run(self._count, (key,), str(window_us), ""))

    def reset(self, key: str) -> None:
        self._client.call("DEL", key, *_siblings(key))

    def _member(self) -> str:
        return f"{time.time_ns() // 1000}-{self._nonce}{next(self._calls)}"


def _siblings(key: str) -> tuple[str, ...]:
    return sibling(key, "window"), sibling(key, "booked"), sibling(key, "moved")


def _pairs(limits: Sequence[Limit]) -> list[str]:
    pairs: list[str] = []
    for limit in limits:
        pairs += (str(limit.count), str(limit.window_us))
    return pairs
