"""Told: the answers of the servers to one look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...limits.denied_counts import Denied
    from ...locks import LockHolder
    from ..figures import Minute, Outage
    from ..history import HistoryPoint
    from ..report import HealthReport


@dataclass(slots=True)
class Told:
    """The answers so far: None for all that has not been told, or could not be asked.

    Attributes:
        unknown: why, by a name for people.
    """

    report: HealthReport | None = None
    outages: list[Outage] | None = None
    locks: list[LockHolder] | None = None
    denied: list[Denied] | None = None
    minutes: list[Minute] | None = None
    points: list[HistoryPoint] | None = None
    unknown: dict[str, str] = field(default_factory=dict)
