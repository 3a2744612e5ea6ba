"""The types that users' checkers see. Nobody runs this: `make types` has mypy and pyright check it, strictly.

An ignored error is a promise too: both checkers complain of a comment that ignores nothing.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

from govredis import GovRedis, HealthReport, HeldLock, RateLimitResult, SessionBinding
from govredis.contrib.celery import exclusive
from govredis.contrib.celery import rate_limited as limited_task
from govredis.contrib.flask import FlaskGovRedis
from govredis.health import HistoryPoint
from govredis.metadata import AgentRecord

gov = GovRedis.from_env()
ext = FlaskGovRedis()


# -- loaders ---------------------------------------------------------------------------------------------------------


def load(report_id: str) -> dict[str, int]:
    return {"rows": len(report_id)}


def find(report_id: str) -> list[int] | None:
    return [len(report_id)]


def load_many(report_ids: list[str]) -> dict[str, float]:
    return dict.fromkeys(report_ids, 1.5)


def find_many(report_ids: list[str]) -> dict[int, str | None]:
    return {int(report_id): None for report_id in report_ids}


assert_type(gov.metadata.get_or_load("a", load), dict[str, int])
assert_type(gov.metadata.get_or_load(7, find, ttl=60), list[int] | None)
assert_type(gov.metadata.get_or_load("a", lambda report_id: report_id.encode()), bytes)
assert_type(gov.metadata.get_or_load("a", gov.agents.get), AgentRecord | None)
assert_type(gov.metadata.get_many(["a", 7]), dict[str, Any])
assert_type(gov.metadata.get_many(["a"], load_many), dict[str, float])
assert_type(gov.metadata.get_many(["a"], find_many), dict[str, str])
assert_type(gov.metadata.get_many(["a"], gov.agents.get_many), dict[str, AgentRecord])
gov.metadata.get_or_load("a", lambda: 1)  # type: ignore[misc, arg-type]


# -- cached ----------------------------------------------------------------------------------------------------------


@gov.cache("report", ttl=60).cached("{agent_id}:{month}")
def report(agent_id: str, month: int = 1) -> dict[str, int]:
    return {agent_id: month}


assert_type(report("a", month=2), dict[str, int])
assert_type(report.refresh("a"), dict[str, int])
assert_type(report.uncached("a", 2), dict[str, int])
report.invalidate("a", 2)
report(1)  # type: ignore[arg-type]
report.refresh()  # type: ignore[call-arg]
report.uncached("a", 2, 3)  # type: ignore[call-arg]
report.invalidate("a", year=2)  # type: ignore[call-arg]


class Reports:
    @gov.cache("reports").cached("{month}")
    def of(self, month: int) -> float:
        return month / 12


assert_type(Reports().of(month=2), float)
assert_type(Reports().of.refresh(2), float)
assert_type(Reports().of.uncached(2), float)
Reports().of.invalidate(2)
Reports().of("2")  # type: ignore[arg-type]
Reports().of.invalidate()  # type: ignore[call-arg]


# -- rate_limited and locked -----------------------------------------------------------------------------------------


@gov.limits.rate_limited("20/hour", key="{agent_id}")
def store(agent_id: str, *texts: str) -> int:
    return len(texts)


@gov.limits.rate_limited(lambda *_, **__: "20/hour", key=str, on_limit="wait")
def store_later(agent_id: int) -> list[str]:
    return [str(agent_id)]


@gov.locks.locked("agent:{agent_id}", timeout=5)
def rebuild(agent_id: str, *, deep: bool = False) -> tuple[str, bool]:
    return agent_id, deep


class Rebuilder:
    @gov.locks.locked("rebuild")
    @gov.limits.rate_limited("1/second", key="rebuild")
    def rebuild(self, times: int) -> str:
        return "r" * times


assert_type(store("a", "it rains"), int)
assert_type(store_later(agent_id=1), list[str])
assert_type(rebuild("a", deep=True), tuple[str, bool])
assert_type(Rebuilder().rebuild(times=2), str)
store()  # type: ignore[call-arg]
store_later("a")  # type: ignore[arg-type]
rebuild("a", True)  # type: ignore[call-arg]
Rebuilder().rebuild()  # type: ignore[call-arg]


# -- Celery's: "skip" is the only one that makes a result of None ------------------------------------------------------


@limited_task("20/hour", key="{agent_id}")
def retried(agent_id: str) -> int:
    return len(agent_id)


@limited_task("20/hour", key="{agent_id}", on_limit="raise")
def raising(agent_id: str) -> int:
    return len(agent_id)


@limited_task("20/hour", key="{agent_id}", on_limit="skip")
def skipped(agent_id: str) -> int:
    return len(agent_id)


@exclusive("agent:{agent_id}", ttl=60)
def alone(agent_id: str) -> int:
    return len(agent_id)


@exclusive("agent:{agent_id}", on_conflict="raise")
def alone_or_raising(agent_id: str) -> int:
    return len(agent_id)


@exclusive("agent:{agent_id}", on_conflict="skip")
@limited_task("20/hour", key="{agent_id}")
def alone_or_skipped(agent_id: str) -> int:
    return len(agent_id)


assert_type(retried("a"), int)
assert_type(raising(agent_id="a"), int)
assert_type(skipped("a"), int | None)
assert_type(alone("a"), int)
assert_type(alone_or_raising("a"), int)
assert_type(alone_or_skipped(agent_id="a"), int | None)
retried(1)  # type: ignore[arg-type]
skipped()  # type: ignore[call-arg]
alone(1)  # type: ignore[arg-type]
alone_or_skipped()  # type: ignore[call-arg]


# -- Flask's ---------------------------------------------------------------------------------------------------------


@ext.rate_limited("2/second", key="{agent_id}", count_when=lambda response: response.status_code == 403)
def show(agent_id: str) -> dict[str, str]:
    return {"agent": agent_id}


@ext.login_required
def edit(agent_id: str, *, field: str = "") -> tuple[str, int]:
    return field, 200


assert_type(show(agent_id="a"), dict[str, str])
assert_type(edit("a", field="b"), tuple[str, int])
show(1)  # type: ignore[arg-type]
edit()  # type: ignore[call-arg]


# -- results ---------------------------------------------------------------------------------------------------------

assert_type(gov.limits.hit("a", "20/hour"), RateLimitResult)
assert_type(gov.locks.try_acquire("a"), HeldLock | None)
assert_type(gov.sessions.get("a"), SessionBinding | None)
assert_type(gov.health.check(), HealthReport)
assert_type(gov.health.history(points=10), list[HistoryPoint])
with gov.locks.acquire("a") as held:
    assert_type(held, HeldLock)
with GovRedis.in_memory() as opened:
    assert_type(opened, GovRedis)
