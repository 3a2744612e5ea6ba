"""The check "counters": what this process has counted, and what all processes have lately."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import NoRight
from .outage_log import fallback_of
from .report import Check, Status

if TYPE_CHECKING:
    from .account import Account
    from .figures import Latency

Counts = dict[str, int]


def check_counters(counts: Counts, account: Account | None) -> Check:
    """Passes, unless Redis refuses the account.

    Args:
        counts: of this process.
        account: of all processes.
    """
    data: dict[str, Any] = {"counts": counts}
    if account is None:
        return Check("counters", "pass", "", data)
    recent = account.recent()
    for name, of in _FIGURES.items():
        data[name] = {span: of(totals.counts) for span, totals in recent._asdict().items()}
    data["source"] = recent.hour.backend
    data["latencies"] = {span: _quantiles(totals.latencies) for span, totals in recent._asdict().items()}
    if account.problem is None:
        return Check("counters", "pass", "", data)
    # An ACL of an earlier version lacks the rights. All else works.
    status: Status = "pass" if isinstance(account.problem, NoRight) else "warn"
    return Check("counters", status, f"Redis does not take the account of all processes: {account.problem}", data)


def _hit_ratios(counts: Counts) -> dict[str, float]:
    """By feature, where anything was looked for."""
    ratios = {}
    for name in counts:
        feature, _, event = name.rpartition(".")
        hits, misses = counts.get(f"{feature}.hits", 0), counts.get(f"{feature}.misses", 0)
        if event in {"hits", "misses"} and hits + misses:
            ratios[feature] = round(hits / (hits + misses), 4)
    return ratios


def _fallbacks(counts: Counts) -> Counts:
    """By feature, the calls that a fallback served."""
    served: Counts = {}
    for name, n in counts.items():
        feature = fallback_of(name)
        if feature is not None:
            served[feature] = served.get(feature, 0) + n
    return served


def _quantiles(latencies: dict[str, Latency]) -> dict[str, dict[str, float]]:
    """By server, where it was called: how many calls, and the seconds within which a half and 99 % of them ended."""
    found: dict[str, dict[str, float]] = {}
    for server, latency in latencies.items():
        half, most = latency.quantile(0.5), latency.quantile(0.99)
        if half is not None and most is not None:
            found[server] = {"calls": latency.count, "p50": round(half, 6), "p99": round(most, 6)}
    return found


_FIGURES: dict[str, Callable[[Counts], Any]] = {
    "hit_ratios": _hit_ratios,
    "denials": lambda counts: counts.get("limits.denied", 0),
    "fallbacks": _fallbacks,
    "lock_waits": lambda counts: counts.get("locks.waits", 0),
    "lock_waited_seconds": lambda counts: counts.get("locks.waited_ms", 0) / 1000,
    "locks_lost": lambda counts: counts.get("locks.lost", 0),
}
