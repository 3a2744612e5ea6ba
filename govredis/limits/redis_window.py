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
from .windows import CounterEntries, Mode, Outcome, Standing

#: Admissions that one exchange tells of: some ten milliseconds of Redis's time.
_COPIED_AT_ONCE = 1000


class RedisWindow:
    """See windows.Window. Exact among all clients of one living Redis; entries of other clients are counted."""

    backend = "redis"

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._script = Script(__package__, "clock.lua", "log.lua", "window.lua")
        self._book = Script(__package__, "clock.lua", "log.lua", "book.lua")
        self._counter_script = Script(__package__, "clock.lua", "counter.lua", "counter_window.lua")
        self._counter_refund = Script(__package__, "clock.lua", "counter.lua", "counter_refund.lua")
        self._count = Script(__package__, "clock.lua", "counter.lua", "count.lua")
        self._standing = Script(__package__, "clock.lua", "counter.lua", "standing.lua")
        self._copy = Script(__package__, "clock.lua", "log.lua", "copy.lua")
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Parent and child must not make the same members: the second's hit would count as the first's, repeated.
        self._nonce = os.urandom(6).hex()
        self._calls = itertools.count()

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        member = self._member()
        script, keys = self._script_of(key, limits)
        return _outcome(self._client.run(script, keys, *_arguments(limits, cost, mode, member)), limits, member)

    def hit_many(self, hits: Sequence[tuple[str, Sequence[Limit], int]]) -> list[Outcome]:
        """`decide` in mode "hit" for each key, limits and cost, in order, in one round trip."""
        members = [self._member() for _ in hits]
        calls = [(*self._script_of(key, limits), limits, cost) for key, limits, cost in hits]
        commands = [
            script.call(keys, _arguments(limits, cost, "hit", member))
            for (script, keys, limits, cost), member in zip(calls, members, strict=True)
        ]
        replies = self._client.pipeline(commands, list({script for script, *_ in calls}))
        return [
            _outcome(reply, limits, member)
            for reply, (_, limits, _), member in zip(replies, hits, members, strict=True)
        ]

    def refund(self, key: str, entries: str | CounterEntries, cost: int) -> bool:
        if isinstance(entries, CounterEntries):
            windows = map(str, entries.windows_us)
            arguments = (str(cost), entries.member, str(entries.at), "", *windows)
            return bool(self._client.run(self._counter_refund, (sibling(key, "counter"),), *arguments))
        members = [f"{entries}-{i}" for i in range(1, cost + 1)]
        return int(self._client.call("ZREM", key, *members)) > 0

    def book(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        booking: str,
        *,
        patience_us: int = 0,
        admit: bool = True,
    ) -> tuple[Outcome, int]:
        """As `decide`; what finds no room is booked for the first time at which there will be, in the order of calls.

        Args:
            booking: the same at every call for the same thing.
            patience_us: one whose time has come, and for which there will be room in so many microseconds, keeps its
                place before all that is booked for later: its caller waits, and calls again. Longer waits are booked.
            admit: False: what there is room for is booked for now.

        Returns the outcome and the time booked, in microseconds of Redis's clock; 0 where it was admitted.
        """
        member = self._member()
        args = ("hit" if admit else "book", str(cost), member, "", booking, str(patience_us), *_pairs(limits))
        *reply, at = self._client.run(self._book, (key, *_siblings(key)), *args)
        return _outcome(reply, limits, member), at

    def count(self, key: str, window_us: int) -> int:
        return int(self._client.run(self._count, (key, sibling(key, "counter")), str(window_us), ""))

    def standing(self, key: str) -> Standing:
        now, longest, entries, oldest, newest, counters = self._client.run(
            self._standing, (key, sibling(key, "window"), sibling(key, "counter")), ""
        )
        return Standing(
            self.backend,
            entries,
            longest / 1_000_000 or None,
            now / 1_000_000 - float(oldest) if entries else None,
            now / 1_000_000 - float(newest) if entries else None,
            {int(window) / 1_000_000: int(used) for window, used in zip(counters[::2], counters[1::2], strict=True)},
        )

    def reset(self, key: str) -> None:
        self._client.call("DEL", key, *_siblings(key), sibling(key, "counter"))

    def _script_of(self, key: str, limits: Sequence[Limit]) -> tuple[Script, tuple[str, ...]]:
        """What decides over these limits, and its keys."""
        if limits[0].counted:
            return self._counter_script, (sibling(key, "counter"),)
        return self._script, (key, sibling(key, "window"))

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


def _siblings(key: str) -> tuple[str, ...]:
    return sibling(key, "window"), sibling(key, "booked"), sibling(key, "moved")


def _arguments(limits: Sequence[Limit], cost: int, mode: Mode, member: str) -> list[str]:
    return [mode, str(cost), member, "", *_pairs(limits)]


def _pairs(limits: Sequence[Limit]) -> list[str]:
    pairs: list[str] = []
    for limit in limits:
        pairs += (str(limit.count), str(limit.window_us))
    return pairs


def _outcome(reply: list[int], limits: Sequence[Limit], member: str) -> Outcome:
    admitted, deciding, remaining, retry_after, reset_after = reply[:5]
    entries = CounterEntries.of(limits, reply[5], member) if limits[0].counted else member
    return Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after, entries)
