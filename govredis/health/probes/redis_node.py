"""A Redis server, alone or a primary of a Cluster: whether it answers, and its answers about itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..._pool import PoolExhausted
from ...client import Command, RedisNode
from ...client.cluster.topology import CLUSTER_INFO
from ...errors import BackendError, BackendUnavailable, NoRight, printable
from .. import verdict
from ..report import Check

#: The fields of INFO that the check "redis" shows under the same names.
_SHOWN = (
    *("redis_version", "uptime_in_seconds", "role", "instantaneous_ops_per_sec"),
    *("used_memory", "maxmemory", "maxmemory_policy", "mem_fragmentation_ratio"),
    *("connected_clients", "blocked_clients", "maxclients", "rejected_connections"),
    *("evicted_keys", "expired_keys", "rdb_last_bgsave_status", "aof_enabled", "connected_slaves"),
)
#: Entries of the slowlog that are read, and the seconds for which one counts.
_SLOW, SLOW_FOR = "32", 600
#: A server is asked these about itself, before the commands of the probes.
_ABOUT_ITSELF: tuple[Command, ...] = (("INFO",), ("DBSIZE",), ("SLOWLOG", "GET", _SLOW))


@dataclass(slots=True)
class NodeFindings:
    """The result of one look at a server.

    Attributes:
        checks: "redis" first; others, each where there is something to warn of, or a right is missing.
        error: why it does not answer; None: it does.
        replies: to the commands; an error in the place of a reply that was refused alone.
    """

    checks: list[Check]
    error: BackendError | None
    replies: list[Any]

    @property
    def of_server(self) -> Check:
        return self.checks[0]


class NodeProbe:
    """Looks at one server.

    Args:
        uncovered: the features that have no fallback.
        timeout: seconds that our calls wait.
        clock: seconds, monotonic.
    """

    def __init__(self, uncovered: Sequence[str], timeout: float, clock: Callable[[], float]) -> None:
        self._uncovered = uncovered
        self._timeout = timeout
        self._clock = clock
        self._evicted: tuple[float, int] | None = None

    def look(self, node: RedisNode, commands: Sequence[Command]) -> NodeFindings:
        """Ask it all in one round trip, the commands of other probes too."""
        data: dict[str, Any] = {"enabled": True, "times_away": node.breaker.times_opened}
        try:
            began = time.perf_counter()
            # A primary of a Cluster answers all else also while it refuses every key.
            asked = [*_ABOUT_ITSELF, *([CLUSTER_INFO] if node.has_slots else []), *commands]
            info, keys, slowlog, *replies = _ask(node, asked)
            data["seconds"] = round(time.perf_counter() - began, 6)
            if node.has_slots:
                _check_state(node, replies.pop(0))
        except BackendError as error:
            return NodeFindings([self._away(node, error, data)], error, [error] * len(commands))
        return NodeFindings(self._checks(node, data, info, keys, slowlog), None, replies)

    def _away(self, node: RedisNode, error: BackendError, data: dict[str, Any]) -> Check:
        why = str(error).removesuffix(".")
        if isinstance(error, BackendUnavailable) and not isinstance(error, PoolExhausted):
            data["away_for"] = round(node.breaker.away_for(), 3)
            why += f": {node.distance.problem}" if node.distance.problem else ""
        return Check("redis", verdict.of_error(error, self._uncovered), why, data)

    def _checks(self, node: RedisNode, data: dict[str, Any], info: Any, keys: Any, slowlog: Any) -> list[Check]:
        checks = [Check("redis", "pass", "", data)]
        if not isinstance(keys, BackendError):
            data["keys"] = keys
        refused = [
            f"{name}: {reply}" for name, reply in (("INFO", info), ("DBSIZE", keys)) if isinstance(reply, NoRight)
        ]
        if refused:
            checks.append(Check("rights", "warn", f"not all can be looked at: {'; '.join(refused)}", {}))
        if isinstance(info, BackendError):
            checks.append(Check("eviction", "pass", f"unknown: {info}", {}))
        else:
            seen = dict(line.split(":", 1) for line in info.decode(errors="replace").split("\r\n") if ":" in line)
            data.update({name: _number(seen[name]) for name in _SHOWN if name in seen})
            data.update(self._derived(node, seen))
            checks += verdict.of_info(seen, data)
        if isinstance(slowlog, BackendError):
            return [*checks, Check("slowlog", "pass", f"unknown: {slowlog}", {})]
        slow = _slow(slowlog)
        data["slow_commands"] = len(slow)
        if not slow:
            return checks
        data["slowest_seconds"], data["slowest_command"] = slowest = max(slow)
        return checks + verdict.of_slowlog(*slowest, self._timeout)

    def _derived(self, node: RedisNode, seen: dict[str, str]) -> dict[str, Any]:
        """Numbers that INFO has in a form of its own."""
        found: dict[str, Any] = {}
        space = dict(pair.partition("=")[::2] for pair in seen.get(f"db{node.database}", "").split(","))
        found["expiring_keys"] = int(space.get("expires", "0"))
        saved, now = seen.get("rdb_last_save_time", ""), seen.get("server_time_usec", "")
        if saved.isdecimal():
            found["last_save_age"] = max(
                0, (int(now) // 1_000_000 if now.isdecimal() else int(time.time())) - int(saved)
            )
        lags = [part[4:] for n in range(32) for part in seen.get(f"slave{n}", "").split(",") if part.startswith("lag=")]
        if lags:
            found["replica_lag"] = max(int(lag) for lag in lags if lag.lstrip("-").isdecimal())
        if "master_link_status" in seen:
            found["master_link_status"] = seen["master_link_status"]
        evicted = seen.get("evicted_keys", "")
        if evicted.isdecimal():
            last, self._evicted = self._evicted, (self._clock(), int(evicted))
            if last is not None and self._evicted[0] > last[0]:
                rate = max(0, self._evicted[1] - last[1]) / (self._evicted[0] - last[0])
                found["evicted_per_second"] = round(rate, 3)
        return found


def _check_state(node: RedisNode, cluster: Any) -> None:
    """Raises BackendUnavailable where the node refuses every key, by its CLUSTER INFO."""
    if not isinstance(cluster, BackendError) and b"cluster_state:fail" in cluster:
        raise BackendUnavailable(f"{node.name} cannot serve: The cluster is down")  # its own words, to a key


def _ask(node: RedisNode, commands: Sequence[Command]) -> list[Any]:
    """The replies; the error in place of a reply that is refused alone (by an ACL, or for the value at its key).

    Raises BackendUnavailable. Raises BackendError where all are refused, except by an ACL: that may allow other calls.
    """
    try:
        replies = node.pipeline(commands, each=True)
    except BackendUnavailable:
        raise
    except BackendError:  # a proxy takes not all of them
        replies = [_ask_alone(node, command) for command in commands]
    for reply in replies[: len(_ABOUT_ITSELF)]:  # a command of the others may be another node's by now
        if isinstance(reply, BackendUnavailable):
            raise reply
    refused = [reply for reply in replies if isinstance(reply, BackendError)]
    if len(refused) == len(replies) and not all(isinstance(error, NoRight) for error in refused):
        raise refused[0]
    return replies


def _ask_alone(node: RedisNode, command: Command) -> Any:
    try:
        return node.call(*command)
    except BackendUnavailable:
        raise
    except BackendError as error:
        return error


def _slow(entries: Any) -> list[tuple[float, str]]:
    """The slow commands of the last ten minutes: the seconds of each, and its name.

    Arguments are left out: they hold ids of tenants, and values.
    """
    since = time.time() - SLOW_FOR
    found = []
    for _, at, micros, words, *_ in entries:
        if at >= since and words:
            found.append((micros / 1_000_000, printable(words[0].decode(errors="replace")[:32])))
    return found


def _number(text: str) -> int | float | str:
    if text.isdecimal():
        return int(text)
    whole, dot, part = text.partition(".")
    return float(text) if dot and whole.isdecimal() and part.isdecimal() else text
