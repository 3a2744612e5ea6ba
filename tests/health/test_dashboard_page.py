"""The dashboard's page of a given view: its texts, its charts, and what strangers' names cannot do to it."""

from __future__ import annotations

from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from dashboard_views import BEGAN, NOW, a_view, ago

from govredis.health.dashboard import texts
from govredis.health.dashboard.charts import HIGH, WIDE, Band, Chart, Series, draw
from govredis.health.dashboard.page import HEADERS, asset, page_of
from govredis.health.dashboard.view import SPANS, CheckRow, DeniedRow, Fault, LockRow, NodeRow, OutageRow

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&lt;\x1b[31m\u202e\x00\ud800"
SPELLED_OUT = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&lt;\\x1b[31m\\u202e\\x00\\ud800"


class Page(HTMLParser):
    """The tags with their attributes, and the texts, of a page."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page_of(a_view(**changes)).body.decode())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_strangers_names_are_texts_and_nothing_else() -> None:
    plain, hostile = Page(), Page(
        prefix=HOSTILE,
        headline=HOSTILE,
        findings=(Fault(HOSTILE, "warn", HOSTILE, NOW, HOSTILE, HOSTILE, HOSTILE),),
        checks=(CheckRow(HOSTILE, "warn", HOSTILE, ((HOSTILE, HOSTILE),)),),
        locks=(LockRow(HOSTILE, HOSTILE, HOSTILE, None, None), LockRow("x", "lock", "e2", None, None)),
        denied=(DeniedRow(HOSTILE, HOSTILE, 1),),
        outages=(OutageRow(HOSTILE, HOSTILE, NOW, None, HOSTILE, 1, 1.0),),
        bands=(Band(HOSTILE, ago(seconds=95), None),),
        unknown=((HOSTILE, HOSTILE),),
    )  # fmt: skip
    assert len(hostile.all("script")) == 1
    assert not hostile.all("img")
    assert not [name for _, attributes in hostile.tags for name in attributes if name.startswith(("on", "style"))]
    assert sum(text.count(SPELLED_OUT) for text in hostile.texts) == 24
    assert "\x1b" not in hostile.text
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in plain.tags}


def test_the_page_needs_nothing_from_elsewhere_and_nothing_inline() -> None:
    page = Page()
    links = [each.get(name) for _, each in page.tags for name in ("href", "src") if each.get(name)]
    assert set(links) == {
        *("#main", "?span=hour", "?span=day", "?span=week"),
        *("dashboard/dashboard.css", "dashboard/dashboard.js", "dashboard/warn.svg"),
    }
    parts = [link.partition("/")[2] for link in links if link and link.startswith("dashboard/")]
    assert all(asset(part) is not None for part in parts)
    assert asset("../page.py") is None
    for each in asset("dashboard.css"), asset("dashboard.js"):
        assert each is not None and b"//" not in each.body.replace(b"// ", b"").replace(b"http://www.w3.org", b"")
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) <= {"'self'", "'none'"}
    assert [policy[name] for name in ("frame-ancestors", "base-uri", "form-action")] == ["'none'"] * 3
    assert {name: HEADERS[name] for name in HEADERS if name != "Content-Security-Policy"} == {
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def test_the_fault_is_told_with_its_time_its_cover_and_its_remedy() -> None:
    text = Page().text
    assert (
        "Redis is away, and the fallbacks cover it Something has been wrong since 2026-11-30 14:21:30 , for 1 min 35 s."
        in text
    )
    assert "redis warns it does not answer Since 2026-11-30 14:21:30 , for 1 min 35 s Meanwhile Locks go on." in text
    assert "To do Start it. More docs/a.md" in text
    assert "Unknown now Held locks : Redis is away" in text


def test_since_the_beginning_of_the_charts_is_perhaps_longer() -> None:
    assert "for 1 h or longer." in Page(since=BEGAN - timedelta(seconds=55)).text


def test_tables() -> None:
    text = Page().text
    assert "report 2026-11-30 11:23:05 3 h web-1, process 7 20 s" in text
    assert "x unknown \u2013 e2 never" in text
    assert "agent-1 kg_store 1,234" in text
    assert "Redis 2026-11-30 14:21:30 1 min 35 s, and it goes on hung 15,234 200 ms web-1:7" in text


def test_the_primaries_of_a_cluster_have_a_table() -> None:
    assert not any(each.get("id") == "nodes" for each in Page().all("section"))
    figures = ("1 ms", "1,234", "6 MiB", "7", "80", "1")
    nodes = NodeRow("10.0.0.1:6379", "pass", figures), NodeRow(HOSTILE, "warn", (None,) * 6)
    page = Page(nodes=nodes)
    assert "Answered in Keys Memory Clients Commands a second Replicas" in page.text
    assert "10.0.0.1:6379 pass 1 ms 1,234 6 MiB 7 80 1" in page.text
    assert "warn \u2013 \u2013 \u2013" in page.text
    assert not page.all("img")


@pytest.mark.parametrize(
    ("table", "unknown", "nothing"),
    [
        ("outages", "Outages Unknown now.", "Outages None in the last hour."),
        ("locks", "Held locks Unknown now.", "Held locks No locks are held."),
        ("denied", "Most denied Unknown now.", "Most denied Nobody was denied in this hour and the one before."),
        ("snapshots", "Last snapshots Unknown now.", "Last snapshots None yet: Celery's beat stores one each minute"),
    ],
)
def test_unknown_is_not_nothing(table: str, unknown: str, nothing: str) -> None:
    assert unknown in Page(**{table: None}).text
    assert nothing in Page(**{table: ()}).text


def test_the_slowest_command_stands_beside_the_outages() -> None:
    for outages in (), a_view().outages:
        assert "Redis's slowest command of the last ten minutes: KEYS, 12 ms." in Page(outages=outages).text


def test_a_chart_has_its_figures_in_a_table_and_in_words() -> None:
    page = Page()
    (lines,) = [each for each in page.all("svg") if each.get("role") == "img"]
    assert lines["aria-label"] == (
        "Redis latency: p50 from 1 ms to 60 ms, now 60 ms; p99 from 1 ms to 60 ms, now 60 ms; 1 outage"
    )
    assert "Mon 30 13:24 1 ms 1 ms Mon 30 13:25 2 ms 2 ms" in page.text
    assert "Queues of Celery No queue is known." in page.text


def test_the_reader_looks_again_soon_where_something_is_unknown() -> None:
    week = SPANS["week"]
    every = [Page(span=week, unknown=unknown).all("main")[0]["data-every"] for unknown in ((), (("a", "b"),))]
    assert every == ["60", "5"]


class TestDrawing:
    @staticmethod
    def of(*values: float | None, bands: tuple[Band, ...] = (), **options: Any) -> Any:
        chart = Chart("c", "C", texts.number, (Series("s", values),), **options)
        return draw(chart, BEGAN, BEGAN + timedelta(minutes=len(values)), bands)

    def test_a_line_has_gaps_and_dots(self) -> None:
        drawing = self.of(0, 5, None, 10, None)
        assert (drawing.paths, drawing.dots) == (("M100.0 200.0L300.0 100.0",), ("M700.0 0.0h.1",))
        assert drawing.ticks == ("10", "5", "0")

    def test_a_state_holds_for_its_whole_step(self) -> None:
        drawing = self.of(0, 2, None, 1, most=2.0, stepped=True)
        assert drawing.paths == ("M0.0 200.0H250.0V0.0H500.0M750.0 100.0H1000.0",)

    @pytest.mark.parametrize(
        ("highest", "ticks"),
        [
            (0, ("1", "0.5", "0")),
            (7, ("10", "5", "0")),
            (0.3, ("0.4", "0.2", "0")),
            (41, ("50", "25", "0")),
            (50, ("50", "25", "0")),
        ],
    )
    def test_an_axis_is_round(self, highest: float, ticks: tuple[str, ...]) -> None:
        assert self.of(highest).ticks == ticks

    def test_an_axis_of_bytes_is_round_for_bytes(self) -> None:
        chart = Chart("c", "C", texts.size, (Series("s", [700 * 2**20]),), binary=True)
        assert draw(chart, BEGAN, NOW).ticks == ("1 GiB", "512 MiB", "0 B")

    def test_an_axis_of_times_is_logarithmic(self) -> None:
        chart = Chart("c", "C", texts.seconds, (Series("s", [0.0003, 0.2, 0.0]),), log=1e-6)
        drawing = draw(chart, BEGAN, NOW)
        assert drawing.ticks[:4] == ("1 s", "100 ms", "10 ms", "1 ms")
        one_second, heights = 0.0, [float(part.split()[1]) for part in drawing.paths[0][1:].split("L")]
        assert one_second < heights[1] < heights[0] < heights[2] == HIGH

    def test_counts_of_keys_stand_on_a_logarithmic_axis_from_one(self) -> None:
        chart = Chart("c", "C", texts.number, (Series("s", [0.0, 1.0, 50.0]),), log=1.0)
        drawing = draw(chart, BEGAN, NOW)
        assert drawing.ticks == ("100", "10", "1")
        heights = [float(part.split()[1]) for part in drawing.paths[0][1:].split("L")]
        assert heights[0] == heights[1] == HIGH > heights[2]

    def test_a_band_is_cut_at_the_ends_and_wide_enough_to_see(self) -> None:
        def band(begin: float, end: float | None) -> Band:
            until = None if end is None else BEGAN + timedelta(minutes=end)
            return Band("b", BEGAN + timedelta(minutes=begin), until)

        bands = band(-5, 1), band(9, None), band(5, 5.0001), band(-3, -2), band(10, 11), band(9.999, None)
        drawn = self.of(*([1.0] * 10), bands=bands).bands
        assert drawn == (
            *(("b", 0.0, 100.0), ("b", 900.0, 100.0), ("b", 500.0, 4.0)),
            ("b", WIDE - 4.0, 4.0),
        )


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (texts.seconds(0.000034), "34 µs"),
        (texts.seconds(0.00034), "0.34 ms"),
        (texts.seconds(0.2), "200 ms"),
        (texts.seconds(1.5), "1.5 s"),
        (texts.seconds(0), "0 s"),
        (texts.duration(20), "20 s"),
        (texts.duration(95), "1 min 35 s"),
        (texts.duration(timedelta(days=3, hours=4, minutes=5)), "3 d 4 h"),
        (texts.duration(7200), "2 h"),
        (texts.duration(-1), "0 s"),
        (texts.percent(0.9999), "99.9 %"),
        (texts.percent(1.0), "100 %"),
        (texts.percent(0.5), "50 %"),
        (texts.size(638 * 2**20), "638 MiB"),
        (texts.size(0), "0 B"),
        (texts.number(1234567), "1,234,567"),
        (texts.number(12.345), "12.3"),
        (texts.number(float("inf")), "unknown"),
        (texts.fact("redis.used_memory", 2048), "2 KiB"),
        (texts.fact("seconds", 0.0004), "0.4 ms"),
        (texts.fact("fresh", True), "yes"),
        (texts.fact("missing_migrations", ["0001", "0002"]), "0001, 0002"),
        (texts.fact("policy", None), "unknown"),
    ],
)
def test_texts(said: str, text: str) -> None:
    assert said == text
