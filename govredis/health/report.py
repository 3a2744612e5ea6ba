"""Check and HealthReport: the findings, and their time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

__all__ = ["Check", "HealthReport", "Status"]

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result for a single server or feature.

    Attributes:
        name: the server's or the feature's. "redis", "postgres" and "counters" are always there. Others come with the
            features in use, or with a fault: docs/health.md lists them.
        status: "pass", "warn" (a fallback covers it) or "fail".
        output: why, in words; "" if it passes.
        data: what was observed. Durations are seconds.
    """

    name: str
    status: Status
    output: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The worst status of all checks, the checks, and the time (aware UTC).

    `stored` names the place where `snapshot` kept the report: "redis", "postgres", or None for nowhere.
    """

    status: Status
    checks: tuple[Check, ...]
    at: datetime
    stored: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report in the form of draft-inadarei-api-health-check-06 (application/health+json)."""
        return {
            "status": self.status,
            "time": self.at.isoformat(),
            "checks": {c.name: [{"status": c.status, "output": c.output, **c.data}] for c in self.checks},
        }
