"""RedisLimitBackend: each decision is one script, in one round trip."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence

from ..._fork import renew_in_child
from ...breaker import Rejected
from ...client import NotServedHere, RedisClient, RedisNode, Script
from ...errors import BackendError, BackendUnavailable
from ...keys import sibling
from ..rates import MAX_COST, Limit, pairs_of
from .backend import Admission, CounterEntries, Mode, Outcome, ServerLimitBackend, WindowStats
from .redis_leases import LeasedEntries, LeasedPart, RedisLeases

#: Admissions, and their entries, that one exchange replicates: some ten milliseconds of Redis's time.
_REPLICATED_AT_ONCE = 1000
_ENTRIES_AT_ONCE = MAX_COST


class RedisLimitBackend(ServerLimitBackend):
    """Exact among all clients of one living Redis; entries of other clients are counted."""

    name = "redis"
    leases = True

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._script = Script(__package__, "clock.lua", "log.lua", "window.lua")
        self._reserve = Script(__package__, "clock.lua", "log.lua", "reserve.lua")
        self._counter_script = Script(
            __package__, "clock.lua", "counter.lua", "counter_limits.lua", "counter_window.lua"
        )
        self._counter_refund = Script(
            __package__, "clock.lua", "counter.lua", "counter_limits.lua", "counter_refund.lua"
        )
        self._count = Script(__package__, "clock.lua", "log.lua", "counter.lua", "count.lua")
        self._stats = Script(__package__, "clock.lua", "log.lua", "counter.lua", "stats.lua")
        self._replicate = Script(__package__, "clock.lua", "log.lua", "replicate.lua")
        self._leases = RedisLeases(client)
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        # Parent and child must not make the same members: the second's hit would count as the first's, repeated.
        self._nonce = os.urandom(6).hex()
        self._calls = itertools.count()

    def decide(self, key: str, limits: Sequence[Limit], cost: int, mode: Mode) -> Outcome:
        member = self._member()
        script, keys = self._script_of(key, limits)
        try:
            reply = self._client.run(script, keys, *_arguments(limits, cost, mode, member))
        except BackendUnavailable:
            raise
        except BackendError as error:
            raise _at(key, error) from error.__cause__
        return _outcome(reply, limits, member)

    def hit_many(self, hits: Sequence[tuple[str, Sequence[Limit], int]]) -> list[Outcome | BackendError]:
        """As `LimitBackend.hit_many`, in one round trip."""
        members = [self._member() for _ in hits]
        calls = [(*self._script_of(key, limits), limits, cost) for key, limits, cost in hits]
        commands = [
            script.call(keys, _arguments(limits, cost, "hit", member))
            for (script, keys, limits, cost), member in zip(calls, members, strict=True)
        ]
        replies = self._client.pipeline(commands, list({script for script, *_ in calls}), each=True)
        return [
            _at(key, reply) if isinstance(reply, BackendError) else _outcome(reply, limits, member)
            for reply, (key, limits, _), member in zip(replies, hits, members, strict=True)
        ]

    def lease(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        wanted: int,
        lease_us: int,
        back: tuple[LeasedPart, int] | None,
    ) -> tuple[Outcome, LeasedEntries | None]:
        with _named(key):
            return self._leases.take(key, limits, cost, wanted, lease_us, back, self._member())

    def give_back(self, parts: Sequence[tuple[str, LeasedPart, int]]) -> list[bool]:
        """In one round trip for each 500. A part whose key holds something else is not given back."""
        return self._leases.give_back(parts)

    def refund(self, key: str, entries: str | CounterEntries | LeasedPart, cost: int) -> bool:
        if isinstance(entries, LeasedPart):
            return self._leases.give_back([(key, entries, cost)])[0]
        if isinstance(entries, CounterEntries):
            windows = map(str, entries.windows_us)
            arguments = (str(cost), entries.member, str(entries.at), "", "-", *windows)
            with _named(key):
                return bool(self._client.run(self._counter_refund, (sibling(key, "counter"),), *arguments))
        members = [f"{entries}-{i}" for i in range(1, cost + 1)]
        with _named(key):
            return int(self._client.call("ZREM", key, *members)) > 0

    def reserve(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        reservation: str,
        *,
        patience_us: int = 0,
        admit: bool = True,
    ) -> tuple[Outcome, int]:
        """As `LimitBackend.reserve`. Logs take reservations, counters do not."""
        if limits[0].counted:
            return super().reserve(key, limits, cost, reservation, patience_us=patience_us, admit=admit)
        member = self._member()
        mode = "hit" if admit else "reserve"
        args = (mode, str(cost), member, "", reservation, str(patience_us), *pairs_of(limits))
        with _named(key):
            *reply, at = self._client.run(self._reserve, (key, *_siblings(key)), *args)
        return _outcome(reply, limits, member), at

    def count(self, key: str, window_us: int) -> int:
        with _named(key):
            return int(self._client.run(self._count, (key, sibling(key, "counter")), str(window_us), ""))

    def stats(self, key: str) -> WindowStats:
        keys = (key, sibling(key, "window"), sibling(key, "counter"))
        with _named(key):
            now, longest, entries, oldest, newest, counters = self._client.run(self._stats, keys, "")
        return WindowStats(
            self.name,
            entries,
            longest / 1_000_000 or None,
            now / 1_000_000 - float(oldest) if entries else None,
            now / 1_000_000 - float(newest) if entries else None,
            {int(window) / 1_000_000: int(used) for window, used in zip(counters[::2], counters[1::2], strict=True)},
        )

    def reset(self, key: str) -> None:
        self._client.call("DEL", key, *_siblings(key), sibling(key, "counter"))

    def _script_of(self, key: str, limits: Sequence[Limit]) -> tuple[Script, tuple[str, ...]]:
        """The script that decides over these limits, and its keys."""
        if limits[0].counted:
            return self._counter_script, (sibling(key, "counter"),)
        return self._script, (key, sibling(key, "window"))

    def replicate(
        self, admissions: Sequence[Admission], now: float, node: RedisNode | None = None
    ) -> tuple[int, BackendError | None]:
        """As `ServerLimitBackend.replicate`. An admission that arrives twice is recorded once."""
        client = node or self._client
        refused, first_error = 0, None
        elsewhere: NotServedHere | None = None
        for batch in _batches(admissions):
            by_key: dict[str, list[Admission]] = {}
            for admission in batch:
                by_key.setdefault(admission.key, []).append(admission)
            commands = []
            for key, of_key in by_key.items():
                args = ["", str(max(admission.longest_us for admission in of_key))]
                for admission in of_key:
                    args += (str(admission.age_us(now)), str(admission.cost), admission.name)
                commands.append(self._replicate.call((key, sibling(key, "window")), args))
            replies = client.pipeline(commands, (self._replicate,), each=True)
            for reply, (key, of_key) in zip(replies, by_key.items(), strict=True):
                if isinstance(reply, NotServedHere):
                    elsewhere = reply  # a slot that has moved, say
                    continue
                if isinstance(reply, BackendUnavailable):
                    raise reply
                if isinstance(reply, BackendError):
                    refused += len(of_key)
                    first_error = first_error or _at(key, reply)
        if elsewhere is not None:
            raise elsewhere  # all of them are told once more
        return refused, first_error

    def _member(self) -> str:
        return f"{time.time_ns() // 1000}-{self._nonce}{next(self._calls)}"


def _batches(admissions: Sequence[Admission]) -> Iterator[list[Admission]]:
    batch: list[Admission] = []
    entries = 0
    for admission in admissions:
        if len(batch) == _REPLICATED_AT_ONCE or (batch and entries + admission.cost > _ENTRIES_AT_ONCE):
            yield batch
            batch, entries = [], 0
        batch.append(admission)
        entries += admission.cost
    if batch:
        yield batch


def _at(key: str, error: BackendError) -> BackendError:
    """The error with which Redis answers for a limit's key, or for a sibling, with the key's name."""
    if isinstance(error, Rejected | BackendUnavailable):
        return error
    return BackendError(f"the limit at {key}: {error}")


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except BackendUnavailable:
        raise
    except BackendError as error:
        raise _at(key, error) from error.__cause__


def _siblings(key: str) -> tuple[str, ...]:
    return sibling(key, "window"), sibling(key, "booked"), sibling(key, "moved")


def _arguments(limits: Sequence[Limit], cost: int, mode: Mode, member: str) -> list[str]:
    return [mode, str(cost), member, "", *pairs_of(limits)]


def _outcome(reply: list[int], limits: Sequence[Limit], member: str) -> Outcome:
    admitted, deciding, remaining, retry_after, reset_after = reply[:5]
    entries = CounterEntries.of(limits, reply[5], member) if limits[0].counted else member
    return Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after, entries)
