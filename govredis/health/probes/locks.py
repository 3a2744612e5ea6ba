"""Locks: how many are held, and the lock that is held longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...client import Command
from ...errors import printable
from ..report import Check

if TYPE_CHECKING:
    from ...locks.holders import HeldCounts


class LocksProbe:
    """Its check "locks" is there where locks are held.

    Args:
        held: says how many locks are held, and which the longest; raises BackendError.
    """

    name = "locks"
    commands: tuple[Command, ...] = ()

    def __init__(self, held: Callable[[], HeldCounts]) -> None:
        self._held = held

    def check(self, replies: Sequence[Any]) -> list[Check]:
        counts = self._held()
        if not counts.held and not counts.outside:
            return []
        data: dict[str, Any] = {"held": counts.held, "outside": counts.outside}
        if counts.longest is not None:
            data["longest_seconds"] = round(counts.seconds, 3)
            data["longest"] = printable(f"{counts.longest.kind} {counts.longest.name!r} of {counts.longest.owner}")
        return [Check("locks", "pass", "", data)]
