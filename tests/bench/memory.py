"""Bytes: of each kind of key in Redis, of each kind of row in PostgreSQL, and of a connection to Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from uuid import UUID

from govredis import Config, GovRedis, Limit
from govredis.keys import sibling
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.testing.servers import PostgresServer, RedisServer

from .curve import COUNTER, COUNTS, LOG
from .sites import PATIENT

WINDOW = 3600
#: Metadata of 500 bytes, as JSON.
METADATA = {"team": "search", "note": "x" * (500 - len(json.dumps({"team": "search", "note": ""})))}


def _agents(count: int) -> list[str]:
    """Ids as apps have them: UUIDs."""
    return [str(UUID(int=n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128)) for n in range(count)]


# -- kinds of keys -----------------------------------------------------------------------------------------------------


def _use_up(gov: GovRedis, agents: Sequence[str], limit: Limit) -> None:
    for n in range(0, len(agents), 50):
        hits = [(agent, limit) for agent in agents[n : n + 50] for _ in range(limit.count)]
        assert all(gov.limits.hit_many(hits))


def _lock(gov: GovRedis, agents: Sequence[str], kept: ExitStack) -> None:
    for agent in agents:
        kept.callback(gov.locks.acquire(agent, renew=False).release)


def _release(gov: GovRedis, agents: Sequence[str]) -> None:
    for agent in agents:
        gov.locks.acquire(f"released-{agent}", renew=False).release()


def keys(server: RedisServer, folder: str, count: int) -> dict[str, float]:
    """By kind, the bytes by which Redis's memory grows for each: keys, siblings and Redis's own tables."""
    agents, found = _agents(count), {}
    # A lock is also an open file of this process, and the number of those is bounded.
    few = agents[: min(count, 600)]
    with ExitStack() as kept:
        gov = kept.enter_context(GovRedis(Config(redis_url=server.url, lock_folder=folder, **PATIENT)))
        fill: dict[str, tuple[Callable[[Sequence[str]], object], Sequence[str]]] = {
            "session": (lambda of: [gov.sessions.bind(f"{agent}-session", agent) for agent in of], agents),
            "limit of 20 an hour, used up": (lambda of: _use_up(gov, of, Limit(20, WINDOW)), agents),
            "limit of 20 an hour, one hit": (
                lambda of: gov.limits.hit_many([(f"{a}-", "20/hour") for a in of]),
                agents,
            ),
            "metadata of 500 bytes": (lambda of: [gov.metadata.set(agent, METADATA) for agent in of], agents),
            "lock, held": (lambda of: _lock(gov, of, kept), few),
            "lock, released within the hour": (lambda of: _release(gov, of), few),
        }
        for kind, (work, of) in fill.items():
            work(["the first"])  # Redis keeps a script that it has run
            before = _used(server)
            work(of)
            found[kind] = round((_used(server) - before) / len(of))
    return found


def _used(server: RedisServer) -> int:
    return int(server.command("INFO", "memory")["used_memory"])


# -- a limit over N ----------------------------------------------------------------------------------------------------


def _fill_log(gov: GovRedis, agent: str, count: int) -> None:
    hits = [(agent, Limit(count, WINDOW))] * min(count, 1_000)
    for _ in range(count // len(hits)):
        assert all(gov.limits.hit_many(hits))


def _fill_counter(gov: GovRedis, agent: str, count: int) -> None:
    """Over the whole window, for that is what takes most: by the script, which takes the time as an argument."""
    assert gov.internal.context.redis is not None
    backend = RedisLimitBackend(gov.internal.context.redis)
    key = sibling(f"rate_limit:default:{agent}", "counter")
    last, at_once = time.time_ns() // 1000, max(1, count // 50)
    for n in range(count // at_once):
        now = str(last + n * WINDOW * 1_000_000 * at_once // count)
        arguments = ("hit", str(at_once), f"{now}-0123456789ab{n}", now, str(count), str(WINDOW * 1_000_000))
        assert gov.internal.context.redis.run(backend._counter_script, (key,), *arguments)[0] == 1


def limits(server: RedisServer, folder: str, counts: Sequence[int] = COUNTS) -> dict[str, dict[str, int]]:
    """By algorithm and N, the bytes of one identity's keys after N hits within an hour: MEMORY USAGE."""
    found: dict[str, dict[str, int]] = {}
    with GovRedis(Config(redis_url=server.url, lock_folder=folder, **PATIENT)) as gov:
        for algorithm, fill in (LOG, _fill_log), (COUNTER, _fill_counter):
            for count in counts:
                agent = f"{algorithm}-{count}"
                fill(gov, agent, count)
                key = f"rate_limit:default:{agent}"
                used = [
                    server.command("MEMORY", "USAGE", name, "SAMPLES", 0) or 0
                    for name in (key, sibling(key, "window"), sibling(key, "counter"))
                ]
                found.setdefault(algorithm, {})[str(count)] = sum(used)
    return found


# -- connections -------------------------------------------------------------------------------------------------------


def connection(server: RedisServer, folder: str, count: int, settle: float) -> dict[str, float]:
    """The bytes by which Redis's memory grows for a connection of govredis: that was just used, and that has idled.

    Args:
        settle: seconds after which Redis has taken back the buffers of idle connections.
    """
    with ExitStack() as kept:
        before = _used(server)
        config = Config(redis_url=server.url, lock_folder=folder, **PATIENT)
        govs = [kept.enter_context(GovRedis(config)) for _ in range(count)]
        for _ in range(2):  # the second time they are all connected
            for gov in govs:
                gov.limits.peek("one-for-all", "20/hour")
        used = _used(server) - before
        time.sleep(settle)
        return {"just used": round(used / count), "idle": round((_used(server) - before) / count)}


# -- rows --------------------------------------------------------------------------------------------------------------


def rows(postgres: PostgresServer, folder: str, count: int) -> dict[str, int]:
    """By kind, the bytes of a row with its part of the indexes, in tables of that many, as first written."""
    config = Config(redis_enabled=False, database_url=postgres.url, lock_folder=folder, **PATIENT)
    agents, found = _agents(count), {}
    with GovRedis(config) as gov:
        gov.postgres.migrate()
        fill: dict[str, tuple[str, Callable[[str], object]]] = {
            "session": ("govredis_sessions", lambda agent: gov.sessions.bind(f"{agent}-session", agent)),
            "limit of 20 an hour, used up": ("govredis_limit_windows", lambda a: gov.limits.hit(a, "20/hour", cost=20)),
            "agent, metadata of 500 bytes": ("govredis_agents", lambda agent: gov.agents.create(agent, METADATA)),
        }
        for kind, (table, write) in fill.items():
            before = _size(gov, table)
            for agent in agents:
                write(agent)
            found[kind] = round((_size(gov, table) - before) / count)
    return found


def _size(gov: GovRedis, table: str) -> int:
    assert gov.internal.context.postgres is not None
    ((size,),) = gov.internal.context.postgres.fetch("SELECT pg_total_relation_size(%s)", (table,))
    return int(size)


def measure(
    folder: str, postgres: PostgresServer, count: int, counts: Sequence[int] = COUNTS, settle: float = 15.0
) -> dict[str, Any]:
    with RedisServer() as server:
        return {
            "of": count,
            "keys": keys(server, folder, count),
            "limits": limits(server, folder, counts),
            "connection": connection(server, folder, min(count, 200), settle),
            "rows": rows(postgres, folder, min(count, 2_000)),
        }
