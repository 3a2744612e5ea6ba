"""Parked tasks: how many wait for their limits, and whether they are published when they are due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...client import Command
from ...errors import BackendUnavailable
from ..report import Check

if TYPE_CHECKING:
    from ...limits.parked import Parked

#: Seconds after which a parked task that nobody has published is worth a warning.
_OVERDUE = 30.0


class ParkedProbe:
    """Its check "parked" is there while tasks wait."""

    name = "parked"
    commands: tuple[Command, ...] = ()

    def __init__(self, parked: Parked) -> None:
        self._parked = parked

    def check(self, replies: Sequence[Any]) -> list[Check]:
        try:
            waiting = self._parked.waiting()
        except BackendUnavailable as error:  # it may be a Redis of its own, which no other check looks at
            return [Check("parked", "warn", str(error), {})]
        if not waiting:
            return []
        longest = min(waiting, key=lambda each: each.due)
        overdue = max(0.0, -longest.due)
        set_aside = sum(each.set_aside for each in waiting)
        data = {"count": sum(each.count for each in waiting), "overdue": round(overdue, 3), "set_aside": set_aside}
        if set_aside:
            output = f"{set_aside} parked tasks cannot be published: `govredis limits parked` says why"
            return [Check("parked", "warn", output, data)]
        if overdue <= _OVERDUE:
            return [Check("parked", "pass", "", data)]
        output = f"parked tasks for {longest.broker} are overdue by {overdue:.0f} s: does a worker run that reaches it?"
        return [Check("parked", "warn", output, data)]
