"""The page of a DashboardView, and its style, script and icons. All that it shows is escaped."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError, printable
from . import texts
from .charts import HIGH, WIDE, Chart, Drawing, draw
from .view import NODE_FIGURES, SPANS, DashboardView

if TYPE_CHECKING:
    from jinja2 import Template

_FOLDER = Path(__file__).parent
#: Everything is the page's own, from the same site; nothing is inline, and nobody frames it.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
#: The words beside the name of a finding.
_WORDS = {"pass": "", "warn": "warns", "fail": "fails"}
_COLOURS = {"pass": "#1f9d57", "warn": "#d98200", "fail": "#d1322d"}
_SHAPES = {
    "pass": '<circle cx="8" cy="8" r="7"/>',
    "warn": '<path d="M8 1L15.5 15H.5Z"/>',
    "fail": '<path d="M5 1h6l4 4v6l-4 4H5l-4-4V5Z"/>',
}


@dataclass(frozen=True, slots=True)
class PageResource:
    """An answer over HTTP; HEADERS go with it."""

    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK


def page_of(view: DashboardView) -> PageResource:
    """Raises ConfigurationError where Jinja2 is not installed."""
    text = _template().render(view=view, spans=SPANS, times=view.times(), words=_WORDS, figures=NODE_FIGURES)
    return PageResource(text.encode(errors="backslashreplace"), "text/html; charset=utf-8")


def check() -> None:
    """Raises ConfigurationError where Jinja2 is not installed."""
    _template()


def asset(name: str) -> PageResource | None:
    """The style, script or icon that the page names so; None for any other name."""
    return _assets().get(name)


@functools.cache
def _assets() -> dict[str, PageResource]:
    types = {"dashboard.css": "text/css; charset=utf-8", "dashboard.js": "text/javascript; charset=utf-8"}
    found = {name: PageResource((_FOLDER / name).read_bytes(), kind) for name, kind in types.items()}
    for status, shape in _SHAPES.items():
        begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" fill="{_COLOURS[status]}">'
        found[f"{status}.svg"] = PageResource(f"{begin}{shape}</svg>".encode(), "image/svg+xml")
    return found


@functools.cache
def _template() -> Template:
    try:
        import jinja2
    except ImportError:
        raise ConfigurationError(
            "the dashboard needs Jinja2: install govredis[flask] or govredis[cli], which bring it"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(draw=draw, wide=WIDE, high=HIGH)
    environment.filters.update(duration=texts.duration, seconds=texts.seconds, number=texts.number, in_words=_in_words)
    return environment.get_template("dashboard.html")


def _shown(value: Any) -> Any:
    """Texts of others, with their control characters spelled out. Markup is the template's own."""
    return printable(value) if type(value) is str else value


def _in_words(chart: Chart, drawing: Drawing) -> str:
    """The chart for readers who cannot see it."""
    said = []
    for line in chart.series:
        known = [value for value in line.values if value is not None]
        if known:
            now = "" if line.now is None else f", now {chart.unit(line.now)}"
            said.append(f"{line.label} from {chart.unit(min(known))} to {chart.unit(max(known))}{now}")
    outages = f"; {len(drawing.bands)} outage{'s' * (len(drawing.bands) > 1)}" if drawing.bands else ""
    return f"{chart.title}: {'; '.join(said)}{outages}"
