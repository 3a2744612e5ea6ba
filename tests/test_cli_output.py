"""The output of the commands, for programs and for people, and their exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from support import POSTGRES_AWAY, REDIS_AWAY

from govredis import Config, GovRedis, Limit
from govredis._commands._health import _shown
from govredis.cli import main
from govredis.health import Check
from govredis.limits.parked import Arrival
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

ROOT = Path(__file__).parents[1]
MakeGov = Callable[..., GovRedis]
Run = Callable[..., Result]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    patience: dict[str, float],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
) -> Run:
    """Runs a command in this process, under settings of both servers."""
    for field in Config.__dataclass_fields__.values():
        if field.metadata["variable"] is not None:
            monkeypatch.delenv(field.metadata["variable"], raising=False)
    for what in ("SOCKET", "CONNECT", "POSTGRES"):  # a busy machine is no outage
        monkeypatch.setenv(f"GOVREDIS_{what}_TIMEOUT", "10")
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.setenv("GOVREDIS_DATABASE_URL", postgres_server.url)
    monkeypatch.setenv("GOVREDIS_LOCK_FOLDER", str(tmp_path / "locks"))

    def invoke(*args: str, **variables: str) -> Result:
        return CliRunner().invoke(main, args, env=variables)

    return invoke


def commands(group: click.Group = main, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands that do something, with their words."""
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


COMMANDS = dict(commands())


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_each_command_with_its_arguments_and_options() -> None:
    documented = {}
    for row in re.findall(r"^\| (`govredis .*?) \| ", (ROOT / "docs/cli.md").read_text(), re.MULTILINE):
        command, *options = re.findall(r"`(.+?)`", row)
        documented[command] = set(options)
    real = {}
    for path, command in COMMANDS.items():
        context = click.Context(command)
        arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        real[" ".join(("govredis", *path, *arguments))] = {p.opts[-1] for p in options}
    assert documented == real


def test_each_command_that_prints_data_prints_json() -> None:
    without = {path for path, command in COMMANDS.items() if not any(p.name == "as_json" for p in command.params)}
    assert without == {
        ("limits", "reset"),
        ("locks", "release"),
        ("metadata", "invalidate"),
        ("outbox", "watch"),
        ("outbox", "unwatch"),
        ("dashboard",),
        ("demo",),
    }


def test_flask_has_the_same_commands() -> None:
    from govredis.contrib.flask._endpoints import commands as of_flask

    assert {**of_flask.commands, **main.commands}.keys() - of_flask.commands.keys() == {"demo"}
    for name in main.commands.keys() & of_flask.commands.keys():
        assert of_flask.commands[name] is main.commands[name]


