"""The account over processes that are killed, and in a Redis that hangs under load: totals and records are right."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, eventually

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.one_redis, pytest.mark.once]

#: Each process notes in its file what it was told to have told, and prints at its end what it has done.
_WORK = """
import json, os, sys, time
from govredis import Config, GovRedis
settings, path, stop = json.loads(sys.argv[1])
gov = GovRedis(Config(limit_deny_cache=False, **settings))
account, notes = gov.internal.account, open(path, "a", buffering=1)
told = account.told

def note(replies):
    told(replies)
    notes.write(f"{account._told_counts.get('limits.allowed', 0)}\\n")

account.told = note
n = 0
while not os.path.exists(stop):
    n += 1
    gov.limits.hit(f"id{n % 50}", "1000000/hour")
    time.sleep(0.001)
print(gov.counters.get("limits.allowed"), gov.counters.get("limits.degraded.postgres"))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def begin(name: str, **settings: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WORK, json.dumps([settings, str(tmp_path / name), str(tmp_path / "stop")])]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def told(folder: Path, name: str) -> int:
    """The hits that the process knows to have told."""
    lines = (folder / name).read_text().split("\n") if (folder / name).exists() else []
    return int(lines[-2]) if len(lines) > 1 else 0


def test_totals_are_the_sum_of_what_each_had_told(
    start: Callable[..., subprocess.Popen[str]],
    gov: GovRedis,
    redis_server: RedisServer,
    plain_redis: Any,
    tmp_path: Path,
) -> None:
    settings = {"redis_url": redis_server.url, "socket_timeout": 60, "connect_timeout": 60}
    killed = [start(f"killed{n}", **settings) for n in range(2)]
    living = [start(f"living{n}", **settings) for n in range(2)]
    for n, process in enumerate(killed):
        eventually(lambda n=n: told(tmp_path, f"killed{n}") > 0)  # type: ignore[misc]
        process.kill()
        process.wait(PATIENCE)
    (tmp_path / "stop").touch()
    done = [int(process.communicate(timeout=PATIENCE)[0].split()[0]) for process in living]
    of_killed = [told(tmp_path, f"killed{n}") for n in range(2)]
    totals = gov.internal.account.totals().counts["limits.allowed"]
    # A call may have arrived whose answer did not: then the totals have more than the process knew.
    made = sum(plain_redis.zcard(key) for key in plain_redis.keys("rate_limit:default:*"))
    assert sum(done) + sum(of_killed) <= totals <= made


def test_a_redis_that_hangs_under_load_is_one_record_and_no_count_is_lost(
    start: Callable[..., subprocess.Popen[str]],
    make_gov: Callable[..., GovRedis],
    mortal_redis: RedisServer,
    postgres_server: PostgresServer,
    tmp_path: Path,
) -> None:
    settings = {"redis_url": mortal_redis.url, "database_url": postgres_server.url, "socket_timeout": 1}
    processes = [start(f"worker{n}", **settings) for n in range(2)]
    for n in range(2):
        eventually(lambda n=n: told(tmp_path, f"worker{n}") > 0)  # type: ignore[misc]
    gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url)
    began = datetime.now(timezone.utc)
    mortal_redis.pause()
    try:
        rows = "SELECT process FROM govredis_account WHERE process <> '' GROUP BY process"
        eventually(lambda: len(gov.postgres.fetch(rows)) >= 2, what="both wrote to PostgreSQL")
    finally:
        mortal_redis.resume()
    ended = datetime.now(timezone.utc)
    before = [told(tmp_path, f"worker{n}") for n in range(2)]
    eventually(lambda: all(told(tmp_path, f"worker{n}") > before[n] for n in range(2)), what="both told Redis again")
    (tmp_path / "stop").touch()
    done = [tuple(map(int, process.communicate(timeout=PATIENCE)[0].split())) for process in processes]
    totals = gov.internal.account.totals()
    assert totals.counts["limits.allowed"] == sum(allowed for allowed, _ in done)
    assert totals.counts["limits.degraded.postgres"] == sum(degraded for _, degraded in done) > 0
    found = gov.internal.account.outages(began - timedelta(seconds=60), ended + timedelta(seconds=60))
    outage = next(each for each in found if each.ended is None or each.ended >= ended - timedelta(seconds=1))
    assert (outage.server, outage.kind) == ("redis", "hung")
    assert began <= outage.began <= ended
    assert outage.slowest >= 1
    assert 0 < sum(each.served for each in found) <= totals.counts["limits.degraded.postgres"]
    assert totals.counts["outages.redis"] == len(found)


def test_a_destructor_that_counts_at_the_interpreters_end_holds_nobody_up(redis_server: RedisServer) -> None:
    program = f"""
from govredis import Config, GovRedis

class Counting:
    def __init__(self, gov):
        self.gov = gov

    def __del__(self):
        self.gov.counters.add("test.end")
        print("counted")

counting = Counting(GovRedis(Config(redis_url="{redis_server.url}")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("counted\n", "", 0)
