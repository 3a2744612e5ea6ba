"""The findings at the nodes of a Cluster, as those of one Redis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import verdict
from ..report import Check
from .redis_node import NodeFindings

#: The figure of the Cluster is the greatest of its nodes', or the least. All other numbers are added up.
_GREATEST = {
    *("seconds", "away_for", "slowest_seconds", "last_save_age", "replica_lag"),
    *("mem_fragmentation_ratio", "aof_enabled"),
}
_LEAST = {"uptime_in_seconds"}
#: Each must have a bound, or the Cluster has none.
_BOUNDS = {"maxmemory"}
#: Figures that are shown of each node.
_OF_NODE = (
    *("seconds", "away_for", "keys", "used_memory"),
    *("connected_clients", "instantaneous_ops_per_sec", "connected_slaves"),
)
#: Nodes in one sentence.
_NAMED = 5


def checks_of_cluster(found: Mapping[str, NodeFindings]) -> list[Check]:
    """The checks: "redis" first; others name their node, and may come several times.

    Args:
        found: by the addresses of the nodes.
    """
    servers = {address: each.of_server for address, each in sorted(found.items())}
    data = _figures([check.data for check in servers.values()])
    data["nodes"] = [_of_node(address, check) for address, check in servers.items()]
    checks = [Check("redis", verdict.of_nodes([*servers.values()]), _words(servers), data)]
    for address, each in sorted(found.items()):
        checks += [replace(c, output=f"{address}: {c.output}" if c.output else "") for c in each.checks[1:]]
    return checks


def _words(servers: Mapping[str, Check]) -> str:
    wrong = [
        check.output if address in check.output else f"{address}: {check.output}"
        for address, check in servers.items()
        if check.output
    ]
    if not wrong:
        return ""
    away = sum(verdict.is_away(check) for check in servers.values())
    said = "; ".join(wrong[:_NAMED]) + (f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
    return f"{away} of {len(servers)} nodes are away: {said}" if away else said


def _of_node(address: str, check: Check) -> dict[str, Any]:
    shown = {name: check.data[name] for name in _OF_NODE if name in check.data}
    return {"address": address, "status": check.status, **shown}


def _figures(several: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for data in several for name in data)
    found = {name: _figure(name, [data[name] for data in several if name in data]) for name in names}
    slowest = max(several, key=lambda data: float(data.get("slowest_seconds", 0.0)))
    if "slowest_command" in slowest:
        found["slowest_command"] = slowest["slowest_command"]
    return found


def _figure(name: str, values: list[Any]) -> Any:
    if not all(isinstance(value, int | float) for value in values):
        return ", ".join(dict.fromkeys(map(str, values)))
    if all(isinstance(value, bool) for value in values):
        return all(values)
    if name in _GREATEST:
        return max(values)
    if name in _LEAST or (name in _BOUNDS and not all(values)):
        return min(values)
    return round(sum(values), 3)
