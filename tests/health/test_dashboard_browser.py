"""The dashboard in a browser, on real servers: Debian's chromium, and the rules of axe-core."""

from __future__ import annotations

import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

from govredis import GovRedis
from govredis.health.dashboard.server import DashboardServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]
#: A name that a tenant may choose.
HOSTILE = "<img src=x onerror='document.title = 1'>" + "x" * 200


@pytest.fixture(scope="module")
def chromium(system_binary: Callable[[str], str]) -> Iterator[Browser]:
    browser = Browser(system_binary("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.look_as()
    return chromium


@pytest.fixture
def site(gov: GovRedis, browser: Browser) -> Iterator[str]:
    """The URL of the dashboard of a gov with something to see, hostile names among it.

    When the test ends, the browser has nothing to complain of.
    """
    for _ in range(2):
        gov.limits.hit(HOSTILE[:200], "1/hour", operation="kg_store")
    gov.limits.hit("a", "9/hour")
    gov.limits.close()
    gov.internal.account.flush()
    gov.health.snapshot()
    with DashboardServer(gov.internal.dashboard, 0) as server, gov.locks.acquire(HOSTILE, ttl=60):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server.url
        browser.open("about:blank")  # what it has said before has arrived by now, and it asks nothing any more
        complaints, browser.complaints = browser.complaints, []
        server.shutdown()
        thread.join(60)
    assert complaints == []


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The rules of accessibility: the script of axe-core, in the wheel that `make` downloads."""
    found = sorted(Path(sys.prefix, "axe").glob("axe_playwright_python-*.whl"))
    if not found:
        missing = "no axe-core found: `make test` downloads it to .venv/axe"
        pytest.fail(missing) if pytestconfig.getoption("--all-servers") else pytest.skip(missing)
    return zipfile.Path(found[-1], "axe_playwright_python/axe.min.js").read_text()


def refresh(browser: Browser) -> None:
    """The page looks again, as it does by itself every few seconds."""
    browser.run("document.getElementById('state').dataset.old = 1")
    browser.run("document.dispatchEvent(new Event('visibilitychange'))")
    browser.until("!document.getElementById('state').dataset.old")


def test_a_look_again_keeps_scroll_focus_and_open_tables(browser: Browser, site: str) -> None:
    browser.look_as(zone="Asia/Tokyo")
    browser.open(site)
    assert browser.run("[...document.querySelectorAll('time')].every((each) => each.title.includes('GMT+9'))")
    assert browser.run("document.getElementById('zone').textContent") == "Asia/Tokyo"
    summary = "document.getElementById('chart-latency-redis-summary')"
    browser.run(f"{summary}.click(), {summary}.focus()")
    browser.run("document.getElementById('chart-latency-redis-scroll').scrollTo(0, 150)")
    browser.run("scrollTo(0, 777)")
    where = "[scrollY, document.activeElement.id, document.getElementById('chart-latency-redis-scroll').scrollTop]"
    before = browser.run(where)
    refresh(browser)
    assert browser.run(where) == before == [777, "chart-latency-redis-summary", 150]
    assert browser.run(f"{summary}.parentNode.open")
    assert browser.run("[...document.querySelectorAll('time')].every((each) => each.title.includes('GMT+9'))")


def test_what_is_read_stays_in_its_place_when_others_grow_above_it(browser: Browser, site: str) -> None:
    browser.open(site)
    browser.run("scrollTo(0, 900)")
    part = "document.getElementById('chart-denied').getBoundingClientRect().top"
    browser.run("document.getElementById('state').append(...Array(9).fill().map(() => document.createElement('hr')))")
    before = browser.run(part)
    refresh(browser)  # what has been put there is gone again
    assert browser.run(part) == pytest.approx(before, abs=1)


def test_it_does_not_look_while_it_is_paused_or_read_and_tells_when_the_site_is_gone(
    browser: Browser, site: str
) -> None:
    browser.open(site)
    look = "document.dispatchEvent(new Event('visibilitychange')), asked"
    pause = "document.getElementById('pause')"
    browser.run(f"{pause}.click()")
    browser.run("window.asked = 0, window.own = fetch, window.fetch = (...with_) => (asked++, own(...with_))")
    assert browser.run(look) == 0
    assert browser.run(f"{pause}.getAttribute('aria-pressed')") == "true"
    browser.run("getSelection().selectAllChildren(document.getElementById('headline'))")
    browser.run(f"{pause}.click()")
    assert browser.run(look) == 0, "somebody copies a part of it"
    assert browser.run(f"getSelection().removeAllRanges(), {look}") >= 1
    assert browser.run("document.getElementById('stale').hidden")
    browser.run("window.fetch = async () => new Response('', {status: 403})")
    browser.until(f"{look}, !document.getElementById('stale').hidden")
    said = browser.until("!document.getElementById('stale').hidden && document.getElementById('stale').textContent")
    assert said.startswith("This page is as old as ")
    assert said.endswith("The site cannot be asked: it answers 403.")


def test_a_keyboard_reaches_everything_in_order_and_shows_where_it_is(browser: Browser, site: str) -> None:
    browser.open(site)
    reached = []
    for _ in range(9):
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.id || document.activeElement.className"))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached[:5] == ["skip", "span-hour", "span-day", "span-week", "pause"]
    assert [each for each in reached[5:] if each.endswith("-summary")], "the figures of the charts"
    browser.run("document.getElementById('span-day').focus()")
    browser.press("Enter", 13)
    browser.until("location.search === '?span=day' && document.readyState === 'complete'")
    assert browser.run("document.querySelector('[aria-current=page]').id") == "span-day"


def test_a_pointer_shows_the_figures_below_it(browser: Browser, site: str) -> None:
    browser.open(site)
    browser.run("document.getElementById('pause').click(), document.getElementById('chart-denied').scrollIntoView()")
    box = browser.run(
        "(({left, top, width, height}) => [left, top, width, height])"
        "(document.querySelector('#chart-denied .lines').getBoundingClientRect())"
    )
    x, y = box[0] + box[2] * 0.999, box[1] + box[3] / 2
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = browser.until("document.querySelector('#chart-denied output').textContent")
    last = browser.run("[...document.querySelector('#chart-denied tbody').rows].at(-1).textContent")
    assert shown.replace(" · ", "") == last
    assert (
        browser.run("document.querySelector('#chart-denied .cursor').getAttribute('d')") == "M991.6666666666666 0V200"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_rule_of_axe_is_violated(browser: Browser, site: str, axe: str, dark: bool, width: int) -> None:
    browser.look_as(width=width, dark=dark)
    browser.open(site)
    assert browser.run("document.title").startswith("Everything works")
    assert browser.run("document.documentElement.scrollWidth") == width, "nothing stands out at the right"
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(15, 18, 22)" if dark else "rgb(244, 245, 247)")
    browser.run(f"{axe}; 1")
    found: Any = browser.run("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))")
    assert found == []


def test_without_a_script_it_reloads_itself_and_says_utc(browser: Browser, site: str) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(site)
        assert browser.run("document.querySelector('meta[http-equiv=refresh]').content") == "30"
        assert browser.run("document.querySelector('.fresh a').checkVisibility()")
        assert browser.run("document.getElementById('zone').textContent") == "UTC"
        assert not browser.run("document.getElementById('pause').checkVisibility()")
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
