"""The answers of a living Redis about itself, and their faults."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .._pool import PoolExhausted
from ..client import Command, RedisClient
from ..errors import BackendError, BackendUnavailable, NoRight
from . import verdict
from .report import Check

#: The fields of INFO that a person asks for first.
_INFO = (
    "redis_version",
    "uptime_in_seconds",
    "used_memory",
    "maxmemory",
    "maxmemory_policy",
    "connected_clients",
    "evicted_keys",
)
#: Under these a key that is in use stays: Redis drops nothing, or, among keys with a TTL, the least recently used.
_SAFE_POLICIES = {"noeviction", "volatile-lru"}


def check_redis(
    redis: RedisClient | None, others: Sequence[Command], uncovered: Sequence[str]
) -> tuple[list[Check], list[Any]]:
    """The checks of Redis, its own first, and the replies to `others`, sent in the same round trip.

    There are no replies where Redis is away or disabled. An error stands in the place of a reply that is refused alone.

    Args:
        uncovered: the features without a fallback.
    """
    if redis is None:
        return [Check("redis", "pass", "disabled", {"enabled": False})], []
    breaker = redis.breaker
    data: dict[str, Any] = {"enabled": True, "times_away": breaker.times_opened}
    try:
        began = time.perf_counter()
        info, keys, *replies = _ask(redis, (("INFO",), ("DBSIZE",), *others))
        data["seconds"] = round(time.perf_counter() - began, 6)
    except BackendError as error:
        why = str(error).removesuffix(".")
        if isinstance(error, BackendUnavailable) and not isinstance(error, PoolExhausted):
            data["away_for"] = round(breaker.away_for(), 3)
            why += f": {redis.distance.problem}" if redis.distance.problem else ""
            why += f"; no fallback for {' and '.join(uncovered)}" if uncovered else "; fallbacks are in use"
        return [Check("redis", verdict.of_error(error, uncovered), why, data)], []
    checks = [Check("redis", "pass", "", data)]
    if not isinstance(keys, BackendError):
        data["keys"] = keys
    refused = [f"{name}: {reply}" for name, reply in (("INFO", info), ("DBSIZE", keys)) if isinstance(reply, NoRight)]
    if refused:
        checks.append(Check("rights", "warn", f"not all can be looked at: {'; '.join(refused)}", {}))
    if isinstance(info, BackendError):
        checks.append(Check("eviction", "pass", f"unknown: {info}", {}))
    else:
        seen = dict(line.split(":", 1) for line in info.decode(errors="replace").split("\r\n") if ":" in line)
        data.update({name: _number(seen[name]) for name in _INFO if name in seen})
        checks += _eviction(seen)
    return checks, replies


def _ask(redis: RedisClient, commands: Sequence[Command]) -> list[Any]:
    """The replies; the error in place of a reply that is refused alone (by an ACL, or for the value at its key).

    Raises BackendUnavailable. Raises BackendError where all are refused, except by an ACL: that may allow other calls.
    """
    try:
        return redis.pipeline(commands)
    except BackendUnavailable:
        raise
    except BackendError as error:
        refused = error
    replies: list[Any] = []
    for command in commands:
        try:
            replies.append(redis.call(*command))
        except BackendUnavailable:
            raise
        except BackendError as error:
            replies.append(error)
    if all(isinstance(reply, BackendError) and not isinstance(reply, NoRight) for reply in replies):
        raise refused
    return replies


def _eviction(info: dict[str, str]) -> list[Check]:
    """Warns where memory is bounded, and the policy may drop keys that are in use."""
    try:
        maxmemory, policy = int(info["maxmemory"]), info["maxmemory_policy"]
    except (KeyError, ValueError):
        return [Check("eviction", "pass", "unknown: INFO tells no maxmemory, or no maxmemory_policy", {})]
    if not maxmemory or policy in _SAFE_POLICIES:
        return []
    output = (
        f"maxmemory_policy is {policy}: Redis may drop keys that are in use when its memory is full, and then a held"
        " lock can be granted twice, sessions end, and limits begin anew: set it to volatile-lru or noeviction"
    )
    return [Check("eviction", "warn", output, {"maxmemory": maxmemory, "maxmemory_policy": policy})]


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
