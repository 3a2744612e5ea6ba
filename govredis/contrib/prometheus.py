"""Prometheus: GovRedisCollector, whose totals are over all processes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..api import GovRedis
from ..breaker import CircuitBreaker
from ..client import RedisClient
from ..errors import BackendError
from ..health.account_redis import OUTAGE_DAYS
from ..health.counter_names import COUNTERS, describe
from ..health.figures import BOUNDS, Latency, Outage, Totals
from ..health.nodes import address_in

__all__ = ["GovRedisCollector"]

M = TypeVar("M", bound=Metric)

#: Counters that begin at 0, so that Prometheus sees the first addition too.
_FROM_ZERO = {
    *(name for name in COUNTERS if "{" not in name),
    *("outages.redis", "outages.postgres"),
    *(f"limits.degraded.{backend}" for backend in ("postgres", "local", "none")),
}
#: The values of a status, as gauges have no words.
_STATUS = {"pass": 0, "warn": 1, "fail": 2}


class GovRedisCollector(Collector):
    """The metrics of a GovRedis: `REGISTRY.register(GovRedisCollector(gov))`.

    Counters and histograms are the sums over all processes, as the account has them. So any process may be scraped:
    under gunicorn, uWSGI and Celery's prefork pool no multiprocess files are needed. They may be a second behind. While
    Redis is away they come from PostgreSQL, and never decrease; without PostgreSQL they are left out until its return,
    as no process knows them all. Prometheus bridges the gap. If Redis loses its data they begin anew, as after a
    restart.

    Gauges are of now, as the process sees it that is scraped. A scrape runs the health check if the last is more than a
    second old, and takes as long as that at most: 2 s while servers hang.

    docs/metrics.md lists all metrics.

    Args:
        gov: the GovRedis to look at.
    """

    def __init__(self, gov: GovRedis) -> None:
        self._gov = gov

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry would collect for it."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics now. Raises nothing because a server is away."""
        account = self._gov.internal.account
        totals = account.totals()
        now = datetime.now(timezone.utc)
        yield _labelled(
            GaugeMetricFamily(
                "govredis_account_source", "1 for the place that the totals are from.", labels=["backend"]
            ),
            [([backend], backend == totals.backend) for backend in ("redis", "postgres", "memory")],
        )
        if totals.backend != "memory" or self._is_alone():
            yield from _counters(totals)
            for server, latency in sorted({"redis": Latency(), "postgres": Latency(), **totals.latencies}.items()):
                yield _histogram(server, latency)
        yield from self._servers()
        yield from _outages(account.outages(now - timedelta(days=OUTAGE_DAYS), now))
        yield from self._health()

    def _is_alone(self) -> bool:
        """Is there no other process that could have counted?"""
        redis = self._gov.internal.context.redis
        return redis is not None and redis.in_process

    def _servers(self) -> Iterator[Metric]:
        context = self._gov.internal.context
        nodes = {} if context.redis is None else _nodes(context.redis)
        servers = {} if context.redis is None else {"redis": list(nodes.values())}
        if context.postgres is not None:
            servers["postgres"] = [_Away.of(context.postgres.breaker)]
        yield _labelled(
            GaugeMetricFamily(
                "govredis_breaker_open", "1 while this process takes the server for away.", labels=["server"]
            ),
            [([name], not found or any(each.is_open for each in found)) for name, found in servers.items()],
        )
        yield _labelled(
            GaugeMetricFamily(
                "govredis_away_seconds",
                "How long it has been away, as this process sees it.",
                labels=["server"],
            ),
            [([name], max(each.seconds for each in found)) for name, found in servers.items() if found],
        )
        if nodes and "" not in nodes:
            yield _labelled(
                GaugeMetricFamily(
                    "govredis_node_away_seconds",
                    "How long a primary of the Cluster has been away, as this process sees it.",
                    labels=["node"],
                ),
                [([address], node.seconds) for address, node in nodes.items()],
            )

    def _health(self) -> Iterator[Metric]:
        report = self._gov.health.check()
        yield GaugeMetricFamily(
            "govredis_health_status", "0: pass, 1: warn, a fallback covers it; 2: fail.", _STATUS[report.status]
        )
        yield _labelled(
            GaugeMetricFamily("govredis_health_check", "The same of each check of the report.", labels=["check"]),
            [([check.name], _STATUS[check.status]) for check in report.checks],
        )
        yield _labelled(
            GaugeMetricFamily(
                "govredis_health_value", "A number in the report: its check and its name there.", labels=["name"]
            ),
            [([name], value) for check in report.checks for name, value in _numbers(check.name, check.data)],
        )
        yield GaugeMetricFamily("govredis_health_timestamp_seconds", "When the report was made.", report.at.timestamp())


