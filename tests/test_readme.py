"""What the README shows is run: every Python block, in order, each `# -> value` compared."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis import Config, configure
from govredis.testing.servers import PostgresServer, RedisServer

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(code: str, names: dict[str, Any]) -> int:
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
    exec(compile(ast.fix_missing_locations(tree), "README.md", "exec"), names)
    assert seen == expected
    return len(seen)


@pytest.fixture
def one_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def test_the_examples_do_what_they_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, postgres_server: PostgresServer, one_redis: RedisServer
) -> None:
    # Once, not on each redis-server: Celery's apps of one process share their tasks.
    monkeypatch.setenv("REDIS_URL", one_redis.url)
    monkeypatch.setenv("GOVREDIS_DATABASE_URL", postgres_server.url)
    monkeypatch.setenv("CELERY_BROKER_URL", one_redis.url)
    monkeypatch.setenv("GOVREDIS_LOCK_FOLDER", str(tmp_path / "locks"))
    for what in ("SOCKET", "CONNECT", "POSTGRES"):  # a busy machine is no outage
        monkeypatch.setenv(f"GOVREDIS_{what}_TIMEOUT", "10")
    configure(None)
    names: dict[str, Any] = {"__name__": "readme"}
    compared = sum(run(block, names) for block in BLOCKS)
    names["gov"].close()
    assert compared == README.read_text().count("# -> ") > 10


def test_every_setting_is_in_the_readme() -> None:
    text = README.read_text()
    variables = [f.metadata["variable"] for f in Config.__dataclass_fields__.values()]
    assert [variable for variable in variables if variable not in text] == []


def test_nothing_is_left_to_be_filled_in() -> None:
    assert not re.search(r"^[A-Z_]+$", README.read_text(), re.MULTILINE)
