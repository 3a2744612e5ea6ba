"""The verdict: what makes a health report fail is decided here and nowhere else.

| found | verdict |
| --- | --- |
| Redis is away, a fallback covers every feature | warn |
| Redis is away, and the settings leave a feature without a fallback | fail |
| some primaries of a Cluster are away | warn, always: a site that went out of service would cost all other keys, too |
| PostgreSQL is away, or only reads | warn |
| both are away, or Redis is and no PostgreSQL is configured | fail: limits are per process, metadata has no source |
| a server answers with an error, or rejects our credentials | fail |
| our tables are missing or not up to date | fail |
| all connections of this process are in use | warn |
| a policy may evict keys that are in use; memory is nearly full, and nothing may be evicted | warn |
| memory is fragmented or swapped out; connections are nearly used up | warn |
| Redis could not save, or is a replica, or a replica of it lags | warn |
| a command kept Redis for longer than our calls wait | warn |
| PostgreSQL's connections are nearly used up; a transaction has run for an hour | warn |
| anything else that does not pass | warn |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._pool import PoolExhausted
from ..config import Config
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .report import Check, Status

OLD_TABLES: Status = "fail"

#: All of our keys have a TTL, so each other policy may drop one that is in use: also the least recently used, as many a
#: held lock, limit and session is beside a cache that is filled.
_SAFE_POLICY = "noeviction"
#: The part of a bound that is nearly all of it.
_NEARLY = 0.9
#: Memory that is fragmented, or swapped out: the ratios of what the system gave to what is used, and the least bytes.
_FRAGMENTED, _SWAPPED, _LARGE = 1.5, 0.9, 100_000_000
#: Seconds that a replica may be behind.
_LAG = 10
#: Seconds after which a transaction is long: the outbox keeps its entries while it runs.
_LONG = 3600.0
SEVERITY: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}


def uncovered_features(config: Config) -> list[str]:
    """The features that the settings leave without a fallback while Redis is away."""
    features = ["locks"] if config.lock_fallback == "fail" else []
    if config.limit_fallback == "deny" and config.database_url is None:
        features.append("limits")
    return features


def of_error(error: BackendError | ConfigurationError, uncovered: Sequence[str] = ()) -> Status:
    """The status of a server that raised `error`; `uncovered` are the features that have no fallback for it."""
    if isinstance(error, PoolExhausted):
        return "warn"
    if isinstance(error, BackendUnavailable):
        return "fail" if uncovered else "warn"
    return "fail"


def of_nodes(servers: Sequence[Check]) -> Status:
    """The status of a Cluster, by the checks of its nodes."""
    part_is_there = not all(map(is_away, servers))
    return worst(*("warn" if part_is_there and is_away(each) else each.status for each in servers))


def of_info(info: Mapping[str, str], data: Mapping[str, Any]) -> list[Check]:
    """The faults that Redis's INFO tells of.

    Args:
        info: its fields.
        data: those that the check "redis" shows, and what was derived from them.
    """
    return [
        *_eviction(info),
        *_memory(data),
        *_persistence(info),
        *_replication(info, data),
        *_nearly("clients", "connections to Redis are in use", data.get("connected_clients"), data.get("maxclients")),
    ]


def _eviction(info: Mapping[str, str]) -> list[Check]:
    try:
        maxmemory, policy = int(info["maxmemory"]), info["maxmemory_policy"]
    except (KeyError, ValueError):
        return [Check("eviction", "pass", "unknown: INFO tells no maxmemory, or no maxmemory_policy", {})]
    if not maxmemory or policy == _SAFE_POLICY:
        return []
    output = (
        f"maxmemory_policy is {policy}: Redis may drop keys that are in use when its memory is full, and then a held"
        " lock can be granted twice, sessions end, and limits begin anew: set it to noeviction"
    )
    return [Check("eviction", "warn", output, {"maxmemory": maxmemory, "maxmemory_policy": policy})]


def _memory(data: Mapping[str, Any]) -> list[Check]:
    used, most, ratio = (data.get(name) for name in ("used_memory", "maxmemory", "mem_fragmentation_ratio"))
    if not isinstance(used, int):
        return []
    if isinstance(most, int) and most and used >= most * _NEARLY and data.get("maxmemory_policy") == "noeviction":
        output = f"{used} of {most} bytes are used, and beyond them Redis refuses to write: raise maxmemory"
        return [Check("memory", "warn", output, {})]
    if not isinstance(ratio, float) or used * abs(ratio - 1) < _LARGE:
        return []
    if ratio > _FRAGMENTED:
        output = f"Redis takes {ratio:g} times the memory that it uses: see activedefrag, or restart it"
    elif ratio < _SWAPPED:
        output = f"of Redis's memory only {ratio:.0%} is in RAM: it is swapped out, and calls will time out"
    else:
        return []
    return [Check("memory", "warn", output, {})]


def _persistence(info: Mapping[str, str]) -> list[Check]:
    fields = ("rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status")
    failed = [name for name in fields if info.get(name, "ok") != "ok"]
    if not failed:
        return []
    output = f"Redis could not save ({', '.join(failed)}): is its disk full? It may refuse to write until it can"
    return [Check("persistence", "warn", output, {})]


def _replication(info: Mapping[str, str], data: Mapping[str, Any]) -> list[Check]:
    lag = data.get("replica_lag", 0)
    if info.get("role") == "slave":
        link = info.get("master_link_status", "unknown")
        who = "it is" if info.get("cluster_enabled") == "1" else "REDIS_URL names"
        output = f"{who} a replica, which takes no writes; its link to the master is {link}"
    elif info.get("min_slaves_good_slaves") == "0":  # told only where min-replicas-to-write is set
        output = "no replica is in step, and without any Redis takes no writes: see min-replicas-to-write"
    elif lag > _LAG:
        output = f"a replica is {lag} s behind: a failover to it would lose as much"
    else:
        return []
    return [Check("replication", "warn", output, {})]


def of_slowlog(seconds: float, command: str, timeout: float) -> list[Check]:
    """The fault of a slow command, where it took longer than `timeout`, for which our calls wait."""
    if seconds < timeout:
        return []
    output = (
        f"{command} kept Redis from all other calls for {seconds:.3f} s within the last ten minutes, and ours wait for"
        f" {timeout:g} s: SLOWLOG GET shows it"
    )
    return [Check("slowlog", "warn", output, {})]


def of_activity(activity: Mapping[str, Any]) -> list[Check]:
    """The faults in PostgreSQL's connections and transactions, as far as our role sees them."""
    most, used = activity.get("max_connections"), activity.get("connections")
    checks = _nearly("connections", "connections to PostgreSQL are in use", used, most)
    oldest = activity.get("oldest_transaction", 0.0)
    if oldest > _LONG:
        output = f"a transaction has run for {oldest / 3600:.1f} hours: the outbox and VACUUM wait for it"
        checks.append(Check("transactions", "warn", output, {}))
    return checks


def _nearly(name: str, what: str, used: Any, most: Any) -> list[Check]:
    if not isinstance(used, int) or not isinstance(most, int) or not most or used < most * _NEARLY:
        return []
    return [Check(name, "warn", f"{used} of {most} {what}", {})]


def of_all(checks: Iterable[Check], redis: Check, postgres: Check) -> Status:
    """The status of a report with these checks, those of the two servers among them."""
    if uncovered_by_postgres(redis, postgres):
        return "fail"
    return worst(*(check.status for check in checks))


def worst(*statuses: Status) -> Status:
    return max(statuses, key=SEVERITY.__getitem__)


def uncovered_by_postgres(redis: Check, postgres: Check) -> str:
    """The words for the output of a Redis that is away, where no PostgreSQL covers it; "" in all other cases."""
    if not is_all_away(redis):
        return ""
    if not postgres.data["configured"]:
        return ", and no PostgreSQL covers it"
    return ", and PostgreSQL is away too" if is_away(postgres) else ""


def is_away(server: Check) -> bool:
    """Is it away, or a part of it?"""
    return "away_for" in server.data


def is_all_away(server: Check) -> bool:
    return is_away(server) and all("away_for" in node for node in server.data.get("nodes", ()))
