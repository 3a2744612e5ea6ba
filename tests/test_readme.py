"""The examples of README.md and docs/ are run: every Python block of a page, in order, each `# -> value` compared.

A block whose first line names a file or a terminal is saved or typed instead (`tests/terminals.py`), commands too.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import pytest
from terminals import Reader

from govredis import Config, GovRedis, configure
from govredis.cli import main
from govredis.testing._base_server import free_port
from govredis.testing.servers import PostgresServer, RedisServer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"
PYTEST_COMMANDS = re.findall(r"^\S+ -m pytest .*$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def run(code: str, names: dict[str, Any], page: Path) -> int:
    """Run a block; an expression whose line ends in `# -> value` must have that repr. Returns how many had one."""
    expected = {n: line.partition("# -> ")[2].strip() for n, line in enumerate(code.splitlines(), 1) if "# -> " in line}
    seen: dict[int, str] = {}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and node.end_lineno in expected:
            note = ast.parse(f"_note({node.end_lineno}, 0)", mode="eval").body
            assert isinstance(note, ast.Call)
            note.args[1] = node.value
            node.value = ast.copy_location(note, node)
    names["_note"] = lambda line, value: seen.__setitem__(line, repr(value))
    exec(compile(ast.fix_missing_locations(tree), page.name, "exec"), names)
    assert seen == expected
    return len(seen)


@pytest.fixture
def one_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL], ids=lambda page: page.name)
def test_the_examples_do_what_they_say(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    postgres_server: PostgresServer,
    one_redis: RedisServer,
    page: Path,
) -> None:
    # Once, not on each redis-server: Celery's apps of one process share their tasks.
    monkeypatch.setenv("REDIS_URL", one_redis.url)
    monkeypatch.setenv("GOVREDIS_DATABASE_URL", postgres_server.url)
    monkeypatch.setenv("CELERY_BROKER_URL", one_redis.url)
    monkeypatch.setenv("GOVREDIS_LOCK_FOLDER", str(tmp_path / "locks"))
    for what in ("SOCKET", "CONNECT", "POSTGRES"):  # a busy machine is no outage
        monkeypatch.setenv(f"GOVREDIS_{what}_TIMEOUT", "10")
    with GovRedis.from_env() as deploying:
        deploying.postgres.migrate()
    compared = run_page(page)
    assert compared > 10 or page != README
    assert "`delay` blocks" not in caplog.text  # our own warning, of a setting that the example would lack


@pytest.mark.parametrize("name", ["limits", "locks", "sessions", "health", "flask"])
def test_the_examples_need_no_postgres(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_redis: RedisServer, name: str
) -> None:
    monkeypatch.setenv("REDIS_URL", one_redis.url)
    monkeypatch.delenv("GOVREDIS_DATABASE_URL", raising=False)
    monkeypatch.setenv("GOVREDIS_LOCK_FOLDER", str(tmp_path / "locks"))
    for what in ("SOCKET", "CONNECT"):
        monkeypatch.setenv(f"GOVREDIS_{what}_TIMEOUT", "10")
    run_page(ROOT / f"docs/{name}.md")


@pytest.fixture
def port() -> int:
    """The one of the tutorial's site."""
    return free_port()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int) -> Iterator[Reader]:
    """Somebody with a wheel and an empty folder, and with pip, which finds all that the extras need installed."""
    source, folder, programs = tmp_path / "source", tmp_path / "reader", tmp_path / "bin"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, source, ignore=ignored)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(wheel, check=True)
    folder.mkdir()
    programs.mkdir()
    # The programs that pip would put into the venv together with the packages.
    for name, runs in ("python3", sys.executable), ("flask", "python -m flask"), ("celery", "python -m celery"):
        (programs / name).write_text(f'#!/bin/sh\nexec {runs} "$@"\n')
        (programs / name).chmod(0o755)
    for name in ("REDIS_URL", "GOVREDIS_DATABASE_URL", "CELERY_BROKER_URL", "GOVREDIS_PARKING_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOVREDIS_LOCK_FOLDER", str(tmp_path / "locks"))
    for what in ("SOCKET", "CONNECT", "POSTGRES"):  # a busy machine is no outage
        monkeypatch.setenv(f"GOVREDIS_{what}_TIMEOUT", "10")
    monkeypatch.setenv("GOVREDIS_METADATA_STALENESS", "60")
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PYTHONUNBUFFERED": "1",
        "PIP_NO_INDEX": "1",
        "FLASK_RUN_PORT": str(port),
        "no_proxy": "localhost",
    }
    typing = Reader(folder, environment)
    yield typing
    typing.close()