class _Away(NamedTuple):
    """Whether this process takes a server for away, and for how long it has."""

    is_open: bool
    seconds: float

    @classmethod
    def of(cls, breaker: CircuitBreaker) -> _Away:
        return cls(not breaker.closed, breaker.away_for())


def _nodes(redis: RedisClient) -> dict[str, _Away]:
    """By the addresses; {} where no node of the Cluster is known."""
    try:
        return {address_in(redis, node): _Away.of(node.breaker) for node in redis.nodes()}
    except BackendError:
        return {}


def _counters(totals: Totals) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily] = {}
    values: dict[tuple[str, tuple[str, ...]], float] = {}
    for name, n in sorted({**dict.fromkeys(_FROM_ZERO, 0), **totals.counts}.items()):
        one = describe(name)
        if one.metric not in families:
            families[one.metric] = CounterMetricFamily(one.metric, one.help, labels=list(one.labels))
        key = one.metric, tuple(one.labels.values())
        values[key] = values.get(key, 0.0) + n / one.scale
    for (metric, labels), value in values.items():
        families[metric].add_metric(labels, value)
    yield from families.values()


def _histogram(server: str, latency: Latency) -> Metric:
    names = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
    buckets: Any = list(zip(names, accumulate(latency.buckets), strict=True))
    what = {"redis": "Round trips to Redis", "postgres": "Statements to PostgreSQL"}.get(server, server)
    family = HistogramMetricFamily(f"govredis_{server}_seconds", f"{what}, in seconds.")
    family.add_metric([], buckets, latency.seconds)
    return family


def _outages(outages: list[Outage]) -> Iterator[Metric]:
    """The latest of each server, and how many of 30 days are remembered."""
    latest = {outage.server: outage for outage in outages}
    now = time.time()
    labels = ["server", "kind"]
    began = GaugeMetricFamily("govredis_last_outage_timestamp_seconds", "When the last outage began.", labels=labels)
    lasted = GaugeMetricFamily("govredis_last_outage_seconds", "How long it lasted, so far.", labels=labels)
    served = GaugeMetricFamily("govredis_last_outage_served", "The calls that fallbacks served in it.", labels=labels)
    slowest = GaugeMetricFamily(
        "govredis_last_outage_slowest_seconds", "Its slowest call that got no answer.", labels=labels
    )
    for server, outage in sorted(latest.items()):
        of = [server, outage.kind]
        began.add_metric(of, outage.began.timestamp())
        lasted.add_metric(of, (outage.ended.timestamp() if outage.ended else now) - outage.began.timestamp())
        served.add_metric(of, outage.served)
        slowest.add_metric(of, outage.slowest)
    yield from (began, lasted, served, slowest)


def _numbers(name: str, held: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a check, each by its dotted name, without this process's own counts."""
    if isinstance(held, dict) and name != "counters.counts":
        for key, value in held.items():
            yield from _numbers(f"{name}.{key}", value)
    elif isinstance(held, int | float):
        yield name, held


def _labelled(family: GaugeMetricFamily, values: Iterable[tuple[list[str], float]]) -> Metric:
    for labels, value in values:
        family.add_metric(labels, float(value))
    return family
