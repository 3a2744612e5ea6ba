"""The words beside a fault: what covers it meanwhile, what to do, and the page that says more."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import Config
from .. import verdict
from ..report import Check, Status

_TROUBLE = "docs/troubleshooting.md"
#: By the name of the check: what to do where the check's own words do not say it, and the page.
_REMEDIES: dict[str, tuple[str, str]] = {
    "redis": (
        "Start Redis, or find out why this host cannot reach it. Every process uses it again within half a second of"
        " its return: nothing needs a restart.",
        _TROUBLE,
    ),
    "postgres": (
        "Start PostgreSQL, or find out why this host cannot reach it. Every process uses it again within half a second"
        " of its return.",
        _TROUBLE,
    ),
    "rights": ("`govredis doctor --acl` prints the rights that the features need.", "docs/deployment.md"),
    "eviction": ("", "docs/deployment.md"),
    "locks": ("", "docs/deployment.md"),
    "beat": ("", "docs/celery.md"),
    "outbox": ("", "docs/metadata.md"),
    **dict.fromkeys(("parked", "workers", "celery", "broker"), ("", "docs/celery.md")),
}
_ERROR = "`govredis doctor` names the fault and its remedy."


def headline(checks: Sequence[Check], status: Status) -> str:
    """The state of the whole in a few words."""
    away = [name for check, name in _servers(checks) if verdict.is_away(check)]
    if away:
        several = len(away) > 1 or not away[0].startswith(("Redis", "PostgreSQL", "1 of "))
        verb = "are" if several else "is"
        ending = "" if status == "fail" else ", and the fallbacks cover it"
        return f"{' and '.join(away)} {verb} away{ending}"
    wrong = [check.name for check in checks if check.status == status]
    if status == "pass":
        off = [name for check, name in _servers(checks) if check.data.get("enabled") is False]
        return f"Everything works, and {off[0]} is disabled" if off else "Everything works"
    verb = {"warn": "need", "fail": "fail"}[status] if len(wrong) > 1 else {"warn": "needs", "fail": "fails"}[status]
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return f"{shown} {verb} a look" if status == "warn" else f"{shown} {verb}"


def remedy(check: Check) -> tuple[str, str]:
    """Returns what to do, and the page that says more."""
    todo, page = _REMEDIES.get(check.name, ("", "docs/health.md"))
    if check.name in {"redis", "postgres"} and not verdict.is_away(check):
        todo = _ERROR
    return todo, page


def cover(check: Check, config: Config, *, postgres_away: bool) -> str:
    """Says what goes on while a server is away, by these settings; "" where none is."""
    if not verdict.is_away(check):
        return ""
    if check.name == "postgres":
        return (
            "Redis serves limits, locks and cached values. Calls that need PostgreSQL raise BackendUnavailable at once."
        )
    locks = (
        "Nobody gets a lock"
        if config.lock_fallback == "fail"
        else "A lock has one holder on each host, by its lock file, and not one over all hosts"
    )
    if config.database_url is None or postgres_away:
        limits = {
            "local": "Each process counts limits for itself",
            "deny": "Limits refuse everything",
            "allow": "Limits admit everything",
        }[config.limit_fallback]
        sessions = "Each process knows only the sessions that it has bound or seen itself. Cached values are not served"
    else:
        limits = "PostgreSQL counts limits, exactly"
        sessions = "Sessions are read from PostgreSQL, and so is metadata"
    others = " That is for the keys of these primaries alone: all others are served." if _part(check) else ""
    return f"{limits}. {locks}. {sessions}.{others}"


def _servers(checks: Sequence[Check]) -> list[tuple[Check, str]]:
    names = {"redis": "Redis", "postgres": "PostgreSQL"}
    return [(check, _part(check) + names[check.name]) for check in checks if check.name in names]


def _part(check: Check) -> str:
    """ "1 of 3 primaries of ", where so many of a Cluster's are away, and others are there; else ""."""
    nodes = check.data.get("nodes", ())
    away = sum("away_for" in node for node in nodes)
    return f"{away} of {len(nodes)} primaries of " if 0 < away < len(nodes) else ""
