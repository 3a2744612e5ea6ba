"""The bench in its quick form, to see that each part works; and the pages, which have the committed report's figures.

Nothing here asks how fast anything is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import floors, instructions, operations, pages, samples, targets
from .run import PARTS, REPORT
from .tables import TABLES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMITTED = json.loads(REPORT.read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a quick run."""
    at = tmp_path_factory.mktemp("bench") / "report.json"
    command = [sys.executable, "-m", "tests.bench", "--quick", "--report", str(at)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads(at.read_text())
    return report


def figures_of(part: Any) -> Iterator[dict[str, float]]:
    if isinstance(part, dict):
        if "median" in part:
            yield part
        else:
            for inner in part.values():
                yield from figures_of(inner)


@pytest.mark.once
def test_the_quick_form_measures_every_part(quick: dict[str, Any]) -> None:
    assert [part for part in PARTS if not quick[part]] == []
    assert set(quick["costs"]) == set(operations.OPERATIONS)
    for part in PARTS:
        found = list(figures_of(quick[part]))
        assert found or part in ("memory", "background"), part
        assert all(figure["low"] <= figure["median"] <= figure["high"] for figure in found), part
    assert quick["conditions"]["form"] == "quick"
    assert min(quick["memory"]["rows"].values()) > 0
    assert len(quick["targets"]) > 8


@pytest.mark.once
def test_the_quick_form_fills_every_table_and_chart(quick: dict[str, Any], tmp_path: Path) -> None:
    for name, made in TABLES.items():
        assert len(made(quick).splitlines()) > 2 or name == "conditions"
    pages.draw(quick, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(pages.CHARTS)
    for name in pages.CHARTS:
        text = (tmp_path / name).read_text()
        assert "<svg" in text
        assert "govredis" in text or name in ("agents.svg", "curve.svg")
        assert "<script" not in text  # a page of docs/ loads nothing from elsewhere


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_has_the_figures_of_the_committed_report(name: str) -> None:
    page = (DOCS / name).read_text()
    assert page.count("<!-- bench: ") > 3
    assert pages.with_tables(page, COMMITTED) == page


def test_the_committed_report_is_of_a_full_run_with_all_peers() -> None:
    assert COMMITTED["conditions"]["form"] == "full"
    assert COMMITTED["conditions"]["missing"] == []
    assert set(COMMITTED["load"]) == set(PARTS)


def test_every_chart_is_shown() -> None:
    drawn = {path.name for path in REPORT.parent.glob("*.svg")}
    shown = "".join((DOCS / name).read_text() for name in pages.PAGES)
    assert drawn == set(pages.CHARTS) == {name for name in drawn if f"(bench/{name})" in shown}


def test_figures_are_medians_with_quartiles() -> None:
    assert samples.figure([5, 1, 3, 2, 4]) == {"median": 3, "low": 2, "high": 4, "of": 5}
    assert samples.figure([7]) == {"median": 7, "low": 7, "high": 7, "of": 1}
    # A slow round, the second, is slow for both.
    assert samples.ratio([2, 20, 2], [1, 10, 1])["high"] == 2


def test_a_target_holds_up_to_its_bound() -> None:
    def one(spent: float) -> dict[str, list[float]]:
        return {measure: [spent] * 3 for measure in ("client_us", "server_us")}

    made = {name: {who: one(10) for who in by} for name, by in operations.OPERATIONS.items()}
    made["limits.hit"][operations.OURS]["server_us"] = [12.5] * 3
    made["locks.acquire + release"][operations.OURS]["server_us"] = [12.6] * 3
    made["sessions.get"][operations.OURS]["client_us"] = [26.0] * 3  # 10 of them are JSON
    held = {target["name"]: target["held"] for target in targets.judge(made, None)}
    assert held["Redis's CPU, limits.hit, to limits"]
    assert not held["Redis's CPU, locks.acquire + release, to redis-py"]
    assert held['client CPU, sessions.get, to `client.call("GET")`']


@pytest.mark.once
def test_instructions_are_counted_by_operation_and_contestant(system_binary: Callable[[str], str]) -> None:
    system_binary("valgrind")
    found = instructions.measure(["GET", "metadata.get"], rounds=2)
    assert {operation for operation, _ in found} == {"GET", "metadata.get"}
    # Two keys cost Redis more than one: a count that no load of this machine changes.
    assert 0 < found["GET", operations.OURS] < found["metadata.get", operations.OURS]


@pytest.mark.once
def test_each_promise_adds_to_the_price(
    system_binary: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system_binary("valgrind")
    monkeypatch.setattr(floors, "ROUNDS", 1)
    monkeypatch.setattr(floors, "TURN", 20)
    floors.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.count(" | ") == 3]
    counts = {(n, row[0]): int(row[1].replace(",", "")) for n, row in enumerate(rows) if row[1][:1].isdigit()}
    assert sum("ours" in name for _, name in counts) == 3
    ours, cheapest = ([count for (_, name), count in counts.items() if what in name] for what in ("ours", "do nothing"))
    assert cheapest and max(cheapest) < min(ours)
