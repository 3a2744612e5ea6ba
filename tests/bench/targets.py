"""The ratios that were asked of govredis, and those of this run: each a median over rounds, of two who took turns."""

from __future__ import annotations

from typing import Any

from .costs import Samples
from .operations import JSON, LIMITS, OURS, REDIS_PY
from .samples import Figure, ratio

#: Measure, operation, the peer, and how much of the peer's it may be at most.
SERVER = (
    ("limits.hit", LIMITS, 1.25),
    ("limits.hit, one busy identity", LIMITS, 1.25),
    ("limits.hit, a counter", LIMITS, 1.1),
    ("locks.acquire + release", REDIS_PY, 1.25),
)
#: The CPU of the client, JSON aside, to that of `client.call("GET")`.
CLIENT = (("limits.hit", 1.8), ("metadata.get", 1.6), ("sessions.get", 1.6), ("locks.acquire + release", 3.5))
#: Operations whose calls a second, of 4 processes, are those of the best peer at least.
THROUGHPUT = ("limits.hit", "locks.acquire + release", "sessions.get", "metadata.get")


def judge(samples: Samples, throughput: dict[str, Any] | None) -> list[dict[str, Any]]:
    found = []
    for operation, peer, most in SERVER:
        by = samples[operation]
        if peer in by:
            of = ratio(by[OURS]["server_us"], by[peer]["server_us"])
            found.append(_target(f"Redis's CPU, {operation}, to {peer}", of, most=most))
    base = samples["GET"][OURS]["client_us"]
    for operation, most in CLIENT:
        by = samples[operation]
        mine, aside = by[OURS]["client_us"], by[JSON]["client_us"] if JSON in by else [0.0] * len(base)
        of = ratio([spent - parsing for spent, parsing in zip(mine, aside, strict=True)], base)
        found.append(_target(f'client CPU, {operation}, to `client.call("GET")`', of, most=most))
    for operation in THROUGHPUT if throughput else ():
        assert throughput is not None
        of = throughput["to_the_best_peer"][operation]
        found.append(_target(f"calls a second of 4 processes, {operation}, to {of['peer']}", of, least=1.0))
    return found


def _target(name: str, of: Figure, most: float | None = None, least: float | None = None) -> dict[str, Any]:
    held = of["median"] <= most if most is not None else of["median"] >= (least or 0)
    asked = f"at most {most:g}" if most is not None else f"at least {least:g}"
    return {"name": name, "asked": asked, "found": {k: of[k] for k in ("median", "low", "high", "of")}, "held": held}
