"""Versions, timeouts, clocks, and the data that a restart loses."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from ..._version import __version__
from ...api import GovRedis
from ...client import RedisNode
from ...errors import BackendError
from ._diagnosis import Diagnosis, Fact

if TYPE_CHECKING:
    from ...postgres import Postgres

#: The oldest that we support.
_REDIS, _POSTGRES, _REDIS_PY = (6, 2), 13, (6, 4)
#: A timeout is this many round trips at least.
_PATIENCE = 3
#: Seconds that two clocks may differ.
_APART = 1.0
_TIMES = 5

_CLOCKS = "bindings, revocations and lock tokens of an outage are put in order by the hosts' clocks"


def of_process() -> Iterator[Fact | Diagnosis]:
    names = "redis", "hiredis", "psycopg2-binary", "celery"
    packages = [f"{name} {number}" for name in names if (number := _version(name))]
    yield Fact("versions", ", ".join([f"govredis {__version__}", f"Python {platform.python_version()}", *packages]))
    installed = _version("redis")
    if _numbers(installed) < _REDIS_PY:
        yield Diagnosis(
            "versions", f"redis-py is {installed}", "it was not tested with that", "pip install 'redis>=6.4'"
        )


class Measured(NamedTuple):
    """Seconds of the shortest round trip, and how far the server's clock is ahead of this host's."""

    round_trip: float
    ahead: float


def _measured(ask: Callable[[], float]) -> Measured:
    """`ask` returns the server's time, in seconds since 1970."""
    found = []
    for _ in range(_TIMES):
        sent, began = time.time(), time.perf_counter()
        told = ask()
        took = time.perf_counter() - began
        found.append(Measured(took, told - (sent + took / 2)))
    return min(found)


def measured_of(redis: RedisNode) -> Measured:
    """Raises BackendError."""

    def ask() -> float:
        seconds, microseconds = redis.call("TIME")
        return int(seconds) + int(microseconds) / 1e6

    return _measured(ask)


def of_redis(gov: GovRedis, redis: RedisNode) -> Iterator[Fact | Diagnosis]:
    """The facts and faults of a Redis that answers. Raises BackendError."""
    try:
        info = _info(redis)
    except BackendError as error:
        info = {}
        yield Diagnosis("redis", f"its version is unknown: {error}", is_fault=False)
    name, number = "Redis", info.get("redis_version", "")
    if "valkey_version" in info:
        name, number = "Valkey", info["valkey_version"]
    measured = measured_of(redis)
    yield Fact("redis", f"{name} {number or '?'}, {redis.name.partition(' at ')[2] or redis.name}{_shown(measured)}")
    if number and _numbers(info.get("redis_version", "")) < _REDIS:
        yield Diagnosis("redis", f"{name} is {number}", "scripts use commands of 6.2", "update it to 6.2 or newer")
    yield from _timeouts(redis.distance.timeouts, measured.round_trip)
    yield from _clock("Redis", measured)
    if info and gov.config.database_url is None:
        yield from _persistence(redis, info)


def of_postgres(gov: GovRedis, postgres: Postgres) -> Iterator[Fact | Diagnosis]:
    """The facts and faults of a PostgreSQL that answers. Raises BackendError."""
    ((number, shown),) = postgres.fetch(
        "SELECT pg_catalog.current_setting('server_version_num')::int4, pg_catalog.current_setting('server_version')"
    )

    def ask() -> float:
        ((seconds,),) = postgres.fetch("SELECT pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())::float8")
        return float(seconds)

    measured = _measured(ask)
    at = postgres.name.partition(" at ")[2]
    yield Fact("postgres", f"PostgreSQL {str(shown).split()[0]}, {at}{_shown(measured)}")
    if number // 10_000 < _POSTGRES:
        yield Diagnosis("postgres", f"PostgreSQL is {shown}", "it was not tested with that", "update it to 13 or newer")
    yield from _timeouts({"GOVREDIS_POSTGRES_TIMEOUT": gov.config.postgres_timeout}, measured.round_trip)
    yield from _clock("PostgreSQL", measured)


def of_settings(gov: GovRedis) -> Iterator[Fact | Diagnosis]:
    config = gov.config
    yield Fact("lock folder", gov.locks.folder)
    renewal = config.socket_timeout + config.connect_timeout
    if config.redis_enabled and config.lock_ttl * 2 / 3 <= renewal:
        yield Diagnosis(
            "locks",
            f"REDIS_LOCK_TIMEOUT is {config.lock_ttl:g} s, and a single renewal may take {renewal:g} s",
            "a renewal that times out leaves no time for another, and the lock is lost",
            f"set REDIS_LOCK_TIMEOUT to {3 * renewal:g} or more, or lower GOVREDIS_SOCKET_TIMEOUT",
        )
    if not config.redis_enabled:
        yield Diagnosis("redis", "REDIS_ENABLED is 0", "all features run on their fallbacks", is_fault=False)
    if config.database_url is None:
        yield Diagnosis(
            "postgres",
            "GOVREDIS_DATABASE_URL is not set",
            "while Redis is away limits count in each process, and sessions are known to each process alone",
            "set it, and run `govredis migrate`",
            is_fault=False,
        )


def _timeouts(timeouts: Any, round_trip: float) -> Iterator[Diagnosis]:
    short = [f"{name} ({seconds:g} s)" for name, seconds in timeouts.items() if seconds < _PATIENCE * round_trip]
    if short:
        yield Diagnosis(
            "timeouts",
            f"a round trip takes {round_trip:.2g} s, and {' and '.join(short)} is less than {_PATIENCE} times that",
            "a slow moment is taken for an outage",
            f"set {'them' if len(short) > 1 else 'it'} to {_PATIENCE * round_trip * 2:.1g} or more",
        )


def _clock(server: str, measured: Measured) -> Iterator[Diagnosis]:
    if abs(measured.ahead) - measured.round_trip > _APART:
        side = "ahead of" if measured.ahead > 0 else "behind"
        yield Diagnosis(
            "clocks",
            f"{server}'s clock is {abs(measured.ahead):.1f} s {side} this host's",
            _CLOCKS,
            "have NTP set both, by chrony or systemd-timesyncd for one",
        )


def _persistence(redis: RedisNode, info: dict[str, str]) -> Iterator[Diagnosis]:
    if info.get("aof_enabled") != "0":
        return
    try:
        _, save = redis.call("CONFIG", "GET", "save")
    except (BackendError, ValueError):  # a managed service refuses it
        return
    if save == b"":
        yield Diagnosis(
            "persistence",
            "Redis saves nothing (appendonly no, no save points)",
            "a restart ends all sessions and begins all limits anew; there is no PostgreSQL that has them",
            "set appendonly to yes, or GOVREDIS_DATABASE_URL",
            is_fault=False,
        )


def _info(redis: RedisNode) -> dict[str, str]:
    text = redis.call("INFO").decode(errors="replace")
    return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)


def _shown(measured: Measured) -> str:
    clock = "agrees"
    if abs(measured.ahead) > measured.round_trip:
        clock = f"is {abs(measured.ahead):.2g} s {'ahead' if measured.ahead > 0 else 'behind'}"
    return f": a round trip takes {measured.round_trip * 1000:.2g} ms, its clock {clock}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
