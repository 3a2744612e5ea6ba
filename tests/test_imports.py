"""The shape of the package: imports run downward, features do not import each other, importing loads no extra."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import govredis

PACKAGE = Path(govredis.__file__).parent

# Each room may import from the rooms of lines above its own.
LEVELS = [
    {"_version", "_boottime", "_clock", "_daemon", "_dsn", "_latch", "_sole", "_uncopied", "errors"},
    {"keys", "_at_once", "_fork", "_redact"},
    {"_redis_urls"},
    {"_parsers"},
    {"config", "_counters", "_exit", "_histogram", "_templates"},
    {"_migrations", "_pool", "_resolver", "_secrets", "breaker"},
    {"_recovery"},
    {"client", "postgres"},
    {"_teller"},
    {"_context"},
    {"outbox"},
    {"sessions", "locks", "limits", "metadata", "events"},
    {"health"},
    {"api", "_acl", "instrumentation"},
    {"_commands"},
    {"contrib", "testing", "__init__"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: n for n, rooms in enumerate(LEVELS) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """The rooms of govredis that a file imports from when it runs, its own excepted."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ["govredis", *parts][: -node.level]
            target = [*base, *(node.module or node.names[0].name).split(".")]
            found.add(target[1])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "govredis":
            found.add([*(node.module or "").split("."), "__init__"][1])
    return found - {parts[0]}


def test_every_room_has_a_level() -> None:
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix in {".py", ""}}
    assert rooms - {"__pycache__", "schema"} <= set(LEVEL)


def test_imports_run_downward() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in PACKAGE.rglob("*.py")
        for other in imports_of(path)
        if LEVEL[other] >= LEVEL[path.relative_to(PACKAGE).with_suffix("").parts[0]]
    ]
    assert not upward


def test_only_client_imports_redis_and_only_postgres_imports_psycopg2() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if room in {"testing", "demo"}:
            continue
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }
        assert "redis" not in names or room == "client", path
        assert "psycopg2" not in names or room == "postgres", path


def test_importing_loads_no_extra() -> None:
    extras = {
        "psycopg2",
        "celery",
        "flask",
        "click",
        "rich",
        "jinja2",
        "fakeredis",
        "opentelemetry",
        "prometheus_client",
    }
    # redis-py loads OpenTelemetry where that is installed.
    code = f"import redis, sys; loaded = set(sys.modules); import govredis; print({extras} & set(sys.modules) - loaded)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in govredis.__all__:
        thing = getattr(govredis, name)
        assert name == "__version__" or thing.__doc__, name
