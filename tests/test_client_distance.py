"""RedisNode far away from Redis: a round trip takes longer than its timeouts, and that is said."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from delaying_proxy import DelayingProxy
from support import PATIENCE, redis_of, wait_at_most

from govredis import BackendUnavailable, GovRedis
from govredis.client import RedisNode
from govredis.client import node as client_module
from govredis.client.distance import Distance
from govredis.testing.servers import RedisServer

MakeGov = Callable[..., GovRedis]
Eventually = Callable[..., Any]

#: The defaults.
SHORT = {"socket_timeout": 0.2, "connect_timeout": 0.1}
PROBLEM = (
    r"a round trip takes \d\.\d+ s, longer than GOVREDIS_CONNECT_TIMEOUT \(0\.1 s\) and"
    r" GOVREDIS_SOCKET_TIMEOUT \(0\.2 s\): raise both, to \d(\.\d)? s say"
)


@pytest.fixture
def far(redis_server: RedisServer) -> Iterator[DelayingProxy]:
    with DelayingProxy(redis_server.port) as proxy:
        proxy.seconds = 0.25
        yield proxy


def works(client: RedisNode) -> bool:
    try:
        return bool(client.call("SET", "k", "v") == b"OK")
    except BackendUnavailable:
        return False


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "govredis" and r.levelno == logging.WARNING]


def test_health_and_the_log_say_so_once(
    far: DelayingProxy, make_gov: MakeGov, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    gov = make_gov(redis_url=far.url, **SHORT)
    client = redis_of(gov)
    assert client is not None
    assert not works(client)
    eventually(lambda: len(warnings(caplog)) == 2)
    assert re.fullmatch(PROBLEM, client.distance.problem)
    away, too_far = warnings(caplog)
    assert away.startswith(f"{client.name} is away (")
    assert too_far == f"{client.name} is too far away: {client.distance.problem}"
    redis = gov.health.check().checks[0]
    assert redis.output.startswith(f"{client.name} is away: ")
    assert f": {client.distance.problem}; fallbacks are in use" in redis.output
    # It is back, and away again: it need not be said again.
    far.seconds = 0
    eventually(lambda: client.breaker.closed)
    assert client.distance.problem == ""
    far.seconds = 0.25
    eventually(lambda: not works(client) and client.distance.problem)
    assert [line for line in warnings(caplog) if "too far" in line] == [too_far]


def test_with_the_timeouts_that_it_names_it_works(far: DelayingProxy, make_gov: MakeGov) -> None:
    client = redis_of(make_gov(redis_url=far.url, socket_timeout=30))
    assert client is not None
    client.distance = Distance("Redis", {"A": 0.1, "B": 0.2, "C": 30}, client._measure)
    client.distance.ask()
    problem = r"a round trip takes (\S+) s, longer than A \(0.1 s\) and B \(0.2 s\): raise both, to (\S+) s say"
    found = re.fullmatch(problem, client.distance.problem)
    assert found
    assert 0.25 <= float(found[1]) < float(found[2])
    assert works(client)


def test_doctor_says_so_at_once(far: DelayingProxy, tmp_path: Path) -> None:
    variables = {"REDIS_URL": far.url, "GOVREDIS_LOCK_FOLDER": str(tmp_path)}
    tmp_path.chmod(0o700)
    code = "from govredis.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 1, done.stderr
    assert re.search(rf"^redis: .*{PROBLEM}", done.stdout, re.MULTILINE), done.stdout


def test_a_server_that_hangs_is_not_far_away(
    mortal_redis: RedisServer, make_gov: MakeGov, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It waits for as long as this test lets Redis hang, and a stall of the machine besides.
    monkeypatch.setattr(client_module, "_PATIENCE", PATIENCE)
    client = redis_of(make_gov(redis_url=mortal_redis.url))
    asked: list[float | None] = []
    measure = client.distance._measure
    threads: list[int] = []

    def noted() -> float:
        asked.append(None)
        threads.append(sum(thread.name == "govredis-distance" for thread in threading.enumerate()))
        asked[-1] = measure()
        return asked[-1]

    client.distance._measure = noted
    probes: list[int] = []
    probe = client.breaker._probe
    client.breaker._probe = lambda: probes.append(1) or probe()  # type: ignore[func-returns-value]
    mortal_redis.pause()
    assert not works(client)
    eventually(lambda: len(probes) > 2)
    assert asked == [None], "it waits, and the probe goes on"
    wait_at_most(client, PATIENCE)
    mortal_redis.resume()
    eventually(lambda: works(client))
    eventually(lambda: asked[0] is not None)
    assert asked[0] is not None
    assert asked[0] < 1, "the time for which it hung is none of the way"
    assert client.distance.problem == ""
    assert threads == [1]


@pytest.mark.parametrize(
    ("seconds", "problem"),
    [
        (0.04, ""),
        (0.14, "a round trip takes 0.14 s, longer than CONNECT (0.1 s): raise it, to 0.4 s say"),
        (0.3, "a round trip takes 0.3 s, longer than CONNECT (0.1 s) and SOCKET (0.2 s): raise both, to 0.9 s say"),
        (None, ""),
    ],
)
def test_a_timeout_that_is_too_short_is_named(
    seconds: float | None, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    def measure() -> float:
        if seconds is None:
            raise BackendUnavailable("it is away")
        return seconds

    distance = Distance("Redis at h:1", {"CONNECT": 0.1, "SOCKET": 0.2}, measure)
    for _ in range(2):
        distance.ask()
        assert distance.problem == problem
    assert warnings(caplog) == ([f"Redis at h:1 is too far away: {problem}"] if problem else [])
    distance.forget()
    assert distance.problem == ""


def test_distance_is_not_asked_where_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    distance = Distance("Redis at h:1", {"SOCKET": 0.2}, lambda: pytest.fail("asked"))
    distance.ask_soon()
    assert distance.problem == ""
