"""The names of all counters, and their meaning: for Prometheus, and docs/metrics.md lists the same."""

from __future__ import annotations

import re
from functools import cache

#: By name; a part in braces varies. `degraded` counts calls that a fallback served.
COUNTERS: dict[str, str] = {
    "limits.allowed": "hits that were admitted",
    "limits.denied": "hits that were refused",
    "limits.denied_cached": "refused hits that were refused from memory",
    "limits.leased": "admitted hits that a lease admitted from memory",
    "limits.lease_lost": "leased admissions that may count although nobody used them",
    "limits.degraded.{backend}": "decisions by a fallback",
    "limits.errors": "hits that a server rejected, as for a key that holds something else",
    "limits.unreadable": "members of the denied counts that govredis has not written",
    "limits.denied_untold": "refused hits that the list of the most denied lacks",
    "limits.mirrored.{backend}": "admissions that were replicated to the other server",
    "limits.mirror_lost.{backend}": "admissions that could not be replicated",
    "locks.grants": "locks that were acquired through Redis",
    "locks.degraded_grants": "locks that were acquired by a fallback",
    "locks.timeouts": "calls of acquire that got no lock in time",
    "locks.waits": "calls of acquire that had to wait",
    "locks.waited_ms": "how long they waited, in milliseconds",
    "locks.lost": "locks that were lost while they were held",
    "locks.renewals_missed": "renewals that got no answer",
    "locks.unconfirmed": "grants that no replica confirmed (GOVREDIS_CONFIRM), which were taken back",
    "locks.unguarded": "locks that were granted without a lock file, which could not be made",
    "locks.unlisted": "locks that the list of held locks lacks",
    "locks.files_removed": "lock files that were swept",
    "sessions.bound": "sessions that were bound",
    "sessions.hits": "sessions that were found",
    "sessions.misses": "sessions that were looked for, and are not there",
    "sessions.updated": "changes of a session's data",
    "sessions.overtaken": "binds that a revocation overtook",
    "sessions.unconfirmed": "revocations that no replica confirmed (GOVREDIS_CONFIRM)",
    "sessions.malformed": "values at keys of sessions that are no session",
    "sessions.replays_refused": "changes of an outage that were overtaken by newer ones",
    "sessions.replays_failed": "changes of an outage that a server rejected on its return",
    "sessions.degraded.{operation}": "calls that were answered without the primary backend, by the operation",
    "sessions.degraded.postgres": "calls that PostgreSQL answered while Redis was away",
    "sessions.degraded.unguarded": "calls that Redis answered while PostgreSQL was away",
    "sessions.degraded.touch": "sessions that were found while their life could not be extended",
    "sessions.degraded.index": "binds that the index of the agent's sessions may lack for a while",
    "sessions.degraded.untold": "changes that Redis could not be told, and the outbox tells later",
    "{cache}.hits": "values that were found in Redis",
    "{cache}.misses": "values that were not",
    "{cache}.loads": "calls of loaders",
    "{cache}.waits": "misses that waited for the load of another",
    "{cache}.fills": "values that were stored after a load",
    "{cache}.fills_refused": "values that were not, as an invalidation came meanwhile",
    "{cache}.foreign": "values that another client has set",
    "{cache}.too_large": "values that are too large to be stored",
    "{cache}.bypassed": "calls that used no cached value, as there was no freshness lease",
    "{cache}.invalidated": "invalidations of a value",
    "{cache}.invalidated_all": "invalidations of all values",
    "{cache}.invalidations_owed": "invalidations that wait for Redis's return",
    "{cache}.degraded.reads": "reads without Redis",
    "{cache}.degraded.unguarded": "cached values that were used while nobody could say whether they are fresh",
    "{cache}.degraded.fills": "loaded values that could not be stored",
    "{cache}.degraded.leases": "loads without a lease, as Redis was away",
    "{cache}.degraded.loads": "values that were used past their time, as their loader failed",
    "leases.renewed": "leases of slow loads that were renewed",
    "leases.degraded.renewals": "renewals of such leases without an answer",
    "guard.ticks": "runs of the outbox relay",
    "guard.told": "entries of the outbox that Redis was told of",
    "guard.busy": "runs that another process was at",
    "guard.failed": "runs that failed",
    "guard.epochs": "times that Redis had lost data, or was new",
    "guard.foreign": "times that another client had written to the key of the freshness lease",
    "guard.degraded.{server}": "looks at the freshness lease that failed, by the server that was away",
    "celery.limited.{outcome}": "tasks beyond their limit: retry, raise or skip",
    "celery.conflicts.{outcome}": "exclusive tasks that found another running: retry, raise or skip",
    "celery.parked": "tasks that were parked until their limit has room",
    "celery.unparked": "tasks that could not be parked, and are retried by the broker",
    "celery.published": "parked tasks that were published when they were due",
    "celery.set_aside": "parked tasks that could not be published",
    "celery.duplicates": "deliveries of a parked task that had come before",
    "celery.unpublished": "periodic tasks that beat could not publish, as the broker was away",
    "celery.events": "events that were published as tasks",
    "celery.untouched": "times that the liveness file could not be touched",
    "events.relayed": "events of committed transactions that were carried to Redis",
    "events.unpublished": "changes of health's status that could not be published",
    "events.missed": "events that were trimmed before their listener or group had read them",
    "events.undone": "consumers that left while Redis was away, so that an event may come again",
    "events.dead": "events that were given up after so many deliveries",
    "events.unreadable": "entries of a stream that govredis has not written",
    "instrumentation.errors": "errors of listeners to operations",
    "health.unreadable": "values of the history, the census or the fleet that govredis has not written",
    "health.degraded.census": "steps of the census that failed",
    "health.degraded.fleet": "notes on Celery's workers and queues that Redis was not told of",
    "health.degraded.history": "readings of the history without one of its servers",
    "health.degraded.hours": "hourly rows of the history that PostgreSQL was not told of",
    "health.degraded.heartbeats": "heartbeats that a server could not be told of",
    "health.degraded.snapshots": "health reports that a server could not store",
    "account.unwritten": "times that neither Redis nor PostgreSQL took the account",
    "outages.{server}": "outages that have ended, once for all processes that noticed one; in the account alone",
}

