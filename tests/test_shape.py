"""The shape of the sources: a class name means one class, and a file is short enough to be read at once."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import govredis

SOURCES = sorted(Path(govredis.__file__).parent.rglob("*.py"))
EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST = 400


def test_no_two_classes_share_a_name() -> None:
    names = Counter(
        node.name.lstrip("_")
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []


def test_the_examples_are_short() -> None:
    def lines_in(app: str) -> int:
        return sum(len(path.read_text().splitlines()) for path in (EXAMPLES / app).rglob("*.py"))

    assert 0 < lines_in("shop") <= 150
    assert 0 < lines_in("mailer") <= 100


def test_no_file_is_long() -> None:
    assert [path for path in SOURCES if len(path.read_text().splitlines()) > LONGEST] == []