# -- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_wrong_command_line_is_2(run: Run, path: tuple[str, ...]) -> None:
    done = run(*path, "--nonsense")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "No such option" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        *(["locks", "show", "{"], ["locks", "release", "{"], ["limits", "show", "{"], ["limits", "reset", "{"]),
        *(["sessions", "show", "{"], ["metadata", "get", "{"], ["metadata", "invalidate", "{"]),
        *(["metadata", "--namespace=a:b", "get", "x"], ["metadata", "--namespace=report", "verify"]),
        *(["outbox", "watch", "t", "c", "--namespace=a:b"], ["doctor", "--acl", "--app=x"], ["doctor", "--app=no.app"]),
    ],
    ids=" ".join,
)
def test_a_name_that_nothing_can_have_is_2(run: Run, args: list[str]) -> None:
    done = run(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "\nError: " in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        *(["migrate"], ["outages"], ["locks"], ["locks", "release", "x"], ["limits", "top"], ["limits", "parked"]),
        *(["limits", "reset", "x"], ["sessions", "show", "x"], ["sessions", "verify"]),
        *(["metadata", "invalidate", "x"], ["metadata", "verify"]),
        *(["outbox", "status"], ["outbox", "watch", "t", "c"], ["outbox", "unwatch", "t"]),
    ],
    ids=" ".join,
)
def test_servers_that_are_away_are_3(run: Run, args: list[str]) -> None:
    done = run(*args, REDIS_URL=REDIS_AWAY, GOVREDIS_DATABASE_URL=POSTGRES_AWAY)
    assert (done.exit_code, done.stdout) == (3, ""), done.output
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize("path", [path for path in COMMANDS if path not in {("demo",), ("doctor",)}], ids=" ".join)
def test_a_wrong_setting_is_3(run: Run, path: tuple[str, ...]) -> None:
    words = [p.name or "" for p in COMMANDS[path].params if isinstance(p, click.Argument)]
    done = run(*path, *words, REDIS_SESSION_TTL="an hour")
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("Error: REDIS_SESSION_TTL is 'an hour'")


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize(
    "args",
    [
        *(["locks", "show", "nobody"], ["limits", "show", "nobody"], ["sessions", "show", "nobody"]),
        ["metadata", "get", "nobody"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_1(run: Run, args: list[str], json_option: list[str]) -> None:
    done = run(*args, *json_option)
    assert (done.exit_code, done.stderr) == (1, "")
    if json_option and args[0] != "limits":
        assert json.loads(done.stdout) is None


def test_differences_are_1(run: Run, make_gov: MakeGov, redis_server: RedisServer) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=os.environ["GOVREDIS_DATABASE_URL"], metadata_staleness=60)
    gov.sessions.bind("s", "a")
    assert json.loads(run("sessions", "verify", "--json").stdout)["differing"] == []
    gov.postgres.fetch("UPDATE @schema@.govredis_sessions SET revoked = true")
    done = run("sessions", "verify", "--json")
    assert (done.exit_code, json.loads(done.stdout)["differing"]) == (1, ["s"])
    gov.agents.create("a")
    assert gov.metadata.get_or_load("a", gov.agents.get)
    same = run("metadata", "verify", "--json")
    assert (same.exit_code, json.loads(same.stdout)) == (0, {"compared": 1, "behind": 0, "stale": []})


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_json_has_all_that_the_tables_have(run: Run, make_gov: MakeGov, redis_server: RedisServer) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=os.environ["GOVREDIS_DATABASE_URL"])

    def data_of(*args: str) -> Any:
        done = run(*args, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert data_of("migrate") == {"applied": []}
    assert data_of("health").keys() == {"status", "time", "checks"}
    assert data_of("locks") == []
    redis_server.command("SET", "lock:outsider", "\x1b[31mred")
    with gov.locks.acquire("a", ttl=60) as held:
        (outsider,) = [lock for lock in data_of("locks") if lock["name"] == "outsider"]
        shown = data_of("locks", "show", "a")
    assert outsider == {
        "name": "outsider", "kind": "lock", "owner": "\x1b[31mred", "token": None, "remaining": None, "degraded": False,
        "since": None,
    }  # fmt: skip
    assert (shown["token"], shown["kind"]) == (held.token, "lock")
    assert 0 < shown["remaining"] <= 60
    ago = datetime.now(timezone.utc) - datetime.fromisoformat(shown["since"])
    assert abs(ago) < timedelta(hours=1), "the token is the time of the grant"

    assert data_of("limits", "top") == []
    for _ in range(3):
        gov.limits.hit("a", "1/hour", operation="kg_store")
    gov.limits.hit("a", Limit(9, 86400, "sliding_window_counter"), operation="kg_store")
    gov.limits.close()
    stats = data_of("limits", "show", "a", "--operation=kg_store")
    assert (stats["backend"], stats["entries"], stats["window"]) == ("redis", 1, 3600)
    assert stats["counters"] == [{"window": 86400, "count": 1}]
    assert data_of("limits", "top") == [{"identity": "a", "operation": "kg_store", "times": 2}]

    assert data_of("limits", "parked") == {"count": 0, "parked": [], "set_aside": []}
    assert gov.internal.parked is not None
    lot = gov.internal.parked.lot("redis://h:6379/0")
    message = {"id": "id-1", "task": "store", "limit": {"identity": "a", "operation": "kg_store"}}
    lot.park(Arrival("id-1"), 1000, json.dumps(message).encode())
    lot.park(Arrival("id-2"), 0, b"\xff")
    lot.put_aside(b"id-2:1", "no queue")
    parked = data_of("limits", "parked")
    assert parked["count"] == 2
    (one,) = [each for each in parked["parked"] if each["id"] == "id-1"]
    assert 0 < one.pop("due") <= 1000
    assert one == {
        "task": "store", "id": "id-1", "identity": "a", "operation": "kg_store", "broker": "redis://h:6379/0"
    }  # fmt: skip
    (aside,) = parked["set_aside"]
    assert (aside["task"], aside["entry"], aside["why"], aside["tries"]) == ("?", "id-2:1", "no queue", 1)
    assert data_of("limits", "parked", "--flush") == {"flushed": 2}

    gov.sessions.bind("s", "agent-1", data={"x": 1})
    session = data_of("sessions", "show", "s")
    assert (session["agent_id"], session["data"], session["bind_count"]) == ("agent-1", {"x": 1}, 1)
    assert session["bound_at"].endswith("+00:00")

    gov.metadata.set("a", {"n": [1, None], "text": "\x7f\x1b"})
    assert data_of("metadata", "get", "a") == {"n": [1, None], "text": "\x7f\x1b"}
    assert run("metadata", "get", "a").stdout.replace("\n", "").isprintable()
    status = data_of("outbox", "status")
    assert [table["column"] for table in status["watched"]] == ["agent_id"]
    assert status["behind"] == {"entries": 0, "oldest": 0.0}


def test_a_check_without_words_shows_its_figures() -> None:
    redis = Check("redis", "pass", "", {"seconds": 0.0012, "used_memory": 8_450_123, "maxclients": 9, "os": "Linux"})
    assert _shown(redis) == "seconds 0.0012, used_memory 8450123"
    keys = Check("keys", "pass", "", {"session": 3, "lock": 0, "ours": {"a.b": 2}, "c.d": 1, "at": "now"})
    assert _shown(keys) == "session 3, lock 0, ours.a.b 2, c.d 1"
    data = {"counts": {"limits.denied": 9}, "hit_ratios": {"minute": {}, "hour": {"agent_meta": 0.97}}}
    assert _shown(Check("counters", "pass", "", data)) == "hit_ratios.hour.agent_meta 0.97"
    less = {**data, "source": "postgres"}
    assert _shown(Check("counters", "pass", "", less)) == "hit_ratios.hour.agent_meta 0.97, as far as postgres knows"
    assert _shown(Check("beat", "warn", "it is late", {"last": 9})) == "it is late"


# -- a terminal ------------------------------------------------------------------------------------------------------


class Screen:
    """A command that runs on a terminal of its own, 60 columns wide."""

    def __init__(self, *args: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "24", **variables}
        command = [sys.executable, "-m", "govredis", *args]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.said = ""

    def read(self, until: str | None = None) -> str:
        """All that it says, to its end or until it has said that."""
        with contextlib.suppress(OSError):  # the terminal ends with the process
            while until is None or until not in self.said:
                some = os.read(self._master, 65536)
                if not some:
                    break
                self.said += some.decode()
        return self.said

    def close(self) -> int:
        code = self.process.wait(120)
        os.close(self._master)
        return code


def test_a_terminal_gets_tables_with_colours_that_fit(run: Run, make_gov: MakeGov, redis_server: RedisServer) -> None:
    name = "[red]" + "n" * 80
    with make_gov(redis_url=redis_server.url).locks.acquire(name, ttl=60):
        screen = Screen("locks", "show", name)
        said = screen.read()
        plain = Screen("locks", "show", name, NO_COLOR="1", TERM="dumb")
        assert "\x1b" not in plain.read()
    assert (screen.close(), plain.close()) == (0, 0)
    assert "\x1b[1mNAME" in said
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()
    assert max(map(len, lines)) <= 60
    assert "[red]" in said, "no markup is read from other people's names"
    without = Screen("locks", "show", uuid.uuid4().hex)
    assert "is not locked" in without.read()
    assert without.close() == 1


def test_health_is_watched_until_ctrl_c(run: Run, redis_server: RedisServer) -> None:
    screen = Screen("health", "--watch", "--every=1")
    screen.read(until="\x1b[H\x1b[2Jpass at ")
    assert "\x1b[32mpass" in screen.read(until="postgres")
    screen.said = ""
    screen.read(until="\x1b[H\x1b[2Jpass at ")  # and again
    screen.process.send_signal(signal.SIGINT)
    screen.read()
    assert screen.close() == 0
    assert "Traceback" not in screen.said
    assert "Aborted" not in screen.said


def test_a_watching_program_gets_a_report_a_line(run: Run) -> None:
    command = [sys.executable, "-m", "govredis", "health", "--watch", "--every=1", "--json"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    reports = [json.loads(watching.stdout.readline()) for _ in range(2)]
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=120)
    assert all({"redis", "postgres"} <= report["checks"].keys() for report in reports)
    assert reports[0]["time"] < reports[1]["time"]
    assert (watching.returncode, errors) == (0, "")


def test_the_shell_completes(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from govredis.cli import main; main(prog_name='govredis')"],
        env={**os.environ, "_GOVREDIS_COMPLETE": "bash_complete", "COMP_WORDS": "govredis locks ", "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert {"plain,show", "plain,release"} <= set(done.stdout.splitlines()), done.stderr