#: First words of counters that are no cache's.
_FEATURES = {name.partition(".")[0] for name in COUNTERS} - {"{cache}"}
_LABEL = re.compile(r"\\{(\w+)\\}")
_BAD = re.compile(r"[^a-zA-Z0-9_]")


class Described:
    """A metric of Prometheus that a counter is counted in.

    Attributes:
        metric: its name, without `_total`.
        labels: their names and values.
        help: its text, in words.
        scale: the metric's unit, in the counter's.
    """

    __slots__ = ("help", "labels", "metric", "scale")

    def __init__(self, metric: str, help: str, labels: dict[str, str], scale: float = 1.0) -> None:
        self.metric: str = metric
        self.help: str = help
        self.labels: dict[str, str] = labels
        self.scale: float = scale


_FALLBACKS = "Calls that a fallback served, by feature (a cache has its namespace) and kind."


@cache
def describe(name: str) -> Described:
    """The metric of a counter. Counters that are not in the list are all in one metric."""
    feature, _, event = name.partition(".")
    if ".degraded." in name:
        return Described("govredis_fallbacks", _FALLBACKS, {"feature": feature, "kind": event.partition(".")[2]})
    if name == "locks.degraded_grants":
        return Described("govredis_fallbacks", _FALLBACKS, {"feature": feature, "kind": "grants"})
    for pattern, meaning in COUNTERS.items():
        regex = _regex(pattern)
        if (found := regex.fullmatch(name)) and (feature in _FEATURES) == (not pattern.startswith("{cache}")):
            words = [word for word in pattern.split(".") if not word.startswith("{")]
            text = f"{meaning[0].upper()}{meaning[1:]}."
            if name == "locks.waited_ms":
                return Described("govredis_locks_waited_seconds", "How long calls of acquire waited.", {}, 1000.0)
            prefix = ["govredis", "cache"] if pattern.startswith("{cache}") else ["govredis"]
            return Described("_".join([*prefix, *words]), text, found.groupdict())
    return Described("govredis_other", "Counters that govredis does not name.", {"counter": _BAD.sub("_", name)})


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(_LABEL.sub(r"(?P<\1>.+)", re.escape(pattern)))
