"""`govredis history` and `govredis outages`: what was, for people and for programs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest
from click.testing import CliRunner, Result

from govredis import GovRedis
from govredis._commands._history import _row
from govredis.breaker import OutageNote
from govredis.cli import main
from govredis.health import HistoryPoint
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer) -> Callable[..., Result]:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.delenv("GOVREDIS_DATABASE_URL", raising=False)
    for what in ("SOCKET", "CONNECT"):  # a busy machine is no outage
        monkeypatch.setenv(f"GOVREDIS_{what}_TIMEOUT", "10")
    return lambda *args: CliRunner().invoke(main, args)


@pytest.fixture
def history(run: Callable[..., Result]) -> Callable[..., Result]:
    return lambda *args: run("history", *args)


def test_no_snapshot_is_1(history: Callable[..., Result]) -> None:
    none = history()
    assert (none.exit_code, none.stdout) == (
        1, "no snapshot was kept in this time: does beat run govredis.health_snapshot?\n"
    )  # fmt: skip
    empty = history("--json")
    assert (empty.exit_code, json.loads(empty.stdout)) == (1, [])


def test_points_and_their_values(
    history: Callable[..., Result], make_gov: Callable[..., GovRedis], redis_server: RedisServer
) -> None:
    assert make_gov(redis_url=redis_server.url).health.snapshot().stored == "redis"
    redis_server.command("CONFIG", "SET", "maxmemory", "100mb")
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        assert make_gov(redis_url=redis_server.url).health.snapshot().stored == "redis"
    finally:
        redis_server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        redis_server.command("CONFIG", "SET", "maxmemory", "0")
    data = history("--since=2d", "--points=1", "--json")
    assert data.exit_code == 0, data.output
    (point,) = json.loads(data.stdout)
    assert point["status"] == "warn"
    assert datetime.fromisoformat(point["at"]).tzinfo is not None
    assert point["values"]["redis.used_memory"] > 0
    chosen = json.loads(history("--json", "--value=redis.used_memory", "--value=eviction.").stdout)
    assert {name for each in chosen for name in each["values"]} == {"redis.used_memory", "eviction.maxmemory"}
    assert "\nno value begins with 'redis.memory'" in history("--value=redis.memory", "--value=redis.keys").stdout
    assert "no value" not in history("--value=redis.keys").stdout
    shown = history("--points=1").stdout
    assert shown.startswith("1 point from ")
    assert re.search(r"^AT +STATUS\n\S+ \S+ +warn$", shown, re.MULTILINE)
    assert re.search(r"^redis\.used_memory +\S+ +\S+ +\S+ +▁$", shown, re.MULTILINE)
    since = (datetime.now(timezone.utc) + timedelta(days=1)).isoformat()
    later = history(f"--since={since}", f"--until={since.replace('+00:00', 'Z')}")
    assert later.exit_code in (1, 2), later.output


def test_a_course_is_drawn() -> None:
    at = datetime.now(timezone.utc)
    values: list[dict[str, float]] = [{"n": 0.0}, {"n": 7.0}, {}, {"n": 3.5}]
    points = [HistoryPoint(at, "pass", each) for each in values]
    assert _row("n", points) == ("n", "0", "7", "3.5", "▁█·▅")


@pytest.mark.parametrize("wrong", ["5", "5w", "999999d", "2026-11-30T10:00:00", "yesterday"])
def test_a_time_without_its_zone_is_refused(history: Callable[..., Result], wrong: str) -> None:
    done = history(f"--since={wrong}")
    assert done.exit_code == 2
    assert f"{wrong!r} must be a time ago, as 90m, 24h or 2d, or ISO 8601 with its zone" in done.stderr


def test_outages_and_their_cost(
    run: Callable[..., Result], make_gov: Callable[..., GovRedis], redis_server: RedisServer
) -> None:
    assert run("outages").stdout == "no outage was noticed in this time\n"
    gov, now = make_gov(redis_url=redis_server.url), time.time()
    for began, ended in (now - 7200, now - 7180), (now - 60, None):
        note = OutageNote(began, "hung", slowest=0.2)
        gov.internal.account._log._note("redis", note)
        gov.counters.add("limits.degraded.local", 3)
        note.ended = ended
        gov.internal.account.flush()
    shown = run("outages")
    assert shown.exit_code == 0, shown.output
    title, first, second = shown.stdout.splitlines()
    assert title.split() == ["SERVER", "BEGAN", "LASTED", "KIND", "SERVED", "SLOWEST", "NOTICED", "BY"]
    server, _, *cells, noticed_by = re.split("  +", first)
    assert (server, cells) == ("redis", ["20.0 s", "hung", "3", "0.200 s"])
    assert noticed_by.startswith(gov.internal.account._log.records("p")[0][1].noticed_by.split(":")[0])
    assert re.search(r"  \d+\.\d s, and it goes on  hung  3 ", second)
    assert shown.stderr == ""
    (late,) = json.loads(run("outages", "--since=1h", "--json").stdout)
    assert (late["server"], late["ended"], late["served"], late["slowest"]) == ("redis", None, 3, 0.2)
    (early,) = json.loads(run("outages", "--since=3h", "--until=1h", "--json").stdout)
    assert datetime.fromisoformat(early["ended"]) - datetime.fromisoformat(early["began"]) == timedelta(seconds=20)


def test_outages_of_others_while_redis_is_away(
    run: Callable[..., Result],
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gov, now = make_gov(redis_url=redis_server.url, database_url=postgres_server.url), time.time()
    note = OutageNote(now - 90, "hung")
    gov.internal.account._log._note("redis", note)
    note.ended = now - 80
    gov.internal.account.flush()
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    unknown = run("outages")
    assert (unknown.exit_code, unknown.stdout) == (3, ""), "and no list that lacks those of others"
    monkeypatch.setenv("GOVREDIS_DATABASE_URL", postgres_server.url)
    monkeypatch.setenv("GOVREDIS_POSTGRES_TIMEOUT", "10")
    shown = run("outages", "--json")
    assert shown.exit_code == 0, shown.output
    assert [each["kind"] for each in json.loads(shown.stdout)] == ["hung", "refused"]
    assert shown.stderr.endswith("Redis is away: outages are shown as far as PostgreSQL knows them\n")
