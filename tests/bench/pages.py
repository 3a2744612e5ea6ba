"""A report in the docs and on the terminal: tables between markers of a page, and charts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from . import operations
from .operations import OURS
from .tables import TABLES, Report

#: `<!-- bench: name -->`, the table, `<!-- end -->`.
_PLACE = re.compile(r"(<!-- bench: (\w+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)
PAGES = ("performance.md", "scaling.md")


def with_tables(page: str, report: Report) -> str:
    """The page with the report's tables at their places. Raises KeyError for a place of no table."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]](report)}\n\n{place[3]}", page)


def write_tables(report: Report, docs: Path) -> None:
    for name in PAGES:
        page = docs / name
        page.write_text(with_tables(page.read_text(), report))


def show(report: Report) -> None:
    """The tables of the parts that were measured."""
    for name, made in TABLES.items():
        try:
            text = made(report)
        except KeyError:
            continue  # of a part that was not asked for
        print(f"\n{name}\n\n{text}")


# -- charts ------------------------------------------------------------------------------------------------------------


def _chart(kind: str, title: str, **options: Any) -> Any:
    import pygal
    from pygal.style import DefaultStyle

    # It hooks itself into all imports, in Python 2's way, for maps that nobody here draws.
    sys.meta_path[:] = [hook for hook in sys.meta_path if not type(hook).__module__.startswith("pygal")]

    style = DefaultStyle(background="white", plot_background="white", font_family="sans-serif")
    chart = getattr(pygal, kind)(
        title=title, style=style, js=(), width=800, height=400, legend_at_bottom=True, **options
    )
    chart.uuid = "bench"  # the same each time
    return chart


def _cost_chart(report: Report, measure: str, title: str) -> Any:
    chart = _chart("HorizontalBar", title)
    chart.height = 700
    shown = {name: by for name, by in report["costs"].items() if name != "GET"}
    chart.x_labels = list(shown)
    whos = [OURS, operations.REDIS_PY, operations.LIMITS, operations.THROTTLED, operations.REDIS_LOCK]
    for who in whos:
        chart.add(who, [by[who][measure]["median"] if who in by else None for by in shown.values()])
    return chart


def _throughput_chart(report: Report, kind: str, operation: str) -> Any:
    by_size = report["throughput"][kind][operation]
    chart = _chart("Bar", f"Calls a second of {', '.join(by_size)} {kind}: {operation}")
    chart.x_labels = [f"{size} {kind}" for size in by_size]
    for who in next(iter(by_size.values())):
        chart.add(who, [by[who]["per_second"]["median"] for by in by_size.values()])
    return chart


def _curve_chart(report: Report) -> Any:
    chart = _chart("Bar", "CPU of Redis for a hit, µs, by the entries that its window has")
    whos = {who: by for who, by in report["curve"].items() if "listpack" not in who}
    counts = list(next(iter(whos.values())))
    chart.x_labels = [f"N = {int(n):,}" for n in counts]
    for who, by in whos.items():
        chart.add(who, [by[n]["server_us"]["median"] for n in counts])
    return chart


def _agents_chart(report: Report) -> Any:
    chart = _chart("HorizontalBar", "Bytes of each: Redis's keys and PostgreSQL's rows", show_legend=False)
    memory = report["memory"]
    every = {
        **{f"key: {k}": v for k, v in memory["keys"].items()},
        **{f"row: {k}": v for k, v in memory["rows"].items()},
    }
    chart.x_labels = list(every)
    chart.add("bytes", list(every.values()))
    return chart


CHARTS = {
    "server.svg": lambda report: _cost_chart(report, "server_us", "CPU of Redis for a call, µs"),
    "client.svg": lambda report: _cost_chart(report, "client_us", "CPU of the client for a call, µs"),
    "hits.svg": lambda report: _throughput_chart(report, "processes", "limits.hit"),
    "locks.svg": lambda report: _throughput_chart(report, "processes", "locks.acquire + release"),
    "threads.svg": lambda report: _throughput_chart(report, "threads", "limits.hit"),
    "curve.svg": _curve_chart,
    "agents.svg": _agents_chart,
}


def draw(report: Report, folder: Path) -> None:
    for name, made in CHARTS.items():
        folder.mkdir(exist_ok=True)
        text = made(report).render(is_unicode=True)
        # pygal's own settings, for the script that it would load from elsewhere.
        (folder / name).write_text(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL) + "\n")
