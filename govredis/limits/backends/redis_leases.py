"""RedisLeases: batches of admissions that Redis grants to a process for a moment; see leases.Leases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...client import Command, RedisClient, Script
from ...errors import BackendError
from ...keys import sibling
from ..rates import Limit, pairs_of
from .backend import CounterEntries, Outcome


class LeasedEntries:
    """The entries of one lease, in a log or in counters. They are given back by number, so each once.

    Attributes:
        counted: where they are in counters; None: they are in a log.
        origin: see counter_lease.lua.
    """

    __slots__ = ("_numbers", "counted", "granted", "member", "origin")

    def __init__(self, member: str, granted: int, counted: CounterEntries | None = None, origin: str = "") -> None:
        self.member: str = member
        self.granted: int = granted
        self.counted: CounterEntries | None = counted
        self.origin: str = origin
        self._numbers = iter(range(granted, 0, -1))  # one step of C code, so that threads and signals share it

    def first_of(self, units: int) -> tuple[int, int]:
        """The first of so many entries that nobody else gives back, from there on downward; and how many they are."""
        if self.counted is not None:  # a counter knows no entries: the number names what is given back
            return next(self._numbers, 0), units
        numbers = list(itertools.islice(self._numbers, units))
        return (numbers[0], len(numbers)) if numbers else (0, 0)

    def part(self) -> LeasedPart:
        return LeasedPart(self)


class LeasedPart:
    """Entries of a lease that are given back together: the same ones where that is tried again."""

    __slots__ = ("_first", "lease")

    def __init__(self, lease: LeasedEntries) -> None:
        self.lease: LeasedEntries = lease
        self._first: tuple[int, int] | None = None

    def arguments(self, units: int) -> tuple[str, ...]:
        """As the lease scripts take them: how many, and which."""
        if self._first is None:
            self._first = self.lease.first_of(units)
        (first, count), lease = self._first, self.lease
        if lease.counted is None:
            return str(count), lease.member, str(first)
        return str(count), f"{lease.member}-{first}", str(lease.counted.at), lease.origin

    def command(self, key: str, units: int, counter_refund: Script) -> Command:
        """The command that gives them back."""
        if self.lease.counted is None:
            count, member, first = self.arguments(units)
            return ("ZREM", key, *(f"{member}-{int(first) - i}" for i in range(int(count))))
        count, name, at, origin = self.arguments(units)
        windows = map(str, self.lease.counted.windows_us)
        return counter_refund.call((sibling(key, "counter"),), (count, name, at, "", origin, *windows))


class RedisLeases:
    """Takes leases, and gives entries of theirs back. Each is one script, in one round trip."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._log = Script(__package__, "clock.lua", "log.lua", "log_lease.lua")
        self._counters = Script(__package__, "clock.lua", "counter.lua", "counter_limits.lua", "counter_lease.lua")
        self._refund = Script(__package__, "clock.lua", "counter.lua", "counter_limits.lua", "counter_refund.lua")

    def take(
        self,
        key: str,
        limits: Sequence[Limit],
        cost: int,
        wanted: int,
        lease_us: int,
        back: tuple[LeasedPart, int] | None,
        member: str,
    ) -> tuple[Outcome, LeasedEntries | None]:
        """As `LimitBackend.lease`."""
        counted = limits[0].counted
        script = self._counters if counted else self._log
        keys = (sibling(key, "counter"),) if counted else (key, sibling(key, "window"))
        args = [str(cost), str(wanted), str(lease_us), member, ""]
        args += ("0", "-", "0", "-")[: 4 if counted else 3] if back is None else back[0].arguments(back[1])
        reply = self._client.run(script, keys, *args, *pairs_of(limits))
        admitted, deciding, remaining, retry_after, reset_after, granted = reply[:6]
        counters = (CounterEntries.of(limits, reply[6], member), reply[7].decode()) if counted else ()
        entries = LeasedEntries(member, granted, *counters)
        outcome = Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after, entries.part())
        return outcome, entries if granted > cost else None

    def give_back(self, parts: Sequence[tuple[str, LeasedPart, int]]) -> list[bool]:
        """As `LimitBackend.give_back`."""
        commands = [part.command(key, units, self._refund) for key, part, units in parts]
        replies = self._client.pipeline(commands, (self._refund,), each=True)
        return [not isinstance(reply, BackendError) and int(reply) > 0 for reply in replies]
