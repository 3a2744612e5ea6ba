"""Calls for many ids beside one call for each: microseconds and CPU an id; and many agents from cold."""

from __future__ import annotations

import time
from typing import Any

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer

from .costs import ServerCost
from .operations import PLENTY, VALUE
from .samples import figure
from .sites import PATIENT, Call, Site

AT_ONCE = 100
LOCKS = 10


def calls(site: Site) -> dict[str, dict[str, tuple[Call, int]]]:
    """By operation, the calls and the number of ids in each."""
    limits, metadata, locks = site.gov.limits, site.gov.metadata, site.gov.locks
    names = [f"many-{n}" for n in range(AT_ONCE)]
    hits, rate = [(name, f"{PLENTY}/hour") for name in names], f"{PLENTY}/hour"
    for name in names:
        metadata.set(name, VALUE)

    def release_all() -> None:
        with locks.acquire_many(names[:LOCKS]):
            pass

    def one_by_one() -> None:
        for name in names[:LOCKS]:
            locks.acquire(name).release()

    return {
        "limits.hit_many": {
            "at once": (lambda: limits.hit_many(hits, operation="many"), AT_ONCE),
            "one by one": (lambda: [limits.hit(name, rate, operation="many") for name in names], AT_ONCE),
        },
        "metadata.get_many": {
            "at once": (lambda: metadata.get_many(names), AT_ONCE),
            "one by one": (lambda: [metadata.get(name) for name in names], AT_ONCE),
        },
        "locks.acquire_many + release": {"at once": (release_all, LOCKS), "one by one": (one_by_one, LOCKS)},
    }


def measure(site: Site, rounds: int) -> dict[str, Any]:
    server = ServerCost(site.url)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    contests = calls(site)
    for _ in range(rounds):
        for operation, ways in contests.items():
            for way, (call, ids) in ways.items():
                mine = found.setdefault(operation, {}).setdefault(way, {})
                cpu, began, client = server.cpu(), time.perf_counter_ns(), time.process_time_ns()
                call()
                mine.setdefault("client_us", []).append((time.process_time_ns() - client) / 1000 / ids)
                mine.setdefault("wall_us", []).append((time.perf_counter_ns() - began) / 1000 / ids)
                mine.setdefault("server_us", []).append((server.cpu() - cpu) / ids)
    return {
        operation: {way: {name: figure(of) for name, of in samples.items()} for way, samples in ways.items()}
        for operation, ways in found.items()
    }


def from_cold(site: Site, postgres: PostgresServer, rounds: int, agents: int) -> dict[str, Any]:
    """Agents that PostgreSQL has and Redis does not: `get_many`, and `get_or_load` for each."""
    names = [f"cold-{n}" for n in range(agents)]
    found: dict[str, list[float]] = {"at once": [], "one by one": []}
    config = Config(redis_url=site.url, database_url=postgres.url, lock_folder=site.folder, **PATIENT)
    with GovRedis(config) as gov:
        gov.postgres.migrate()
        for name in names:
            gov.agents.create(name, VALUE)
        for _ in range(rounds):
            gov.metadata.invalidate_all()
            began = time.monotonic()
            assert len(gov.metadata.get_many(names, gov.agents.get_many)) == agents
            found["at once"].append(time.monotonic() - began)
            gov.metadata.invalidate_all()
            began = time.monotonic()
            for name in names:
                gov.metadata.get_or_load(name, gov.agents.get)
            found["one by one"].append(time.monotonic() - began)
    return {"agents": agents, **{way: figure(seconds) for way, seconds in found.items()}}
