"""The command `govredis`, as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from support import REDIS_AWAY

from govredis import Config, GovRedis, Limit, LockLost
from govredis.limits.parked import Arrival
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: A busy machine is no outage.
PATIENT = {
    "GOVREDIS_SOCKET_TIMEOUT": "10", "GOVREDIS_CONNECT_TIMEOUT": "10", "GOVREDIS_POSTGRES_TIMEOUT": "20",
}  # fmt: skip


def govredis(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with just these of our variables set, and those of `PATIENT`."""
    ours = {f.metadata["variable"] for f in Config.__dataclass_fields__.values()}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | PATIENT | variables
    command = [os.path.join(os.path.dirname(sys.executable), "govredis"), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


def health(wanted: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`govredis health`; anew where it does not say what is wanted: PostgreSQL has half a second, on a busy machine."""
    for _ in range(10):
        done = govredis("health", "--json", **variables)
        if json.loads(done.stdout)["status"] == wanted:
            break
    return done


@pytest.fixture
def empty_database(postgres_server: PostgresServer) -> Iterator[str]:
    owner = psycopg2.connect(postgres_server.url)
    owner.autocommit = True
    with owner.cursor() as cursor:
        cursor.execute("CREATE DATABASE cli_one")
        yield postgres_server.url.removesuffix("/postgres") + "/cli_one"
        cursor.execute("DROP DATABASE cli_one WITH (FORCE)")
    owner.close()


def test_help_and_version() -> None:
    shown = govredis("--help")
    assert shown.returncode == 0
    for command in ("migrate", "health", "doctor", "demo"):
        assert command in shown.stdout
    assert "0." in govredis("--version").stdout


@pytest.mark.parametrize("group", [(), ("limits",), ("locks",), ("sessions",), ("metadata",), ("outbox",)])
def test_the_lists_of_commands_cut_no_sentence(group: tuple[str, ...]) -> None:
    commands = govredis(*group, "--help", COLUMNS="80").stdout.partition("\nCommands:\n")[2]
    assert commands
    assert "..." not in commands


def test_migrate(empty_database: str) -> None:
    first = govredis("migrate", REDIS_ENABLED="0", GOVREDIS_DATABASE_URL=empty_database)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0] == "applied 0001_limits.sql"
    again = govredis("migrate", REDIS_ENABLED="0", GOVREDIS_DATABASE_URL=empty_database)
    assert (again.returncode, again.stdout, again.stderr) == (0, "up to date\n", "")


def test_health_passes(redis_server: RedisServer, postgres_server: PostgresServer) -> None:
    done = health("pass", REDIS_URL=redis_server.url, GOVREDIS_DATABASE_URL=postgres_server.url, **PATIENT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "pass"
    assert set(report["checks"]) >= {"redis", "postgres"}


def test_health_is_0_on_warn_and_1_on_fail(postgres_server: PostgresServer, empty_database: str) -> None:
    warns = health("warn", REDIS_URL=REDIS_AWAY, GOVREDIS_DATABASE_URL=postgres_server.url)
    assert (json.loads(warns.stdout)["status"], warns.returncode) == ("warn", 0)
    fails = govredis("health", "--json", REDIS_URL=REDIS_AWAY, GOVREDIS_DATABASE_URL=empty_database)
    assert (json.loads(fails.stdout)["status"], fails.returncode) == ("fail", 1)
    assert "Traceback" not in warns.stderr + fails.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "Error: GOVREDIS_DATABASE_URL is not set; it must be postgresql://"),
        ({"REDIS_SESSION_TTL": "an hour"}, "Error: REDIS_SESSION_TTL is 'an hour'; it must be a number of seconds"),
        ({"REDIS_URL": "redis://u:hunter2@h:x"}, "Error: REDIS_URL is 'redis://u:***@h:x'; it must be redis://"),
        (
            {"GOVREDIS_DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/d"},
            "Error: PostgreSQL at 127.0.0.1:1/d is away",
        ),
    ],
)
def test_an_error_is_one_sentence_without_a_traceback(variables: dict[str, str], said: str) -> None:
    done = govredis("migrate", **variables)
    assert done.returncode == 3
    assert done.stderr.startswith(said)
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("option", ["--seconds=10", "--serve"])
def test_the_demo_without_its_extras_prints_the_install_line(option: str) -> None:
    code = "import sys; sys.modules['celery'] = None; from govredis.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "demo", option], capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    assert done.stderr.endswith("the demo needs pip install 'govredis[all,testing]'\n")
    assert done.stderr.count("\n") == 1


def test_without_its_extra_it_prints_the_install_line() -> None:
    code = "import sys; sys.modules['click'] = None; from govredis.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the govredis command needs its extra: pip install 'govredis[cli]'\n"


def test_locks_are_shown_and_released(redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> None:
    where = {"REDIS_URL": redis_server.url}
    assert govredis("locks", **where).stdout == "no locks are held\n"
    gov = make_gov(redis_url=redis_server.url)
    redis_server.command("SET", "lock:outsider", "\x1b[31mred")
    held, reader = gov.locks.acquire("agent-123"), gov.locks.rwlock("report").read()
    while len(gov.locks._redis.call("ZRANGE", "govredis:locks", "0", "-1")) < 2:  # type: ignore[union-attr]
        time.sleep(0.01)
    shown = govredis("locks", **where)
    assert shown.returncode == 0, shown.stderr
    title, *rows = [line.split() for line in shown.stdout.splitlines()]
    assert title == ["NAME", "KIND", "TOKEN", "HELD", "FOR", "ENDS", "IN", "OWNER"]
    assert [row[:3] for row in rows] == [
        ["agent-123", "lock", str(held.token)],
        ["outsider", "lock", "-"],
        ["report", "read", str(reader.token)],
    ]
    one = govredis("locks", "show", "outsider", **where)
    assert one.returncode == 0, one.stderr
    assert one.stdout.splitlines()[1].split() == ["outsider", "lock", "-", "-", "never", r"\x1b[31mred"]
    assert govredis("locks", "release", "agent-123", **where).stdout == "agent-123 is released\n"
    with pytest.raises(LockLost):
        held.extend()
    for command in "show", "release":
        nobody = govredis("locks", command, "agent-123", **where)
        assert (nobody.returncode, nobody.stdout) == (1, "agent-123 is not locked\n")
    bad = govredis("locks", "show", "{", **where)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "\nError: lock name is '{'; it must be" in bad.stderr
    reader.release()
    assert held.release() is False


def test_sessions_are_shown_and_compared(
    redis_server: RedisServer, postgres_server: PostgresServer, make_gov: Callable[..., GovRedis]
) -> None:
    where = {"REDIS_URL": redis_server.url, "GOVREDIS_DATABASE_URL": postgres_server.url, **PATIENT}
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    gov.sessions.bind("s", "agent-1", data={"x": 1})
    gov.sessions.bind("t", "agent-1")
    shown = govredis("sessions", "show", "s", **where)
    assert shown.returncode == 0
    fields = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert (fields["agent"], fields["data"], fields["says"]) == ("agent-1", '{"x": 1}', "redis")
    assert fields["bound"].endswith("1 times")
    redis_server.command("SET", "session:odd", '{"agent_id": "\\u202eder \\u2028"}')
    assert r"agent  \u202eder \u2028" in govredis("sessions", "show", "odd", **where).stdout.splitlines()
    nobody = govredis("sessions", "show", "nobody", **where)
    assert (nobody.returncode, nobody.stdout) == (1, "nobody is bound to nobody\n")
    same = govredis("sessions", "verify", **where)
    assert (same.returncode, same.stdout) == (
        0,
        "3 rows, 3 of them bound; of these 3 in Redis, 0 bound there by others; 0 differ\n",
    )
    gov.postgres.fetch("UPDATE govredis_sessions SET revoked = true WHERE session = 't'")
    differing = govredis("sessions", "verify", **where)
    assert differing.returncode == 1
    assert differing.stdout.splitlines()[1:] == ["t"]
    for sid in ("u", "\u202eder"):
        gov.sessions.bind(sid, "agent-1")
        gov.postgres.fetch("UPDATE govredis_sessions SET revoked = true WHERE agent LIKE '%agent-1'")
    printed = govredis("sessions", "verify", **where).stdout.splitlines()[1:]
    assert sorted(printed) == sorted(["s", "t", "u", r"\u202eder"])
    without = govredis("sessions", "verify", REDIS_URL=redis_server.url, **PATIENT)
    assert without.returncode == 3
    assert "GOVREDIS_DATABASE_URL" in without.stderr


def test_locks_without_redis(make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_enabled=False)
    folder = gov.config.lock_folder or ""
    with gov.locks.acquire("x"):
        shown = govredis("locks", "show", "x", REDIS_ENABLED="0", GOVREDIS_LOCK_FOLDER=folder)
    assert shown.returncode == 0, shown.stderr
    assert "Redis is away: this is read from the lock file" in shown.stdout
    assert govredis("locks", "show", "x", REDIS_ENABLED="0", GOVREDIS_LOCK_FOLDER=folder).returncode == 1
    # Another host may hold it.
    unknown = govredis("locks", "show", "x", "--json", REDIS_URL=REDIS_AWAY, GOVREDIS_LOCK_FOLDER=folder)
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert "Error: no process of this host holds x, and others cannot be asked: " in unknown.stderr
    for command in ["locks"], ["locks", "release", "x"]:
        refused = govredis(*command, REDIS_ENABLED="0")
        assert refused.returncode == 3
        assert refused.stderr.startswith("Error: Redis is disabled")


def test_limits_are_shown_reset_and_listed(redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> None:
    where = {"REDIS_URL": redis_server.url}
    assert govredis("limits", "top", **where).stdout == "nobody was denied\n"
    gov = make_gov(redis_url=redis_server.url)
    # The counter's window is so long that it hardly ever ends between a hit and the look at it.
    rate, counter = "2/hour;2/minute", Limit(5, 86400, algorithm="sliding_window_counter")
    assert [gov.limits.hit("agent-123", rate, operation="kg_store").allowed for _ in range(4)] == [True] * 2 + [
        False
    ] * 2
    gov.limits.hit("agent-123", counter, operation="kg_store", cost=5)
    for _ in range(3):
        gov.limits.hit("b\u202e", "1/hour")
    gov.limits.close()
    shown = govredis("limits", "show", "agent-123", "--operation=kg_store", **where)
    assert shown.returncode == 0, shown.stderr
    title, log, counted, store = [line.split() for line in shown.stdout.splitlines()]
    assert title == ["KIND", "WINDOW", "USED", "OLDEST", "NEWEST"]
    assert (log[:4], log[5:7]) == (["log", "3600", "s", "2"], ["s", "ago"])
    assert float(log[4]) >= float(log[7]) >= 0
    assert counted == ["counter", "86400", "s", "5", "-", "-"]
    assert store == ["in", "redis"]
    top = govredis("limits", "top", "-n", "2", **where).stdout
    assert [line.split() for line in top.splitlines()] == [
        ["DENIED", "IDENTITY", "OPERATION"],
        ["2", r"b\u202e", "default"],
        ["2", "agent-123", "kg_store"],
    ]
    assert len(govredis("limits", "top", "-n", "1", **where).stdout.splitlines()) == 2
    default = "operation 'default' (--operation names another)"
    elsewhere = govredis("limits", "show", "agent-123", **where)
    assert (elsewhere.returncode, elsewhere.stdout) == (1, f"agent-123 has used nothing of {default}, says redis\n")
    assert govredis("limits", "reset", "agent-123", **where).stdout == f"agent-123 is reset for {default}\n"
    assert gov.limits.stats("agent-123", operation="kg_store"), "another operation was reset"
    reset = govredis("limits", "reset", "agent-123", "--operation=kg_store", **where)
    assert reset.stdout == "agent-123 is reset for operation 'kg_store'\n"
    nothing = govredis("limits", "show", "agent-123", "--operation=kg_store", **where)
    assert nothing.returncode == 1
    assert nothing.stdout == "agent-123 has used nothing of operation 'kg_store', says redis\n"
    assert gov.limits.hit("agent-123", rate, operation="kg_store").remaining == 1
    bad = govredis("limits", "show", "{", **where)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "\nError: id is '{'; it must be" in bad.stderr


def test_limits_without_redis(postgres_server: PostgresServer, make_gov: Callable[..., GovRedis]) -> None:
    where = {"REDIS_ENABLED": "0", "GOVREDIS_DATABASE_URL": postgres_server.url}
    make_gov(redis_enabled=False, database_url=postgres_server.url).limits.hit("a", "2/hour")
    shown = govredis("limits", "show", "a", **where)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.endswith("in postgres\n")
    refused = govredis("limits", "top", **where)
    assert refused.returncode == 3
    assert refused.stderr.startswith("Error: Redis is disabled")
    denying = govredis("limits", "show", "a", REDIS_ENABLED="0", GOVREDIS_LIMIT_FALLBACK="deny")
    assert (denying.returncode, denying.stdout) == (3, "")


def test_parked_tasks_are_listed_and_flushed(redis_server: RedisServer, make_gov: Callable[..., GovRedis]) -> None:
    where = {"REDIS_URL": redis_server.url}
    assert govredis("limits", "parked", **where).stdout == "nothing is parked\n"
    gov = make_gov(redis_url=redis_server.url)
    assert gov.internal.parked is not None
    for n, broker in enumerate(("redis://h:6379/0", "amqp://h:5672/", "redis://h:6379/0")):
        limit = {"identity": f"agent-{n}\u202e", "operation": "kg_store"}
        message = json.dumps({"id": f"id-{n}", "task": "store", "limit": limit})
        gov.internal.parked.lot(broker).park(Arrival(f"id-{n}:0.0"), 1000 - n, message.encode())
    title, *lines, more = govredis("limits", "parked", "-n", "2", **where).stdout.splitlines()
    assert title.split() == ["DUE", "IN", "TASK", "ID", "IDENTITY", "OPERATION", "BROKER"]
    assert [line.split()[2:] for line in lines] == [
        ["store", "id-2", "agent-2\\u202e", "kg_store", "redis://h:6379/0"],
        ["store", "id-1", "agent-1\\u202e", "kg_store", "amqp://h:5672/"],
    ]
    assert 900 < float(lines[0].split()[0]) < 999
    assert more == "and 1 more"
    assert govredis("limits", "parked", "--flush", **where).stdout == "3 will be published now\n"
    assert [due for due, _ in gov.internal.parked.lot("redis://h:6379/0").first(9)] == [0, 0]


def test_a_task_that_cannot_be_published_is_listed_with_the_reason(
    redis_server: RedisServer, make_gov: Callable[..., GovRedis]
) -> None:
    gov = make_gov(redis_url=redis_server.url)
    assert gov.internal.parked is not None
    lot = gov.internal.parked.lot("redis://h:6379/0")
    limit = {"identity": "agent", "operation": "kg_store"}
    poisons = [b"\xff", b"[]", b"[" * 100_000, b'{"limit": 5}', b'{"task": 7, "id": []}']
    for n, message in enumerate([json.dumps({"id": "id", "task": "store", "limit": limit}).encode(), *poisons]):
        lot.park(Arrival(f"run-{n}"), 0, message)
        lot.put_aside(b"run-%d:1" % n, "no queue\x1b[2J of that name")
    shown = govredis("limits", "parked", REDIS_URL=redis_server.url)
    assert shown.returncode == 0, shown.stderr
    waiting, aside = shown.stdout.split("\n\ncannot be published, and set aside:\n")
    assert len(waiting.splitlines()) == 7
    title, *lines = aside.splitlines()
    assert title.split() == ["AGAIN", "IN", "TRIES", "TASK", "ENTRY", "WHY"]
    assert sorted(line.split(maxsplit=3)[2:] for line in lines)[0][0] == "1"
    assert {line.split()[4] for line in lines} == {f"run-{n}:1" for n in range(6)}
    assert {line.split()[3] for line in lines} == {"store", "?"}
    assert all(line.endswith("no queue\\x1b[2J of that name") for line in lines)
