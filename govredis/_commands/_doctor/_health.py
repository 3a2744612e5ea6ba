"""The faults that the health report knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..._at_once import at_once
from ...api import GovRedis
from ...client import RedisClient, RedisNode, SentinelClient
from ...errors import BackendError, BackendUnavailable, ConfigurationError
from ...health import Check
from ...outbox import FreshnessLease
from ._diagnosis import Diagnosis
from ._remedies import remedy

#: By the check: why its fault matters, where its own words do not say so.
_WHY = {
    "redis": "every call takes its fallback, or fails where there is none",
    "postgres": "sessions and agents lose their record, and nobody tells Redis of changes",
    "rights": "a fault there is not found, by health reports either",
    "eviction": "a key that is in use may be dropped",
    "locks": "acquire raises LockUnavailable, or locks are not guarded on this host",
    "beat": "no snapshot is kept, no outbox drained and no ended row purged",
    "outbox": "readers load what they could read from Redis",
    "parked": "tasks that have waited for their limit do not run",
    "counters": "totals and ratios over all processes lack what Redis was not told",
    "memory": "Redis refuses writes, or answers late",
    "persistence": "a restart loses what was not saved",
    "replication": "writes are refused, or a failover loses them",
    "sentinels": "a majority of them must live, or no replica takes the place of a primary that fails",
    "slowlog": "calls time out, and the breaker takes Redis for away",
    "keys": "nobody sees what fills Redis",
    "census": "nobody sees what fills Redis",
    "workers": "its tasks wait, and a task that it ran may be lost",
    "celery": "tasks that are sent there do not run",
    "broker": "no task is sent, and none comes",
    "transactions": "PostgreSQL keeps old rows for it, and the outbox waits for what it has written",
    "connections": "further connections to PostgreSQL are refused",
    "clients": "further connections are refused",
}


def faults_of_health(gov: GovRedis) -> Iterator[Diagnosis]:
    redis = gov.internal.context.redis
    if isinstance(redis, SentinelClient):
        redis.ask_sentinels()
    if redis is not None:
        _measure_where_it_is_away(redis)
    not_told = _tell_of_changes(gov.internal.freshness)
    for check in gov.health.check().checks:
        if check.status != "pass":
            more = not_told if check.name == "outbox" else ""
            yield Diagnosis(check.name, check.output + more, _why(check), _change(check, gov))
        elif "unknown" in check.output:
            yield Diagnosis(check.name, check.output, "a fault there is not found", "", is_fault=False)


def _why(check: Check) -> str:
    if check.name == "redis" and any(node["status"] == "pass" for node in check.data.get("nodes", ())):
        return "calls for keys of such a node take their fallback, or fail where there is none"
    return _WHY.get(check.name, "")


def _change(check: Check, gov: GovRedis) -> str:
    return remedy(check, gov.config.redis_url)


def _measure_where_it_is_away(redis: RedisClient) -> None:
    """Measure the distance of nodes that are away, for the report. A process that lives on does so by and by."""

    def measure(node: RedisNode) -> None:
        try:
            node.call("PING")
        except BackendUnavailable:
            node.distance.ask()
        except BackendError:
            pass  # it answers

    try:
        nodes = redis.nodes()
    except BackendError:
        return  # no node of the Cluster is known, says the report
    at_once([partial(measure, node) for node in nodes])


def _tell_of_changes(freshness: FreshnessLease | None) -> str:
    """Tell Redis of the outbox, as the next reader would: where nobody reads, nobody has told it. Returns the words for
    why it was not told; "" where it was, or there was nothing to tell."""
    if freshness is None:
        return ""
    try:
        lag = freshness.state().lag
        told = lag is None or not lag.entries or freshness.drain() is not None
    except (BackendError, ConfigurationError) as error:
        return f"; telling it now has failed: {error}"
    return "" if told else "; telling it now has failed: a server is away, or another process does so"
