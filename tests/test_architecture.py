"""ARCHITECTURE.md's list of promises: each is found by opening at most four files, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
ROWS = [
    [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")]
    for line in TEXT.partition("## Where each promise is kept")[2].splitlines()
    if re.match(r"\| \d", line)
]


def test_every_file_of_a_promise_is_there() -> None:
    paths = [path for _, _, *cells in ROWS for cell in cells for path in cell]
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_a_promise_is_found_in_at_most_four_files_its_test_among_them() -> None:
    assert len(ROWS) > 15
    for number, _, code, script, test in ROWS:
        assert 1 <= len({*code, *script, *test}) <= 4, number
        assert code, number
        assert test, number
        assert all(path.startswith("tests/") for path in test), number
        assert all(path.endswith((".lua", ".sql")) for path in script), number


def test_the_rows_are_numbered() -> None:
    numbers = [int(line.split("|")[1]) for line in TEXT.splitlines() if re.match(r"\| \d", line)]
    assert numbers == list(range(1, len(ROWS) + 1))
