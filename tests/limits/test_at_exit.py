"""A process that ends tells the servers then: the denials of its last second, and the admissions to replicate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from support import redis_of

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

#: Takes long only when something is broken.
PATIENCE = 120

# Nothing but the end of the process tells anything.
_SCRIPT = """
import json, os, sys
settings, how = json.loads(sys.argv[1])
from govredis import Config, GovRedis
from govredis import _teller
_teller.INTERVAL = 3600
gov = GovRedis(Config(limit_deny_cache=False, limit_mirror=3600, **settings))

def work(gov):
    _teller.INTERVAL = 3600
    assert gov.limits.hit("a", "1/hour", operation=f"op{os.getpid()}")
    for _ in range(3):
        assert not gov.limits.hit("a", "1/hour", operation=f"op{os.getpid()}")

def work_anew(settings):
    work(GovRedis(Config(limit_deny_cache=False, limit_mirror=3600, **settings)))

def forked(fork):
    if not fork():
        work(gov)
        sys.exit(0)
    assert os.wait()[1] == 0

if __name__ == "__main__":
    if how == "after its last line":
        work(gov)
    elif how == "sys.exit":
        work(gov)
        sys.exit(0)
    elif how == "an exception":
        work(gov)
        raise SystemError("that nobody catches")
    elif how == "closed":
        work(gov)
        gov.close()
    elif how == "os.fork":
        gov.limits.peek("a", "1/hour")
        forked(os.fork)
    elif how == "a fork in C":
        import ctypes
        gov.limits.peek("a", "1/hour")
        forked(ctypes.PyDLL(None).fork)
    elif how == "hung":
        gov.limits.hit("a", "1/hour")
        gov.limits.hit("a", "1/hour")
        print("hit", flush=True)
        sys.stdin.readline()
    else:
        import multiprocessing
        method, whose = how.split(", ")
        context = multiprocessing.get_context(method)
        if whose == "the parent's":
            work_in, what = work, gov
        else:
            work_in, what = work_anew, settings
        child = context.Process(target=work_in, args=(what,))
        child.start()
        child.join()
        assert child.exitcode == 0
"""


def start(tmp_path: Any, how: str, **settings: Any) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"  # a file, which spawned children import
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), json.dumps([settings, how])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "how",
    [
        "after its last line",
        "sys.exit",
        "an exception",
        "closed",
        "os.fork",
        "a fork in C",
        "fork, the parent's",
        "fork, its own",
        "spawn, its own",
        "forkserver, its own",
    ],
)
def test_pending_denials_and_admissions_are_told(
    gov: GovRedis, redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Any, how: str
) -> None:
    settings = {"redis_url": redis_server.url, "database_url": postgres_server.url, "socket_timeout": 20}
    process = start(tmp_path, how, **settings)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == (1 if how == "an exception" else 0), errors
    assert ("SystemError: that nobody catches" in errors) == (how == "an exception")
    (denied,) = gov.limits.most_denied()
    assert (denied.identity, denied.times) == ("a", 3), "once each"
    assert gov.postgres.fetch("SELECT key, cardinality(entries) FROM govredis_limit_windows") == [
        (f"rate_limit:{denied.operation}:a", 1)
    ]


def test_a_redis_that_hangs_keeps_nobody(
    make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer, tmp_path: Any
) -> None:
    """Whatever the timeouts are; and PostgreSQL is told meanwhile."""
    settings = {"redis_url": mortal_redis.url, "database_url": postgres_server.url, "socket_timeout": 3600}
    process = start(tmp_path, "hung", **settings)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "hit\n"
    mortal_redis.pause()
    try:
        _, errors = process.communicate("\n", timeout=PATIENCE)
        assert (process.returncode, errors) == (0, "")
    finally:
        mortal_redis.resume()
    gov = make_gov(redis_enabled=False, database_url=postgres_server.url)
    assert gov.limits.get_count("a", 3600) == 1


def test_a_process_with_nothing_pending_starts_no_thread(tmp_path: Any) -> None:
    code = """
import threading
from govredis import Config, GovRedis
gov = GovRedis(Config(redis_url="redis://127.0.0.1:1/0"))
threading.Thread.start = lambda thread: print("started", thread.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_denials_are_told_where_no_thread_starts_too(gov: GovRedis, redis_server: RedisServer) -> None:
    code = f"""
import threading
from govredis import Config, GovRedis
gov = GovRedis(Config(redis_url="{redis_server.url}", socket_timeout=20))
def refuse(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
gov.limits.hit("a", "1/hour"), gov.limits.hit("a", "1/hour")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(one.identity, one.times) for one in gov.limits.most_denied()] == [("a", 1)]


def test_denials_on_their_way_are_waited_for(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
    """A thread of a process that ends is stopped where it is."""
    import threading

    gov = make_gov(redis_url=redis_server.url)
    counts, teller = gov.limits._decider.denied_counts, gov.internal.context.teller
    pipeline, sent, go = redis_of(gov).pipeline, threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> Any:
        sent.set()
        assert go.wait(PATIENCE)
        return pipeline(*args, **options)

    redis_of(gov).pipeline = slowly  # type: ignore[method-assign]
    counts.add("a", "default")
    thread = threading.Thread(target=teller.flush)
    thread.start()
    assert sent.wait(PATIENCE)
    assert counts.has_pending()
    settling = threading.Thread(target=teller.write_pending)
    settling.start()
    go.set()
    settling.join(PATIENCE)
    assert [one.times for one in gov.limits.most_denied()] == [1]
    thread.join(PATIENCE)
    assert not counts.has_pending()


def test_a_child_that_alone_has_heard_of_us(gov: GovRedis, redis_server: RedisServer) -> None:
    """A child that multiprocessing forked before it imports this library."""
    code = f"""
import multiprocessing

def work():
    from govredis import Config, GovRedis
    from govredis import _teller
    _teller.INTERVAL = 3600
    gov = GovRedis(Config(redis_url="{redis_server.url}", socket_timeout=20))
    gov.limits.hit("a", "1/hour"), gov.limits.hit("a", "1/hour")

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
assert child.exitcode == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(one.identity, one.times) for one in gov.limits.most_denied()] == [("a", 1)]