@pytest.mark.once
def test_the_tutorial_leads_from_an_empty_folder_through_an_outage(
    reader: Reader, tmp_path: Path, port: int, system_binary: Callable[[str], str]
) -> None:
    system_binary("curl")
    (wheel,) = tmp_path.glob("*.whl")
    own = {"/path/to/checkout": str(wheel), ":5000": f":{port}", 'timeout": 1': 'timeout": 30'}
    assert run_page(TUTORIAL, reader, own) > 30


def run_page(page: Path, reader: Reader | None = None, own: Mapping[str, str] = MappingProxyType({})) -> int:
    """Run all examples of a page. Returns how many values were compared: all that it names. `own`: what this reader
    has in the place of words of the page."""
    text = page.read_text()
    for word, replacement in own.items():
        text = text.replace(word, replacement)
    names: dict[str, Any] = {"__name__": page.stem}
    configure(None)
    try:
        compared = 0
        for language, block in re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            shown = reader.take(language, block) if reader else None
            if shown is None and language == "python":
                shown = run(block, names, page)
            compared += shown or 0
    finally:
        if "gov" in names:
            names["gov"].close()
    assert compared == text.count("# -> ")
    return compared


def test_every_setting_is_documented_with_its_field() -> None:
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| ([^|]+) \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    documented = {}
    for variables, names in rows:
        documented |= dict(zip(re.findall(r"\w+", names), re.findall(r"\w+", variables), strict=True))
    assert documented == {
        f.name: f.metadata["variable"]
        for f in Config.__dataclass_fields__.values()
        if f.metadata["variable"] is not None
    }


def test_every_setting_without_a_row_is_named() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    names = [f.metadata["variable"] or f.name for f in Config.__dataclass_fields__.values()]
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize("command", PYTEST_COMMANDS)
def test_a_pytest_command_of_contributing_selects_tests(command: str) -> None:
    python, *words = shlex.split(command, comments=True)
    assert python == ".venv/bin/python"
    collected = subprocess.run(
        [sys.executable, *words, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr  # pytest exits with 5 if it selects nothing


def commands_of(group: click.Group, name: str) -> Iterator[str]:
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{name} {word}")
        else:
            yield f"{name} {word}"


def test_every_command_is_documented_and_no_other() -> None:
    documented = re.findall(r"^\| `(govredis [a-z ]*[a-z])", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    assert set(documented) - {"govredis locks"} == set(commands_of(main, "govredis"))


def test_the_readme_takes_ten_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 200
    assert len(README.read_text().split()) <= 900
    examples = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert max(len(re.findall(r"(?m)^.*\S", example)) for example in examples) <= 10  # lines that say something


def test_the_readmes_three_figures_are_those_of_the_page() -> None:
    table = README.read_text().partition("## Three figures")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == 3
    measured = (ROOT / "docs/performance.md").read_text()
    for row in rows:
        figures = re.findall(r"\d[\d,.]*\d \([\d,.]+ to [\d,.]+\)|\d[\d,.]*\d(?= \||, as)", row)
        assert len(figures) >= 2, row
        assert [figure for figure in figures if figure not in measured] == []


QUESTIONS = re.findall(
    r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/questions.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_there_are_twenty_questions() -> None:
    assert len({question for question, _ in QUESTIONS}) == 20
    assert all(question.endswith("?") for question, _ in QUESTIONS)


@pytest.mark.parametrize(("question", "answer"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_a_question_is_answered_in_four_sentences_with_a_link(question: str, answer: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", answer, flags=re.MULTILINE | re.DOTALL)
    assert 1 <= len(re.findall(r"[.!?](?=\s|$)", prose)) <= 4
    assert re.search(r"\]\([a-z-]+\.md", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.search(r"^[A-Z_]+$", page.read_text(), re.MULTILINE)
