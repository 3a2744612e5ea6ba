"""RedisLeases: batches of admissions that Redis grants to a process for a moment; see leases.Leases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...client import RedisClient, Script
from ...keys import sibling
from ..rates import Limit, pairs_of
from .backend import CounterEntries, Outcome


class LeasedEntries:
    """The entries of one lease, in a log or in counters. They are given back by their numbers, so each once."""

    __slots__ = ("_back", "counted", "granted", "member", "origin")

    def __init__(self, member: str, granted: int, counted: CounterEntries | None = None, origin: str = "") -> None:
        self.member = member
        self.granted = granted
        #: Where they are in counters; None: they are in a log.
        self.counted = counted
        self.origin = origin
        self._back = iter(range(granted, 0, -1))  # one step of C code, so that threads and signals share it

    def numbers(self, units: int) -> list[int]:
        """The numbers of so many entries that nobody else gives back; fewer where there are no more."""
        return list(itertools.islice(self._back, units))

    def part(self) -> LeasedPart:
        return LeasedPart(self)


class LeasedPart:
    """Entries of a lease that are given back together: the same ones where that is tried again."""

    __slots__ = ("_numbers", "lease")

    def __init__(self, lease: LeasedEntries) -> None:
        self.lease = lease
        self._numbers: list[int] | None = None

    def numbers(self, units: int) -> list[int]:
        """The numbers of these entries."""
        if self._numbers is None:
            self._numbers = self.lease.numbers(units)
        return self._numbers


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
        unspent: tuple[LeasedPart, int] | None,
        member: str,
    ) -> tuple[Outcome, LeasedEntries | None]:
        """As `LimitBackend.lease`."""
        counted = limits[0].counted
        script = self._counters if counted else self._log
        keys = (sibling(key, "counter"),) if counted else (key, sibling(key, "window"))
        args = [str(cost), str(wanted), str(lease_us), member, ""]
        args += _back_to_counters(unspent) if counted else _back_to_log(unspent)
        reply = self._client.run(script, keys, *args, *pairs_of(limits))
        admitted, deciding, remaining, retry_after, reset_after, granted = reply[:6]
        counters = (CounterEntries.of(limits, reply[6], member), reply[7].decode()) if counted else ()
        entries = LeasedEntries(member, granted, *counters)
        outcome = Outcome(admitted == 1, deciding - 1, remaining, retry_after, reset_after, entries.part())
        return outcome, entries if granted > cost else None

    def give_back(self, key: str, part: LeasedPart, units: int) -> bool:
        """As `LimitBackend.refund`."""
        numbers = part.numbers(units)
        lease = part.lease
        if not numbers:
            return False
        if lease.counted is None:
            return int(self._client.call("ZREM", key, *(f"{lease.member}-{number}" for number in numbers))) > 0
        count, name, at, origin = _back_to_counters((part, units))
        windows = map(str, lease.counted.windows_us)
        return bool(self._client.run(self._refund, (sibling(key, "counter"),), count, name, at, "", origin, *windows))


def _back_to_log(unspent: tuple[LeasedPart, int] | None) -> tuple[str, str, str]:
    """The entries that a script of a lease gives back, as log_lease.lua takes them."""
    if unspent is None or not (numbers := unspent[0].numbers(unspent[1])):
        return "0", "-", "0"
    return str(len(numbers)), unspent[0].lease.member, str(numbers[0])  # they are in a row, from there on downward


def _back_to_counters(unspent: tuple[LeasedPart, int] | None) -> tuple[str, str, str, str]:
    """The same, as counter_lease.lua takes them."""
    if unspent is None or not (numbers := unspent[0].numbers(unspent[1])):
        return "0", "-", "0", "-"
    lease = unspent[0].lease
    assert lease.counted is not None
    return str(len(numbers)), f"{lease.member}-{numbers[0]}", str(lease.counted.at), lease.origin
