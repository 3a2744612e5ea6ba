"""A hit where the identity's window holds N entries already: microseconds and CPU, beside limits; in turns.

The entries of a turn are given back behind it, so that N stays. A small ZSET is a listpack, which Redis searches
from its beginning; so the log is measured once more on a server that has none, with its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from govredis import Limit
from govredis.testing.servers import RedisServer

from .costs import ServerCost
from .operations import LIMITS, missing
from .samples import figure
from .sites import Site

COUNTS = (20, 1_000, 100_000)
#: Those at which a ZSET is a listpack by default.
SMALL = (20, 100)
LOG, COUNTER = "sliding_window_log", "sliding_window_counter"
NO_LISTPACK = "sliding_window_log, zset-max-listpack-entries 0"
LISTPACK = "sliding_window_log, zset-max-listpack-entries 128"
MOVING = "limits (moving window)"
#: Room for the hits that are measured.
ROOM = 500_000

#: Makes a turn of that many hits, and returns what gives them back.
Turn = Callable[[int], Callable[[], object]]


def _ours(site: Site, algorithm: str, count: int, copies: int) -> Turn:
    limit, hit = Limit(count + ROOM, 3600, algorithm=algorithm), site.gov.limits.hit
    identities = [f"{algorithm}-{count}-{n}" for n in range(copies)]
    for identity in identities:
        for _ in range(count // min(count, 1_000)):
            assert all(site.gov.limits.hit_many([(identity, limit)] * min(count, 1_000), operation="curve"))

    def turn(calls: int) -> Callable[[], object]:
        made = [hit(identities[n % len(identities)], limit, operation="curve") for n in range(calls)]
        return lambda: [result.refund() for result in made]

    return turn


def _limits(site: Site, count: int, copies: int) -> Turn:
    """Its list is as quick at any length: nothing is given back."""
    import limits

    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.storage_from_string(site.url))
    rate, identities = limits.parse(f"{count + ROOM}/hour"), [f"curve-{count}-{n}" for n in range(copies)]
    for identity in identities:
        for _ in range(count // min(count, 1_000)):
            assert moving.hit(rate, identity, cost=min(count, 1_000))

    def turn(calls: int) -> Callable[[], object]:
        for n in range(calls):
            moving.hit(rate, identities[n % len(identities)])
        return lambda: None

    return turn


def measure(
    site: Site, rounds: int, turn: int, counts: Sequence[int] = COUNTS, identities: int = 20_000
) -> dict[str, Any]:
    """By contestant and N. `identities`: as many as have that many entries together, up to 100."""
    with RedisServer() as other:
        other.command("CONFIG", "SET", "zset-max-ziplist-entries", 0)
        plain = Site(other.url, site.folder)
        turns: dict[tuple[str, int], tuple[Site, Turn]] = {}
        copies = {count: max(1, min(100, identities // count)) for count in (*counts, *SMALL)}
        for count in counts:
            for algorithm in (LOG, COUNTER):
                turns[algorithm, count] = site, _ours(site, algorithm, count, copies[count])
            if LIMITS not in missing():
                turns[MOVING, count] = site, _limits(site, count, copies[count])
        for count in SMALL:
            turns[LISTPACK, count] = (
                site,
                turns[LOG, count][1] if count in counts else _ours(site, LOG, count, copies[count]),
            )
            turns[NO_LISTPACK, count] = plain, _ours(plain, LOG, count, copies[count])
        report = _measured(turns, rounds, turn)
        for name, where in (LISTPACK, site), (NO_LISTPACK, plain):
            for count in SMALL:
                used = where.plain.memory_usage(f"rate_limit:curve:{LOG}-{count}-0", samples=0)
                report[name][str(count)]["bytes"] = used
        plain.close()
    return report


def _measured(turns: dict[tuple[str, int], tuple[Site, Turn]], rounds: int, calls: int) -> dict[str, Any]:
    servers = {site.url: ServerCost(site.url) for site, _ in turns.values()}
    found: dict[tuple[str, int], dict[str, list[float]]] = {
        key: {"wall_us": [], "client_us": [], "server_us": []} for key in turns
    }
    for _ in range(rounds):
        for key, (site, turn) in turns.items():
            mine, server = found[key], servers[site.url]
            cpu = server.cpu()
            began, client = time.perf_counter_ns(), time.process_time_ns()
            give_back = turn(calls)
            mine["client_us"].append((time.process_time_ns() - client) / 1000 / calls)
            mine["wall_us"].append((time.perf_counter_ns() - began) / 1000 / calls)
            mine["server_us"].append((server.cpu() - cpu) / calls)
            give_back()
    report: dict[str, Any] = {}
    for (who, count), of in found.items():
        report.setdefault(who, {})[str(count)] = {name: figure(samples) for name, samples in of.items()}
    return report
